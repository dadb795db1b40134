"""`labkernel exec [-e …] [-u …] [-w …] NAME COMMAND…` without loading engine and command line.

The supervisor needs 3 ms for an exec, Python twenty times that to load what understands every command. So the plainest
form is carried out here with the standard library's lightest modules: no terminal, no input, a container whose
supervisor is up. `carry_out` returns None before anything has happened wherever that is not so, or the supervisor does
not simply say yes; then the real command does it, and finds the words for what is wrong. Signals go to the command, as
`commands.foreground` has it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket

from ..runtime import protocol
from ..store import places

TYPE_CHECKING = False  # typing itself takes 8 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_FLAGS = {"-e": "env", "--env": "env", "-u": "user", "--user": "user", "-w": "cwd", "--workdir": "cwd"}
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_HEX = frozenset("0123456789abcdef")
_PATIENCE = 3  # as many SIGINT become a SIGKILL


def carry_out(words: Sequence[str], version: str) -> int | None:
    """The exit code of the command that `labkernel exec WORDS…` names; None: nothing was done.

    Raises BrokenPipeError."""
    asked = _parse(words)
    if asked is None or os.environ.get("LABKERNEL_DRIVER"):
        return None
    name, process = asked
    root = places.find_root()
    try:
        id = _id_of(root, name)
        sock = _connect(root) if id else None
    except OSError:
        return None
    if sock is None:
        return None
    with sock:
        message = {"op": "exec", "id": id, "process": process, "stdin": False, "tty": False, "detach": False}
        try:
            protocol.send_message(sock, {**message, "exec_id": None, "version": version})
            answer, _, rest = protocol.receive_message(sock)
        except ConnectionError:
            return None  # never read by a supervisor that has just left
        except EOFError:
            return _lost()
        if not answer.get("pid"):
            return None
        return _follow(sock, rest, int(answer["pid"]))


def _parse(words: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The container's name and the process as `Runtime.exec` takes it."""
    process: dict[str, Any] = {"args": [], "env": [], "cwd": None, "user": None, "privileged": False}
    left = list(words)
    while left and left[0].startswith("-"):
        flag, equals, value = left.pop(0).partition("=")
        key = _FLAGS.get(flag)
        if key is None or (equals and not flag.startswith("--")) or not (equals or left):
            return None
        value = value if equals else left.pop(0)
        if not value:
            return None
        if key != "env":
            process[key] = value
            continue
        own = os.environ.get(value)
        process["env"].append(value if "=" in value or own is None else f"{value}={own}")
        if value.startswith("="):
            return None
    if len(left) < 2:
        return None
    process["args"] = left[1:]
    return left[0], process


def _id_of(root: str, name: str) -> str | None:
    import _sqlite3 as sqlite3  # the package around it takes 6 ms to import, for conversions not needed here

    try:
        db = sqlite3.connect(f"file:{root}/labkernel.db?mode=ro", uri=True, timeout=1.0)
        try:
            rows = db.execute("SELECT id FROM containers WHERE id = ? OR name = ?", (name, name)).fetchmany(2)
            if not rows and set(name) <= _HEX:
                rows = db.execute("SELECT id FROM containers WHERE id >= ? AND id < ?", (name, name + "g")).fetchmany(2)
        finally:
            db.close()
    except sqlite3.Error:
        return None
    return str(rows[0][0]) if len(rows) == 1 else None


def _connect(root: str) -> socket.socket | None:
    """To the supervisor, if it is up and is ours. Raises OSError."""
    place = places.find_runtime_dir(root)
    if not places.is_private(place):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"{place}/supervisor.sock")
    except BaseException:
        sock.close()
        raise
    return sock


def _follow(sock: socket.socket, buffer: bytearray, pid: int) -> int:
    """Output to ours, signals to the command, until its end."""
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for caught in _FORWARDED:
        signal.signal(caught, lambda *_: None)
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(wake, select.POLLIN)
    interrupts = 0
    while True:
        for stream, data in protocol.take_frames(buffer):
            if stream == protocol.CONTROL:
                end = json.loads(data).get("exited")
                if end is not None:
                    return int(end["exit_code"])
            else:
                _write(stream, data)
        for fd, _ in poller.poll():
            if fd == wake:
                for number in os.read(wake, 512):
                    interrupts += number == signal.SIGINT
                    _kill(pid, int(signal.SIGKILL) if interrupts >= _PATIENCE else number)
            elif data := sock.recv(1 << 18):
                buffer += data
            else:
                return _lost()


def _lost() -> int:
    """As `runtime.client.SupervisorLost`."""
    os.write(2, b"labkernel: the connection to the supervisor was lost\nhint: the container itself goes on\n")
    return 1


def _write(stream: int, data: bytes) -> None:
    while data:
        data = data[os.write(stream, data) :]


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended by itself
