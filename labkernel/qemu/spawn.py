"""One QEMU process that dies with the process that started it, and the descriptors to talk with it.

For single-threaded processes only (a machine's monitor, a task of the worker): between fork and exec the child runs
Python, and PR_SET_PDEATHSIG watches the thread that forked. Standard library only. Source: man 2 PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Sequence

from labkernel.linux import syscalls

# The numbers these descriptors have in QEMU: its command line names them (command.py).
CHANNEL_FD, SHARE_FD, CONSOLE_FD, QMP_FD, CARD_FD = 100, 101, 102, 103, 104
KEPT_BYTES = 16384
_SOCKET_BUFFER = 1 << 20
_CARD_BUFFER = 4 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Qemu:
    """A running QEMU. `channel`, `share` and `console` are sockets that do not block, `qmp` is one that does, `stderr`
    a pipe; `cards` are datagram sockets, one Ethernet frame in each message."""

    def __init__(self, argv: Sequence[str], *, cards: int = 0) -> None:
        """Start it, with as many network cards as its command line names. Raises OSError."""
        pairs = [*(socket.socketpair() for _ in range(4)), *(card_pair() for _ in range(cards))]
        ours, theirs = zip(*pairs, strict=True)
        self.channel, self.share, self.console, self.qmp = ours[:4]
        self.cards = ours[4:]
        for end in (*ours[:2], *theirs[:2]):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self.stderr, stderr = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(argv, parent, [end.fileno() for end in theirs], stderr)
        for end in theirs:
            end.close()
        os.close(stderr)
        self.pidfd = os.pidfd_open(self.pid)
        for fd in (self.channel.fileno(), self.share.fileno(), self.console.fileno(), self.stderr):
            os.set_blocking(fd, False)
        for end in self.cards:
            os.set_blocking(end.fileno(), False)
        self.exit_status: int | None = None
        self.cpu_s = 0.0
        self.peak_rss_bytes = 0
        self.rss_bytes = 0
        self._words = bytearray()

    def look(self) -> None:
        """Read its figures (man 5 proc): CPU time of all threads, memory now and at its highest."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as file:
                for line in file:
                    if line.startswith(b"VmHWM:"):
                        self.peak_rss_bytes = max(self.peak_rss_bytes, int(line.split()[1]) * 1024)
                    elif line.startswith(b"VmRSS:"):
                        self.rss_bytes = int(line.split()[1]) * 1024
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            self.cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        except (OSError, ValueError, IndexError):
            pass

    def keep(self, data: bytes) -> None:
        """What its console or its stderr said, for `last_words`."""
        self._words += data
        del self._words[:-KEPT_BYTES]

    def end(self, *, wait: bool = True) -> None:
        """SIGKILL (nothing it holds outlives it) and its final figures; idempotent. Without `wait` it has ended."""
        if self.exit_status is not None:
            return
        if wait:
            self.look()
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
        _, status, usage = os.wait4(self.pid, 0)
        self.exit_status = os.waitstatus_to_exitcode(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime
        for fd in (self.stderr, self.console.fileno()):
            try:
                self.keep(os.read(fd, KEPT_BYTES))
            except OSError:
                pass
        os.close(self.stderr)
        os.close(self.pidfd)
        for end in (self.channel, self.share, self.console, self.qmp, *self.cards):
            end.close()

    def last_words(self) -> str:
        """The end of the guest's console and of QEMU's own messages."""
        lines = bytes(self._words).decode("utf-8", "replace").strip().splitlines()
        return "\n".join(line.strip() for line in lines[-12:])


def card_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a network card: ours and QEMU's, one frame in each message."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CARD_BUFFER)
    return pair


def _become(argv: Sequence[str], parent: int, fds: list[int], stderr: int) -> None:
    """In the child: the descriptors at their numbers, nothing else open, and the exec. Never returns."""
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the line above
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in fds]
        for number, fd in enumerate(high):
            os.dup2(fd, CHANNEL_FD + number)
        os.dup2(stderr, 2)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        syscalls.close_range(3, CHANNEL_FD - 1)
        syscalls.close_range(CHANNEL_FD + len(fds))
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                continue
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(argv[0], list(argv), {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"})
    except BaseException as err:
        os.write(2, f"{argv[0]}: {err}\n".encode())
    finally:
        os._exit(127)


__all__ = ["CARD_FD", "CHANNEL_FD", "CONSOLE_FD", "KEPT_BYTES", "QMP_FD", "SHARE_FD", "Qemu", "card_pair"]
