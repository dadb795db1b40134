"""Containers whose first process is a program of ours on this machine: the monitor of a virtual machine.

Their config names it (`labkernel.monitor`, "package.module:function"); all else is as for any container: cgroup,
streams, log, exit code, a supervisor that may be killed. No namespaces, no root file system: the monitor decides what
is inside.
The function gets the config, the directory and a `Told`, and never returns.

exec: a process that hands its streams to the monitor over DIR/control.sock and ends as the command inside ends.
Standard library only.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import select
import signal
import socket
import termios
from typing import Any

from ..errors import file_of
from ..linux import netlink, pty, syscalls
from . import init, protocol, rootfs

CONTROL = "control.sock"
INSIDE_RESOLVER = "169.254.127.11"  # where a machine finds what listens at 127.0.0.11 here (qemu/cards.py)
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


NO_NETWORK: dict[str, Any] = {"cards": [], "addresses": [], "servers": [], "search": [], "options": []}


class Told:
    """The supervisor, waiting for the start: it is told once, how it went."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: socket.socket | None = sock

    def started(self) -> None:
        """What was asked for runs now."""
        if self._sock is not None:
            try:
                self._sock.send(protocol.dumps({"runs": True}))
            except OSError:
                pass  # another supervisor has taken over
            self._close()

    def failed(self, brief: str, exit_code: int) -> None:
        """It will not run."""
        if self._sock is not None:
            init.report(self._sock, brief, exit_code)
            self._close()

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def main(sock: socket.socket, settings: dict[str, Any]) -> None:
    """Body of a child of the pool, as `init.main`. Never returns."""
    try:
        sock = init.isolate_descriptors(sock)
        init.reset_signals()
        os.setsid()
        syscalls.set_name(b"labkernel-vm")
        if settings["cgroup"] is not None:
            settings["cgroup"].join(0)
        if "network" in settings["profile"]["namespaces"]:
            netlink.loopback_up()
            init.leave_out_ipv6()
        data, fds = protocol.receive(sock)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if request.get("quit"):
            os._exit(0)
        with open(request["config"], "rb") as file:
            config = json.loads(file.read())
        if "network" in settings["profile"]["namespaces"]:
            config["labkernel"]["wires"] = _join_network(sock, config, request.get("network") or NO_NETWORK)
        master = _connect_streams(config["process"], fds)
        protocol.send_with_fds(sock, b'{"notes":{}}', [] if master is None else [master])
        if master is not None:
            os.close(master)
        module, _, name = str(config["labkernel"]["monitor"]).partition(":")
        getattr(importlib.import_module(module), name)(config, request["dir"], Told(sock))
    except BaseException as err:
        _report(sock, err)
    finally:
        os._exit(125)


def _join_network(sock: socket.socket, config: dict[str, Any], network: dict[str, Any]) -> dict[str, Any]:
    """The resolver's sockets, which listen here for the one inside; returns what that one has to know."""
    if network.get("resolver"):
        sockets = netlink.resolver_sockets()
        protocol.send_with_fds(sock, protocol.dumps({"resolver": True}), [each.fileno() for each in sockets])
        for each in sockets:
            each.close()
    return wires(config, network)


def wires(config: dict[str, Any], network: dict[str, Any]) -> dict[str, Any]:
    """From `Switch.files` to what a monitor tells the one inside: its cards, and the text of two files."""
    inside = {**network, "servers": [INSIDE_RESOLVER if server == netlink.RESOLVER else server
                                     for server in network["servers"]]}  # fmt: skip
    files = dict(rootfs.network_files(config, {**(config.get("labkernel") or {}), "network": inside}))
    return {"cards": network["cards"], "hosts": files["hosts"], "resolv": files["resolv.conf"]}


def _report(sock: socket.socket, err: BaseException) -> None:
    if isinstance(err, OSError):
        where = f": {file_of(err)}" if file_of(err) else ""
        init.report(sock, f"cannot set up the machine{where}: {err.strerror or err}", 125)
    else:
        init.report(sock, f"cannot set up the machine: {type(err).__name__}: {err}", 125)
    if not isinstance(err, (OSError, SystemExit)):
        import traceback

        traceback.print_exception(err)  # to supervisor.log: a mistake of ours


def _connect_streams(process: dict[str, Any], fds: list[int]) -> int | None:
    """Make 0 to 2 what the supervisor sent, or a terminal of this machine, whose master is returned."""
    if not process.get("terminal"):
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        for fd in fds:
            os.close(fd)
        return None
    return _open_terminal(process)


def _open_terminal(process: dict[str, Any]) -> int:
    """A raw terminal at 0 to 2, controlled by this session: echo, lines and signals are the business of the one inside.

    Returns its master."""
    master, slave = pty.open_pair()
    size = process.get("consoleSize") or {}
    pty.resize(master, int(size.get("height") or 24), int(size.get("width") or 80))
    mode = termios.tcgetattr(slave)
    mode[0] = mode[1] = mode[3] = 0  # no flags for input, output and lines
    mode[2] = termios.CS8 | termios.CREAD
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    pty.make_controlling(0)
    return master


# -- exec ------------------------------------------------------------------------------------------------------------


def begin_session(
    sock: socket.socket, inst: Any, process: dict[str, Any], theirs: list[int], *, terminal: bool, stdin: bool
) -> None:
    """exec: `sock` is told {"pid"} of the process that stands for the command. Never returns."""
    try:
        init.reset_signals()
        for number, fd in enumerate(theirs):
            os.dup2(fd, number)
        sock = init.isolate_descriptors(sock)
        os.setsid()
        pid, _ = syscalls.clone(syscalls.CLONE_PARENT, want_pidfd=False)
        if pid:
            sock.send(protocol.dumps({"pid": pid}))
            os._exit(0)
        os.setsid()
        if terminal:
            master = _open_terminal(process)
            protocol.send_with_fds(sock, b"{}", [master])
            os.close(master)
        _stand_for(sock, inst, _request(inst, process, terminal=terminal, stdin=stdin), terminal=terminal)
    except BaseException as err:
        _report(sock, err)
    finally:
        os._exit(1)


def _request(inst: Any, process: dict[str, Any], *, terminal: bool, stdin: bool) -> dict[str, Any]:
    base: dict[str, Any] = inst.config["process"]
    return {
        "args": process["args"],
        "env": init.merge_environment(base, process, terminal=terminal),
        "cwd": process.get("cwd") or base.get("cwd") or "/",
        "user": process.get("user") or inst.own.get("user_unresolved") or "",
        "terminal": terminal,
        "stdin": stdin,
    }


def _stand_for(sock: socket.socket, inst: Any, process: dict[str, Any], *, terminal: bool) -> None:
    """Give the monitor our streams, forward signals and sizes, end with the command's exit code. Never returns."""
    wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake[1], warn_on_full_buffer=False)
    for number in (*_FORWARDED, *([signal.SIGWINCH] if terminal else [])):
        signal.signal(number, lambda _number, _frame: None)
    control = _connect(inst.directory)
    fds = array.array("i", [0, 1, 2])
    request = json.dumps({"op": "exec", "process": process}).encode()
    control.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    poller = select.poll()
    poller.register(control.fileno(), select.POLLIN)
    poller.register(wake[0], select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == wake[0]:
                for came in set(os.read(wake[0], 512)):
                    message = {"resize": pty.size(0)} if came == signal.SIGWINCH else {"signal": came}
                    control.send(json.dumps(message).encode())
                continue
            data, _ = protocol.receive(control)
            answer = json.loads(data) if data else {"exit": 128 + signal.SIGKILL}
            if "error" in answer:
                init.report(sock, str(answer["error"]), int(answer.get("exit_code") or 126))
                os._exit(int(answer.get("exit_code") or 126))
            if "exit" in answer:
                os._exit(int(answer["exit"]) & 0xFF)
            sock.close()  # it runs


def _connect(directory: str) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    # By a short name: a unix socket's path has room for 107 bytes only.
    control.connect(f"/proc/self/fd/{folder}/{CONTROL}")
    os.close(folder)
    return control
