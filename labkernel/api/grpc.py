"""The server side of gRPC on a connection that an upgrade has turned over: calls by name, each a coroutine.

A call that its client resets, or whose connection ends, is cancelled. Source: gRPC, "gRPC over HTTP2".
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ..errors import LabkernelError
from . import protobuf
from .errors import ApiError, ClientGone, message_of, status_of
from .hijack import Duplex
from .http2 import Connection, framed, unframed

CANCELLED, UNKNOWN, INVALID, NOT_FOUND, EXISTS, PRECONDITION, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = (
    *(1, 2, 3, 5, 6, 9, 12, 13, 14),
)
_OF_STATUS = {400: INVALID, 404: NOT_FOUND, 409: EXISTS, 412: PRECONDITION, 501: UNIMPLEMENTED, 503: UNAVAILABLE}
_log = logging.getLogger("labkernel.api")
_MAX_MESSAGE = 4096  # of an error, in a header


class RpcError(ApiError):
    """An error that a method decides itself. `details`: further messages (type URL, bytes) for clients that know
    them."""

    def __init__(self, code: int, message: str, details: Sequence[tuple[str, bytes]] = ()) -> None:
        super().__init__(500, message)
        self.code = code
        self.details = details


def code_of(err: BaseException) -> int:
    return err.code if isinstance(err, RpcError) else _OF_STATUS.get(status_of(err), UNKNOWN)


class Rpc:
    """One call: `receive` its messages, `send` answers; what the method returns is the last of them."""

    def __init__(self, server: Server, number: int, method: str, metadata: Mapping[str, str]) -> None:
        self.method = method
        self.metadata = metadata
        self.room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._server = server
        self._number = number
        self._arrived: asyncio.Queue[tuple[bytes, int] | None] = asyncio.Queue()
        self._buffer = bytearray()
        self._began = False

    def feed(self, data: bytes, flow_bytes: int) -> None:
        self._arrived.put_nowait((data, flow_bytes))

    def end(self) -> None:
        self._arrived.put_nowait(None)

    async def receive(self) -> bytes | None:
        """The next message, None after the last. Raises RpcError."""
        while True:
            try:
                message = unframed(self._buffer)
            except ValueError as err:
                raise RpcError(UNIMPLEMENTED, str(err)) from None
            if message is not None:
                return message
            item = await self._arrived.get()
            if item is None:
                self._arrived.put_nowait(None)
                return None
            self._buffer += item[0]
            self._server.taken(self._number, item[1])

    async def request(self) -> dict[int, list[Any]]:
        """The one message of a call that has one. Raises RpcError, BadMessage."""
        message = await self.receive()
        if message is None:
            raise RpcError(INVALID, f"{self.method} needs a message")
        return protobuf.decode(message)

    async def send(self, fields: protobuf.Fields | bytes) -> None:
        """Raises ClientGone."""
        message = fields if isinstance(fields, bytes) else protobuf.encode(fields)
        if not self._began:
            self._began = True
            self._server.h2.send_headers(self._number, [(":status", "200"), ("content-type", "application/grpc")])
        await self._server.send(self._number, framed(message))

    async def finish(self, code: int = 0, message: str = "", details: Sequence[tuple[str, bytes]] = ()) -> None:
        head = [] if self._began else [(":status", "200"), ("content-type", "application/grpc")]
        head.append(("grpc-status", str(code)))
        if message:
            head.append(
                (
                    "grpc-message",
                    quote(message[:_MAX_MESSAGE], errors="replace", safe=" !\"#$&'()*+,-./:;<=>?@[]^_`{|}~"),
                )
            )
        if details:
            found = [(3, protobuf.encode([(1, url), (2, value)])) for url, value in details]
            status = protobuf.encode([(1, code), (2, message), *found])
            head.append(("grpc-status-details-bin", base64.b64encode(status).decode().rstrip("=")))
        self._server.h2.send_headers(self._number, head, end_stream=True)
        await self._server.flush()


Method = Callable[[Rpc], Awaitable["protobuf.Fields | bytes | None"]]


class Server(Connection[Rpc]):
    """`methods` by their path, `/package.Service/Method`."""

    def __init__(self, duplex: Duplex, methods: Mapping[str, Method]) -> None:
        super().__init__(duplex, client_side=False)
        self._methods = methods

    def take(self, event: Any) -> None:
        name = type(event).__name__
        number = getattr(event, "stream_id", 0) or 0
        if name == "RequestReceived":
            headers = dict(event.headers)
            rpc = self.streams[number] = Rpc(self, number, headers.get(":path", ""), headers)
            rpc.task = self.loop.create_task(self._serve(rpc, number))
            return
        found = self.streams.get(number)
        if found is None:
            if name == "DataReceived":
                self.taken(number, event.flow_controlled_length)
        elif name == "DataReceived":
            found.feed(event.data, event.flow_controlled_length)
        elif name == "StreamEnded":
            found.end()
        elif name == "StreamReset" and found.task is not None:
            self.streams.pop(number)
            found.task.cancel()

    def ended(self) -> None:
        for rpc in list(self.streams.values()):
            if rpc.task is not None:
                rpc.task.cancel()

    async def _serve(self, rpc: Rpc, number: int) -> None:
        from h2.exceptions import ProtocolError

        try:
            await self._answer(rpc)
        except (ClientGone, ProtocolError):
            pass  # of the call or the connection; both are over
        finally:
            self.streams.pop(number, None)

    async def _answer(self, rpc: Rpc) -> None:
        try:
            method = self._methods.get(rpc.method)
            if method is None:
                raise RpcError(UNIMPLEMENTED, f"unknown method {rpc.method}")
            answer = await method(rpc)
            if answer is not None:
                await rpc.send(answer)
        except ClientGone:
            raise
        except Exception as err:
            if not isinstance(err, ApiError | LabkernelError):
                _log.error("%s", rpc.method, exc_info=err)
            details = err.details if isinstance(err, RpcError) else ()
            await rpc.finish(code_of(err), message_of(err), details)
        else:
            await rpc.finish()
