"""Health checks: the supervisor runs a command in the container again and again and keeps what came of it.

A timer and an exec session per check, no thread. The outcome is part of the container's state (`health`, docker's
State.Health), so it survives this process; a check that was running when a supervisor was killed is killed by the next
one and repeated. Rules are docker's: `starting` until the first success or until `retries` failures in a row; failures
within the start period do not count. Source: Docker documentation, HEALTHCHECK. Standard library only.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from .instances import Instance
from .logs import timestamp
from .sessions import Session

_KEPT = 5
_OUTPUT_BYTES = 4096


def begin(sup: Any, inst: Instance) -> None:
    """The container has started."""
    if inst.own.get("healthcheck"):
        inst.state["health"] = {"Status": "starting", "FailingStreak": 0, "Log": []}
        inst.health = Monitor(sup, inst)
    else:
        inst.state.pop("health", None)


def resume(sup: Any, inst: Instance) -> None:
    """A supervisor has taken the running container over."""
    if inst.own.get("healthcheck") and inst.state.get("health"):
        inst.health = Monitor(sup, inst)
    elif inst.own.get("healthcheck"):
        begin(sup, inst)


def end(inst: Instance) -> None:
    """The container has ended. As docker, one that is not checked any more counts as unhealthy."""
    monitor, inst.health = inst.health, None
    if monitor is not None:
        monitor.stop()
        inst.state["health"]["Status"] = "unhealthy"


class Monitor:
    """The checks of one running container; at most one runs at a time."""

    def __init__(self, sup: Any, inst: Instance) -> None:
        self.sup = sup
        self.inst = inst
        self.plan: dict[str, Any] = inst.own["healthcheck"]
        self.probe: Session | None = None
        self.output = bytearray()
        self.began_ns = 0
        self.timer = sup.loop.later(self._pause_s(), self._check)

    def stop(self) -> None:
        self.timer.cancel()
        self.probe = None

    def _pause_s(self) -> float:
        starting = self.inst.state["health"]["Status"] == "starting" and self._is_new()
        return float(self.plan["start_interval_s" if starting else "interval_s"])

    def _is_new(self) -> bool:
        return time.time() - float(self.inst.state["started_at"]) < float(self.plan["start_period_s"])

    def _check(self) -> None:
        if self.inst.status == "paused":
            self.timer = self.sup.loop.later(self._pause_s(), self._check)
            return
        self.output.clear()
        self.began_ns = time.time_ns()
        message = {"process": {"args": list(self.plan["args"])}}
        probe = self.probe = Session(self.sup, self.inst, None, message)
        probe.on_output = self._take
        probe.on_end = lambda code, error: self._ended(probe, code, error)
        self.timer = self.sup.loop.later(float(self.plan["timeout_s"]), self._give_up)
        try:
            probe.begin()
        except OSError as err:
            self._ended(probe, -1, err.strerror or str(err))

    def _take(self, data: bytes) -> None:
        if len(self.output) <= _OUTPUT_BYTES:
            self.output += data

    def _text(self) -> str:
        text = bytes(self.output[:_OUTPUT_BYTES]).decode(errors="replace")
        return f"{text}..." if len(self.output) > _OUTPUT_BYTES else text

    def _give_up(self) -> None:
        probe, self.probe = self.probe, None
        if probe is not None and probe.pid:
            kill_group(probe.pid)
        said = self._text()
        text = f"Health check exceeded timeout ({_duration(self.plan['timeout_s'])})"
        self._note(-1, f"{text}: {said}" if said else text)

    def _ended(self, probe: Session, code: int, error: str) -> None:
        if probe is self.probe:
            self.probe = None
            self.timer.cancel()
            self._note(-1 if error else code, error or self._text())

    def _note(self, code: int, output: str) -> None:
        if self.inst.health is not self:
            return
        health = self.inst.state["health"]
        before = health["Status"]
        entry = {"Start": timestamp(self.began_ns), "End": timestamp(), "ExitCode": code, "Output": output}
        health["Log"] = [*health["Log"][1 - _KEPT :], entry]
        if code == 0:
            health.update(Status="healthy", FailingStreak=0)
        elif before != "starting" or not self._is_new():
            health["FailingStreak"] += 1
            if health["FailingStreak"] >= int(self.plan["retries"]):
                health["Status"] = "unhealthy"
        self.inst.try_save()
        if health["Status"] != before:
            self.sup.events.add(f"health_status: {health['Status']}", self.inst.id)
        self.timer = self.sup.loop.later(self._pause_s(), self._check)


def kill_group(pid: int) -> None:
    """SIGKILL to an exec and what it started: it leads a session of its own."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _duration(seconds: float) -> str:
    """As Go words it: `30s`, `1m0s`, `500ms`."""
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return "".join([f"{hours}h" if hours else "", f"{minutes}m" if hours or minutes else "", f"{rest:g}s"])
