"""What a container shares with the machine or with another one, devices, kernel parameters, and `update`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel.cli import TerminalHost, run
from labkernel.engine import Engine
from labkernel.errors import ConflictError, LabkernelError, NoSuchContainer, StartError, UsageError
from labkernel.running.container import Container

ROOT = os.geteuid() == 0
NAMESPACES = ("pid", "net", "ipc", "uts", "cgroup", "mnt")


def output(engine: Engine, *command: str, **settings: Any) -> str:
    found: bytes = engine.containers.run("busybox", list(command), remove=True, stderr=True, **settings)
    return found.decode().strip()


def spaces(pid: int | str) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in NAMESPACES}


def common(container: Container, pid: int | str) -> list[str]:
    """The namespaces it has in common with a process."""
    mine, theirs = spaces(container.pid or 0), spaces(pid)
    return [name for name in NAMESPACES if mine[name] == theirs[name]]


@pytest.fixture
def other(engine: Engine) -> Container:
    found: Container = engine.containers.run("busybox", ["sleep", "1000"], detach=True, name="other", hostname="there")
    return found


# -- namespaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "shared"), [("pid_mode", "pid"), ("network_mode", "net"), ("ipc_mode", "ipc"), ("uts_mode", "uts")]
)
def test_a_namespace_of_the_machine(engine: Engine, other: Container, setting: str, shared: str) -> None:
    settings: Any = {setting: "host"}
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True, **settings)
    supervisor = engine.runtime.ensure().pid
    # without a cgroup of its own, every container is in the machine's cgroup namespace
    assert set(common(other, supervisor)) <= {"cgroup"}
    assert set(common(container, supervisor)) == {shared, *common(other, supervisor)}
    assert container.exec_run(["true"]).exit_code == 0
    container.stop(timeout=0)
    assert container.status == "exited"


def test_cgroup_namespace_of_the_machine(engine: Engine, needs: Any) -> None:
    needs("cgroup memory")
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True, cgroupns="host")
    assert spaces(container.pid or 0)["cgroup"] == spaces(engine.runtime.ensure().pid)["cgroup"]


@pytest.mark.parametrize(("setting", "shared"), [("pid_mode", "pid"), ("network_mode", "net")])
def test_a_namespace_of_another_container(engine: Engine, other: Container, setting: str, shared: str) -> None:
    settings: Any = {setting: f"container:{other.name}"}
    container = engine.containers.run("busybox", ["sleep", "999"], detach=True, **settings)
    theirs = spaces(other.pid or 0)
    assert set(common(container, other.pid or 0)) == {shared, *common(other, engine.runtime.ensure().pid)}
    inside = container.exec_run(["readlink", f"/proc/self/ns/{shared}"]).output.decode().strip()
    assert inside == theirs[shared]
    if shared == "pid":
        assert b"sleep 1000" in container.exec_run(["ps"]).output
        assert container.exec_run(["sh", "-c", "echo $PPID"]).exit_code == 0
    container.kill()
    assert (container.status, other.status) == ("exited", "running")
    assert container.attrs["HostConfig"][f"{'Pid' if shared == 'pid' else 'Network'}Mode"] == f"container:{other.id}"


def test_joining_what_does_not_run(engine: Engine, other: Container) -> None:
    other.stop(timeout=0)
    with pytest.raises(StartError, match="cannot join network namespace of a non running container"):
        engine.containers.run("busybox", ["true"], network_mode="container:other")
    with pytest.raises(NoSuchContainer):
        engine.containers.create("busybox", ["true"], pid_mode="container:nobody")
    found = engine.containers.list(all=True, filters={"status": "created"})[0]
    other.start()
    found.start()
    assert found.wait()["StatusCode"] == 0


def test_modes_that_are_none(engine: Engine) -> None:
    for setting in ("pid_mode", "ipc_mode", "uts_mode", "cgroupns"):
        settings: Any = {setting: "sideways"}
        with pytest.raises(UsageError):
            engine.containers.create("busybox", **settings)
    with pytest.raises(UsageError, match="not in this release"):
        engine.containers.create("busybox", uts_mode="container:other")
    with pytest.raises(UsageError, match="hostname and the UTS mode"):
        engine.containers.create("busybox", uts_mode="host", hostname="mine")


# -- privileges, devices, parameters, groups -------------------------------------------------------------------------


def test_privileged(engine: Engine) -> None:
    seen = output(engine, "sh", "-c", "grep -E '^(CapEff|Seccomp):' /proc/self/status; ls /dev", privileged=True)
    plain = output(engine, "sh", "-c", "grep -E '^(CapEff|Seccomp):' /proc/self/status")
    capabilities = int(seen.split("CapEff:")[1].split()[0], 16)
    assert capabilities & 1 << 21  # CAP_SYS_ADMIN
    assert not int(plain.split("CapEff:")[1].split()[0], 16) & 1 << 21
    assert "Seccomp:\t0" in seen
    assert {"null", "zero", "pts", "shm"} <= set(seen.split())
    if ROOT:
        assert output(engine, "sh", "-c", "mount -t tmpfs none /mnt && touch /mnt/x && ls /mnt", privileged=True) == "x"
        assert (
            output(engine, "sh", "-c", "touch /sys/fs/x 2>&1; test -w /proc/sys && echo w", privileged=True)[-1] == "w"
        )


def test_device(engine: Engine) -> None:
    assert output(engine, "sh", "-c", "head -c 3 /dev/mine | wc -c", devices=["/dev/zero:/dev/mine:r"]) == "3"
    if Path("/dev/loop-control").exists() and ROOT:
        assert "10, 237" in output(engine, "ls", "-l", "/dev/loop-control", devices=["/dev/loop-control"]).replace(
            "  ", " "
        )
    for wrong in ("/dev/nope", "/etc/passwd"):
        with pytest.raises(UsageError, match="error gathering device information"):
            engine.containers.create("busybox", devices=[wrong])
    with pytest.raises(UsageError, match="invalid device specification"):
        engine.containers.create("busybox", devices=["/dev/zero:/dev/mine:rx"])


def test_device_cgroup(engine: Engine, needs: Any) -> None:
    if not ROOT or not Path("/dev/fuse").exists():
        pytest.skip("needs root and /dev/fuse")
    needs("cgroup devices")
    line = "mknod /dev/x c 10 229; (: < /dev/x) 2>&1; :"
    assert "not permitted" in output(engine, "sh", "-c", line)
    assert "not permitted" not in output(engine, "sh", "-c", line, devices=["/dev/fuse"])


def test_sysctl(engine: Engine) -> None:
    values = {"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shmmni": "777"}
    line = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni"
    if not ROOT:
        values.pop("kernel.shmmni")
    assert output(engine, "sh", "-c", line, sysctls=values).split()[: len(values)] == list(values.values())
    with pytest.raises(UsageError, match=r"sysctl 'kernel.panic' is not allowed"):
        engine.containers.create("busybox", sysctls={"kernel.panic": "1"})
    with pytest.raises(UsageError):
        engine.containers.create("busybox", sysctls={"net.../kernel/panic": "1"})


def test_group_add(engine: Engine, needs: Any) -> None:
    if not ROOT:
        pytest.skip("a single id has no other groups")
    groups = output(engine, "id", "-G", group_add=["audio", "4321"] if "audio" in _groups(engine) else ["4321"])
    assert "4321" in groups.split()
    with pytest.raises(StartError, match="unable to find group nosuch"):
        output(engine, "true", group_add=["nosuch"])


def _groups(engine: Engine) -> str:
    return output(engine, "cat", "/etc/group")


def test_name_servers_and_hosts(engine: Engine) -> None:
    settings = {
        "dns": ["10.9.8.7"],
        "dns_search": ["lab.test"],
        "dns_opt": ["ndots:2"],
        "extra_hosts": {"far": "1.2.3.4"},
    }
    text = output(engine, "cat", "/etc/resolv.conf", "/etc/hosts", **settings)
    assert "nameserver 10.9.8.7\nsearch lab.test\noptions ndots:2" in text
    assert "1.2.3.4\tfar" in text


# -- volumes of others -----------------------------------------------------------------------------------------------


def test_volumes_from(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("bound")
    first = engine.containers.create("busybox", ["true"], volumes=[f"{tmp_path}:/b", "/anonymous"], name="first")
    output(engine, "sh", "-c", "echo kept > /anonymous/y", volumes_from=["first"])
    assert output(engine, "cat", "/b/x", "/anonymous/y", volumes_from=["first:ro"]) == "boundkept"
    assert "Read-only" in output(engine, "sh", "-c", "touch /b/z 2>&1; :", volumes_from=["first:ro"])
    with pytest.raises(NoSuchContainer):
        engine.containers.create("busybox", volumes_from=["nobody"])
    with pytest.raises(UsageError, match="invalid mode"):
        engine.containers.create("busybox", volumes_from=["first:upside"])
    first.remove(v=True)
    assert [volume for volume in engine.volumes.list() if not volume.name.startswith("files")] == []


# -- update ----------------------------------------------------------------------------------------------------------


def figure(container: Container, controller: str, v1: str, v2: str) -> str:
    paths = container.runtime_state()["cgroup"]["paths"]
    return (Path(paths.get("", paths.get(controller, ""))) / (v2 if "" in paths else v1)).read_text().strip()


def test_update_of_a_running_container(engine: Engine, needs: Any) -> None:
    needs("cgroup memory", "cgroup pids", "cgroup cpu")
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True, mem_limit="32m", pids_limit=50)
    assert container.update(mem_limit="64m", pids_limit=20, cpu_shares=512) == {"Warnings": []}
    assert figure(container, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert figure(container, "pids", "pids.max", "pids.max") == "20"
    container.update(nano_cpus=500_000_000)
    assert figure(container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    host = container.attrs["HostConfig"]
    assert (host["Memory"], host["PidsLimit"], host["CpuShares"], host["NanoCpus"]) == (64 << 20, 20, 512, 500_000_000)
    container.restart(timeout=0)
    assert figure(container, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    container.update(mem_limit="16m")
    assert figure(container, "memory", "memory.limit_in_bytes", "memory.max") == str(16 << 20)
    with pytest.raises(ConflictError, match="CPU Quota cannot be updated as NanoCPUs has already been set"):
        container.update(cpu_quota=1000)
    with pytest.raises(UsageError, match="Minimum memory limit"):
        container.update(mem_limit="1m")
    with pytest.raises(UsageError, match="unknown argument: colour"):
        container.update(colour="red")


def test_update_of_a_restart_policy(engine: Engine) -> None:
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True)
    container.update(restart_policy={"Name": "on-failure", "MaximumRetryCount": 2})
    assert container.attrs["HostConfig"]["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 2}
    if ROOT:
        os.kill(container.pid or 0, signal.SIGKILL)
        wait_until(lambda: container.attrs["RestartCount"] == 1, "it is started again")
    container.update(restart_policy={"Name": "no"})
    assert container.config()["labkernel"]["restart"]["name"] == "no"


# -- the flags -------------------------------------------------------------------------------------------------------


def test_flags(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").write_text("# words\nA=1\nB=two words\n")
    (tmp_path / "labels").write_text("one=1\ntwo=2\n")
    (tmp_path / "data").mkdir()
    words = [
        *("create", "--name", "flagged", "--env-file", "env", "--label-file", "labels", "--cidfile", "cid"),
        *("--mount", "type=bind,src=data,dst=/d,readonly,bind-propagation=rprivate"),
        *("--mount", "type=tmpfs,dst=/t,tmpfs-size=1m", "--ulimit", "nofile=64:128", "--shm-size", "1m"),
        *("--stop-signal", "INT", "--stop-timeout", "3", "--oom-score-adj", "100", "--add-host", "far:1.2.3.4"),
        *("--uts", "host", "--ipc", "host", "--pid", "host", "--cgroupns", "host", "--device", "/dev/zero:/dev/z"),
        *("--sysctl", "net.ipv4.ip_default_ttl=65", "--group-add", "12", "--cpuset-cpus", "0"),
        *("--memory-reservation", "8m", "busybox", "sh", "-c"),
        "echo $A $B; ulimit -n; grep -c . /proc/self/status >/dev/null; df -k /dev/shm | tail -1; touch /d/x",
    ]
    assert run(words, TerminalHost(lambda: engine)) == 0
    container = engine.containers.get("flagged")
    assert (tmp_path / "cid").read_text() == container.id
    host, config = container.attrs["HostConfig"], container.attrs["Config"]
    assert (host["UTSMode"], host["IpcMode"], host["PidMode"], host["CgroupnsMode"]) == ("host",) * 4
    assert host["Devices"] == [{"PathOnHost": "/dev/zero", "PathInContainer": "/dev/z", "CgroupPermissions": "rwm"}]
    assert host["Sysctls"] == {"net.ipv4.ip_default_ttl": "65"}
    assert config["Labels"].items() >= {"one": "1", "two": "2"}.items()
    assert {"A=1", "B=two words"} <= set(config["Env"])
    container.start()
    container.wait()
    assert b"1 two words\n64\n" in container.logs()
    assert b"Read-only file system" in container.logs()
    assert run(words, TerminalHost(lambda: engine)) != 0


def test_update_as_command(engine: Engine, needs: Any, capfd: pytest.CaptureFixture[str]) -> None:
    needs("cgroup memory")
    engine.containers.run("busybox", ["sleep", "1000"], detach=True, name="tuned")
    host = TerminalHost(lambda: engine)
    assert run(["update", "-m", "32m", "--restart", "always", "tuned"], host) == 0
    assert capfd.readouterr().out == "tuned\n"
    assert engine.containers.get("tuned").attrs["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert run(["update", "tuned"], host) == 1
    assert "you must provide one or more flags" in capfd.readouterr().err
    assert run(["update", "-m", "32m", "nobody"], host) == 1


def test_refused_settings_leave_nothing(engine: Engine) -> None:
    before = set(os.listdir(engine.layout.containers))
    for settings in ({"devices": ["/dev/nope"]}, {"volumes_from": ["nobody"]}, {"sysctls": {"a.b": "1"}}):
        with pytest.raises(LabkernelError):
            engine.containers.create("busybox", **settings)
    assert set(os.listdir(engine.layout.containers)) == before


# -- small things docker does ----------------------------------------------------------------------------------------


def test_a_kill_is_answered_after_the_end(engine: Engine) -> None:
    for paused in (False, True):
        container = engine.containers.run("busybox", ["sleep", "1000"], detach=True)
        if paused:
            container.pause()
        container.kill()
        assert container.status == "exited"
        container.remove()


def test_a_container_that_has_removed_itself_is_never_seen_as_created(engine: Engine) -> None:
    for _ in range(10):
        engine.containers.run("busybox", ["sh", "-c", "echo > /x"], remove=True)
        assert "created" not in [container.status for container in engine.containers.list(all=True)]


def test_a_working_directory_made_for_the_container(engine: Engine) -> None:
    seen = output(
        engine, "stat", "-c", "%a", "/new", "/new/deeper", "/new/deeper/still", working_dir="/new/deeper/still"
    )
    assert seen.split() == ["755"] * 3


def test_the_first_size_of_a_terminal(engine: Engine) -> None:
    assert output(engine, "stty", "size", tty=True, console_size=(33, 77)) == "33 77"


def test_a_listing_needs_no_image(engine: Engine) -> None:
    code = (
        "import sys, os; from labkernel.cli import run, TerminalHost; assert run(['ps', '-a'], TerminalHost()) == 0;"
        "sys.exit('msgspec' in sys.modules or 'labkernel.images' in sys.modules)"
    )
    places = {"LABKERNEL_ROOT": str(engine.layout.root), "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir)}
    engine.containers.create("busybox", name="listed")
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **places}, capture_output=True, text=True, check=False
    )
    assert (found.returncode, "listed" in found.stdout) == (0, True), found.stderr


def test_as_a_plain_user(plain_user: Any) -> None:
    """Sharing, cp, diff and commit without root; the supervisor stays whole (it may not return to the first pid
    namespace, so it must never leave it)."""
    made = plain_user.labkernel("run", "-d", "--name", "bb", "busybox", "sleep", "1000")
    if made.returncode:
        pytest.skip(f"no containers without root here: {made.stderr.strip()[-200:]}")
    for flags in (["--pid", "container:bb"], ["--network", "container:bb"], ["--pid", "host"], ["--privileged"]):
        found = plain_user.labkernel("run", "--rm", *flags, "busybox", "ps")
        assert found.returncode == 0, (flags, found.stderr)
        assert ("sleep 1000" in found.stdout) == (flags[0] == "--pid")
    (plain_user.home / "f").write_text("file\n")
    for words in (["cp", "f", "bb:/w"], ["cp", "bb:/w", "out"], ["diff", "bb"], ["commit", "bb", "made:x"], ["ps"]):
        found = plain_user.labkernel(*words)
        assert found.returncode == 0, (words, found.stderr)
    assert (plain_user.home / "out").read_text() == "file\n"
    assert plain_user.labkernel("run", "--rm", "made:x", "cat", "/w").stdout == "file\n"
    assert plain_user.labkernel("rm", "-f", "bb").returncode == 0
