"""The experiments of `compare --workload`: names, what they measure, units, and what the textbook says of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import UsageError
from .words import disk_text, memory_text, seconds_text


def nanoseconds_text(value: float) -> str:
    """`305 ns`, `1.16 µs`, `4.2 ms`."""
    for unit, scale in (("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)):
        if value < 999.5 * scale or unit == "s":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError


def rate_text(value: float) -> str:
    """`1.83 GB/s`"""
    return f"{disk_text(value)}/s"


class Experiment(NamedTuple):
    """One figure. `asks` is what of bench.c is run for it (empty: it is seen from outside)."""

    name: str
    label: str
    say: Callable[[float], str]
    asks: str = ""
    workload: str = ""
    more_is_better: bool = False


EXPERIMENTS = (
    Experiment("start", "start: first instruction", seconds_text, workload="start"),
    Experiment("wall", "whole run", seconds_text, workload="start"),
    Experiment("cpu_time", "CPU time of the run", seconds_text, workload="start"),
    Experiment("idle", "memory, idle", memory_text, workload="idle"),
    Experiment("peak", "memory, peak of the run", memory_text, workload="idle"),
    Experiment("disk", "disk", disk_text, workload="disk"),
    Experiment("cpu", "1,000 rounds of arithmetic", nanoseconds_text, "cpu", "cpu"),
    Experiment("syscall", "one system call", nanoseconds_text, "syscall", "syscall"),
    Experiment("exec", "fork, exec, wait", nanoseconds_text, "exec", "exec"),
    Experiment("memory", "first touch of a 4 KiB page", nanoseconds_text, "memory", "memory"),
    Experiment("file", "file write + read, cached", rate_text, "file", "file", more_is_better=True),
    Experiment("fsync", "4 KiB written and fsync", nanoseconds_text, "fsync", "fsync"),
    Experiment("network_rtt", "TCP round trip, loopback", nanoseconds_text, "network", "network"),
    Experiment("network_throughput", "TCP throughput, loopback", rate_text, "network", "network",
               more_is_better=True),
)  # fmt: skip
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
WORKLOADS = tuple(dict.fromkeys(experiment.workload for experiment in EXPERIMENTS))
OF_A_COMMAND = ("start", "wall", "cpu_time", "peak", "disk")


def experiments_of(workload: str | Sequence[str]) -> list[Experiment]:
    """The experiments of workloads given as `a,b` or a sequence; `all` is every one. Raises UsageError."""
    names = workload.split(",") if isinstance(workload, str) else list(workload)
    wanted = [name.strip() for name in names if name.strip()]
    if "all" in wanted:
        return list(EXPERIMENTS)
    for name in wanted:
        if name not in WORKLOADS:
            raise UsageError(f"no such workload: {name}", resolution=f"all, or of: {', '.join(WORKLOADS)}")
    if not wanted:
        raise UsageError("no workload was named", resolution=f"all, or of: {', '.join(WORKLOADS)}")
    return [experiment for experiment in EXPERIMENTS if experiment.workload in wanted]
