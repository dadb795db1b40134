"""Build steps that need no process: files are placed over an image's layers, and what changed becomes a new layer.

Tasks for the worker, inside the driver's namespaces: JSON arguments and results, source trees by descriptor. The
overlay is mounted in the worker child's own mount namespace, so nothing of it can be left. The caller provides `base`,
an empty directory on the store's file system, and removes it afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import DriverError
from ..linux import mounts, syscalls
from . import layer, ownership
from .fresh import Filler, fresh_target
from .pack import raise_limits
from .placing import Placer, find_owner
from .rootfd import Root


def begin(plan: str) -> list[dict[str, Any]]:
    """Make this process ready to write a layer; the operations in the JSON file `plan`."""
    os.umask(0o022)
    raise_limits()
    with open(plan, "rb") as file:
        found: list[dict[str, Any]] = json.loads(file.read())
    return found


def make_layer(
    *,
    base: str,
    lowers: Sequence[str],
    plan: str,
    layers: str,
    fds: Sequence[int] = (),
    userxattr: bool = False,
    single_id: bool = False,
    clamp_s: int | None = None,
) -> dict[str, Any]:
    """Carry out the operations in the JSON file `plan` over `lowers` (top first).

    The layer is then at layers/<diff ID>, its blob at base/blob; returns what `layer.diff_layer` does, and "warnings".
    Operations, each with "owner" (`user[:group]`, "" for
    0:0, None to keep) and optional "mtime_ns":
    {"do": "mkdir", "path"};
    {"do": "write", "name", "data" (text, surrogates for bytes), "dest", "chmod", "several"};
    {"do": "copy", "from": index into `fds` or a list of lower directories, "selected": of `selection.select`, "dest",
    "chmod", "unpack", "archive_owner", "several" (more sources than these)}.

    Raises LayerError, DriverError without overlay, OSError.
    """
    operations = begin(plan)
    upper, work = f"{base}/upper", f"{base}/work"
    new_upper(upper, lowers)
    warnings: list[str] = []
    with mounted(f"{base}/root", lowers, upper, work, userxattr=userxattr) as root, ExitStack() as stack:
        fill = _fresh(root, operations, fds, stack)
        for operation in operations if not fill else ():
            warnings += operate(base, root, operation, fds, userxattr)
        filling = stack.pop_all()
    with filling:
        done = layer.diff_layer(
            upper=upper, blob_tmp=f"{base}/blob", lowers=lowers, layers=layers, clamp_s=clamp_s, fill=fill
        )
    return {**done, "warnings": warnings}


def _fresh(
    root: Root, operations: Sequence[dict[str, Any]], fds: Sequence[int], stack: ExitStack
) -> dict[bytes, Filler]:
    """The directory that is filled while it is packed, made; its source is open until `stack` ends."""
    owner = _owner(root, operations[0].get("owner")) if len(operations) == 1 else None
    if owner is None:
        return {}
    placer = Placer(root, owner=owner, chmod=operations[0].get("chmod"), mtime_ns=operations[0].get("mtime_ns"))
    target = fresh_target(root, operations, placer)
    if target is None:
        return {}
    source = stack.enter_context(Root(os.dup(fds[operations[0]["from"]])))
    return {target: Filler(source, operations[0], owner, made_mode=placer.made_mode)}


def prepare(*, base: str, lowers: Sequence[str], userxattr: bool = False, single_id: bool = False) -> None:
    """Make base/upper and base/work for a RUN."""
    os.umask(0o022)
    new_upper(f"{base}/upper", lowers)
    os.makedirs(f"{base}/work", mode=0o755, exist_ok=True)


def new_upper(upper: str, lowers: Sequence[str]) -> None:
    """An empty upper directory with the attributes of the root directory below it."""
    os.mkdir(upper, 0o755)
    if not lowers:
        os.chmod(upper, 0o755)
        return
    status = os.stat(lowers[0])
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if (status.st_uid, status.st_gid) != (0, 0):
            ownership.set_owner(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
        os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
    finally:
        os.close(fd)


@contextmanager
def mounted(
    target: str, lowers: Sequence[str], upper: str | None = None, work: str | None = None, *, userxattr: bool = False
) -> Iterator[Root]:
    """The merged tree as a Root: an overlay mounted at `target`, or the only directory there is."""
    if not lowers or (upper is None and len(lowers) == 1):
        single = upper or (lowers[0] if lowers else None)
        if single is None:
            os.makedirs(target, exist_ok=True)
        with Root.open(single or target) as root:
            yield root
        return
    os.makedirs(target, mode=0o755, exist_ok=True)
    if work is not None:
        os.makedirs(work, mode=0o755, exist_ok=True)
    try:
        mounts.mount_overlay(target, list(lowers), upper, work, userxattr=userxattr, volatile=upper is not None)
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP):
            raise
        raise DriverError(
            f"this machine does not mount overlay file systems here: {err.strerror}",
            resolution="`labkernel doctor` says why; set LABKERNEL_ROOT to a directory on a local disk",
        ) from err
    try:
        with Root.open(target) as root:
            yield root
    finally:
        syscalls.umount2(target, mounts.MNT_DETACH)
        if "/" in lowers and len(lowers) > 1:
            syscalls.umount2(target, mounts.MNT_DETACH)  # what `mount_overlay` put below it
        os.rmdir(target)


def operate(
    base: str,
    root: Root,
    operation: dict[str, Any],
    fds: Sequence[int],
    userxattr: bool,  # noqa: FBT001
) -> list[str]:
    """Carry out one operation of a plan in the open root; returns warnings."""
    mtime_ns, several = operation.get("mtime_ns"), bool(operation.get("several"))
    owner, archive_owner = _owner(root, operation.get("owner")), _owner(root, operation.get("archive_owner"))
    placer = Placer(
        root,
        owner=owner,
        archive_owner=archive_owner,
        chmod=operation.get("chmod"),
        mtime_ns=mtime_ns,
        unpack=bool(operation.get("unpack")),
    )
    if operation["do"] == "mkdir":
        placer.make_directory(operation["path"])
    elif operation["do"] == "write":
        data = operation["data"].encode("utf-8", "surrogateescape")
        placer.write(operation["name"], data, operation["dest"], several=several)
    else:
        with ExitStack() as stack:
            origin = operation["from"]
            stored = not isinstance(origin, int)
            if not stored:
                source = stack.enter_context(Root(os.dup(fds[origin])))
            else:
                source = stack.enter_context(mounted(f"{base}/source", origin, userxattr=userxattr))
            placer.copy(source, operation["selected"], operation["dest"], several=several, stored=stored)
    return placer.warnings


def _owner(root: Root, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    return find_owner(root, text) if text else (0, 0)
