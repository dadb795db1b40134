"""What clients may ask the supervisor: one function per request, all of the shape (supervisor, connection, message,
descriptors). An error raised here becomes the answer. `HANDLERS` is the whole list.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from ..errors import ConflictError, LabkernelError, NoSuchContainer, RuntimeFailure, UsageError
from ..linux import pty
from . import instances, networking, protocol, restarts
from .instances import Instance
from .leaving import leave
from .loop import Connection
from .streams import Follower, lend

Message = dict[str, Any]


def _answer(conn: Connection, **values: Any) -> None:
    conn.finish(protocol.encode_message({"ok": True, **values}))


def _follow(sup: Any, inst: Instance, conn: Connection, message: Message, *, from_start: bool) -> Follower:
    wants = {name for name in ("stdout", "stderr") if message.get(name, True)}
    follower = Follower(conn, inst.open_log(), wants, from_start=from_start)
    inst.followers.append(follower)
    tied = bool(message.get("tied"))

    def closed() -> None:
        sup.detach(inst, follower)
        if tied and inst.running:
            # Its owner died: nobody asked for it to live on.
            inst.stopping = True
            inst.own["auto_remove"] = bool(inst.own.get("auto_remove")) or not message.get("kept")
            inst.kill_all()

    conn.closed = closed
    takes_input = bool(message.get("stdin"))

    def frame(stream: int, data: bytes) -> None:
        nonlocal tied
        if takes_input and inst.awaits_input:
            inst.early.keep(frame, conn, stream, data)
        elif stream == protocol.STDIN and takes_input and inst.input is not None:
            inst.input.write(data, conn)
        elif stream == protocol.CONTROL:
            control = json.loads(data)
            tied = tied and not control.get("untie")
            if control.get("close_stdin") and takes_input and inst.input is not None:
                inst.input.half_close()
            if control.get("lend_stdin"):
                lend(inst.input if takes_input else None, conn)
            if control.get("resize"):
                _resize(inst, *control["resize"])

    conn.frame = frame
    return follower


def _resize(inst: Instance, rows: int, cols: int) -> None:
    if inst.master >= 0:
        pty.resize(inst.master, int(rows), int(cols))


def run(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.find(message["id"])
    if inst.running:
        raise ConflictError(f"container {inst.id[:12]} is already running")
    _follow(sup, inst, conn, message, from_start=False)
    sup.events.add("attach", inst.id)
    _start(sup, inst, conn)


def start(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    _start(sup, sup.find(message["id"]), conn)


def _start(sup: Any, inst: Instance, conn: Connection) -> None:
    restarts.cancel(inst)
    inst.state.update(restart_count=0, restart_tries=0)  # as docker: a start by hand counts anew
    try:
        sup.start(inst)
    except LabkernelError:
        inst.followers = [follower for follower in inst.followers if follower.conn is not conn]
        conn.closed = None
        sup.forget(inst)
        raise
    inst.starters.append(conn)


def attach(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.find(message["id"])
    over = not inst.running and inst.status == "exited" and not message.get("next_start")
    if over and not message.get("logs"):
        raise ConflictError("You cannot attach to a stopped container, start it first")
    sup.instances[inst.id] = inst
    answer = {"ok": True, "pid": inst.pid, "exec_at": inst.state["exec_at_monotonic"], "status": inst.status}
    conn.send(protocol.encode_message(answer))
    sup.events.add("attach", inst.id)
    follower = _follow(sup, inst, conn, message, from_start=bool(message.get("logs")))
    follower.catch_up()
    if over:
        inst.followers.remove(follower)
        follower.finish(protocol.encode_control({"exited": inst.end_state()}))
        sup.forget(inst)


def wait(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    condition = message.get("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise UsageError(f"invalid condition: {condition!r}")
    try:
        inst = sup.find(message["id"])
    except NoSuchContainer:
        ended = sup.exited.get(message["id"])
        if ended is None:
            raise
        _answer(conn, **ended)
        return
    if condition == "not-running" and not inst.running and inst.restart_timer is None:
        _answer(conn, **inst.end_state())
        return
    sup.instances[inst.id] = inst
    waiter = (conn, condition)
    inst.waiters.append(waiter)

    def closed() -> None:
        if waiter in inst.waiters:
            inst.waiters.remove(waiter)
        sup.forget(inst)

    conn.closed = closed


def kill(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.require_running(message["id"])
    number = int(message.get("signal") or signal.SIGKILL)
    if number not in signal.valid_signals():
        raise UsageError(f"invalid signal: {number}")
    sup.events.add("kill", inst.id, signal=str(number))
    if number == signal.SIGKILL:
        # As docker: the answer comes when it has ended, so that what follows finds it stopped.
        inst.stopping = True
        inst.enders.append(conn)
        conn.closed = lambda: inst.enders.remove(conn) if conn in inst.enders else None
        inst.kill_all()
    else:
        inst.signal(number)
        _answer(conn)


def stop(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.find(message["id"])
    if not inst.running:
        restarts.cancel(inst)
        _answer(conn, **inst.end_state())
        return
    _end(sup, inst, conn, message)


def _end(sup: Any, inst: Instance, conn: Connection, message: Message) -> None:
    inst.stopping = True
    inst.enders.append(conn)
    conn.closed = lambda: inst.enders.remove(conn) if conn in inst.enders else None
    timeout_s = message.get("timeout_s")
    if timeout_s is None:
        timeout_s = inst.own.get("stop_timeout_s", 10.0)
    number = int(message.get("signal") or inst.own.get("stop_signal") or signal.SIGTERM)
    if inst.status == "paused":
        _thaw(inst)
    inst.asked_to_stop = True
    sup.events.add("kill", inst.id, signal=str(number if timeout_s else int(signal.SIGKILL)))
    if timeout_s == 0:
        inst.kill_all()
        return
    inst.signal(number)
    if timeout_s > 0:
        inst.kill_timer = sup.loop.later(float(timeout_s), lambda: _lose_patience(sup, inst))


def _lose_patience(sup: Any, inst: Instance) -> None:
    if inst.running:
        sup.events.add("kill", inst.id, signal=str(int(signal.SIGKILL)))
        inst.kill_all()


def pause(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.require_running(message["id"])
    if inst.status == "paused":
        raise ConflictError(f"container {inst.id[:12]} is already paused")
    try:
        if inst.cgroup is None:
            raise OSError(95, "no freezer")
        inst.cgroup.freeze(timeout_s=1.0)
    except OSError:
        if inst.cgroup is not None:
            inst.cgroup.thaw()
        for pid in _tree(inst.pid):
            _send(pid, signal.SIGSTOP)
        inst.state["paused_by"] = "SIGSTOP"
    inst.state["status"] = "paused"
    inst.try_save()
    sup.events.add("pause", inst.id)
    _answer(conn)


def unpause(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.require_running(message["id"])
    if inst.status != "paused":
        raise ConflictError(f"container {inst.id[:12]} is not paused")
    _thaw(inst)
    sup.events.add("unpause", inst.id)
    _answer(conn)


def _thaw(inst: Instance) -> None:
    if inst.state.pop("paused_by", None):
        for pid in _tree(inst.pid):
            _send(pid, signal.SIGCONT)
    elif inst.cgroup is not None:
        inst.cgroup.thaw()
    inst.state["status"] = "running"
    inst.try_save()


def _tree(pid: int) -> list[int]:
    """A process and all below it (man 5 proc_pid_task, `children`)."""
    found = [pid]
    for parent in found:
        try:
            with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
        except OSError:
            continue
    return found


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def resize(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    _resize(sup.require_running(message["id"]), message["rows"], message["cols"])
    _answer(conn)


def remove(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    inst = sup.find(message["id"])
    restarts.cancel(inst)
    if inst.running and not message.get("force"):
        raise ConflictError(
            f"cannot remove container {inst.id[:12]}: container is running: stop the container before removing or "
            "force remove",
            resolution="stop it first, or remove it with force",
        )

    def gone(error: str | None) -> None:
        if error is None:
            _answer(conn)
        else:
            conn.finish(protocol.encode_message(RuntimeFailure(f"cannot remove: {error}").to_dict()))

    sup.instances[inst.id] = inst
    if inst.leaving:
        inst.waiters.append((conn, "removed"))
        return
    if not inst.running:
        sup.remove(inst, gone)
        return
    inst.stopping = True
    sup.events.add("kill", inst.id, signal=str(int(signal.SIGKILL)))
    if inst.auto_remove:
        inst.waiters.append((conn, "removed"))
    else:
        inst.own["auto_remove"] = True
        inst.waiters.append((conn, "removed"))
    inst.kill_all()


def update(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    """Other limits and another restart policy; config.json, which says the same, is the caller's to write."""
    inst = sup.find(message["id"])
    before = len(inst.cgroup.unenforced) if inst.cgroup is not None else 0
    if inst.running and inst.cgroup is not None:
        for resources in message["resources"]:
            inst.cgroup.limit(resources)
    if message["resources"]:
        linux = inst.config["linux"]
        kept = {key: linux["resources"][key] for key in ("devices",) if key in linux["resources"]}
        linux["resources"] = {**message["resources"][-1], **kept}
    if message.get("restart"):
        inst.own["restart"] = message["restart"]
    refused = inst.cgroup.unenforced[before:] if inst.cgroup is not None else ()
    _answer(conn, warnings=[f"{name} is not enforced: {reason}" for name, reason in refused])


def states(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    wanted = message.get("ids")
    if wanted is None:
        wanted = []
        for place in instances.PLACES:
            try:
                wanted += os.listdir(f"{sup.root}/{place}")
            except OSError:
                pass
    found = {}
    for container_id in wanted:
        inst = sup.instances.get(container_id)
        if inst is not None:
            found[container_id] = inst.state
            continue
        if "/" in container_id or container_id.startswith("."):
            continue
        directory = instances.directory_of(sup.root, container_id)
        state = instances.read_state(directory)
        if state is None and os.path.isdir(directory):
            state = instances.new_state(container_id)
        if state is not None:
            found[container_id] = state
    _answer(conn, states=found)


def info(sup: Any, conn: Connection, _message: Message, _fds: list[int]) -> None:
    _answer(
        conn,
        pid=os.getpid(),
        keeper_pid=sup.context.keeper_pid,
        version=protocol.VERSION,
        release=sup.settings.get("version") or "",
        started_at=sup.started_at,
        memory_bytes=_pss(),
        running=sum(inst.running for inst in sup.instances.values()),
        warm=len(sup.pool.waiting),
        cgroup_version=sup.hierarchy.version,
        id_map=sup.settings.get("id_map", "root"),
        driver=sup.settings["driver"],
    )


def _pss() -> int:
    """Proportional set size of this process in bytes (man 5 proc_pid_smaps); 0 when unknown."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def shutdown(sup: Any, conn: Connection, message: Message, _fds: list[int]) -> None:
    busy = [inst for inst in sup.instances.values() if inst.running]
    if busy and not message.get("force"):
        raise ConflictError(f"{len(busy)} containers are running")
    for inst in busy:
        inst.stopping = True
        inst.kill_all()
    for inst in list(sup.instances.values()):
        restarts.cancel(inst)

    def try_to_leave() -> None:
        if any(inst.running for inst in sup.instances.values()) or sup.chores:
            sup.loop.later(0.02, try_to_leave)
            return
        conn.send(protocol.encode_message({"ok": True}))
        if not leave(sup):
            sup.loop.later(0.05, try_to_leave)

    sup.loop.later(0.0, try_to_leave)


def execute(sup: Any, conn: Connection, message: Message, fds: list[int]) -> None:
    from .sessions import begin

    begin(sup, conn, message, fds)


def task(sup: Any, conn: Connection, message: Message, fds: list[int]) -> None:
    from .worker import hand_over

    hand_over(sup, conn, message, fds)


def upgrade(sup: Any, conn: Connection, message: Message, fds: list[int]) -> None:
    from .takeover import hand_over

    hand_over(sup, conn, message, fds)


HANDLERS: dict[str, Callable[[Any, Connection, Message, list[int]], None]] = {
    "run": run,
    "start": start,
    "attach": attach,
    "exec": execute,
    "wait": wait,
    "kill": kill,
    "stop": stop,
    "pause": pause,
    "unpause": unpause,
    "resize": resize,
    "remove": remove,
    "states": states,
    "update": update,
    "info": info,
    "shutdown": shutdown,
    "task": task,
    "upgrade": upgrade,
    "network": networking.request,
}
