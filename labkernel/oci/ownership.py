"""What a namespace cannot keep on disk is written beside it: owners and devices, in the xattr `user.labkernel.owner`.

With one mapped id, chown to another id fails, and device nodes cannot be made in any user namespace. The intended owner
is then recorded on the file ("uid:gid", or "uid:gid:type:major:minor" on the empty file that stands for a device), is
carried along when overlay copies the file up, and is given back when the tree becomes a tar again. The capabilities
of a file go the same way, into `user.labkernel.capability`. Symlinks and fifos cannot carry user xattrs (man 7 xattr):
their owner is kept in memory until the task that made them has written its layer, and is lost on disk.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ..linux.ownfiles import CAPABILITY_XATTR, OWNER_XATTR, writable_own

# EINVAL: the id is not mapped here; EPERM: no CAP_CHOWN over it
_UNMAPPED = (errno.EINVAL, errno.EPERM, errno.EOVERFLOW)


_unwritten: dict[int, tuple[int, int]] = {}
"""Inode -> owner of what this task (a process of its own) has made and could not give away."""

WHITEOUT_MODE = stat.S_IFSOCK | 0o5000
"""A whiteout where 0:0 devices cannot be made either, which without any namespace is so (driver proot): a socket with
permissions nobody gives one. Sockets are no part of a layer, so it stands for nothing else."""


def make_whiteout(dir_fd: int, name: bytes) -> None:
    """Hide `name` of lower layers: overlay's character device 0:0, or its stand-in."""
    try:
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=dir_fd)
    except PermissionError:
        os.mknod(name, WHITEOUT_MODE, 0, dir_fd=dir_fd)
        os.chmod(name, stat.S_IMODE(WHITEOUT_MODE), dir_fd=dir_fd)


def set_owner(fd: int, uid: int, gid: int) -> bool:
    """Own the open file or directory, or record the owner. True when it was recorded. Raises OSError otherwise."""
    try:
        os.chown(fd, uid, gid)
    except OSError as err:
        if err.errno not in _UNMAPPED:
            raise
        if (uid, gid) == (0, 0) and os.geteuid() != 0:
            # Without any namespace (driver proot) this user's own files are root's.
            with suppress(OSError):
                os.removexattr(fd, OWNER_XATTR)
            return False
        os.setxattr(fd, OWNER_XATTR, b"%d:%d" % (uid, gid))
        return True
    return False


def set_owner_at(dir_fd: int, name: bytes, uid: int, gid: int) -> bool:
    """The same for a name that is not opened (symlink, fifo, device). True when the owner is lost on disk."""
    try:
        os.chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as err:
        if err.errno not in _UNMAPPED:
            raise
        _unwritten[os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_ino] = uid, gid
        return True
    return False


def remember(status: os.stat_result, uid: int, gid: int) -> None:
    """The owner that a symlink or fifo has in the layer which this task writes; of others nothing."""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        _unwritten[status.st_ino] = uid, gid


def owner_of(status: os.stat_result) -> Recorded | None:
    """The owner `set_owner_at` was to give a symlink or fifo in this task, where the disk does not have it."""
    found = None if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else _unwritten.get(status.st_ino)
    return None if found is None else Recorded(b"%d:%d" % found)


def set_capability(fd: int, value: bytes) -> bool:
    """Give the open file capabilities (man 7 capabilities), or record them. True when recorded. Raises OSError."""
    try:
        os.setxattr(fd, "security.capability", value)
    except PermissionError:
        with writable_own(fd):
            os.setxattr(fd, CAPABILITY_XATTR, value)
        return True
    return False


def record_device(fd: int, mode: int, device: int, uid: int, gid: int) -> None:
    """Let the empty file `fd` stand for a device node."""
    letter = b"c" if stat.S_ISCHR(mode) else b"b"
    os.setxattr(fd, OWNER_XATTR, b"%d:%d:%c:%d:%d" % (uid, gid, letter[0], os.major(device), os.minor(device)))


class Recorded:
    """A parsed record: `uid`, `gid`, and `kind` ("c", "b" or "") with `device`."""

    __slots__ = ("device", "gid", "kind", "uid")

    def __init__(self, value: bytes) -> None:
        """Raises ValueError for anything that is not a record."""
        parts = value.split(b":")
        if len(parts) not in (2, 5):
            raise ValueError(value)
        self.uid, self.gid = int(parts[0]), int(parts[1])
        self.kind, self.device = "", 0
        if len(parts) == 5:
            self.kind = parts[2].decode("ascii")
            self.device = os.makedev(int(parts[3]), int(parts[4]))
            if self.kind not in ("c", "b"):
                raise ValueError(value)
