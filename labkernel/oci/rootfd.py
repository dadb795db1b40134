"""A directory tree of somebody else's making, reached safely: every path is resolved by the kernel inside the tree.

An image can hold symlinks to anywhere, so a path of an image is never opened by name. `Root` resolves with
openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS): `/`, `..` and absolute symlinks end at the tree's own root, also while
another process rearranges it. Works on descriptors only; needs Linux 5.6. Left out: what is done with the files.
"""

from __future__ import annotations

import errno
import os
import stat

from ..errors import LayerError
from ..linux import syscalls, trees

_MAX_LINKS = 40  # as the kernel's own MAXSYMLINKS


def open_in_root(root_fd: int, path: bytes, flags: int) -> int:
    """Open `path` below the directory `root_fd` as if that were `/` (man 2 openat2). Raises OSError."""
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
    for _ in range(64):
        try:
            return syscalls.openat2(root_fd, os.fsdecode(path or b"."), flags, resolve=resolve)
        except BlockingIOError:  # EAGAIN: somebody renamed a directory while `..` was being resolved
            continue
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), os.fsdecode(path))


def clean_path(name: bytes, *, what: str = "member") -> bytes:
    """`name` without leading `/`, `.` and `a/../`; b"" is the root itself.

    Raises LayerError when it climbs out of the root or holds a NUL byte.
    """
    if b"\0" in name:
        raise LayerError(f"{what} name holds a NUL byte: {os.fsdecode(name)!r}")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part != b"..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise LayerError(f"{what} name leaves the root file system: {os.fsdecode(name)}")
    return b"/".join(parts)


def clamp_path(name: bytes) -> bytes:
    """As `clean_path`, but `..` at the root stays at the root, as in a chroot."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


class Root:
    """The tree below an open directory. Paths are bytes, relative, and already cleaned.

    `parent` keeps the last directory open, because members of a tar arrive by directory; `forget` must be called after
    anything that could change what a path means (removing a directory, replacing a symlink).
    """

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor `fd` of a directory (not O_PATH)."""
        self.fd = fd
        self.created: dict[bytes, None] = {}  # directories made because a path needed them
        self._last: tuple[bytes, int] | None = None

    @classmethod
    def open(cls, path: str) -> Root:
        """The tree at `path`, a directory of this host's file system. Raises OSError."""
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()
        os.close(self.fd)

    def forget(self) -> None:
        """Drop the remembered directory."""
        if self._last is not None:
            os.close(self._last[1])
            self._last = None

    def parent(self, path: bytes, *, create: bool = True) -> tuple[int, bytes]:
        """(descriptor of the directory holding `path`, last name). The descriptor stays this object's.

        Raises OSError: ENOENT (not `create`), ENOTDIR.
        """
        directory, _, name = path.rpartition(b"/")
        if self._last is not None and self._last[0] == directory:
            return self._last[1], name
        fd = self.open_directory(directory, create=create)
        self.forget()
        self._last = (directory, fd)
        return fd, name

    def open_directory(self, path: bytes, *, create: bool = False) -> int:
        """A new readable descriptor of a directory; with `create` missing ones are made (0755, noted in `created`)."""
        try:
            return open_in_root(self.fd, path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not create:
                raise
        return self._make(path, links=0)

    def _make(self, path: bytes, *, links: int) -> int:
        # A symlink whose target is not there (yet) counts as a directory to be made where it points, inside the root.
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
        done = b""
        for part in path.split(b"/"):
            here = done + b"/" + part if done else part
            try:
                os.close(open_in_root(self.fd, here, os.O_RDONLY | os.O_DIRECTORY))
            except FileNotFoundError:
                above = open_in_root(self.fd, done, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    link = _readlink(above, part)
                    if link is None:
                        os.mkdir(part, 0o755, dir_fd=above)
                        os.chmod(part, 0o755, dir_fd=above)
                        self.created[here] = None
                finally:
                    os.close(above)
                if link is not None:
                    here = clamp_path(link if link.startswith(b"/") else done + b"/" + link)
                    os.close(self._make(here, links=links + 1))
            done = here
        return open_in_root(self.fd, done, os.O_RDONLY | os.O_DIRECTORY)

    def lstat(self, path: bytes) -> os.stat_result | None:
        """The last component itself, symlinks not followed; None when there is nothing."""
        if not path:
            return os.fstat(self.fd)
        try:
            fd = self.open_directory(path.rpartition(b"/")[0])
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.stat(path.rpartition(b"/")[2], dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        finally:
            os.close(fd)

    def remove(self, parent_fd: int, name: bytes) -> None:
        """Remove `name`, a whole tree if it is one, without following symlinks. Nothing there: nothing done."""
        try:
            mode = os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            keep = os.dup(parent_fd)  # parent_fd may be the remembered one
            self.forget()
        else:
            keep = -1
        try:
            trees.remove_tree(name, dir_fd=keep if keep >= 0 else parent_fd)
        finally:
            if keep >= 0:
                os.close(keep)


def _readlink(dir_fd: int, name: bytes) -> bytes | None:
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError as err:
        if err.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise
