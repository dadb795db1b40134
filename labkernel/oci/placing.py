"""Selected files go where COPY, ADD and WORKDIR want them: into an open root file system, by BuildKit's rules.

A directory's content goes into the destination; `DEST/` or an existing directory takes files in; missing directories
are made; links in the destination are followed inside the root. Owners by name come from the target's own passwd and
group. Source: Dockerfile reference, COPY, ADD, WORKDIR; behaviour of BuildKit's file operations where it says nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import Any

from ..errors import LayerError
from ..linux.ownfiles import OWNER_XATTR, open_own, own_xattr
from . import ownership
from .extract import Extractor
from .rootfd import Root, clamp_path, open_in_root
from .selection import follow
from .tarstream import BlobStream, is_tar, members, write_all

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MAX_ARCHIVE_BYTES = 1 << 38


class Placer:
    """Places files below `root`. `owner` None keeps the sources' owners, `archive_owner` None those in archives.

    With `unpack` tars are unpacked. `mtime_ns` is the time of what is made and not copied (default: now).
    """

    def __init__(
        self,
        root: Root,
        *,
        owner: tuple[int, int] | None,
        archive_owner: tuple[int, int] | None = None,
        chmod: str | None = None,
        mtime_ns: int | None = None,
        unpack: bool = False,
    ) -> None:
        self._root = root
        self._owner = owner
        self._archive_owner = archive_owner
        self._chmod = chmod
        # An octal mode is meant for the directories that are made for the copies, too (BuildKit, issues 4945 and 6801).
        self.made_mode = int(chmod, 8) & 0o777 if chmod and _OCTAL.fullmatch(chmod) else None
        self._mtime_ns = mtime_ns
        self._unpack = unpack
        self._stored = False
        self._directories: list[tuple[bytes, int]] = []
        self._modes: list[tuple[bytes, int]] = []
        self._links: dict[tuple[int, int], bytes] = {}  # what the files of a source with several names were copied to
        self.warnings: list[str] = []

    def make_directory(self, path: str) -> None:
        """mkdir -p; what is made belongs to the owner."""
        real = self.resolve(path)
        self._open_made(real)

    def copy(
        self,
        source: Root,
        selected: Sequence[dict[str, Any]],
        dest: str,
        *,
        several: bool = False,
        stored: bool = False,
    ) -> None:
        """Copy what `selection.select` found in `source` to `dest` (absolute; ends with / for a directory). `several`:
        there are sources beside these, so a file needs a directory to go into. `stored`: they are our own store's,
        and read whatever their mode."""
        self._stored = stored
        target = self.resolve(dest)
        into = dest.endswith("/") or self._is_directory(target)
        files = [item for item in selected if item["entries"][0][1] != "d" and "parents" not in item]
        if (several or len(selected) > 1) and files and not into:
            raise _several(dest)
        for item in selected:
            self._links.clear()
            if "parents" in item:
                self._copy_with_parents(source, item, target)
            elif item["entries"][0][1] == "d":
                self._copy_directory(source, item, target)
            elif self._unpack and self._unpacked(source, item, target):
                continue
            else:
                below = _join(target, os.fsencode(item["name"])) if into else target
                self._open_made(below.rpartition(b"/")[0])
                self._copy_entry(source, item, item["entries"][0], below)
        self.finish()

    def write(self, name: str, data: bytes, dest: str, *, several: bool = False) -> None:
        """A file of a heredoc, or of the caller's own; `several` as for `copy`."""
        target = self.resolve(dest)
        if dest.endswith("/") or self._is_directory(target):
            target = _join(target, os.fsencode(name))
        elif several:
            raise _several(dest)
        self._open_made(target.rpartition(b"/")[0])
        parent, last = self._cleared(target)
        fd = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            write_all(fd, data)
            self._attributes(fd, 0, 0, 0o644)
            if self._mtime_ns is not None:
                os.utime(fd, ns=(self._mtime_ns, self._mtime_ns))
        finally:
            os.close(fd)
        self.finish()

    # -- places ------------------------------------------------------------------------------------------------

    def resolve(self, dest: str) -> bytes:
        """The destination without links, also where they lead to what is not there yet."""
        real = follow(self._root, clamp_path(os.fsencode(dest)), missing=True)
        assert real is not None
        return real

    def _is_directory(self, path: bytes) -> bool:
        status = self._root.lstat(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def make_parents(self, path: bytes) -> None:
        """Make the directories above `path` where they are missing."""
        self._open_made(path.rpartition(b"/")[0])

    def _open_made(self, path: bytes, *, plain: bool = False) -> None:
        """Make a directory and its parents where they are missing; `plain`: with the usual mode."""
        known = len(self._root.created)
        os.close(self._root.open_directory(path, create=True))
        for made in list(self._root.created)[known:]:
            fd = self._root.open_directory(made)
            try:
                uid, gid = self._owner or (0, 0)
                ownership.set_owner(fd, uid, gid)
                if self.made_mode is not None and not plain:
                    self._modes.append((made, self.made_mode))
                if self._mtime_ns is not None:
                    self._directories.append((made, self._mtime_ns))
            finally:
                os.close(fd)

    def _cleared(self, path: bytes) -> tuple[int, bytes]:
        """(descriptor of the parent, name), with no file or link standing there."""
        parent, name = self._root.parent(path)
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return parent, name
        if stat.S_ISDIR(status.st_mode):
            raise LayerError(f"cannot put a file at /{os.fsdecode(path)}: there is a directory")
        self._root.remove(parent, name)
        return self._root.parent(path)

    def finish(self) -> None:
        """Give what was made its times, and its modes, which may close it to us."""
        self._root.forget()
        for path, mtime in reversed(self._directories):
            fd = self._root.open_directory(path)
            try:
                os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)
        self._directories.clear()
        for path, mode in reversed(self._modes):
            fd = self._root.open_directory(path)
            try:
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
        self._modes.clear()

    # -- copying -----------------------------------------------------------------------------------------------

    def _copy_directory(self, source: Root, item: dict[str, Any], target: bytes) -> None:
        there = self._root.lstat(target)
        if there is not None and not stat.S_ISDIR(there.st_mode):
            raise LayerError(f"cannot copy to non-directory: /{os.fsdecode(target)}")
        for entry in item["entries"]:
            path = _join(target, os.fsencode(entry[0])) if entry[0] else target
            if entry[1] != "d":
                self._copy_entry(source, item, entry, path)
            elif entry[0] or "parents" in item:
                self._copy_directory_entry(source, item, entry, path)
            elif target:
                self._open_made(target)  # only what is in a directory is copied, so nothing of its own attributes

    def _copy_with_parents(self, source: Root, item: dict[str, Any], target: bytes) -> None:
        """COPY --parents: the directories above, with the attributes they have in the source, then the source."""
        if target:
            self._open_made(target)
        for name, mode, mtime_ns, real in item["parents"]:
            below = _join(target, os.fsencode(name))
            self._copy_directory_entry(source, {"path": real}, ["", "d", mode, 0, mtime_ns, ""], below)
        below = _join(target, os.fsencode(item["name"]))
        if item["entries"][0][1] == "d":
            self._copy_directory(source, item, below)
        else:
            self._copy_entry(source, item, item["entries"][0], below)

    def _copy_directory_entry(self, source: Root, item: dict[str, Any], entry: Sequence[Any], path: bytes) -> None:
        if not self._is_directory(path):
            real = follow(self._root, path)
            if real is not None and self._is_directory(real):
                return  # a link to a directory: files go through it
            parent, name = self._root.parent(path)
            try:
                os.mkdir(name, 0o755, dir_fd=parent)
            except FileExistsError:
                raise LayerError(f"cannot copy to non-directory: /{os.fsdecode(path)}") from None
        fd = self._root.open_directory(path)
        try:
            original = source.open_directory(_join(os.fsencode(item["path"]), os.fsencode(entry[0])))
            try:
                status = os.fstat(original)
                if self._owner is None:
                    _copy_xattrs(original, fd)
            finally:
                os.close(original)
            self._attributes(fd, status.st_uid, status.st_gid, entry[2], directory=path)
        finally:
            os.close(fd)
        self._directories.append((path, entry[4]))

    def _copy_entry(self, source: Root, item: dict[str, Any], entry: Sequence[Any], path: bytes) -> None:
        origin = _join(os.fsencode(item["path"]), os.fsencode(entry[0]))
        source_fd, source_name = source.parent(origin, create=False)
        parent, name = self._cleared(path)
        status = os.stat(source_name, dir_fd=source_fd, follow_symlinks=False)
        if (status.st_size, status.st_mtime_ns) != (entry[3], entry[4]):
            raise LayerError(
                f"{os.fsdecode(origin)} changed while the image was built",
                resolution="build again when nothing writes to it",
            )
        if entry[1] == "f":
            if not self._linked(status, path):
                self.copy_file(source_fd, source_name, status, *self._root.parent(path), entry[2])
        else:
            self.copy_special(source_fd, source_name, status, parent, name, entry)

    def _linked(self, status: os.stat_result, path: bytes) -> bool:
        """Whether `path` is now another name of what the same file of this source was copied to before."""
        if status.st_nlink < 2:
            return False
        first = self._links.setdefault((status.st_dev, status.st_ino), path)
        if first is path:
            return False
        above, _, last = first.rpartition(b"/")
        parent, name = self._root.parent(path)
        try:
            fd = self._root.open_directory(above)
            try:
                os.link(last, name, src_dir_fd=fd, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(fd)
        except PermissionError:
            return False  # a directory that its owner may not enter, where that means us (driver proot)
        return True

    def copy_special(
        self, source_fd: int, source_name: bytes, status: os.stat_result, parent: int, name: bytes, entry: Sequence[Any]
    ) -> None:
        """A link, fifo or device."""
        if entry[1] == "l":
            os.symlink(os.readlink(source_name, dir_fd=source_fd), name, dir_fd=parent)
        elif entry[1] == "p":
            os.mkfifo(name, entry[2], dir_fd=parent)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=parent)
        uid, gid = self._owner or (status.st_uid, status.st_gid)
        if uid or gid:
            ownership.set_owner_at(parent, name, uid, gid)
        os.utime(name, ns=(status.st_mtime_ns, status.st_mtime_ns), dir_fd=parent, follow_symlinks=False)

    def copy_file(
        self, source_fd: int, source_name: bytes, status: os.stat_result, parent: int, name: bytes, mode: int
    ) -> None:
        """A regular file with its attributes and holes."""
        reading = (open_own if self._stored else os.open)(source_name, _READ, dir_fd=source_fd)
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                _copy_data(reading, fd, status)
                uid, gid = status.st_uid, status.st_gid
                if self._owner is None:
                    _copy_xattrs(reading, fd)
                self._attributes(fd, uid, gid, mode)
                os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
            finally:
                os.close(fd)
        finally:
            os.close(reading)

    def _attributes(self, fd: int, uid: int, gid: int, mode: int, *, directory: bytes | None = None) -> None:
        """Owner and mode of what was copied; `directory`: its path, where it is one."""
        if self._owner is not None or OWNER_XATTR not in os.listxattr(fd):
            # chown drops security.capability, so it is put back
            kept = _capability(fd)
            ownership.set_owner(fd, *(self._owner or (uid, gid)))
            if kept is not None:
                os.setxattr(fd, "security.capability", kept)
        wanted = change_mode(self._chmod, mode, directory=directory is not None) if self._chmod else mode
        if directory is not None and wanted & 0o700 != 0o700 and os.geteuid() != 0:
            # Without privileges (driver proot) it would be closed to us, who still have to fill it.
            self._modes.append((directory, wanted))
            wanted |= 0o700
        os.fchmod(fd, wanted)

    def _unpacked(self, source: Root, item: dict[str, Any], target: bytes) -> bool:
        """Unpack a tar into the directory `target`; False when the file is none."""
        fd = open_in_root(source.fd, os.fsencode(item["path"]), os.O_RDONLY)
        try:
            if not is_tar(fd):
                return False
            if target:
                self._open_made(target, plain=True)
            stream = BlobStream(fd, max_bytes=_MAX_ARCHIVE_BYTES)
            out = Extractor(self._root, whiteouts=False, prefix=target, owner=self._archive_owner)
            for member in members(stream, max_members=5_000_000):
                out.add(member, stream)
            stream.finish()
            out.finish()
            self.warnings += out.warnings
        finally:
            os.close(fd)
        return True


def _several(dest: str) -> LayerError:
    return LayerError(
        "with more than one source file, the destination must be a directory and end with a /",
        details=f"{dest} is no directory yet",
        resolution=f"write {dest}/",
    )


def find_owner(root: Root, text: str) -> tuple[int, int]:
    """`user[:group]`, names or numbers, by the root's /etc/passwd and /etc/group.

    A number alone is used for both; a name alone brings its group. Raises LayerError for an unknown name.
    """
    user, colon, group = text.partition(":")
    if user.isdigit():
        uid = gid = int(user)
    else:
        found = _account(root, b"etc/passwd", user, field=3) if user else (0, 0)
        if found is None:
            raise LayerError(
                f"unable to find user {user}: no matching entries in passwd file",
                resolution="make the user in an earlier RUN, or give numbers",
            )
        uid, gid = found
    if colon and group:
        if group.isdigit():
            gid = int(group)
        else:
            entry = _account(root, b"etc/group", group, field=2)
            if entry is None:
                raise LayerError(f"unable to find group {group}: no matching entries in group file")
            gid = entry[0]
    if not (0 <= uid <= 0xFFFFFFFE and 0 <= gid <= 0xFFFFFFFE):
        raise LayerError(f"owner {text} is not possible")
    return uid, gid


def _account(root: Root, path: bytes, name: str, *, field: int) -> tuple[int, int] | None:
    try:
        fd = open_in_root(root.fd, path, os.O_RDONLY)
    except OSError:
        return None
    try:
        text = os.read(fd, 1 << 20).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)
    for line in text.splitlines():
        words = line.split(":")
        if words[0] == name and len(words) > field and words[2].isdigit() and (words[field] or "0").isdigit():
            return int(words[2]), int(words[field] or 0)
    return None


_OCTAL = re.compile(r"[0-7]{1,4}")
_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[rwxXst]*|[ugo]))+)")


def change_mode(change: str, mode: int, *, directory: bool) -> int:
    """chmod: an octal number, or symbolic clauses (`u=rwX,go=rX`) on top of `mode` (man 1 chmod, without umask)."""
    if _OCTAL.fullmatch(change):
        return int(change, 8)
    for clause in change.split(","):
        found = _CLAUSE.fullmatch(clause)
        if found is None:
            raise LayerError(f"invalid chmod parameter: '{change}'", resolution="for example 755 or u=rwX,go=rX")
        who = found.group(1) or "ugo"
        who = "ugo" if "a" in who else who
        for sign, letters in re.findall(r"([-+=])([rwxXstugo]*)", found.group(2)):
            mode = _apply_clause(mode, who, sign, letters, directory=directory)
    return mode


def _apply_clause(mode: int, who: str, sign: str, letters: str, *, directory: bool) -> int:
    shifts = {"u": 6, "g": 3, "o": 0}
    if letters in shifts:
        bits = mode >> shifts[letters] & 7
    else:
        executable = "x" in letters or ("X" in letters and (directory or mode & 0o111))
        bits = ("r" in letters) * 4 + ("w" in letters) * 2 + bool(executable) * 1
    special = (0o4000 if "s" in letters and "u" in who else 0) | (0o2000 if "s" in letters and "g" in who else 0)
    special |= 0o1000 if "t" in letters and who != "o" else 0  # as BSD's chmod has it, and BuildKit
    wanted = sum(bits << shifts[name] for name in set(who)) | special
    if sign == "+":
        return mode | wanted
    if sign == "-":
        return mode & ~wanted
    cleared = sum(7 << shifts[name] for name in set(who))
    cleared |= (0o4000 if "u" in who else 0) | (0o2000 if "g" in who else 0)
    return mode & ~cleared | wanted


def _join(*parts: bytes) -> bytes:
    return b"/".join(part for part in parts if part)


def _capability(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, "security.capability")
    except OSError:
        return None


def _copy_xattrs(source: int, target: int) -> None:
    for name in os.listxattr(source):
        if name.startswith(("trusted.overlay.", "user.overlay.", "security.selinux")):
            continue
        try:
            os.setxattr(target, name, own_xattr(source, name))
        except OSError:
            if name == OWNER_XATTR:
                raise


def _copy_data(source: int, target: int, status: os.stat_result) -> None:
    """Copy all bytes, holes as holes. In the kernel, so nothing passes through this process."""
    size = status.st_size
    if status.st_blocks * 512 + (1 << 16) >= size:
        _copy_range(source, target, 0, size)
        return
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, min(at, size) - start)
    os.ftruncate(target, size)


def _copy_range(source: int, target: int, offset: int, length: int) -> None:
    os.lseek(target, offset, os.SEEK_SET)
    while length > 0:
        if length <= 1 << 16:
            data = os.pread(source, length, offset)
            write_all(target, data)
            done = len(data)
        else:
            done = os.sendfile(target, source, offset, min(length, 1 << 30))
        if done == 0:
            raise LayerError("a file shrank while it was copied", resolution="build again")
        offset += done
        length -= done
