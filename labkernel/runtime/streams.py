"""The two directions of a container's streams inside the supervisor: followers of output, and its stdin.

A slow client never stops a container and never fills the memory: when too much waits for it, the supervisor stops
queueing and later reads on from the log file, where everything stands anyway. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from typing import Any

from . import logs, protocol
from .loop import HIGH_BYTES, IN, LOW_BYTES, OUT, Connection, Loop

PIPE_BYTES = 256 << 10


class Follower:
    """An attached client. `wants` holds stream names; `behind` means it is reading from the log at `offset`."""

    def __init__(self, conn: Connection, log: logs.LogWriter, wants: set[str], *, from_start: bool) -> None:
        self.conn = conn
        self.log = log
        self.wants = wants
        self.behind = from_start
        self.offset = 0 if from_start else log.size
        # Its own descriptor: the log of an auto-removed container may be gone before a slow client has read it.
        self.fd = -1
        self.end: bytes | None = None
        conn.drained = self.catch_up
        if from_start:
            self._open(first=True)

    def _open(self, *, first: bool = False) -> None:
        if self.fd < 0:
            self.fd = self.log.open_first() if first else os.open(self.log.path, os.O_RDONLY | os.O_CLOEXEC)

    def deliver(self, stream: str, data: bytes, log_size_before: int) -> None:
        """Pass output on, or fall behind."""
        if self.behind or stream not in self.wants:
            return
        if self.conn.pending > HIGH_BYTES:
            self.behind = True
            self.offset = log_size_before
            self.close()  # of an earlier time; the log may have been rotated since
            self._open()
            return
        self.conn.send(protocol.encode_frame(protocol.STREAMS[stream], data))

    def catch_up(self) -> None:
        """Read on from the log until the client has enough or the log is at its end."""
        while self.behind and self.conn.open and self.conn.pending <= LOW_BYTES:
            block = os.pread(self.fd, 262144, self.offset)
            if len(block) == 262144 and b"\n" not in block:
                block = os.pread(self.fd, 2 << 20, self.offset)  # one record of escaped bytes, at most 6 for each
            end = block.rfind(b"\n") + 1
            if not end:
                following = self.log.open_next(self.fd)
                if following >= 0:
                    os.close(self.fd)
                    self.fd, self.offset = following, 0
                    continue
                self.behind = False
                break
            self.offset += end
            for line in block[:end].splitlines():
                try:
                    stream, data, _ = logs.decode_record(line)
                except (ValueError, KeyError):
                    continue
                if stream in self.wants:
                    self.conn.send(protocol.encode_frame(protocol.STREAMS[stream], data))
        if not self.behind and self.end is not None:
            self.conn.finish(self.end)

    def finish(self, last: bytes) -> None:
        """End after everything has been delivered."""
        self.end = last
        self.catch_up()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class EarlyInput:
    """What attached clients send before the container runs: kept, in order, until it can be delivered."""

    def __init__(self) -> None:
        self.frames: list[tuple[Callable[[int, bytes], None], Connection, int, bytes]] = []
        self.size = 0

    def keep(self, deliver: Callable[[int, bytes], None], conn: Connection, stream: int, data: bytes) -> None:
        self.frames.append((deliver, conn, stream, data))
        self.size += len(data)
        if self.size > LOW_BYTES:
            conn.pause_reading(paused=True)

    def replay(self) -> None:
        frames, self.frames, self.size = self.frames, [], 0
        for deliver, conn, stream, data in frames:
            if conn.open:
                conn.pause_reading(paused=False)
                deliver(stream, data)


def widen(fd: int) -> None:
    """Room for more in a pipe (man 2 fcntl, F_SETPIPE_SZ): fewer turns for the same bytes. A user's pipes together may
    not be large, so only those that carry streams are."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass


class InputPipe:
    """Bytes on their way into a container's stdin (a pipe or a pty master)."""

    def __init__(self, loop: Loop, fd: int, *, shared: bool) -> None:
        if not shared:
            widen(fd)
        self.loop = loop
        self.fd = fd
        self.shared = shared  # a pty master is read too, and is not ours to close
        self.buffer = bytearray()
        self.closing = False
        self.source: Connection | None = None
        self.on_close: Callable[[], None] | None = None
        self.borrower: Connection | None = None
        self.read_handler: Any = None

    def write(self, data: bytes, source: Connection | None) -> None:
        if self.fd < 0 or self.closing:
            return
        self.source = source
        if not self.buffer:
            data = self._pass(data)
        self.buffer += data
        self._push()

    def _pass(self, data: bytes) -> bytes:
        """Straight on, as long as nothing waits; what is left has to."""
        try:
            return data[os.write(self.fd, data) :]
        except OSError:
            return data  # which `_push` sorts out

    def ready(self) -> None:
        self._push()

    def lend(self, borrower: Connection) -> None:
        """Give a client the pipe itself, once all that came before has gone into it: what it has to send then goes past
        this process. A control frame `{"stdin": true}` comes with the descriptor; false is a refusal."""
        self.borrower = borrower
        self._push()

    def _lend(self) -> None:
        borrower, self.borrower = self.borrower, None
        if borrower is None:
            return
        may = not self.shared and not self.closing and self.fd >= 0
        if not (may and borrower.send_with_fd(protocol.encode_control({"stdin": True}), self.fd)):
            borrower.send(protocol.encode_control({"stdin": False}))

    def _push(self) -> None:
        while self.buffer and self.fd >= 0:
            try:
                done = os.write(self.fd, memoryview(self.buffer)[:PIPE_BYTES])
            except BlockingIOError:
                break
            except OSError:
                self.buffer.clear()
                self.close()
                self._lend()
                return
            del self.buffer[:done]
        if self.source is not None and self.source.open:
            self.source.pause_reading(paused=len(self.buffer) > PIPE_BYTES)
        if self.shared:
            self.loop.watch(self.fd, self.read_handler, IN | (OUT if self.buffer else 0))
        elif self.buffer:
            self.loop.watch(self.fd, lambda _events: self._push(), OUT)
        else:
            self.loop.unwatch(self.fd)
            if self.closing:
                self.close()
        if not self.buffer:
            self._lend()

    def half_close(self) -> None:
        """No more input: the pipe is closed once it is empty; a pty gets its end-of-file character (Ctrl-D)."""
        if self.fd < 0 or self.closing:
            return
        if self.shared:
            self.write(b"\x04", self.source)
            return
        self.closing = True
        self._push()

    def close(self) -> None:
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        if self.shared:
            return
        self.loop.unwatch(fd)
        os.close(fd)
        if self.on_close is not None:
            self.on_close()


def lend(pipe: InputPipe | None, conn: Connection) -> None:
    """Answer a client that asks for the pipe of a command's input."""
    if pipe is None:
        conn.send(protocol.encode_control({"stdin": False}))
    else:
        pipe.lend(conn)
