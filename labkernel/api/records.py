"""Docker's JSON streams: records as they come, and an error as the last of them once the answer has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from ..errors import LabkernelError
from .call import Call
from .errors import ClientGone, message_of

Emit = Callable[[dict[str, Any]], None]


def encode(record: dict[str, Any]) -> bytes:
    return msgspec.json.encode(record) + b"\r\n"


async def send(
    call: Call, work: Callable[[Emit], Any], *, failure: Callable[[Exception], dict[str, Any]] | None = None
) -> None:
    """Run `work(emit)` in a thread and send what it emits, one JSON object a line.

    What fails before the first record is an error's answer; later it is the record `failure` makes of it."""
    try:
        async for batch in call.produce(work):
            if not call.began:
                await call.begin(200, Content_Type="application/json")
            await call.write(b"".join(map(encode, batch)))
        if not call.began:
            await call.begin(200, Content_Type="application/json")
    except (ClientGone, asyncio.CancelledError):
        raise
    except Exception as err:
        if not call.began:
            raise
        await call.write(encode((failure or error_record)(err)))


def error_record(err: Exception) -> dict[str, Any]:
    """`{"errorDetail": {"message"}, "error"}`, as every stream of docker's ends that fails."""
    message = message_of(err)
    hint = err.resolution if isinstance(err, LabkernelError) else None
    return {"errorDetail": {"message": message}, "error": message, **({"hint": hint} if hint else {})}
