"""What a container has used in its life: read from its cgroup in the moment before that goes, or where it has none
from the rusage of its first process before that is reaped. Standard library only.

Source: kernel Documentation admin-guide/cgroup-v1/{cpuacct,memory}.rst, admin-guide/cgroup-v2.rst; man 2 getrusage.
"""

from __future__ import annotations

import os
from typing import Any

from ..linux import syscalls
from ..linux.cgroups import Cgroup


def usage_at_end(cgroup: Cgroup | None, pid: int, spent: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """{"cpu_usec", "memory_peak_bytes", "source": "cgroup" or "rusage"} of a container whose first process `pid` has
    ended and is our zombie, or in `spent` as the keeper told it; that entry goes. Empty when nothing is known."""
    told = spent.pop(pid, None)
    if cgroup is not None and (found := usage_of(cgroup)):
        return {**found, "source": "cgroup"}
    return usage_of_zombie(pid) if told is None else told


def usage_of_zombie(pid: int) -> dict[str, Any]:
    """The same figures by rusage: CPU time of the process and of the children it waited for, memory of the largest
    single one of these, shared pages too. Before its exec the process was a fork of the supervisor, whose size
    therefore is the least this gives. Empty for what is not an ended child of ours."""
    try:
        cpu_usec, largest_kib = syscalls.zombie_rusage(pid)
    except OSError:
        return {}
    return {"cpu_usec": cpu_usec, "memory_peak_bytes": largest_kib * 1024, "source": "rusage"} if largest_kib else {}


def usage_of(cgroup: Cgroup) -> dict[str, int]:
    """{"cpu_usec", "memory_peak_bytes"}; a figure without its controller (or, for v2's memory.peak, before Linux 5.19)
    is absent. Both hold the milliseconds of set-up before the exec, too. Two reads: nobody waits for more."""
    found: dict[str, int] = {}
    if cgroup.version == 2:
        for line in _read(f"{cgroup.paths['']}/cpu.stat").splitlines():
            if line.startswith(b"usage_usec "):
                found["cpu_usec"] = int(line[11:])
        peak = _read(f"{cgroup.paths['']}/memory.peak")
    else:
        spent = _read(f"{cgroup.paths['cpuacct']}/cpuacct.usage") if "cpuacct" in cgroup.paths else b""
        if spent.strip().isdigit():
            found["cpu_usec"] = int(spent) // 1000
        peak = _read(f"{cgroup.paths['memory']}/memory.max_usage_in_bytes") if "memory" in cgroup.paths else b""
    if peak.strip().isdigit():
        found["memory_peak_bytes"] = int(peak)
    return found


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        os.close(fd)


def oom_count(cgroup: Cgroup) -> int:
    """How many of its processes the kernel killed for memory; 0 when the group is gone."""
    try:
        return cgroup.oom_count()
    except OSError:
        return 0
