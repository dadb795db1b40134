"""logs: what a container has written, and what it writes. Source: Docker Engine API, ContainerLogs.

A thousand followers are no thousand threads: one clock for all looks whether files have grown, and the supervisor says
when a container has ended.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import NoSuchContainer, UsageError
from ..runtime.logreader import LogQuery, LogReader
from .attach import MULTIPLEXED, RAW, framed
from .call import Call, Host
from .containers import find, readable
from .routes import Route

TICK_S = 0.05
PIECES = 256
Piece = tuple[str, bytes]


class Clock:
    """Wakes each follower when its file has grown; stands still while nobody follows."""

    def __init__(self, host: Host) -> None:
        self._waiting: dict[asyncio.Future[None], LogReader | None] = {}
        self._runs = False

    async def change(self, reader: LogReader | None, end: asyncio.Future[None]) -> None:
        """Returns when there is more to read (or, without a reader, after a moment), or when `end` is done."""
        loop = asyncio.get_running_loop()
        wake: asyncio.Future[None] = loop.create_future()
        self._waiting[wake] = reader

        def ended(_: Any) -> None:
            if not wake.done():
                wake.set_result(None)

        end.add_done_callback(ended)
        if not self._runs:
            self._runs = True
            loop.call_later(TICK_S, self._strike)
        try:
            await wake
        finally:
            self._waiting.pop(wake, None)
            end.remove_done_callback(ended)

    def _strike(self) -> None:
        seen: dict[Path, os.stat_result | None] = {}
        for wake, reader in self._waiting.items():
            if wake.done():
                continue
            if reader is not None and reader.path not in seen:
                try:
                    seen[reader.path] = os.stat(reader.path)
                except FileNotFoundError:
                    seen[reader.path] = None  # between two files of a rotation, or removed
            if reader is None or reader.is_behind(seen[reader.path]):
                wake.set_result(None)
        self._runs = bool(self._waiting)
        if self._runs:
            asyncio.get_running_loop().call_later(TICK_S, self._strike)


def query_of(call: Call) -> LogQuery:
    """Raises UsageError."""
    streams = {name for name in ("stdout", "stderr") if call.flag(name)}
    if not streams:
        raise UsageError("Bad parameters: you must choose at least one stream")
    since, until = (_moment(call.query(name)) for name in ("since", "until"))
    tail = call.query("tail") or "all"
    shown = {name: call.flag(name) for name in ("timestamps", "details")}
    return LogQuery.parse(streams, tail=tail, since=since, until=until, **shown)


def _moment(text: str) -> float | None:
    """Seconds since the epoch with nanoseconds behind the point; 0 is none."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise UsageError(f'invalid value for "since" or "until": {text}') from None
    if not -1e11 < seconds < 1e11:
        raise UsageError(f'invalid value for "since" or "until": {text}')
    return seconds or None


async def logs(call: Call) -> Any:
    query = query_of(call)
    container = await call.thread(find, call)
    if (container.settings.get("log_config") or {}).get("type") == "none":
        raise UsageError("configured logging driver does not support reading")
    raw = bool(container.settings.get("tty"))
    pending = None
    if call.flag("follow"):
        pending = await call.thread(call.engine.runtime.begin_wait, container.id, "not-running")
    reader: LogReader | None = None
    try:
        kind = RAW if raw or call.version < (1, 42) else MULTIPLEXED
        await call.begin(200, Content_Type=kind)
        reader = await call.thread(LogReader.open, container.log_path, query)
        if reader is not None:
            async for pieces in call.iterate(reader.past):
                await call.write(_bytes(pieces, raw=raw))
        if pending is not None:
            await _follow(call, container, query, reader, pending, raw=raw)
    finally:
        if pending is not None:
            pending.close()
        if reader is not None:
            reader.close()
    return None


def _bytes(pieces: Iterable[Piece], *, raw: bool) -> bytes:
    return b"".join([data if raw else framed(name, data) for name, data in pieces])


async def _follow(
    call: Call, container: Any, query: LogQuery, reader: LogReader | None, pending: Any, *, raw: bool
) -> None:
    clock = call.host.shared(Clock)
    end = asyncio.ensure_future(_end(call, pending))
    opened = None
    try:
        call.on_gone(end.cancel)
        while not call.gone:
            over = end.done()  # asked first, so that what was written just before the end is still read
            if reader is None:
                reader = opened = LogReader.open(container.log_path, query)
            while reader is not None and reader.is_behind():
                pieces = _some(reader)
                if not pieces:
                    break
                await call.write(_bytes(pieces, raw=raw))
                await asyncio.sleep(0)
            if over or (reader is not None and reader.over):
                return
            await clock.change(reader, end)
    finally:
        end.cancel()
        if opened is not None:
            opened.close()


def _some(reader: LogReader) -> list[Piece]:
    """A bounded number of the records that have come."""
    found: list[Piece] = []
    for piece in reader.more():
        found.append(piece)
        if len(found) >= PIECES:
            break
    return found


async def _end(call: Call, pending: Any) -> None:
    """Returns when the container has ended, or is gone."""
    try:
        ended = None
        while ended is None:
            await readable(pending.fileno())
            ended = await call.thread(pending.result)
    except NoSuchContainer:
        pass


ROUTES = (Route("GET", "/containers/{name}/logs", logs),)
