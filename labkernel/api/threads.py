"""Between the event loop and threads, both ways with bounds: a request's body read in a thread, and what a thread makes
sent from the loop. Neither side can run away from the other: a full buffer makes the faster one wait."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from .errors import ClientGone

T = TypeVar("T")
BODY_HIGH_BYTES = 4 << 20
PRODUCED = 64


class BodySource(Protocol):
    """A request's body as handlers use it."""

    async def chunk(self) -> bytes: ...

    def read(self) -> bytes: ...

    def end(self, *, broken: bool = False) -> None: ...

    def drop(self) -> None: ...


class Body:
    """A request's body on its way in. Fed on the loop; read on the loop (`chunk`) or in one thread (`read`)."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._bytes = 0
        self._condition = threading.Condition()
        self._ended = False
        self._broken = False
        self._dropped = False
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._room: asyncio.Future[None] | None = None

    def feed(self, chunk: bytes) -> asyncio.Future[None] | None:
        """One more chunk; the future, if any, is done when there is room for another one."""
        with self._condition:
            if self._dropped:
                return None
            self._chunks.append(chunk)
            self._bytes += len(chunk)
            self._condition.notify()
            self._arrived.set()
            if self._bytes < BODY_HIGH_BYTES:
                return None
            self._room = self._loop.create_future()
            return self._room

    def end(self, *, broken: bool = False) -> None:
        """The whole body has come, or (`broken`) the client has gone before that."""
        with self._condition:
            if not self._ended:
                self._ended, self._broken = True, broken
            self._condition.notify_all()
            self._arrived.set()
            self._make_room()

    def drop(self) -> None:
        """Nobody will read any more."""
        with self._condition:
            self._dropped = True
            self._chunks.clear()
            self._bytes = 0
        self.end(broken=True)

    def _make_room(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def _take(self) -> bytes | None:
        """The next chunk, b"" at the end, None when one has to wait. Under the lock."""
        if self._chunks:
            chunk = self._chunks.popleft()
            self._bytes -= len(chunk)
            if self._room is not None and self._bytes < BODY_HIGH_BYTES // 2:
                self._loop.call_soon_threadsafe(self._make_room)
            return chunk
        if self._ended:
            if self._broken:
                raise ClientGone("the client left before the end of the body")
            return b""
        return None

    async def chunk(self) -> bytes:
        """The next chunk, b"" at the end. Raises ClientGone."""
        while True:
            with self._condition:
                chunk = self._take()
                if chunk is not None:
                    return chunk
                self._arrived.clear()
            await self._arrived.wait()

    def read(self) -> bytes:
        """The same for a thread."""
        with self._condition:
            while (chunk := self._take()) is None:
                self._condition.wait()
            return chunk


class BodyFile(io.RawIOBase):
    """A body as a binary file, for a thread."""

    def __init__(self, body: BodySource) -> None:
        self._body = body
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(self._body.read())
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class Producer(Generic[T]):
    """Runs `work(emit)` in a thread of its own; iterate (async) for what it emits, in order.

    `emit` waits while too much waits to be sent and raises ClientGone once the reader has left, so that `work` ends.
    What `work` raises is raised at the end of the iteration; what it returns is `result` then.
    """

    def __init__(self, work: Callable[[Callable[[T], None]], Any], *, name: str = "labkernel-api") -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._condition = threading.Condition()
        self._ready = asyncio.Event()
        self._left = False
        self._ended = False
        self._error: BaseException | None = None
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    @property
    def left(self) -> bool:
        """Whether the reader has left; for work that waits without emitting."""
        return self._left

    def _run(self, work: Callable[[Callable[[T], None]], Any]) -> None:
        try:
            self.result = work(self._emit)
        except BaseException as err:
            self._error = err
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            self._left = True  # the loop is closed: the daemon ends

    def _emit(self, item: T) -> None:
        with self._condition:
            while len(self._items) >= PRODUCED and not self._left:
                self._condition.wait()
            if self._left:
                raise ClientGone("the client has left")
            self._items.append(item)
            first = len(self._items) == 1
        if first:
            self._wake()

    async def take(self) -> list[T]:
        """All there is by now, at least one item; empty at the end. Raises what `work` raised."""
        while True:
            ended = self._ended  # before the items: what is emitted after a look at them may be the last
            with self._condition:
                items = list(self._items)
                self._items.clear()
                self._condition.notify()
            if items:
                return items
            if ended:
                if self._error is not None:
                    raise self._error
                return []
            self._ready.clear()
            if not self._items and not self._ended:
                await self._ready.wait()

    def leave(self) -> None:
        """Nobody takes any more."""
        with self._condition:
            self._left = True
            self._condition.notify_all()


async def in_thread(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call something that may block for long in a thread of its own."""
    producer: Producer[None] = Producer(lambda emit: function(*args, **kwargs))
    while await producer.take():
        pass
    found: T = producer.result
    return found
