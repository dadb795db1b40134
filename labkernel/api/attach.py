"""attach: a container's streams over a hijacked connection or a WebSocket. Source: Engine API, ContainerAttach."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError
from ..runtime import protocol
from .call import Call
from .containers import find, readable
from .detach import DetachKeys
from .errors import ClientGone
from .hijack import Channel, Duplex
from .routes import Route
from .websocket import WebSocket, handshake

if TYPE_CHECKING:
    from ..running.container import Container
    from ..runtime.client import Attachment

MULTIPLEXED = "application/vnd.docker.multiplexed-stream"
RAW = "application/vnd.docker.raw-stream"
BORROW_BYTES = 1 << 20
LENT_S = 1.0


class Streams:
    """An Attachment on the event loop: a reader, a writer, and resizes that never fall between a writer's halves."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    async def read(self) -> list[tuple[str, bytes]]:
        """What there is, at least one piece; empty at the end. Raises SupervisorLost."""
        while True:
            try:
                return self.attachment.read_now()
            except BlockingIOError:
                await readable(self.attachment.fileno())

    async def write(self, data: bytes) -> None:
        """Input for the container; waits while it does not read."""
        await self._send(protocol.encode_frame(protocol.STDIN, data))

    async def close_stdin(self) -> None:
        await self._send(protocol.encode_control({"close_stdin": True}))

    async def borrow_stdin(self) -> int | None:
        """The pipe of the container's input, the caller's to close; None where there is none to be had. No input may be
        written meanwhile; what was before is in the pipe then."""
        lent: asyncio.Future[int | None] = self._loop.create_future()

        def told(fd: int | None) -> None:
            if not lent.done():
                lent.set_result(fd)
            elif fd is not None:
                os.close(fd)

        self.attachment.on_lent = told
        await self._send(protocol.encode_control({"lend_stdin": True}))
        try:
            return await asyncio.wait_for(lent, LENT_S)
        except TimeoutError:
            return None  # whoever reads the output is slow, and the answer is behind it

    async def resize(self, rows: int, columns: int) -> None:
        await self._send(protocol.encode_control({"resize": [rows, columns]}))

    async def _send(self, frame: bytes) -> None:
        async with self._writing:
            view = memoryview(frame)
            while view:
                try:
                    view = view[self.attachment.send_now(view) :]
                except BlockingIOError:
                    await self._writable()
                except OSError:
                    return  # closed on our side: nobody waits for it any more

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        fd = self.attachment.fileno()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        self._loop.add_writer(fd, wake)
        try:
            await ready
        finally:
            self._loop.remove_writer(fd)


def framed(name: str, data: bytes) -> bytes:
    """A piece with docker's header of 8 bytes: stream, three zeros, length."""
    return protocol.encode_frame(protocol.STREAMS[name], data)


async def carry(
    streams: Streams,
    channel: Channel,
    *,
    raw: bool,
    stdin: bool,
    keys: DetachKeys | None,
    closes: bool = True,
) -> None:
    """Carry bytes both ways until the container's side ends, the client leaves, or types the keys to detach.

    `closes`: the end of the client's input is the end of the container's. Otherwise it is the end of the attachment, as
    with docker, whose client looks for a terminal's keys itself and then closes."""

    async def out() -> None:
        while pieces := await streams.read():
            await channel.send(b"".join([data if raw else framed(name, data) for name, data in pieces]))

    async def into() -> None:
        detached, count = False, 0
        plain = channel if isinstance(channel, Duplex) and channel.is_plain and keys is None else None
        while not detached and (data := await channel.receive()):
            if not stdin:
                continue
            count += len(data)
            if keys is not None:
                data, detached = keys.feed(data)
            if data:
                await streams.write(data)
            if plain is not None and count > BORROW_BYTES:
                lender, plain = plain, None
                if await _pour(streams, lender):
                    break
        if detached or (stdin and not closes):
            return
        if stdin:
            await streams.close_stdin()
        await channel.gone()

    tasks = [asyncio.ensure_future(out()), asyncio.ensure_future(into())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        elif not tasks[1].cancelled() and (err := tasks[1].exception()) is not None:
            raise err
    except ClientGone:
        pass
    finally:
        for task in tasks:
            task.cancel()
        ended = tasks[0].done()
        await asyncio.gather(*tasks, return_exceptions=True)
        if ended and stdin and isinstance(channel, Duplex):
            await channel.finish()


async def _pour(streams: Streams, channel: Duplex) -> bool:
    """Bring the rest of a long input to the container past this process and the supervisor, which would each copy it.
    False where it has to go on as before."""
    fd = await streams.borrow_stdin()
    if fd is None:
        return False
    try:
        return await channel.pour(fd)
    finally:
        os.close(fd)


def _open(container: Container, call: Call) -> Attachment | None:
    """The live connection; None when only what was written is wanted."""
    if not call.flag("stream"):
        return None
    status = container.status
    if status == "paused":
        raise ConflictError("You cannot attach to a paused container, unpause it first")
    if status == "restarting":
        raise ConflictError("You cannot attach to a restarting container, wait until it is running")
    wanted = {name: call.flag(name) for name in ("stdin", "stdout", "stderr")}
    return call.engine.runtime.attach(container.id, **wanted, logs=call.flag("logs"), next_start=True)


def _past(container: Container, call: Call) -> list[tuple[str, bytes]]:
    """What it has written so far, where `logs` is given without `stream`."""
    if not call.flag("logs") or not (call.flag("stdout") or call.flag("stderr")):
        return []
    return list(container.log_records(stdout=call.flag("stdout"), stderr=call.flag("stderr")))


async def attach(call: Call) -> Any:
    container = await call.thread(find, call)
    keys = _keys(call, container)
    attachment = await call.thread(_open, container, call)
    raw = bool(container.settings.get("tty"))
    try:
        past = [] if attachment is not None else await call.thread(_past, container, call)
        channel = await call.hijack(content_type=RAW if raw or call.version < (1, 42) else MULTIPLEXED)
        with channel:
            for name, data in past:
                await channel.send(data if raw else framed(name, data))
            if attachment is not None:
                await _carry(call, container, attachment, channel, keys, raw=raw)
    finally:
        if attachment is not None:
            attachment.close()


async def attach_websocket(call: Call) -> Any:
    container = await call.thread(find, call)
    keys = _keys(call, container)
    headers = handshake(call.headers)
    attachment = await call.thread(_open, container, call)
    try:
        with WebSocket(await call.upgrade(headers)) as channel:
            # A WebSocket tells its messages apart; docker sends them without headers, whatever the container.
            for _, data in [] if attachment is not None else await call.thread(_past, container, call):
                await channel.send(data)
            if attachment is not None:
                await _carry(call, container, attachment, channel, keys, raw=True)
            await channel.end()
    finally:
        if attachment is not None:
            attachment.close()


async def _carry(
    call: Call, container: Container, attachment: Attachment, channel: Any, keys: DetachKeys | None, *, raw: bool
) -> None:
    stdin = call.flag("stdin") and bool(container.settings.get("stdin_open"))
    closes = bool(container.settings.get("stdin_once")) and not container.settings.get("tty")
    await carry(Streams(attachment), channel, raw=raw, stdin=stdin, keys=keys, closes=closes)


def _keys(call: Call, container: Container) -> DetachKeys | None:
    """Only a terminal has keys. Raises UsageError for keys that are none."""
    keys = DetachKeys(call.query("detachKeys"))
    return keys if container.settings.get("tty") else None


ROUTES = (
    Route("POST", "/containers/{name}/attach", attach),
    Route("GET", "/containers/{name}/attach/ws", attach_websocket),
)
