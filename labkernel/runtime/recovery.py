"""What a new supervisor does first: take over the containers of the one before it."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from ..errors import LabkernelError
from ..linux.files import read_file
from ..linux.waiting import readable
from . import denials, health, instances, networking, owners, restarts, sessions
from .instances import Instance
from .streams import InputPipe


def recover(sup: Any) -> None:
    """Adopt what the keeper holds; settle what state.json claims to run and no longer does; drop left-over cgroups."""
    held = sup.context.held
    sup.context.parents |= read_parents(sup.runtime_dir)
    logs = {}
    for container_id in held:
        try:
            logs[container_id] = instances.load(sup.root, container_id).open_log()
        except (LabkernelError, OSError):
            continue
    sup.journal.repair(logs)
    for log in logs.values():
        log.close()
    for container_id, entry in list(held.items()):
        if container_id.startswith("exec:"):
            sessions.adopt(sup, entry)
            continue
        _adopt(sup, container_id, entry)
    _settle(sup)
    networking.recover(sup)
    if sup.context.parents:
        _sweep_later(sup, 50)


def _adopt(sup: Any, container_id: str, entry: dict[str, Any]) -> None:
    try:
        inst = instances.load(sup.root, container_id)
    except LabkernelError:
        return
    ended = inst.status in ("exited", "dead", "restarting")
    # Killed before this start could be written down: what is on disk is of an earlier run.
    begun = inst.state.pop("starting", None) is not None and bool(entry["state"].get("pid"))
    if ended and not begun and inst.state.get("finished_at", 0) >= entry["state"].get("started_at", 0):
        # Its end was recorded and nobody was told; those who ask again read it from disk.
        sup.put_off(lambda: _forget_ended(sup, inst, container_id))
        return
    if begun or inst.status == "created":
        inst.state.update(entry["state"])
        inst.state["status"] = "running"
        inst.state["started_at"] = time.time() if begun else inst.state["started_at"] or time.time()
    inst.cgroup = _reopen_cgroup(inst)
    pid = inst.pid
    try:
        inst.pidfd = os.pidfd_open(pid)
    except OSError:
        inst.pidfd = -1
    _adopt_streams(sup, inst, entry["fds"])
    inst.open_log()
    sup.instances[container_id] = inst
    sup.note_parent(inst.own.get("cgroup_parent") or "")
    if inst.pidfd < 0 or (inst.state["pid_start"] and instances.process_start(pid) != inst.state["pid_start"]):
        _adopt_ended(sup, inst, pid)
        return
    health.resume(sup, inst)
    inst.try_save()
    sup.watch_streams(inst)


def _adopt_ended(sup: Any, inst: Instance, pid: int) -> None:
    """It has ended and is reaped. The keeper has told its exit code, or the word is still on its way."""
    inst.close_pidfds()
    inst.pidfd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def settle() -> None:
        if inst.pidfd >= 0 and inst.pid == pid:
            code = sup.context.exits.get(pid)
            if code is None:
                inst.state["error"] = "the exit status was lost: supervisor and keeper were both killed"
            sup.finish(inst, 255 if code is None else code, own_child=False)

    sup.orphans[pid] = lambda code: sup.finish(inst, code, own_child=False)
    sup.loop.later(0.0 if pid in sup.context.exits else 2.0, settle)


def _adopt_streams(sup: Any, inst: Instance, fds: dict[str, int]) -> None:
    for name, fd in fds.items():
        if name == "stdin":
            os.set_blocking(fd, False)
            inst.input = InputPipe(sup.loop, fd, shared=False)
        elif name == "denials":
            inst.denials = denials.Listener(sup, inst, fd)
        elif name == "owners":
            inst.owners = owners.Listener(sup, inst, fd)
        elif name == "master":
            inst.master = fd
            inst.outputs[fd] = "stdout"
            inst.input = InputPipe(sup.loop, fd, shared=True)
        else:
            inst.outputs[fd] = name


def _reopen_cgroup(inst: Instance) -> Any:
    from ..linux.cgroups import Cgroup

    paths = (inst.state.get("cgroup") or {}).get("paths") or {}
    return Cgroup.reopen(paths) if paths else None


def _forget_ended(sup: Any, inst: Instance, container_id: str) -> None:
    sup.tell_keeper({"drop": container_id})
    entry = sup.context.held.pop(container_id, None)
    for fd in (entry or {}).get("fds", {}).values():
        os.close(fd)
    cgroup = _reopen_cgroup(inst)
    if cgroup is not None:
        cgroup.remove(timeout_s=0.05)
    if inst.status == "restarting":
        restarts.resume(sup, inst)
    elif inst.auto_remove:
        # A client that waited at the killed supervisor comes back within moments and still finds the status.
        sup.loop.later(3.0, lambda: sup.remove(inst))


def _settle(sup: Any) -> None:
    """After a reboot, or when keeper and supervisor were killed together: nothing of it runs under us any more."""
    for place in instances.PLACES:
        folder = f"{sup.root}/{place}"
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            if name not in sup.instances and name not in sup.context.held:
                _settle_one(sup, name, folder)


def _settle_one(sup: Any, name: str, folder: str) -> None:
    state = instances.read_state(f"{folder}/{name}")
    if state is None or ("starting" not in state and state["status"] not in ("running", "paused", "restarting")):
        return
    try:
        inst = instances.load(sup.root, name)
    except LabkernelError:
        return
    if "starting" in inst.state:
        _end_start(inst)
        if inst.auto_remove:
            sup.put_off(lambda: sup.remove(inst))
            return
        if inst.status not in ("running", "paused", "restarting"):
            return
    if _runs(inst):
        _adopt(sup, name, {"state": {}, "fds": {}})
        return
    if inst.status == "restarting":
        restarts.resume(sup, inst)
        return
    inst.cgroup = _reopen_cgroup(inst)
    inst.kill_rest()
    inst.state.update(status="exited", pid=0, exit_code=255, finished_at=time.time())
    inst.state["error"] = "keeper and supervisor were gone when it ended"
    if inst.auto_remove:
        # Not written down: were this supervisor killed before the removal, its successor would take it for kept.
        inst.leaving = True
        sup.instances[name] = inst
        sup.put_off(lambda: sup.remove(inst))
        return
    inst.try_save()
    if restarts.is_due(inst):
        restarts.resume(sup, inst)


def _end_start(inst: Instance) -> None:
    """A start that nobody was told of: its process, which may have come to its exec alone, is ended, and the
    container is again what it was before."""
    pid, pid_start = inst.state.pop("starting")
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        pidfd = -1
    if pidfd >= 0:
        if _lives(pid, pid_start):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            readable(pidfd, timeout_s=5.0)  # its files must be at rest before it can be started again
        os.close(pidfd)
    inst.try_save()


def _runs(inst: Instance) -> bool:
    return _lives(inst.pid, inst.state["pid_start"])


def _lives(pid: int, pid_start: int) -> bool:
    """A first process is there, and more than a zombie that somebody else's process 1 does not reap."""
    if not pid or not pid_start or instances.process_start(pid) != pid_start:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def write_parents(runtime_dir: str, parents: set[str]) -> None:
    """Write the parents of control groups to a file that, as the groups do, lasts until the machine's next start."""
    path = f"{runtime_dir}/cgroups"
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(sorted(parents), file)
    os.rename(temporary, path)


def read_parents(runtime_dir: str) -> set[str]:
    """What `write_parents` wrote, by supervisors before this one."""
    try:
        return set(json.loads(read_file(f"{runtime_dir}/cgroups")))
    except FileNotFoundError:
        return set()


def _sweep_later(sup: Any, tries: int) -> None:
    def sweep() -> None:
        if not sweep_cgroups(sup) and tries:
            sup.loop.later(0.1, lambda: _sweep_later(sup, tries - 1))

    sup.put_off(sweep)


def sweep_cgroups(sup: Any) -> bool:
    """Remove groups no container uses (a killed supervisor's waiting children had them); False while one is busy."""
    used = {
        path
        for inst in sup.instances.values()
        for path in ((inst.state.get("cgroup") or {}).get("paths") or {}).values()
        if inst.running
    }
    used |= {path for warm in sup.pool.waiting if warm.cgroup is not None for path in warm.cgroup.directories}
    clean = True
    for parent in sup.context.parents:
        for base in dict.fromkeys(sup.hierarchy.bases.values()):
            folder = f"{base}/{parent.strip('/')}"
            for path in _folders(folder):
                if path not in used:
                    clean = _try_rmdir(path) and clean
    return clean


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _try_rmdir(path: str) -> bool:
    for inner in _folders(path):
        _try_rmdir(inner)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True
