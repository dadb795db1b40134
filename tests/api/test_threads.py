"""Between loop and threads: nothing that was emitted is lost, whenever the end comes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from labkernel.api.threads import Producer


class Between:
    """A producer's lock; when the loop lets go of it for the first time, the producer's work begins and ends."""

    def __init__(self, producer: Producer[Any], begin: threading.Event) -> None:
        self._lock = producer._condition
        self._producer = producer
        self._begin = begin

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._lock.__exit__(*details)
        if threading.current_thread() is threading.main_thread():
            self._begin.set()
            self._producer._thread.join()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def test_what_is_emitted_just_before_the_end_is_taken() -> None:
    async def take() -> list[list[str]]:
        begin = threading.Event()

        def work(emit: Any) -> None:
            begin.wait()
            emit("last")

        producer = Producer[str](work)
        producer._condition = Between(producer, begin)  # type: ignore[assignment]
        return [await producer.take(), await producer.take()]

    assert asyncio.run(take()) == [["last"], []]
