"""Command lines whose outcome was compared with docker's own, on the same image: what differed once is held here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from labkernel.engine import Engine
from labkernel.errors import UsageError
from labkernel.imaging import provision

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(engine: Engine, tmp_path: Path) -> Cli:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
    }

    def run(*words: str, ok: int = 0, **more: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-m", "labkernel.cli", *words],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            **more,
        )
        assert done.returncode == ok, f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done  # type: ignore[no-any-return]

    return run


def words(*flags: str) -> tuple[str, ...]:
    return ("run", "--rm", "--network", "none", *flags, "lab/busybox")


# -- who and where a command is --------------------------------------------------------------------------------------


def test_the_primary_group_is_a_supplementary_one_too(cli: Cli, engine: Engine) -> None:
    if engine.driver.name != "root":
        pytest.skip("one id only")
    script = "grep Groups: /proc/self/status"
    assert cli(*words("-u", "1000:1001"), "sh", "-c", script).stdout.split()[1:] == ["1001"]
    assert cli(*words("-u", "1000:1001", "--group-add", "7"), "sh", "-c", script).stdout.split()[1:] == ["7", "1001"]
    cli("run", "-d", "--name", "web", "--network", "none", "lab/busybox", "sleep", "600")
    assert cli("exec", "-u", "12:13", "web", "sh", "-c", script).stdout.split()[1:] == ["13"]


@pytest.mark.parametrize("user", ["-1", "4294967296", "0:4294967296"])
def test_ids_out_of_range(cli: Cli, user: str) -> None:
    done = cli(*words("--user", user), "true", ok=125)
    assert "uids and gids must be in range 0-2147483647" in done.stderr


def test_exec_that_cannot_be_set_up_is_126(cli: Cli) -> None:
    cli("run", "-d", "--name", "web", "--network", "none", "lab/busybox", "sleep", "600")
    assert "no such file or directory" in cli("exec", "-w", "/nosuch", "web", "pwd", ok=126).stderr
    refused = cli("exec", "-u", "nosuch", "web", "id", ok=126).stderr
    assert "unable to find user nosuch" in refused
    assert "executable bit" not in refused
    assert "not found" in cli("exec", "web", "nosuch", ok=127).stderr


# -- mounts and namespaces -------------------------------------------------------------------------------------------


def test_tmpfs_is_everybodys_unless_it_covers_a_directory(cli: Cli) -> None:
    script = "stat -c %a /fresh /etc /given"
    flags = ("--tmpfs", "/fresh", "--tmpfs", "/etc", "--tmpfs", "/given:mode=700")
    assert cli(*words(*flags), "sh", "-c", script).stdout.split() == ["1777", "755", "700"]
    cli(
        "create", "--name", "web", "--network", "none", "--tmpfs", "/fresh", "lab/busybox", "stat", "-c", "%a", "/fresh"
    )
    for _ in range(2):  # the same after a restart
        assert cli("start", "-a", "web").stdout == "1777\n"


def test_without_shared_memory(cli: Cli) -> None:
    script = "grep -c ' /dev/shm ' /proc/mounts; ls /dev/shm; echo end"
    assert cli(*words("--ipc", "none"), "sh", "-c", script).stdout == "0\nend\n"


def test_domain_and_host_names(cli: Cli) -> None:
    script = "cat /proc/sys/kernel/domainname; hostname"
    flags = ("--domainname", "example.org", "--hostname", "web")
    assert cli(*words(*flags), "sh", "-c", script).stdout == "example.org\nweb\n"
    flags = ("--add-host", "db=10.0.0.9", "--add-host", "six:fd00::9")
    hosts = cli(*words(*flags), "cat", "/etc/hosts").stdout
    assert "10.0.0.9\tdb\n" in hosts
    assert "fd00::9\tsix\n" in hosts


def test_propagation_needs_a_mount_that_takes_part(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"private": "", "shared": "shared:7 ", "slave": "master:7 "}

    def check(kind: str, mode: str) -> None:
        text = f"1 0 8:1 / / rw {rows[kind]}- ext4 /dev/sda rw\n"
        monkeypatch.setattr("builtins.open", lambda *_a, **_k: __import__("io").StringIO(text))
        try:
            provision._check_propagation("/srv", mode.split(","))
        finally:
            monkeypatch.undo()

    for kind, mode in (("shared", "rshared"), ("shared", "ro,slave"), ("slave", "rslave"), ("private", "rprivate,ro")):
        check(kind, mode)
    for kind, mode in (("private", "rshared"), ("private", "rslave"), ("slave", "shared")):
        with pytest.raises(UsageError, match="is mounted on / but it is not a shared"):
            check(kind, mode)


# -- files of flags --------------------------------------------------------------------------------------------------


def test_env_and_label_files(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("\ufeffA=1\n# no\n\n   B=2 \nNOT_SET\n")
    assert cli(*words("--env-file", "env"), "sh", "-c", 'echo "$A|$B|"').stdout == "1|2 |\n"
    (tmp_path / "bad").write_text("two words=1\n")
    assert "variable 'two words' contains whitespaces" in cli(*words("--env-file", "bad"), "true", ok=125).stderr
    (tmp_path / "bad").write_text("=1\n")
    assert "no variable name on line '=1'" in cli(*words("--env-file", "bad"), "true", ok=125).stderr
    assert "open nosuch: no such file" in cli(*words("--env-file", "nosuch"), "true", ok=125).stderr
    (tmp_path / "labels").write_text("a=1\nbare\nb=2=3\n")
    cli("create", "--name", "web", "--label-file", "labels", "-l", "a=over", "lab/busybox")
    assert json.loads(cli("inspect", "-f", "{{json .Config.Labels}}", "web").stdout) == {"a": "over", "b": "2=3"}


def test_cidfile_comes_first_and_goes_when_nothing_was_made(cli: Cli, engine: Engine, tmp_path: Path) -> None:
    cli("run", "--cidfile", "cid", "--network", "none", "lab/busybox", "true")
    (container,) = engine.containers.list(all=True)
    assert (tmp_path / "cid").read_text() == container.id
    assert "container ID file found" in cli("create", "--cidfile", "cid", "lab/busybox", ok=1).stderr
    assert "no such file or directory" in cli("create", "--cidfile", "no/dir", "lab/busybox", ok=1).stderr
    cli("run", "--cidfile", "other", "--network", "none", "nosuch/image:1", "true", ok=125)
    assert not (tmp_path / "other").exists()
    assert engine.containers.list(all=True) == [container]
    cli("run", "--cidfile", "failed", "--network", "none", "lab/busybox", "nosuch", ok=127)
    assert len((tmp_path / "failed").read_text()) == 64


def test_output_into_what_is_no_file_is_written_there(cli: Cli, tmp_path: Path) -> None:
    """As root a renamed archive would take the place of /dev/null, for the whole machine."""
    cli("create", "--name", "web", "lab/busybox")
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    cli("export", "-o", "pipe", "web")
    reader.join(60)
    assert (tmp_path / "pipe").is_fifo()
    assert b"ustar" in found[0]
    cli("save", "-o", "/dev/null", "lab/busybox")
    assert Path("/dev/null").is_char_device()


# -- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "brief"),
    [
        ("create --name x! lab/busybox", 1, "Invalid container name (x!)"),
        ("run --name x! lab/busybox", 125, "Invalid container name (x!)"),
        ("create -m 1m lab/busybox", 1, "Minimum memory limit"),
        ("run --volumes-from nosuch lab/busybox", 125, "No such container: nosuch"),
        ("run --pid container:nosuch lab/busybox", 125, "No such container: nosuch"),
        ("create --volumes-from nosuch lab/busybox", 1, "No such container: nosuch"),
        ("network create --subnet x net", 1, "invalid CIDR address"),
        ("volume create bad/name", 1, "includes invalid characters"),
        ("logs --since x nosuch", 1, "No such container: nosuch"),
        ("inspect --type frob x", 1, 'unknown type: "frob"'),
        ("kill --signal NOPE nosuch", 1, "No such container: nosuch"),
        ("restart --frob x", 125, "unknown flag: --frob"),
    ],
)
def test_codes_of_what_client_and_daemon_refuse(cli: Cli, line: str, code: int, brief: str) -> None:
    assert brief in cli(*line.split(), ok=code).stderr


# -- looking at containers -------------------------------------------------------------------------------------------


def test_inspect_as_scripts_use_it(cli: Cli) -> None:
    cli("create", "--name", "web", "-e", "A=1", "--stop-signal", "USR1", "-v", "/data", "lab/busybox", "sleep", "9")
    form = "{{.Config.StopSignal}} {{.Config.StopTimeout}} {{.HostConfig.Binds}} {{(index .Mounts 0).Destination}}"
    assert cli("inspect", "-f", form, "web").stdout == "SIGUSR1 <nil> [] /data\n"
    config = json.loads(cli("inspect", "-f", "{{json .Config}}", "web").stdout)
    assert config["Env"][0] == "A=1"
    assert not any(word.startswith("HOSTNAME=") for word in config["Env"])
    assert not {"Healthcheck", "ExposedPorts", "StopTimeout"} & config.keys()
    assert cli("inspect", "-s", "-f", "{{.SizeRw}} {{gt .SizeRootFs 0}}", "web").stdout == "0 true\n"
    assert cli("inspect", "nosuch", ok=1).stdout == "[]\n"


def test_filters_of_ports(cli: Cli) -> None:
    cli("create", "--name", "web", "-p", "8080-8081:80-81", "--expose", "7/udp", "lab/busybox")
    cli("create", "--name", "other", "lab/busybox")
    for filter, there in [
        ("publish=8080", True),
        ("publish=8000-8080/tcp", True),
        ("publish=80", False),
        ("publish=8080/udp", False),
        ("expose=80", True),
        ("expose=7/udp", True),
        ("expose=7", False),
    ]:
        found = cli("ps", "-a", "--filter", filter, "--format", "{{.Names}}").stdout.split()
        assert found == (["web"] if there else []), filter
    assert cli("ps", "-aq", "--filter", "is-task=true").stdout == ""
    quiet = cli("ps", "-aq", "--format", "{{.Names}}")
    assert "Ignoring custom format" in quiet.stderr
    assert len(quiet.stdout.split()[0]) == 12


def test_prune_by_what_is_not_labelled(cli: Cli, engine: Engine) -> None:
    cli("create", "--name", "web", "-l", "keep=1", "lab/busybox")
    cli("create", "--name", "other", "-l", "keep=2", "lab/busybox")
    cli("container", "prune", "-f", "--filter", "label!=keep=1")
    assert [container.name for container in engine.containers.list(all=True)] == ["web"]
    cli("volume", "create", "--label", "keep=1", "kept")
    cli("volume", "create", "gone")
    cli("volume", "prune", "-af", "--filter", "label!=keep")
    assert [volume.name for volume in engine.volumes.list(filters={"name": ["kept", "gone"]})] == ["kept"]


def test_stats_of_one_that_does_not_run(cli: Cli) -> None:
    cli("create", "--name", "web", "lab/busybox")
    form = "{{.Name}} {{.CPUPerc}} {{.MemUsage}} {{.PIDs}}"
    assert cli("stats", "--no-stream", "--format", form, "web").stdout == "web 0.00% 0B / 0B 0\n"


def test_restart_with_a_signal(cli: Cli, engine: Engine) -> None:
    script = "trap 'echo usr1; exit' USR1; echo up; while :; do sleep 0.1; done"
    container = engine.containers.run("lab/busybox", ["sh", "-c", script], name="web", detach=True, network_mode="none")
    lines = container.logs(stream=True)
    assert next(lines) == b"up\n"
    cli("restart", "-s", "USR1", "web")
    assert next(lines) == b"usr1\n"
