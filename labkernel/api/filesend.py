"""BuildKit's file transfer the other way round: what a build made goes to the client, as a directory or as one tar.

A directory: a STAT for each entry in order and an empty one, then content for what the client asks for (REQ, by the
entry's number) until its FIN. A tar: nothing but its bytes. Both are calls of one method; the client knows which of the
two it wants. Source: fsutil's wire messages as docker's clients take them; BuildKit, "filesync" (FileSend).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from . import protobuf
from .filesync import TransferError
from .session import Session, Stream

METHOD = "/moby.filesync.v1.FileSend/DiffCopy"
OUTPUT = "buildkit-attachable-exporter-id"
PIECE_BYTES = 128 << 10
_STAT, _REQ, _DATA, _FIN, _ERR = range(5)
_GO_KINDS = {
    stat.S_IFDIR: 1 << 31,
    stat.S_IFLNK: 1 << 27,
    stat.S_IFBLK: 1 << 26,
    stat.S_IFCHR: 1 << 26 | 1 << 21,
    stat.S_IFIFO: 1 << 25,
    stat.S_IFREG: 0,
}
_GO_BITS = ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20))


def send_tar(session: Session, file: BinaryIO, number: int = 0) -> int:
    """The rest of `file`, for the output `number` of the client; returns its bytes. Raises CallFailed, ClientGone."""
    stream, count = session.open(METHOD, [(OUTPUT, str(number))]), 0
    while piece := file.read(PIECE_BYTES):
        stream.send(protobuf.encode([(1, piece)]))
        count += len(piece)
    stream.close()
    while stream.receive() is not None:
        pass
    return count


def send_directory(session: Session, root: Path, number: int = 0) -> int:
    """What is in the directory `root`; returns the bytes of files. Raises CallFailed, ClientGone, TransferError."""
    return _Sender(session.open(METHOD, [(OUTPUT, str(number))]), root).work()


class _Sender:
    def __init__(self, stream: Stream, root: Path) -> None:
        self._stream = stream
        self._root = root
        self._files: dict[int, str] = {}
        self._first: dict[tuple[int, int], str] = {}  # of files with several names
        self._bytes = 0

    def work(self) -> int:
        for number, path in enumerate(self._walk("")):
            self._send(_STAT, (2, self._stat(number, path)))
        self._send(_STAT)
        while (data := self._stream.receive()) is not None:
            packet = protobuf.decode(data)
            kind = protobuf.number(packet, 1)
            if kind == _REQ:
                self._content(protobuf.number(packet, 3))
            elif kind == _ERR:
                raise TransferError(protobuf.data(packet, 4).decode(errors="replace") or "the client gave up")
            elif kind == _FIN:
                self._send(_FIN)
                self._stream.close()
                return self._bytes
        raise TransferError("the client ended the transfer before its end")

    def _walk(self, folder: str) -> Iterator[str]:
        """Paths relative to the root, each directory before what is in it, in the order of the names' bytes."""
        with os.scandir(self._root / folder) as entries:
            found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        for entry in found:
            if stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) not in _GO_KINDS:
                continue  # a socket
            path = f"{folder}/{entry.name}" if folder else entry.name
            yield path
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(path)

    def _stat(self, number: int, path: str) -> list[tuple[int, Any]]:
        place = self._root / path
        about = os.lstat(place)
        kind = stat.S_IFMT(about.st_mode)
        mode = about.st_mode & 0o777 | _GO_KINDS[kind]
        mode |= sum(go for bit, go in _GO_BITS if about.st_mode & bit)
        link = os.readlink(place) if kind == stat.S_IFLNK else ""
        if kind == stat.S_IFREG:
            if about.st_nlink > 1:
                link = self._first.setdefault((about.st_dev, about.st_ino), path)
                link = "" if link == path else link
            if not link:
                self._files[number] = path
        size = about.st_size if kind == stat.S_IFREG else 0
        fields: list[tuple[int, Any]] = [(1, os.fsencode(path)), (2, mode), (3, about.st_uid), (4, about.st_gid)]
        fields += [(5, size), (6, about.st_mtime_ns), (7, os.fsencode(link))]
        if kind in (stat.S_IFBLK, stat.S_IFCHR):
            fields += [(8, os.major(about.st_rdev)), (9, os.minor(about.st_rdev))]
        return fields

    def _content(self, number: int) -> None:
        if number not in self._files:
            raise TransferError("content was asked for of what is no file")
        with open(self._root / self._files[number], "rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                self._send(_DATA, (3, number), (4, piece))
                self._bytes += len(piece)
        self._send(_DATA, (3, number))

    def _send(self, kind: int, *fields: tuple[int, Any]) -> None:
        self._stream.send(protobuf.encode([(1, kind), *fields]))
