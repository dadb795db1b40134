"""File system work done in the supervisor's worker, inside the driver's namespaces (`Runtime.task`).

`flatten` copies an image's layers to one directory, for machines without overlay; `copy_up` fills a new volume with
what the image has at its place; `snapshot` and `restore` copy a volume and back; `remove_tree` deletes files of ids
that only exist in there. Layers are trusted to the extent that unpacking has refused what leaves them; names are still
never followed through symbolic links.
Standard library and `labkernel.linux` only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from ..linux import syscalls, trees
from ..linux.ownfiles import open_own, own_xattr

_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


def flatten(lowers: list[str], target: str, *, link: bool = False) -> dict[str, int]:
    """Copy the layers (top first) over each other into the directory `target` (made when missing), as overlay would
    show them.

    Owners, modes, times, extended attributes, hard links within a layer and special files are kept where allowed. With
    `link` files are hard links to the layers' own: for whoever replaces files and never writes into one. What its mode
    closes to us (driver proot) is copied then, too, so that it can be opened up in `target`."""
    count = 0
    os.makedirs(target, 0o755, exist_ok=True)
    for lower in reversed(lowers):
        count += _Copier(layer=True, link=link).copy_directory(lower, target)
    return {"files": count}


def copy_up(lowers: list[str], path: str, target: str) -> dict[str, int]:
    """Copy the directory `path` of the image into `target` when that is empty; the directory's owner and mode, too.

    Symbolic links on the way to `path` are not followed: then, or when the image has nothing there, nothing is copied.
    """
    if os.listdir(target):
        return {"files": 0}
    count = 0
    for directory in reversed(_sources(lowers, path)):
        count += _Copier(layer=True).copy_directory(directory, target)
    return {"files": count}


def snapshot(source: str, partial: str, target: str) -> dict[str, int]:
    """Copy the directory `source` to `target`, which appears when it is whole; `partial` is the name until then."""
    with _workplace(partial):
        count = _Copier(layer=False).copy_directory(source, partial)
        os.rename(partial, target)
    return {"files": count}


def restore(source: str, partial: str, target: str) -> dict[str, int]:
    """Put a copy of the directory `source` in the place of the directory `target`, in one step where possible."""
    with _workplace(partial):
        count = _Copier(layer=False).copy_directory(source, partial)
        try:
            syscalls.exchange(partial, target)
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY):
                raise
            # No exchange here (NFS), or another file system (a volume that is a directory elsewhere).
            _empty(target)
            count = _Copier(layer=False).copy_directory(source, target)
    return {"files": count}


@contextlib.contextmanager
def _workplace(path: str) -> Iterator[None]:
    """A new directory for a copy that is being made, locked meanwhile; removed at the end, whatever is in it then.

    Those that a killed worker left beside it (their names begin with a dot, too) are removed first."""
    folder = os.path.dirname(path)
    for name in os.listdir(folder):
        if name.startswith(".") and (fd := _locked(f"{folder}/{name}")) is not None:
            remove_tree(f"{folder}/{name}")
            os.close(fd)
    os.mkdir(path, 0o700)
    fd = _locked(path)
    try:
        yield
    finally:
        remove_tree(path)
        if fd is not None:
            os.close(fd)


def _locked(path: str) -> int | None:
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def remove_tree(path: str) -> dict[str, int]:
    """Delete `path` with all below it, whatever the modes of its directories; a missing one is no error."""

    trees.remove_tree(path)
    return {}


def _sources(lowers: list[str], path: str) -> list[str]:
    """The directories of `path` in the layers that show through, top first."""
    found: list[str] = []
    for lower in lowers:
        current, hidden = lower, False
        for part in [word for word in path.split("/") if word not in ("", ".", "..")]:
            current = f"{current}/{part}"
            try:
                info = os.lstat(current)
            except OSError:
                current = ""
                break
            if not stat.S_ISDIR(info.st_mode):
                return found  # a file, a link or a whiteout hides what lies below
            hidden = hidden or _is_opaque(current)
        if current:
            found.append(current)
        if hidden:
            break
    return found


def _is_opaque(path: str) -> bool:
    for name in _OPAQUE:
        try:
            if os.getxattr(path, name, follow_symlinks=False) == b"y":
                return True
        except OSError:
            pass
    return False


def _is_whiteout(info: os.stat_result) -> bool:
    # The second form is the driver proot's (oci/ownership.py).
    return (stat.S_ISCHR(info.st_mode) and info.st_rdev == 0) or info.st_mode == stat.S_IFSOCK | 0o5000


class _Copier:
    """Copies one tree over another one; remembers inodes for hard links."""

    def __init__(self, *, layer: bool, link: bool = False) -> None:
        self.layer = layer
        self.link = link
        self.links: dict[tuple[int, int], str] = {}
        self.count = 0

    def copy_directory(self, source: str, target: str) -> int:
        if not os.access(target, os.W_OK | os.X_OK):
            os.chmod(target, 0o700)  # as a lower layer had it; this one's mode comes at the end
        if self.layer and _is_opaque(source):
            _empty(target)
        info = os.lstat(source)
        closed = not os.access(source, os.R_OK | os.X_OK)
        if closed:  # without privileges (driver proot) its mode binds its owner, too
            os.chmod(source, stat.S_IMODE(info.st_mode) | 0o500)
        try:
            with os.scandir(source) as entries:
                for entry in list(entries):
                    self._copy_entry(entry.path, f"{target}/{entry.name}")
        finally:
            if closed:
                os.chmod(source, stat.S_IMODE(info.st_mode))
        _copy_attributes(source, target, info)
        return self.count

    def _copy_entry(self, source: str, target: str) -> None:
        info = os.lstat(source)
        if self.layer and _is_whiteout(info):
            _remove(target)
            return
        if stat.S_ISDIR(info.st_mode):
            if os.path.islink(target) or (os.path.lexists(target) and not os.path.isdir(target)):
                _remove(target)
            os.makedirs(target, 0o700, exist_ok=True)
            self.copy_directory(source, target)
            return
        _remove(target)
        self.count += 1
        known = self.links.get((info.st_dev, info.st_ino))
        if known is not None:
            os.link(known, target, follow_symlinks=False)
            return
        if self.link and (not stat.S_ISREG(info.st_mode) or os.access(source, os.R_OK)):
            os.link(source, target, follow_symlinks=False)
            return
        if stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(source), target)
        elif stat.S_ISREG(info.st_mode):
            _copy_content(source, target)
        else:
            _make_special(target, info)
        if info.st_nlink > 1:
            self.links[(info.st_dev, info.st_ino)] = target
        _copy_attributes(source, target, info)


def _copy_content(source: str, target: str) -> None:
    """As a reflink where the file system can (man 2 ioctl_ficlone), else by copying."""
    import fcntl

    reading = open_own(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.ioctl(writing, 0x40049409, reading)
            except OSError:
                offset = 0
                while sent := os.sendfile(writing, reading, offset, 1 << 24):
                    offset += sent
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _make_special(target: str, info: os.stat_result) -> None:
    try:
        os.mknod(target, info.st_mode, info.st_rdev)
    except PermissionError:
        pass  # a device inside a user namespace; /dev is provided anyway


def _copy_attributes(source: str, target: str, info: os.stat_result) -> None:
    if not os.path.lexists(target):
        return
    try:
        os.chown(target, info.st_uid, info.st_gid, follow_symlinks=False)
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EINVAL):  # an id that is not mapped in here
            raise
    try:
        names = os.listxattr(source, follow_symlinks=False)
    except OSError:
        names = []
    for name in names:
        if name in _OPAQUE:
            continue
        try:
            if stat.S_ISLNK(info.st_mode):
                os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
            else:
                os.setxattr(target, name, own_xattr(source, name), follow_symlinks=False)
        except OSError:
            pass  # security.* and trusted.* need privileges; docker's copy drops them as well
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def _empty(path: str) -> None:
    with os.scandir(path) as entries:
        for entry in list(entries):
            _remove(entry.path)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        if not os.path.isdir(path) or os.path.islink(path):
            raise
        trees.remove_tree(path)
