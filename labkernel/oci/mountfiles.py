"""What RUN --mount needs on disk before its container starts: copies for binds, cache directories, owners of secrets.

A task for the worker, inside the driver's namespaces, where foreign owners can be given. Nothing is mounted here but,
for the time of the copy, a source's own layers; the mounts themselves are the container's (runtime/rootfs.py).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from . import layer, ownership
from .pack import raise_limits
from .placing import Placer
from .rootfd import Root
from .steps import mounted


def prepare(
    *,
    base: str,
    plan: str,
    fds: Sequence[int] = (),
    userxattr: bool = False,
    single_id: bool = False,
) -> dict[str, Any]:
    """Carry out the operations in the JSON file `plan`; `base` is a private directory on the store's file system.

    {"do": "fill", "to": new directory, "from": index into `fds` or a list of lower directories, "selected": one source
    of `selection.select`}: its content, or the file itself as `to`/file; files of the context become root's;
    {"do": "cache", "to": directory, "uid", "gid", "mode", and "from" and "selected" for its first content}: made, all
    or nothing, unless it is there;
    {"do": "own", "to": file or socket, "uid", "gid", "mode"}.

    Raises LayerError, DriverError without overlay, OSError. Returns {}.
    """
    os.umask(0o022)
    raise_limits()
    with open(plan, "rb") as file:
        operations = json.loads(file.read())
    for operation in operations:
        if operation["do"] == "own":
            _own(operation["to"], operation)
        elif operation["do"] == "cache":
            _make_cache(base, operation, fds, userxattr=userxattr)
        else:
            os.mkdir(operation["to"], 0o755)
            _fill(base, operation["to"], operation, fds, userxattr=userxattr)
    return {}


def _fill(base: str, to: str, operation: dict[str, Any], fds: Sequence[int], *, userxattr: bool) -> None:
    origin, selected = operation["from"], operation["selected"]
    with ExitStack() as stack:
        target = stack.enter_context(Root.open(to))
        if isinstance(origin, int):
            source = stack.enter_context(Root(os.dup(fds[origin])))
        else:
            source = stack.enter_context(mounted(f"{base}/source", origin, userxattr=userxattr))
        placer = Placer(target, owner=(0, 0) if isinstance(origin, int) else None)
        directory = selected[0]["entries"][0][1] == "d"
        placer.copy(source, selected, "/" if directory else "/file", stored=not isinstance(origin, int))


def _make_cache(base: str, operation: dict[str, Any], fds: Sequence[int], *, userxattr: bool) -> None:
    to = operation["to"]
    if os.path.isdir(to):
        return
    # Beside it and renamed when complete: who comes second, or after a crash, finds all of it or nothing.
    new = f"{to}.{os.getpid()}"
    layer.discard(paths=[new])
    os.mkdir(new, 0o755)
    try:
        if operation.get("selected"):
            _fill(base, new, operation, fds, userxattr=userxattr)
            os.chmod(new, operation["selected"][0]["entries"][0][2])  # it is that directory, whatever the flags say
        else:
            _own(new, operation)
        os.rename(new, to)
    except OSError as err:
        layer.discard(paths=[new])
        if err.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _own(path: str, operation: dict[str, Any]) -> None:
    uid, gid = operation["uid"], operation["gid"]
    if stat.S_ISSOCK(os.lstat(path).st_mode):
        # It cannot be opened, nor carry an owner that no id here is mapped to; then it stays ours, who are root there.
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            ownership.set_owner_at(folder, os.fsencode(os.path.basename(path)), uid, gid)
        finally:
            os.close(folder)
        os.chmod(path, operation["mode"])
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if (uid, gid) != (0, 0):
            ownership.set_owner(fd, uid, gid)
        os.fchmod(fd, operation["mode"])
    finally:
        os.close(fd)
