"""Health checks: the supervisor's rounds, what they survive, and their settings."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
from waiting import wait_until

from labkernel.commands.settings import healthcheck_of
from labkernel.display import status_words
from labkernel.engine import Engine
from labkernel.errors import UsageError
from labkernel.runtime import healthcheck


def plan(*args: str, **changes: Any) -> dict[str, Any]:
    times = {"interval_s": 0.05, "timeout_s": 60.0, "start_period_s": 0.0, "start_interval_s": 0.02, "retries": 2}
    return {"args": list(args), **times, **changes}


def until(lab: Any, id: str, test: Any) -> dict[str, Any]:
    """The container's health once `test` holds of it."""

    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = lab.runtime.states([id])[id].get("health") or {}
        return found if found and test(found) else None

    found: dict[str, Any] = wait_until(look)
    return found


def test_rounds(lab: Any) -> None:
    id = lab.create("sleep", "1000", healthcheck=plan("sh", "-c", "echo seen; echo err >&2; test -e /tmp/well"))
    lab.runtime.start(id)
    assert lab.runtime.states([id])[id]["health"]["Status"] == "starting"
    ill = until(lab, id, lambda health: health["Status"] == "unhealthy")
    assert ill["FailingStreak"] >= 2
    assert {(entry["ExitCode"], entry["Output"]) for entry in ill["Log"]} == {(1, "seen\nerr\n")}
    lab.runtime.exec(id, {"args": ["touch", "/tmp/well"]}).wait()
    well = until(lab, id, lambda health: health["Status"] == "healthy")
    assert well["FailingStreak"] == 0
    full = until(lab, id, lambda health: len(health["Log"]) == 5 and health["Log"][0]["ExitCode"] == 0)
    assert full["Log"] == sorted(full["Log"], key=lambda entry: entry["Start"])
    lab.runtime.stop(id, timeout_s=0)
    assert json.loads((lab.root / "containers" / id / "state.json").read_text())["health"]["Status"] == "unhealthy"


def test_failures_in_the_start_period_do_not_count(lab: Any) -> None:
    id = lab.create("sleep", "1000", healthcheck=plan("false", start_period_s=600.0, interval_s=600.0))
    lab.runtime.start(id)
    health = until(lab, id, lambda health: len(health["Log"]) >= 3)
    assert (health["Status"], health["FailingStreak"]) == ("starting", 0)


def test_one_that_takes_too_long_is_killed(lab: Any) -> None:
    check = plan("sh", "-c", "echo $$ >> /tmp/pids; echo slow; sleep 1000; true", timeout_s=2.0, retries=1)
    id = lab.create("sleep", "1000", healthcheck=check)
    lab.runtime.start(id)
    health = until(lab, id, lambda health: health["Status"] == "unhealthy")
    assert health["Log"][0]["ExitCode"] == -1
    assert health["Log"][0]["Output"] == "Health check exceeded timeout (2s): slow\n"
    until(lab, id, lambda health: len(health["Log"]) >= 2)
    attachment = lab.runtime.exec(id, {"args": ["sh", "-c", "ps | grep -c '[s]leep 1000'"]})
    # its own, and at most the one of the check that runs now
    assert int(b"".join(data for _, data in attachment)) <= 2


def test_a_check_that_cannot_be_started(lab: Any) -> None:
    id = lab.create("sleep", "1000", healthcheck=plan("/no/such", retries=1))
    lab.runtime.start(id)
    health = until(lab, id, lambda health: health["Status"] == "unhealthy")
    assert health["Log"][0]["ExitCode"] == -1
    assert "/no/such" in health["Log"][0]["Output"]


def test_it_goes_on_after_a_kill_and_kills_what_was_running(lab: Any) -> None:
    """The supervisor dies in the middle of a check."""
    check = plan("sh", "-c", "[ -e /tmp/fast ] && exit 0; echo > /tmp/begun; exec sleep 1000")
    id = lab.create("sleep", "999", healthcheck=check)
    lab.runtime.start(id)
    begun = lab.root / "containers" / id / "upper" / "tmp" / "begun"
    wait_until(begun.exists, "the first check")
    lab.runtime.exec(id, {"args": ["touch", "/tmp/fast"]}).wait()
    os.kill(lab.runtime.ensure().pid, signal.SIGKILL)
    health = until(lab, id, lambda health: health["Status"] == "healthy")
    assert {entry["ExitCode"] for entry in health["Log"]} == {0}
    text = b"".join(data for _, data in lab.runtime.exec(id, {"args": ["ps"]}))
    assert b"sleep 1000" not in text


def test_paused_containers_are_left_alone(lab: Any) -> None:
    id = lab.create("sleep", "1000", healthcheck=plan("true"))
    lab.runtime.start(id)
    until(lab, id, lambda health: health["Status"] == "healthy")
    lab.runtime.pause(id)
    before = lab.runtime.states([id])[id]["health"]["FailingStreak"]
    lab.runtime.unpause(id)
    last = lab.runtime.states([id])[id]["health"]["Log"][-1]["Start"]
    after = until(lab, id, lambda health: health["Log"][-1]["Start"] > last)
    assert before == after["FailingStreak"] == 0


def test_as_a_user_sees_it(engine: Engine) -> None:
    check = {"test": "test -e /well", "interval": 50_000_000, "retries": 1}
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True, healthcheck=check)
    wait_until(lambda: container.health == "unhealthy")
    assert container.status_line().endswith("(unhealthy)")
    assert engine.containers.list(filters={"health": "unhealthy"}) == [container]
    assert engine.containers.list(filters={"health": ["healthy", "none"]}) == []
    container.exec_run(["touch", "/well"])
    wait_until(lambda: container.health == "healthy")
    attrs = container.attrs
    assert attrs["State"]["Health"]["Status"] == "healthy"
    assert attrs["Config"]["Healthcheck"]["Test"] == ["CMD-SHELL", "test -e /well"]
    events = engine.events(since=0, until=time.time() + 0.3, decode=True, filters={"event": "health_status"})
    assert [event["Action"] for event in events if event["Actor"]["ID"] == container.id] == [
        "health_status: unhealthy",
        "health_status: healthy",
    ]
    with pytest.raises(UsageError, match="invalid filter 'health=ill'"):
        engine.containers.list(filters={"health": "ill"})


def test_settings() -> None:
    flags = {"health_cmd": "true", "health_interval": "1m30s", "health_retries": 4}
    assert healthcheck_of(flags) == {"test": ["CMD-SHELL", "true"], "interval": 90_000_000_000, "retries": 4}
    assert healthcheck_of({"no_healthcheck": True}) == {"test": ["NONE"]}
    with pytest.raises(UsageError, match="--no-healthcheck conflicts"):
        healthcheck_of({"no_healthcheck": True, "health_cmd": "true"})
    with pytest.raises(UsageError, match='"x" for "--health-timeout" flag: time: invalid duration'):
        healthcheck_of({"health_timeout": "x"})
    with pytest.raises(UsageError, match="less than 1ms"):
        healthcheck.check({"interval": 5})
    image = {"Healthcheck": {"Test": ["CMD", "a"], "Interval": 2_000_000_000}, "Shell": ["/bin/ash", "-c"]}
    own = {"healthcheck": healthcheck.check({"test": "b", "retries": 9})}
    made = healthcheck.plan(image, own)
    assert made is not None
    assert (made["args"], made["interval_s"], made["retries"]) == (["/bin/ash", "-c", "b"], 2.0, 9)
    assert healthcheck.plan(image, {"healthcheck": {"Test": ["NONE"]}}) is None
    state = {"status": "running", "started_at": time.time(), "health": {"Status": "starting"}}
    assert status_words(state).endswith("(health: starting)")
