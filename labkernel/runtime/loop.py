"""A small event loop (epoll, timers) and a client connection with bounded buffers. Standard library only."""

from __future__ import annotations

import heapq
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from . import protocol

IN, OUT = select.EPOLLIN, select.EPOLLOUT
HIGH_BYTES = 512 << 10
LOW_BYTES = 64 << 10
Handler = Callable[[int], None]


class Timer:
    """One call in the future; `cancel` is enough to forget it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Calls handlers for ready descriptors and due timers until `stopped`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.handlers: dict[int, tuple[Handler, int]] = {}
        self.timers: list[tuple[float, int, Timer]] = []
        self.serial = 0
        self.stopped = False
        self.idle: Callable[[], None] | None = None

    def watch(self, fd: int, handler: Handler, events: int = IN) -> None:
        if fd in self.handlers:
            self.epoll.modify(fd, events)
        else:
            self.epoll.register(fd, events)
        self.handlers[fd] = (handler, events)

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            try:
                self.epoll.unregister(fd)
            except (OSError, ValueError):
                pass

    def rebuild(self) -> None:
        """A new epoll with the same watches: after a fork the old one is shared with the other process."""
        self.epoll.close()
        self.epoll = select.epoll()
        for fd, (_, events) in list(self.handlers.items()):
            try:
                self.epoll.register(fd, events)
            except OSError:
                del self.handlers[fd]

    def later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        self.serial += 1
        heapq.heappush(self.timers, (time.monotonic() + delay_s, self.serial, timer))
        return timer

    def run(self) -> None:
        while not self.stopped:
            self._due()
            if self.stopped:
                return
            if self.idle is None:
                ready = self.epoll.poll(self._timeout())
            else:
                # Work put off until after the answers: done only when nothing else is to do.
                ready = self.epoll.poll(0)
                if not ready:
                    idle, self.idle = self.idle, None
                    self._guard(idle)
                    continue
            for fd, events in ready:
                entry = self.handlers.get(fd)
                if entry is not None:
                    self._guard(entry[0], events)

    def _timeout(self) -> float | None:
        while self.timers and self.timers[0][2].call is None:
            heapq.heappop(self.timers)
        return max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None

    def _due(self) -> None:
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            call = heapq.heappop(self.timers)[2].call
            if call is not None:
                self._guard(call)

    @staticmethod
    def _guard(call: Callable[..., None], *args: Any) -> None:
        # One broken request must not take the containers' supervisor with it; the trace goes to supervisor.log.
        try:
            call(*args)
        except Exception:
            import traceback

            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()


class Connection:
    """One client: a request, then frames. `closed` is called once, however it ends."""

    def __init__(self, loop: Loop, sock: socket.socket, request: Callable[[Connection, Any, list[int]], None]) -> None:
        self.loop = loop
        self.sock = sock
        self.fd = sock.fileno()
        self.request: Callable[[Connection, Any, list[int]], None] | None = request
        self.frame: Callable[[int, bytes], None] | None = None
        self.closed: Callable[[], None] | None = None
        self.drained: Callable[[], None] | None = None
        self.buffer = bytearray()
        self.fds: list[int] = []
        self.out = bytearray()
        self.finishing = False
        self.reading = True
        self.open = True
        loop.watch(self.fd, self._event)

    @property
    def pending(self) -> int:
        """Bytes the client has not taken yet."""
        return len(self.out)

    def look(self) -> None:
        """A client that has connected has often sent its request, too."""
        self._read()

    def _event(self, events: int) -> None:
        if events & OUT:
            self._flush()
        if self.open and events & ~OUT:
            self._read()

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            data, fds = protocol.receive(self.sock, 65536 if self.frame is None else 262144)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        self.fds += fds
        if not data:
            self.close()
            return False
        self.buffer += data
        try:
            self._parse()
        except (ValueError, KeyError, TypeError) as err:
            sys.stderr.write(f"bad request: {err!r}\n")
            sys.stderr.flush()
            self.close()
        return True

    def _parse(self) -> None:
        if self.request is not None:
            message = protocol.take_message(self.buffer)
            if message is None:
                return
            handler, self.request = self.request, None
            fds, self.fds = self.fds, []
            handler(self, message, fds)
        if self.open and self.buffer and self.frame is not None:
            for stream, data in protocol.take_frames(self.buffer):
                self.frame(stream, data)

    def send(self, data: bytes) -> None:
        if not self.open or self.finishing:
            return
        if not self.out:
            try:
                done = self.sock.send(data)
            except BlockingIOError:
                done = 0
            except OSError:
                self._give_up()
                return
            if done == len(data):
                return
            data = data[done:]
        self.out += data
        self._rewatch()

    def send_with_fd(self, data: bytes, fd: int) -> bool:
        """Send `data` with a descriptor, unless something else has to go first."""
        if not self.open or self.finishing or self.out:
            return False
        try:
            done = protocol.send_with_fds(self.sock, data, [fd])
        except OSError:
            return False
        if done < len(data):
            self.out += data[done:]
            self._rewatch()
        return True

    def _flush(self) -> None:
        try:
            done = self.sock.send(memoryview(self.out)[:262144])
        except BlockingIOError:
            return
        except OSError:
            self._give_up()
            return
        del self.out[:done]
        if len(self.out) <= LOW_BYTES and self.drained is not None and not self.finishing:
            self.drained()
        if not self.open:
            return
        if not self.out:
            self._rewatch()
            if self.finishing:
                self.close()

    def _give_up(self) -> None:
        """The client takes nothing any more. What it said before it left still counts: that it lets go, say."""
        self.finishing = True
        while self.open and self._read():
            pass
        self.close()

    def pause_reading(self, *, paused: bool) -> None:
        self.reading = not paused
        if self.open:
            self._rewatch()

    def _rewatch(self) -> None:
        self.loop.watch(self.fd, self._event, (IN if self.reading else 0) | (OUT if self.out else 0))

    def finish(self, last: bytes = b"") -> None:
        """Send `last` and close once all is taken."""
        if last:
            self.send(last)
        if not self.out:
            self.close()
        self.finishing = True

    def detach_socket(self) -> socket.socket:
        """Give the socket away (to the worker) without closing the conversation."""
        self.open = False
        self.loop.unwatch(self.fd)
        return self.sock

    def close(self) -> None:
        if not self.open:
            return
        self.open = False
        self.loop.unwatch(self.fd)
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        if self.closed is not None:
            self.closed()
