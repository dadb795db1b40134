"""A newer labkernel asks an older supervisor: it is replaced, and containers, logs and exit statuses go on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from labkernel.runtime import client
from labkernel.runtime.client import Runtime
from labkernel.runtime.takeover import is_newer

COUNT = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); [ $((i % 8)) = 0 ] && sleep 0.01; done; exit 7"


def newer(lab: Any, version: str = "999.0") -> Runtime:
    runtime: Runtime = lab.new_runtime()
    runtime.version = version
    return runtime


def wait_for_release(runtime: Runtime) -> None:
    """Requests until one finds the old supervisor with nothing put off."""
    for _ in range(2000):
        runtime.states()
        if runtime.ensure().release == runtime.version:
            return
    raise AssertionError(runtime.ensure().release)


def title(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("theirs", "ours", "answer"),
    [
        ("0.2.0", "0.1.9", True),
        ("0.10", "0.9.3", True),
        ("1.0.0rc1", "0.9", True),
        ("0.1.0", "0.1.0", False),
        ("0.1", "0.2", False),
        (None, "0.1", False),
        ("1.0", None, False),
        ("x", "0.1", False),
    ],
)
def test_newer(theirs: Any, ours: Any, answer: bool) -> None:
    assert is_newer(theirs, ours) is answer


def test_with_nothing_running_another_one_starts(lab: Any) -> None:
    before = lab.runtime.ensure()
    runtime = newer(lab)
    wait_for_release(runtime)
    after = runtime.ensure()
    assert before.release == lab.runtime.version
    assert after.keeper_pid != before.keeper_pid
    assert lab.output("echo", "served") == (b"served\n", b"", 0)
    assert lab.runtime.ensure().pid == after.pid


def test_running_containers_are_taken_over(lab: Any) -> None:
    counting = lab.create("sh", "-c", COUNT)
    talking = lab.create("cat", tty=True)
    reading = lab.create("cat", stdin_open=True)
    pids = {each: lab.runtime.start(each) for each in (counting, talking, reading)}
    before = lab.runtime.ensure()
    waited: list[int] = []
    waiter = threading.Thread(target=lambda: waited.append(lab.runtime.wait(counting).exit_code))
    waiter.start()
    runtime = newer(lab)
    wait_for_release(runtime)
    states, after = runtime.states(), runtime.ensure()
    assert after.pid != before.pid
    # The keeper is the same process with a new program, so it is the parent that reaps them.
    assert after.keeper_pid == before.keeper_pid
    assert title(after.keeper_pid).startswith(b"labkernel supervisor of ")
    assert {each: states[each]["pid"] for each in (talking, reading)} == {
        each: pids[each] for each in (talking, reading)
    }
    waiter.join(60)
    assert waited == [7]
    assert lab.log(counting) == b"".join(b"line %d\n" % number for number in range(400))
    with lab.runtime.attach(talking, stdin=True) as attachment:
        attachment.send(b"over\n\x04")
        assert attachment.wait().exit_code == 0
    assert b"over" in lab.log(talking)
    with lab.runtime.attach(reading, stdin=True) as attachment:
        attachment.send(b"input")
        attachment.close_stdin()
        assert attachment.wait().exit_code == 0
    assert lab.log(reading) == b"input"
    assert lab.output("sh", "-c", "ls /proc/self/fd | wc -l; ulimit -n")[0].split()[0] == b"4"


def test_descriptor_limit_of_containers_stays(lab: Any) -> None:
    limit = lab.output("sh", "-c", "ulimit -n")[0]
    sleeper = lab.create("sleep", "600")
    lab.runtime.start(sleeper)
    wait_for_release(newer(lab))
    assert lab.output("sh", "-c", "ulimit -n")[0] == limit
    lab.runtime.kill(sleeper)
    assert lab.runtime.wait(sleeper).exit_code == 137


def test_attached_clients_are_not_interrupted(lab: Any) -> None:
    container_id = lab.create("cat", stdin_open=True)
    runtime = newer(lab)
    with lab.runtime.run(container_id, stdin=True) as attachment:
        before = lab.runtime.ensure()
        # Served by the old one for as long as somebody is attached.
        assert runtime.states([container_id])[container_id]["status"] == "running"
        assert runtime.ensure().pid == before.pid
        attachment.send(b"still here")
        attachment.close_stdin()
        assert attachment.wait().exit_code == 0
    # Its end is tidied up in the next idle moment; then nothing stands in the way.
    wait_for_release(runtime)


def test_exec_keeps_its_supervisor(lab: Any) -> None:
    container_id = lab.create("sleep", "600")
    lab.runtime.start(container_id)
    with lab.runtime.exec(container_id, {"args": ["cat"]}, stdin=True) as attachment:
        before = lab.runtime.ensure()
        newer(lab).states()
        assert lab.runtime.ensure().pid == before.pid
        attachment.close_stdin()
        assert attachment.wait().exit_code == 0
    newer(lab).kill(container_id)
    assert lab.runtime.wait(container_id).exit_code == 137


def test_a_version_that_cannot_be_loaded_changes_nothing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    container_id = lab.create("sleep", "600")
    pid = lab.runtime.start(container_id)
    before = lab.runtime.ensure()
    broken = "raise SystemExit('broken')  # {path} {module}"
    monkeypatch.setattr(client, "_CODE", broken)
    runtime = newer(lab)
    while not (log := lab.runtime_dir / "supervisor.log").read_text():
        assert runtime.states([container_id])[container_id]["pid"] == pid
    assert "cannot be loaded" in log.read_text()
    after = runtime.ensure()
    assert (after.keeper_pid, after.release) == (before.keeper_pid, before.release)
    runtime.kill(container_id)
    assert runtime.wait(container_id).exit_code == 137
    # A later version is tried again.
    monkeypatch.undo()
    lab.runtime.start(container_id)
    latest = newer(lab, "1000.0")
    wait_for_release(latest)
    latest.kill(container_id)


def test_an_older_client_is_served(lab: Any) -> None:
    wait_for_release(newer(lab))
    before = lab.runtime.ensure()
    old = newer(lab, "0.0.1")
    assert old.states() == {}
    assert old.ensure().pid == before.pid
