"""A connection taken over from HTTP: the raw stream of attach, exec and sessions, with half-close.

Tornado closes a stream at end of file, but a docker client closes its sending side long before the last output; so the
socket leaves tornado and is driven here. What a hijacked stream carries is the group's business, not this module's.
Source: Docker Engine API, ContainerAttach, "Hijacking" and "Stream format".
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import ssl
import struct
import termios
from contextlib import suppress
from typing import Any, Protocol

from .errors import ClientGone

CHUNK = 1 << 18
SPLICED_BYTES = 1 << 20
HEADERS_TAKEN_S = 0.2
IN_VAIN_S = 1.0


class Channel(Protocol):
    """What attach and exec need of a client: a raw stream, or a WebSocket that behaves as one."""

    async def receive(self) -> bytes: ...

    async def send(self, data: bytes) -> None: ...

    async def gone(self) -> None: ...

    def close(self) -> None: ...


class Duplex:
    """A raw stream in both directions. Belongs to the event loop it was made on."""

    def __init__(self, sock: socket.socket, rest: bytes) -> None:
        self.sock = sock
        self._rest = rest
        self._loop = asyncio.get_running_loop()
        self._closed = False
        sock.settimeout(0)

    async def receive(self) -> bytes:
        """What the client sent, b"" once it has closed its sending side (or all)."""
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        while not self._closed:
            try:
                return self.sock.recv(CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except ssl.SSLWantWriteError:
                await asyncio.sleep(0.01)  # a key update while our sending side is full
            except OSError:
                break
        return b""

    async def send(self, data: bytes) -> None:
        """Returns when all is on its way. Raises ClientGone."""
        view = memoryview(data)
        while view:
            if self._closed:
                raise ClientGone("the connection is closed")
            try:
                view = view[self.sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
            except ssl.SSLWantReadError:
                await asyncio.sleep(0.01)
            except OSError:
                raise ClientGone("the client has left") from None

    @property
    def is_plain(self) -> bool:
        """Whether what comes is what the client sent: TLS has to see the bytes."""
        return type(self.sock) is socket.socket

    async def pour(self, fd: int) -> bool:
        """Move what the client sends into the pipe `fd`, without looking at it; True at the end of its input, False
        when nobody reads the pipe any more. Both have to be non-blocking (man 2 splice)."""
        while self._rest:
            try:
                self._rest = self._rest[os.write(fd, self._rest) :]
            except BlockingIOError:
                await self._pipe_ready(fd)
            except OSError:
                return False
        while not self._closed:
            try:
                if not os.splice(self.sock.fileno(), fd, SPLICED_BYTES):
                    return True
                await asyncio.sleep(0)  # others have their turn
            except BlockingIOError:
                if self._has_input():
                    await self._pipe_ready(fd)
                else:
                    await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except BrokenPipeError:
                return False
            except OSError:
                return True
        return True

    async def finish(self) -> None:
        """End our side, and take what the client still sends in vain, a moment at most: a unix socket that is closed
        with unread input tells the other side of a reset instead of the end."""
        if not self.is_plain or self._closed:
            return  # under TLS the end is told in the stream
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        with suppress(TimeoutError):
            async with asyncio.timeout(IN_VAIN_S):
                while await self.receive():
                    pass  # until it has heard of the end, too, and closes

    def _has_input(self) -> bool:
        watch = select.poll()
        watch.register(self.sock.fileno(), select.POLLIN | select.POLLRDHUP)
        return bool(watch.poll(0))

    async def _pipe_ready(self, fd: int) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._loop.add_writer(fd, wake)
        try:
            await waiter
        finally:
            self._loop.remove_writer(fd)

    async def headers_taken(self) -> None:
        """Wait until the client has read what was sent so far, a moment at most.

        The Docker SDK for Python drops what arrives together with the headers. Only a unix socket tells (man 7 unix,
        SIOCOUTQ); elsewhere the moment is short.
        """
        if self.sock.family != socket.AF_UNIX:
            await asyncio.sleep(0.005)
            return
        pause = 0.0005
        while not self._closed and pause < HEADERS_TAKEN_S:
            with suppress(OSError):
                waiting = struct.unpack("i", fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
                if not waiting:
                    return
            await asyncio.sleep(pause)
            pause *= 2

    async def gone(self, *, half: bool = False) -> None:
        """Returns when the client has closed both directions; with `half`, when it has closed its sending side."""
        with select.epoll() as watch:
            if self._closed:
                return
            # EPOLLHUP and EPOLLERR are always told
            watch.register(self.sock.fileno(), select.EPOLLRDHUP if half else 0)
            found: asyncio.Future[None] = self._loop.create_future()

            def look() -> None:
                if watch.poll(0) and not found.done():
                    found.set_result(None)

            self._loop.add_reader(watch.fileno(), look)
            try:
                await found
            finally:
                self._loop.remove_reader(watch.fileno())

    async def _ready(self, add: Any, remove: Any) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        fd = self.sock.fileno()
        add(fd, wake)
        try:
            await waiter
        finally:
            if not self._closed:
                remove(fd)

    def shutdown(self) -> None:
        """End both directions; whoever waits for the socket, in whatever thread, notices."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close both directions."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self.shutdown()
        self.sock.close()

    def __enter__(self) -> Duplex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_socket(stream: Any) -> tuple[socket.socket, bytes]:
    """The socket of a detached tornado stream, and the bytes tornado has read beyond the request."""
    rest = bytes(stream._read_buffer[: stream._read_buffer_size])
    stream.io_loop.remove_handler(stream.fileno())
    # tornado closes the socket it holds: it gets another one to close
    sock, stream.socket = stream.socket, socket.socket(socket.AF_UNIX)
    stream._state = None
    stream.close()
    return sock, rest
