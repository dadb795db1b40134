"""The containers service on the real supervisor, with the machine's own driver."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel.display import command_words, status_words
from labkernel.engine import Engine
from labkernel.errors import (
    ConflictError,
    ContainerExit,
    NoSuchContainer,
    NoSuchImage,
    NoSuchNetwork,
    RegistryError,
    StartError,
    UsageError,
)
from labkernel.running.container import Container, ContainerList

SLEEP = ["sleep", "1000"]


@pytest.fixture
def sleeper(engine: Engine) -> Container:
    found: Container = engine.containers.run("busybox", SLEEP, detach=True, name="sleeper", labels={"a": "b"})
    return found


def directories(engine: Engine) -> set[str]:
    return {path.name for path in engine.layout.containers.iterdir()}


# -- running -----------------------------------------------------------------------------------------------------------


def test_output_and_only_the_streams_asked_for(engine: Engine) -> None:
    command = ["sh", "-c", "echo out; echo err >&2"]
    assert engine.containers.run("busybox", command, remove=True) == b"out\n"
    assert engine.containers.run("busybox", command, remove=True, stdout=False, stderr=True) == b"err\n"
    assert sorted(engine.containers.run("busybox", command, remove=True, stderr=True).split()) == [b"err", b"out"]
    assert b"".join(engine.containers.run("busybox", command, remove=True, stream=True)) == b"out\n"


def test_remove_leaves_nothing(engine: Engine) -> None:
    engine.containers.run("busybox", "true", remove=True)
    assert engine.containers.list(all=True) == []
    assert engine.db.query("SELECT id FROM containers") == []


def test_without_remove_it_stays(engine: Engine) -> None:
    engine.containers.run("busybox", "true")
    (left,) = engine.containers.list(all=True)
    assert left.status == "exited"
    assert left.wait() == {"StatusCode": 0, "Error": None}


def test_a_status_raises_with_what_was_said(engine: Engine) -> None:
    with pytest.raises(ContainerExit) as caught:
        engine.containers.run("busybox", ["sh", "-c", "echo why >&2; exit 7"], remove=True)
    assert (caught.value.status, caught.value.exit_code, caught.value.details) == (7, 7, "why\n")


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("/etc/passwd", 126)])
def test_commands_that_cannot_start(engine: Engine, command: str, code: int) -> None:
    with pytest.raises(StartError) as caught:
        engine.containers.run("busybox", command, remove=True)
    assert caught.value.exit_code == code
    assert engine.containers.list(all=True) == []


KILLED = """import sys
from labkernel.engine import Engine
lab = Engine.open(sys.argv[1], runtime_dir=sys.argv[2])
code = ["sh", "-c", "echo up; sleep 1000"]
"""


def a_killed_process(engine: Engine, code: str) -> None:
    """Runs `code` in a process of its own with the same store, and kills it when it has said something."""
    argv = [sys.executable, "-c", KILLED + code, str(engine.layout.root), str(engine.layout.runtime_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        client.kill()


def test_not_detached_it_ends_with_who_ran_it(engine: Engine) -> None:
    speak = "lines = lab.containers.run('busybox', code, stream=True, name={name!r}, remove={remove}); "
    speak += "print(next(lines), flush=True); list(lines)"
    a_killed_process(engine, speak.format(name="stays", remove=False))
    a_killed_process(engine, speak.format(name="leaves", remove=True))
    found = engine.containers.get("stays")
    wait_until(lambda: found.status == "exited", "it has ended, and is there to be looked at")
    assert found.logs() == b"up\n"
    wait_until(lambda: [c.name for c in engine.containers.list(all=True)] == ["stays"], "the other one is removed")
    # It ends also while nobody reads, and in a notebook's cell.
    waits = "import threading; threading.Thread(target=lab.containers.run, args=('busybox', code), "
    waits += "kwargs={'name': 'silent'}).start()\nimport time\n"
    waits += (
        "while not any(c.name == 'silent' for c in lab.containers.list()): time.sleep(0.05)\nprint('there', flush=True)"
    )
    a_killed_process(engine, waits)
    wait_until(lambda: engine.containers.get("silent").status == "exited", "it has ended")
    cell = "import threading, time; from IPython.core.interactiveshell import InteractiveShell; "
    cell += "shell = InteractiveShell(); shell.run_line_magic('load_ext', 'labkernel')\n"
    cell += "import os; os.environ.update(LABKERNEL_ROOT=sys.argv[1], LABKERNEL_RUNTIME_DIR=sys.argv[2])\n"
    cell += "shell.run_line_magic('container', 'run --name cell busybox sh -c \"echo up; sleep 1000\"')"
    a_killed_process(engine, cell)
    wait_until(lambda: engine.containers.get("cell").status == "exited", "it has ended")


def test_an_exec_ends_with_who_ran_it_and_the_detached_container_does_not(engine: Engine, sleeper: Container) -> None:
    def inside() -> str:
        return str(sleeper.top())

    waits = "import threading, time; found = lab.containers.get('sleeper'); "
    waits += "threading.Thread(target=found.exec_run, args=(['sleep', '1001'],)).start()\n"
    waits += "while 'sleep 1001' not in str(found.top()): time.sleep(0.05)\nprint('there', flush=True)"
    a_killed_process(engine, waits)
    wait_until(lambda: "sleep 1001" not in inside(), "what was executed has ended")
    drops = waits.replace("1001", "1002").replace(
        "target=found.exec_run", "target=lambda c: found.exec_run(c, detach=True)"
    )
    a_killed_process(engine, drops)
    result = sleeper.exec_run(["sh", "-c", "echo up; exec sleep 1003"], stream=True)
    assert next(result.output) == b"up\n"
    del result
    gc.collect()
    assert sleeper.exec_run("true").exit_code == 0
    assert "sleep 1002" in inside()
    assert "sleep 1003" in inside()
    assert sleeper.status == "running"


def test_who_drops_what_it_streams_has_detached(engine: Engine) -> None:
    for name, begin in (("dropped", iter), ("begun", next)):
        lines = engine.containers.run("busybox", ["sh", "-c", "echo up; sleep 1000"], stream=True, name=name)
        begin(lines)
        del lines
        gc.collect()
        container = engine.containers.get(name)
        engine.containers.run("busybox", "true", remove=True)  # what the connection's end does has been done by now
        assert container.status == "running"


def test_unknown_image(engine: Engine) -> None:
    before = directories(engine)
    with pytest.raises((NoSuchImage, RegistryError)):
        engine.containers.run("localhost:1/none", "true")
    assert directories(engine) <= before


def test_settings_are_checked_before_anything_is_made(engine: Engine) -> None:
    before = directories(engine)
    for settings in ({"mem_limit": "1m"}, {"colour": "red"}, {"network_mode": "ns:x"}, {"platform": "linux/s390x"}):
        with pytest.raises(UsageError):
            engine.containers.create("busybox", "true", **settings)
    with pytest.raises(NoSuchNetwork, match="network mynet not found"):
        engine.containers.create("busybox", "true", network="mynet")
    assert directories(engine) <= before


def test_losing_the_supervisor_loses_no_output_and_no_status(fresh_engine: Engine) -> None:
    script = "echo before; while [ ! -e /go/on ]; do sleep 0.05; done; echo after; exit 3"
    gate = fresh_engine.layout.root / "gate"
    gate.mkdir()
    containers = fresh_engine.containers
    container, attachment = containers.run_attached(
        "busybox", ["sh", "-c", script], volumes={str(gate): {"bind": "/go"}}
    )
    assert next(iter(attachment)) == ("stdout", b"before\n")
    os.kill(fresh_engine.runtime.ensure().pid, signal.SIGKILL)
    (gate / "on").touch()
    output: list[bytes] = [b"before\n"]
    ended = containers._pump(container, attachment, {"stdout"}, output, [])
    assert b"".join(output) == b"before\nafter\n"
    assert ended.exit_code == 3
    assert container.wait() == {"StatusCode": 3, "Error": None}


# -- what a container sees ---------------------------------------------------------------------------------------------


def inside(engine: Engine, script: str, **settings: object) -> list[str]:
    out: bytes = engine.containers.run("busybox", ["sh", "-c", script], remove=True, **settings)
    return out.decode().splitlines()


def test_identity(engine: Engine) -> None:
    lines = inside(
        engine, "hostname; pwd; echo $A; echo $$", hostname="box", working_dir="/made/here", environment=["A=1"]
    )
    assert lines == ["box", "/made/here", "1", "1"]


def test_privileges(engine: Engine) -> None:
    lines = inside(engine, "grep -E '^(CapEff|CapInh|Seccomp):' /proc/self/status; unshare -U true 2>&1; true")
    assert "CapInh:\t0000000000000000" in lines
    assert "CapEff:\t00000000a80425fb" in lines
    assert ("Seccomp:\t2" in lines) == engine.driver.seccomp
    assert "CapEff:\t0000000000000000" in inside(engine, "grep CapEff /proc/self/status", cap_drop=["ALL"])
    assert "NoNewPrivs:\t1" in inside(engine, "grep NoNew /proc/self/status", security_opt=["no-new-privileges"])
    unfiltered = inside(engine, "grep Seccomp: /proc/self/status", security_opt=["seccomp=unconfined"])
    assert "Seccomp:\t2" not in unfiltered


def test_seccomp_profile_of_ones_own(engine: Engine, tmp_path: Path) -> None:
    if not engine.driver.seccomp:
        pytest.skip("no system call filters here")
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    assert "not permitted" in inside(engine, "mkdir /x 2>&1; true", security_opt=[f"seccomp={profile}"])[0]


def test_file_systems(engine: Engine) -> None:
    assert inside(engine, "touch /x 2>/dev/null || touch /t/y && ls /t", read_only=True, tmpfs={"/t": ""}) == ["y"]
    assert inside(engine, "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l") == ["0", "0"]
    assert "Read-only" in inside(engine, "echo 1 2>&1 > /proc/sys/kernel/domainname; true", stderr=True)[0]


def test_network_none_is_loopback_only(engine: Engine) -> None:
    assert inside(engine, "ls /sys/class/net", network_mode="none") == ["lo"]
    assert engine.containers.create("busybox", "true", network_mode="none").warnings == []


def test_limits(engine: Engine, needs) -> None:  # type: ignore[no-untyped-def]
    needs("cgroup memory", "cgroup pids", "cgroup cpu")
    container = engine.containers.create("busybox", SLEEP, mem_limit="64m", pids_limit=20, nano_cpus=500_000_000)
    container.start()
    from labkernel.linux.cgroups import Cgroup

    group = Cgroup.reopen(container.runtime_state()["cgroup"]["paths"])
    assert group.figures()["memory_limit_bytes"] == 64 << 20
    assert container.warnings == [line for line in container.warnings if "network" in line]
    with pytest.raises(ContainerExit) as caught:
        engine.containers.run("busybox", "tail /dev/zero", mem_limit="8m", remove=True)
    assert caught.value.status == 137
    assert "memory" in (caught.value.resolution or "")


def test_cpus_by_number(engine: Engine, needs) -> None:  # type: ignore[no-untyped-def]
    needs("cgroup cpuset")
    assert inside(engine, "grep Cpus_allowed_list /proc/self/status", cpuset_cpus="0") == ["Cpus_allowed_list:\t0"]


def test_limits_that_do_not_hold_are_named(engine: Engine) -> None:
    if engine.driver.enforced:
        pytest.skip("all limits hold here")
    assert any(
        "memory limit is not enforced" in w
        for w in engine.containers.create("busybox", "true", mem_limit="64m").warnings
    )


def test_devices_of_the_machine_are_out_of_reach(engine: Engine) -> None:
    lines = inside(engine, "mknod /dev/mem c 1 1 2>/dev/null; head -c1 /dev/mem 2>&1 >/dev/null; true", stderr=True)
    assert lines
    assert any(words in lines[0] for words in ("Operation not permitted", "No such file", "Permission denied"))


# -- verbs -------------------------------------------------------------------------------------------------------------


def test_life(engine: Engine) -> None:
    container = engine.containers.create("busybox", SLEEP, name="life")
    assert container.status == "created"
    container.start()
    container.start()
    assert container.status == "running"
    assert container.pid
    container.pause()
    assert container.status == "paused"
    with pytest.raises(ConflictError, match="already paused"):
        container.pause()
    container.unpause()
    container.stop(timeout=0)
    assert container.status == "exited"
    container.stop()
    container.restart(timeout=0)
    assert container.status == "running"
    container.kill()
    assert container.wait()["StatusCode"] == 137
    for verb in (container.kill, container.pause, container.top, lambda: container.exec_run("true")):
        with pytest.raises(ConflictError, match="not running"):
            verb()
    container.remove()
    assert container.status == "removed"
    with pytest.raises(NoSuchContainer):
        container.reload()


def test_pause_needs_a_freezer_or_signals(sleeper: Container) -> None:
    sleeper.pause()
    with pytest.raises(ConflictError, match="is paused"):
        sleeper.exec_run("true")
    sleeper.unpause()
    assert sleeper.exec_run("echo up").output == b"up\n"


def test_running_containers_are_not_removed(sleeper: Container) -> None:
    with pytest.raises(ConflictError, match="stop the container before removing"):
        sleeper.remove()
    sleeper.remove(force=True)
    assert not sleeper.directory.exists()


def test_exec(sleeper: Container) -> None:
    assert sleeper.exec_run("echo in") == (0, b"in\n")
    assert sleeper.exec_run(["sh", "-c", "echo o; echo e >&2; exit 4"], demux=True) == (4, (b"o\n", b"e\n"))
    code, stream = sleeper.exec_run("echo streamed", stream=True)
    assert (code, b"".join(stream)) == (None, b"streamed\n")
    assert sleeper.exec_run("pwd", workdir="/tmp").output == b"/tmp\n"
    assert b"X=1" in sleeper.exec_run("env", environment={"X": "1"}).output.splitlines()
    assert sleeper.exec_run("sleep 1000", detach=True).exit_code is None
    with pytest.raises(StartError) as caught:
        sleeper.exec_run("no-such-command")
    assert caught.value.exit_code == 127
    with pytest.raises(UsageError, match="No exec command"):
        sleeper.exec_run("")


@pytest.mark.usefixtures("many_ids")
def test_variables_of_an_exec_are_the_containers_and_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker: HOME stays what the container was given, a bare name unsets, and nobody's own variables get in."""
    monkeypatch.setenv("OF_THIS_PROCESS", "secret")
    given = ["HOME=/given", "A=1", "OF_THIS_PROCESS"]
    container = engine.containers.run(
        "busybox", ["sh", "-c", "env; sleep 1000"], detach=True, environment=given, user="7"
    )

    def variables(**settings: Any) -> dict[str, str]:
        lines = container.exec_run("env", **settings).output.decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    own = variables()
    assert (own["HOME"], own["A"], own["HOSTNAME"]) == ("/given", "1", container.id[:12])
    assert variables(user="0")["HOME"] == "/given"
    assert variables(environment={"HOME": "/other"})["HOME"] == "/other"
    assert "A" not in variables(environment=["A", "OF_THIS_PROCESS"])
    assert variables(tty=True)["TERM"].rstrip() == "xterm"
    assert b"secret" not in container.exec_run("env", environment=["OF_THIS_PROCESS"]).output + container.logs()


def test_top_lists_the_processes(sleeper: Container) -> None:
    found = sleeper.top()
    assert found["Titles"][0] == "UID"
    assert [row[-1] for row in found["Processes"]] == ["sleep 1000"]


def test_logs(engine: Engine) -> None:
    container = engine.containers.create("busybox", ["sh", "-c", "echo a; echo b >&2; echo c"])
    container.start()
    container.wait()
    assert sorted(container.logs().split()) == [b"a", b"b", b"c"]
    assert container.logs(stderr=False) == b"a\nc\n"
    assert container.logs(stderr=False, tail=1) == b"c\n"
    assert b"".join(container.logs(stderr=False, stream=True)) == b"a\nc\n"
    with pytest.raises(UsageError, match="at least one stream"):
        container.logs(stdout=False, stderr=False)


def test_attach(engine: Engine) -> None:
    container = engine.containers.create("busybox", "cat", stdin_open=True)
    container.start()
    with container.open_attachment(stdin=True) as attachment:
        attachment.send(b"hello\n")
        attachment.close_stdin()
        assert b"".join(data for _, data in attachment) == b"hello\n"
    with pytest.raises(ConflictError, match="cannot attach to a stopped container"):
        container.attach()


def test_waiting_has_an_end(sleeper: Container) -> None:
    with pytest.raises(TimeoutError):
        sleeper.wait(timeout=0.05)


def test_stats(sleeper: Container) -> None:
    found = sleeper.stats()
    assert found["id"] == sleeper.id
    assert found["memory_stats"]["limit"] > 0
    sleeper.kill()
    sleeper.wait()
    ended = sleeper.stats()
    assert ended["id"] == sleeper.id
    assert ended["memory_stats"] == ended["pids_stats"] == {}
    assert ended["cpu_stats"]["cpu_usage"]["total_usage"] == 0


# -- finding -----------------------------------------------------------------------------------------------------------


def test_by_id_name_and_prefix(engine: Engine, sleeper: Container) -> None:
    for wanted in (sleeper.id, sleeper.short_id, sleeper.id[:3], "sleeper", "/sleeper"):
        assert engine.containers.get(wanted) == sleeper
    for unknown in ("", "nobody", "z" * 64, "0" * 64):
        with pytest.raises(NoSuchContainer):
            engine.containers.get(unknown)


def test_ambiguous_prefix(engine: Engine) -> None:
    seen: dict[str, str] = {}
    for _ in range(20):
        id = engine.containers.create("busybox", "true").id
        if id[0] in seen:
            with pytest.raises(UsageError, match="multiple IDs found with provided prefix"):
                engine.containers.get(id[0])
            return
        seen[id[0]] = id
    pytest.fail("twenty ids with different first digits of sixteen")


def test_names(engine: Engine, sleeper: Container) -> None:
    with pytest.raises(ConflictError, match='The container name "/sleeper" is already in use by container') as caught:
        engine.containers.create("busybox", "true", name="sleeper")
    assert caught.value.exit_code == 1
    other = engine.containers.create("busybox", "true")
    assert "_" in other.name
    with pytest.raises(ConflictError):
        other.rename("sleeper")
    other.rename("renamed")
    assert engine.containers.get("renamed") == other
    with pytest.raises(UsageError):
        other.rename("no good")


def test_a_name_is_free_again_when_its_container_is_gone(engine: Engine) -> None:
    engine.containers.run("busybox", "true", name="again", remove=True)
    engine.containers.run("busybox", "true", name="again", remove=True)


def test_listing_and_filters(engine: Engine, sleeper: Container) -> None:
    stopped = engine.containers.create("busybox", "true", name="stopped")
    stopped.start()
    stopped.wait()
    listing = engine.containers.list
    assert listing() == [sleeper]
    assert listing(all=True) == [stopped, sleeper]
    assert listing(limit=1) == [stopped]
    assert listing(filters={"status": "exited"}) == [stopped]
    assert listing(filters={"exited": 0}) == [stopped]
    assert listing(True, filters={"name": "sle"}) == [sleeper]
    assert listing(True, filters={"label": ["a=b"]}) == [sleeper]
    assert listing(True, filters={"id": stopped.short_id}) == [stopped]
    assert listing(True, filters={"ancestor": "busybox"}) == [stopped, sleeper]
    assert listing(True, filters={"ancestor": {"none": True}}) == []
    assert listing(True, filters={"before": "stopped"}) == [sleeper]
    assert listing(True, filters={"since": "sleeper"}) == [stopped]
    for bad in ({"colour": "red"}, {"status": "odd"}):
        with pytest.raises(UsageError, match="invalid filter"):
            listing(filters=bad)


def test_prune(engine: Engine, sleeper: Container) -> None:
    gone = engine.containers.create("busybox", "true", labels={"x": "1"})
    kept = engine.containers.create("busybox", "true")
    assert engine.containers.prune({"label": "x"})["ContainersDeleted"] == [gone.id]
    assert set(engine.containers.list(all=True)) == {kept, sleeper}


# -- inspection and display --------------------------------------------------------------------------------------------


def test_attrs(engine: Engine) -> None:
    container = engine.containers.create(
        "busybox", ["sh", "-c", "exit 3"], mem_limit="64m", environment=["A=1"], tmpfs={"/t": ""}, labels={"l": "v"}
    )
    found = container.attrs
    assert found["State"]["Status"] == "created"
    container.start()
    container.wait()
    found = container.attrs
    assert (found["Path"], found["Args"]) == ("sh", ["-c", "exit 3"])
    assert (found["State"]["ExitCode"], found["State"]["Running"]) == (3, False)
    assert found["State"]["StartedAt"] < found["State"]["FinishedAt"]
    assert found["HostConfig"]["Memory"] == 64 << 20
    assert "A=1" in found["Config"]["Env"]
    assert found["Config"]["Labels"] == {"l": "v"}
    assert found["Image"] == container.image.id
    assert os.path.exists(found["LogPath"])
    json.dumps(found)


def test_display(sleeper: Container) -> None:
    assert "sleeper" in repr(sleeper)
    assert "Up" in repr(ContainerList([sleeper]))
    assert "<table" in sleeper._repr_html_()
    assert command_words(["sh", "-c", "a very long command"]) == '"sh -c \'a very long …"'
    assert status_words({"status": "created"}) == "Created"


# -- several at once, and what crashes leave ---------------------------------------------------------------------------


def test_threads_share_one_service(engine: Engine) -> None:
    results: list[bytes] = []

    def body(number: int) -> None:
        results.append(engine.containers.run("busybox", ["echo", str(number)], remove=True))

    threads = [threading.Thread(target=body, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(result) for result in results) == list(range(8))


def test_two_engines_on_one_store(engine: Engine, sleeper: Container) -> None:
    with Engine.open(engine.layout.root, runtime_dir=engine.layout.runtime_dir) as other:
        assert other.containers.get("sleeper").status == "running"
        other.containers.get("sleeper").stop(timeout=0)
    assert sleeper.status == "exited"


@pytest.fixture
def aged(engine: Engine) -> Path:
    path = engine.layout.containers / ("f" * 64)
    path.mkdir()
    os.utime(path, (0, 0))
    return path


def test_leftovers_of_a_crash_are_cleared(engine: Engine, sleeper: Container, aged: Path) -> None:
    young = engine.layout.containers / ("e" * 64)
    young.mkdir()
    with engine.db.transaction() as tx:
        tx.execute(
            "INSERT INTO containers (id, name, image_id, image_ref, created_at, settings) SELECT ?, 'ghost', image_id, "
            "image_ref, created_at, settings FROM containers WHERE id = ?",
            ("d" * 64, sleeper.id),
        )
    assert engine.containers.reconcile() == {"rows": ["d" * 64], "directories": ["f" * 64]}
    assert young.exists()
    assert not aged.exists()
    young.rmdir()


def test_copy_where_overlay_is_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    without = dataclasses.replace(
        engine.driver, overlay="copy", warnings=("no overlay: each container gets a copy of its image (test)",)
    )
    monkeypatch.setattr(engine.containers, "driver", without)
    container = engine.containers.create("busybox", ["sh", "-c", "touch /x; ls /x /bin/sh"])
    assert any("copy of its image" in line for line in container.warnings)
    container.start()
    container.wait()
    assert container.logs() == b"/bin/sh\n/x\n"
    container.remove()
    assert not container.directory.exists()


def test_rootless_user(plain_user) -> None:  # type: ignore[no-untyped-def]
    script = """
import labkernel
from labkernel.errors import ContainerExit
lab = labkernel.connect()
assert lab.driver.name == "rootless", lab.driver
print(lab.containers.run("busybox", ["sh", "-c", "id -u; rm -rf /usr; mv /bin/ls /x; ls / | grep x"], remove=True))
c = lab.containers.run("busybox", "sleep 1000", detach=True, mem_limit="64m", volumes=["data:/data"])
print(c.exec_run("echo hi").output, c.status, len(c.top()["Processes"]))
c.remove(force=True, v=True)
lab.volumes.get("data").remove()
print(lab.containers.list(all=True), [*lab.layout.containers.iterdir()])
"""
    done = plain_user.python("-c", script)
    if "DriverError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "b'0\\nx\\n'"
    assert lines[1] == "b'hi\\n' running 1"
