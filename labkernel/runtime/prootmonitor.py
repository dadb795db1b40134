"""The first process of a proot container: it starts PRoot, passes signals on, and ends everything when its time comes.

    monitor (this)   subreaper; its exit code is the container's
      proot          the tracer
        shim         waits for the command and writes its wait status to the monitor (PRoot reports only some code)
          command

PRoot does not take its tracees with it when it dies: untraced, they would go on with this machine's own paths. So
nothing here kills PRoot before all it traces has been killed, and PRoot is stopped first, which holds every tracee at
its next system call: a fork bomb cannot run away. Source: man 2 ptrace. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from ..linux.syscalls import PR_SET_CHILD_SUBREAPER, close_range, prctl, set_name, set_title
from .asking import Answering, answer

STATUS_FD = 3
"""Where the shim writes the command's wait status: four bytes, the machine's order."""

_CHANNEL_FD = 4
_KEPT = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGCHLD)
_SCAN_PAUSE_S = 0.001
_MAX_SCANS = 2000


def children(pid: int) -> list[int]:
    """The children of a process (man 5 proc_pid_task, `children`; without CONFIG_PROC_CHILDREN by looking at all)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            return []
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(int(name)) == pid]


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def is_dying(pid: int) -> bool:
    """Whether a signal has ended it, though it may be a moment until that can be waited for (man 5 proc_pid_stat,
    `flags`; the kernel's PF_SIGNALED)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return bool(int(file.read().rpartition(b")")[2].split()[6]) & 0x400)
    except (OSError, IndexError, ValueError):
        return False


def tree(pid: int) -> list[int]:
    """All descendants of a process, parents first."""
    found = children(pid)
    for parent in found:  # grows while it is walked
        found += children(parent)
    return found


def send(pid: int, number: int) -> None:
    """kill(2); a process that has gone, or is no longer ours, is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def kill_tracer(proot: int) -> None:
    """End a PRoot with all it traces, the tracees first."""
    send(proot, signal.SIGSTOP)
    killed: set[int] = set()
    quiet = 0
    for _ in range(_MAX_SCANS):
        found = [pid for pid in tree(proot) if pid not in killed]
        for pid in found:
            send(pid, signal.SIGKILL)
        killed.update(found)
        # Twice: a fork that had begun before its process was killed shows up a moment later.
        quiet = 0 if found else quiet + 1
        if quiet == 2:
            break
        time.sleep(_SCAN_PAUSE_S)
    send(proot, signal.SIGKILL)


def kill_container(monitor: int) -> None:
    """End a container, or an exec, from outside: what PRoot traces, PRoot, then the monitor."""
    for proot in children(monitor):
        kill_tracer(proot)
    send(monitor, signal.SIGKILL)


def sweep(rootfs: str) -> None:
    """End what still runs over `rootfs` when its first process has gone: execs, or a PRoot whose monitor was killed.

    Called by the supervisor; all of it is below the supervisor or its parent, the subreaper."""
    above = os.getppid()
    for pid in tree(above):
        if _is_tracer(pid, rootfs):
            kill_tracer(pid)
    for pid in {*children(above), *children(os.getpid())}:
        if pid != os.getpid() and _maps(pid, rootfs):
            send(pid, signal.SIGKILL)


def _is_tracer(pid: int, rootfs: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"\0-r\0" + os.fsencode(rootfs) + b"\0" in file.read()
    except OSError:
        return False


def _maps(pid: int, rootfs: str) -> bool:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return f" {rootfs}/".encode() in file.read()
    except OSError:
        return False


def watch(
    launch: Callable[[int], None],
    report: Callable[[BaseException], None],
    channel: socket.socket | None = None,
    answering: Callable[[int], Answering] | None = None,
) -> None:
    """Fork a child that calls `launch(status_fd)`, which execs PRoot; be its monitor. Never returns.

    What `launch` raises goes to `report`, in the child, which then ends with 125. Over `channel` it may send the
    listener of its filter, whose questions `answering(listener)` answers then."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(status_read)
            launch(status_write)
        except BaseException as err:
            report(err)
        finally:
            os._exit(125)
    _shed(status_read, channel)
    set_title(b"labkernel-init")
    set_name(b"labkernel-init")
    code = _Monitor(pid, STATUS_FD, answering).run()
    _end_all()
    os._exit(code)


def _shed(status_read: int, channel: socket.socket | None) -> None:
    """Keep only the pipe and the channel: the container's streams must end with the container, and the supervisor waits
    for the end of its socket to see the exec."""
    kept = [status_read] if channel is None else [status_read, channel.detach()]
    away = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _CHANNEL_FD + 1) for fd in kept]
    for number, fd in enumerate(away, STATUS_FD):
        os.dup2(fd, number, inheritable=False)
    os.set_blocking(STATUS_FD, False)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    close_range(STATUS_FD + len(kept))


class _Monitor:
    """Waits for the command's status, passes signals on to it, reaps."""

    def __init__(self, proot: int, status_fd: int, answering: Callable[[int], Answering] | None = None) -> None:
        self.proot = proot
        self.answering = answering
        self.status_fd = status_fd
        self.undelivered: list[int] = []
        self.code: int | None = None

    def run(self) -> int:
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in signal.valid_signals():
            if number not in _KEPT or number == signal.SIGCHLD:
                # A real-time signal of the C library's own refuses.
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, lambda _number, _frame: None)
        poller = select.poll()
        poller.register(wake_read, select.POLLIN)
        poller.register(self.status_fd, select.POLLIN)
        answers: dict[int, Answering] = {}
        if self.answering:
            poller.register(_CHANNEL_FD, select.POLLIN)
        self._reap()  # it may have ended before the handler was there
        while self.code is None:
            for fd, events in poller.poll(20 if self.undelivered else None):
                if fd in answers and events & select.POLLIN:
                    answer(fd, answers[fd])
                elif fd in answers:
                    poller.unregister(fd)  # nobody is left below the filter
                elif fd == _CHANNEL_FD and self.answering:
                    poller.unregister(fd)
                    for listener in self._take_listener():
                        answers[listener] = self.answering(listener)
                        poller.register(listener, select.POLLIN)
                elif fd == wake_read:
                    self._take_signals(os.read(wake_read, 512))
                elif self._take_status():
                    break
                else:
                    poller.unregister(self.status_fd)  # PRoot is about to end
            self._deliver()
        return self.code

    def _take_listener(self) -> list[int]:
        """None when what would have sent it has failed."""
        with socket.socket(fileno=_CHANNEL_FD) as channel:
            return socket.recv_fds(channel, 1, 1)[1]

    def _take_signals(self, numbers: bytes) -> None:
        if signal.SIGCHLD in numbers:
            self._reap()
        self.undelivered += [number for number in numbers if number != signal.SIGCHLD]

    def _take_status(self) -> bool:
        try:
            data = os.read(self.status_fd, 4)
        except BlockingIOError:
            return False  # PRoot was killed: the shim lives on, for a moment
        if len(data) < 4:
            return False
        # Untraced, a command soon dies of something else; what ended it is that PRoot was killed. It may have been
        # reaped by now: its end and the status can come in one poll.
        if self.code is None:
            self.code = self._killed_tracer()
        if self.code is None:
            self.code = code_of(int.from_bytes(data, "little"))
        return True

    def _killed_tracer(self) -> int | None:
        """The exit code of a PRoot that a signal has ended; None while it lives, and when it ended by itself.

        Its tracees are let go before there is anything to be waited for, so the command's end may be heard first."""
        try:
            pid, status = os.waitpid(self.proot, 0 if is_dying(self.proot) else os.WNOHANG)
        except ChildProcessError:
            return None
        return code_of(status) if pid and os.WIFSIGNALED(status) else None

    def _deliver(self) -> None:
        if not self.undelivered:
            return
        command = [pid for shim in children(self.proot) for pid in children(shim)]
        if command:  # else it is still being started
            for number in self.undelivered:
                send(command[0], number)
            self.undelivered = []

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.proot and self.code is None and (os.WIFSIGNALED(status) or not self._take_status()):
                self.code = code_of(status)


def code_of(status: int) -> int:
    """A wait status as docker's exit code: 128 + signal for a signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end_all() -> None:
    """Kill and reap whatever is left below this process, orphans that arrive meanwhile, too."""
    while True:
        for pid in children(os.getpid()):
            kill_tracer(pid)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(_SCAN_PAUSE_S)
        except ChildProcessError:
            return
