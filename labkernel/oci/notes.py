"""What a step noted about owners that the disk cannot keep (runtime/owners.py) becomes part of its layer.

The owners of files and directories are recorded beside them by then. Here come those of links and fifos, which carry no
attribute, and what a command without root's rights has made: it belongs to its user. That is what the layers below do
not have, and what has lost its record: it was replaced.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack

from ..linux.ownfiles import OWNER_XATTR, close_own, open_own
from . import ownership
from .pack import is_whiteout
from .rootfd import Root, clamp_path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_notes(path: str, upper: str, lowers: Sequence[str]) -> None:
    """Take the notes at `path` over to the directory `upper`, which lay over `lowers` (top first). No notes: nothing is
    done."""
    try:
        with open(path, "rb") as file:
            lines = [json.loads(line) for line in file]
    except FileNotFoundError:
        return
    with ExitStack() as stack:
        root = stack.enter_context(Root.open(upper))
        for line in lines:
            if isinstance(line, dict):
                below = [stack.enter_context(Root.open(lower)) for lower in lowers]
                _Giving(below, *line["user"]).directory(root.fd, b"")
                continue
            name, uid, gid = line
            status = root.lstat(clamp_path(os.fsencode(name)))
            if status is not None:
                ownership.remember(status, uid, gid)


def _has_record(root: Root, path: bytes) -> bool:
    above, _, name = path.rpartition(b"/")
    fd = root.open_directory(above)
    try:
        return OWNER_XATTR in os.listxattr(b"/proc/self/fd/%d/%s" % (fd, name), follow_symlinks=False)
    except OSError:
        return False
    finally:
        os.close(fd)


class _Giving:
    """Gives what is new to a user."""

    def __init__(self, below: Sequence[Root], uid: int, gid: int) -> None:
        self._below = below
        self._ids = uid, gid
        self._opened_up: dict[int, int] = {}

    def directory(self, fd: int, path: bytes) -> None:
        """What lies in the open directory, called `path`."""
        for name in map(os.fsencode, os.listdir(fd)):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            here = path + b"/" + name if path else name
            if is_whiteout(status):
                continue
            new = not self._was_there(here, status)
            if stat.S_ISDIR(status.st_mode):
                inside = open_own(name, _DIRECTORY, fd, self._opened_up)
                try:
                    if new:
                        self._give(inside)
                    self.directory(inside, here)
                finally:
                    close_own(inside, self._opened_up)
            elif new and stat.S_ISREG(status.st_mode):
                opened = open_own(name, _FILE, fd)
                try:
                    self._give(opened)
                finally:
                    os.close(opened)
            elif new:
                ownership.remember(status, *self._ids)

    def _was_there(self, path: bytes, status: os.stat_result) -> bool:
        for root in self._below:
            before = root.lstat(path)
            if before is not None:
                return stat.S_IFMT(before.st_mode) == stat.S_IFMT(status.st_mode) and not _has_record(root, path)
        return False

    def _give(self, fd: int) -> None:
        if OWNER_XATTR in os.listxattr(fd):
            return
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        closed = os.geteuid() != 0 and not mode & 0o200
        if closed:
            os.fchmod(fd, mode | 0o200)  # user xattrs are written like content
        os.setxattr(fd, OWNER_XATTR, b"%d:%d" % self._ids)
        if closed:
            os.fchmod(fd, mode)
