"""Container logs in docker's json-file format, written so that killing the supervisor loses and repeats nothing.

A record is one line `{"log": text, "stream": "stdout", "time": RFC3339Nano}`. What a program wrote without a newline
becomes a record without one at once, so joining all `log` values of a stream gives exactly its bytes: bytes that are
not UTF-8 are kept as lone surrogates (`surrogateescape`), which `read_records` turns back. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import termios
import time
from collections.abc import Iterator
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

from ..linux.syscalls import SPLICE_F_NONBLOCK, tee

CHUNK_BYTES = 65536
_MARK = struct.Struct("<QB64sQ")
_MEMORY_BYTES = 4 << 20
_CODES = {"stdout": 1, "stderr": 2}


def timestamp(now_ns: int | None = None) -> str:
    """RFC 3339 with nanoseconds, UTC, as docker's logs have it."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    seconds, rest = divmod(now_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


def encode_records(stream: str, data: bytes, attributes: dict[str, str] | None = None) -> bytes:
    """The log lines for `data`, one record per line of it."""
    try:
        text = data.decode()
        quote = encode_basestring
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
        quote = encode_basestring_ascii
    extra = f'"attrs":{json.dumps(attributes)},' if attributes else ""
    tail = f',"stream":"{stream}",{extra}"time":"{timestamp()}"}}\n'
    lines = text.split("\n")
    last = lines.pop()
    records = ['{"log":' + quote(line + "\n") + tail for line in lines]
    if last:
        records.append('{"log":' + quote(last) + tail)
    return "".join(records).encode()


def decode_record(line: bytes) -> tuple[str, bytes, str]:
    """(stream, bytes, time) of one log line. Raises ValueError for a broken one."""
    record = json.loads(line)
    return str(record["stream"]), str(record["log"]).encode("utf-8", "surrogateescape"), str(record["time"])


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes, str]]:
    """All records of a log file as (stream, bytes, time); a half-written last line is left out. No file: nothing."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield decode_record(line)
                except (ValueError, KeyError):
                    continue


class LogWriter:
    """An append-only log; `size` is its length in bytes, `start` where the last chunk begins.

    With `max_bytes` a chunk that does not fit begins a new file; the one before becomes PATH.1, that one PATH.2, and
    so on, and `max_files` are kept. A chunk of output is never divided, so a file may be longer by one (64 KiB).
    """

    __slots__ = ("attributes", "fd", "max_bytes", "max_files", "path", "size", "start")

    def __init__(
        self, path: str, max_bytes: int | None = None, max_files: int = 1, attributes: dict[str, str] | None = None
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.max_files = max_files
        self.attributes = attributes
        self.fd = -1
        self._open()

    def _open(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.size = self.start = os.fstat(self.fd).st_size

    @classmethod
    def from_settings(cls, settings: dict[str, Any], path: str) -> LogWriter:
        """From the property "log" of config.json."""
        if settings.get("driver") == "none":
            return MemoryLog()
        limit, files = settings.get("max_bytes"), int(settings.get("max_files") or 1)
        return cls(settings.get("path") or path, limit, files, settings.get("attributes"))

    def encode(self, stream: str, data: bytes) -> bytes:
        return encode_records(stream, data, self.attributes)

    def is_full(self, coming: int) -> bool:
        return bool(self.max_bytes and self.size and self.size + coming > self.max_bytes)

    def rotate(self) -> None:
        """Begin a new file. A full disk or a lost directory leaves the old one in use."""
        try:
            if self.max_files < 2:
                os.unlink(self.path)
            for number in range(self.max_files - 2, -1, -1):
                try:
                    os.rename(rotated(self.path, number), rotated(self.path, number + 1))
                except FileNotFoundError:
                    pass
            old = self.fd
            self._open()
            os.close(old)
        except OSError:
            pass

    def write(self, stream: str, data: bytes) -> None:
        """Append `data`; a full disk loses the record and not the container."""
        records = self.encode(stream, data)
        if self.is_full(len(records)):
            self.rotate()
        self.append(records)

    def append(self, records: bytes) -> None:
        self.start = self.size
        try:
            while records:
                done = os.write(self.fd, records)
                self.size += done
                records = records[done:]
        except OSError:
            pass

    def open_first(self) -> int:
        """A descriptor of the oldest file, for who reads from the start."""
        return os.open(files(self.path)[0], os.O_RDONLY | os.O_CLOEXEC)

    def open_next(self, fd: int) -> int:
        """Of the file that comes after `fd`'s; -1 when that is the newest one. Also after `close`: a slow client may
        outlive the container."""
        mine = os.fstat(fd)
        try:
            if os.path.samestat(mine, os.fstat(self.fd) if self.fd >= 0 else os.stat(self.path)):
                return -1
        except FileNotFoundError:  # the container has been removed meanwhile
            return -1
        names = files(self.path)
        for number, name in enumerate(names):
            try:
                if os.path.samestat(mine, os.stat(name)):
                    names = names[number + 1 :]
                    break
            except FileNotFoundError:
                continue
        try:
            return os.open(names[0] if names else self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        os.close(fd)


class MemoryLog(LogWriter):
    """The log of `--log-driver none`: a few megabytes in memory from which a slow client reads on, and no file."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("", _MEMORY_BYTES)

    def _open(self) -> None:
        if self.fd < 0:
            self.fd = os.memfd_create("labkernel-log")
            self.path = f"/proc/self/fd/{self.fd}"
        self.size = self.start = os.fstat(self.fd).st_size

    def rotate(self) -> None:
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self._open()

    def open_first(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def open_next(self, fd: int) -> int:
        return -1


def rotated(path: str, number: int) -> str:
    return f"{path}.{number}" if number else path


def files(path: str | os.PathLike[str]) -> list[str]:
    """The files of a log that are there, oldest first; the current one always."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    try:
        found = [word[len(name) + 1 :] for word in os.listdir(folder or ".") if word.startswith(f"{name}.")]
    except OSError:
        found = []
    return [f"{path}.{number}" for number in sorted((int(w) for w in found if w.isdigit()), reverse=True)] + [path]


class Journal:
    """Moves output from a container's pipe into its log so that a kill between any two steps can be repaired.

    splice(2) moves a chunk from the container's pipe to a scratch pipe that the keeper holds too; the chunk is read
    from a copy (tee), logged, and only then taken out of the scratch pipe. A mark in memory shared with the keeper
    says which log was how long before. The next supervisor finds a chunk left in the scratch pipe and knows from the
    log's length whether it was logged.
    """

    def __init__(self, scratch: tuple[int, int], mark: mmap.mmap) -> None:
        self.scratch_r, self.scratch_w = scratch
        self.mark = mark
        self.copy_r, self.copy_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @staticmethod
    def shared_memory() -> mmap.mmap:
        """The mark's memory: anonymous and shared by all forks."""
        return mmap.mmap(-1, mmap.PAGESIZE)

    def move(self, fd: int, log: LogWriter, name: str, stream: str) -> bytes | None:
        """Log what is readable on `fd`: the bytes, b"" at the end, None when nothing is there now."""
        _MARK.pack_into(self.mark, 0, log.size, _CODES[stream], name.encode(), 0)
        try:
            count = os.splice(fd, self.scratch_w, CHUNK_BYTES, flags=SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return None
        except OSError as err:
            if err.errno != 22:
                return b""  # EIO: nobody holds the pty's other end any more
            return self._move_by_copy(fd, log, stream)
        if count == 0:
            return b""
        data = self._peek(count)
        records = log.encode(stream, data)
        if log.is_full(len(records)):
            # While this number is that of the current file, the chunk has not been written, whatever its length.
            _MARK.pack_into(self.mark, 0, 0, _CODES[stream], name.encode(), os.fstat(log.fd).st_ino)
            log.rotate()
        log.append(records)
        os.read(self.scratch_r, CHUNK_BYTES)
        return data

    def _move_by_copy(self, fd: int, log: LogWriter, stream: str) -> bytes | None:
        # A kernel whose terminals cannot be spliced from: here a kill at the wrong moment would lose one chunk.
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        if data:
            log.write(stream, data)
        return data

    def _peek(self, count: int) -> bytes:
        tee(self.scratch_r, self.copy_w, count)
        data = os.read(self.copy_r, CHUNK_BYTES)
        while len(data) < count:
            more = os.read(self.copy_r, CHUNK_BYTES)
            data += more
        return data

    def repair(self, logs: dict[str, LogWriter]) -> None:
        """After a supervisor was killed: finish the chunk in the scratch pipe. `logs`: by container id; not closed."""
        waiting = struct.unpack("i", fcntl.ioctl(self.scratch_r, termios.FIONREAD, bytes(4)))[0]
        if not waiting:
            return
        size, code, raw, full = _MARK.unpack_from(self.mark, 0)
        log = logs.get(raw.rstrip(b"\0").decode())
        stream = "stderr" if code == 2 else "stdout"
        data = self._peek(waiting)
        if log is not None and (log.size == size or os.fstat(log.fd).st_ino == full):
            log.write(stream, data)
        os.read(self.scratch_r, CHUNK_BYTES)
