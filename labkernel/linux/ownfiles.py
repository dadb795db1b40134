"""Files of our own stores that nobody may read: without privileges a mode binds the owner, too, who may change it.

Never for a user's own files, which are the user's to open. Source: path_resolution(7), Permissions.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

OWNER_XATTR = "user.labkernel.owner"
"""Where the owner of a file is recorded that the disk cannot keep: "uid:gid" (oci/ownership.py)."""
CAPABILITY_XATTR = "user.labkernel.capability"
"""The value of security.capability, which nobody may set without CAP_SETFCAP over the file (driver proot)."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_own(name: str | bytes, flags: int, dir_fd: int | None = None, opened_up: dict[int, int] | None = None) -> int:
    """Open for reading; without privileges also what its mode closes to its owner. Raises OSError.

    A file has its mode again when this returns; a directory, in which names are still to be opened, has an entry in
    `opened_up` (descriptor -> mode) until `close_own`."""
    flag = os.R_OK | (os.X_OK if flags & os.O_DIRECTORY else 0)
    if os.geteuid() == 0 or os.access(name, flag, dir_fd=dir_fd, follow_symlinks=False):
        return os.open(name, flags, dir_fd=dir_fd)
    info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    mode = stat.S_IMODE(info.st_mode)
    if stat.S_ISLNK(info.st_mode) or bool(flags & os.O_DIRECTORY) != stat.S_ISDIR(info.st_mode):
        return os.open(name, flags, dir_fd=dir_fd)  # which names the right error
    os.chmod(name, mode | 0o500, dir_fd=dir_fd)
    try:
        fd = os.open(name, flags, dir_fd=dir_fd)
    except OSError:
        os.chmod(name, mode, dir_fd=dir_fd)
        raise
    if opened_up is None:
        os.fchmod(fd, mode)
    else:
        opened_up[fd] = mode
    return fd


def own_xattr(file: int | str, name: str) -> bytes:
    """An extended attribute of a file (path or descriptor), whose mode guards them as it does the content."""
    try:
        return os.getxattr(file, name)
    except PermissionError:
        mode = stat.S_IMODE(os.stat(file).st_mode)
        if os.geteuid() == 0 or mode & 0o400:
            raise
    os.chmod(file, mode | 0o400)
    try:
        return os.getxattr(file, name)
    finally:
        os.chmod(file, mode)


@contextmanager
def writable_own(file: int | str) -> Iterator[None]:
    """A file or directory (path or descriptor) whose extended attributes of users can be written meanwhile: its mode
    guards them as it does the content."""
    mode = stat.S_IMODE(os.stat(file).st_mode)
    closed = os.geteuid() != 0 and not mode & 0o200
    if closed:
        os.chmod(file, mode | 0o200)
    try:
        yield
    finally:
        if closed:
            os.chmod(file, mode)


def close_own(fd: int, opened_up: dict[int, int]) -> None:
    """Close a directory; it has its mode again."""
    if fd in opened_up:
        os.fchmod(fd, opened_up.pop(fd))
    os.close(fd)


@contextmanager
def own_parent(directory: str, path: str) -> Iterator[tuple[int, str]]:
    """(descriptor of the directory that holds `path` below `directory`, the last name), links not followed."""
    *above, last = path.strip("/").split("/")
    fds = [os.open(directory, _DIRECTORY)]
    opened_up: dict[int, int] = {}
    try:
        for name in above:
            fds.append(open_own(name, _DIRECTORY, fds[-1], opened_up))
        yield fds[-1], last
    finally:
        for fd in reversed(fds):
            close_own(fd, opened_up)
