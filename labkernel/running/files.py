"""The files of a container: archives in and out, what it changed, an image or a tar made of it.

What `Container.get_archive`, `put_archive`, `diff`, `export` and `commit` do; the work on the file system is done by
tasks (`oci.containerfs`, `oci.layer`; without overlay `oci.compared`). Source: Docker SDK for Python, `Container`;
Docker Engine API.
"""

from __future__ import annotations

import copy
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, NotFoundError, UsageError
from ..oci import reference
from ..oci.config import add_history, apply_changes, timestamp
from ..store.blobs import temporary_directory
from ..store.catalog import LayerInfo

if TYPE_CHECKING:
    from ..imaging.image import Image
    from .container import Container

_ROOM = "labkernel.oci.containerfs:"
_COMPARED = "labkernel.oci.compared:"
PIPE_BYTES = 1 << 20
GO_DIRECTORY, GO_SYMLINK = 1 << 31, 1 << 27


class NoSuchFile(NotFoundError):
    """A path that the container does not have."""

    def __init__(self, path: str, container: str) -> None:
        LabkernelError.__init__(self, f"Could not find the file {path} in container {container}")
        self.name = path


def view(container: Container) -> dict[str, Any]:
    """How a task reaches the container's root: through its process, or by mounting it."""
    own = container.config()["labkernel"]
    if own.get("proot"):
        return _translated(container)
    state = container.runtime_state()
    if state["status"] in ("running", "paused") and state.get("pid"):
        return {"pid": int(state["pid"]), "pid_start": int(state.get("pid_start") or 0)}
    mounts = [mount for mount in container.record.get("mounts", ()) if mount["type"] != "tmpfs"]
    files = [
        {"destination": f"/etc/{name}", "source": f"{container.directory}/{name}", "rw": True}
        for name in ("hostname", "hosts", "resolv.conf")
        if (container.directory / name).exists()
    ]
    return {"rootfs": own["rootfs"], "mounts": [*mounts, *files], "base": str(container.directory)}


def _translated(container: Container) -> dict[str, Any]:
    """Under the driver proot nothing is mounted, whether it runs or not."""
    from ..linux import landlock
    from ..runtime.proot import places

    config = container.config()
    found = [place for place in places(config, str(container.directory)) if place.target not in ("/proc", "/sys")]
    return {
        "root": config["labkernel"]["rootfs"]["path"],
        "places": [
            {
                "destination": place.target,
                "source": place.source,
                "rw": bool(place.rights & landlock.WRITE_FILE),
            }
            for place in found
            if os.path.exists(place.source)
        ],
    }


def look(container: Container, path: str) -> dict[str, Any] | None:
    """What is at `path` (the API's ContainerPathStat), None when nothing."""
    found = container._containers.runtime.task(f"{_ROOM}look", view=view(container), path=path)
    if found is None:
        return None
    return {**found, "mtime": timestamp(found.pop("mtime_ns") / 1e9)}


def get_archive(
    container: Container, path: str, chunk_size: int, name: str | None = None
) -> tuple[TaskOutput, dict[str, Any]]:
    """See `Container.get_archive`; `name` is what the first member is called (default: the last part of `path`)."""
    found = look(container, path)
    if found is None:
        raise NoSuchFile(path, container.name)
    base = "." if path.endswith("/.") or path == "." else os.path.basename(os.path.normpath(path)) or "."

    def write(fd: int) -> None:
        task = container._containers.runtime.task
        if task(f"{_ROOM}archive", view=view(container), path=path, name=name or base, fds=[fd]) is None:
            raise NoSuchFile(path, container.name)  # it was there a moment ago

    chunks = TaskOutput(write, chunk_size)
    container._containers.tell(container, "archive-path")
    return chunks, found


def put_archive(container: Container, path: str, data: Any) -> bool:
    """See `Container.put_archive`."""
    reading, writing = _pipe()
    errors: list[BaseException] = []
    feeder = threading.Thread(target=_feed, args=(writing, data, errors), name="labkernel-put", daemon=True)
    feeder.start()
    try:
        done = container._containers.runtime.task(f"{_ROOM}unpack", view=_writable(container), path=path, fds=[reading])
    finally:
        os.close(reading)  # a feeder that still writes gets EPIPE
        feeder.join()
        if errors:  # data that broke off: why it did says more than what the task makes of a part
            raise errors[0]
    if done is None:
        raise NoSuchFile(path, container.name)
    container._containers.tell(container, "extract-to-dir")
    return True


def _writable(container: Container) -> dict[str, Any]:
    found = view(container)
    if "pid" not in found and container.settings.get("read_only"):
        raise UsageError("container rootfs is marked read-only", exit_code=1)
    return found


def export(container: Container, chunk_size: int) -> TaskOutput:
    """See `Container.export`."""
    rootfs = container.config()["labkernel"]["rootfs"]
    over = rootfs["kind"] == "overlay"
    upper = rootfs["upper"] if over and os.path.isdir(rootfs["upper"]) else None
    lowers = rootfs["lower"] if over else [rootfs["path"]]
    chunks = TaskOutput(
        lambda fd: container._containers.runtime.task(
            "labkernel.oci.layer:export_tree", lowers=lowers, upper=upper, fds=[fd]
        ),
        chunk_size,
    )
    container._containers.tell(container, "export")
    return chunks


def diff(container: Container) -> list[dict[str, Any]]:
    """See `Container.diff`."""
    rootfs = container.config()["labkernel"]["rootfs"]
    hidden = container.runtime_state().get("mount_points") or []
    task = container._containers.runtime.task
    if rootfs["kind"] == "overlay":
        found = task(f"{_ROOM}changes", upper=rootfs["upper"], lowers=rootfs["lower"], hidden=hidden)
    else:
        _need_image(container, "to compare with")
        found = task(f"{_COMPARED}changes", tree=rootfs["path"], lowers=_layers(container), hidden=hidden)
    return [{"Path": path, "Kind": kind} for kind, path in found]


def commit(
    container: Container,
    repository: str | None,
    tag: str | None,
    *,
    message: str | None,
    author: str | None,
    pause: bool,
    changes: str | Sequence[str] | None,
    conf: Mapping[str, Any] | None,
) -> Image:
    """See `Container.commit`."""
    _need_image(container, "to put a layer on")
    service = container._containers
    images = service.images
    words = changes.splitlines() if isinstance(changes, str) else list(changes or ())
    document = _document(container, message, author, words, conf)
    frozen = pause and container.status == "running"
    with images.adding(unpacks=True), temporary_directory(service.layout, "commit") as base:
        if frozen:
            container.pause()
        try:
            done = _pack_changes(container, base)
        finally:
            if frozen:
                container.unpause()
        layer = LayerInfo(done["diff_id"], done["digest"], done["media_type"], int(done["blob_bytes"]))
        images.blobs.adopt(base / "blob", layer.digest, verify=False)
        name = f"{repository}:{tag}" if repository and tag else repository
        image = images.commit_layers(document, [*container.image.layers, layer], [name] if name else [])
    familiar = reference.parse_tag(name).familiar if name else ""
    if familiar:
        images.tell(image, "tag", familiar)
    service.tell(container, "commit", comment=message or "", imageID=image.id, imageRef=familiar)
    return image


def _document(
    container: Container, message: str | None, author: str | None, changes: list[str], conf: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The image's config with what the container was started with, then `changes`, then `conf` over it."""
    document = copy.deepcopy(container.image.raw_config)
    config = document["config"] = dict(document.get("config") or {})
    shown = container.attrs["Config"]
    for key in ("Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "Labels", "User", "Volumes", "WorkingDir"):
        if shown.get(key):
            config[key] = shown[key]
        else:
            config.pop(key, None)
    config["Env"] = [word for word in config.get("Env") or () if not word.startswith("HOSTNAME=")]
    if container.settings.get("stop_signal"):
        config["StopSignal"] = str(container.settings["stop_signal"])
    document = apply_changes(document, changes)
    document["config"].update(conf or {})
    document["created"] = timestamp()
    if author:
        document["author"] = author
    else:
        document.pop("author", None)
    add_history(document, " ".join(container.record.get("args") or container.command), comment=message or None)
    if author:
        document["history"][-1]["author"] = author
    return document


def _need_image(container: Container, what_for: str) -> None:
    if not container.image_id:
        raise UsageError(
            f"a container of a root file system has no image {what_for}",
            resolution=f"`container export {container.name} | labkernel import - NAME` makes an image of all of it",
        )


def _layers(container: Container) -> list[str]:
    """The directories of the image's layers, top first."""
    return [str(path) for path in container._containers.images.layer_dirs(container.image)]


def _pack_changes(container: Container, base: Path) -> dict[str, Any]:
    """What the container changed, as the blob base/blob; see `layer.diff_layer`."""
    rootfs, blob_tmp = container.config()["labkernel"]["rootfs"], str(base / "blob")
    task = container._containers.runtime.task
    done: dict[str, Any]
    if rootfs["kind"] == "overlay":
        if not os.path.isdir(rootfs["upper"]):
            task("labkernel.oci.steps:new_upper", upper=rootfs["upper"], lowers=rootfs["lower"])
        done = task(
            "labkernel.oci.layer:diff_layer",
            upper=rootfs["upper"],
            blob_tmp=blob_tmp,
            lowers=rootfs["lower"],
            userxattr=bool(rootfs.get("userxattr")),
        )
    else:
        done = task(
            f"{_COMPARED}diff_layer",
            tree=rootfs["path"],
            lowers=_layers(container),
            hidden=container.runtime_state().get("mount_points") or [],
            upper=str(base / "upper"),
            blob_tmp=blob_tmp,
        )
    return done


class TaskOutput(Iterator[bytes]):
    """What a task writes to a pipe. Iterate for its bytes; or read the descriptor to its end and then `finish`.

    The task's error is raised at the end of what there was."""

    def __init__(self, task: Callable[[int], Any], chunk_size: int) -> None:
        self._fd, writing = _pipe()
        self._chunk_size = chunk_size
        self._errors: list[BaseException] = []
        # It has no reference to this object, which so goes, and ends it, when nobody wants the bytes any more.
        self._worker = threading.Thread(
            target=_carry_out, args=(task, writing, self._errors), name="labkernel-get", daemon=True
        )
        self._worker.start()

    def fileno(self) -> int:
        return self._fd

    def __iter__(self) -> TaskOutput:
        return self

    def __next__(self) -> bytes:
        data = os.read(self._fd, self._chunk_size) if self._fd >= 0 else b""
        if data:
            return data
        self.finish()
        raise StopIteration

    def finish(self) -> None:
        """After the last byte: raises what the task raised."""
        self.close()
        if self._errors:
            raise self._errors.pop()

    def close(self) -> None:
        """No more is wanted: a task that still writes ends with a broken pipe."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._worker.join()

    def __del__(self) -> None:
        self.close()


def _carry_out(task: Callable[[int], Any], writing: int, errors: list[BaseException]) -> None:
    try:
        task(writing)
    except BaseException as err:
        errors.append(err)
    finally:
        os.close(writing)


def _pipe() -> tuple[int, int]:
    """A pipe as wide as this user may have it: a file passes in fewer turns."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


def _feed(fd: int, data: Any, errors: list[BaseException]) -> None:
    """Bytes, a binary file, an iterable of bytes or what pours itself into the pipe; the other end may go away."""
    with os.fdopen(fd, "wb", buffering=0) as file:
        try:
            if hasattr(data, "pour"):
                data.pour(fd)
                return
            for piece in _pieces(data):
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
        except BrokenPipeError:
            pass
        except BaseException as err:
            errors.append(err)


def _pieces(data: Any) -> Iterable[bytes]:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return [bytes(data)]
    if hasattr(data, "read"):
        return iter(lambda: data.read(1 << 18), b"")
    return data  # type: ignore[no-any-return]
