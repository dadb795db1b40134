"""HTTP/2 on a connection that an upgrade has turned over: frames, windows and the end, for whichever role.

A session (see `session`) is the client on it, the control protocol (see `grpc`) the server. Source: RFC 9113.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from .errors import ApiError, ClientGone
from .hijack import Duplex

WINDOW_BYTES = 8 << 20
ACKNOWLEDGED_BYTES = 1 << 20  # at once: each frame of 16 kB by itself would cost as much as its content
MESSAGE_MAX_BYTES = 64 << 20


class Stream(Protocol):
    """One exchange of messages on a connection."""

    room: asyncio.Event
    """Set when the other side may have opened a window."""


S = TypeVar("S", bound=Stream)


def needs_h2() -> None:
    """Raises ApiError where the package is not installed."""
    try:
        import h2  # noqa: F401
    except ImportError:
        raise ApiError(501, "this needs the Python package h2: pip install h2") from None


class Connection(Generic[S]):
    """Belongs to the event loop it was made on. A subclass says what comes of the frames."""

    def __init__(self, duplex: Duplex, *, client_side: bool) -> None:
        from h2.config import H2Configuration
        from h2.connection import H2Connection

        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, S] = {}
        self.closed = False
        self.greeted = asyncio.Event()
        """Set once the other side's first settings are here, or nothing more will come from it."""
        self.h2 = H2Connection(H2Configuration(client_side=client_side, header_encoding="utf-8"))
        self._duplex = duplex
        self._sending = asyncio.Lock()

    @abstractmethod
    def take(self, event: Any) -> None:
        """An event of h2 other than a change of windows."""

    @abstractmethod
    def ended(self) -> None:
        """The connection is over: end what goes on upon it."""

    async def serve(self) -> None:
        """Until the other side closes the connection."""
        from h2.exceptions import ProtocolError
        from h2.settings import SettingCodes

        self.h2.initiate_connection()
        settings: dict[SettingCodes | int, int] = {SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES}
        if self.h2.config.client_side:
            settings[SettingCodes.ENABLE_PUSH] = 0
        self.h2.update_settings(settings)
        self.h2.increment_flow_control_window(WINDOW_BYTES)
        try:
            await self.flush()
            while data := await self._duplex.receive():
                for event in self.h2.receive_data(data):
                    if type(event).__name__ in ("WindowUpdated", "RemoteSettingsChanged"):
                        self.greeted.set()
                        for each in self.streams.values():
                            each.room.set()
                    else:
                        self.take(event)
                await self.flush()
        except (ClientGone, ProtocolError):
            pass
        finally:
            self.closed = True
            self.greeted.set()
            self.ended()
            for stream in list(self.streams.values()):
                stream.room.set()
            self._duplex.close()

    async def flush(self) -> None:
        async with self._sending:
            data = self.h2.data_to_send()
            if data:
                await self._duplex.send(data)

    def flush_soon(self) -> None:
        task = self.loop.create_task(self.flush())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def taken(self, number: int, count: int) -> None:
        """`count` bytes of a stream have been used: the other side may send as many more."""
        if self.closed or not count:
            return
        from h2.exceptions import ProtocolError

        with suppress(ProtocolError):
            self.h2.acknowledge_received_data(count, number)
        self.flush_soon()

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Bytes of a stream, as the other side's windows allow. Raises ClientGone."""
        stream = self.streams.get(number)
        if stream is None or self.closed:
            raise ClientGone("the call has ended")
        rest = memoryview(data)
        while True:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if rest and room <= 0:
                stream.room.clear()
                await stream.room.wait()
                if self.closed or number not in self.streams:
                    raise ClientGone("the call has ended")
                continue
            piece, rest = rest[:room], rest[room:]
            self.h2.send_data(number, bytes(piece), end_stream=end and not rest)
            await self.flush()
            if not rest:
                return


def framed(message: bytes) -> bytes:
    """A message as gRPC frames it, not compressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def unframed(buffer: bytearray) -> bytes | None:
    """Take the first message out of `buffer`; None while it is not whole. Raises ValueError for what was not asked
    for."""
    if len(buffer) < 5:
        return None
    length = int.from_bytes(buffer[1:5], "big")
    if buffer[0] != 0 or length > MESSAGE_MAX_BYTES:
        raise ValueError("compressed or huge messages, which were not asked for")
    if len(buffer) < 5 + length:
        return None
    message = bytes(buffer[5 : 5 + length])
    del buffer[: 5 + length]
    return message
