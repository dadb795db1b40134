"""The supervisor's handle of a process that serves names or ports, and the sockets such a process works with."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from ..linux import netlink, syscalls

_BUFFER_BYTES = 1 << 20


class Helper:
    """A child of the supervisor. It ends when its socket does, so it never outlives a killed supervisor."""

    def __init__(self, body: Callable[[socket.socket], None]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                signal.set_wakeup_fd(-1)
                body(theirs)
            finally:
                os._exit(1)
        theirs.close()
        os.set_blocking(ours.fileno(), False)
        self.sock = ours

    def send(self, message: bytes, fds: list[int] | None = None) -> bool:
        """False when it has died, or does not listen any more (then it is ended)."""
        try:
            socket.send_fds(self.sock, [message], fds or [])
        except OSError:
            return False
        return True

    def end(self) -> None:
        self.sock.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def sockets_inside(pidfd: int) -> list[int]:
    """The same in the network namespace of a running process, as descriptors. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.setns(pidfd, syscalls.CLONE_NEWNET)
            made = netlink.resolver_sockets()  # kept: a socket nobody names is closed
            socket.send_fds(theirs, [b"ok"], [sock.fileno() for sock in made])
        except OSError as err:
            theirs.send(b"%d" % (err.errno or 1))
        finally:
            os._exit(0)
    theirs.close()
    data, fds, _, _ = socket.recv_fds(ours, 64, 2)
    ours.close()
    os.waitpid(pid, 0)
    if data != b"ok":
        number = int(data or b"5")
        raise OSError(number, os.strerror(number))
    return list(fds)


def bind_port(wanted: dict[str, Any]) -> tuple[socket.socket, int]:
    """A socket that holds a port of the machine, and its number: the first free one of `host`, or any.

    Nobody else can take the port while it is open; it does not listen by itself. Raises OSError (EADDRINUSE)."""
    kind = socket.SOCK_STREAM if wanted["proto"] == "tcp" else socket.SOCK_DGRAM
    first, last = wanted["host"] or (0, 0)
    for number in range(first, last + 1):
        try:
            sock = _bind(kind, wanted["ip"] or "0.0.0.0", number)
        except OSError as err:
            if number == last or err.errno != errno.EADDRINUSE:
                raise
            continue
        return sock, int(sock.getsockname()[1])
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _bind(kind: int, address: str, number: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
    try:
        try:
            sock.bind((address, number))
        except OSError:
            if kind != socket.SOCK_STREAM:
                raise
            # Connections of an earlier server in TIME_WAIT keep a port only from who does not say SO_REUSEADDR; with
            # it, two that do not listen could share one: so it listens, which only one can.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, number))
            sock.listen(1)
    except OSError:
        sock.close()
        raise
    return sock


def release_port(sock: socket.socket) -> None:
    """Close a socket of `bind_port`, so that its port can be had at once.

    A child forked a moment ago closes its copy only when it comes to run. What is set here holds for that copy, too: it
    does not listen, and shares the port with who says SO_REUSEADDR, as `bind_port` does in its second try. (UDP has no
    such second try: there a port may stay taken for that moment.)"""
    if sock.type == socket.SOCK_STREAM:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ENOTCONN: it has not listened
    sock.close()
