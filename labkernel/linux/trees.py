"""Removing a directory tree of somebody else's making: of any depth and width, by descriptors, links not followed.

A path of 4096 bytes is a thousand and more directories deep, and `mkdir a; cd a` in a loop goes on for ever; what calls
itself for each level ends in RecursionError or without descriptors, and leaves the tree. Here what lies deeper than
some levels is first moved up to the top of the tree. Left out: mounts, of which there are none in our stores.
"""

from __future__ import annotations

import itertools
import os
import stat

_LEVELS = 32
_BATCH = 4096
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str | bytes, *, dir_fd: int | None = None) -> None:
    """`rm -rf` of one name, of the directory `dir_fd` where that is given; a missing one is no error.

    Directories without permission bits are opened up first. What can be removed is, also after an error; then raises
    the first OSError.
    """
    name = os.fsencode(path)
    try:
        os.unlink(name, dir_fd=dir_fd)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError) as err:
        first = err
    try:
        top = _open(name, dir_fd)
    except NotADirectoryError:
        raise first from None
    problem = _Emptying(top).run()
    if problem is not None:
        raise problem
    os.rmdir(name, dir_fd=dir_fd)


class _Level:
    """A directory on the way down: its name in the one above, subdirectories still to go, names that stay."""

    def __init__(self, fd: int, name: bytes) -> None:
        self.fd = fd
        self.name = name
        self.waiting: list[bytes] = []
        self.stuck: set[bytes] = set()


class _Emptying:
    """Empties the directory `top`, a descriptor that is closed in the end."""

    def __init__(self, top: int) -> None:
        self._levels = [_Level(top, b"")]
        self._problem: OSError | None = None
        self._moved = 0

    def run(self) -> OSError | None:
        """The first error; None when all has gone."""
        try:
            while self._levels:
                self._step(self._levels[-1])
        finally:
            for level in self._levels:
                os.close(level.fd)
        return self._problem

    def _step(self, level: _Level) -> None:
        if level.waiting:
            name = level.waiting.pop()
            try:
                self._enter(level, name)
            except OSError as err:
                self._keep(level, name, err)
        elif not self._unlink_some(level):
            self._levels.pop()
            os.close(level.fd)
            if self._levels:
                above = self._levels[-1]
                try:
                    os.rmdir(level.name, dir_fd=above.fd)
                except OSError as err:
                    self._keep(above, level.name, err)

    def _enter(self, level: _Level, name: bytes) -> None:
        fd = _open(name, level.fd)
        if len(self._levels) < _LEVELS:
            self._levels.append(_Level(fd, name))
            return
        os.close(fd)
        top = self._levels[0]
        while True:
            self._moved += 1
            up = b".moved-%d-%d" % (os.getpid(), self._moved)
            try:
                os.stat(up, dir_fd=top.fd, follow_symlinks=False)
            except FileNotFoundError:
                break
        os.rename(name, up, src_dir_fd=level.fd, dst_dir_fd=top.fd)

    def _unlink_some(self, level: _Level) -> bool:
        """Remove files of a directory and note its subdirectories; False when nothing is left that could go."""
        with os.scandir(level.fd) as found:
            entries = (entry for entry in found if os.fsencode(entry.name) not in level.stuck)
            batch = [
                (os.fsencode(entry.name), entry.is_dir(follow_symlinks=False))
                for entry in itertools.islice(entries, _BATCH)
            ]
        for name, is_directory in batch:
            if is_directory:
                level.waiting.append(name)
                continue
            try:
                os.unlink(name, dir_fd=level.fd)
            except OSError as err:
                self._keep(level, name, err)
        return bool(batch)

    def _keep(self, level: _Level, name: bytes, err: OSError) -> None:
        level.stuck.add(name)
        if not isinstance(err, FileNotFoundError):
            self._problem = self._problem or err


def _open(name: bytes, dir_fd: int | None) -> int:
    """Open a directory for removing what is in it: without privileges its mode binds its owner, too."""
    try:
        fd = os.open(name, _FLAGS, dir_fd=dir_fd)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=dir_fd)
        fd = os.open(name, _FLAGS, dir_fd=dir_fd)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o700 != 0o700:
            os.fchmod(fd, 0o700)
    except PermissionError:
        pass  # another's: then what is in it cannot be removed, and says so
    except BaseException:
        os.close(fd)
        raise
    return fd
