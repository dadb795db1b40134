"""The supervisor's parent: few lines that cannot fail. Keeps descriptors, reaps orphans, makes a new supervisor.

It is the child subreaper, so when the supervisor dies the containers become its children; it holds a duplicate of
every output pipe and pty master, so nothing gets SIGPIPE or SIGHUP; it owns the listening socket, so clients that
connect in between only wait a moment. A supervisor is a fork of it and finds all of this in `Context`.

When the keeper dies, the supervisor forks: the parent, whose children the containers are, goes on as keeper (`tend`),
the child as supervisor. Killing supervisor and then keeper leaves the containers with a foreign parent: their exit
codes then come from PIDFD_GET_INFO, where the kernel has it (Linux 6.15).
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from ..linux import namespaces, syscalls
from . import instances, protocol
from .logs import Journal
from .usage import usage_of_zombie


class Context:
    """What outlives a supervisor. `held`: container id -> {"state": …, "fds": {name: descriptor}}; `exits`: pid ->
    exit code of orphans that the supervisor has not confirmed; `spent`: pid -> their figures (usage.py)."""

    __slots__ = (
        *("settings", "listener", "link", "keeper_pid", "scratch", "mark", "held", "exits", "parents"),
        *("births", "plan", "spent"),
    )

    def __init__(self, settings: dict[str, Any], listener: socket.socket) -> None:
        self.settings = settings
        self.listener = listener
        self.scratch = os.pipe2(os.O_CLOEXEC)
        self.mark: mmap.mmap = Journal.shared_memory()
        self.held: dict[str, dict[str, Any]] = {}
        self.exits: dict[int, int] = {}
        self.spent: dict[int, dict[str, Any]] = {}
        self.link: socket.socket | None = None
        self.keeper_pid = 0
        self.births = 0
        self.parents: set[str] = set()  # cgroup parents in use
        self.plan: dict[str, Any] | None = None  # how to become a newer version (takeover.py)


def main() -> None:
    """Entry of the process a client starts: argv[1] is JSON {socket, root, runtime_dir, driver, idle_exit_s, …}.

    Writes one JSON line to descriptor 1 when it listens, or why it can't. Never returns.
    """
    settings = json.loads(sys.argv[1])
    if os.fork():
        os._exit(0)  # the client waits for this process only, so it never has a zombie
    try:
        _leave_client(settings)
        syscalls.set_title(f"labkernel supervisor of {settings['root']}".encode())
        if settings["driver"] == "rootless":
            settings["id_map"] = _enter_user_namespace(settings)
        listener = _listen(settings["socket"])
        context = Context(settings, listener)
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        from . import init, supervisor  # loaded here once; every supervisor is a fork of this process

        init.raise_descriptor_limit()

        os.write(1, b'{"ok":true}\n')
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        supervisor.freeze()
    except BaseException as err:
        detail = {"error": f"{type(err).__name__}: {err}", "errno": getattr(err, "errno", None)}
        os.write(1, json.dumps(detail).encode() + b"\n")
        os._exit(1)
    tend(context)


def _leave_client(settings: dict[str, Any]) -> None:
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    log = os.open(f"{settings['runtime_dir']}/supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    syscalls.close_range(3)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def _enter_user_namespace(settings: dict[str, Any]) -> str:
    """A new one, or that of containers which run on after keeper and supervisor were both killed."""
    for pid in instances.left_running(settings["root"]):
        kind = namespaces.rejoin_user_namespace(pid)
        if kind is not None:
            return kind
    return namespaces.enter_user_namespace(ranges=settings.get("subids", True))


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(128)
    os.set_blocking(listener.fileno(), False)
    return listener


def _wake_pipe() -> tuple[int, int]:
    wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake[1], warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return wake


def tend(context: Context, child: int = 0) -> None:
    """Keep; `child` is a supervisor that is already there (after a change of roles). Never returns."""
    syscalls.set_name(b"labkernel-keep")
    wake = _wake_pipe()
    os.write(wake[1], b"!")  # who has ended before that gave no signal here
    while True:
        if not child and context.plan is not None:
            from .takeover import succeed

            plan, context.plan = context.plan, None
            succeed(context, plan)
        if not child:
            child = _give_birth(context, wake)
        link = context.link
        assert link is not None
        poller = select.poll()
        poller.register(link.fileno(), select.POLLIN)
        poller.register(wake[0], select.POLLIN)
        alive = True
        while alive:
            for fd, _ in poller.poll():
                if fd == wake[0]:
                    _drain(wake[0])
                elif not _hear(context, link):
                    alive = False
            if _reap(context, link, child):
                alive = False
        # Its last words may still be in the socket, though it is dead.
        while _hear(context, link):
            pass
        link.close()
        _kill_and_wait(child)
        child = 0


def _drain(fd: int) -> None:
    try:
        os.read(fd, 4096)
    except BlockingIOError:
        pass


def _kill_and_wait(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _give_birth(context: Context, wake: tuple[int, int]) -> int:
    context.births += 1
    if context.births > 10 and not context.held:
        os._exit(1)  # supervisors cannot live here (the store was deleted?) and nothing depends on one
    if context.births > 5:
        time.sleep(min(0.1 * context.births, 5.0))  # something kills it again and again: do not burn the CPU
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.set_blocking(ours.fileno(), False)
    context.keeper_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(wake[0])
        os.close(wake[1])
        context.link = theirs
        from . import supervisor

        supervisor.main(context)
        os._exit(0)
    theirs.close()
    context.link = ours
    return pid


def _hear(context: Context, link: socket.socket) -> bool:
    """Take one message of the supervisor; False when there is none and never will be."""
    try:
        data, fds = protocol.receive(link, 1 << 18)
    except BlockingIOError:
        return False
    except OSError:
        return False
    if not data:
        return False
    message = json.loads(data)
    if "hold" in message:
        entry = context.held.setdefault(message["hold"], {"state": {}, "fds": {}})
        entry["state"].update(message.get("state") or {})
        entry["fds"].update(zip(message.get("names") or (), fds, strict=False))
    elif "drop" in message:
        entry = context.held.pop(message["drop"], {"fds": {}})
        for fd in entry["fds"].values():
            os.close(fd)
    elif "release" in message:
        fd = context.held.get(message["release"], {"fds": {}})["fds"].pop(message["name"], None)
        if fd is not None:
            os.close(fd)
    elif "forget" in message:
        context.exits.pop(message["forget"], None)
        context.spent.pop(message["forget"], None)
    elif "parent" in message:
        context.parents.add(message["parent"])
    elif "succeed" in message:
        context.plan = message["succeed"]
    elif "steady" in message:
        context.births = 0
    elif "bye" in message:
        os._exit(0)
    return True


def _reap(context: Context, link: socket.socket, child: int) -> bool:
    """Reap all zombies; returns whether the supervisor was among them. Orphans' exit codes go to the supervisor
    before they are reaped, so that a kill in between loses none."""
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        if info is None:
            return False
        if info.si_pid == child:
            os.waitpid(child, 0)
            return True
        code = info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status
        context.exits[info.si_pid] = code
        context.spent[info.si_pid] = spent = usage_of_zombie(info.si_pid)
        try:
            link.send(protocol.dumps({"exit": info.si_pid, "code": code, "usage": spent}))
        except OSError:
            pass
        os.waitpid(info.si_pid, 0)


def exit_code_of_stranger(pidfd: int) -> int | None:
    """The exit code of a process that is not our child (man 2 PIDFD_GET_INFO); None while it runs or when unknown."""
    request = bytearray(64)
    request[0] = 8  # PIDFD_INFO_EXIT
    try:
        fcntl.ioctl(pidfd, 0xC040FF0B, request)
    except OSError as err:
        if err.errno in (errno.ESRCH, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    if not request[0] & 8:
        return None
    status = int.from_bytes(request[60:64], "little", signed=True)
    return os.waitstatus_to_exitcode(status) if not status & 0x7F else 128 + (status & 0x7F)
