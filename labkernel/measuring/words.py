"""How figures are worded: seconds, memory, disk, ratios, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from ..errors import UsageError


def seconds_text(seconds: float) -> str:
    """`4.13 ms`, `0.29 s`, `12.4 s`."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def memory_text(size_bytes: float) -> str:
    """`38.2 MiB`"""
    return _scaled(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def disk_text(size_bytes: float) -> str:
    """`181 MB`"""
    return _scaled(size_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    place = 0
    while value >= base and place < len(units) - 1:
        value, place = value / base, place + 1
    return f"{value:.3g} {units[place]}" if value < 100 else f"{value:.0f} {units[place]}"


def about(count: int) -> str:
    """An extrapolated number in two digits: `≈ 88,000`."""
    places = max(0, len(str(count)) - 2)
    return f"≈ {round(count, -places):,}"


def ratio_text(ratio: float) -> str:
    """How many times: two digits below ten, whole numbers above."""
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2g}×"  # noqa: RUF001


def memory_bytes(memory: str | int | None) -> int | None:
    """`64m`, `1g`, `1048576` or a number, in bytes. Raises UsageError."""
    if memory is None or isinstance(memory, int):
        return memory
    text = memory.strip().lower().removesuffix("b").removesuffix("i")
    scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:], 1)
    try:
        return int(float(text.rstrip("kmgt")) * scale)
    except ValueError:
        raise UsageError(f"invalid size: '{memory}'", resolution="sizes look like 64m or 1g") from None


def machine_text() -> str:
    """The machine in a few words: processors, memory, kernel."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} CPUs, {memory_text(memory)}, {platform.machine()}, Linux {platform.release()}"
