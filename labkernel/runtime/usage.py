"""What a container has used in its life, read from its cgroup in the moment before that goes. Standard library only.

Source: kernel Documentation admin-guide/cgroup-v1/{cpuacct,memory}.rst, admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os

from ..linux.cgroups import Cgroup


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
