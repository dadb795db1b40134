"""cgroup version 2, whatever this machine has: the engine in a virtual machine with the distribution's kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from innerengine import Context

from labkernel.engine import Engine

TIMEOUT_S = 900


@pytest.fixture(scope="module")
def machine(shared_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with Python and this code; skips where there is no virtual machine or nothing to make it of."""
    program = Path(__file__).with_name("inside_cgroup2.py")
    return Context(shared_engine, tmp_path_factory.mktemp("machine"), program).build("machine")


@pytest.fixture(scope="module")
def found(shared_engine: Engine, machine: str) -> dict[str, Any]:
    command = ["python3", "/lab/inside_cgroup2.py"]
    result = shared_engine.vms.run(machine, command, mem_limit="1g", remove=True, cold=True, timeout_s=TIMEOUT_S)
    assert result.exit_code == 0, result.stderr.decode()
    answers: dict[str, Any] = json.loads(result.stdout)
    return answers


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_every_limit_is_the_kernels(found: dict[str, Any]) -> None:
    assert {found["driver"][name] for name in ("memory", "cpu", "pids", "freezer", "devices", "blkio")} == {"kernel"}
    group, memory, cpu, pids, closed, _ = found["limits"]
    assert (group, memory, cpu, pids, closed) == ("0::/", str(64 << 20), "50000 100000", "50", "read-only")
    assert found["updated"] == str(48 << 20)
    assert found["stats"] == [True, 48 << 20, 42]


def test_memory_and_processes_stay_inside(found: dict[str, Any]) -> None:
    assert found["oom"] == [137, True]
    assert "can't fork" in found["fork"]


def test_devices_are_out_of_reach(found: dict[str, Any]) -> None:
    """Without a devices controller it is a BPF program that denies them."""
    denied, allowed = found["device"].strip().splitlines()
    assert "not permitted" in denied
    assert allowed.strip() == "1"


def test_freezing_and_killing_are_the_groups(found: dict[str, Any]) -> None:
    assert found["frozen"] == ["paused", True]
    assert found["exec"] == [3, "0::/\n"]
    assert found["groups"] == []
    assert found["problems"] == []
