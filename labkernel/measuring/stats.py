"""One reading in docker's words: the Engine API's stats JSON and the cells of `docker stats`.

Source: *Docker Engine API, ContainerStats*, and how the docker CLI computes its columns from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..display import human_memory, human_size
from .readers import reader_for
from .samples import CgroupReader, Reader, Sample, field, number

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


def stats_of_ended(*, id: str = "", name: str = "") -> dict[str, Any]:
    """What the Engine API answers for a container that does not run: the same shape, nothing used, and Go's zero time.

    Clients index into it (`["memory_stats"]`), so there is always an object.
    """
    idle = {
        "cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
        "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
    }
    return {
        "name": f"/{name}" if name else "",
        "id": id,
        "read": "0001-01-01T00:00:00Z",
        "preread": "0001-01-01T00:00:00Z",
        "pids_stats": {},
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": idle,
        "precpu_stats": idle,
        "memory_stats": {},
        "blkio_stats": {"io_service_bytes_recursive": None, "io_serviced_recursive": None},
    }


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
    # an engine that answers for a container that does not run leaves out the parts of memory (`stats_of_ended`)
    parts, usage, limit = memory.get("stats", {}), memory.get("usage", 0), memory.get("limit", 0)
    inactive = parts.get("total_inactive_file", parts.get("inactive_file", 0))
    usage -= inactive if inactive < usage else 0
    devices = stats["blkio_stats"].get("io_service_bytes_recursive") or []
    read, written = (sum(entry["value"] for entry in devices if entry["op"] == op) for op in ("read", "write"))
    networks = stats.get("networks", {}).values()
    received, sent = (sum(net[key] for net in networks) for key in ("rx_bytes", "tx_bytes"))
    return (
        str(stats.get("id", ""))[:12],
        str(stats.get("name", "")).removeprefix("/"),
        f"{percent:.2f}%",
        f"{human_memory(usage)} / {human_memory(limit)}",
        f"{usage / limit * 100 if limit else 0:.2f}%",
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
