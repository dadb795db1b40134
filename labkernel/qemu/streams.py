"""A line to the guest, and a process in it with the descriptors on the host that are its standard streams.

Runs in the machine's monitor.

Standard library only.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

from .channel import STDIN_WINDOW, Decoder, Frame, Kind, encode

_HOLD_BYTES = 1 << 20
_RESUME_BYTES = 256 << 10
_CHUNK = 65536

Watch = Callable[[int, int, Callable[[int], None] | None], None]
Send = Callable[[bytes], None]


class Link:
    """Frames to and from one of the guest's ports. What the guest does not take yet waits. `sent` counts bytes."""

    def __init__(self, sock: socket.socket, watch: Watch, file: Callable[[Frame], None]) -> None:
        self._sock, self._watch, self._file = sock, watch, file
        self._decoder, self._out = Decoder(), bytearray()
        self.sent = 0
        watch(sock.fileno(), select.POLLIN, self._ready)

    def send(self, data: bytes) -> None:
        self._out += data
        self.sent += len(data)
        self._flush()

    def _flush(self) -> None:
        if self._sock.fileno() < 0:
            return
        while self._out:
            try:
                done = self._sock.send(memoryview(self._out)[:262144])
            except BlockingIOError:
                break
            except OSError:
                self._out.clear()
                break
            del self._out[:done]
        self._watch(self._sock.fileno(), select.POLLIN | (select.POLLOUT if self._out else 0), self._ready)

    def _ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self._flush()
        if events & ~select.POLLOUT:
            self.take()

    def take(self) -> bool:
        """Read once; False when there is nothing (any more). Frames that make no sense are dropped."""
        try:
            data = self._sock.recv(262144)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._watch(self._sock.fileno(), 0, None)
            return False
        for frame in self._decoder.feed(data):
            try:
                self._file(frame)
            except (ValueError, KeyError, IndexError, struct.error):
                continue
        return True


class GuestProcess:
    """Number `number` in the guest. `outputs` are our descriptors for its stdout and stderr (with a terminal: one)."""

    def __init__(self, number: int, fds: list[int], *, stdin: bool, tty: bool, watch: Watch, send: Send) -> None:
        self.number = number
        self.tty = tty
        self.unconsumed = 0
        self.started_at: float | None = None
        self.exit_code: int | None = None
        self.usage: dict[str, int] = {}
        self.on_change: Callable[[str, Any], None] = lambda _what, _value: None
        self._watch, self._send = watch, send
        self._input = fds[0] if stdin or tty else -1
        self._outputs = {Kind.STDOUT: fds[1], Kind.STDERR: fds[1] if tty else fds[2]}
        self._pending: dict[int, bytearray] = {fd: bytearray() for fd in set(self._outputs.values())}
        self._held = False
        self._fds = fds
        for fd in fds:
            os.set_blocking(fd, False)

    # -- input

    def listen(self) -> None:
        """Read its input, as far as the guest has room for it."""
        if self._input >= 0:
            self._watch(self._input, select.POLLIN if self.unconsumed < STDIN_WINDOW else 0, self._read)

    def _read(self, _events: int) -> None:
        try:
            data = os.read(self._input, min(_CHUNK, STDIN_WINDOW - self.unconsumed))
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal whose other end has gone
        self.unconsumed += len(data)
        self._send(encode(Kind.STDIN, data, process=self.number))
        if data:
            self.listen()
        else:
            self._watch(self._input, 0, None)
            self._input = -1

    def consumed(self, count: int) -> None:
        self.unconsumed -= count
        self.listen()

    # -- output

    def write(self, kind: int, data: bytes) -> None:
        """Pass output on; what does not fit waits, and when much waits the guest does, too."""
        fd = self._outputs[Kind(kind)]
        self._pending[fd] += data
        self._flush(fd)

    def _flush(self, fd: int) -> None:
        waiting = self._pending[fd]
        while waiting:
            try:
                done = os.write(fd, memoryview(waiting)[:_CHUNK])
            except BlockingIOError:
                break
            except OSError:
                waiting.clear()  # nobody reads it any more
                break
            del waiting[:done]
        if fd != self._input:
            self._watch(fd, select.POLLOUT if waiting else 0, lambda _events: self._flush(fd))
        elif waiting:
            self._watch(fd, select.POLLIN | select.POLLOUT, lambda events: self._both(fd, events))
        else:
            self.listen()
        total = self.pending
        if not self._held and total > _HOLD_BYTES:
            self._hold(held=True)
        elif self._held and total < _RESUME_BYTES:
            self._hold(held=False)

    def _both(self, fd: int, events: int) -> None:
        if events & select.POLLOUT:
            self._flush(fd)
        if events & ~select.POLLOUT and self._input >= 0:
            self._read(events)

    def _hold(self, *, held: bool) -> None:
        self._held = held
        self._send(encode(Kind.HOLD, b"1" if held else b"0", process=self.number))

    @property
    def pending(self) -> int:
        """Bytes of output that nobody has taken yet."""
        return sum(map(len, self._pending.values()))

    def signal(self, number: int) -> None:
        self._send(encode(Kind.SIGNAL, str(int(number)).encode(), process=self.number))

    def resize(self, rows: int, columns: int) -> None:
        self._send(encode(Kind.RESIZE, f"{rows} {columns}".encode(), process=self.number))

    def close(self) -> None:
        """Forget its descriptors (0 to 2 stay open: they are the monitor's own)."""
        for fd in set(self._fds):
            self._watch(fd, 0, None)
            if fd > 2:
                os.close(fd)
