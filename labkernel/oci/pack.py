"""Directory trees become tar members, in byte order of names: one overlay directory as a layer, or several flattened.

`Packer` walks descriptors, top directory first, and merges as overlay does. With whiteouts it speaks the layer format
(`.wh.NAME`, `.wh..wh..opq`); without, hidden files are simply absent. Hard links, xattrs, holes, devices, recorded
owners (ownership.py) and nanosecond times are kept; sockets are left out, as in every engine.

Sources: OCI image-spec layer.md, "Representing Changes"; kernel Documentation filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import LayerError
from ..linux.ownfiles import CAPABILITY_XATTR, OWNER_XATTR, close_own, open_own, own_xattr
from . import ownership
from .extract import OPAQUE, WHITEOUT
from .rootfd import Root
from .tarstream import CHUNK, FdSink, Sink, TarWriter

OPAQUE_XATTRS = ("trusted.overlay.opaque", "user.overlay.opaque")
_PRIVATE_XATTRS = ("trusted.overlay.", "user.overlay.", OWNER_XATTR, "security.selinux")
_MOVED_XATTRS = ("redirect", "metacopy")  # the data or the name lies elsewhere: such a directory is no layer
_KINDS = {stat.S_IFREG: b"0", stat.S_IFLNK: b"2", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFDIR: b"5"}
_FIFO = b"6"
_SENT_WHOLE = 64 << 10  # of a file; less is gathered with the headers around it
MAX_DEPTH = 5000
"""Directories within each other that a walk goes into. A path has at most some 2000."""
_MIN_HOLE = 1 << 20  # below that, a sparse map costs more than it saves


def raise_limits() -> None:
    """A walk holds one descriptor per level and directory, where the soft limit may be 1024, and calls itself."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 3 * MAX_DEPTH))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_depth(depth: int) -> None:
    """Raises LayerError for what is nested deeper than a walk can go."""
    if depth > MAX_DEPTH:
        raise LayerError(f"more than {MAX_DEPTH} directories within each other")


def is_whiteout(status: os.stat_result) -> bool:
    """Overlay's mark of a hidden name, character device 0:0; or ours where no device can be made (ownership.py)."""
    return (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0) or status.st_mode == ownership.WHITEOUT_MODE


def is_opaque(fd: int) -> bool:
    """Whether the open directory hides what lower layers have there."""
    for name in OPAQUE_XATTRS:
        try:
            if os.getxattr(fd, name) == b"y":
                return True
        except OSError as err:
            if err.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EPERM):
                raise
    return False


class Fill(Protocol):
    """Puts content into the open directory `fd` and writes the members of it."""

    def __call__(self, packer: Packer, fd: int, path: bytes, /) -> None: ...


class Packer:
    """Writes trees to a tar; `members` and `size_bytes` (of regular files) count what was written."""

    def __init__(self, tar: TarWriter, *, whiteouts: bool, clamp_s: int | None = None) -> None:
        """`clamp_s`: no file is younger than this moment (SOURCE_DATE_EPOCH)."""
        self._tar = tar
        self._whiteouts = whiteouts
        self._clamp_ns = None if clamp_s is None else clamp_s * 1_000_000_000
        # Without any namespace (driver proot) this user's own files are root's; as root nothing is renamed.
        self._own = os.geteuid(), os.getegid() if os.geteuid() else 0
        self._opened_up: dict[int, int] = {}
        self._links: dict[tuple[int, int], bytes] = {}
        self._link_owners: dict[tuple[int, int], ownership.Recorded | None] = {}
        self.members = 0
        self.size_bytes = 0
        self.skip: Callable[[bytes], bool] = lambda path: False
        self.below: Sequence[Root] | None = None  # what the packed directory was mounted over, where that is known
        self.fill: dict[bytes, Fill] = {}  # what writes a directory and all below it when its turn comes

    def tree(self, fds: Sequence[int], path: bytes = b"", *, opaque: bool = False) -> None:
        """Everything below the directories `fds` (top first), named below `path`; without the directory itself."""
        check_depth(path.count(b"/"))
        if self._whiteouts and opaque:
            self._mark(path + b"/" + OPAQUE if path else OPAQUE)
        for name, (index, status) in sorted(_merge(fds).items()):
            below = path + b"/" + name if path else name
            if is_whiteout(status):
                if self._whiteouts:
                    self._mark((path + b"/" if path else b"") + WHITEOUT + name)
            elif self.skip(below):
                continue
            elif stat.S_ISDIR(status.st_mode):
                self._directory(fds, index, name, below, status)
            else:
                self.entry(fds[index], name, below, status)

    def _directory(self, fds: Sequence[int], index: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        opened = []
        opaque = False
        try:
            for fd in fds[index:]:
                below = _open_directory(fd, name, self._opened_up)
                if below is None:
                    break  # something else, or a whiteout, ends the merge
                if below < 0:
                    continue
                opened.append(below)
                opaque = is_opaque(below) and not self._hides_nothing(below, path)
                if opaque:
                    break
            if path in self.fill:
                self.fill[path](self, opened[0], path)
            else:
                self._header(opened[0], path + b"/", status)
                self.tree(opened, path, opaque=opaque)
        finally:
            for fd in opened:
                close_own(fd, self._opened_up)

    def _hides_nothing(self, fd: int, path: bytes) -> bool:
        # Overlay marks every new directory opaque to save look-ups. Kept, the mark would make the same layer mean
        # something else over another base.
        if self.below is None or any(root.lstat(path) is not None for root in self.below):
            return False
        for name in OPAQUE_XATTRS:
            try:
                os.removexattr(fd, name)
            except OSError:
                continue
        return True

    def root(self, fd: int) -> None:
        """The tree's own directory as member `./`."""
        self._header(fd, b"./", os.fstat(fd))

    def entry(self, dir_fd: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        """One file that is no directory."""
        mode = status.st_mode
        if stat.S_ISSOCK(mode):
            return
        if status.st_nlink > 1:
            inode = status.st_dev, status.st_ino
            first = self._links.setdefault(inode, path)
            if first is not path:
                self._write(path, b"1", status, linkname=first, owner=self._link_owners.get(inode))
                return
        if stat.S_ISREG(mode):
            fd = open_own(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd)
            try:
                self._header(fd, path, os.fstat(fd))
            finally:
                os.close(fd)
            return
        if self._clamp_ns is not None and status.st_mtime_ns > self._clamp_ns:
            os.utime(name, ns=(self._clamp_ns, self._clamp_ns), dir_fd=dir_fd, follow_symlinks=False)
        if stat.S_ISLNK(mode):
            target = os.readlink(name, dir_fd=dir_fd)
            self._write(path, b"2", status, linkname=target, owner=ownership.owner_of(status))
        else:
            kind = _KINDS.get(stat.S_IFMT(mode), _FIFO)
            self._write(path, kind, status, device=status.st_rdev, owner=ownership.owner_of(status))

    @property
    def sink(self) -> Sink:
        """Where the bytes of a file go, after `write`."""
        return self._tar.sink

    def clamped(self, mtime_ns: int) -> int:
        """The time a file of that time gets."""
        return mtime_ns if self._clamp_ns is None else min(mtime_ns, self._clamp_ns)

    def write(
        self,
        path: bytes,
        kind: bytes,
        *,
        mode: int,
        owner: tuple[int, int],
        mtime_ns: int,
        size: int = 0,
        linkname: bytes = b"",
    ) -> None:
        """A member that somebody else has the data of."""
        uid, gid = owner
        mtime_ns = self.clamped(mtime_ns)
        self._tar.header(path, kind, mode=mode, uid=uid, gid=gid, size=size, mtime_ns=mtime_ns, linkname=linkname)
        self.members += 1

    def finish_file(self, size: int) -> None:
        """After the data of a regular file."""
        self._tar.pad(size)
        self.size_bytes += size

    def _mark(self, path: bytes) -> None:
        self._tar.header(path, b"0", mode=0o600)
        self.members += 1

    def _header(self, fd: int, path: bytes, status: os.stat_result) -> None:
        records: dict[bytes, bytes] = {}
        owner: ownership.Recorded | None = None
        for name in os.listxattr(fd):
            if name == OWNER_XATTR:
                owner = _recorded(fd)
                if status.st_nlink > 1:
                    self._link_owners[status.st_dev, status.st_ino] = owner
            elif name == CAPABILITY_XATTR:
                records.setdefault(b"SCHILY.xattr.security.capability", own_xattr(fd, name))
            elif name.startswith(_PRIVATE_XATTRS):
                if name.rpartition(".")[2] in _MOVED_XATTRS:
                    raise LayerError(f"{os.fsdecode(path)}: overlay keeps its content elsewhere ({name})")
            else:
                records[b"SCHILY.xattr." + os.fsencode(name)] = own_xattr(fd, name)
        if self._clamp_ns is not None and status.st_mtime_ns > self._clamp_ns:
            os.utime(fd, ns=(self._clamp_ns, self._clamp_ns))  # the directory becomes the layer
        if stat.S_ISDIR(status.st_mode):
            self._write(path, b"5", status, records=records, owner=owner)
        elif owner is not None and owner.kind:
            kind = b"3" if owner.kind == "c" else b"4"
            self._write(path, kind, status, records=records, owner=owner, device=owner.device)
        else:
            self._regular(fd, path, status, records, owner)

    def _regular(
        self,
        fd: int,
        path: bytes,
        status: os.stat_result,
        records: dict[bytes, bytes],
        owner: ownership.Recorded | None,
    ) -> None:
        size = status.st_size
        self.size_bytes += size
        if size - status.st_blocks * 512 >= _MIN_HOLE:
            segments = _segments(fd, size)
            numbers = [len(segments), *(number for segment in segments for number in segment)]
            text = b"".join(b"%d\n" % number for number in numbers)
            text += bytes(-len(text) % 512)
            records |= {
                b"GNU.sparse.major": b"1",
                b"GNU.sparse.minor": b"0",
                b"GNU.sparse.name": path,
                b"GNU.sparse.realsize": b"%d" % size,
            }
            stored = len(text) + sum(length for _, length in segments)
            self._write(path, b"0", status, records=records, owner=owner, size=stored)
            self._tar.sink.write(text)
        else:
            segments = [(0, size)]
            stored = size
            self._write(path, b"0", status, records=records, owner=owner, size=size)
        for offset, length in segments:
            self._copy(fd, offset, length, path)
        self._tar.pad(stored)

    def _copy(self, fd: int, offset: int, length: int, path: bytes) -> None:
        end = offset + length
        sink = self._tar.sink
        while offset < end and isinstance(sink, FdSink) and end - offset >= _SENT_WHOLE:
            try:
                count = sink.take_file(fd, offset, min(CHUNK, end - offset))
            except OSError as err:
                if err.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                break  # a file system that only gives copies
            if not count:
                break
            offset += count
        while offset < end:
            data = os.pread(fd, min(CHUNK, end - offset), offset)
            if not data:
                raise LayerError(f"{os.fsdecode(path)} shrank while it was read", resolution="try again")
            self._tar.sink.write(data)
            offset += len(data)

    def _write(
        self,
        path: bytes,
        kind: bytes,
        status: os.stat_result,
        *,
        size: int = 0,
        linkname: bytes = b"",
        device: int = 0,
        records: dict[bytes, bytes] | None = None,
        owner: ownership.Recorded | None = None,
    ) -> None:
        self._tar.header(
            path,
            kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=owner.uid if owner else status.st_uid if status.st_uid != self._own[0] else 0,
            gid=owner.gid if owner else status.st_gid if status.st_gid != self._own[1] else 0,
            size=size,
            mtime_ns=self.clamped(status.st_mtime_ns),
            linkname=linkname,
            device=device,
            records=records,
        )
        self.members += 1


def _merge(fds: Sequence[int]) -> dict[bytes, tuple[int, os.stat_result]]:
    """name -> (index of the topmost directory that has it, its status)."""
    found: dict[bytes, tuple[int, os.stat_result]] = {}
    for index, fd in enumerate(fds):
        for text in os.listdir(fd):
            name = os.fsencode(text)
            if name not in found:
                found[name] = index, os.stat(name, dir_fd=fd, follow_symlinks=False)
    return found


def _open_directory(fd: int, name: bytes, opened_up: dict[int, int]) -> int | None:
    """A descriptor; -1 when the name is not there; None when it is something else."""
    try:
        return open_own(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, fd, opened_up)
    except FileNotFoundError:
        return -1
    except OSError as err:
        if err.errno in (errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _recorded(fd: int) -> ownership.Recorded | None:
    try:
        return ownership.Recorded(own_xattr(fd, OWNER_XATTR))
    except ValueError:
        return None  # somebody in the container wrote nonsense there


def _segments(fd: int, size: int) -> list[tuple[int, int]]:
    """Where the data of a sparse file lies: (offset, length), ending with an empty one at the end (GNU's form)."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as err:
            if err.errno != errno.ENXIO:
                raise
            break
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, at - start))
    if not found or sum(found[-1]) < size:
        found.append((size, 0))
    return found
