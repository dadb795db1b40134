"""Members of a tar become files below a `Root`: the one unpacker for layers, archives of ADD, and `cp`.

What a member says is not trusted: names are cleaned and resolved inside the root, whiteouts and overlay's own xattrs
cannot be smuggled in, sizes are bounded by the stream. Owners, modes, nanosecond times, xattrs (capabilities), hard
links, devices, holes are kept; what the kernel refuses here is a warning, or a record (ownership.py).

Sources: OCI image-spec layer.md, "Applying Changesets" and "Whiteouts"; kernel Documentation filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ..errors import LayerError
from . import ownership
from .rootfd import Root, clean_path, open_in_root
from .tarheaders import Member
from .tarstream import LIMIT_HINT, BlobStream, write_all

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_ZEROS = bytes(1 << 16)
_MAX_ID = 0xFFFFFFFE  # -1 means "leave it" to chown
_MAX_WARNINGS = 20

# The container's kernel gives these a meaning of its own, or they are ours.
_FORBIDDEN_XATTRS = ("trusted.overlay.", "user.overlay.", "user.labkernel.", "user.fuseoverlayfs.")
_OPTIONAL = (errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.EACCES, errno.ERANGE)


class Extractor:
    """Unpacks members one by one (`add`), then `finish` does what must come last: whiteouts and directory times."""

    def __init__(
        self,
        root: Root,
        *,
        whiteouts: bool,
        opaque_xattr: str = "trusted.overlay.opaque",
        lowers: Sequence[str] = (),
        max_bytes: int | None = None,
        prefix: bytes = b"",
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
    ) -> None:
        """`whiteouts`: the tar is a layer and the root becomes an overlay directory; otherwise names are just names.

        `lowers` (top first) tell the attributes of directories the tar needs but does not hold. `prefix` is where
        everything goes; `owner` and `mode` replace what members say.
        """
        self._root = root
        self._whiteouts = whiteouts
        self._opaque_xattr = opaque_xattr
        self._lowers = lowers
        self._max_bytes = max_bytes
        self._prefix = prefix
        self._owner = owner
        self._mode = mode
        self._hidden: list[bytes] = []
        self._opaque: list[bytes] = []
        self._times: dict[bytes, int] = {}
        self._closed: dict[bytes, int] = {}  # modes without privileges wait until all lies in the directory
        self.warnings: list[str] = []
        self.size_bytes = 0
        self.undescribed: list[bytes] = []
        """After `finish`: directories that no member describes; `lowers` gave their attributes where they have them."""

    def add(self, member: Member, stream: BlobStream) -> None:
        """Unpack one member; its data is next on `stream`. Raises LayerError, OSError for a full or broken disk."""
        raw = os.fsencode(member.name)
        path = clean_path(raw)
        try:
            if not self._as_whiteout(path):
                self._add(member, self._join(path), stream)
        except OSError as err:
            if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENOMEM):
                raise
            raise LayerError(f"cannot unpack {os.fsdecode(raw)}: {err.strerror}") from err

    def _join(self, path: bytes) -> bytes:
        return b"/".join(part for part in (self._prefix, path) if part)

    def _warn(self, text: str) -> None:
        if len(self.warnings) < _MAX_WARNINGS and text not in self.warnings:
            self.warnings.append(text)

    def _as_whiteout(self, path: bytes) -> bool:
        directory, _, name = path.rpartition(b"/")
        if not self._whiteouts:
            return False
        if any(part.startswith(WHITEOUT) for part in directory.split(b"/")):
            raise LayerError(f"a whiteout is no directory: {os.fsdecode(path)}")
        if not name.startswith(WHITEOUT):
            return False
        if name == OPAQUE:
            self._opaque.append(directory)
        elif not name.startswith(b".wh..wh."):  # others of that form are aufs' own bookkeeping
            hidden = name[len(WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise LayerError(f"a whiteout of nothing: {os.fsdecode(path)}")
            self._hidden.append(directory + b"/" + hidden if directory else hidden)
        return True

    def _add(self, member: Member, path: bytes, stream: BlobStream) -> None:
        uid, gid = self._owner or (member.uid, member.gid)
        if not (0 <= uid <= _MAX_ID and 0 <= gid <= _MAX_ID):
            raise LayerError(f"{member.name}: owner {uid}:{gid} is not possible")
        self._root.created.pop(path, None)
        if not path or (path == self._prefix and member.isdir()):
            if not member.isdir():
                raise LayerError(f"the root of a layer must be a directory: {member.name}")
            self._root_attributes(member, path, uid, gid)
            return
        if member.isdir():
            self._directory(member, path, uid, gid)
            return
        parent, name = self._root.parent(path)
        if member.islnk():
            self._hard_link(member, path)
            return
        if member.isreg() or not member.is_known:  # POSIX: unknown types are regular files
            try:
                self._file(member, parent, name, uid, gid, stream)
            except FileExistsError:  # of the open, which comes first: nothing has been read yet
                self._clear(path)
                self._file(member, *self._root.parent(path), uid, gid, stream)
            return
        self._clear(path)
        parent, name = self._root.parent(path)
        if member.issym():
            self._symlink(member, parent, name, uid, gid)
        else:
            self._node(member, parent, name, uid, gid)

    def _clear(self, path: bytes) -> None:
        """What stands where a non-directory is to be made goes away."""
        parent, name = self._root.parent(path)
        self._root.remove(parent, name)
        self._times.pop(path, None)

    def _root_attributes(self, member: Member, path: bytes, uid: int, gid: int) -> None:
        fd = self._root.open_directory(path, create=True)
        try:
            self._attributes(fd, member, uid, gid)
        finally:
            os.close(fd)
        self._times[path] = _mtime_ns(member)

    def _directory(self, member: Member, path: bytes, uid: int, gid: int) -> None:
        parent, name = self._root.parent(path)
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                self._clear(path)
                parent, name = self._root.parent(path)
                os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            self._attributes(fd, member, uid, gid)
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            if mode & 0o700 != 0o700 and os.geteuid() != 0:
                os.fchmod(fd, mode | 0o700)  # what lies in it is still to come
                self._closed[path] = mode
            else:
                self._closed.pop(path, None)
        finally:
            os.close(fd)
        self._times[path] = _mtime_ns(member)

    def _file(self, member: Member, parent: int, name: bytes, uid: int, gid: int, stream: BlobStream) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            self.size_bytes += member.size
            if member.sparse is not None:
                self._write_sparse(fd, member, stream)
            else:
                _write_data(fd, stream, member.size)
            self._attributes(fd, member, uid, gid)
            mtime = _mtime_ns(member)
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def _write_sparse(self, fd: int, member: Member, stream: BlobStream) -> None:
        # The stream counts what is stored; holes are free here, but not for whoever copies the file.
        if self._max_bytes is not None and self.size_bytes > self._max_bytes:
            raise LayerError(
                f"layer unpacks to more than {self._max_bytes} bytes", resolution=LIMIT_HINT.format("layer_bytes")
            )
        for offset, size in member.sparse or ():
            os.lseek(fd, offset, os.SEEK_SET)
            _write_data(fd, stream, size, truncate=False)
        os.ftruncate(fd, member.size)

    def _hard_link(self, member: Member, path: bytes) -> None:
        target = clean_path(os.fsencode(member.linkname), what="hard link target")
        if self._whiteouts and target.rpartition(b"/")[2].startswith(WHITEOUT):
            raise LayerError(f"{member.name}: hard link to a whiteout")
        target = self._join(target)
        source = open_in_root(self._root.fd, target.rpartition(b"/")[0], os.O_RDONLY | os.O_DIRECTORY)
        try:
            source_name = target.rpartition(b"/")[2]
            if not source_name:
                raise LayerError(f"{member.name}: hard link to the root directory")
            status = os.stat(source_name, dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                raise LayerError(f"{member.name}: hard link to a directory")
            parent, name = self._root.parent(path)
            there = self._root.lstat(path)
            if there is not None and (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                return
            self._clear(path)
            parent, name = self._root.parent(path)
            os.link(source_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _symlink(self, member: Member, parent: int, name: bytes, uid: int, gid: int) -> None:
        link = os.fsencode(member.linkname)
        if not link or b"\0" in link:
            raise LayerError(f"{member.name}: symlink to nothing")
        os.symlink(link, name, dir_fd=parent)
        self._owner_and_time_at(member, parent, name, uid, gid)

    def _owner_and_time_at(self, member: Member, parent: int, name: bytes, uid: int, gid: int) -> None:
        if (uid or gid) and ownership.set_owner_at(parent, name, uid, gid):
            self._warn("owners of symlinks are not kept with a single mapped id")
        mtime = _mtime_ns(member)
        os.utime(name, ns=(mtime, mtime), dir_fd=parent, follow_symlinks=False)

    def _node(self, member: Member, parent: int, name: bytes, uid: int, gid: int) -> None:
        kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        mode = self._mode if self._mode is not None else member.mode & 0o7777
        device = 0
        if kind != stat.S_IFIFO:
            if not (0 <= member.devmajor < 1 << 32 and 0 <= member.devminor < 1 << 32):
                raise LayerError(f"{member.name}: no such device number")
            device = os.makedev(member.devmajor, member.devminor)
        if kind == stat.S_IFCHR and device == 0:
            self._warn(f"left out {member.name}: device 0:0 would hide a file of a lower layer")
            return
        try:
            os.mknod(name, kind | mode, device, dir_fd=parent)
        except PermissionError:
            if kind == stat.S_IFIFO:
                raise
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                os.fchmod(fd, mode & 0o777)
                ownership.record_device(fd, kind, device, uid, gid)
                os.utime(fd, ns=(_mtime_ns(member), _mtime_ns(member)))
            finally:
                os.close(fd)
            self._warn("device nodes cannot be made without root: empty files stand for them")
            return
        self._owner_and_time_at(member, parent, name, uid, gid)
        os.chmod(name, mode, dir_fd=parent)  # after chown, which drops setuid bits; not a symlink: just made

    def _attributes(self, fd: int, member: Member, uid: int, gid: int) -> None:
        if ownership.set_owner(fd, uid, gid):
            self._warn("owners other than root are recorded beside the files: only one id is mapped")
        os.fchmod(fd, self._mode if self._mode is not None else member.mode & 0o7777)
        for key, text in member.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                self._xattr(fd, member, key.removeprefix("SCHILY.xattr."), text)
            elif key.startswith("LIBARCHIVE.xattr.") and f"SCHILY.xattr.{key[17:]}" not in member.pax_headers:
                self._warn(f"left out xattr {key[17:]}: libarchive's form is not read")

    def _xattr(self, fd: int, member: Member, name: str, text: str) -> None:
        if name.startswith(_FORBIDDEN_XATTRS):
            self._warn(f"left out xattr {name} of {member.name}: it means something to the runtime")
            return
        if name == "security.selinux":  # a label of another machine's policy
            return
        try:
            value = text.encode("utf-8", "surrogateescape")
            if name != "security.capability":
                os.setxattr(fd, name, value)
            elif ownership.set_capability(fd, value):
                self._warn("capabilities of files are recorded beside them: they cannot be set without privileges")
        except (OSError, UnicodeError, ValueError) as err:
            if isinstance(err, OSError) and err.errno not in _OPTIONAL:
                raise
            self._warn(f"left out xattr {name} of {member.name}: {getattr(err, 'strerror', None) or err}")

    def finish(self) -> None:
        """Whiteouts, attributes of directories nobody described, times of directories."""
        self._root.forget()
        for path in self._opaque:
            self._set_opaque(path)
        for path in self._hidden:
            self._hide(path)
        self.undescribed = list(self._root.created)
        for path in self.undescribed:
            self._adopt_from_lower(path)
        self._root.forget()
        for path in sorted(self._times, reverse=True):
            self._set_directory_time(path, self._times[path])
        for path in sorted(self._closed, reverse=True):
            with suppress(FileNotFoundError, NotADirectoryError):  # replaced by a later member
                fd = self._root.open_directory(path)
                os.fchmod(fd, self._closed[path])
                os.close(fd)
        self._root.forget()

    def _set_opaque(self, path: bytes) -> None:
        try:
            fd = self._root.open_directory(path, create=True)
        except NotADirectoryError:
            return  # a file of this layer hides everything anyway
        try:
            os.setxattr(fd, self._opaque_xattr, b"y")
        finally:
            os.close(fd)

    def _hide(self, path: bytes) -> None:
        # A layer never hides what it brings itself, whatever the order (image-spec: whiteouts apply to lower layers).
        try:
            parent, name = self._root.parent(path)
        except NotADirectoryError:
            return
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            ownership.make_whiteout(parent, name)
            return
        if stat.S_ISDIR(there.st_mode):
            self._set_opaque(path)

    def adopt(self, paths: Iterable[bytes]) -> None:
        """Give directories that are there the attributes they have in `lowers`: for who had none when it finished."""
        for path in paths:
            self._adopt_from_lower(path)
        self._root.forget()
        for path in sorted(self._times, reverse=True):
            self._set_directory_time(path, self._times[path])
        self._root.forget()

    def _adopt_from_lower(self, path: bytes) -> None:
        for lower in self._lowers:
            with Root.open(lower) as root:
                status = root.lstat(path)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                try:
                    fd = self._root.open_directory(path)
                except (FileNotFoundError, NotADirectoryError):
                    return  # replaced by a later member
                try:
                    ownership.set_owner(fd, status.st_uid, status.st_gid)
                    os.fchmod(fd, stat.S_IMODE(status.st_mode))
                finally:
                    os.close(fd)
                self._times.setdefault(path, status.st_mtime_ns)
            return

    def _set_directory_time(self, path: bytes, mtime: int) -> None:
        try:
            fd = self._root.open_directory(path)
        except (FileNotFoundError, NotADirectoryError):
            return  # replaced by a later member
        try:
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)


def _write_data(fd: int, stream: BlobStream, size: int, *, truncate: bool = True) -> None:
    """Copy, leaving holes where 64 KiB or more are zero; what lies between two holes is one write."""
    hole = False
    step = len(_ZEROS)
    for piece in stream.chunks(size):
        start = 0
        hole = False
        for at in range(0, len(piece) - step + 1, step):
            # One byte tells nearly always.
            hole = piece[at] == 0 and piece[at : at + step] == _ZEROS
            if hole:
                write_all(fd, piece[start:at])
                os.lseek(fd, step, os.SEEK_CUR)
                start = at + step
        if start < len(piece):
            write_all(fd, piece[start:])
            hole = False
    if hole and truncate:
        os.ftruncate(fd, size)


def _mtime_ns(member: Member) -> int:
    """Exact nanoseconds: tarfile gives a float. Impossible times become the epoch."""
    text = member.pax_headers.get("mtime")
    try:
        if text is None:
            value = int(member.mtime) * 1_000_000_000
        else:
            whole, _, part = text.strip().partition(".")
            value = abs(int(whole or "0")) * 1_000_000_000 + int((part + "000000000")[:9])
            value = -value if whole.startswith("-") else value
    except (ValueError, OverflowError):
        return 0
    return value if -(1 << 62) < value < (1 << 62) else 0
