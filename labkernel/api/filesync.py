"""BuildKit's file transfer: the client's directory arrives here, entry by entry, then the content of its files.

The client sends a STAT for each entry in order and counts them; we ask for the files by that count (REQ) and get DATA
until an empty one; FIN ends it. Source: fsutil's wire messages as docker's clients send them; BuildKit, "filesync".
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import LabkernelError
from . import protobuf
from .session import Session, Stream

METHOD = "/moby.filesync.v1.FileSync/DiffCopy"
_STAT, _REQ, _DATA, _FIN, _ERR = range(5)
_GO_DIRECTORY, _GO_SYMLINK = 1 << 31, 1 << 27
_GO_SPECIAL = 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19  # devices, pipes, sockets
_GO_SETUID, _GO_SETGID, _GO_STICKY = 1 << 23, 1 << 22, 1 << 20
MAX_ENTRIES = 5_000_000


class TransferError(LabkernelError):
    """The client sent what cannot be a directory."""


def receive(
    session: Session,
    name: str,
    target: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow: Sequence[str] = (),
) -> int:
    """Fetch the client's directory `name` (`context`, `dockerfile`) into the empty `target`; returns bytes of files.

    `include`, `exclude`: patterns as in a .dockerignore; `follow`: paths to fetch with what their links lead to.
    Everything belongs to this process's user. Raises TransferError, CallFailed."""
    lists = (("include-patterns", include), ("exclude-patterns", exclude), ("followpaths", follow))
    metadata = [("dir-name", name), *((key, value) for key, values in lists for value in values)]
    stream = session.open(METHOD, metadata)
    return _Receiver(stream, target).work()


class _Receiver:
    def __init__(self, stream: Stream, target: Path) -> None:
        self._stream = stream
        self._target = target
        self._directories: dict[str, tuple[int, int]] = {}
        self._files: dict[int, tuple[Path, int, int]] = {}
        self._links: list[tuple[Path, str]] = []
        self._open: dict[int, BinaryIO] = {}
        self._waiting: set[int] = set()
        self._listed = False
        self._bytes = 0

    def work(self) -> int:
        count, finished = 0, False
        try:
            while (data := self._stream.receive()) is not None:
                packet = protobuf.decode(data)
                kind = protobuf.number(packet, 1)
                if kind == _STAT:
                    stat = protobuf.data(packet, 2)
                    if 2 in packet:
                        self._entry(count, protobuf.decode(stat))
                        count += 1
                    else:
                        self._listed = True
                elif kind == _DATA:
                    self._data(protobuf.number(packet, 3), protobuf.data(packet, 4))
                elif kind == _ERR:
                    raise TransferError(protobuf.data(packet, 4).decode(errors="replace") or "the client gave up")
                elif kind == _FIN:
                    break
                if count > MAX_ENTRIES:
                    raise TransferError(f"more than {MAX_ENTRIES} entries")
                if self._listed and not self._waiting and not finished:
                    finished = True
                    self._stream.send(protobuf.encode([(1, _FIN)]))
            else:
                raise TransferError("the client ended the transfer before its end")
        finally:
            for file in self._open.values():
                file.close()
        self._stream.close()
        self._settle()
        return self._bytes

    def _entry(self, number: int, stat: dict[int, list[object]]) -> None:
        path = protobuf.text(stat, 1)
        mode, linkname = protobuf.number(stat, 2), protobuf.text(stat, 7)
        place = self._place(path)
        mtime_ns = protobuf.number(stat, 6)
        mtime_ns -= (1 << 64) if mtime_ns >= 1 << 63 else 0
        if mode & _GO_DIRECTORY:
            place.mkdir(mode=0o700)
            self._directories[posixpath.normpath(path)] = (_mode(mode), mtime_ns)
        elif mode & _GO_SYMLINK:
            os.symlink(linkname, place)
            os.utime(place, ns=(mtime_ns, mtime_ns), follow_symlinks=False)
        elif linkname:
            self._links.append((place, linkname))
        elif not mode & _GO_SPECIAL:
            # An empty file is asked for, too: that it is empty is what its first DATA says.
            self._files[number] = (place, _mode(mode), mtime_ns)
            self._waiting.add(number)
            self._stream.send(protobuf.encode([(1, _REQ), (3, number)]))

    def _place(self, path: str) -> Path:
        """Where an entry goes. Its parent has to be a directory that came before: no link leads a write elsewhere."""
        clean = posixpath.normpath(path)
        parent = posixpath.dirname(clean)
        if clean != path or path.startswith("/") or clean.split("/")[0] in ("..", ".", "") or "\0" in path:
            raise TransferError(f"not a path inside a directory: {path!r}")
        if parent and parent not in self._directories:
            raise TransferError(f"{path!r} came before its directory")
        place = self._target / clean
        if os.path.lexists(place):
            raise TransferError(f"{path!r} came twice")
        return place

    def _data(self, number: int, data: bytes) -> None:
        if number not in self._waiting:
            raise TransferError("content of a file that was not asked for")
        place, mode, mtime_ns = self._files[number]
        file = self._open.get(number)
        if file is None:
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            file = self._open[number] = open(fd, "wb", buffering=0)  # noqa: SIM115 -- closed at its last packet
        if data:
            file.write(data)
            self._bytes += len(data)
            return
        os.fchmod(file.fileno(), mode)
        os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
        self._open.pop(number).close()
        self._waiting.discard(number)

    def _settle(self) -> None:
        for place, linkname in self._links:
            source = self._target / posixpath.normpath("/" + linkname).lstrip("/")
            parent = posixpath.dirname(posixpath.normpath(linkname.lstrip("/")))
            if (parent and parent not in self._directories) or source.is_symlink() or not source.is_file():
                raise TransferError(f"a link to what is not there: {linkname!r}")
            os.link(source, place, follow_symlinks=False)
        for path, (mode, mtime_ns) in reversed(self._directories.items()):
            os.chmod(self._target / path, mode)
            os.utime(self._target / path, ns=(mtime_ns, mtime_ns))


def _mode(mode: int) -> int:
    """Go's FileMode as Unix has it."""
    extra = (0o4000 if mode & _GO_SETUID else 0) | (0o2000 if mode & _GO_SETGID else 0)
    return mode & 0o777 | extra | (0o1000 if mode & _GO_STICKY else 0)
