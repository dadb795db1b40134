"""Shared directories of a guest: a FUSE server whose requests come over the virtio-serial channel (guest/share.c).

Why not virtiofs or 9P: the one needs a daemon that Debian's QEMU 7.2 cannot run for plain users and forbids templates,
the other is not in the cloud kernel. This needs neither privileges nor devices, and works after a restore.

The guest is not trusted: whatever it asks for, every path is resolved below the shared directory without following a
link (openat2), only regular files are opened, device nodes are not made. What it writes has the owner it names where
this process may give files away, as with a container's bind mount; where it may not (driver proot), its own files are
shown as root's, and giving them away has no effect, as in a container there. Left out: extended attributes, locks
between guest and host, notifications of changes on the host (nothing is cached instead). Standard library only: it runs
in the machine's monitor. Source: man 4 fuse; linux/fuse.h (protocol 7.31).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Any

from labkernel.linux.syscalls import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

MAX_WRITE = 128 << 10  # guest/guest.h has a buffer for it
_IN = struct.Struct("<IIQQIII4x")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4QII")
_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
_ATOMIC_O_TRUNC, _BIG_WRITES = 1 << 3, 1 << 5
_OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
_ROOT = 1


class _Node:
    """A file the guest knows: its path below the shared directory ("" is that itself), None once it was removed."""

    __slots__ = ("identity", "lookups", "path")

    def __init__(self, path: str | None, identity: tuple[int, int], lookups: int) -> None:
        self.path = path
        self.identity = identity
        self.lookups = lookups


class FileServer:
    """Serves one directory (or one file) of the host. Raises OSError when it cannot be opened."""

    def __init__(self, path: str, *, writable: bool) -> None:
        self.root = os.open(path, os.O_PATH | os.O_CLOEXEC)
        self.writable = writable
        info = os.fstat(self.root)
        self.is_directory = stat.S_ISDIR(info.st_mode)
        self._nodes = {_ROOT: _Node("", (info.st_dev, info.st_ino), 1)}
        self._by_path = {"": _ROOT}
        self._handles: dict[int, tuple[int, str, int]] = {}  # number -> (descriptor, path, flags)
        self._listings: dict[int, tuple[str, list[tuple[str, int, int]]]] = {}
        self._serial = 1
        self._gives_away = os.geteuid() == 0

    def handle(self, request: bytes) -> bytes | None:
        """The answer to one request; None where the protocol has none."""
        _, opcode, unique, node, uid, gid, _ = _IN.unpack_from(request)
        body = request[_IN.size :]
        name = _HANDLERS.get(opcode)
        if name in ("_forget", "_batch_forget", "_interrupt"):
            getattr(self, name)(node, body)
            return None
        try:
            if name is None:
                raise OSError(errno.ENOSYS, "")
            if name in _CHANGES and not self.writable:
                raise OSError(errno.EROFS, "")
            data: bytes = getattr(self, name)(node, body, (uid, gid))
        except OSError as err:
            return _OUT.pack(_OUT.size, -(err.errno or errno.EIO), unique)
        except (struct.error, ValueError, UnicodeError):
            return _OUT.pack(_OUT.size, -errno.EINVAL, unique)
        return _OUT.pack(_OUT.size + len(data), 0, unique) + data

    # -- what a snapshot of the machine keeps

    def state(self) -> dict[str, Any]:
        """Nodes and open files, as JSON data."""
        return {
            "nodes": [[number, n.path, *n.identity, n.lookups] for number, n in self._nodes.items()],
            "handles": [[number, path, flags] for number, (_, path, flags) in self._handles.items()],
            "listings": [[number, path] for number, (path, _) in self._listings.items()],
            "serial": self._serial,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Take up what `state` told; a file that is gone meanwhile gives the guest an error when it uses it."""
        self._nodes = {number: _Node(path, (dev, ino), n) for number, path, dev, ino, n in state["nodes"]}
        self._by_path = {node.path: number for number, node in self._nodes.items() if node.path is not None}
        self._serial = int(state["serial"])
        for number, path, flags in state["handles"]:
            try:
                self._handles[number] = (self._reopen(path, flags & ~os.O_TRUNC), path, flags)
            except OSError:
                continue
        for number, path in state["listings"]:
            self._listings[number] = (path, [])

    # -- paths

    def _node(self, number: int) -> _Node:
        node = self._nodes.get(number)
        if node is None or node.path is None:
            raise OSError(errno.ESTALE, "")
        return node

    def _open_path(self, path: str) -> int:
        """An O_PATH descriptor of the file itself; the caller closes it."""
        if not path:
            return os.dup(self.root)
        return openat2(self.root, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, resolve=_BENEATH)

    def _parent(self, path: str) -> tuple[int, str]:
        """(descriptor of the directory that holds it, its name); the caller closes the descriptor."""
        directory, _, name = path.rpartition("/")
        if not name:
            raise OSError(errno.EBUSY, "")
        return self._open_path(directory), name

    def _child(self, number: int, raw: bytes) -> str:
        name = os.fsdecode(raw.split(b"\0", 1)[0])
        if not name or "/" in name or name in (".", ".."):
            raise OSError(errno.EINVAL, "")
        parent = self._node(number).path
        return f"{parent}/{name}" if parent else name

    def _reopen(self, path: str, flags: int) -> int:
        """A descriptor for reading or writing a regular file: nothing else is ever opened."""
        held = self._open_path(path)
        try:
            if not stat.S_ISREG(os.fstat(held).st_mode):
                raise OSError(errno.EACCES, "")
            return os.open(f"/proc/self/fd/{held}", (flags & _OPEN_FLAGS) | os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(held)

    def _stat(self, path: str) -> os.stat_result:
        held = self._open_path(path)
        try:
            return os.fstat(held)
        finally:
            os.close(held)

    def _entry(self, path: str) -> bytes:
        info = self._stat(path)
        identity = (info.st_dev, info.st_ino)
        number = self._by_path.get(path)
        if number is None or self._nodes[number].identity != identity:
            self._serial += 1
            number = self._by_path[path] = self._serial
            self._nodes[number] = _Node(path, identity, 0)
        self._nodes[number].lookups += 1
        return _ENTRY.pack(number, 0, 0, 0, 0, 0) + _attributes(info)

    def _removed(self, path: str) -> None:
        number = self._by_path.pop(path, None)
        if number is not None:
            self._nodes[number].path = None

    def _give(self, parent: int, name: str, owner: tuple[int, int]) -> None:
        if self._gives_away:
            try:
                os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
            except OSError:
                pass  # an id that is not mapped here

    # -- requests about names

    def _init(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("<4I", body)
        flags &= _ATOMIC_O_TRUNC | _BIG_WRITES
        return struct.pack("<4IHHIIHHI28x", 7, min(31, minor), readahead, flags, 12, 9, MAX_WRITE, 1, 0, 0, 0)

    def _lookup(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        return self._entry(self._child(node, body))

    def _forget(self, node: int, body: bytes) -> None:
        self._drop(node, struct.unpack_from("<Q", body)[0])

    def _batch_forget(self, _node: int, body: bytes) -> None:
        for number in range(struct.unpack_from("<I", body)[0]):
            self._drop(*struct.unpack_from("<QQ", body, 8 + 16 * number))

    def _drop(self, number: int, count: int) -> None:
        node = self._nodes.get(number)
        if node is None or number == _ROOT:
            return
        node.lookups -= count
        if node.lookups <= 0:
            del self._nodes[number]
            if node.path is not None and self._by_path.get(node.path) == number:
                del self._by_path[node.path]

    def _interrupt(self, _node: int, _body: bytes) -> None:
        """Every request is answered before the next is read, so there is nothing to interrupt."""

    def _readlink(self, node: int, _body: bytes, _owner: tuple[int, int]) -> bytes:
        parent, name = self._parent(str(self._node(node).path))
        try:
            return os.fsencode(os.readlink(name, dir_fd=parent))
        finally:
            os.close(parent)

    def _make(self, path: str, owner: tuple[int, int], act: Any) -> bytes:
        parent, name = self._parent(path)
        try:
            act(name, parent)
            self._give(parent, name, owner)
        finally:
            os.close(parent)
        return self._entry(path)

    def _symlink(self, node: int, body: bytes, owner: tuple[int, int]) -> bytes:
        name, target = body.split(b"\0")[:2]
        path = self._child(node, name)
        return self._make(path, owner, lambda name, parent: os.symlink(os.fsdecode(target), name, dir_fd=parent))

    def _mknod(self, node: int, body: bytes, owner: tuple[int, int]) -> bytes:
        mode = struct.unpack_from("<I", body)[0]
        if stat.S_IFMT(mode) not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise OSError(errno.EPERM, "")
        return self._make(self._child(node, body[16:]), owner, lambda name, parent: os.mknod(name, mode, dir_fd=parent))

    def _mkdir(self, node: int, body: bytes, owner: tuple[int, int]) -> bytes:
        mode = struct.unpack_from("<I", body)[0] & 0o7777
        return self._make(self._child(node, body[8:]), owner, lambda name, parent: os.mkdir(name, mode, dir_fd=parent))

    def _link(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        source, source_name = self._parent(str(self._node(struct.unpack_from("<Q", body)[0]).path))
        path = self._child(node, body[8:])
        try:
            target, name = self._parent(path)
            try:
                os.link(source_name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
            finally:
                os.close(target)
        finally:
            os.close(source)
        return self._entry(path)

    def _remove(self, node: int, body: bytes, act: Any) -> bytes:
        path = self._child(node, body)
        parent, name = self._parent(path)
        try:
            act(name, dir_fd=parent)
        finally:
            os.close(parent)
        self._removed(path)
        return b""

    def _unlink(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        return self._remove(node, body, os.unlink)

    def _rmdir(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        return self._remove(node, body, os.rmdir)

    def _rename(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        return self._move(node, struct.unpack_from("<Q", body)[0], body[8:], 0)

    def _rename2(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        target, flags = struct.unpack_from("<QI", body)
        return self._move(node, target, body[16:], flags)

    def _move(self, node: int, target: int, names: bytes, flags: int) -> bytes:
        old_name, new_name = names.split(b"\0")[:2]
        old, new = self._child(node, old_name), self._child(target, new_name)
        if flags & ~1:
            raise OSError(errno.EINVAL, "")
        source, name = self._parent(old)
        try:
            place, as_name = self._parent(new)
            try:
                if flags and as_name in os.listdir(f"/proc/self/fd/{place}"):
                    raise OSError(errno.EEXIST, "")
                os.rename(name, as_name, src_dir_fd=source, dst_dir_fd=place)
            finally:
                os.close(place)
        finally:
            os.close(source)
        self._removed(new)
        for path in [path for path in self._by_path if path == old or path.startswith(f"{old}/")]:
            number = self._by_path.pop(path)
            self._nodes[number].path = moved = new + path[len(old) :]
            self._by_path[moved] = number
        return b""

    # -- requests about files

    def _getattr(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        flags, _, handle = struct.unpack_from("<IIQ", body)
        info = os.fstat(self._file(handle)) if flags & 1 else self._stat(str(self._node(node).path))
        return bytes(16) + _attributes(info)

    def _setattr(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = struct.unpack_from(
            "<II6Q8I", body
        )
        path = str(self._node(node).path)
        held = self._open_path(path)
        name = f"/proc/self/fd/{held}"
        try:
            if valid & 1:
                os.chmod(name, mode & 0o7777)
            if valid & 6 and self._gives_away:
                os.chown(name, uid if valid & 2 else -1, gid if valid & 4 else -1)
            if valid & 8:
                self._truncate(path, handle if valid & 64 else None, size)
            if valid & 0x1B0:
                self._set_times(held, valid, atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns)
            return bytes(16) + _attributes(os.fstat(held))
        finally:
            os.close(held)

    def _truncate(self, path: str, handle: int | None, size: int) -> None:
        if handle is not None:
            os.ftruncate(self._file(handle), size)
            return
        fd = self._reopen(path, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    @staticmethod
    def _set_times(held: int, valid: int, atime_ns: int, mtime_ns: int) -> None:
        import time

        info, now = os.fstat(held), time.time_ns()
        atime_ns = now if valid & 128 else atime_ns if valid & 16 else info.st_atime_ns
        mtime_ns = now if valid & 256 else mtime_ns if valid & 32 else info.st_mtime_ns
        os.utime(f"/proc/self/fd/{held}", ns=(atime_ns, mtime_ns))

    def _file(self, handle: int) -> int:
        found = self._handles.get(handle)
        if found is None:
            raise OSError(errno.EBADF, "")
        return found[0]

    def _opened(self, fd: int, path: str, flags: int) -> bytes:
        self._serial += 1
        self._handles[self._serial] = (fd, path, flags)
        return struct.pack("<QII", self._serial, 0, 0)

    def _open(self, node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        flags = struct.unpack_from("<I", body)[0]
        if not self.writable and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            raise OSError(errno.EROFS, "")
        path = str(self._node(node).path)
        return self._opened(self._reopen(path, flags), path, flags)

    def _create(self, node: int, body: bytes, owner: tuple[int, int]) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        path = self._child(node, body[16:])
        parent, name = self._parent(path)
        try:
            made = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                fd = os.open(name, (flags & _OPEN_FLAGS) | made, mode & 0o7777, dir_fd=parent)
                self._give(parent, name, owner)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                fd = self._reopen(path, flags)
        finally:
            os.close(parent)
        return self._entry(path) + self._opened(fd, path, flags)

    def _read(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(self._file(handle), min(size, MAX_WRITE), offset)

    def _write(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(self._file(handle), body[40 : 40 + size], offset), 0)

    def _release(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        found = self._handles.pop(struct.unpack_from("<Q", body)[0], None)
        if found is not None:
            os.close(found[0])
        return b""

    def _fsync(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        os.fsync(self._file(struct.unpack_from("<Q", body)[0]))
        return b""

    def _flush(self, _node: int, _body: bytes, _owner: tuple[int, int]) -> bytes:
        return b""

    def _statfs(self, _node: int, _body: bytes, _owner: tuple[int, int]) -> bytes:
        info = os.statvfs(f"/proc/self/fd/{self.root}")
        counts = (info.f_blocks, info.f_bfree, info.f_bavail, info.f_files, info.f_ffree)
        return struct.pack("<5Q4I24x", *counts, info.f_bsize, info.f_namemax, info.f_frsize, 0)

    # -- requests about directories

    def _opendir(self, node: int, _body: bytes, _owner: tuple[int, int]) -> bytes:
        path = str(self._node(node).path)
        self._serial += 1
        self._listings[self._serial] = (path, [])
        return struct.pack("<QII", self._serial, 0, 0)

    def _readdir(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        if handle not in self._listings:
            raise OSError(errno.EBADF, "")
        path, entries = self._listings[handle]
        if offset == 0 or not entries:
            entries = self._list(path)
            self._listings[handle] = (path, entries)
        out = bytearray()
        for place in range(offset, len(entries)):
            name, inode, kind = entries[place]
            raw = os.fsencode(name)
            record = struct.pack("<QQII", inode, place + 1, len(raw), kind) + raw
            record += bytes(-len(record) % 8)
            if len(out) + len(record) > size:
                break
            out += record
        return bytes(out)

    def _list(self, path: str) -> list[tuple[str, int, int]]:
        held = self._open_path(path)
        try:
            own = os.fstat(held).st_ino
            found = [(".", own, 4), ("..", own, 4)]
            with os.scandir(f"/proc/self/fd/{held}") as entries:
                for entry in entries:
                    info = entry.stat(follow_symlinks=False)
                    found.append((entry.name, info.st_ino, stat.S_IFMT(info.st_mode) >> 12))
            return found
        finally:
            os.close(held)

    def _releasedir(self, _node: int, body: bytes, _owner: tuple[int, int]) -> bytes:
        self._listings.pop(struct.unpack_from("<Q", body)[0], None)
        return b""

    def _destroy(self, _node: int, _body: bytes, _owner: tuple[int, int]) -> bytes:
        return b""


def _attributes(info: os.stat_result) -> bytes:
    times = (info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns)
    whole, rest = [max(0, t) // 10**9 for t in times], [t % 10**9 for t in times]
    owner = (0 if info.st_uid == os.geteuid() else info.st_uid, 0 if info.st_gid == os.getegid() else info.st_gid)
    words = (info.st_mode, info.st_nlink, *owner, info.st_rdev & 0xFFFFFFFF, info.st_blksize, 0)
    return _ATTR.pack(info.st_ino, info.st_size, info.st_blocks, *whole, *rest, *words)


# linux/fuse.h, enum fuse_opcode. Others are answered with ENOSYS, which the guest's kernel remembers.
_HANDLERS = {
    1: "_lookup",
    2: "_forget",
    3: "_getattr",
    4: "_setattr",
    5: "_readlink",
    6: "_symlink",
    8: "_mknod",
    9: "_mkdir",
    10: "_unlink",
    11: "_rmdir",
    12: "_rename",
    13: "_link",
    14: "_open",
    15: "_read",
    16: "_write",
    17: "_statfs",
    18: "_release",
    20: "_fsync",
    25: "_flush",
    26: "_init",
    27: "_opendir",
    28: "_readdir",
    29: "_releasedir",
    30: "_flush",
    35: "_create",
    36: "_interrupt",
    38: "_destroy",
    42: "_batch_forget",
    45: "_rename2",
}
_CHANGES = {
    *("_setattr", "_symlink", "_mknod", "_mkdir", "_unlink", "_rmdir", "_rename", "_rename2", "_link", "_write"),
    "_create",
}
