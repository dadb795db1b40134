"""What happens in the store, as it happens. Source: Docker Engine API, SystemEvents."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from .call import Call
from .routes import Route


def _moment(call: Call, name: str) -> float | None:
    text = call.query(name)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        from datetime import datetime

        try:
            seconds = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError):
            raise UsageError(f'invalid value for "{name}": {text}') from None
    if not -1e11 < seconds < 9e9:
        raise UsageError(f'invalid value for "{name}": {text}')
    return seconds


async def events(call: Call) -> Any:
    since, until, filters = _moment(call, "since"), _moment(call, "until"), call.filters()
    history = await call.thread(lambda: call.engine.history)
    await call.thread(history.list, time.time(), time.time(), filters)  # a filter that is none is said at once
    await call.begin(200, Content_Type="application/json")

    def work(emit: Callable[[Any], None]) -> None:
        for event in history.stream(since, until, filters, ended=lambda: call.gone):
            emit(event)

    await call.lines(call.produce(work))
    return None


ROUTES = (Route("GET", "/events", events),)
