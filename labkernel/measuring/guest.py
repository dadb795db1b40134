"""The reader of a virtual machine's own view, for the `Sampler` as samples.py has those from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ..errors import LabkernelError
from .samples import Limits, Sample


class GuestReader:
    """A virtual machine as its own kernel sees it: the sum over its processors, and memory that is not available.

    `ask` gives the guest's figures (`VM.inside`: µs and KiB) and is the only one that takes time, under a millisecond.
    A guest's CPU times lie while its host is busy: what a machine costs is read outside.
    """

    source = "guest"

    def __init__(self, ask: Callable[[], Mapping[str, int]]) -> None:
        self._ask = ask
        self._total: int | None = None

    def read(self) -> Sample | None:
        try:
            told = self._ask()
            total, available = told["memory_total_kib"] << 10, told["memory_available_kib"] << 10
            used = total - (told["memory_free_kib"] << 10)
            cpu = told["user_us"] + told["system_us"]
        except (LabkernelError, OSError, KeyError):
            return None
        self._total = total
        cache = told.get("cached_kib")
        return Sample(
            time.monotonic(),
            cpu,
            total - available,
            memory_usage_bytes=used,
            memory_cache_bytes=None if cache is None else cache << 10,
        )

    def limits(self) -> Limits:
        return Limits(memory_bytes=self._total)

    def close(self) -> None:
        pass
