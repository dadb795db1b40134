"""The file server of shared directories, spoken to as a guest's kernel would, or as a guest that means harm."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from labkernel.qemu.fileserver import FileServer

ROOT = 1
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    9,
    10,
    11,
    12,
)
OPEN, READ, WRITE, RELEASE, GETXATTR, OPENDIR, READDIR, CREATE = 14, 15, 16, 18, 22, 27, 28, 35


class Guest:
    def __init__(self, server: FileServer) -> None:
        self.server = server

    def ask(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        """The answer's payload. Raises OSError."""
        header = struct.pack("<IIQQIII4x", 40 + len(body), opcode, 7, node, os.getuid(), os.getgid(), 1)
        answer = self.server.handle(header + body)
        assert answer is not None
        length, error, unique = struct.unpack_from("<IiQ", answer)
        assert (length, unique) == (len(answer), 7)
        if error:
            raise OSError(-error, os.strerror(-error))
        return answer[16:]

    def look_up(self, name: str, parent: int = ROOT) -> int:
        return int(struct.unpack_from("<Q", self.ask(LOOKUP, parent, name.encode() + b"\0"))[0])

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        return int(struct.unpack_from("<Q", self.ask(OPEN, node, struct.pack("<II", flags, 0)))[0])

    def read(self, node: int, size: int = 4096) -> bytes:
        return self.ask(READ, node, struct.pack("<QQIIQII", self.open(node), 0, size, 0, 0, 0, 0))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    root = tmp_path / "shared"
    (root / "sub").mkdir(parents=True)
    (root / "a").write_text("one")
    (tmp_path / "secret").write_text("secret")
    (root / "out").symlink_to("../secret")
    (root / "up").symlink_to("..")
    return root


@pytest.fixture
def guest(shared: Path) -> Guest:
    return Guest(FileServer(str(shared), writable=True))


def refused(*codes: int) -> pytest.RaisesExc[OSError]:
    return pytest.RaisesExc(OSError, check=lambda err: err.errno in codes)


def test_files_are_read_written_and_made(guest: Guest, shared: Path) -> None:
    assert guest.read(guest.look_up("a")) == b"one"
    answer = guest.ask(CREATE, guest.look_up("sub"), struct.pack("<IIII", os.O_RDWR, 0o640, 0, 0) + b"new\0")
    handle = struct.unpack_from("<Q", answer, 128)[0]
    assert guest.ask(WRITE, 0, struct.pack("<QQIIQII", handle, 2, 3, 0, 0, 0, 0) + b"xyz")[:4] == b"\3\0\0\0"
    assert (shared / "sub/new").read_bytes() == b"\0\0xyz"
    assert stat.S_IMODE((shared / "sub/new").stat().st_mode) == 0o640 & ~_umask()
    guest.ask(RELEASE, 0, struct.pack("<QIIQ", handle, 0, 0, 0))
    with refused(errno.EBADF):
        guest.ask(READ, 0, struct.pack("<QQIIQII", handle, 0, 10, 0, 0, 0, 0))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_names_change_and_what_is_open_stays(guest: Guest, shared: Path) -> None:
    node, sub = guest.look_up("a"), guest.look_up("sub")
    handle = guest.open(node)
    guest.ask(RENAME, ROOT, struct.pack("<Q", sub) + b"a\0b\0")
    assert guest.read(node) == b"one"
    assert (shared / "sub/b").exists()
    guest.ask(RENAME, ROOT, struct.pack("<Q", ROOT) + b"sub\0dir\0")
    assert guest.read(node) == b"one"
    guest.ask(UNLINK, guest.look_up("dir"), b"b\0")
    with refused(errno.ESTALE):
        guest.ask(GETATTR, node, struct.pack("<IIQ", 0, 0, 0))
    assert guest.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 10, 0, 0, 0, 0)) == b"one"
    guest.ask(RMDIR, ROOT, b"dir\0")
    assert not (shared / "dir").exists()


def test_attributes_and_links(guest: Guest, shared: Path) -> None:
    node = guest.look_up("a")
    guest.ask(SETATTR, node, struct.pack("<II6Q8I", 1 | 8 | 32, 0, 0, 1, 0, 0, 99, 0, 0, 5, 0, 0o600, 0, 0, 0, 0))
    info = (shared / "a").stat()
    assert (info.st_size, stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (1, 0o600, 99 * 10**9 + 5)
    guest.ask(SYMLINK, ROOT, b"link\0a/b\0")
    assert guest.ask(READLINK, guest.look_up("link")) == b"a/b"
    guest.ask(MKDIR, ROOT, struct.pack("<II", 0o755, 0) + b"more\0")
    handle = struct.unpack_from("<Q", guest.ask(OPENDIR, ROOT, bytes(8)))[0]
    listing = guest.ask(READDIR, ROOT, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))
    assert all(name in listing for name in (b"link", b"more", b"sub"))
    with refused(errno.ENOSYS):
        guest.ask(GETXATTR, ROOT, bytes(16))


def test_nothing_outside_is_ever_reached(guest: Guest, shared: Path) -> None:
    out, up = guest.look_up("out"), guest.look_up("up")
    with refused(errno.ELOOP, errno.EACCES):
        guest.open(out)
    for parent, name in ((up, "secret"), (ROOT, ".."), (ROOT, "sub/../.."), (ROOT, "")):
        with refused(errno.ELOOP, errno.EINVAL, errno.ENOTDIR, errno.EXDEV):
            guest.look_up(name, parent)
    sub = guest.look_up("sub")
    (shared / "sub").rmdir()
    (shared / "sub").symlink_to("..")  # changed between two requests
    with refused(errno.ELOOP, errno.ENOTDIR):
        guest.look_up("secret", sub)
    with refused(errno.EPERM):
        guest.ask(MKNOD, ROOT, struct.pack("<IIII", stat.S_IFCHR | 0o666, 0x103, 0, 0) + b"null\0")
    os.mkfifo(shared / "fifo")
    with refused(errno.EACCES):
        guest.open(guest.look_up("fifo"))


def test_a_share_for_reading_takes_no_change(shared: Path) -> None:
    guest = Guest(FileServer(str(shared), writable=False))
    assert guest.read(guest.look_up("a")) == b"one"
    for opcode, body in ((MKDIR, struct.pack("<II", 0o755, 0) + b"x\0"), (UNLINK, b"a\0"), (SETATTR, bytes(88))):
        with refused(errno.EROFS):
            guest.ask(opcode, ROOT, body)
    with refused(errno.EROFS):
        guest.open(guest.look_up("a"), os.O_WRONLY)


def test_one_file_is_shared_on_its_own(shared: Path) -> None:
    server = FileServer(str(shared / "a"), writable=True)
    assert not server.is_directory
    assert Guest(server).read(ROOT) == b"one"


def test_what_a_snapshot_keeps(guest: Guest, shared: Path) -> None:
    node = guest.look_up("a")
    handle = guest.open(node)
    later = FileServer(str(shared), writable=True)
    later.resume(guest.server.state())
    again = Guest(later)
    assert again.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 10, 0, 0, 0, 0)) == b"one"
    assert again.read(node) == b"one"


def test_nonsense_is_an_error_and_no_crash(guest: Guest) -> None:
    for opcode in range(60):
        try:
            header = struct.pack("<IIQQIII4x", 41, opcode, 1, 99, 0, 0, 0)
            guest.server.handle(header + b"x")
        except struct.error:
            assert opcode in (FORGET, 42)  # no answer to these: the caller drops the frame
