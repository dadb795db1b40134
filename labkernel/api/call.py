"""One request as a handler sees it, whoever serves it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec

from ..errors import UsageError
from .errors import ApiError, ClientGone
from .threads import BodyFile, BodySource, Producer, in_thread

if TYPE_CHECKING:
    from ..engine import Engine
    from .hijack import Duplex

T = TypeVar("T")
JSON_MAX_BYTES = 4 << 20
THREADS = 64


class Answer(NamedTuple):
    """A whole answer. `body` is bytes, text, None (no body) or anything JSON."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = {}


class Transport(Protocol):
    """What a host gives a call: see `handler`."""

    async def begin(self, status: int, headers: dict[str, str]) -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def pour(self, fd: int) -> bool: ...

    async def hijack(self, status: int, headers: dict[str, str]) -> Duplex: ...


class Piped(Protocol):
    """Bytes that another process writes to a pipe: iterate for them, or read the descriptor to its end and then
    `finish`."""

    def __iter__(self) -> Iterator[bytes]: ...

    def fileno(self) -> int: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class Host:
    """What lives as long as the host of the table: the engine, its threads, and what the groups keep (`shared`)."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._open = engine
        self._engine: Engine | None = None
        self._opening = threading.Lock()
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="labkernel-api")
        self._shared: dict[Any, Any] = {}
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def engine(self) -> Engine:
        """Opened at the first request, in a thread."""
        if self._engine is None:
            with self._opening:
                self._engine = self._engine or self._open()
        return self._engine

    def shared(self, make: Callable[[Host], T]) -> T:
        """The one object of a kind that the calls of this host share; `make(host)` at the first time."""
        if make not in self._shared:
            self._shared[make] = make(self)
        found: T = self._shared[make]
        return found

    def background(self, work: Any) -> asyncio.Task[Any]:
        """A coroutine that goes on after the call that began it; ended with the host."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def close(self) -> None:
        """End what goes on in the background. Containers stay."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.pool.shutdown(wait=False, cancel_futures=True)


class Call:
    """One request and its answer. Plain handlers run in a thread and use the upper half; async ones use all."""

    def __init__(
        self,
        host: Host,
        method: str,
        params: dict[str, str],
        version: tuple[int, int],
        queries: dict[str, list[bytes]],
        headers: Any,
        stream: BodySource,
        transport: Transport,
    ) -> None:
        self.host = host
        self.method = method
        self.params = params
        self.version = version
        self.headers = headers
        """Of the request: a mapping whose names have no case."""
        self.body: Any = None
        self.stream = stream
        self.began = False
        self._queries = queries
        self._transport = transport
        self._gone = asyncio.Event()
        self._on_gone: list[Callable[[], object]] = []

    @property
    def engine(self) -> Engine:
        return self.host.engine

    # -- what was asked ----------------------------------------------------------------------------------------------

    def query(self, name: str, default: str = "") -> str:
        """A word of the query, the first when there are several."""
        found = self._queries.get(name)
        return found[0].decode(errors="replace") if found else default

    def queries(self, name: str) -> list[str]:
        """All words of that name."""
        return [word.decode(errors="replace") for word in self._queries.get(name, ())]

    def has(self, name: str) -> bool:
        return name in self._queries

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A truth value as docker reads it: everything but an empty word, 0, no, false and none is true."""
        if name not in self._queries:
            return default
        return self.query(name).strip().lower() not in ("", "0", "no", "false", "none")

    def number(self, name: str, default: int | None = None) -> int | None:
        """A whole number. Raises UsageError."""
        text = self.query(name).strip()
        if not text:
            return default
        try:
            number = int(text)
        except ValueError:
            raise UsageError(f'strconv.Atoi: parsing "{text}": invalid syntax') from None
        if not -(1 << 63) <= number < 1 << 63:
            raise UsageError(f'strconv.Atoi: parsing "{text}": value out of range')
        return number

    def document(self, name: str) -> Any:
        """JSON in the query (`buildargs`, `labels`, …); None when it is not given. Raises UsageError."""
        text = self.query(name)
        if not text:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"invalid {name}: not JSON") from None

    def filters(self) -> dict[str, list[str]]:
        """Docker's filters in both their shapes, `{"name": {"value": true}}` and `{"name": ["value"]}`."""
        found = self.document("filters")
        if not found:
            return {}
        if not isinstance(found, dict):
            raise UsageError("invalid filter: not an object")
        words: dict[str, list[str]] = {}
        for name, values in found.items():
            if isinstance(values, dict):
                values = [value for value, on in values.items() if on]
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise UsageError(f"invalid filter '{name}'")
            if values:  # a filter without values filters nothing
                words[name] = values
        return words

    def answer(self, status: int = 200, body: Any = None, **headers: str) -> Answer:
        """An answer to return: `call.answer(201, {...}, X_Name="…")` (`_` for `-` in names of headers)."""
        return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def reader(self) -> BodyFile:
        """The body as a binary file that a thread reads, as long as it may be."""
        return BodyFile(self.stream)

    # -- for async handlers ------------------------------------------------------------------------------------------

    async def thread(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Call something that blocks for a moment in one of the host's threads. What may block for long, or for ever,
        has a thread of its own: `produce`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.host.pool, partial(function, *args, **kwargs))

    async def alone(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """The same in a thread of its own, for what may take long: a stop, a copy, a body that comes slowly."""
        return await in_thread(function, *args, **kwargs)

    async def read(self, limit: int = JSON_MAX_BYTES) -> bytes:
        """The whole body. Raises ApiError (413) when it is longer than `limit` bytes."""
        data = bytearray()
        async for chunk in self.chunks():
            data += chunk
            if len(data) > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes")
        return bytes(data)

    async def decode(self, kind: Any) -> Any:
        """The JSON body as `kind`; an empty body is an empty object. Raises UsageError."""
        kind_of_body = self.headers.get("Content-Type", "")
        data = await self.read()
        if not data.strip():
            data = b"{}"
        elif kind_of_body.partition(";")[0].strip().lower() != "application/json":
            # As docker. A web page can send a form to a socket on this machine, but no JSON.
            raise UsageError(f"unsupported Content-Type header ({kind_of_body}): must be 'application/json'")
        try:
            try:
                return msgspec.json.decode(data, type=kind)
            except msgspec.ValidationError:
                # To docker, which is Go, a null says as little as a field that is not there.
                return msgspec.convert(_without_nulls(msgspec.json.decode(data)), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise UsageError(f"invalid JSON: {err}") from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; the client waits while it is not taken. Raises ClientGone."""
        while chunk := await self.stream.chunk():
            yield chunk

    async def begin(self, status: int = 200, **headers: str) -> None:
        """Send status and headers now; `write` goes on from there."""
        self.began = True
        await self._transport.begin(status, {name.replace("_", "-"): value for name, value in headers.items()})

    async def write(self, data: bytes) -> None:
        """A piece of the body; returns when it is on its way. Raises ClientGone."""
        if not self.began:
            await self.begin()
        await self._transport.write(data)

    async def pour(self, source: Piped) -> None:
        """The rest of the body is what comes out of a pipe; without a copy where the host can. Raises ClientGone, and
        what went wrong behind the pipe."""
        if not self.began:
            await self.begin()
        try:
            if await self._transport.pour(source.fileno()):
                await self.alone(source.finish)
            else:
                async for pieces in self.iterate(lambda: source):
                    await self.write(b"".join(pieces))
        finally:
            await self.alone(source.close)

    async def produce(self, work: Callable[[Callable[[Any], None]], Any]) -> AsyncIterator[list[Any]]:
        """Run `work(emit)` in a thread of its own and get what it emits, in batches; see `threads.Producer`. When the
        client leaves, `emit` raises ClientGone in the thread."""
        producer: Producer[Any] = Producer(work)
        self.on_gone(producer.leave)
        try:
            while items := await producer.take():
                yield items
        finally:
            producer.leave()

    async def iterate(self, make: Callable[[], Iterable[Any]]) -> AsyncIterator[list[Any]]:
        """The same for something iterable that `make` gives."""

        def work(emit: Callable[[Any], None]) -> None:
            items = make()
            try:
                for item in items:
                    emit(item)
            finally:
                # A generator that its reader left has threads and descriptors of its own to end.
                close = getattr(items, "close", None)
                if close is not None:
                    close()

        async for items in self.produce(work):
            yield items

    async def lines(self, items: AsyncIterator[list[Any]]) -> None:
        """Send records as docker's JSON lines, as they come."""
        async for batch in items:
            await self.write(b"".join(msgspec.json.encode(item) + b"\r\n" for item in batch))

    async def hijack(self, *, content_type: str = "", upgrade: str = "tcp") -> Duplex:
        """Take the connection over as a raw stream: 101 when the client asked for an upgrade, else a bare 200. Reads
        what is left of the body first."""
        await self.read()
        wants = self.headers.get("Upgrade", "")
        headers = {"Content-Type": content_type or "application/vnd.docker.raw-stream"}
        if wants:
            headers.update({"Connection": "Upgrade", "Upgrade": upgrade})
        self.began = True
        return await self._transport.hijack(101 if wants else 200, headers)

    async def upgrade(self, headers: dict[str, str]) -> Duplex:
        """Take the connection over for another protocol: 101 with these headers."""
        await self.read()
        self.began = True
        return await self._transport.hijack(101, headers)

    # -- the client's end --------------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether the client has closed its connection."""
        return self._gone.is_set()

    def on_gone(self, call: Callable[[], object]) -> None:
        """Have `call` called when the client leaves (at once when it has left)."""
        if self.gone:
            call()
        else:
            self._on_gone.append(call)

    async def unless_gone(self, work: Any) -> Any:
        """The result of an awaitable, which is cancelled when the client leaves first. Raises ClientGone."""
        task: asyncio.Future[Any] = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientGone("the client has left")
        finally:
            for each in (task, watch):
                if not each.done():
                    each.cancel()

    def leave(self) -> None:
        """The host says that the client has left."""
        if self.gone:
            return
        self._gone.set()
        self.stream.end(broken=True)
        for call in self._on_gone:
            call()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
