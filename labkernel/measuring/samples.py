"""One record, `Sample`, for what a container or a virtual machine uses, and the readers that fill it.

A *reader* opens the kernel's files of one target once and reads them with `pread`: cgroup v1 or v2 for a container
(here), its process tree where there is no cgroup, the process of QEMU for a virtual machine (`processes.py`). Reading a
target that is gone gives None, never an error: a gap in the curve.

Following targets over time is in `metrics.py`. Sources: cgroups(7), proc(5), the kernel's documents cgroup-v2 and
cgroup-v1/{memory,cpuacct,blkio-controller}.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

_MOST_DESCRIPTORS = 16384
_STILL_FACTOR = 15  # what used no CPU time since did hardly anything else
_UNLIMITED = 1 << 60  # cgroup v1 has no word for "none": it shows the largest page-aligned number


class Sample(NamedTuple):
    """One reading. Counters grow from the target's start; None means that this machine does not tell."""

    time_s: float
    """Seconds of CLOCK_MONOTONIC, so that a clock that jumps bends no curve."""
    cpu_usec: int
    memory_bytes: int
    """The working set as docker counts it: usage less the page cache that could go at once (`inactive_file`)."""
    io_bytes: int | None = None
    net_bytes: int | None = None
    pids: int | None = None
    throttled_usec: int | None = None
    io_read_bytes: int | None = None
    net_rx_bytes: int | None = None
    memory_usage_bytes: int | None = None
    memory_peak_bytes: int | None = None
    """The kernel's own high-water mark, page cache included; it sees what falls between two samples."""
    oom_kills: int | None = None
    memory_cache_bytes: int | None = None
    """Page cache of the files it read and wrote, part of `memory_usage_bytes`: the kernel takes it back when short."""
    cpu_pressure_usec: int | None = None
    """Pressure stall information, "some": µs in which at least one of its tasks waited for a CPU (memory, a disk)."""
    memory_pressure_usec: int | None = None
    io_pressure_usec: int | None = None


class Limits(NamedTuple):
    """What a target may use; None where nothing limits it. `cpus` is in whole cores (0.5 is half of one)."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


class Reader(Protocol):
    """What reads one target. `source` says how: `cgroup v1`, `cgroup v2`, `process tree` or `process`."""

    source: str

    def read(self) -> Sample | None: ...

    def limits(self) -> Limits: ...

    def close(self) -> None: ...


# -- small parsers: bytes in, numbers out; no regular expressions, this runs 20 times a second for each target


def field(text: bytes, name: bytes) -> int | None:
    """The number after `name` in a file of `name number` lines (memory.stat, cpu.stat), or None."""
    at = 0 if text.startswith(name + b" ") else text.find(b"\n" + name + b" ") + 1
    if at == 0 and not text.startswith(name + b" "):
        return None
    start = at + len(name) + 1
    end = text.find(b"\n", start)
    try:
        return int(text[start : end if end >= 0 else None])
    except ValueError:
        return None


def number(text: bytes) -> int | None:
    """A file that holds one number; `max` and v1's largest number are None."""
    try:
        value = int(text)
    except ValueError:
        return None
    return value if value < _UNLIMITED else None


def _sum_words(text: bytes, key: bytes) -> int:
    # io.stat: "8:0 rbytes=1 wbytes=2 …"; blkio: "8:0 Read 1". `key` ends with the character before the number.
    total, at = 0, text.find(key)
    while at >= 0:
        start = end = at + len(key)
        while end < len(text) and 48 <= text[end] <= 57:
            end += 1
        total += int(text[start:end] or 0)
        at = text.find(key, end)
    return total


def _stalled(text: bytes) -> int | None:
    # some avg10=0.00 avg60=0.00 avg300=0.00 total=12345 (kernel document accounting/psi); "full" is the next line
    at = text.find(b" total=")
    end = text.find(b"\n", at)
    return int(text[at + 7 : end if end >= 0 else None]) if at >= 0 and text.startswith(b"some") else None


class Files:
    """Descriptors kept open by name. A missing file reads as b"", a vanished cgroup or process raises OSError."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}

    def open(self, name: str, path: str) -> None:
        try:
            self.fds[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            if err.errno == errno.EMFILE and _more_descriptors():
                self.open(name, path)

    def read(self, name: str, size: int = 4096) -> bytes:
        fd = self.fds.get(name)
        return b"" if fd is None else os.pread(fd, size, 0)

    def close(self) -> None:
        fds, self.fds = self.fds, {}
        for fd in fds.values():
            os.close(fd)


def _more_descriptors() -> bool:
    """Raise this process's soft limit of open files: a hundred containers are a thousand files, the usual limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if wanted <= soft:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


class NetCounters:
    """Bytes received and sent in the network namespace of a process, loopback left out (/proc/PID/net/dev)."""

    def __init__(self, pid: int) -> None:
        self._files = Files()
        self._files.open("dev", f"/proc/{pid}/net/dev")

    def read(self) -> tuple[int, int] | None:
        text = self._files.read("dev", 65536)
        if not text:
            return None
        received = sent = 0
        for line in text.splitlines()[2:]:
            name, _, rest = line.partition(b":")
            if name.strip() != b"lo":
                words = rest.split()
                received, sent = received + int(words[0]), sent + int(words[8])
        return received, sent

    def close(self) -> None:
        self._files.close()


# -- readers


class _Detail(NamedTuple):
    """What is dear to read, or changes seldom."""

    pids: int | None
    throttled_usec: int | None
    net: tuple[int, int] | None
    inactive: int
    io_bytes: int | None
    io_read_bytes: int | None
    peak: int | None
    oom_kills: int | None
    cache: int | None
    pressure: tuple[int | None, ...]
    limited: bool = False
    """There is a CPU limit, so throttling is read each time."""


def _sample(now: float, cpu: int, usage: int, throttled: int | None, detail: _Detail) -> Sample:
    working = usage - detail.inactive if detail.inactive < usage else usage
    at_most = None if detail.peak is None else max(detail.peak, usage)
    received, both = (None, None) if detail.net is None else (detail.net[0], sum(detail.net))
    io = detail.io_bytes, detail.io_read_bytes
    rest = usage, at_most, detail.oom_kills, detail.cache, *detail.pressure
    return Sample(now, cpu, working, io[0], both, detail.pids, throttled, io[1], received, *rest)


class CgroupReader:
    """Figures of one cgroup.

    `version` is 1 or 2; `paths` maps controller names to directories (v2: any key, one directory). The directories are
    an argument, so a test gives it a folder of plain files. With `net_pid`, bytes of that process's network namespace
    are read as well, which keeps the namespace alive until `close()`. No privileges needed.

    What is dear to read (memory.stat, block I/O, pressure, OOM kills, the network), and the number of processes, is
    read at most every `detail_s` seconds (15 times as seldom while no CPU time is used) and repeated in between: CPU,
    memory and, where there is a CPU limit, throttling are always fresh. That is how hundreds can be followed.
    """

    detail_s = 0.0
    phase = 0.0  # how much of `detail_s` is over at the first reading: hundreds take turns

    def __init__(self, version: int, paths: Mapping[str, str], *, net_pid: int | None = None) -> None:
        self.source = f"cgroup v{version}"
        self._v1 = version == 1
        self._directories = list(dict.fromkeys(paths.values()))
        self._files = Files()
        for name in (*(_V1_FILES if self._v1 else _V2_FILES), *_PRESSURE_FILES):
            self._open(name)
        self._net = NetCounters(net_pid) if net_pid else None
        self._detail: _Detail | None = None
        self._detail_at, self._detail_cpu = float("-inf"), -1
        # Read each time, twenty times a second of hundreds of targets: without a look-up by name.
        self._cpu = self._files.fds.get("cpuacct.usage" if self._v1 else "cpu.stat", -1)
        self._memory = self._files.fds.get("memory.usage_in_bytes" if self._v1 else "memory.current", -1)

    def _open(self, name: str) -> None:
        # One directory per hierarchy and no guess about co-mounted ones ("cpu,cpuacct"): the file name decides.
        for directory in self._directories:
            self._files.open(name, f"{directory}/{name}")
            if name in self._files.fds:
                return

    def read(self) -> Sample | None:
        try:
            return self._read_v1() if self._v1 else self._read_v2()
        except (OSError, ValueError):
            return None

    def _read_v1(self) -> Sample | None:
        if self._cpu < 0:
            return None
        now = time.monotonic()
        cpu = int(os.pread(self._cpu, 32, 0)) // 1000
        usage = int(os.pread(self._memory, 32, 0)) if self._memory >= 0 else 0
        detail = self._detail
        if self._is_due(now, cpu) or detail is None:
            detail = self._detail = self._detail_v1()
            throttled = detail.throttled_usec
        else:
            throttled = self._throttled_v1() if detail.limited else detail.throttled_usec
        return _sample(now, cpu, usage, throttled, detail)

    def _read_v2(self) -> Sample | None:
        if self._cpu < 0:
            return None
        now = time.monotonic()
        stat = os.pread(self._cpu, 1024, 0)
        used = field(stat, b"usage_usec")
        if used is None:
            return None
        usage = int(os.pread(self._memory, 32, 0)) if self._memory >= 0 else 0
        detail = self._detail
        if self._is_due(now, used) or detail is None:
            detail = self._detail = self._detail_v2()
        return _sample(now, used, usage, field(stat, b"throttled_usec"), detail)

    def _is_due(self, now: float, cpu: int) -> bool:
        """Whether to read what is dear; the caller then does."""
        age = now - self._detail_at
        if age < self.detail_s or (cpu == self._detail_cpu and age < self.detail_s * _STILL_FACTOR):
            return False
        self._detail_at, self._detail_cpu = now - (self.phase * self.detail_s if self._detail is None else 0.0), cpu
        return True

    def _throttled_v1(self, stat: bytes | None = None) -> int | None:
        throttled = field(self._files.read("cpu.stat", 512) if stat is None else stat, b"throttled_time")
        return None if throttled is None else throttled // 1000

    def _detail_v1(self) -> _Detail:
        read = self._files.read
        stat, cpu_stat = read("memory.stat"), read("cpu.stat", 512)
        io = read("blkio.throttle.io_service_bytes_recursive") or read("blkio.throttle.io_service_bytes")
        return _Detail(
            number(read("pids.current", 32)),
            self._throttled_v1(cpu_stat),
            self._net.read() if self._net else None,
            field(stat, b"total_inactive_file") or 0,
            _sum_words(io, b" Read ") + _sum_words(io, b" Write ") if io else None,
            _sum_words(io, b" Read ") if io else None,
            number(read("memory.max_usage_in_bytes", 32)),
            field(read("memory.oom_control", 128), b"oom_kill"),
            field(stat, b"total_cache"),
            self._pressure(),
            limited=bool(field(cpu_stat, b"nr_periods")),  # counts only where there is a limit
        )

    def _detail_v2(self) -> _Detail:
        read = self._files.read
        stat = read("memory.stat")
        # io.stat is there and empty until the first byte: that is zero, not "unknown".
        io = read("io.stat") if "io.stat" in self._files.fds else None
        written, fetched = (None, None) if io is None else (_sum_words(io, b"wbytes="), _sum_words(io, b"rbytes="))
        return _Detail(
            number(read("pids.current", 32)),
            None,  # throttling stands in cpu.stat, which is read each time
            self._net.read() if self._net else None,
            field(stat, b"inactive_file") or 0,
            None if written is None or fetched is None else written + fetched,
            fetched,
            number(read("memory.peak", 32)),
            field(read("memory.events", 512), b"oom_kill"),
            field(stat, b"file"),
            self._pressure(),
        )

    def _pressure(self) -> tuple[int | None, ...]:
        # Some kernels have the files and answer EOPNOTSUPP (psi=0 on their command line): not told, and no gap.
        found: list[int | None] = []
        for name in _PRESSURE_FILES:
            try:
                found.append(_stalled(self._files.read(name, 256)))
            except OSError:
                found.append(None)
        return tuple(found)

    def limits(self) -> Limits:
        """The limits as the kernel has them now (v1: memory.limit_in_bytes, cpu.cfs_*; v2: memory.max, cpu.max)."""
        if self._v1:
            quota, period = number(self.raw("cpu.cfs_quota_us")), number(self.raw("cpu.cfs_period_us"))
            memory = number(self.raw("memory.limit_in_bytes"))
        else:
            words = [number(word) for word in self.raw("cpu.max").split()]
            quota, period = words if len(words) == 2 else (None, None)
            memory = number(self.raw("memory.max"))
        cpus = quota / period if quota and period and quota > 0 else None
        return Limits(memory, cpus, number(self.raw("pids.max")))

    def raw(self, name: str) -> bytes:
        """Any other file of the cgroup, b"" when there is none."""
        for directory in self._directories:
            try:
                with open(f"{directory}/{name}", "rb") as stream:
                    return stream.read()
            except OSError:
                continue
        return b""

    def close(self) -> None:
        self._files.close()
        if self._net:
            self._net.close()


_V1_FILES = (
    "cpuacct.usage",
    "cpu.stat",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.stat",
    "memory.oom_control",
    "blkio.throttle.io_service_bytes_recursive",
    "blkio.throttle.io_service_bytes",
    "pids.current",
)
# On a hybrid machine (v1 with an empty v2 beside it) the v2 directory has them; v1 alone has none.
_PRESSURE_FILES = ("cpu.pressure", "memory.pressure", "io.pressure")
_V2_FILES = (
    "cpu.stat",
    "memory.current",
    "memory.peak",
    "memory.stat",
    "memory.events",
    "io.stat",
    "pids.current",
)
