"""What a container changed where nothing is mounted: its copy of the image's files, compared with the image's layers.

Tasks of the worker, for machines without overlay: `changes` is what `containerfs.changes` is with one, and `diff_layer`
what `layer.diff_layer` is. Two files are the same when type, mode, owner, size and time are; of directories the time
says nothing (as docker's drivers without overlay have it, pkg/archive, changes_unix.go). The tree may belong to a
container that runs: it is walked by descriptors, and no link in it is followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..linux import trees
from ..linux.ownfiles import close_own, open_own
from . import layer, ownership
from .layerscan import Node, Scan, kind_of
from .pack import check_depth, raise_limits

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CHANGED, ADDED, DELETED = 0, 1, 2


def changes(*, tree: str, lowers: Sequence[str], hidden: Sequence[str] = ()) -> list[list[Any]]:
    """[kind, path] of what differs in `tree` from the merged `lowers` (top first), in order of names; 0 changed, 1
    added, 2 deleted. `hidden` are mount points that were made for the container: they count when there is something in
    them."""
    raise_limits()
    comparison = _Comparison(lowers, hidden)
    comparison.run(tree)
    return [[kind, path] for path, kind in sorted(comparison.found.items(), key=lambda item: os.fsencode(item[0]))]


def diff_layer(
    *, tree: str, lowers: Sequence[str], hidden: Sequence[str] = (), upper: str, blob_tmp: str
) -> dict[str, Any]:
    """Write what differs as a layer blob to the path `blob_tmp`; see `layer.diff_layer`. `upper` is a new directory on
    the file system of `tree`, for links to what is new: they are the container's own files, and gone when this returns.
    """
    raise_limits()
    os.mkdir(upper, 0o755)
    try:
        _Comparison(lowers, hidden, upper).run(tree)
        return layer.diff_layer(upper=upper, blob_tmp=blob_tmp, lowers=lowers)
    finally:
        trees.remove_tree(upper)


class _Level:
    """An open directory on the way down. `kind`: what it counts as when something in it differs."""

    __slots__ = ("fd", "kind", "made", "mode", "path")

    def __init__(self, path: str, fd: int, mode: int, kind: int) -> None:
        self.path, self.fd, self.mode, self.kind = path, fd, mode, kind
        self.made = not path


class _Comparison:
    def __init__(self, lowers: Sequence[str], hidden: Sequence[str], upper: str | None = None) -> None:
        self.found: dict[str, int] = {}
        merged = Scan()
        for directory in reversed(lowers):
            merged.layer(directory)
        self._merged = merged.root
        self._stubs = {"/" + path.strip("/") for path in hidden}
        self._upper = upper
        self._levels: list[_Level] = []
        self._opened_up: dict[int, int] = {}

    def run(self, tree: str) -> None:
        fd = open_own(tree, _DIRECTORY, opened_up=self._opened_up)
        try:
            self._directory(_Level("", fd, self._mode(fd), CHANGED), self._merged)
        finally:
            close_own(fd, self._opened_up)

    def _directory(self, level: _Level, before: Node | None) -> None:
        check_depth(level.path.count("/"))
        self._levels.append(level)
        names = sorted(os.listdir(level.fd))
        for name in names:
            self._entry(level, name, before.children.get(name) if before else None)
        for name in before.children.keys() - set(names) if before else ():
            self._note(f"{level.path}/{name}", DELETED)
            if self._upper is not None:
                fd = os.open(self._upper + level.path, _DIRECTORY)
                ownership.make_whiteout(fd, os.fsencode(name))
                os.close(fd)
        if level.made and self._upper is not None:
            _give_attributes(level, self._upper + level.path)
        self._levels.pop()

    def _entry(self, level: _Level, name: str, before: Node | None) -> None:
        status = os.stat(name, dir_fd=level.fd, follow_symlinks=False)
        path = f"{level.path}/{name}"
        stub = before is None and path in self._stubs
        if not stat.S_ISDIR(status.st_mode):
            if (stub and status.st_size == 0) or (before is not None and _is_same(before, status)):
                return
            self._note(path, ADDED if before is None else CHANGED)
            if self._upper is not None:
                os.link(name, self._upper + path, src_dir_fd=level.fd, follow_symlinks=False)
            return
        fd = open_own(name, _DIRECTORY, level.fd, self._opened_up)
        try:
            inner = _Level(path, fd, stat.S_IMODE(status.st_mode), ADDED if before is None else CHANGED)
            if before is not None and before.kind != "d":
                before = None  # what lies in a directory that replaced a file is new
                self._note_directory(inner)
            elif not stub and (before is None or not _is_same(before, status)):
                self._note_directory(inner)
            self._directory(inner, before)
        finally:
            close_own(fd, self._opened_up)

    def _note_directory(self, level: _Level) -> None:
        self._levels.append(level)
        self._note(level.path, level.kind)
        self._levels.pop()

    def _note(self, path: str, kind: int) -> None:
        for level in self._levels:
            if level.path:
                self.found.setdefault(level.path, level.kind)
            if not level.made and self._upper is not None:
                os.mkdir(self._upper + level.path, 0o700)
            level.made = True
        self.found[path] = kind

    def _mode(self, fd: int) -> int:
        return self._opened_up.get(fd, stat.S_IMODE(os.fstat(fd).st_mode))


def _is_same(before: Node, status: os.stat_result) -> bool:
    attributes = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    kind = kind_of(status)
    stamp = status.st_size, status.st_mtime_ns
    return (kind, attributes) == (before.kind, before.attributes) and (kind == "d" or stamp == before.stamp)


def _give_attributes(level: _Level, target: str) -> None:
    status = os.fstat(level.fd)
    if os.geteuid() == 0:
        os.chown(target, status.st_uid, status.st_gid)
    for name in os.listxattr(level.fd):
        with suppress(OSError):  # security.* and trusted.* need privileges
            os.setxattr(target, name, os.getxattr(level.fd, name))
    os.chmod(target, level.mode)
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
