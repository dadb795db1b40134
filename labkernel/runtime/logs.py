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

from ..linux.syscalls import SPLICE_F_NONBLOCK, tee

CHUNK_BYTES = 65536
_MARK = struct.Struct("<QB64s")
_CODES = {"stdout": 1, "stderr": 2}


def timestamp(now_ns: int | None = None) -> str:
    """RFC 3339 with nanoseconds, UTC, as docker's logs have it."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    seconds, rest = divmod(now_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


def encode_records(stream: str, data: bytes) -> bytes:
    """The log lines for `data`, one record per line of it."""
    try:
        text = data.decode()
        quote = encode_basestring
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
        quote = encode_basestring_ascii
    tail = f',"stream":"{stream}","time":"{timestamp()}"}}\n'
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
    """An append-only log; `size` is its length in bytes. With `max_bytes` the file starts anew when it is full."""

    __slots__ = ("fd", "max_bytes", "path", "size")

    def __init__(self, path: str, max_bytes: int | None = None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.size = os.fstat(self.fd).st_size

    def write(self, stream: str, data: bytes) -> None:
        """Append `data`; a full disk loses the record and not the container."""
        if self.max_bytes and self.size > self.max_bytes:
            os.ftruncate(self.fd, 0)
            self.size = 0
        records = encode_records(stream, data)
        try:
            while records:
                done = os.write(self.fd, records)
                self.size += done
                records = records[done:]
        except OSError:
            pass

    def close(self) -> None:
        os.close(self.fd)


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
        _MARK.pack_into(self.mark, 0, log.size, _CODES[stream], name.encode())
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
        log.write(stream, data)
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

    def repair(self, log_path_of: dict[str, str]) -> None:
        """After a supervisor was killed: finish the chunk in the scratch pipe. `log_path_of`: container id -> log."""
        waiting = struct.unpack("i", fcntl.ioctl(self.scratch_r, termios.FIONREAD, bytes(4)))[0]
        if not waiting:
            return
        size, code, raw = _MARK.unpack_from(self.mark, 0)
        path = log_path_of.get(raw.rstrip(b"\0").decode())
        stream = "stderr" if code == 2 else "stdout"
        data = self._peek(waiting)
        if path is not None and (not os.path.exists(path) or os.stat(path).st_size == size):
            log = LogWriter(path)
            log.write(stream, data)
            log.close()
        os.read(self.scratch_r, CHUNK_BYTES)
