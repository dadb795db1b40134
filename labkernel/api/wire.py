"""A connection that left tornado before the body of its request: bodies that are files go from the socket to the thread
that uses them, and files go from a descriptor to the socket.

Tornado reads a chunked body piece by piece on the event loop, each of them three turns of it; docker's client sends
32 KiB a piece. Here a thread reads as much as there is, and what a task writes into a pipe is spliced into the socket,
so that a gigabyte costs about what copying it does. Only for plain sockets (TLS has to see the bytes), and one request
a connection: the answer says `Connection: close`.
Source: RFC 9112, "Chunked Transfer Coding"; man 2 splice.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus

from ..errors import UsageError
from .errors import ClientGone
from .hijack import Duplex
from .threads import in_thread

BUFFER_BYTES = 512 << 10
LINE_MAX_BYTES = 4096
LINE_BYTES = 8  # a chunk's line with the one that ends the chunk before, as docker's client sends them: \r\n8000\r\n
DRAIN_S = 1.0
_HEX = frozenset(b"0123456789abcdefABCDEF")


class Chunked:
    """The state of a chunked body: feed it what came, get what it carries. `ended` after its last byte."""

    def __init__(self) -> None:
        self.ended = False
        self._left = 0  # of the chunk at hand, see `left`
        self._line = b""  # the beginning of a line whose end has not come yet
        self._after = False  # the empty line behind a chunk comes next
        self._trailer = False

    def feed(self, data: memoryview) -> list[memoryview]:
        """The pieces of the body in `data`; what follows its end is not looked at. Raises UsageError."""
        found: list[memoryview] = []
        at, stop = 0, len(data)
        while at < stop and not self.ended:
            if self._left:
                count = min(self._left, stop - at)
                found.append(data[at : at + count])
                at += count
                self._left -= count
                self._after = not self._left
                continue
            # A line is short: what is searched for its end is not more than it may have.
            head = bytes(data[at : at + LINE_MAX_BYTES])
            end = head.find(b"\n")
            self._line += head if end < 0 else head[:end]
            at += len(head) if end < 0 else end + 1
            if len(self._line) > LINE_MAX_BYTES:
                raise UsageError("malformed chunked encoding: a line without an end")
            if end >= 0:
                line, self._line = self._line.removesuffix(b"\r"), b""
                self._take(line)
        return found

    @property
    def left(self) -> int:
        """So many bytes from here on are the body's."""
        return self._left

    def skip(self, count: int) -> None:
        """`count` of them were taken without being shown."""
        self._left -= count
        self._after = not self._left

    def _take(self, line: bytes) -> None:
        if self._after:
            if line:
                raise UsageError("malformed chunked encoding: a chunk is longer than it says")
            self._after = False
        elif self._trailer:
            self.ended = not line
        else:
            word = line.partition(b";")[0].strip(b" \t")
            if not word or len(word) > 15 or not _HEX.issuperset(word):
                raise UsageError("malformed chunked encoding: no length")
            self._left = int(word, 16)
            self._trailer = not self._left


class Counted:
    """The same for a body of a known length."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.ended = not length

    @property
    def left(self) -> int:
        return self._left

    def skip(self, count: int) -> None:
        self._left -= count
        self.ended = not self._left

    def feed(self, data: memoryview) -> list[memoryview]:
        piece = data[: self._left]
        self._left -= len(piece)
        self.ended = not self._left
        return [piece]


class WireBody:
    """A body read straight from its socket, by one thread at a time. The same to handlers as `threads.Body`."""

    def __init__(self, sock: socket.socket, rest: bytes, form: Chunked | Counted, ended: Callable[[], None]) -> None:
        """`ended` is called in whatever thread takes the last byte, or finds that none will come."""
        self._sock = sock
        self._rest = rest
        self._form = form
        self._tell = ended
        self._buffer = memoryview(bytearray(BUFFER_BYTES)) if not form.ended else memoryview(b"")
        self._reading = threading.Lock()
        self._dropped = False
        self._broken = False
        if form.ended:
            ended()

    def read(self) -> bytes:
        """The next piece, b"" at the end; waits for it. Raises ClientGone, UsageError."""
        with self._reading:
            while not self._form.ended:
                data = self._receive(None)
                pieces = self._form.feed(data)
                if self._form.ended:
                    self._finish()
                if pieces:
                    return b"".join(pieces)
            return b""

    def pour(self, fd: int) -> None:
        """All that is left of the body into the pipe `fd`, mostly without looking at it: what the kernel has of a chunk
        is spliced, and only the lines between chunks are read. Raises ClientGone, UsageError, and BrokenPipeError when
        nobody reads the pipe any more."""
        with self._reading:
            while not self._form.ended:
                if self._form.left and not self._rest:
                    self._form.skip(self._splice(fd, self._form.left))
                else:
                    for piece in self._form.feed(self._receive(None, LINE_BYTES)):
                        _write(fd, piece)
                if self._form.ended:
                    self._finish()

    def _splice(self, fd: int, count: int) -> int:
        while not (self._dropped or self._broken):
            try:
                moved = os.splice(self._sock.fileno(), fd, count)
            except BlockingIOError:
                _wait(None, (self._sock.fileno(), select.POLLIN))
                continue
            except BrokenPipeError:
                raise
            except OSError:
                moved = 0
            if moved:
                return moved
            self._broken = True
        self._finish()
        raise ClientGone("the client left before the end of the body")

    async def chunk(self) -> bytes:
        """The same on the event loop."""
        return await in_thread(self.read)

    def _receive(self, until: float | None, count: int = BUFFER_BYTES) -> memoryview:
        if self._rest:
            rest, self._rest = self._rest, b""
            return memoryview(rest)
        while not (self._dropped or self._broken):
            try:
                got = self._sock.recv_into(self._buffer, count)
            except BlockingIOError:
                if not _wait(until, (self._sock.fileno(), select.POLLIN)):
                    break
                continue
            except OSError:
                got = 0
            if got:
                return self._buffer[:got]
            self._broken = True
        self._finish()
        raise ClientGone("the client left before the end of the body")

    def _finish(self) -> None:
        self._buffer = memoryview(b"")
        self._tell()

    def drain(self) -> None:
        """Read what is left and forget it, a moment at most: a client that is still sending when the connection is
        closed may see that instead of the answer."""
        until = time.monotonic() + DRAIN_S
        if not self._reading.acquire(timeout=DRAIN_S):
            return
        try:
            while not self._form.ended and time.monotonic() < until:
                self._form.feed(self._receive(until))
                if self._form.ended:
                    self._finish()
        except (ClientGone, UsageError):
            pass
        finally:
            self._reading.release()

    def drop(self) -> None:
        """Nobody will read any more; a thread that does gets ClientGone."""
        self._dropped = True
        if not self._form.ended and self._reading.locked():
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)  # wakes a poll

    def end(self, *, broken: bool = False) -> None:
        self._broken = self._broken or broken
        self.drop()

    def feed(self, chunk: bytes) -> None:
        raise AssertionError("tornado has no part in this connection any more")

    def settle(self) -> None:
        """Returns once no thread uses the socket, which must be shut down by then."""
        with self._reading:
            pass


class Wire:
    """The connection of one request, from its headers to the end of its answer."""

    def __init__(self, duplex: Duplex, rest: bytes, headers: Mapping[str, str], gone: Callable[[], None]) -> None:
        self._duplex = duplex
        self._loop = asyncio.get_running_loop()
        self.body_done = asyncio.Event()
        form = Chunked() if is_chunked(headers) else Counted(int(headers.get("Content-Length") or 0))
        self.body = WireBody(duplex.sock, rest, form, self._ended)
        self._continued = headers.get("Expect", "").lower() != "100-continue"
        self._watch = asyncio.ensure_future(self._notice(gone))
        self._chunked = False

    def _ended(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: the daemon ends
            self._loop.call_soon_threadsafe(self.body_done.set)

    async def _notice(self, gone: Callable[[], None]) -> None:
        """A client that closes before the body's end is seen by who reads it, later on here."""
        await self.body_done.wait()
        await self._duplex.gone(half=True)
        gone()

    async def invite(self) -> None:
        """Let the body come, where the client waits for a word."""
        if not self._continued:
            self._continued = True
            await self._duplex.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The head of an answer whose length nobody knows."""
        self._chunked = True
        await self._duplex.send(_head(status, {**headers, "Transfer-Encoding": "chunked"}))

    async def write(self, data: bytes) -> None:
        if data:
            await self._duplex.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole answer, with its length among the headers."""
        await self._duplex.send(_head(status, headers) + body)

    async def finish(self) -> None:
        """The answer is whole."""
        if self._chunked:
            await self._duplex.send(b"0\r\n\r\n")
        await self.close()

    async def drain(self) -> None:
        if not self.body_done.is_set():
            await in_thread(self.body.drain)

    async def pour(self, fd: int) -> None:
        """Send all that comes out of the pipe `fd`, without looking at it. Raises ClientGone."""
        pouring = asyncio.ensure_future(in_thread(pour, fd, self._duplex.sock))
        try:
            await asyncio.shield(pouring)
        except asyncio.CancelledError:
            self._duplex.shutdown()  # which ends the thread
            await asyncio.gather(pouring, return_exceptions=True)
            raise

    async def close(self) -> None:
        """Close the connection; no thread uses it any more when this returns."""
        self._watch.cancel()
        self._duplex.shutdown()
        self.body.drop()
        await in_thread(self.body.settle)
        self._duplex.close()


def is_chunked(headers: Mapping[str, str]) -> bool:
    return headers.get("Transfer-Encoding", "").lower() == "chunked"


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def pour(fd: int, sock: socket.socket) -> None:
    """All that comes out of the pipe `fd` as chunks of an answer, until its writers have closed it. In a thread.

    Each chunk is what waits in the pipe (man 7 pipe, FIONREAD); its pages go to the socket without a copy. Raises
    ClientGone."""
    between = b""
    try:
        while waiting := _waiting(fd, sock):
            _send(sock, b"%b%x\r\n" % (between, waiting))
            while waiting:
                try:
                    waiting -= os.splice(fd, sock.fileno(), waiting)
                except BlockingIOError:
                    _wait(None, (sock.fileno(), select.POLLOUT))
            between = b"\r\n"
        _send(sock, between)
    except OSError:
        raise ClientGone("the client has left") from None


def _waiting(fd: int, sock: socket.socket) -> int:
    """Bytes in a pipe, at least one; 0 at its end. Raises OSError when the client leaves before there are any."""
    while True:
        count: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
        if count:
            return count
        ready = _wait(None, (fd, select.POLLIN), (sock.fileno(), select.POLLRDHUP))
        if sock.fileno() in ready:
            raise OSError(errno.EPIPE, "the client has left")
        if not ready[fd] & select.POLLIN:
            return 0


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _send(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            _wait(None, (sock.fileno(), select.POLLOUT))


def _wait(until: float | None, *what: tuple[int, int]) -> dict[int, int]:
    """What poll tells of (descriptor, events); nothing after the moment `until`. Raises OSError for a closed one."""
    watch = select.poll()
    for fd, events in what:
        if fd < 0:
            raise OSError(errno.EBADF, "the connection is closed")
        watch.register(fd, events)
    return dict(watch.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000))
