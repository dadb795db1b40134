"""What happens in a build as BuildKit's StatusResponse messages, and those of one build for whoever asks for them.

Source: BuildKit, control.proto (StatusResponse).
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from . import protobuf
from .errors import ClientGone, message_of

if TYPE_CHECKING:
    from ..building.result import BuildStep

KEPT_BYTES = 8 << 20
BEHIND = 1024
AT_ONCE_BYTES = 1 << 20


class Trace:
    """Tells what happens as BuildKit's StatusResponse records: vertices with their times, and their output."""

    def __init__(self, send: Callable[[bytes], None], *, warnings_apart: bool = False) -> None:
        """`warnings_apart`: warnings are told as such, which older clients do not know, else as lines of output."""
        self.warnings_apart = warnings_apart
        self._emit = send
        self._salt = f"{time.time_ns()}"
        self._started: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        self._last = ""

    def digest(self, key: str) -> str:
        return f"sha256:{hashlib.sha256(f'{self._salt} {key}'.encode()).hexdigest()}"

    def vertex(self, key: str, name: str, *, ended: bool = False, cached: bool = False, error: str = "") -> None:
        now = time.time()
        digest = self.digest(key)
        started = self._started.setdefault(key, now)
        fields: list[tuple[int, Any]] = [
            (1, digest),
            (2, self._last if self._last != digest else None),
            (3, name),
            (4, cached),
        ]
        fields += [(5, _timestamp(started)), (6, _timestamp(now) if ended else None), (7, error)]
        self._send(1, fields)
        if ended and not error:
            self._last = digest

    def log(self, key: str, data: bytes) -> None:
        self._send(3, [(1, self.digest(key)), (2, _timestamp(time.time())), (3, 1), (4, data)])

    def status(self, key: str, what: str, current: int, *, ended: bool = False) -> None:
        now = _timestamp(time.time())
        started = _timestamp(self._started.get(key, time.time()))
        fields = [(1, what), (2, self.digest(key)), (3, what), (4, current), (6, now), (7, started)]
        self._send(2, [*fields, (8, now if ended else None)])

    def failed(self, err: Exception) -> None:
        """The build has ended so: the steps that did not succeed did not because of this."""
        for key, name in self._failed.items():
            self.vertex(key, name, ended=True, error=message_of(err))

    def warnings(self, key: str, texts: Iterable[str]) -> None:
        for text in texts:
            if self.warnings_apart:
                self._send(4, [(1, self.digest(key)), (2, 1), (3, text.encode())])
            else:
                self.log(key, f"WARNING: {text}\n".encode())

    def _send(self, field: int, fields: list[tuple[int, Any]]) -> None:
        self._emit(protobuf.encode([(field, protobuf.encode(fields))]))

    @contextmanager
    def doing(self, name: str) -> Iterator[str]:
        """One step of our own, such as loading the context; yields its key."""
        self.vertex(name, name)
        try:
            yield name
        except Exception as err:
            self.vertex(name, name, ended=True, error=message_of(err))
            raise
        self.vertex(name, name, ended=True)

    def step(self, step: BuildStep) -> None:
        """A step of the Dockerfile, as BuildKit names them."""
        key = f"step {step.number}"
        name = f"[{step.number}/{step.total}] {' '.join(step.text.split())}"
        if step.status == "started":
            self.vertex(key, name)
        elif step.status == "output":
            self.log(key, bytes(step.output))
        elif step.status == "failed":
            self._failed[key] = name  # why, the end of the build says
        else:
            self.vertex(key, name, ended=True, cached=step.status == "cached")


def _timestamp(seconds: float) -> list[tuple[int, int]]:
    return [(1, int(seconds)), (2, int(seconds % 1 * 1e9))]


class Progress:
    """The messages of one build, kept until it is over: who follows gets them from the first on.

    A build waits for a follower that is far behind; without one, the oldest messages make room for new ones.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._first = 0  # the number of the oldest message that is kept
        self._places: dict[asyncio.Event, int] = {}
        self._condition = threading.Condition()
        self._ended = False

    def add(self, message: bytes) -> None:
        """From any thread. Raises ClientGone when the build is over for its client."""
        with self._condition:
            while not self._ended and self._most_behind() >= BEHIND:
                self._condition.wait()
            if self._ended:
                raise ClientGone("the client has left")
            self._messages.append(message)
            self._bytes += len(message)
            while self._bytes > KEPT_BYTES and self._most_behind() < len(self._messages):
                self._bytes -= len(self._messages.popleft())
                self._first += 1
        self._wake()

    def _most_behind(self) -> int:
        return max((self._newest() - place for place in self._places.values()), default=0)

    def _wake(self) -> None:
        def wake() -> None:
            for each in self._places:
                each.set()

        with suppress(RuntimeError):  # the loop is closed: the daemon ends
            self._loop.call_soon_threadsafe(wake)

    def end(self) -> None:
        with self._condition:
            self._ended = True
            self._condition.notify_all()
        self._wake()

    async def follow(self) -> AsyncIterator[bytes]:
        """All messages until the end, as many at once as there are: messages that follow each other are one, too."""
        arrived = asyncio.Event()
        with self._condition:
            self._places[arrived] = self._first
        try:
            while True:
                arrived.clear()
                with self._condition:
                    found, ended = self._next(arrived), self._ended
                    self._condition.notify_all()
                if found:
                    yield b"".join(found)
                elif ended:
                    return
                else:
                    await arrived.wait()
        finally:
            with self._condition:
                self._places.pop(arrived, None)
                self._condition.notify_all()

    def _next(self, follower: asyncio.Event) -> list[bytes]:
        place, count, found = max(self._places[follower], self._first), 0, list[bytes]()
        while place < self._newest() and count < AT_ONCE_BYTES:
            found.append(self._messages[place - self._first])
            count += len(found[-1])
            place += 1
        self._places[follower] = place
        return found

    def _newest(self) -> int:
        return self._first + len(self._messages)
