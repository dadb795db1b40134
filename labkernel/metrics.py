"""Figures of what runs, over time: one thread, the `Sampler`, follows containers and virtual machines alike.

A reading is a `Sample` (`samples.py` reads it from the kernel); a `Series` is the ring buffer of one target, with what
happened to it; `stats_json` and `stats_row` say the same in docker's words. Drawing is not here, and nothing heavy is
imported: pandas only by `to_dataframe()`.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from .display import human_memory, human_size
from .errors import LabkernelError, UsageError
from .samples import (
    CgroupReader,
    Limits,
    ProcessReader,
    ProcessTreeReader,
    Reader,
    Sample,
    field,
    number,
    reader_for,
    state_of,
)

__all__ = [
    "CgroupReader",
    "Event",
    "Limits",
    "Metrics",
    "ProcessReader",
    "ProcessTreeReader",
    "Reader",
    "Sample",
    "Sampler",
    "Series",
    "dataframe",
    "reader_for",
    "state_of",
    "stats_json",
    "stats_row",
]

# -- collecting

_STATE_FOLLOWS_S = 5.0  # how long a state may say "running" of a container whose processes are gone


class Event(NamedTuple):
    """Something that happened to a target: `start`, `stop` (text: exit status) or `oom`."""

    time_s: float
    kind: str
    text: str = ""


class Series:
    """The ring buffer of one target. Gaps (the target was not there) are None; two are never side by side."""

    def __init__(self, name: str, capacity: int, limits: Limits = Limits(), kind: str = "container") -> None:  # noqa: B008
        self.name = name
        self.kind = kind
        self.limits = limits
        self.points: deque[Sample | None] = deque(maxlen=capacity)
        self.events: deque[Event] = deque(maxlen=256)
        self.ended = False

    @property
    def samples(self) -> list[Sample]:
        return [point for point in list(self.points) if point is not None]

    def append(self, sample: Sample | None) -> None:
        if sample is not None or (self.points and self.points[-1] is not None):
            self.points.append(sample)

    def cpu_percent(self) -> list[tuple[float, float]]:
        """(time_s, percent of one core) between each two samples; NaN stands at a gap."""
        return [(t, rate / 1e4) for t, rate in self._rate(1)]

    def throttled_percent(self) -> list[tuple[float, float]]:
        """(time_s, percent of the time in which the CPU limit held the target back)."""
        return [(t, rate / 1e4) for t, rate in self._rate(6)]

    def _rate(self, index: int) -> Iterator[tuple[float, float]]:
        last: Sample | None = None
        for point in list(self.points):
            if point is None:
                if last is not None:
                    yield last.time_s, float("nan")
            elif last is not None and point.time_s > last.time_s:
                yield point.time_s, max(0, (point[index] or 0) - (last[index] or 0)) / (point.time_s - last.time_s)
            last = point

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per sample: all its fields, `target` and `cpu_percent`."""
        percent = dict(self.cpu_percent())
        return [
            {"target": self.name, **s._asdict(), "cpu_percent": percent.get(s.time_s, float("nan"))}
            for s in self.samples
        ]

    def __repr__(self) -> str:
        return f"<Series {self.name}: {len(self.points)} samples{', ended' if self.ended else ''}>"


class _Target:
    """A thing being followed: its reader is opened again when it starts again."""

    def __init__(self, thing: Any, series: Series, *, net: bool, retry_s: float) -> None:
        self.thing, self.series, self.net, self.retry_s = thing, series, net, retry_s
        self.reader: Reader | None = None
        self.retry_at = 0.0
        self.gone_at: float | None = None
        self.ooms = 0

    def tick(self, now: float) -> None:
        if self.reader is None and now >= self.retry_at:
            self._look(now)
        if self.reader is None:
            return
        sample = self.reader.read()
        self.series.append(sample)
        if sample is None:
            self.reader.close()
            self.reader = None
            self._look(now)
        elif (sample.oom_kills or 0) > self.ooms:
            self.ooms = sample.oom_kills or 0
            self.series.events.append(Event(sample.time_s, "oom"))

    def _look(self, now: float) -> None:
        self.retry_at = now + self.retry_s
        try:
            self.reader = reader_for(self.thing, net=self.net)
            state = state_of(self.thing) or _vm_state(self.thing)
        except (LabkernelError, OSError):
            self.reader, state = None, {"status": "exited"}  # removed (--rm): as ended as can be
        if self.reader is not None:
            self.series.ended = False
            self.gone_at = None
            limits = self.reader.limits()
            if limits.memory_bytes is None and self.series.kind == "vm":
                limits = limits._replace(memory_bytes=getattr(self.thing, "memory_bytes", None))
            self.series.limits = limits
            self.ooms = 0
            self.series.events.append(Event(now, "start"))
            return
        if self.gone_at is None:
            self.gone_at = now
        # Its processes are gone before its state says so, and only then the exit status is known.
        waiting = state.get("status") in ("running", "paused") and now - self.gone_at < _STATE_FOLLOWS_S
        if not self.series.ended and not waiting and state.get("status") != "created":
            self._end(now, state)

    def _end(self, now: float, state: Mapping[str, Any]) -> None:
        self.series.ended = True
        if state.get("oom_killed") and not any(event.kind == "oom" for event in self.series.events):
            self.series.events.append(Event(now, "oom"))
        code = state.get("exit_code")
        self.series.events.append(Event(now, "stop", "" if code is None else str(code)))

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None


def _vm_state(thing: Any) -> dict[str, Any]:
    """The same words for a VM (`status`, `exit_code`); a bare pid that cannot be read has ended."""
    return {"status": getattr(thing, "status", "exited"), "exit_code": getattr(thing, "exit_code", None)}


class Sampler:
    """Follows targets from one thread, `hz` times a second (1 to 200), keeping the last `window_s` seconds.

        with Sampler(container, vm, hz=10) as sampler:
            container.wait()
        sampler.series(container).cpu_percent()

    A target may start later, end, and start again; one that fails is a gap. The thread is a daemon: it ends with
    `stop()`, and never keeps an interpreter alive. `retry_s` is how often a target that is not there is looked for.
    """

    def __init__(
        self, *things: Any, hz: float = 5.0, window_s: float = 600.0, net: bool = False, retry_s: float = 0.5
    ) -> None:
        if not 0.1 <= hz <= 200:
            raise UsageError(f"hz={hz:g} is not between 0.1 and 200", resolution="1 to 20 samples a second is usual")
        self.interval_s = 1.0 / hz
        self._capacity = max(2, int(window_s * hz))
        self._net = net
        self._retry_s = retry_s
        self._targets: list[_Target] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        for thing in things:
            self.add(thing)

    def add(self, thing: Any, *, name: str | None = None, kind: str | None = None) -> Series:
        """Follow `thing` (what `reader_for` takes) from now on; returns its series."""
        kind = kind or ("container" if state_of(thing) is not None else "vm")
        label = name or str(getattr(thing, "name", "") or getattr(thing, "short_id", "") or thing)
        series = Series(label, self._capacity, kind=kind)
        with self._lock:
            self._targets = [*self._targets, _Target(thing, series, net=self._net, retry_s=self._retry_s)]
        return series

    def series(self, thing: Any) -> Series:
        """The series of a thing that was added, or of its name."""
        for target in self._targets:
            if target.thing is thing or target.series.name == thing:
                return target.series
        raise UsageError(f"not followed by this sampler: {thing}", resolution="add(...) it first")

    def all_series(self) -> list[Series]:
        return [target.series for target in self._targets]

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Sampler:
        if not self.running:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="labkernel-sampler", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread, after one last reading, and close all descriptors; the series stay."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        for target in self._targets:
            target.close()

    def __enter__(self) -> Sampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self.tick()
            due += self.interval_s
            now = time.monotonic()
            if due < now:  # the machine was asleep or busy: no burst of readings to catch up
                due = now
            if self._stop.wait(due - now):
                break
        self.tick()

    def tick(self) -> None:
        """Read every target once, in the calling thread (what the thread does each time)."""
        now = time.monotonic()
        for target in self._targets:
            target.tick(now)

    def rows(self) -> list[dict[str, Any]]:
        return [row for series in self.all_series() for row in series.rows()]

    def to_dataframe(self) -> Any:
        """All samples as a pandas DataFrame, one row per sample and target. Raises UsageError without pandas."""
        return dataframe(self.rows())

    def to_csv(self, stream: IO[str]) -> None:
        """All samples as CSV with a header line; unknown figures are empty."""
        import csv

        writer = csv.DictWriter(stream, ["target", *Sample._fields, "cpu_percent"])
        writer.writeheader()
        writer.writerows({k: "" if v is None or v != v else v for k, v in row.items()} for row in self.rows())


def dataframe(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Rows as a DataFrame. pandas is optional: raises UsageError when it is not installed."""
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError as err:
        raise UsageError("to_dataframe() needs pandas", resolution="`pip install pandas`, or use rows()") from err
    return pandas.DataFrame(list(rows))


# -- docker's words

STATS_HEADER = ("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS")


def stats_json(
    reader: Reader, sample: Sample, previous: Mapping[str, Any] | None = None, *, id: str = "", name: str = ""
) -> dict[str, Any]:
    """One reading as the Engine API gives it (*Docker Engine API, ContainerStats*).

    `previous` is the answer before this one; its `cpu_stats` become `precpu_stats`, from which clients compute the
    percentage. Only what this machine tells is filled in; the memory limit is the machine's memory where none is set.
    """
    limits = reader.limits()
    detail = _cgroup_detail(reader) if isinstance(reader, CgroupReader) else _plain_detail(sample)
    cpu = {
        "cpu_usage": {
            "total_usage": sample.cpu_usec * 1000,
            "usage_in_kernelmode": detail["kernel_ns"],
            "usage_in_usermode": detail["user_ns"],
        },
        "system_cpu_usage": _system_cpu_ns(),
        "online_cpus": os.cpu_count() or 1,
        "throttling_data": detail["throttling"],
    }
    before = previous or {"cpu_stats": {"cpu_usage": {"total_usage": 0}, "throttling_data": {}}}
    memory = {"usage": sample.memory_usage_bytes or sample.memory_bytes, "stats": detail["memory"]}
    if sample.memory_peak_bytes is not None and reader.source == "cgroup v1":
        memory["max_usage"] = sample.memory_peak_bytes
    memory["limit"] = limits.memory_bytes or _machine_memory()
    answer: dict[str, Any] = {
        "name": f"/{name}" if name else "",
        "id": id,
        "read": _rfc3339(time.time()),
        "preread": before.get("read", "0001-01-01T00:00:00Z"),
        "pids_stats": {"current": sample.pids or 0, **({"limit": limits.pids} if limits.pids else {})},
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": cpu,
        "precpu_stats": before["cpu_stats"],
        "memory_stats": memory,
        "blkio_stats": {"io_service_bytes_recursive": detail["io"], "io_serviced_recursive": None},
    }
    if sample.net_bytes is not None:
        received = sample.net_rx_bytes or 0
        answer["networks"] = {"eth0": _network(received, sample.net_bytes - received)}
    return answer


def _network(received: int, sent: int) -> dict[str, int]:
    zero = dict.fromkeys(("rx_packets", "rx_errors", "rx_dropped", "tx_packets", "tx_errors", "tx_dropped"), 0)
    return {"rx_bytes": received, "tx_bytes": sent, **zero}


def _plain_detail(sample: Sample) -> dict[str, Any]:
    read = sample.io_read_bytes or 0
    io = [] if sample.io_bytes is None else [_io(0, 0, "read", read), _io(0, 0, "write", sample.io_bytes - read)]
    cache = (sample.memory_usage_bytes or sample.memory_bytes) - sample.memory_bytes
    none = {"periods": 0, "throttled_periods": 0, "throttled_time": (sample.throttled_usec or 0) * 1000}
    return {"kernel_ns": 0, "user_ns": 0, "throttling": none, "memory": {"inactive_file": cache}, "io": io}


def _io(major: int, minor: int, op: str, value: int) -> dict[str, Any]:
    return {"major": major, "minor": minor, "op": op, "value": value}


def _cgroup_detail(reader: CgroupReader) -> dict[str, Any]:
    v1 = reader.source == "cgroup v1"
    cpu = reader.raw("cpu.stat")
    memory = dict(_pairs(reader.raw("memory.stat")))
    if v1:
        ticks = dict(_pairs(reader.raw("cpuacct.stat")))
        tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        kernel, user = ticks.get("system", 0) * tick_ns, ticks.get("user", 0) * tick_ns
        throttled = field(cpu, b"throttled_time") or 0
        io = _io_v1(reader.raw("blkio.throttle.io_service_bytes_recursive"))
    else:
        kernel, user = (field(cpu, b"system_usec") or 0) * 1000, (field(cpu, b"user_usec") or 0) * 1000
        throttled = (field(cpu, b"throttled_usec") or 0) * 1000
        io = _io_v2(reader.raw("io.stat"))
    throttling = {
        "periods": field(cpu, b"nr_periods") or 0,
        "throttled_periods": field(cpu, b"nr_throttled") or 0,
        "throttled_time": throttled,
    }
    return {"kernel_ns": kernel, "user_ns": user, "throttling": throttling, "memory": memory, "io": io}


def _pairs(text: bytes) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if (parsed := number(value)) is not None:
            yield name.decode(), parsed


def _io_v1(text: bytes) -> list[dict[str, Any]]:
    words = [line.split() for line in text.decode().splitlines()]
    devices = [(w[0].partition(":"), w[1].lower(), int(w[2])) for w in words if len(w) == 3]
    return [_io(int(device[0]), int(device[2]), op, value) for device, op, value in devices]


def _io_v2(text: bytes) -> list[dict[str, Any]]:
    answer = []
    for line in text.decode().splitlines():
        device, *figures = line.split()
        major, _, minor = device.partition(":")
        values = dict(figure.split("=", 1) for figure in figures if "=" in figure)
        if minor.isdigit():
            answer += [_io(int(major), int(minor), op, int(values.get(f"{op[0]}bytes", 0))) for op in ("read", "write")]
    return answer


def _system_cpu_ns() -> int:
    # user nice system idle iowait irq softirq steal, as docker sums them (proc(5), /proc/stat)
    with open("/proc/stat", "rb") as stream:
        words = stream.readline().split()[1:9]
    return sum(map(int, words)) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _rfc3339(timestamp_s: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(timestamp_s))
    return f"{whole}.{int(timestamp_s % 1 * 1e9):09d}Z"


def stats_row(stats: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of `docker stats` (`STATS_HEADER`) from a `stats_json` answer, computed as the docker CLI does."""
    cpu, before, memory = stats["cpu_stats"], stats["precpu_stats"], stats["memory_stats"]
    used = cpu["cpu_usage"]["total_usage"] - before.get("cpu_usage", {}).get("total_usage", 0)
    system = cpu.get("system_cpu_usage", 0) - before.get("system_cpu_usage", 0)
    percent = used / system * cpu.get("online_cpus", 1) * 100 if system > 0 and used > 0 else 0.0
    inactive = memory["stats"].get("total_inactive_file", memory["stats"].get("inactive_file", 0))
    usage = memory["usage"] - inactive if inactive < memory["usage"] else memory["usage"]
    devices = stats["blkio_stats"].get("io_service_bytes_recursive") or []
    read, written = (sum(entry["value"] for entry in devices if entry["op"] == op) for op in ("read", "write"))
    networks = stats.get("networks", {}).values()
    received, sent = (sum(net[key] for net in networks) for key in ("rx_bytes", "tx_bytes"))
    return (
        str(stats.get("id", ""))[:12],
        str(stats.get("name", "")).removeprefix("/"),
        f"{percent:.2f}%",
        f"{human_memory(usage)} / {human_memory(memory['limit'])}",
        f"{usage / memory['limit'] * 100:.2f}%",
        f"{human_size(received)} / {human_size(sent)}",
        f"{human_size(read)} / {human_size(written)}",
        str(stats["pids_stats"].get("current", 0)),
    )


def stats_stream(thing: Any, *, id: str = "", name: str = "", interval_s: float = 1.0) -> Iterator[dict[str, Any]]:
    """What `docker stats` streams: an answer every `interval_s` until the target ends.

    The first answer comes after one interval, with `precpu_stats` filled in; a target that does not run gives nothing.
    """
    reader = reader_for(thing, net=True)
    if reader is None:
        return
    try:
        previous: dict[str, Any] | None = None
        while (sample := reader.read()) is not None:
            answer = stats_json(reader, sample, previous, id=id, name=name)
            if previous is not None:
                yield answer
            previous = answer
            time.sleep(interval_s)
    finally:
        reader.close()


class Metrics:
    """The service `engine.metrics`: figures of this engine's containers and machines."""

    def reader(self, thing: Any, *, net: bool = False) -> Reader | None:
        """See `reader_for`."""
        return reader_for(thing, net=net)

    def sampler(self, *things: Any, hz: float = 5.0, window_s: float = 600.0, net: bool = False) -> Sampler:
        """A `Sampler` of these things, not started yet."""
        return Sampler(*things, hz=hz, window_s=window_s, net=net)

    def sample(self, thing: Any, *, net: bool = True) -> Sample | None:
        """One reading, None when the thing does not run."""
        reader = reader_for(thing, net=net)
        if reader is None:
            return None
        try:
            return reader.read()
        finally:
            reader.close()
