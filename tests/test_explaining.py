"""`container explain`, and the system calls a container's filter denied."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import StartError
from labkernel.linux import seccomp
from labkernel.running.explaining import explain


@pytest.fixture
def lab(engine: Engine) -> Engine:
    if engine.driver.name == "proot":
        pytest.skip("PRoot takes one step")
    return engine


def test_before_a_start(lab: Engine) -> None:
    container = lab.containers.create(
        "busybox", ["true"], mem_limit="64m", cap_add=["NET_ADMIN"], tmpfs={"/scratch": ""}, network_mode="none"
    )
    steps = explain(container)
    keys = [step.key for step in steps]
    order = ["namespaces", "cgroup", "network", "kernel file systems", "mounts", "pivot_root", "privileges", "exec"]
    assert [key for key in keys if key in order] == order
    assert {step.outcome for step in steps} == {""}
    assert "CLONE_NEWPID" in steps.text
    assert "more than docker's: CAP_NET_ADMIN" in steps.text
    assert "tmpfs  tmpfs on /scratch" in steps.text
    if lab.driver.cgroups.get("memory") == "kernel":
        assert "= 67108864" in steps.text
    assert all(step.pages for step in steps)


@pytest.mark.parametrize(
    ("settings", "command", "key"),
    [
        ({"user": "nobody-here"}, "true", "user"),
        ({}, "/no/such/program", "exec"),
        ({"working_dir": "/etc/passwd"}, "true", "working directory"),
    ],
)
def test_the_step_that_was_denied(lab: Engine, settings: dict[str, str], command: str, key: str) -> None:
    container = lab.containers.create("busybox", [command], **settings)
    with pytest.raises(StartError):
        container.start()
    steps = explain(container)
    outcomes = [step.outcome for step in steps]
    at = outcomes.index("denied")
    assert steps[at].key == key
    assert set(outcomes[:at]) == {"done"}
    assert set(outcomes[at + 1 :]) <= {"not reached"}
    assert "DENIED: " in steps.text


def test_denied_system_calls_are_counted_and_named(lab: Engine, needs: Callable[..., None]) -> None:
    needs("seccomp", "libseccomp")
    script = "for i in 1 2 3; do unshare -U true; done 2>&1; sleep 1000"
    container = lab.containers.run("busybox", ["sh", "-c", script], detach=True, count_denials=True)
    wait_until(lambda: container.attrs["Labkernel"]["DeniedSystemCalls"].get("unshare") == 3)
    assert container.attrs["Labkernel"]["DeniedSystemCalls"] == {"unshare": 3}
    assert container.logs().count(b"Operation not permitted") == 3
    assert "     3 unshare" in explain(container).text


def test_counting_goes_on_after_a_kill(fresh_engine: Engine, needs: Callable[..., None]) -> None:
    needs("seccomp", "libseccomp")
    script = "while ! [ -e /go ]; do sleep 0.05; done; unshare -U true; echo refused; sleep 1000"
    container = fresh_engine.containers.run("busybox", ["sh", "-c", script], detach=True, count_denials=True)
    os.kill(fresh_engine.runtime.ensure().pid, signal.SIGKILL)
    container.exec_run(["touch", "/go"])
    wait_until(lambda: container.attrs["Labkernel"]["DeniedSystemCalls"])
    assert container.attrs["Labkernel"]["DeniedSystemCalls"] == {"unshare": 1}


def test_only_refusals_ask() -> None:
    refuse, other, allow = (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7FFF0000)
    import struct

    program = b"".join(struct.pack("=HBBI", *line) for line in (refuse, other, allow, (0x15, 0, 1, 0x00050001)))
    values = [value for _, _, _, value in struct.iter_unpack("=HBBI", seccomp._asking(program))]
    assert values == [0x7FC00000, 0x00050026, 0x7FFF0000, 0x00050001]
