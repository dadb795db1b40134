"""The processes of a container, read from /proc, as `ps -ef` would list them. Source: man 5 proc."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..linux.cgroups import Cgroup
from .prootmonitor import tree

TITLES = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]


def process_table(state: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) for a running container's state; ids are this machine's."""
    ticks = os.sysconf("SC_CLK_TCK")
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    rows = [row for pid in container_pids(state) if (row := _row(pid, ticks, boot)) is not None]
    return TITLES, rows


def ps_table(state: Mapping[str, Any], arguments: str) -> tuple[list[str], list[list[str]]]:
    """What `ps ARGUMENTS` says of the container's processes. As with docker the machine's own ps is asked, and its
    lines are chosen by their PID column. Raises UsageError."""
    import subprocess

    wanted = {str(pid) for pid in container_pids(state)}
    try:
        asked = subprocess.run(["ps", *arguments.split()], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise UsageError("this machine has no ps", resolution="`apt install procps`", exit_code=1) from None
    if asked.returncode:
        why = asked.stderr.strip().splitlines()
        raise UsageError(f"ps: {why[0] if why else 'failed'}", exit_code=1)
    lines = asked.stdout.splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise UsageError("Couldn't find PID field in ps output", resolution="let it print pid, too", exit_code=1)
    at, last = titles.index("PID"), len(titles) - 1
    rows = [line.split(None, last) for line in lines[1:]]
    return titles, [row for row in rows if len(row) > at and row[at] in wanted]


def container_pids(state: Mapping[str, Any]) -> list[int]:
    """All its processes: by its cgroup where it has one, else by its pid namespace, else as a tree."""
    cgroup = state.get("cgroup") or {}
    if cgroup.get("paths"):
        return Cgroup.reopen(cgroup["paths"]).procs()
    pid = int(state.get("pid") or 0)
    if not os.path.exists(f"/proc/{pid}"):
        return []
    namespace = _namespace(pid)
    if namespace in (None, _namespace(os.getpid())):
        return [pid, *tree(pid)]  # the driver proot, or this machine's pid namespace
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit() and _namespace(int(name)) == namespace)


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _row(pid: int, ticks: int, boot: float) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            name, _, rest = file.read().decode(errors="replace").partition("(")[2].rpartition(")")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace") or f"[{name}]"
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None  # it has ended meanwhile
    fields = rest.split()
    used = int(fields[11]) + int(fields[12])
    started = boot + int(fields[19]) / ticks
    running_s = max(time.time() - started, 0.001)
    seconds = used // ticks
    return [
        _user(uid),
        str(pid),
        fields[1],
        str(min(99, int(100 * used / ticks / running_s))),
        time.strftime("%H:%M" if running_s < 86400 else "%b%d", time.localtime(started)),
        _terminal(int(fields[4])),
        f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
        command,
    ]


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _terminal(number: int) -> str:
    major, minor = os.major(number), os.minor(number)
    return f"pts/{minor}" if major == 136 else "?"
