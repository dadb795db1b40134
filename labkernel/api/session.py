"""BuildKit's session: a client keeps a connection open on which the daemon calls back for files and secrets.

`POST /session` turns into HTTP/2 without TLS, with the roles reversed: the daemon is the gRPC client, docker's CLI
serves. Builds find the session by its id. Source: Docker Engine API, Session; "gRPC over HTTP2"; RFC 9113.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from ..errors import LabkernelError
from .call import Call, Host
from .errors import ApiError, ClientGone
from .hijack import Duplex
from .http2 import ACKNOWLEDGED_BYTES, Connection, framed, needs_h2, unframed
from .routes import Route

ARRIVE_S = 10.0


class CallFailed(LabkernelError):
    """The client answered a call with an error; `code` is gRPC's."""

    def __init__(self, brief: str, code: int) -> None:
        super().__init__(brief)
        self.code = code


class Stream:
    """One gRPC call from a thread: `send` messages, `receive` them."""

    def __init__(self, session: Session, number: int) -> None:
        self._session = session
        self.number = number
        self._arrived: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._buffer = bytearray()
        self._taken = 0
        self._failure: CallFailed | None = None
        self.room = asyncio.Event()

    # -- on the loop

    def feed(self, data: bytes, flow_bytes: int) -> None:
        self._arrived.put((data, flow_bytes))

    def end(self, failure: CallFailed | None) -> None:
        self._failure = self._failure or failure
        self._arrived.put(None)

    # -- in a thread

    def send(self, message: bytes, *, last: bool = False) -> None:
        """Raises ClientGone."""
        self._session.run(self._session.send(self.number, framed(message), end=last))

    def close(self) -> None:
        """No more messages from us; without effect where the client has ended the call."""
        with suppress(ClientGone):
            self._session.run(self._session.send(self.number, b"", end=True))

    def receive(self) -> bytes | None:
        """The next message; None at a good end. Raises CallFailed."""
        while True:
            try:
                message = unframed(self._buffer)
            except ValueError as err:
                raise CallFailed(f"the client sends {err}", 13) from None
            if message is not None:
                return message
            item = self._arrived.get()
            if item is None:
                self._arrived.put(None)
                self._tell_taken()
                if self._failure is not None:
                    raise self._failure
                return None
            self._buffer += item[0]
            self._taken += item[1]
            if self._taken >= ACKNOWLEDGED_BYTES:
                self._tell_taken()

    def _tell_taken(self) -> None:
        count, self._taken = self._taken, 0
        if count:
            self._session.loop.call_soon_threadsafe(self._session.taken, self.number, count)


class Session(Connection[Stream]):
    """The connection of one client. Its loop side is driven by `serve`; threads use `open` and `call`."""

    def __init__(self, duplex: Duplex, methods: Sequence[str]) -> None:
        super().__init__(duplex, client_side=True)
        self.methods = frozenset(methods)

    # -- on the loop -----------------------------------------------------------------------------------------------

    def take(self, event: Any) -> None:
        name = type(event).__name__
        stream = self.streams.get(getattr(event, "stream_id", 0) or 0)
        if stream is None:
            return
        if name == "DataReceived":
            stream.feed(event.data, event.flow_controlled_length)
        elif name in ("ResponseReceived", "TrailersReceived"):
            headers = dict(event.headers)
            code = headers.get("grpc-status", "0")
            if code != "0":
                message = unquote(headers.get("grpc-message", "")) or f"gRPC status {code}"
                stream.end(CallFailed(message, int(code) if code.isdigit() else 2))
        elif name in ("StreamEnded", "StreamReset"):
            failure = CallFailed("the client broke the call off", 1) if name == "StreamReset" else None
            stream.end(failure)
            self.streams.pop(event.stream_id, None)
            stream.room.set()

    def ended(self) -> None:
        for stream in list(self.streams.values()):
            stream.end(CallFailed("the client has closed its session", 14))

    async def _open(self, method: str, metadata: Sequence[tuple[str, str]]) -> Stream:
        if self.closed:
            raise ClientGone("the client has closed its session")
        number = self.h2.get_next_available_stream_id()
        stream = self.streams[number] = Stream(self, number)
        head = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost")]
        head += [("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "labkernel")]
        self.h2.send_headers(number, [*head, *metadata])
        await self.flush()
        return stream

    # -- in threads ------------------------------------------------------------------------------------------------

    def run(self, work: Any) -> Any:
        """A coroutine's result, for a thread."""
        done: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return done.result()

    def open(self, method: str, metadata: Sequence[tuple[str, str]] = ()) -> Stream:
        """Begin a call (`/package.Service/Method`). Raises ApiError when the client does not serve it."""
        if method not in self.methods:
            raise ApiError(400, f"the client does not serve {method}")
        found: Stream = self.run(self._open(method, metadata))
        return found

    def call(self, method: str, message: bytes) -> bytes:
        """One message there, one back. Raises CallFailed."""
        stream = self.open(method)
        stream.send(message, last=True)
        answer = stream.receive()
        if answer is None:
            raise CallFailed(f"{method}: no answer", 13)
        return answer


class Sessions:
    """The sessions of a host by id; builds wait for theirs to arrive."""

    def __init__(self, host: Host) -> None:
        self._known: dict[str, Session] = {}
        self._changed = asyncio.Condition()

    async def find(self, id: str) -> Session:
        """Raises ApiError when it does not come.

        Before its settings are here a client may not have begun to serve. Docker's (20.10) then does not close the
        session when its build is refused, and waits for ever for the daemon to do so.
        """

        async def wait() -> Session:
            async with self._changed:
                await self._changed.wait_for(lambda: id in self._known)
                session = self._known[id]
            await session.greeted.wait()
            return session

        try:
            return await asyncio.wait_for(wait(), ARRIVE_S)
        except TimeoutError:
            raise ApiError(400, f"no such session: {id}") from None

    async def keep(self, id: str, session: Session) -> None:
        """While the session is open."""
        async with self._changed:
            self._known[id] = session
            self._changed.notify_all()
        try:
            await session.serve()
        finally:
            self._known.pop(id, None)


async def open_session(call: Call) -> Any:
    """POST /session."""
    id = call.headers.get("X-Docker-Expose-Session-Uuid", "")
    if not id:
        raise ApiError(400, "X-Docker-Expose-Session-Uuid is needed")
    if call.headers.get("Upgrade", "").lower() != "h2c":
        raise ApiError(400, "a session is an upgrade to h2c")
    needs_h2()
    names = call.headers.get_list("X-Docker-Expose-Session-Grpc-Method")
    duplex = await call.upgrade({"Connection": "Upgrade", "Upgrade": "h2c"})
    await call.host.shared(Sessions).keep(id, Session(duplex, [name for each in names for name in each.split(",")]))
    return None


ROUTES = (Route("POST", "/session", open_session, since=(1, 31)),)
