"""A hijacked connection as a WebSocket (RFC 6455): messages in, binary messages out. No extensions.

Tornado has one, but as a handler of its own; here it has to be one end of an attachment like any other.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from contextlib import suppress
from typing import Any

from ..errors import UsageError
from .errors import ClientGone
from .hijack import Duplex

MAX_MESSAGE_BYTES = 1 << 20
LEAVE_S = 2.0
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def handshake(headers: Any) -> dict[str, str]:
    """The headers that accept a client's handshake. Raises UsageError when it is none."""
    key = headers.get("Sec-WebSocket-Key", "")
    if headers.get("Upgrade", "").lower() != "websocket" or not key:
        raise UsageError("not a WebSocket handshake")
    accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()
    found = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept}
    protocol = headers.get("Sec-WebSocket-Protocol", "").partition(",")[0].strip()
    return {**found, "Sec-WebSocket-Protocol": protocol} if protocol else found


class WebSocket:
    """The server's end."""

    def __init__(self, duplex: Duplex) -> None:
        self._duplex = duplex
        self._buffer = bytearray()
        self._closed = False

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = await self._duplex.receive()
            if not data:
                raise ClientGone("the client has left")
            self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    async def receive(self) -> bytes:
        """The next piece of a message, b"" once the client has closed. Raises ClientGone for a broken frame."""
        while True:
            try:
                kind, payload = await self._frame()
            except ClientGone:
                return b""
            if kind in (_CONTINUATION, _TEXT, _BINARY):
                if payload:
                    return payload
            elif kind == _PING:
                await self._send(_PONG, payload)
            elif kind == _CLOSE:
                with suppress(ClientGone):
                    await self._send(_CLOSE, payload[:2])
                self._closed = True
                return b""

    async def _frame(self) -> tuple[int, bytes]:
        first, second = await self._take(2)
        length = second & 127
        if length == 126:
            length = struct.unpack(">H", await self._take(2))[0]
        elif length == 127:
            length = struct.unpack(">Q", await self._take(8))[0]
        if length > MAX_MESSAGE_BYTES or not second & 128:
            raise ClientGone("a frame that is too long, or not masked")
        mask = await self._take(4)
        payload = await self._take(length)
        if length:
            repeated = (mask * (length // 4 + 1))[:length]
            payload = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(length, "big")
        return first & 15, payload

    async def send(self, data: bytes) -> None:
        """One binary message. Raises ClientGone."""
        await self._send(_BINARY, data)

    async def _send(self, kind: int, data: bytes) -> None:
        if self._closed:
            raise ClientGone("the client has closed")
        length = len(data)
        if length < 126:
            head = struct.pack(">BB", 128 | kind, length)
        elif length < 1 << 16:
            head = struct.pack(">BBH", 128 | kind, 126, length)
        else:
            head = struct.pack(">BBQ", 128 | kind, 127, length)
        await self._duplex.send(head + data)

    async def gone(self) -> None:
        """Returns when the client has closed."""
        if not self._closed:
            await self._duplex.gone()

    async def end(self) -> None:
        """Tell the client that no more comes, and let it take its leave, too."""
        with suppress(ClientGone, TimeoutError):
            await self._send(_CLOSE, struct.pack(">H", 1000))
            await asyncio.wait_for(self._drain(), LEAVE_S)

    async def _drain(self) -> None:
        while await self._duplex.receive():
            pass

    def close(self) -> None:
        self._duplex.close()

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
