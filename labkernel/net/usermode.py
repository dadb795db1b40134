"""A network namespace of our own with a way out that needs no privileges: slirp4netns or pasta in user space.

Where the machine's own network may not be changed (rootless), bridges lie in such a namespace. It lives as long as
somebody holds a descriptor of it. Standard library only. Sources: man 1 slirp4netns; man 1 pasta.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import time
from typing import NamedTuple

from ..linux import netlink, nftables, syscalls
from ..linux.syscalls import CLONE_NEWNET
from ..linux.waiting import readable

MTU = 65520
_READY_S = 5.0
_TAP = "tap0"
_SYSCTLS = (
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
)


class Namespace(NamedTuple):
    """Descriptors: the namespace itself, a route socket and a netfilter socket in it."""

    netns: int
    route: int
    netfilter: int


def make_namespace() -> Namespace:
    """A new network namespace with loopback up and forwarding on. Raises OSError where none may be made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            syscalls.unshare(CLONE_NEWNET)
            netlink.loopback_up()
            for name, value in _SYSCTLS:
                _write(f"/proc/sys/net/{name}", value)
            netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            route, netfilter = netlink.Socket(), netlink.Socket(nftables.NETLINK_NETFILTER)
            socket.send_fds(theirs, [b"ok"], [netns, route.fileno(), netfilter.fileno()])
        except OSError as err:
            theirs.send(b"%d" % (err.errno or 1))
        finally:
            os._exit(0)
    theirs.close()
    data, fds, _, _ = socket.recv_fds(ours, 64, 3)
    ours.close()
    os.waitpid(pid, 0)
    if data != b"ok":
        number = int(data or b"5")
        raise OSError(number, os.strerror(number))
    return Namespace(*fds)


def _write(path: str, value: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(value)
    except OSError:
        pass


def inside(namespace: int, call: object) -> str:
    """Run `call` (it returns words for an error, or "") in a child that is in `namespace` (-1: in the caller's)."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if namespace >= 0:
                syscalls.setns(namespace, CLONE_NEWNET)
            words = call()  # type: ignore[operator]
        except BaseException as err:
            words = f"{type(err).__name__}: {err}"
        try:
            os.write(write, str(words).encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        found = file.read().decode(errors="replace")
    os.waitpid(pid, 0)
    return found


def find_programs() -> list[tuple[str, str]]:
    """(kind, path) of the programs there are, the quicker to start first (8 ms and 90 ms)."""
    found = []
    for name in ("slirp4netns", "pasta"):
        for folder in ("/usr/bin", "/usr/local/bin", "/bin", "/usr/sbin"):
            if os.access(f"{folder}/{name}", os.X_OK):
                found.append((name, f"{folder}/{name}"))
                break
    return found


def connect(namespace: int) -> tuple[int, int] | str:
    """Give the namespace a way out: (pid of the program, descriptor whose closing ends it), or why not."""
    problems = []
    for kind, path in find_programs():
        found = _start_slirp(path, namespace) if kind == "slirp4netns" else _start_pasta(path, namespace)
        if not isinstance(found, str):
            return found
        problems.append(f"{kind}: {found}")
    return "; ".join(problems) or "neither slirp4netns nor pasta is installed"


def _start_slirp(path: str, namespace: int) -> tuple[int, int] | str:
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    stay_r, stay_w = os.pipe2(os.O_CLOEXEC)
    words_r, words_w = os.pipe2(os.O_CLOEXEC)
    options = ["--configure", f"--mtu={MTU}", "--disable-host-loopback", "--disable-dns"]
    pid = os.fork()
    if pid == 0:
        argv = [path, *options, "--exit-fd=3", "--ready-fd=4", "--netns-type=path", "/proc/self/fd/5", _TAP]
        _become(argv, [stay_r, ready_w, namespace], errors=words_w)
    for fd in (ready_w, stay_r, words_w):
        os.close(fd)
    ready = readable(ready_r, timeout_s=_READY_S) and os.read(ready_r, 1) == b"1"
    os.close(ready_r)
    if not ready:
        _end(pid)
        os.close(stay_w)
    os.set_blocking(words_r, False)
    words = _read_words(words_r) if not ready else ""
    os.close(words_r)
    return (pid, stay_w) if ready else words or "it did not come up"


def _read_words(fd: int) -> str:
    try:
        return os.read(fd, 2000).decode(errors="replace").strip().replace("\n", "; ")
    except BlockingIOError:
        return ""


def _start_pasta(path: str, namespace: int) -> tuple[int, int] | str:
    stay_r, stay_w = os.pipe2(os.O_CLOEXEC)
    words_r, words_w = os.pipe2(os.O_CLOEXEC)
    options = ["--config-net", "--ns-ifname", _TAP, "--no-map-gw", "-4", "-f", "-q"]
    closed = ["-t", "none", "-u", "none", "-T", "none", "-U", "none"]
    pid = os.fork()
    if pid == 0:
        # pasta has no descriptor to watch: a parent that waits at the pipe ends it
        child = os.fork()
        if child == 0:
            # Python ignores these, an exec leaves that as it is, and pasta takes it for an error of its own.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            _become([path, *options, *closed, "--netns", "/proc/self/fd/3"], [namespace], errors=words_w)
        syscalls.set_name(b"labkernel-pasta")
        os.dup2(stay_r, 3)
        syscalls.close_range(4)
        poller = select.poll()
        poller.register(3, select.POLLIN)
        poller.register(os.pidfd_open(child), select.POLLIN)
        poller.poll()
        _end(child)
        os._exit(0)
    os.close(stay_r)
    os.close(words_w)
    deadline = time.monotonic() + _READY_S
    ready = False
    while not ready and time.monotonic() < deadline and not _has_ended(pid):
        ready = inside(namespace, lambda: "up" if _has_route() else "") == "up"
        time.sleep(0 if ready else 0.01)
    if not ready:
        os.close(stay_w)
        os.waitpid(pid, 0)  # ends pasta, then itself
    os.set_blocking(words_r, False)
    words = _read_words(words_r) if not ready else ""
    os.close(words_r)
    return (pid, stay_w) if ready else words or "it did not come up"


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _has_route() -> bool:
    with netlink.Socket() as sock:
        return any(prefix == 0 for _, prefix, _ in sock.routes())


def _become(argv: list[str], fds: list[int], *, errors: int = -1) -> None:
    """In a child: descriptors 3, 4, … are `fds`, 2 is `errors`, everything else is closed. Never returns."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in (null, null, null if errors < 0 else errors, *fds)]
        for number, fd in enumerate(high):
            os.dup2(fd, number, inheritable=True)
        syscalls.close_range(len(high))
        os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    finally:
        os._exit(127)


def _end(pid: int) -> None:
    try:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
