"""File system tasks in the worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import DiskFull, LayerError, RuntimeFailure, TaskError
from labkernel.linux.waiting import readable

TASKS = """
import os, time
from labkernel.errors import LayerError

def echo(value, report=None, fds=()):
    if report is not None:
        for step in range(3):
            report({"step": step})
    for fd in fds:
        os.write(fd, b"from the task")
    return {"value": value, "pid": os.getpid()}

def fail():
    raise LayerError("bad layer", resolution="do better")

def full():
    raise OSError(28, "No space left on device", "/x")

def mount(path):
    from labkernel.linux.mounts import mount
    mount("t", path, "tmpfs")
    open(path + "/inside", "w").close()
    return os.listdir(path)

def die():
    os.kill(os.getpid(), 9)

def linger(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    os.rename(path, path + ".ready")
    time.sleep(60)
"""


@pytest.fixture
def tasks(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The worker finds modules where the client that started the supervisor finds them.
    folder = lab.base / "python"
    folder.mkdir()
    (folder / "lab_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(folder))
    return lab


def test_result_report_and_descriptors(tasks: Any) -> None:
    read, write = os.pipe()
    steps: list[Any] = []
    result = tasks.runtime.task("lab_tasks:echo", value=[1, {"a": None}], fds=[write], report=steps.append)
    os.close(write)
    assert result["value"] == [1, {"a": None}]
    assert steps == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert os.read(read, 100) == b"from the task"
    assert os.read(read, 100) == b""  # the worker kept no copy
    os.close(read)


def test_each_task_has_a_process_of_its_own(tasks: Any) -> None:
    assert tasks.runtime.task("lab_tasks:echo", value=1)["pid"] != tasks.runtime.task("lab_tasks:echo", value=1)["pid"]


def test_errors_travel_as_themselves(tasks: Any) -> None:
    with pytest.raises(LayerError, match="bad layer") as caught:
        tasks.runtime.task("lab_tasks:fail")
    assert caught.value.resolution == "do better"
    with pytest.raises(DiskFull):
        tasks.runtime.task("lab_tasks:full")
    with pytest.raises(TaskError, match="was killed"):
        tasks.runtime.task("lab_tasks:die")
    with pytest.raises(TaskError, match="No module named"):
        tasks.runtime.task("lab_nothing:x")
    with pytest.raises(TaskError, match="no attribute"):
        tasks.runtime.task("lab_tasks:nope")
    with pytest.raises(RuntimeFailure, match="not a task"):
        tasks.runtime.task("lab_tasks")


def test_mounts_stay_in_the_task(tasks: Any) -> None:
    target = tasks.base / "mnt"
    target.mkdir()
    assert tasks.runtime.task("lab_tasks:mount", path=str(target)) == ["inside"]
    assert list(target.iterdir()) == []


def test_large_request(tasks: Any) -> None:
    assert tasks.runtime.task("lab_tasks:echo", value="x" * 400_000)["value"] == "x" * 400_000


def test_lost_client_ends_its_task(tasks: Any) -> None:
    note = tasks.base / "pid"
    message = {"op": "task", "call": "lab_tasks:linger", "args": {"path": str(note)}, "fds": 0, "report": False}
    sock, _, _ = tasks.runtime._ask(message)
    while not (tasks.base / "pid.ready").exists():
        time.sleep(0.01)
    pidfd = os.pidfd_open(int((tasks.base / "pid.ready").read_text()))
    sock.close()
    assert readable(pidfd, timeout_s=60)
    os.close(pidfd)


def test_tasks_run_side_by_side(tasks: Any) -> None:
    note = tasks.base / "pid"
    message = {"op": "task", "call": "lab_tasks:linger", "args": {"path": str(note)}, "fds": 0, "report": False}
    sock, _, _ = tasks.runtime._ask(message)
    assert tasks.runtime.task("lab_tasks:echo", value=2)["value"] == 2
    sock.close()


def test_worker_is_replaced(tasks: Any) -> None:
    tasks.runtime.task("lab_tasks:echo", value=1)
    info = tasks.runtime.ensure()
    children = Path(f"/proc/{info.pid}/task/{info.pid}/children").read_text().split()
    worker = next(pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "labkernel-work\n")
    os.kill(int(worker), signal.SIGKILL)
    assert tasks.runtime.task("lab_tasks:echo", value=3)["value"] == 3
