"""How fast this machine's time stamp counter runs, for the kernels of emulated guests.

Under TCG a guest's `rdtsc` reads this machine's counter. A kernel that boots measures its rate against the emulated
interval timer; where this machine is busy that fails (the guest's clock then ticks every 4 ms), or gives nonsense: 202
MHz for 2,596 were seen, and all time in that guest went 13 times too fast. So it is measured here, once for each boot,
and told on the kernel's command line.
Sources: Intel SDM, RDTSC; kernel Documentation/admin-guide/kernel-parameters.txt, `tsc_early_khz`.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

_CODE = bytes.fromhex("0f3148c1e2204809d0c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_SAMPLE_S = 0.02
_SAMPLES = 5
# A value told is part of what a template is bound to: rounded, it stays the same from one boot to the next.
_ROUND_KHZ = 100


def khz(cache: Path) -> int:
    """The counter's rate, as found earlier in this boot (kept in the file `cache`) or now; 0 when it cannot be had."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    key = boot.read_text().strip() if boot.exists() else ""
    try:
        kept = json.loads(cache.read_text())
        if kept["boot"] == key:
            return int(kept["khz"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = measure()
    partial = cache.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps({"boot": key, "khz": found}))
        partial.replace(cache)
    except OSError:
        pass  # measured anew the next time
    return found


def measure() -> int:
    """The rate in kHz, rounded; 0 on another kind of processor, and where no code may be made at run time."""
    if os.uname().machine != "x86_64":
        return 0
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return 0
    page[: len(_CODE)] = _CODE
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return rate_khz([_window(read) for _ in range(_SAMPLES)])


def _window(read: Callable[[], int]) -> tuple[int, int]:
    """(ticks, nanoseconds) of a short while."""
    ticks, began = _instant(read)
    time.sleep(_SAMPLE_S)
    later, ended = _instant(read)
    return later - ticks, ended - began


def _instant(read: Callable[[], int]) -> tuple[int, int]:
    """The counter and the clock at one moment: of several looks, the one that was least interrupted."""
    looks = []
    for _ in range(8):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        looks.append((after - before, ticks, (before + after) // 2))
    _, ticks, moment = min(looks)
    return ticks, moment


def rate_khz(windows: list[tuple[int, int]]) -> int:
    """The median rate of (ticks, nanoseconds), rounded; 0 when the windows do not agree within a thousandth."""
    rates = sorted(ticks * 1e6 / ns for ticks, ns in windows if ns > 0)
    middle = rates[len(rates) // 2] if rates else 0.0
    agree = [rate for rate in rates if abs(rate - middle) <= middle / 1000]
    if middle < _ROUND_KHZ or len(agree) <= len(windows) // 2:
        return 0
    return round(middle / _ROUND_KHZ) * _ROUND_KHZ
