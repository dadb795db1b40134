"""Layers without overlay: what changed in a copy of an image's files becomes the upper directory of an overlay.

`snapshot` writes down a tree; `collect` compares it with the tree as it is later and moves what is new or changed to an
upper directory, with whiteouts for what has gone. `make_layer` does the whole for COPY and WORKDIR over a tree of hard
links, which is safe because placing replaces files and never writes into one. Tasks for the worker; nothing is mounted.

A change is seen by the inode's number and its ctime, which nobody can set back, and a new directory with an old one's
number by its time of birth. In a tree of hard links the ctime also
moves when somebody else links the same file, so there size, mode and mtime decide. Source: man 7 inode.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..linux import syscalls
from . import layer, ownership
from .pack import raise_limits
from .rootfd import Root
from .steps import begin, operate

Record = list[int]
_CLOCK_REALTIME_COARSE = 5  # man 2 clock_gettime; it is what the kernel stamps inodes with


def snapshot(
    *,
    tree: str,
    points: Sequence[Sequence[Any]] = (),
    out: str,
    linked: bool = False,
    opened: dict[str, int] | None = None,
) -> None:
    """Write down what is in `tree`, into the file `out`. `points` ([path, whether a directory]) are made first: mount
    points are not what a command did. With `opened` directories that are closed to us stay open, and it gets the modes
    they had."""
    for path, directory in points:
        _make_point(tree, path.strip("/"), directory=bool(directory))
    found: dict[str, Record] = {"": _record(os.lstat(tree), linked=linked)}
    newest = _look(tree, "", found, linked=linked, opened=opened)
    with open(out, "w") as file:
        json.dump(found, file)
    # Times are as coarse as the kernel's tick: a change in the same one would not be seen.
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= newest:
        time.sleep(0.001)


def collect(*, tree: str, before: str, upper: str, linked: bool = False) -> None:
    """Move what changed in `tree` since the snapshot `before` to the new directory `upper`; `tree` is spent then."""
    raise_limits()
    with open(before) as file:
        known: dict[str, Record] = json.load(file)
    os.mkdir(upper, 0o755)
    _Collector(tree, upper, known, linked=linked).run()


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
    """As `steps.make_layer`, over base/tree: the files of `lowers` as hard links, made by the caller."""
    operations = begin(plan)
    tree, before, upper = f"{base}/tree", f"{base}/before", f"{base}/upper"
    opened: dict[str, int] = {}
    snapshot(tree=tree, out=before, linked=True, opened=opened)
    warnings: list[str] = []
    with Root.open(tree) as root:
        for operation in operations:
            warnings += operate(base, root, operation, fds, userxattr)
    collect(tree=tree, before=before, upper=upper, linked=True)
    for path in sorted(opened, reverse=True):
        _close_again(f"{upper}/{path}", opened[path])
    done = layer.diff_layer(upper=upper, blob_tmp=f"{base}/blob", lowers=lowers, layers=layers, clamp_s=clamp_s)
    return {**done, "warnings": warnings}


def _make_point(tree: str, path: str, *, directory: bool) -> None:
    with Root.open(tree) as root:
        name = os.fsencode(path)
        if root.lstat(name) is not None:
            return
        if directory:
            os.close(root.open_directory(name, create=True))
            return
        parent, last = root.parent(name)
        os.close(os.open(last, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent))


def _record(info: os.stat_result, *, linked: bool) -> Record:
    if stat.S_ISDIR(info.st_mode) or not linked:
        return [info.st_ino, info.st_mode, info.st_ctime_ns]
    return [info.st_ino, info.st_mode, info.st_mtime_ns, info.st_size]


def open_up(*, tree: str) -> dict[str, int]:
    """Open the directories of a tree up that are closed to us: path -> the mode it had."""
    opened: dict[str, int] = {}
    waiting = [""]
    while waiting:
        path = waiting.pop()
        full = f"{tree}/{path}" if path else tree
        closed = _open_up(full)
        if closed is not None:
            opened[path] = closed
        with os.scandir(full) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        waiting += [f"{path}/{name}" if path else name for name in names]
    return opened


def _close_again(path: str, mode: int) -> None:
    """Give a directory that the layer has, too, the mode it had before it was opened up."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(info.st_mode) and stat.S_IMODE(info.st_mode) == mode | 0o700:
        os.chmod(path, mode)


def _look(tree: str, path: str, found: dict[str, Record], *, linked: bool, opened: dict[str, int] | None = None) -> int:
    newest = 0
    full = f"{tree}/{path}" if path else tree
    closed = _open_up(full)
    with os.scandir(full) as entries:
        for entry in list(entries):
            info = entry.stat(follow_symlinks=False)
            below = f"{path}/{entry.name}" if path else entry.name
            found[below] = _record(info, linked=linked)
            newest = max(newest, info.st_ctime_ns)
            if stat.S_ISDIR(info.st_mode):
                newest = max(newest, _look(tree, below, found, linked=linked, opened=opened))
                found[below] = _record(os.lstat(f"{tree}/{below}"), linked=linked)
    if closed is not None and opened is not None:
        opened[path] = closed
        newest = max(newest, os.lstat(full).st_ctime_ns)
    elif closed is not None:
        os.chmod(full, closed)
    return newest


def _open_up(path: str) -> int | None:
    """A directory its own user may not enter is opened up: without privileges there is no other way in. Returns the
    mode it had, None when nothing was to be done."""
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    if mode & 0o700 == 0o700 or os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return None
    os.chmod(path, mode | 0o700)
    return mode


class _Collector:
    def __init__(self, tree: str, upper: str, known: dict[str, Record], *, linked: bool) -> None:
        self.tree = tree
        self.upper = upper
        self.known = known
        self.linked = linked
        self.names: dict[str, list[str]] = {}
        for path in known:
            if path:
                parent, _, name = path.rpartition("/")
                self.names.setdefault(parent, []).append(name)
        self.made: dict[str, os.stat_result] = {}
        self.seen: dict[str, os.stat_result] = {}

    def run(self) -> None:
        info = os.lstat(self.tree)
        self._directory("", info)
        os.chmod(self.upper, stat.S_IMODE(info.st_mode))
        _copy_xattrs(self.tree, self.upper)
        for path in sorted(self.made, reverse=True):
            self._finish(path, self.made[path])
        os.utime(self.upper, ns=(info.st_mtime_ns, info.st_mtime_ns))

    def _finish(self, path: str, info: os.stat_result) -> None:
        target = f"{self.upper}/{path}"
        _copy_xattrs(f"{self.tree}/{path}", target)
        os.chmod(target, stat.S_IMODE(info.st_mode))
        os.utime(target, ns=(info.st_mtime_ns, info.st_mtime_ns))

    def _ensure(self, path: str) -> str:
        """The directory in the upper one, with its parents; attributes follow in `run`."""
        if path and path not in self.made:
            self._ensure(path.rpartition("/")[0])
            self.made[path] = self.seen[path]
            os.mkdir(f"{self.upper}/{path}", 0o700)
        return f"{self.upper}/{path}" if path else self.upper

    def _directory(self, path: str, info: os.stat_result) -> None:
        self.seen[path] = info
        full = f"{self.tree}/{path}" if path else self.tree
        _open_up(full)
        if path and _record(info, linked=self.linked) != self.known[path]:
            self._ensure(path)
        with os.scandir(full) as entries:
            present = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        for name, status in sorted(present.items()):
            below = f"{path}/{name}" if path else name
            old = self.known.get(below)
            if old is not None and self._is_same_directory(below, status, old):
                self._directory(below, status)
            elif old is None or _record(status, linked=self.linked) != old:
                self._move(path, name, status, replaced=old is not None)
        for name in sorted(set(self.names.get(path, ())) - present.keys()):
            fd = os.open(self._ensure(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                ownership.make_whiteout(fd, os.fsencode(name))
            finally:
                os.close(fd)

    def _is_same_directory(self, path: str, status: os.stat_result, old: Record) -> bool:
        if not stat.S_ISDIR(status.st_mode) or not stat.S_ISDIR(old[1]) or old[0] != status.st_ino:
            return False
        # A directory made where another was removed often gets its number, and is younger than that one's last change.
        try:
            return syscalls.birth_time_ns(f"{self.tree}/{path}") <= old[2]
        except OSError:
            return True  # a kernel without statx(2), or a filter that does not know it

    def _move(self, path: str, name: str, status: os.stat_result, *, replaced: bool) -> None:
        source = f"{self.tree}/{path}/{name}" if path else f"{self.tree}/{name}"
        target = f"{self._ensure(path)}/{name}"
        directory = stat.S_ISDIR(status.st_mode)
        closed = directory and status.st_mode & 0o200 == 0
        if closed:  # moving a directory writes its `..`
            os.chmod(source, stat.S_IMODE(status.st_mode) | 0o700)
        os.rename(source, target)
        if directory and replaced:
            os.setxattr(target, "user.overlay.opaque", b"y")
        if closed:
            os.chmod(target, stat.S_IMODE(status.st_mode))


def _copy_xattrs(source: str, target: str) -> None:
    for name in os.listxattr(source, follow_symlinks=False):
        with suppress(OSError):  # security.* and trusted.* need privileges
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
