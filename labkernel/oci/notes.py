"""What a step noted about owners that the disk cannot keep (runtime/owners.py) becomes part of its layer.

The owners of files and directories are recorded beside them by then. Here come those of links and fifos, which carry no
attribute, and what a command without root's rights has made: it belongs to its user. That is what the layers below do
not have, and what has lost its record: it was replaced.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence

from ..linux.ownfiles import OWNER_XATTR, close_own, open_own, own_parent, writable_own
from . import ownership
from .pack import is_whiteout

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
    for line in lines:
        if isinstance(line, dict):
            _Giving(lowers, *line["user"]).tree(upper)
            continue
        name, uid, gid = line
        found = _look(upper, name)
        if found is not None:
            ownership.remember(found[0], uid, gid)


def _look(directory: str, path: str) -> tuple[os.stat_result, bool] | None:
    """(status, whether an owner is recorded) of a path below `directory`, whatever the modes on the way to it; None
    when it is not there."""
    try:
        with own_parent(directory, path) as (parent, name):
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            return status, OWNER_XATTR in os.listxattr(f"/proc/self/fd/{parent}/{name}", follow_symlinks=False)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None


class _Giving:
    """Gives what is new to a user."""

    def __init__(self, lowers: Sequence[str], uid: int, gid: int) -> None:
        self._lowers = lowers
        self._ids = uid, gid
        self._opened_up: dict[int, int] = {}

    def tree(self, upper: str) -> None:
        fd = os.open(upper, _DIRECTORY)
        try:
            self._directory(fd, "")
        finally:
            os.close(fd)

    def _directory(self, fd: int, path: str) -> None:
        """What lies in the open directory, called `path`."""
        for name in os.listdir(fd):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            here = f"{path}/{name}"
            if is_whiteout(status):
                continue
            new = not self._was_there(here, status)
            if stat.S_ISDIR(status.st_mode):
                inside = open_own(name, _DIRECTORY, fd, self._opened_up)
                try:
                    if new:
                        self._give(inside)
                    self._directory(inside, here)
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

    def _was_there(self, path: str, status: os.stat_result) -> bool:
        before = next((found for lower in self._lowers if (found := _look(lower, path)) is not None), None)
        return before is not None and stat.S_IFMT(before[0].st_mode) == stat.S_IFMT(status.st_mode) and not before[1]

    def _give(self, fd: int) -> None:
        if OWNER_XATTR in os.listxattr(fd):
            return
        with writable_own(fd):
            os.setxattr(fd, OWNER_XATTR, b"%d:%d" % self._ids)
