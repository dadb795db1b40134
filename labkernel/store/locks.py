"""Locks between processes (and threads), by name, on files of the store.

All are flock(2) locks on an open file description: the kernel drops them when their holder dies, two threads of one
process exclude each other like two processes do, and a shared mode exists. That mode is why this is not `filelock`,
which has exclusive locks only and whose import costs more than this module.

Locks in use: `content` is held shared by whoever adds content that nothing names yet, exclusive by who sweeps;
`layer-<hex>` by who unpacks a layer; `base-<name>` by who makes a built-in base image.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labkernel.errors import StoreError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_POLL_S = 0.02
OWNED_MARK = "owned"
"""A file in a directory that somebody works in, put there while the directory is locked."""


class Locks:
    """Named locks whose files lie in one directory. Files of exclusive locks go away on release."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def exclusive(self, name: str, *, timeout_s: float | None = None) -> Iterator[None]:
        """Hold `name` alone. Waits (for `timeout_s`, or as long as it takes); raises StoreError on time-out."""
        fd = self._acquire(name, fcntl.LOCK_EX, timeout_s)
        assert fd is not None
        try:
            yield
        finally:
            # Unlinked while still held: who waits on the old file sees that it lost its name, and opens the new one.
            _unlink(self._path(name))
            os.close(fd)

    @contextmanager
    def shared(self, name: str, *, timeout_s: float | None = None) -> Iterator[None]:
        """Hold `name` together with other shared holders, excluding exclusive ones."""
        fd = self._acquire(name, fcntl.LOCK_SH, timeout_s)
        assert fd is not None
        try:
            yield
        finally:
            os.close(fd)

    @contextmanager
    def try_exclusive(self, name: str) -> Iterator[bool]:
        """Yields True while holding `name` alone, or False at once when somebody else holds it."""
        fd = self._acquire(name, fcntl.LOCK_EX, 0.0, give_up=True)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                _unlink(self._path(name))
                os.close(fd)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a lock name: {name!r}")
        return self.directory / f"{name}.lock"

    def _acquire(self, name: str, mode: int, timeout_s: float | None, *, give_up: bool = False) -> int | None:
        path = self._path(name)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held = False
            try:
                held = _flock(fd, mode, deadline)
                if held and names_file(path, fd):
                    return fd
            except BaseException:
                # KeyboardInterrupt while waiting: the stop button of a notebook.
                os.close(fd)
                raise
            os.close(fd)
            if held:
                continue
            if give_up:
                return None
            raise StoreError(
                f"the store is busy: another process has held `{name}` for {timeout_s:g} s",
                resolution="wait for the other build, pull or prune to end, then try again",
            )


def try_flock(fd: int) -> bool:
    """Take an exclusive flock on `fd` (a file or a directory) if nobody has one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def is_locked(path: str | Path) -> bool:
    """Whether somebody holds an flock on the file or directory now; False when it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd)
    finally:
        os.close(fd)


def is_abandoned(directory: str | Path) -> bool:
    """Whether the directory was made under a lock (it holds OWNED_MARK) that nobody holds any more: its owner died."""
    return os.path.exists(os.path.join(directory, OWNED_MARK)) and not is_locked(directory)


def names_file(path: Path, fd: int) -> bool:
    """Whether `path` still names the file open at `fd`; a lock on a file without a name protects nothing."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (found.st_ino, found.st_dev) == (ours.st_ino, ours.st_dev)


def _flock(fd: int, mode: int, deadline: float | None) -> bool:
    if deadline is None:
        fcntl.flock(fd, mode)
        return True
    while True:
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
