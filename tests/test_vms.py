"""Images as virtual machines, through the engine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from labkernel.engine import Engine
from labkernel.errors import ConflictError, NoSuchImage, NoSuchVM, StartError, UsageError, VMError
from labkernel.metrics import Sampler
from labkernel.vms import VM, VMResult

IMAGE = "lab/busybox"
MEMORY = "128m"


@pytest.fixture
def lab(engine: Engine, needs: Callable[..., None]) -> Engine:
    needs("vm qemu", "vm init", "vm mke2fs", "vm kernel")
    return engine


def test_the_same_image_and_command_with_a_kernel_of_its_own(lab: Engine) -> None:
    live: list[tuple[str, bytes]] = []
    result = lab.vms.run(
        IMAGE,
        ["sh", "-c", "uname -r; id -u; pwd; echo $A; echo err >&2; exit 5"],
        mem_limit=MEMORY,
        environment={"A": "b"},
        user="nobody",
        working_dir="/tmp/new",
        on_output=lambda stream, data: live.append((stream, data)),
    )
    assert result.exit_code == 5
    assert result.stdout.decode().split() == [result.kernel, "65534", "/tmp/new", "b"]
    assert result.stderr == b"err\n"
    assert b"".join(data for stream, data in live if stream == "stdout") == result.stdout
    assert 0 < result.timings["ready_s"] < result.timings["exec_s"] < result.timings["wall_s"]
    assert result.usage.cpu_s > 0
    assert result.usage.peak_rss_bytes > 16 << 20
    assert result.usage.inside["maxrss_kib"] > 0
    assert result.disk_bytes > 0
    assert result.accelerator in ("kvm", "tcg")
    assert result.accelerator_reason


def test_a_string_is_split_and_cold_is_said(lab: Engine) -> None:
    result = lab.vms.run(IMAGE, "echo 'a b' c", mem_limit=MEMORY, cold=True)
    assert (result.stdout, result.start) == (b"a b c\n", "cold")
    assert "TCG" in repr(result) or "KVM" in repr(result)
    assert "<table" in result._repr_html_()


def test_stdin_comes_back(lab: Engine) -> None:
    data = os.urandom(300_000)
    assert lab.vms.run(IMAGE, ["cat"], mem_limit=MEMORY, stdin=data).stdout == data


def test_a_sampler_follows_the_machine_from_its_start(lab: Engine) -> None:
    with Sampler(hz=50) as sampler:
        result = lab.vms.run(IMAGE, "sleep 0.5", mem_limit=MEMORY, on_start=lambda vm: sampler.add(vm, name="vm"))
        series = sampler.series("vm")
    assert series.kind == "vm"
    assert series.samples
    assert max(sample.memory_bytes for sample in series.samples) <= result.usage.peak_rss_bytes


def test_a_started_machine_runs_more_commands_and_stops(lab: Engine) -> None:
    vm = lab.vms.start(IMAGE, ["sh", "-c", "echo hello; sleep 1000"], name="box", mem_limit=MEMORY)
    try:
        assert vm.status == "running"
        assert lab.vms.get("box") is vm
        assert vm in lab.vms.list()
        assert vm.exec_run(["sh", "-c", "echo out; exit 4"]) == (4, b"out\n")
        with pytest.raises(StartError):
            vm.exec_run("nosuch")
        sample = vm.sample()
        assert sample is not None
        assert sample.memory_bytes > 0
        assert vm.inside()["memory_total_kib"] < 128 * 1024
        with pytest.raises(ConflictError, match="already in use"):
            lab.vms.start(IMAGE, "true", name="box", mem_limit=MEMORY)
        vm.stop(timeout=5)
        assert vm.logs() == b"hello\n"
        assert (vm.status, vm.pid, vm.sample()) == ("exited", None, None)
        assert vm.wait()["StatusCode"] == vm.exit_code
        with pytest.raises(ConflictError, match="not running"):
            vm.exec_run("true")
    finally:
        lab.vms.remove(vm)
    with pytest.raises(NoSuchVM):
        lab.vms.get("box")


def test_a_machine_ends_with_its_command(lab: Engine) -> None:
    vm = lab.vms.start(IMAGE, ["sh", "-c", "echo done; exit 7"], mem_limit=MEMORY)
    try:
        assert vm.wait(60) == {"StatusCode": 7}
        result = vm.result()
        assert isinstance(result, VMResult)
        assert result.stdout == b"done\n"
        assert "exited" in vm._repr_html_()
    finally:
        lab.vms.remove(vm)


def test_an_interrupt_ends_the_machine(lab: Engine) -> None:
    seen: list[VM] = []

    def interrupt(_stream: str, _data: bytes) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lab.vms.run(
            IMAGE, ["sh", "-c", "echo up; sleep 1000"], mem_limit=MEMORY, on_output=interrupt, on_start=seen.append
        )
    assert seen[0].pid is None
    assert seen[0].status == "exited"
    assert lab.vms.list() == []


def test_a_machine_that_is_killed_under_a_run_is_an_error(lab: Engine) -> None:
    def kill(vm: VM) -> None:
        def when_running() -> None:
            while vm.status != "running":
                threading.Event().wait(0.01)
            vm.kill()

        threading.Thread(target=when_running).start()

    with pytest.raises(VMError, match="ended before its command"):
        lab.vms.run(IMAGE, "sleep 1000", mem_limit=MEMORY, on_start=kill)


def test_a_time_limit_ends_the_machine(lab: Engine) -> None:
    with pytest.raises(VMError, match="did not end within"):
        lab.vms.run(IMAGE, "sleep 1000", mem_limit=MEMORY, timeout_s=3)
    assert lab.vms.list() == []


@pytest.mark.parametrize(("command", "code"), [("nosuch", 127), ("/etc", 126), ("/etc/passwd", 126)])
def test_what_cannot_be_started_has_dockers_exit_codes(lab: Engine, command: str, code: int) -> None:
    with pytest.raises(StartError) as caught:
        lab.vms.run(IMAGE, [command], mem_limit=MEMORY)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mem_limit": "32m"}, "a guest kernel needs at least"),
        ({"mem_limit": "much"}, "invalid size"),
        ({"cpus": 0}, "whole processors"),
        ({"cpus": 0.5}, "whole processors"),
        ({"ports": {}}, "unknown setting"),
        ({"name": "-bad-"}, "name"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(
    engine: Engine, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        engine.vms.run(IMAGE, "true", **settings)


def test_unknown_image(lab: Engine) -> None:
    with pytest.raises(NoSuchImage):
        lab.vms.run("lab/nothing-of-the-kind", "true")


def test_the_hosts_own_root_is_refused(lab: Engine) -> None:
    if lab.driver.name != "root":
        pytest.skip("lab/host needs the root driver")
    with pytest.raises(VMError, match="lab/host"):
        lab.vms.run("lab/host", "true", mem_limit=MEMORY)


def test_the_probe_gives_every_cause_in_words(engine: Engine) -> None:
    found = {capability.name: capability for capability in engine.vms.probe()}
    assert set(found) == {"vm qemu", "vm init", "vm mke2fs", "vm kernel", "vm kvm"}
    assert all(capability.cause for capability in found.values())


def test_prune_only_costs_time(lab: Engine) -> None:
    lab.vms.run(IMAGE, "true", mem_limit=MEMORY)
    assert lab.vms.prune() > 0
    assert lab.vms.run(IMAGE, "true", mem_limit=MEMORY).exit_code == 0
