"""RUN --mount: what each mount stands for, its part in the cache key, and what must lie ready when the command starts.

A bind is a private copy of the selected files (so writes are lost, and `.dockerignore` holds); a cache is a directory
of its own below the store, kept between builds; secrets and sockets are only ever bound, and neither their values nor
their paths enter a key, a layer or the history. Source: Dockerfile reference, RUN --mount; BuildKit's behaviour.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import secrets as random
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import asdict

from ..dockerfile.mounts import Mount
from ..errors import BuildError
from ..oci.selection import selection_digest
from ..store.locks import names_file, try_flock
from .agents import answering
from .cache import digest_of

if TYPE_CHECKING:
    from ..runtime.client import Runtime
    from ..store.layout import Layout

_POLL_S = 0.02
DIRECTORY = "cachemounts"

# (source path, what --mount from= names or None for the context) -> (where it is for the worker, selection)
FindSource = Callable[[str, str | None], tuple[Any, list[dict[str, Any]]]]


class RunMounts(Struct):
    """The mounts of one RUN. `inputs` is their part of the cache key; `namespace` sets cache mounts apart from those of
    other builds (BUILDKIT_CACHE_MOUNT_NS)."""

    mounts: list[tuple[Mount, str, Any, list[dict[str, Any]]]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    secrets: Mapping[str, bytes] = field(default_factory=dict)
    ssh: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""


def plan_mounts(
    mounts: Sequence[Mount],
    *,
    workdir: str,
    find_source: FindSource,
    secrets: Mapping[str, bytes],
    ssh: Mapping[str, str],
    namespace: str = "",
) -> RunMounts:
    """Check `mounts` and find their sources. Raises BuildError in BuildKit's words."""
    plan = RunMounts(secrets=secrets, ssh=ssh, namespace=namespace)
    for number, mount in enumerate(mounts):
        target = _target(mount, workdir, number)
        origin: Any = None
        selected: list[dict[str, Any]] = []
        if mount.type == "bind" or (mount.type == "cache" and mount.from_):
            origin, selected = find_source(mount.source or "/", mount.from_)
            if not selected:
                raise BuildError(f"failed to mount {mount.source}: nothing there matches")
        elif mount.type == "secret" and mount.required and _secret_id(mount) not in secrets:
            raise BuildError(
                f"secret {_secret_id(mount)}: not found",
                resolution=f"give it to the build: --secret id={_secret_id(mount)},src=FILE",
            )
        elif mount.type == "ssh" and mount.required and (mount.id or "default") not in ssh:
            raise BuildError(
                f"unset ssh forward key {mount.id or 'default'}",
                resolution="give it to the build: --ssh default for an agent, --ssh default=KEYFILE for a key",
            )
        plan.mounts.append((mount, target, origin, selected))
        shown = {key: value for key, value in asdict(mount).items() if value not in (None, False)}
        plan.inputs[f"--mount {mount.type} {target}"] = digest_of(
            shown | {"target": target}, selection_digest(selected) if selected else ""
        )
    return plan


def _secret_id(mount: Mount) -> str:
    return mount.id or mount.source or posixpath.basename(mount.target or "")


def _target(mount: Mount, workdir: str, number: int) -> str:
    target = mount.target
    if not target and mount.type == "secret":
        target = "" if mount.env is not None else f"/run/secrets/{posixpath.basename(_secret_id(mount))}"
    elif not target and mount.type == "ssh":
        target = f"/run/buildkit/ssh_agent.{number}"
    elif not target:
        raise BuildError(f"mount target is required for type={mount.type}", resolution="add target=/DIRECTORY")
    full = "/" + posixpath.normpath(posixpath.join("/", workdir or "/", target)).lstrip("/") if target else ""
    if full == "/":
        raise BuildError('invalid mount target "/"', resolution="mount below the root: target=/DIRECTORY")
    return full


# -- ready to run ----------------------------------------------------------------------------------------------------


def attach(
    plan: RunMounts,
    directory: Path,
    layout: Layout,
    stack: ExitStack,
    *,
    stopped: Callable[[], bool],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(operations for `oci.mountfiles.prepare`, runtime-spec mounts, environment) of a step whose container is in
    `directory`. Locks of caches are held until `stack` ends. `stopped` ends the waiting for one."""
    operations: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    environment: list[str] = []
    for number, (mount, target, origin, selected) in enumerate(plan.mounts):
        if mount.type == "tmpfs":
            options = ["nosuid", "nodev"] + ([f"size={mount.size_bytes}"] if mount.size_bytes else [])
            mounts.append({"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options})
        elif mount.type == "bind":
            to = str(directory / f"mount{number}")
            operations.append({"do": "fill", "to": to, "from": origin, "selected": selected})
            single = selected[0]["entries"][0][1] != "d"
            mounts.append(_bind(f"{to}/file" if single else to, target, readonly=mount.readonly))
        elif mount.type == "cache":
            data = stack.enter_context(_held(layout, mount, _cache_id(plan, mount, target), selected, stopped)) / "data"
            mode = 0o755 if mount.mode is None else mount.mode
            owner = {"uid": mount.uid or 0, "gid": mount.gid or 0, "mode": mode}
            operations.append({"do": "cache", "to": str(data), "from": origin, "selected": selected, **owner})
            mounts.append(_bind(str(data), target, readonly=mount.readonly))
        elif mount.type == "secret":
            _attach_secret(plan, mount, target, directory / f"secret{number}", operations, mounts, environment)
        elif (agent := plan.ssh.get(mount.id or "default")) is not None:
            socket = directory / f"ssh{number}"
            stack.enter_context(answering(agent, socket))
            mode = 0o600 if mount.mode is None else mount.mode
            operations.append(
                {"do": "own", "to": str(socket), "uid": mount.uid or 0, "gid": mount.gid or 0, "mode": mode}
            )
            mounts.append(_bind(str(socket), target, readonly=False))
            environment.append(f"SSH_AUTH_SOCK={target}")
    return operations, mounts, environment


def _attach_secret(
    plan: RunMounts,
    mount: Mount,
    target: str,
    path: Path,
    operations: list[dict[str, Any]],
    mounts: list[dict[str, Any]],
    environment: list[str],
) -> None:
    value = plan.secrets.get(_secret_id(mount))
    if value is None:
        if mount.env is not None:  # as BuildKit has it: empty, not whatever else has that name
            environment.append(f"{mount.env}=")
        return
    if mount.env is not None:
        environment.append(f"{mount.env}={value.decode('utf-8', 'surrogateescape')}")
    if not target:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(value)
    mode = 0o400 if mount.mode is None else mount.mode
    operations.append({"do": "own", "to": str(path), "uid": mount.uid or 0, "gid": mount.gid or 0, "mode": mode})
    mounts.append(_bind(str(path), target, readonly=True))


def _bind(source: str, target: str, *, readonly: bool) -> dict[str, Any]:
    return {
        "destination": target,
        "type": "bind",
        "source": source,
        "options": ["bind", "ro" if readonly else "rw", "nosuid", "nodev"],
    }


# -- caches ----------------------------------------------------------------------------------------------------------


def _cache_id(plan: RunMounts, mount: Mount, target: str) -> str:
    identity = mount.id or target
    return f"{plan.namespace}/{identity}" if plan.namespace else identity


@contextmanager
def _held(
    layout: Layout, mount: Mount, identity: str, selected: Sequence[dict[str, Any]], stopped: Callable[[], bool]
) -> Iterator[Path]:
    """The directory of a cache mount, locked as its sharing says: `locked` alone, `shared` with others; `private` is
    the first copy that nobody uses."""
    first = selection_digest(selected) if selected else ""
    key = digest_of("cache mount", 1, identity, first, mount.uid or 0, mount.gid or 0, mount.mode)
    sharing = mount.sharing or "shared"
    number = 0
    while True:
        path = layout.root / DIRECTORY / key / str(number)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # pruned meanwhile
        try:
            if _lock(fd, exclusive=sharing != "shared") and names_file(path, fd):
                about = {"id": identity, "target": mount.target, "used_at": time.time()}
                (path / "about.json").write_text(json.dumps(about))
                yield path
                return
        finally:
            os.close(fd)
        if sharing == "private" and path.exists():
            number += 1
            continue
        if stopped():
            raise BuildError("the build was stopped")
        time.sleep(_POLL_S)


def _lock(fd: int, *, exclusive: bool) -> bool:
    if exclusive:
        return try_flock(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def cache_mounts(layout: Layout) -> list[dict[str, Any]]:
    """The caches kept in the store: {"id", "target", "used_at" (seconds), "path"}."""
    found = []
    for about in sorted((layout.root / DIRECTORY).glob("*/*/about.json")):
        try:
            found.append({**json.loads(about.read_bytes()), "path": str(about.parent)})
        except (OSError, ValueError):
            continue
    return found


def prune_cache_mounts(layout: Layout, runtime: Runtime, paths: Iterable[str] | None = None) -> tuple[list[str], int]:
    """Remove the caches (and downloads of ADD) at `paths`, or all, that no build uses now: (their ids, bytes freed)."""
    names, freed = [], 0
    chosen = (layout.root / DIRECTORY).glob("*/*") if paths is None else map(Path, paths)
    for path in sorted(chosen):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if not try_flock(fd) or not names_file(path, fd):
                continue
            try:
                names.append(str(json.loads((path / "about.json").read_bytes())["id"]))
            except (OSError, ValueError, KeyError):
                names.append(path.parent.name[:12])
            freed += tree_bytes(path)
            grave = layout.tmp / f"removed-{os.getpid()}-{random.token_hex(6)}"
            os.rename(path, grave)
            shutil.rmtree(grave, ignore_errors=True)
            if grave.exists():  # files of subordinate users
                runtime.task("labkernel.oci.layer:discard", paths=[str(grave)])
        finally:
            os.close(fd)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    return names, freed


def tree_bytes(path: Path) -> int:
    """Of the regular files below it; what vanishes meanwhile counts nothing."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                status = os.lstat(f"{folder}/{name}")
            except OSError:
                continue
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def download_directory(layout: Layout, url: str) -> Path:
    """Where what ADD downloads from `url` is kept, beside the caches and pruned with them."""
    key = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
    path = layout.root / DIRECTORY / f"url-{key}" / "0"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
