"""COPY of a directory to a place that does not exist yet: the files and the layer's tar are written in one pass.

That is what most COPY steps are. Nothing there can be in the way, so the new directory is filled outside the overlay
mount (half the cost of a file), and every byte is read once: it goes to the file, and into the tar that `pack` makes of
all that is around it. The result is the same as placing and packing one after the other (placing.py, pack.py), which
everything else takes. Left out, to them: owners that are kept (--from), archives, --parents, several sources.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from ..errors import LayerError
from . import ownership
from .pack import Packer
from .placing import Placer, change_mode
from .rootfd import Root
from .selection import follow
from .tarstream import CHUNK, write_all

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MIN_HOLE = 1 << 20


def fresh_target(root: Root, operations: Sequence[dict[str, Any]], placer: Placer) -> bytes | None:
    """Make the directory that the only one of `operations` is to fill, and its parents; None when it is not such a one.

    `root` is the merged file system, `placer` places in it."""
    if len(operations) != 1 or operations[0]["do"] != "copy" or not isinstance(operations[0]["from"], int):
        return None
    selected = operations[0]["selected"]
    if operations[0].get("owner") is None or len(selected) != 1:
        return None
    if selected[0]["entries"][0][1] != "d" or "parents" in selected[0]:
        return None
    target = placer.resolve(operations[0]["dest"])
    if not target or root.lstat(target) is not None or follow(root, target) is not None:
        return None
    placer.make_parents(target)
    parent, name = root.parent(target)
    os.mkdir(name, 0o755, dir_fd=parent)
    placer.finish()
    return target


class Filler:
    """Fills one fresh directory from an open source tree, as its packer comes to it."""

    def __init__(
        self, source: Root, operation: dict[str, Any], owner: tuple[int, int], *, made_mode: int | None
    ) -> None:
        (item,) = operation["selected"]
        self._source = source
        self._base = os.fsencode(item["path"])
        self._entries: Sequence[Sequence[Any]] = item["entries"]
        self._owner = owner
        self._chmod: str | None = operation.get("chmod")
        self._made_mode = made_mode  # of directories that are made and not copied
        self._mtime_ns: int | None = operation.get("mtime_ns")
        self._links: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        # What is made belongs to us already, as long as no directory gives its group on.
        inherits = any(entry[2] & stat.S_ISGID for entry in self._entries[1:] if entry[1] == "d")
        self._own = owner == (os.geteuid(), os.getegid()) and not inherits and not self._chmod

    def __call__(self, packer: Packer, fd: int, path: bytes) -> None:
        """Fill the directory `fd`, which is called `path` in the tar, and write both it and its content there."""
        umask = os.umask(0)
        # Of the directory that is copied only the content is: this one has attributes of its own.
        mtime_ns = self._mtime_ns if self._mtime_ns is not None else os.fstat(fd).st_mtime_ns
        top = ["", "d", 0o755, 0, mtime_ns, ""]
        levels = [_Level(b"", os.dup(fd), self._source.open_directory(self._base), top)]
        try:
            self._enter(packer, levels[0], path)
            for entry in self._entries[1:]:
                below = os.fsencode(entry[0])
                above, _, name = below.rpartition(b"/")
                while levels[-1].name != above:
                    self._leave(levels.pop())
                level = levels[-1]
                full = path + b"/" + below
                if entry[1] == "f":
                    self._file(packer, levels, name, full, below, entry)
                elif entry[1] == "d":
                    os.mkdir(name, 0o700, dir_fd=level.fd)
                    source = os.open(name, _DIRECTORY, dir_fd=level.source)
                    levels.append(_Level(below, os.open(name, _DIRECTORY, dir_fd=level.fd), source, entry))
                    self._enter(packer, levels[-1], full)
                else:
                    self._other(packer, level, name, full, entry)
            while levels:
                self._leave(levels.pop())
        finally:
            os.umask(umask)
            for level in levels:
                level.close()

    def _mode(self, entry: Sequence[Any]) -> int:
        mode: int = entry[2]
        if not entry[0]:
            # A symbolic `--chmod` is for what is copied, which the directory at the top is not.
            return mode if self._made_mode is None else self._made_mode
        return change_mode(self._chmod, mode, directory=entry[1] == "d") if self._chmod else mode

    def _enter(self, packer: Packer, level: _Level, path: bytes) -> None:
        if not self._own:
            ownership.set_owner(level.fd, *self._owner)
        packer.write(path + b"/", b"5", mode=self._mode(level.entry), owner=self._owner, mtime_ns=int(level.entry[4]))
        level.mtime_ns = packer.clamped(int(level.entry[4]))

    def _leave(self, level: _Level) -> None:
        os.fchmod(level.fd, self._mode(level.entry))
        os.utime(level.fd, ns=(level.mtime_ns, level.mtime_ns))
        level.close()

    def _linked(
        self, packer: Packer, levels: Sequence[_Level], name: bytes, path: bytes, below: bytes, status: os.stat_result
    ) -> bool:
        """Whether the file is now another name of one that was copied before, here and in the tar."""
        first, first_path = self._links.setdefault((status.st_dev, status.st_ino), (below, path))
        if first is below:
            return False
        try:
            os.link(first, name, src_dir_fd=levels[0].fd, dst_dir_fd=levels[-1].fd, follow_symlinks=False)
        except PermissionError:
            return False  # a directory that its owner may not enter, where that means us
        mode = stat.S_IMODE(os.stat(name, dir_fd=levels[-1].fd, follow_symlinks=False).st_mode)
        packer.write(path, b"1", mode=mode, owner=self._owner, mtime_ns=status.st_mtime_ns, linkname=first_path)
        return True

    def _file(
        self,
        packer: Packer,
        levels: Sequence[_Level],
        name: bytes,
        path: bytes,
        below: bytes,
        entry: Sequence[Any],
    ) -> None:
        level = levels[-1]
        reading = os.open(name, _READ, dir_fd=level.source)
        try:
            status = os.fstat(reading)
            size = status.st_size
            if (size, status.st_mtime_ns) != (entry[3], entry[4]):
                raise _changed(path)
            if status.st_nlink > 1 and self._linked(packer, levels, name, path, below, status):
                return
            if size - status.st_blocks * 512 >= _MIN_HOLE:
                self._sparse(packer, level, name, path, status, entry)
                return
            mode = self._mode(entry)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, mode & 0o777, dir_fd=level.fd)
            try:
                packer.write(path, b"0", mode=mode, owner=self._owner, mtime_ns=status.st_mtime_ns, size=size)
                left = size
                while left > 0:
                    data = os.read(reading, min(CHUNK, left))
                    if not data:
                        raise _changed(path)
                    packer.sink.write(data)
                    write_all(fd, data)
                    left -= len(data)
                packer.finish_file(size)
                if not self._own:
                    ownership.set_owner(fd, *self._owner)
                if mode & 0o7000:
                    os.fchmod(fd, mode)
                mtime_ns = packer.clamped(status.st_mtime_ns)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)
        finally:
            os.close(reading)

    def _sparse(
        self, packer: Packer, level: _Level, name: bytes, path: bytes, status: os.stat_result, entry: Sequence[Any]
    ) -> None:
        placer = Placer(Root(os.dup(level.fd)), owner=self._owner, chmod=self._chmod)
        placer.copy_file(level.source, name, status, level.fd, name, entry[2])
        packer.entry(level.fd, name, path, os.stat(name, dir_fd=level.fd, follow_symlinks=False))

    def _other(self, packer: Packer, level: _Level, name: bytes, path: bytes, entry: Sequence[Any]) -> None:
        status = os.stat(name, dir_fd=level.source, follow_symlinks=False)
        if (status.st_size, status.st_mtime_ns) != (entry[3], entry[4]):
            raise _changed(path)
        Placer(self._source, owner=self._owner).copy_special(level.source, name, status, level.fd, name, entry)
        packer.entry(level.fd, name, path, os.stat(name, dir_fd=level.fd, follow_symlinks=False))


class _Level:
    """A directory that is being filled: its name below the target, and both sides open."""

    __slots__ = ("entry", "fd", "mtime_ns", "name", "source")

    def __init__(self, name: bytes, fd: int, source: int, entry: Sequence[Any]) -> None:
        self.name = name
        self.fd = fd
        self.source = source
        self.entry = entry
        self.mtime_ns = 0

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.source)


def _changed(path: bytes) -> LayerError:
    return LayerError(
        f"{os.fsdecode(path)} changed while the image was built",
        resolution="build again when nothing writes to it",
    )
