"""The worker: a warm process in the driver's namespaces that runs file system tasks, each in a child of its own.

The supervisor forks it when the first task comes and hands each client's connection over to it, so a long task never
concerns the supervisor. A task's child has a private mount namespace (it may mount, all is gone at its end) and sends
frames of stream 3 straight to its client: {"report": …} any number of times, then {"result": …} or {"failure": …}.
A client that closes its connection kills its task. Standard library only; what tasks import is imported on demand,
once in the worker, so that the next child finds it loaded.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from ..errors import LabkernelError, RuntimeFailure, TaskError
from ..linux import mounts, syscalls
from . import protocol
from .loop import Connection


class Worker:
    """The supervisor's handle: `sock` takes (request, client connection, descriptors)."""

    __slots__ = ("pid", "sock")

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock

    def dismiss(self) -> None:
        """No more tasks; running ones are finished first."""
        self.sock.close()


def hand_over(sup: Any, conn: Connection, message: dict[str, Any], fds: list[int]) -> None:
    """Handle a task request: give the connection to the worker, which is started when there is none."""
    call = str(message.get("call"))
    if not all(part.isidentifier() for part in call.replace(":", ".", 1).split(".")) or call.count(":") != 1:
        raise RuntimeFailure(f"not a task: {call!r}")
    request = protocol.dumps(message)
    if len(request) > 150_000:
        # Too long for one datagram: it goes as a file.
        memory = os.memfd_create("task")
        os.write(memory, request)
        fds = [*fds, memory]
        request = protocol.dumps({"in_file": True})
    for attempt in range(2):
        if sup.worker is None:
            sup.worker = _start(sup)
        try:
            protocol.send_with_fds(sup.worker.sock, request, [conn.fd, *fds])
            break
        except OSError as err:
            _forget(sup)
            if attempt:
                raise RuntimeFailure(f"the worker does not take tasks: {err.strerror}") from err
    conn.detach_socket().close()
    for fd in fds:
        os.close(fd)


def _start(sup: Any) -> Worker:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            _main(theirs, list(sup.settings.get("python_path") or []), mounts_allowed=sup.settings["driver"] != "proot")
        finally:
            os._exit(1)
    theirs.close()
    worker = Worker(pid, ours)
    sup.loop.watch(ours.fileno(), lambda _events: _ended(sup, worker))
    return worker


def _ended(sup: Any, worker: Worker) -> None:
    if sup.worker is worker:
        _forget(sup)


def _forget(sup: Any) -> None:
    worker, sup.worker = sup.worker, None
    sup.loop.unwatch(worker.sock.fileno())
    worker.sock.close()
    try:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _main(sock: socket.socket, python_path: list[str], *, mounts_allowed: bool) -> None:
    """Body of the worker. Never returns."""
    fd = sock.detach()
    os.dup2(fd, 3, inheritable=False) if fd != 3 else None
    syscalls.close_range(4)
    sock = socket.socket(fileno=3)
    syscalls.set_name(b"labkernel-work")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.path[:] = [*python_path, *(path for path in sys.path if path not in python_path)]
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> (pid, client)
    poller = select.poll()
    poller.register(3, select.POLLIN)
    listening = True
    while listening or running:
        for fd, _events in poller.poll():
            if fd == 3:
                if not _take(sock, poller, running, mounts_allowed=mounts_allowed):
                    poller.unregister(3)
                    listening = False
            elif fd in running:
                _finish(fd, poller, running)
            elif any(client.fileno() == fd for _, client in running.values()):
                # Not so when its task has ended in this same round: that client is closed and unregistered already.
                _cancel(fd, poller, running)
    os._exit(0)


def _take(
    sock: socket.socket,
    poller: select.poll,
    running: dict[int, tuple[int, socket.socket]],
    *,
    mounts_allowed: bool,
) -> bool:
    """Start the task that has come; False when the supervisor has gone."""
    try:
        data, fds = protocol.receive(sock, 1 << 18)
    except OSError:
        return False
    if not data:
        return False
    client = socket.socket(fileno=fds.pop(0))
    os.set_blocking(client.fileno(), True)
    message = json.loads(data)
    if message.get("in_file"):
        with os.fdopen(fds.pop(), "rb") as file:
            file.seek(0)
            message = json.loads(file.read())
    try:
        protocol.send_message(client, {"ok": True})
        module_name, _, function_name = message["call"].partition(":")
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as err:
        _send(client, {"failure": _describe(message.get("call", ""), err)})
        client.close()
        for fd in fds:
            os.close(fd)
        return True
    pid = os.fork()
    if pid == 0:
        _run(client, function, message, fds, sock, mounts_allowed=mounts_allowed)
    for fd in fds:
        os.close(fd)
    pidfd = os.pidfd_open(pid)
    running[pidfd] = (pid, client)
    poller.register(pidfd, select.POLLIN)
    poller.register(client, select.POLLRDHUP)
    return True


def _run(
    client: socket.socket,
    function: Any,
    message: dict[str, Any],
    fds: list[int],
    sock: socket.socket,
    *,
    mounts_allowed: bool,
) -> None:
    """Body of a task's child. Never returns."""
    try:
        sock.close()
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        _keep_only({client.fileno(), *fds})
        if mounts_allowed:
            syscalls.unshare(syscalls.CLONE_NEWNS)
            mounts.make_private("/")
        os.umask(0o022)
        arguments = dict(message.get("args") or {})
        if fds:
            arguments["fds"] = fds
        if message.get("report"):
            arguments["report"] = lambda event: _send(client, {"report": event})
        _send(client, {"result": function(**arguments)})
    except BaseException as err:
        _send(client, {"failure": _describe(message["call"], err)})
    finally:
        os._exit(0)


def _keep_only(keep: set[int]) -> None:
    # Other tasks' clients must see their end when their own child ends, not when this one does.
    first = 3
    for fd in sorted(keep):
        syscalls.close_range(first, fd - 1)
        first = fd + 1
    syscalls.close_range(first)


def _send(client: socket.socket, event: dict[str, Any]) -> None:
    try:
        client.sendall(protocol.encode_control(event))
    except OSError:
        os._exit(1)  # nobody wants the result any more


def _describe(call: str, err: BaseException) -> dict[str, Any]:
    if isinstance(err, LabkernelError):
        return err.to_dict()
    if isinstance(err, OSError) and err.errno is not None:
        return TaskError.from_oserror(call.rpartition(":")[2].replace("_", " "), err).to_dict()
    if isinstance(err, MemoryError):
        return TaskError(f"{call}: out of memory").to_dict()
    import traceback

    trace = "".join(traceback.format_exception(err))
    return TaskError(f"{call}: {type(err).__name__}: {err}", details=trace).to_dict()


def _finish(pidfd: int, poller: select.poll, running: dict[int, tuple[int, socket.socket]]) -> None:
    pid, client = running.pop(pidfd)
    poller.unregister(pidfd)
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    try:
        poller.unregister(client)
    except (KeyError, OSError):
        pass
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        text = "the task was killed" + (" (out of memory?)" if -code == signal.SIGKILL else "")
        try:
            client.sendall(protocol.encode_control({"failure": TaskError(f"{text}: {name}").to_dict()}))
        except OSError:
            pass
    client.close()


def _cancel(fd: int, poller: select.poll, running: dict[int, tuple[int, socket.socket]]) -> None:
    """The client has gone: its task ends."""
    poller.unregister(fd)
    for pid, client in running.values():
        if client.fileno() == fd:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError as err:
                if err.errno != errno.ESRCH:
                    raise
