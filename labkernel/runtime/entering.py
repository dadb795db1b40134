"""exec's way into a container: a child made ahead of time, which enters and turns into the command.

A fork of the supervisor, and the page faults of both sides after it, take longer than all that is done inside. So one
child waits for the next exec, having touched what it will need, and the process it then makes inside borrows its memory
instead of copying it (`syscalls.vfork_and_leave`). Standard library only.

Safety, as in `init`: not dumpable from the start, so nobody in the container can open its /proc entries
(CVE-2019-5736); the waiting child keeps no descriptor but its socket, and what it is sent is closed or is the command's
stdio before the command begins (CVE-2024-21626).
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any, NamedTuple, NoReturn

from ..errors import file_of
from ..linux import capabilities, pty, syscalls
from ..linux.cgroups import Cgroup
from ..linux.namespaces import FLAGS, drop_groups
from . import accounts, init, protocol
from .instances import Instance

# A request that does not fit a datagram comes with the fork.
_MAX_REQUEST_BYTES = 1 << 16
_programs: dict[str | None, bytes | None] = {None: None}


class Helper(NamedTuple):
    """A child that enters. At the exec it ends, and with it what is to be heard from `sock`: {"error", "exit_code"},
    the terminal's master. `command` is the number of the command's process, our child too, once there is one."""

    pid: int
    sock: socket.socket
    command: syscalls.SharedNumber


class Entrance:
    """At most one waiting child, from the first exec on."""

    def __init__(self) -> None:
        self.waiting: Helper | None = None
        self.used = False
        self.program: str | None = None

    def enter(self, request: dict[str, Any], fds: list[int]) -> Helper:
        """Have `request` (see `request_of`) carried out with `fds`: the pidfd of a process in it, then stdin,
        stdout and stderr. Raises OSError."""
        self.used, self.program = True, request["program"]
        waiting, self.waiting = self.waiting, None
        data = protocol.dumps(request)
        if waiting is not None and len(data) <= _MAX_REQUEST_BYTES:
            try:
                protocol.send_with_fds(waiting.sock, data, fds)
                return waiting
            except OSError:
                pass  # somebody has killed it
        if waiting is not None:
            _dismiss(waiting)
        return _spawn(request, fds)

    def refill(self) -> bool:
        """Make a child; False when there is one, or when nobody has asked for any. Raises OSError."""
        if self.waiting is not None or not self.used:
            return False
        _program(self.program)
        self.waiting = _spawn(None, [])
        return True

    def discard(self) -> None:
        """Send the waiting child away."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            _dismiss(waiting)


def request_of(inst: Instance, process: dict[str, Any], *, terminal: bool) -> dict[str, Any]:
    """All that the child has to know."""
    flags = 0
    for space in (inst.config.get("linux") or {}).get("namespaces") or ():
        # Without a cgroup of its own the container stays in the machine's cgroup namespace.
        if space["type"] != "user" and (space["type"] != "cgroup" or inst.cgroup is not None):
            flags |= FLAGS[space["type"]]
    return {
        "flags": flags,
        "cgroup": inst.cgroup.paths if inst.cgroup is not None else {},
        "program": None if process.get("privileged") else inst.own.get("seccomp_program"),
        "user": process.get("user") or inst.own.get("user_unresolved"),
        "process": merge(inst.config["process"], process, terminal=terminal),
        "terminal": terminal,
        "alone": bool(inst.state.get("alone")),
    }


def merge(base: dict[str, Any], process: dict[str, Any], *, terminal: bool) -> dict[str, Any]:
    """The runtime-spec process of a command in the container whose own process is `base`."""
    merged = {
        **base,
        "args": process["args"],
        "env": init.merge_environment(base, process, terminal=terminal),
        "cwd": process.get("cwd") or base.get("cwd") or "/",
        "consoleSize": process.get("consoleSize") or {},
    }
    if process.get("privileged"):
        names = capabilities.NAMES
        merged["capabilities"] = {kind: list(names) for kind in ("bounding", "effective", "permitted")}
        merged["noNewPrivileges"] = False
    return merged


def _spawn(request: dict[str, Any] | None, fds: list[int]) -> Helper:
    command = syscalls.SharedNumber()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid, _ = syscalls.clone(0, want_pidfd=False)
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        _main(theirs, command, request, fds)
    theirs.close()
    os.set_blocking(ours.fileno(), False)
    return Helper(pid, ours, command)


def _dismiss(helper: Helper) -> None:
    helper.sock.close()
    try:
        os.kill(helper.pid, signal.SIGKILL)
        os.waitpid(helper.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _main(
    sock: socket.socket, command: syscalls.SharedNumber, request: dict[str, Any] | None, fds: list[int]
) -> NoReturn:
    """Body of the child; it comes to the exec, or tells why not."""
    try:
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        drop_groups()
        init.reset_signals()
        os.setsid()
        stack = syscalls.lowest_stack_address()
        syscalls.rehearse_callback()
        if request is None:
            sock = init.isolate_descriptors(sock)
            syscalls.set_name(b"labkernel-enter")
            init.rehearse()
            data, fds = protocol.receive(sock, _MAX_REQUEST_BYTES)
            if not data:
                os._exit(0)  # the supervisor has gone, or does not need this child any more
            request = json.loads(data)
        assert request is not None
        program = _enter(request, fds)
        sock = init.isolate_descriptors(sock)
        found, way = request, sock
        syscalls.vfork_and_leave(syscalls.CLONE_PARENT, lambda: _become(way, found, program), stack, command)
    except BaseException as err:
        _report(sock, err)
    finally:
        os._exit(1)


def _program(path: str | None) -> bytes | None:
    """A filter; its file's name says what is in it, so who has read it once knows it, and so do the children."""
    if path not in _programs:
        _programs[path] = init.read_program(path)
    return _programs[path]


def _enter(request: dict[str, Any], fds: list[int]) -> bytes | None:
    """Stdio, cgroup and namespaces; returns the filter, which lies outside."""
    pidfd, *stdio = fds
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    program = _program(request["program"])
    if request["cgroup"]:
        Cgroup.reopen(request["cgroup"]).join(0)
    syscalls.setns(pidfd, request["flags"])
    if request["alone"] and accounts.resolve(request["user"], request["process"].get("user") or {}).uid:
        # Another user than root has a user namespace of its own (namespaces.become_alone).
        syscalls.setns(pidfd, syscalls.CLONE_NEWUSER)
    return program


def _become(sock: socket.socket, request: dict[str, Any], program: bytes | None) -> None:
    """Inside, in the process that is to be the command. Does not return."""
    try:
        os.setsid()
        os.chdir("/")
        process = request["process"]
        if request["terminal"]:
            _attach_terminal(sock, process["consoleSize"])
        init.set_rlimits(process.get("rlimits") or [])
        init.execute(sock, process, {"user_unresolved": request["user"]}, program, cwd_create=False)
    except BaseException as err:
        _report(sock, err)
    finally:
        os._exit(1)


def _attach_terminal(sock: socket.socket, size: dict[str, Any]) -> None:
    master, slave = pty.open_pair("/dev/ptmx")
    pty.resize(master, int(size.get("height") or 24), int(size.get("width") or 80))
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    pty.make_controlling(0)
    protocol.send_with_fds(sock, b"{}", [master])
    os.close(master)


def _report(sock: socket.socket, err: BaseException) -> None:
    if isinstance(err, init.SetupError):
        init.report(sock, err.brief, err.exit_code)
    elif isinstance(err, OSError):
        where = f": {file_of(err)}" if file_of(err) else ""
        init.report(sock, f"cannot enter the container{where}: {err.strerror or err}", 126)
    else:
        init.report(sock, f"cannot enter the container: {type(err).__name__}: {err}", 126)
