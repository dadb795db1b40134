"""Restart policies: whether a container that has ended is started again, and after which wait.

While it waits its status is `restarting`, also on disk, so that a supervisor that takes over knows. Docker's rules:
the wait doubles from 100 ms to a minute and begins anew once the container has run for ten seconds; who stops a
container by hand ends it. Standard library only.
"""

from __future__ import annotations

import time
from typing import Any

from ..errors import LabkernelError
from . import protocol
from .instances import Instance

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 60.0
_STEADY_S = 10.0


def plan(sup: Any, inst: Instance) -> bool:
    """Set the timer of a container that has just ended; False when it is not to be started again."""
    state = inst.state
    if not is_due(inst):
        return False
    state["restart_count"] = int(state.get("restart_count") or 0) + 1
    steady = state["finished_at"] - state["started_at"] >= _STEADY_S
    state["restart_tries"] = tries = 1 if steady else int(state.get("restart_tries") or 0) + 1
    state["status"] = "restarting"
    inst.try_save()
    wait_s = min(_FIRST_WAIT_S * 2 ** min(tries - 1, 16), _LONGEST_WAIT_S)
    inst.restart_timer = sup.loop.later(wait_s, lambda: _restart(sup, inst))
    return True


def is_due(inst: Instance) -> bool:
    """What its policy says to the end it had; nobody stopped it by hand."""
    if inst.stopping or not inst.state["started_at"]:
        return False
    rule = inst.own.get("restart") or {}
    name, limit = rule.get("name") or "no", int(rule.get("max_retries") or 0)
    if name == "no" or inst.auto_remove:
        return False
    if name == "on-failure":
        count = int(inst.state.get("restart_count") or 0)
        return inst.state["exit_code"] != 0 and (not limit or count < limit)
    return True


def cancel(inst: Instance) -> bool:
    """It is stopped, removed or started by hand: forget the timer. Whether there was one."""
    timer, inst.restart_timer = inst.restart_timer, None
    if timer is None:
        return False
    timer.cancel()
    inst.state["status"] = "exited"
    inst.try_save()
    return True


def resume(sup: Any, inst: Instance) -> None:
    """A container whose wait, or whose run, ended with its supervisor (a kill, a machine switched off)."""
    inst.state["status"] = "restarting"
    inst.try_save()
    sup.instances[inst.id] = inst
    inst.restart_timer = sup.loop.later(_FIRST_WAIT_S, lambda: _restart(sup, inst))


def _restart(sup: Any, inst: Instance) -> None:
    inst.restart_timer = None
    try:
        sup.start(inst)
    except LabkernelError as err:
        inst.state.update(status="exited", error=err.brief, finished_at=time.time())
        inst.try_save()
        for conn, _ in list(inst.waiters):
            conn.finish(protocol.encode_message({"ok": True, **inst.end_state()}))
        inst.waiters = []
        sup.forget(inst)
