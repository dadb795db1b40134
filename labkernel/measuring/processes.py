"""Figures of processes, where there is no cgroup: one process (QEMU's), or the tree of a container. Source: proc(5)."""

from __future__ import annotations

import os
import time

from .samples import Files, Limits, NetCounters, Sample, field

_TICK_USEC = 1_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _stat_numbers(text: bytes) -> list[int]:
    # The command's name stands in parentheses and may hold anything: count from the last one (proc(5), field 3 is [0]).
    return [int(word) for word in text[text.rindex(b")") + 4 :].split()]


def is_over(stat: bytes) -> bool:
    # A process that nobody has waited for yet (Z) still has all its files, and uses nothing.
    end = stat.rfind(b")")
    return end < 0 or stat[end + 2 : end + 3] in b"ZX"


class ProcessReader:
    """Figures of one process, all its threads: what a virtual machine costs outside (the pid of QEMU).

    The descriptors name the process and not its number, so a pid that is used again is never mistaken for it.
    CPU time has the grain of the clock tick (10 ms). Memory is the resident set.
    """

    source = "process"

    def __init__(self, pid: int, limits: Limits = Limits()) -> None:  # noqa: B008
        self._files, self._limits = Files(), limits
        for name in ("stat", "statm", "io", "status"):
            self._files.open(name, f"/proc/{pid}/{name}")

    def read(self) -> Sample | None:
        try:
            stat = self._files.read("stat")
            if is_over(stat):
                return None
            numbers = _stat_numbers(stat)
            resident = int(self._files.read("statm", 128).split()[1]) * _PAGE
            read = written = None
            try:
                io = self._files.read("io", 512)
                read, written = field(io, b"read_bytes:"), field(io, b"write_bytes:")
            except OSError:
                pass  # another user's process tells no figures of input and output
            peak = field(self._files.read("status").replace(b"\t", b"").replace(b"kB", b""), b"VmHWM:")
        except (OSError, ValueError, IndexError):
            return None
        return Sample(
            time.monotonic(),
            (numbers[10] + numbers[11]) * _TICK_USEC,
            resident,
            None if read is None or written is None else read + written,
            None,
            numbers[16],
            None,
            read,
            None,
            resident,
            None if peak is None else peak * 1024,
        )

    def limits(self) -> Limits:
        return self._limits

    def close(self) -> None:
        self._files.close()


class ProcessTreeReader:
    """Figures of a container without a cgroup, summed over its processes.

    Holds a descriptor on the container's own /proc, which lists exactly its processes (0.1 ms for ten of them); where
    that can't be had (another pid namespace's /proc needs ptrace access, `PTRACE_MODE_READ`), it walks the children of
    `pid`. CPU time counts ended children that were waited for; memory is what is private plus the largest shared
    part, since adding up shared pages would count a library once per process.
    """

    source = "process tree"

    def __init__(self, pid: int, *, net: bool = False) -> None:
        self._pid = pid
        self._self = Files()
        self._self.open("stat", f"/proc/{pid}/stat")
        self._net = NetCounters(pid) if net else None
        self._proc: int | None = None
        if _namespace(pid) != _namespace(os.getpid()):
            try:
                self._proc = os.open(f"/proc/{pid}/root/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                os.stat("1/stat", dir_fd=self._proc)
            except OSError:
                self._drop_proc()

    def _drop_proc(self) -> None:
        if self._proc is not None:
            os.close(self._proc)
        self._proc = None

    def read(self) -> Sample | None:
        try:
            if is_over(self._self.read("stat")):
                return None
            net = self._net.read() if self._net else None
            if self._proc is None:
                return _sum_processes(self._walk(), "/proc", None, net)
            pids = [int(name) for name in os.listdir(self._proc) if name.isdigit()]
            return _sum_processes(pids, "", self._proc, net)
        except (OSError, ValueError):
            return None

    def _walk(self) -> list[int]:
        if not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"):
            return self._walk_slowly()
        found = [self._pid]
        for pid in found:  # grows while it is walked
            try:
                for thread in os.listdir(f"/proc/{pid}/task"):
                    found += map(int, slurp(f"/proc/{pid}/task/{thread}/children", None).split())
            except OSError:
                continue  # ended meanwhile
        return found

    def _walk_slowly(self) -> list[int]:
        # Kernels without CONFIG_PROC_CHILDREN: psutil reads every process of the machine, some milliseconds.
        import psutil

        try:
            return [self._pid, *(child.pid for child in psutil.Process(self._pid).children(recursive=True))]
        except psutil.Error:
            return []

    def limits(self) -> Limits:
        return Limits()

    def close(self) -> None:
        self._self.close()
        self._drop_proc()
        if self._net:
            self._net.close()


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def slurp(path: str, dir_fd: int | None) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _sum_processes(pids: list[int], where: str, dir_fd: int | None, net: tuple[int, int] | None) -> Sample | None:
    ticks = private = shared = threads = read = written = seen = 0
    prefix = f"{where}/" if where else ""
    for pid in pids:
        try:
            stat = _stat_numbers(slurp(f"{prefix}{pid}/stat", dir_fd))
            pages = slurp(f"{prefix}{pid}/statm", dir_fd).split()
        except (OSError, ValueError):
            continue  # ended between the listing and the look
        seen += 1
        # utime, stime and those of children that were waited for: each ended process is counted in exactly one parent.
        ticks += sum(stat[10:14])
        threads += stat[16]
        private += (int(pages[1]) - int(pages[2])) * _PAGE
        shared = max(shared, int(pages[2]) * _PAGE)
        try:
            io = slurp(f"{prefix}{pid}/io", dir_fd)
            read, written = read + (field(io, b"read_bytes:") or 0), written + (field(io, b"write_bytes:") or 0)
        except OSError:
            pass
    if not seen:
        return None
    used = private + shared
    received, all_bytes = (None, None) if net is None else (net[0], net[0] + net[1])
    return Sample(
        time.monotonic(),
        ticks * _TICK_USEC,
        used,
        read + written,
        all_bytes,
        threads,
        None,
        read,
        received,
        used,
    )
