"""After an upgrade: a supervisor of the new version takes the old one's containers over.

Every request names the version of its client. A supervisor that is asked by a newer client answers "upgrade" when this
interrupts nobody (no attached client, no start, stop or restart under way), and goes on serving otherwise; the client
then sends its own settings and repeats its request. When nothing runs, the old supervisor just leaves and the client
starts a new one. When containers run, it hands them to the keeper as if it had been killed, and the keeper replaces
its own program by the new version (exec: same process, so it stays the containers' parent and subreaper, and in the
same namespaces), having tried first that the new code can be loaded. What the keeper holds travels as inherited
descriptors and one JSON file in memory. An older client is served by a newer supervisor. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import time
from typing import Any

from ..linux import mounts
from . import protocol
from .leaving import leave
from .loop import Connection

_TRY_S = 20.0


def is_newer(theirs: Any, ours: Any) -> bool:
    """Whether version `theirs` ("1.10.0") is newer than `ours`; what cannot be read is not."""
    return _numbers(theirs) > _numbers(ours) > []


def _numbers(version: Any) -> list[int]:
    found = []
    for part in str(version or "").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return found


def is_due(sup: Any, message: dict[str, Any]) -> bool:
    """Whether this request comes from a newer client, and a change of the supervisor is possible and unnoticed now."""
    ours = sup.settings.get("refused") or sup.settings.get("version")
    if message.get("version") == ours:
        return False  # nearly always
    if not is_newer(message.get("version"), ours) or message.get("op") in ("info", "shutdown", "upgrade"):
        return False
    return _interrupts_nobody(sup)


def _interrupts_nobody(sup: Any) -> bool:
    """Whether a change of the supervisor would go unnoticed now: those who only wait come back by themselves."""
    if sup.chores or any(session.conn is not None for session in sup.sessions.values()):
        return False
    return not any(
        inst.setup is not None
        or inst.starters
        or inst.enders
        or inst.followers
        or inst.leaving
        or inst.restart_timer is not None
        or (inst.waiters and not inst.running)
        for inst in sup.instances.values()
    )


def hand_over(sup: Any, conn: Connection, message: dict[str, Any], _fds: list[int]) -> None:
    """The request "upgrade": {settings, argv}. Its answer is no promise: the client repeats what it wanted."""
    settings = message["settings"]
    if not is_newer(settings.get("version"), sup.settings.get("version")) or not _interrupts_nobody(sup):
        conn.finish(protocol.encode_message({"ok": True}))
        return
    if not sup.instances and not sup.sessions:
        conn.send(protocol.encode_message({"ok": True}))
        leave(sup)  # returns when another client is just coming: then the old one serves it
        return
    kept = {name: sup.settings[name] for name in ("driver", "id_map", "subids") if name in sup.settings}
    sup.pool.discard()
    sup.entrance.discard()
    if sup.worker is not None:
        sup.worker.dismiss()
    sup.tell_keeper({"succeed": {"settings": {**settings, **kept}, "argv": message["argv"]}})
    conn.send(protocol.encode_message({"ok": True}))
    os._exit(0)


def succeed(context: Any, plan: dict[str, Any]) -> None:
    """In the keeper, whose supervisor has left: become the new version. Returns when that is not possible, which is
    remembered, so that the same version is not tried at every request."""
    argv = [str(word) for word in plan["argv"]]
    context.settings["refused"] = plan["settings"].get("version")
    if not _can_load(argv):
        sys.stderr.write(f"the new version cannot be loaded, the old one goes on: {argv[0]}\n")
        sys.stderr.flush()
        return
    from . import init

    state = {
        "settings": plan["settings"],
        "listener": context.listener.fileno(),
        "held": context.held,
        "exits": context.exits,
        "spent": context.spent,
        "parents": sorted(context.parents),
        "files_soft": init.soft_limit_before(),
    }
    memory = os.memfd_create("labkernel-takeover")
    os.write(memory, protocol.dumps(state))
    fds = [memory, context.listener.fileno(), *(fd for entry in context.held.values() for fd in entry["fds"].values())]
    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    try:
        held = mounts.open_program(argv[0], plan["settings"]["driver"])
        program = argv[0] if held is None else f"/proc/self/fd/{held}"
        os.execv(program, [*argv, str(memory), plan["settings"]["root"]])
    except OSError as err:
        sys.stderr.write(f"the new version cannot be started, the old one goes on: {argv[0]}: {err.strerror}\n")
        sys.stderr.flush()
    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    os.close(memory)


def _can_load(argv: list[str]) -> bool:
    try:
        pid = os.posix_spawn(argv[0], [*argv, "try"], dict(os.environ))
    except OSError:
        return False
    deadline = time.monotonic() + _TRY_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.005)


def main() -> None:
    """Entry of the new version: argv[1] is "try" (load everything, leave) or the descriptor of the old one's state."""
    from ..linux import syscalls
    from . import init, keeper, recovery, requests, sessions, supervisor, worker  # noqa: F401 - forked, not used here

    if sys.argv[1] == "try":
        os._exit(0)
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        file.seek(0)
        state = json.loads(file.read())
    listener = socket.socket(fileno=state["listener"])
    fcntl.fcntl(listener.fileno(), fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    context = keeper.Context(state["settings"], listener)
    context.held = state["held"]
    context.exits = {int(pid): code for pid, code in state["exits"].items()}
    context.spent = {int(pid): figures for pid, figures in state.get("spent", {}).items()}
    context.parents = set(state["parents"])
    for entry in context.held.values():
        for fd in entry["fds"].values():
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    syscalls.set_title(f"labkernel supervisor of {state['settings']['root']}".encode())
    init.raise_descriptor_limit(state["files_soft"])
    supervisor.freeze()
    keeper.tend(context)
