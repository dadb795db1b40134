"""Requests to a machine's monitor: both ends of DIR/control.sock. Standard library only.

A request is one SOCK_SEQPACKET message of JSON, with descriptors for "exec"; answers are such messages:
    {"op": "exec", "process": {…}}     {"started": true}, {"exit": code}   or {"error": brief, "exit_code": code}
        then, from the client          {"signal": number}, {"resize": [rows, columns]}
    {"op": "figures"}                  {"figures": {name: number}}
    {"op": "network", "wires": {…}}    {"done": true}                      or {"error": brief}
    {"op": "snapshot", "target": dir}  {"done": true}                      or {"error": brief}
A client that closes its connection ends what it started.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
from typing import Any

from labkernel.errors import LabkernelError

from .channel import Kind, encode, network_payload

NAME = "control.sock"
_MAX_MESSAGE = 1 << 20
_MAX_FDS = 3


def connect(directory: str, timeout_s: float | None = None) -> socket.socket:
    """A connection to the monitor of the machine in `directory`. Raises OSError when there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # By a short name: a unix socket's path has room for 107 bytes only.
        sock.connect(f"/proc/self/fd/{folder}/{NAME}")
        sock.settimeout(timeout_s)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(folder)
    return sock


def ask(directory: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """One request and its one answer. Raises OSError (TimeoutError too); EOFError when the machine has ended."""
    with connect(directory, timeout_s) as sock:
        sock.send(json.dumps(request).encode())
        data = sock.recv(_MAX_MESSAGE)
    if not data:
        raise EOFError
    answer: dict[str, Any] = json.loads(data)
    return answer


def listen(monitor: Any) -> None:
    """Take requests for `monitor` from now on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    folder = os.open(monitor.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f"/proc/self/fd/{folder}/{NAME}"
    try:
        os.unlink(name)
    except FileNotFoundError:
        pass
    mask = os.umask(0o077)
    listener.bind(name)
    os.umask(mask)
    os.close(folder)
    listener.listen(16)

    def accept(_events: int) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] not in (0, os.getuid()):
            sock.close()
            return
        Client(monitor, sock)

    monitor.watch(listener.fileno(), select.POLLIN, accept)


class Client:
    """One connection at the monitor's side."""

    def __init__(self, monitor: Any, sock: socket.socket) -> None:
        self.monitor, self.sock = monitor, sock
        self.process: Any = None
        os.set_blocking(sock.fileno(), False)
        monitor.watch(sock.fileno(), select.POLLIN, self._ready)

    def answer(self, message: dict[str, Any]) -> None:
        try:
            self.sock.send(json.dumps(message).encode())
        except OSError:
            pass  # it has gone

    def _ready(self, _events: int) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _MAX_MESSAGE, _MAX_FDS)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._close()
            return
        try:
            self._take(json.loads(data), fds)
        except (ValueError, KeyError, TypeError) as err:
            self.answer({"error": f"bad request: {err}", "exit_code": 125})

    def _close(self) -> None:
        self.monitor.watch(self.sock.fileno(), 0, None)
        self.sock.close()
        if self.process is not None:
            self.process.signal(signal.SIGKILL)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        operation = message.get("op")
        if operation == "exec":
            self._exec(message["process"], fds)
        elif operation == "figures" and self.monitor.ready:
            self.monitor.figures.append(self)
            self.monitor.send(encode(Kind.STATS))
        elif operation == "network" and self.monitor.ready:
            self._rewire(message["wires"])
        elif operation == "snapshot" and self.monitor.ready:
            from .snapshot import take

            take(self.monitor, self, str(message["target"]))
        elif self.process is not None and "signal" in message:
            self.process.signal(int(message["signal"]))
        elif self.process is not None and "resize" in message:
            self.process.resize(*message["resize"])
        else:
            self.answer({"error": "the machine is not up yet" if operation else "bad request"})

    def _rewire(self, wires: dict[str, Any]) -> None:
        monitor = self.monitor
        monitor.wires = wires
        try:
            monitor.grow()
        except (OSError, LabkernelError) as err:
            self.answer({"error": f"a network card could not be plugged in: {getattr(err, 'brief', err)}"})
            return
        monitor.rewiring.append(self)
        monitor.send(encode(Kind.NETWORK, network_payload(wires)))

    def _exec(self, process: dict[str, Any], fds: list[int]) -> None:
        monitor = self.monitor
        free = monitor.free_number()
        if not monitor.ready or free is None or len(fds) != _MAX_FDS:
            brief = "too many commands run in this VM" if monitor.ready else "the machine is not up yet"
            self.answer({"error": brief, "exit_code": 126})
            return
        try:
            user, stdin = process.get("user") or "", bool(process.get("stdin"))
            self.process = monitor.add(free, fds, process, user=user, stdin=stdin)
        except ValueError as err:
            self.answer({"error": f"the command cannot be sent to the guest: {err}", "exit_code": 126})
            return
        self.process.on_change = self._changed

    def _changed(self, what: str, value: Any) -> None:
        if what == "started":
            self.answer({"started": True})
            return
        process, self.process = self.process, None
        if what == "failed":
            self.answer({"error": value[0], "exit_code": value[1]})
            process.close()
        else:
            self._finish(process, int(value))

    def _finish(self, process: Any, code: int) -> None:
        """Its exit code is told when its output has been taken."""
        if process.pending:
            self.monitor.later(0.02, lambda: self._finish(process, code))
            return
        process.close()
        self.answer({"exit": code})
