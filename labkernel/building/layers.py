"""The two ways a build step makes a layer: a short-lived container for RUN, a task of the worker for files.

Both end the same way: the upper directory becomes layers/<diff ID>, its tar becomes a blob, nothing else stays. Left
out: what instructions mean (steps.py) and when a layer is made at all (cache.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DriverError, LabkernelError, TaskError
from ..imaging.provision import Programs, needs_no_mknod
from ..runtime.copies import remove_tree
from ..runtime.driver import cgroup_parent
from ..runtime.owners import NOTES
from ..runtime.spec import finalize_spec, without_mknod
from ..store.blobs import temporary_directory
from ..store.catalog import LayerInfo
from ..store.locks import OWNED_MARK, is_abandoned

if TYPE_CHECKING:
    from ..images import Images
    from ..networks import Networks
    from ..runtime import cdi
    from ..runtime.client import Runtime
    from ..runtime.driver import Driver
    from ..store.blobs import Blobs
    from ..store.layout import Layout

Output = Callable[[bytes], None]
Later = Callable[[Callable[[], object]], None]  # see finishing.py
# (the container's directory, what ends with the step) -> (operations, runtime-spec mounts, environment)
Attach = Callable[[Path, ExitStack], tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]]


class RunEnded(Exception):
    """The command of a RUN ended with a status other than 0, or could not be started."""

    def __init__(self, status: int, error: str = "", *, oom_killed: bool = False, disk_full: bool = False) -> None:
        super().__init__(error)
        self.disk_full = disk_full
        self.status = status
        self.error = error
        self.oom_killed = oom_killed


class Running:
    """The containers that the steps of one build run in, so that the build can be stopped from another thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._stopped = False

    def stopped(self) -> bool:
        return self._stopped

    @contextmanager
    def holding(self, id: str) -> Iterator[None]:
        """While the container `id` may run. Raises RunEnded when the build is stopped already."""
        with self._lock:
            if self._stopped:
                raise RunEnded(137, "the build was stopped")
            self._ids.add(id)
        try:
            yield
        finally:
            with self._lock:
                self._ids.discard(id)

    def stop(self) -> None:
        """End what runs, and let nothing start."""
        with self._lock:
            self._stopped = True
            ids = list(self._ids)
        for id in ids:
            with suppress(LabkernelError):
                self._runtime.kill(id)


@dataclass(frozen=True)
class Sandbox:
    """What a RUN may do, and its host's name. `insecure`: all capabilities, no system call filter, no masked paths;
    `architecture`: that of the image it runs in."""

    network: str = "default"
    insecure: bool = False
    extra_hosts: tuple[str, ...] = ()
    memory_bytes: int = 0
    limits: Mapping[str, Any] = field(default_factory=dict, hash=False)
    hostname: str = "labkernel-build"
    host_masks: tuple[str, ...] = ()
    host_mounts: tuple[dict[str, Any], ...] = field(default=())
    devices: tuple[cdi.Device, ...] = field(default=(), hash=False)
    architecture: str = ""

    def settings(self) -> dict[str, Any]:
        """As settings of a container."""
        found: dict[str, Any] = {"network_mode": self.network, "hostname": self.hostname}
        if self.insecure:
            found |= {"cap_add": ["ALL"], "security_opt": ["seccomp=unconfined", "systempaths=unconfined"]}
        if self.extra_hosts:
            found["extra_hosts"] = list(self.extra_hosts)
        if self.memory_bytes:
            found["mem_limit"] = found["memswap_limit"] = self.memory_bytes
        return {**found, **self.limits}


class LayerMaker:
    """Makes layers in one store, with its driver."""

    def __init__(
        self, layout: Layout, blobs: Blobs, runtime: Runtime, driver: Driver, images: Images, networks: Networks
    ) -> None:
        self._networks = networks
        self._layout = layout
        self._blobs = blobs
        self._runtime = runtime
        self._driver = driver
        self._images = images
        self._programs = Programs(layout.root / "seccomp")
        self._present: set[str] = set()

    def directories(self, layers: Sequence[LayerInfo]) -> list[str]:
        """Directories of the layers, top first; unpacks what is missing.

        A layer that occurs twice (two empty ones) is named once, at its top place: overlay refuses the same directory
        twice, and below itself a layer adds nothing.
        """
        found: dict[str, None] = {}
        for layer in reversed(layers):
            path = self._images.layer_path(layer)
            if layer.diff_id not in self._present:
                self._images.unpack(layer)
                self._present.add(layer.diff_id)
            found[str(path)] = None
        return list(found)

    def place(
        self,
        layers: Sequence[LayerInfo],
        operations: Sequence[dict[str, Any]],
        *,
        later: Later,
        fds: Sequence[int] = (),
        clamp_s: int | None = None,
    ) -> tuple[LayerInfo, int, list[str]]:
        """A layer made by file operations (see `oci.steps.make_layer`): (layer, bytes of its files, warnings)."""
        self._need_overlay()
        lowers = self.directories(layers)
        with ExitStack() as stack:
            base = stack.enter_context(temporary_directory(self._layout, "build"))
            stack.callback(self._clear, base)
            done = self._task(
                "labkernel.oci.steps:make_layer",
                fds=fds,
                base=str(base),
                lowers=lowers,
                plan=self._plan(base, operations),
                layers=str(self._layout.layers),
                clamp_s=clamp_s,
            )
            return *self._finish(base / "blob", done, stack, later), done["warnings"]

    def scan(
        self,
        layers: Sequence[LayerInfo],
        patterns: Sequence[str],
        *,
        exclude: Sequence[str] = (),
        parents: bool = False,
    ) -> list[dict[str, Any]]:
        """What COPY --from would take from the merged file system of `layers`. Raises FileNotFoundError."""
        self._need_overlay()
        lowers = self.directories(layers)
        with temporary_directory(self._layout, "scan") as base:
            found = self._task(
                "labkernel.building.scan:scan",
                base=str(base),
                lowers=lowers,
                patterns=list(patterns),
                exclude=list(exclude),
                parents=parents,
            )
            if found.get("missing") is not None:
                raise FileNotFoundError(2, "no such file or directory", found["missing"])
            sources: list[dict[str, Any]] = found["sources"]
            return sources

    def run(
        self,
        layers: Sequence[LayerInfo],
        *,
        argv: Sequence[str],
        config: Mapping[str, Any],
        environment: Sequence[str],
        sandbox: Sandbox,
        files: Mapping[str, bytes],
        attach: Attach | None,
        fds: Sequence[int],
        running: Running,
        on_output: Output,
        later: Later,
        clamp_s: int | None = None,
    ) -> tuple[LayerInfo, int, list[str]]:
        """Run `argv` over `layers` in a container of its own; what it changed: (layer, bytes of its files, warnings).

        `files` (absolute path -> content) are there, executable, while it runs and not afterwards; so is what `attach`
        brings, which may copy from the directories `fds`. No file is younger than `clamp_s` in the layer. Raises
        RunEnded.
        """
        self._need_overlay()
        lowers = self.directories(layers)
        with ExitStack() as place, ExitStack() as stack:
            id, directory, ended = place.enter_context(self._container_directory())
            upper = self._new_upper(directory, lowers)
            mounts = [*sandbox.host_mounts, *_bind_files(directory, files)]
            if attach is not None:
                operations, more, variables = attach(directory, stack)
                mounts += more
                environment = [*environment, *variables]
                self._prepare_mounts(directory, operations, fds)
            rootfs = self._rootfs(directory, lowers, upper)
            parts: dict[str, Any] = {"argv": argv, "config": config, "environment": environment, "mounts": mounts}
            spec = self._spec(id, directory, sandbox, rootfs=rootfs, **parts)
            _write_private(directory / "config.json", json.dumps(spec))
            if sandbox.network == "default":
                self._networks.lend(str(directory))
            with running.holding(id):
                warnings = self._carry_out(id, on_output)
            ended()
            done = self._task(
                "labkernel.oci.layer:diff_layer",
                upper=str(upper),
                blob_tmp=str(directory / "blob"),
                lowers=lowers,
                layers=str(self._layout.layers),
                clamp_s=clamp_s,
                owners=str(directory / NOTES) if self._driver.single_id else "",
            )
            return *self._finish(directory / "blob", done, place, later), warnings

    def clear_leftovers(self, later: Later) -> None:
        """Remove the directories of steps whose builder was killed, be it after they had ended."""
        folder = self._layout.containers
        # Looked for at once: two threads that ask the file system for one file after the other slow each other down.
        for name in os.listdir(folder):
            if is_abandoned(f"{folder}/{name}"):
                later(partial(self._clear_leftover, name))

    def _clear_leftover(self, name: str) -> None:
        with suppress(LabkernelError):
            self._runtime.remove(name, force=True)
        with suppress(OSError):  # no reason for a build to fail
            remove_tree(str(self._layout.container_dir(name)))

    # -- parts -------------------------------------------------------------------------------------------------

    def _spec(
        self,
        id: str,
        directory: Path,
        sandbox: Sandbox,
        *,
        rootfs: dict[str, Any],
        argv: Sequence[str],
        config: Mapping[str, Any],
        environment: Sequence[str],
        mounts: Sequence[dict[str, Any]],
    ) -> dict[str, Any]:
        settings = sandbox.settings()
        spec = finalize_spec(
            id=id,
            command=argv,
            image_config={key: config[key] for key in ("Env", "User", "WorkingDir") if config.get(key)},
            settings={"entrypoint": [], "environment": list(environment), **settings},
            rootfs=rootfs,
            directory=str(directory),
            mounts=mounts,
            single_id=self._driver.single_id,
            limits=self._driver.cgroup_version != 0,
            devices=self._driver.name == "root" and self._driver.cgroups.get("devices") == "kernel",
            seccomp_program=self._programs.find(settings, []),
            cgroup_parent=cgroup_parent(self._layout),
            hidden=sandbox.host_masks,
        )
        if self._driver.single_id:
            spec["labkernel"]["owners"] = True
        if not any(word.startswith("HOSTNAME=") for word in (*(config.get("Env") or ()), *environment)):
            # A build's environment is what the Dockerfile says; this one would be in whatever a RUN keeps of it.
            spec["process"]["env"] = [word for word in spec["process"]["env"] if not word.startswith("HOSTNAME=")]
        if needs_no_mknod(self._driver, settings):
            without_mknod(spec)
        if sandbox.devices:
            from ..runtime import cdi

            cdi.apply(spec, sandbox.devices, self._driver.name)
        return spec

    def _prepare_mounts(self, directory: Path, operations: Sequence[dict[str, Any]], fds: Sequence[int]) -> None:
        if operations:
            base = directory / "mounts"
            base.mkdir(mode=0o700)
            reachable = [self._flattened(base, number, operation) for number, operation in enumerate(operations)]
            plan = self._plan(base, reachable)
            self._task("labkernel.oci.mountfiles:prepare", fds=fds, base=str(base), plan=plan)

    def _flattened(self, base: Path, number: int, operation: dict[str, Any]) -> dict[str, Any]:
        """An operation whose source the task can reach; where there is no overlay (copylayers.py) that takes more."""
        return operation

    def _carry_out(self, id: str, on_output: Output) -> list[str]:
        """Run it to its end; what the user should know of its sandbox. Raises RunEnded."""
        try:
            # Tied: a builder that is killed leaves no command behind.
            attachment = self._runtime.run(id, tied=True)
        except LabkernelError as err:
            if err.exit_code in (126, 127):
                raise RunEnded(err.exit_code, err.brief) from err
            raise
        with attachment:
            for _, data in attachment:
                on_output(data)
        if attachment.exit_code != 0:
            # Asked now: what the command wrote goes away with its container.
            found = os.statvfs(self._layout.root)
            full = found.f_bavail * found.f_frsize < 1 << 20 or (found.f_files > 0 and found.f_favail < 16)
            code = attachment.exit_code or 0
            raise RunEnded(code, attachment.error, oom_killed=attachment.oom_killed, disk_full=full)
        return attachment.warnings

    def _rootfs(self, directory: Path, lowers: Sequence[str], upper: Path) -> dict[str, Any]:
        if not lowers:
            return {"kind": "dir", "path": str(upper)}
        return {
            "kind": "overlay",
            "lower": list(lowers),
            "upper": str(upper),
            "work": str(directory / "work"),
            "volatile": True,
            "userxattr": self._driver.userxattr,
        }

    def _new_upper(self, directory: Path, lowers: Sequence[str]) -> Path:
        upper = directory / "upper"
        top = os.stat(lowers[0]) if lowers else None
        if top is None or (top.st_uid == os.geteuid() and stat.S_IMODE(top.st_mode) == 0o755):
            upper.mkdir()
            upper.chmod(0o755)
            (directory / "work").mkdir(mode=0o755)
        else:
            self._task("labkernel.oci.steps:prepare", base=str(directory), lowers=list(lowers))
        return upper

    @contextmanager
    def _container_directory(self) -> Iterator[tuple[str, Path, Callable[[], None]]]:
        """A container without a row: nobody lists it. Its directory is locked, which tells it from a leftover. The last
        value is to be called when it has ended."""
        id = secrets.token_hex(32)
        directory = self._layout.container_dir(id)
        directory.mkdir(mode=0o755)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        ends: list[bool] = []
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under the lock: a directory with the mark and without the lock has lost its builder.
            (directory / OWNED_MARK).touch()
            yield id, directory, lambda: ends.append(True)
        finally:
            try:
                # The supervisor would fork for it while the next step wants to start. It knows nothing more of one that
                # has ended; but without root some files may belong to ids that only its namespace has.
                if ends and self._driver.name != "rootless":
                    remove_tree(str(directory))
                else:
                    with suppress(LabkernelError):
                        self._runtime.remove(id, force=True)
                    if directory.exists():
                        remove_tree(str(directory))
            finally:
                os.close(lock)  # only now: without it somebody who looks for leftovers would remove it, too

    def _task(self, call: str, *, fds: Sequence[int] = (), **args: Any) -> Any:
        args |= {"userxattr": self._driver.userxattr, "single_id": self._driver.single_id}
        return self._runtime.task(call, fds=fds, **args)

    def _finish(self, blob: Path, done: Mapping[str, Any], place: ExitStack, later: Later) -> tuple[LayerInfo, int]:
        """The layer a task has made. Its blob is stored, and what `place` holds removed, while the build goes on."""
        layer = LayerInfo(done["diff_id"], done["digest"], done["media_type"], int(done["blob_bytes"]))
        size_bytes = int(done["size_bytes"])
        self._present.add(layer.diff_id)
        held = place.pop_all()

        def finish() -> None:
            with held:
                self._blobs.adopt(blob, layer.digest, verify=False)
                self._images.catalog.record_unpacked(layer.diff_id, size_bytes, done.get("warnings") or [])

        later(finish)
        return layer, size_bytes

    def _clear(self, base: Path) -> None:
        """What a task left may belong to ids of the namespaces; then it is removed inside them."""
        left = []
        for entry in [entry for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False)]:
            try:
                remove_tree(entry.path)
            except OSError:
                left.append(entry.path)
        if left:
            with suppress(LabkernelError):
                self._runtime.task("labkernel.oci.layer:discard", paths=left)

    def _plan(self, base: Path, operations: Sequence[dict[str, Any]]) -> str:
        # As a file: the list of a large context is longer than a request may be.
        path = base / "plan"
        try:
            path.write_text(json.dumps(list(operations)))
        except OSError as err:
            raise TaskError.from_oserror("planning a step", err) from err
        return str(path)

    def _need_overlay(self) -> None:
        if self._driver.overlay == "copy":
            raise DriverError(
                "building needs overlay file systems, which this machine does not mount here",
                resolution="`labkernel doctor` says why; set LABKERNEL_ROOT to a directory on a local disk",
            )


def _write_private(path: Path, text: str) -> None:
    """For the owner alone: it may hold a secret as an environment variable."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)


def _bind_files(directory: Path, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    mounts = []
    for number, (path, data) in enumerate(files.items()):
        source = directory / f"file{number}"
        source.write_bytes(data)
        source.chmod(0o755)
        mounts.append({"destination": path, "type": "bind", "source": str(source), "options": ["rbind", "ro"]})
    return mounts
