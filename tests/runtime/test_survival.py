"""kill -9 of client, supervisor and keeper: no container, no log line and no exit status is lost."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

from labkernel.linux.waiting import readable
from labkernel.runtime import recovery
from labkernel.runtime.client import SupervisorLost
from labkernel.runtime.instances import Instance

COUNT = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); [ $((i % 8)) = 0 ] && sleep 0.01; done; exit 7"
EXPECTED = b"".join(b"line %d\n" % number for number in range(400))


def kill_and_wait(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert readable(pidfd, timeout_s=60)
    os.close(pidfd)


def victim(lab: Any, role: str) -> int:
    info = lab.runtime.ensure()
    return info.pid if role == "supervisor" else info.keeper_pid


def kill_both(lab: Any) -> None:
    """Supervisor and keeper in one instant."""
    info = lab.runtime.ensure()
    os.kill(info.keeper_pid, signal.SIGSTOP)  # else one of the two would notice the other's end
    kill_and_wait(info.pid)
    kill_and_wait(info.keeper_pid)


def groups(parent: str) -> Iterator[str]:
    for folder, _names, _files in os.walk("/sys/fs/cgroup"):
        if f"{parent}/" in folder:
            yield folder


class HeldStart:
    """A start whose process waits for its system call filter, a FIFO, with everything else done."""

    def __init__(self, lab: Any, container_id: str) -> None:
        fifo = lab.base / "filter"
        os.mkfifo(fifo)
        path = lab.root / "containers" / container_id / "config.json"
        usual = path.read_text()
        config = json.loads(usual)
        config["labkernel"]["seccomp_program"] = str(fifo)
        path.write_text(json.dumps(config))
        self.errors: list[Exception] = []
        self.client = threading.Thread(target=lambda: self._start(lab, container_id))
        self.client.start()
        self.fd = -1
        wait_until(lambda: self._open(fifo))
        self.pid = lab.runtime.states([container_id])[container_id]["pid"]
        path.write_text(usual)  # for the next start

    def _start(self, lab: Any, container_id: str) -> None:
        try:
            lab.runtime.start(container_id)
        except SupervisorLost as err:
            self.errors.append(err)

    def _open(self, fifo: Path) -> bool:
        try:
            self.fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False  # ENXIO: nobody reads yet
        return True

    def go_on(self) -> None:
        """Let it come to its exec."""
        program = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        os.close(self.fd)
        wait_until(lambda: Path(f"/proc/{self.pid}/cmdline").read_bytes() != program)
        self.client.join(60)


@pytest.mark.parametrize("role", ["supervisor", "keeper"])
def test_one_kill_loses_nothing(lab: Any, role: str) -> None:
    container_id = lab.create("sh", "-c", COUNT)
    pid = lab.runtime.start(container_id)
    waited: list[int] = []
    waiter = threading.Thread(target=lambda: waited.append(lab.runtime.wait(container_id).exit_code))
    waiter.start()
    before = lab.runtime.ensure()
    kill_and_wait(victim(lab, role))

    def followed() -> bool:
        # on a busy machine the supervisor answers once more before it sees that its keeper is gone
        after = lab.runtime.ensure()
        return (after.pid, after.keeper_pid) != (before.pid, before.keeper_pid)

    wait_until(followed)
    assert lab.runtime.states([container_id])[container_id]["pid"] in (pid, 0)
    waiter.join(30)
    assert waited == [7]
    assert lab.log(container_id) == EXPECTED


def test_both_killed_in_one_instant(lab: Any) -> None:
    """The next supervisor finds what runs, and takes it over: it can be stopped, and its status is known."""
    running = lab.create("sleep", "1000", auto_remove=True)
    ending = lab.create("sh", "-c", "trap 'exit 7' USR1; echo ready; while :; do sleep 0.01; done")
    pids = {id: lab.runtime.start(id) for id in (running, ending)}
    wait_until(lambda: lab.log(ending) == b"ready\n")
    kill_both(lab)
    states = lab.runtime.states()
    assert {id: (states[id]["status"], states[id]["pid"]) for id in pids} == {
        id: ("running", pid) for id, pid in pids.items()
    }
    lab.runtime.kill(ending, signal.SIGUSR1)
    status = lab.runtime.wait(ending)
    # Of a process that is nobody's child the kernel tells the status since Linux 6.15 (PIDFD_GET_INFO).
    assert status.exit_code == 7 or (status.exit_code == 255 and "lost" in status.error)
    lab.runtime.stop(running, timeout_s=0)
    wait_until(lambda: not (lab.root / "containers" / running).exists(), "the container is removed")


def test_both_killed_while_nothing_runs(lab: Any) -> None:
    """What waited for the next start leaves control groups, of which the next supervisor has to know."""
    lab.output("true")
    wait_until(lambda: lab.runtime.ensure().warm)
    before = set(groups(lab.parent))
    kill_both(lab)
    lab.runtime.ensure()
    wait_until(lambda: not before & set(groups(lab.parent)))


def test_a_kill_before_the_removal_is_made_good_by_the_next(lab: Any) -> None:
    """What removes itself is not written down as ended: whoever reads that later could not tell it from a kept one."""
    container_id = lab.create("sleep", "1000", auto_remove=True)
    pid = lab.runtime.start(container_id)
    info = lab.runtime.ensure()
    kill_both(lab)
    kill_and_wait(pid)
    folder = lab.root / "containers" / container_id
    state = json.loads((folder / "state.json").read_text())
    for _ in range(2):  # supervisors that are killed before they come to it
        chores: list[Any] = []
        removed: list[Instance] = []
        sup = SimpleNamespace(root=str(lab.root), instances={}, put_off=chores.append, remove=removed.append)
        recovery._settle_one(sup, container_id, str(folder.parent))
        assert sup.instances[container_id].end_state()["exit_code"] == 255
        assert json.loads((folder / "state.json").read_text()) == state
        chores.pop()()
        assert removed == [sup.instances[container_id]]
    assert lab.runtime.ensure().pid != info.pid
    wait_until(lambda: not folder.exists(), "the container is removed")


@pytest.mark.parametrize("exec_first", [True, False])
def test_both_killed_while_one_starts(lab: Any, exec_first: bool) -> None:
    """Nobody was told of the start, so it has not been: its process ends, and the next start is the first."""
    container_id = lab.create("sh", "-c", "echo up; sleep 1000")
    held = HeldStart(lab, container_id)
    kill_both(lab)
    if exec_first:
        held.go_on()
    pidfd = os.pidfd_open(held.pid)
    state = lab.runtime.states([container_id])[container_id]
    assert (state["status"], state["pid"]) == ("created", 0)
    assert readable(pidfd, timeout_s=60)
    os.close(pidfd)
    if not exec_first:
        os.close(held.fd)
        held.client.join(60)
    assert lab.runtime.start(container_id) != held.pid
    wait_until(lambda: lab.log(container_id) == b"up\n")


def test_both_killed_while_one_starts_again(lab: Any) -> None:
    """It keeps the status it had before the start."""
    container_id = lab.create("sh", "-c", "[ -e /again ] && sleep 1000; touch /again; exit 3")
    lab.runtime.start(container_id)
    assert lab.runtime.wait(container_id).exit_code == 3
    held = HeldStart(lab, container_id)
    kill_both(lab)
    held.go_on()
    state = lab.runtime.states([container_id])[container_id]
    assert (state["status"], state["exit_code"], state["error"]) == ("exited", 3, "")


def test_supervisor_killed_while_one_starts_again(lab: Any) -> None:
    """What is on disk is the end of the run before; the keeper knows of the new one."""
    container_id = lab.create("sh", "-c", "[ -e /again ] && read x; touch /again; exit 3", stdin_open=True)
    lab.runtime.start(container_id)
    assert lab.runtime.wait(container_id).exit_code == 3
    held = HeldStart(lab, container_id)
    kill_and_wait(lab.runtime.ensure().pid)
    held.go_on()
    state = lab.runtime.states([container_id])[container_id]
    assert (state["status"], state["pid"]) == ("running", held.pid)
    lab.runtime.kill(container_id, signal.SIGKILL)
    assert lab.runtime.wait(container_id).exit_code == 137


def test_what_runs_on_can_be_entered(lab: Any) -> None:
    """Also where a user namespace is around it: the next supervisor joins that one instead of making another."""
    container_id = lab.create("sleep", "1000")
    lab.runtime.start(container_id)
    kill_both(lab)
    with lab.runtime.exec(container_id, {"args": ["sh", "-c", "echo inside; exit 4"]}) as attachment:
        assert (list(attachment), attachment.exit_code) == ([("stdout", b"inside\n")], 4)
    assert lab.output("echo", "beside") == (b"beside\n", b"", 0)
    lab.runtime.stop(container_id, timeout_s=0)


def test_many_kills_in_turn(lab: Any) -> None:
    container_id = lab.create("sh", "-c", COUNT)
    lab.runtime.start(container_id)
    for role in ("supervisor", "supervisor", "keeper", "supervisor", "keeper", "keeper"):
        kill_and_wait(victim(lab, role))
    assert lab.runtime.wait(container_id).exit_code == 7
    assert lab.log(container_id) == EXPECTED


def test_exit_between_supervisors(lab: Any) -> None:
    """The container ends while the supervisor is stopped and then killed: its successor tells the status."""
    container_id = lab.create("sh", "-c", "read x; echo bye; exit 5", stdin_open=True)
    attachment = lab.runtime.run(container_id, stdin=True)
    info = lab.runtime.ensure()
    pidfd = os.pidfd_open(attachment.pid)
    os.kill(info.pid, signal.SIGSTOP)
    with open(f"/proc/{attachment.pid}/fd/0", "wb", buffering=0) as stdin:
        stdin.write(b"\n")
    assert readable(pidfd, timeout_s=60)
    os.close(pidfd)
    kill_and_wait(info.pid)
    assert lab.runtime.wait(container_id).exit_code == 5
    assert lab.log(container_id) == b"bye\n"
    with pytest.raises(SupervisorLost):
        attachment.wait()


def test_who_lets_go_while_output_is_on_its_way_has_let_go(lab: Any) -> None:
    """The supervisor finds out by a write that fails, before it reads what the client said last."""
    container_id = lab.create("sh", "-c", "read x; echo out; sleep 1000", stdin_open=True)
    attachment = lab.runtime.run(container_id, stdin=True, tied=True)
    supervisor = lab.runtime.ensure().pid
    os.kill(supervisor, signal.SIGSTOP)
    try:
        with open(f"/proc/{attachment.pid}/fd/0", "wb", buffering=0) as stdin:
            stdin.write(b"\n")
        with open(f"/proc/{attachment.pid}/fd/1", "rb", buffering=0) as stdout:
            wait_until(lambda: fcntl.ioctl(stdout, termios.FIONREAD, bytes(4)) != bytes(4))
        attachment.close()
    finally:
        os.kill(supervisor, signal.SIGCONT)
    wait_until(lambda: lab.log(container_id) == b"out\n")
    assert lab.runtime.states([container_id])[container_id]["status"] == "running"
    lab.runtime.kill(container_id)


def test_attached_client_gets_a_clear_end_and_comes_back(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "echo one; read x; echo two $x", stdin_open=True)
    attachment = lab.runtime.run(container_id, stdin=True)
    assert attachment.read() == ("stdout", b"one\n")
    kill_and_wait(lab.runtime.ensure().pid)
    with pytest.raises(SupervisorLost):
        attachment.read()
    with lab.runtime.attach(container_id, stdin=True, logs=True) as again:
        again.send(b"more\n")
        assert b"".join(data for _, data in again) == b"one\ntwo more\n"
        assert again.exit_code == 0


def test_attached_client_does_not_notice_a_lost_keeper(lab: Any) -> None:
    container_id = lab.create("cat", stdin_open=True)
    with lab.runtime.run(container_id, stdin=True) as attachment:
        kill_and_wait(lab.runtime.ensure().keeper_pid)
        attachment.send(b"still here\n")
        assert attachment.read() == ("stdout", b"still here\n")
        attachment.close_stdin()
        assert attachment.wait().exit_code == 0


def test_terminal_survives(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "read x; echo got $x; read y; echo got $y", tty=True, stdin_open=True)
    first = lab.runtime.run(container_id, stdin=True)
    first.send(b"a\n")
    kill_and_wait(lab.runtime.ensure().pid)
    first.close()
    with lab.runtime.attach(container_id, stdin=True, logs=True) as second:
        second.send(b"b\n")
        text = b"".join(data for _, data in second)
    assert b"got a" in text
    assert b"got b" in text


def test_new_containers_start_after_every_kill(lab: Any) -> None:
    for role in ("supervisor", "keeper", "supervisor"):
        kill_and_wait(victim(lab, role))
        assert lab.output("echo", "hello") == (b"hello\n", b"", 0)


def test_killed_client_leaves_the_container(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "echo up; read x; echo down", stdin_open=True)
    code = (
        "import sys; from pathlib import Path; from labkernel.runtime.client import Runtime\n"
        "base = Path(sys.argv[1]); rt = Runtime(socket=base/'rt/supervisor.sock', root=base/'root',"
        " runtime_dir=base/'rt', driver=sys.argv[3])\n"
        "a = rt.run(sys.argv[2]); print(a.read()[1], flush=True); a.wait()"
    )
    driver = lab.runtime.driver
    client = subprocess.Popen([sys.executable, "-c", code, str(lab.base), container_id, driver], stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"b'up\\n'\n"
    client.kill()
    client.wait()
    client.stdout.close()
    assert lab.runtime.states([container_id])[container_id]["status"] == "running"
    with lab.runtime.attach(container_id, stdin=True) as attachment:
        attachment.send(b"\n")
        assert attachment.wait().exit_code == 0
    assert lab.log(container_id) == b"up\ndown\n"


def test_killed_while_output_floods(lab: Any) -> None:
    """Kills at arbitrary moments of heavy output: every byte is in the log once."""
    container_id = lab.create("sh", "-c", "i=0; while [ $i -lt 6000 ]; do echo 0123456789 $i; i=$((i+1)); done")
    lab.runtime.start(container_id)
    for _ in range(4):
        kill_and_wait(lab.runtime.ensure().pid)
    assert lab.runtime.wait(container_id).exit_code == 0
    assert lab.log(container_id) == b"".join(b"0123456789 %d\n" % number for number in range(6000))


def test_idle_supervisor_leaves(lab: Any) -> None:
    runtime = lab.new_runtime(idle_exit_s=0.1)
    info = runtime.ensure()
    pidfds = [os.pidfd_open(pid) for pid in (info.pid, info.keeper_pid)]
    for pidfd in pidfds:
        assert readable(pidfd, timeout_s=60)
        os.close(pidfd)
    assert not runtime.socket.exists()
    assert lab.output("echo", "again")[0] == b"again\n"


def test_supervisor_of_a_deleted_store_leaves(lab: Any) -> None:
    hasty = lab.new_runtime(idle_exit_s=0.2)
    pids = [os.pidfd_open(pid) for pid in (hasty.ensure().pid, hasty.ensure().keeper_pid)]
    lab.output("true")
    shutil.rmtree(lab.runtime_dir, ignore_errors=True)
    for pidfd in pids:
        assert readable(pidfd, timeout_s=60)
        os.close(pidfd)
    lab.runtime_dir.mkdir()


@pytest.mark.parametrize("role", ["supervisor", "keeper"])
def test_exec_survives(lab: Any, role: str) -> None:
    """A process started with exec is not ended by SIGPIPE when the reader of its output is killed."""
    container_id = lab.create("sh", "-c", "while [ ! -e /done ]; do sleep 0.02; done; exit 8")
    lab.runtime.start(container_id)
    script = "echo one; read x; echo two; echo three; touch /done"
    attachment = lab.runtime.exec(container_id, {"args": ["sh", "-c", "trap '' HUP; " + script]}, stdin=True)
    assert attachment.read() == ("stdout", b"one\n")
    kill_and_wait(victim(lab, role))
    if role == "keeper":
        attachment.send(b"\n")
        assert attachment.wait().exit_code == 0
    attachment.close()
    assert lab.runtime.wait(container_id).exit_code == 8


def test_restart_policy_survives(lab: Any) -> None:
    """The supervisor dies while a container waits for its next start, and while one is being stopped."""
    flaky = lab.create("sh", "-c", "sleep 0.2; exit 3", restart={"name": "always", "max_retries": 0})
    lab.runtime.start(flaky)
    wait_until(lambda: lab.runtime.states([flaky])[flaky]["status"] == "restarting")
    kill_and_wait(lab.runtime.ensure().pid)
    before = lab.runtime.states([flaky])[flaky]["restart_count"]
    wait_until(lambda: lab.runtime.states([flaky])[flaky]["restart_count"] > before, "one more start")
    lab.runtime.stop(flaky, timeout_s=0)
    assert lab.runtime.states([flaky])[flaky]["status"] == "exited"


def test_machine_switched_off(lab: Any) -> None:
    """The runtime directory is gone and nothing runs: containers with a policy are started again, others have ended."""
    again = lab.create("sleep", "1000", restart={"name": "unless-stopped", "max_retries": 0})
    never = lab.create("sleep", "1000")
    stopped = lab.create("sleep", "1000", restart={"name": "unless-stopped", "max_retries": 0})
    pids = [lab.runtime.start(id) for id in (again, never)]
    lab.runtime.start(stopped)
    lab.runtime.stop(stopped, timeout_s=0)
    kill_both(lab)
    for pid in pids:
        kill_and_wait(pid)
    shutil.rmtree(lab.runtime_dir)
    wait_until(lambda: lab.runtime.states([again])[again]["status"] == "running")
    states = lab.runtime.states()
    assert [states[id]["status"] for id in (again, never, stopped)] == ["running", "exited", "exited"]
    assert states[never]["exit_code"] == 255
    assert states[again]["restart_count"] == 0
