"""docker's own client against the daemon: everyday commands, what they print and how they end."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cli
from waiting import wait_until

from labkernel.engine import Engine

IMAGE = "lab/busybox"
FOREVER = ("sh", "-c", "trap 'exit 3' TERM; echo ready; while true; do sleep 0.1; done")


def names_in(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getnames()


def test_version_and_info(docker: Cli) -> None:
    told = json.loads(docker.ok("version", "--format", "{{json .}}"))
    assert told["Server"]["ApiVersion"] == "1.50"
    assert told["Server"]["MinAPIVersion"] == "1.24"
    info = json.loads(docker.ok("info", "--format", "{{json .}}"))
    assert info["OSType"] == "linux"
    assert not info.get("ServerErrors")
    assert "Server Version" in docker.ok("info")


def test_every_version_of_the_api_answers(docker: Cli) -> None:
    for version in ("1.24", "1.30", "1.41", "1.43", "1.50"):
        docker.environment["DOCKER_API_VERSION"] = version
        assert docker.ok("ps", "-q") == ""
    docker.environment["DOCKER_API_VERSION"] = "1.99"
    assert "is too new. Maximum supported API version is 1.50" in docker.fails("ps")


def test_run_gives_output_on_both_streams_and_the_exit_code(docker: Cli) -> None:
    done = docker.run("run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert docker.ok("ps", "-aq") == ""


def test_run_passes_stdin_and_its_end(docker: Cli) -> None:
    data = os.urandom(3 << 20)
    done = subprocess.run(
        [docker.program, "run", "--rm", "-i", IMAGE, "sh", "-c", "cat; echo done >&2"],
        env=docker.environment,
        input=data,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"done\n")
    assert done.stdout == data


@pytest.mark.parametrize(("command", "code"), [("nosuch", 127), ("/etc/passwd", 126), ("/no/such", 127)])
def test_a_command_that_cannot_start_ends_run_with_dockers_code(docker: Cli, command: str, code: int) -> None:
    said = docker.fails("run", "--rm", IMAGE, command, code=code)
    assert "Error response from daemon" in said
    assert docker.ok("ps", "-aq") == ""


def test_wrong_settings_end_with_125_and_leave_nothing(docker: Cli) -> None:
    assert "Minimum memory limit allowed is 6MB" in docker.fails("run", "-m", "1m", IMAGE, "true", code=125)
    assert "No such image" in docker.fails("run", "--pull=never", "no/such", "true", code=125)
    assert docker.ok("ps", "-aq") == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--network", "nosuch"), "network nosuch not found"),
        (("--network", "container:nosuch"), "No such container: nosuch"),
        (("--pid", "container:nosuch"), "No such container: nosuch"),
        (("--volumes-from", "nosuch"), "No such container: nosuch"),
    ],
)
def test_what_else_is_missing_is_not_taken_for_the_image(docker: Cli, flags: tuple[str, ...], said: str) -> None:
    told = docker.fails("run", *flags, IMAGE, "true", code=125)
    assert said in told
    assert "Unable to find image" not in told
    assert docker.ok("ps", "-aq") == ""


@pytest.mark.usefixtures("many_ids")
def test_settings_reach_the_container(docker: Cli, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host")
    words = (
        *("run", "--rm", "-e", "GREETING=hello", "-w", "/srv", "-u", "0:7", "--hostname", "named"),
        *("-v", f"{tmp_path}:/data:ro", "--tmpfs", "/scratch", "--read-only", "--label", "a=b", "--init"),
        *("--entrypoint", "sh", IMAGE, "-c"),
        "echo $GREETING; pwd; id -g; hostname; cat /data/given; touch /scratch/x /x 2>/dev/null || echo read-only",
    )
    told = docker.ok(*words).splitlines()
    assert told == ["hello", "/srv", "7", "named", "from the hostread-only"]


def test_the_life_of_a_container(docker: Cli) -> None:
    id = docker.ok("create", "--name", "life", IMAGE, *FOREVER)
    assert re.fullmatch("[0-9a-f]{64}", id)
    assert docker.ok("inspect", "-f", "{{.State.Status}} {{.Name}}", "life") == "created /life"
    assert docker.ok("start", "life") == "life"
    assert docker.ok("start", "life") == "life", "a second start is no error"
    assert docker.ok("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.State}}") == f"{id} life running"
    assert docker.ok("pause", "life") == "life"
    assert "(Paused)" in docker.ok("ps", "--format", "{{.Status}}")
    assert docker.ok("unpause", "life") == "life"
    assert docker.ok("rename", "life", "other") == ""
    assert docker.ok("restart", "-t", "20", "other") == "other"
    # Before its trap is set, process 1 does not hear of the signal at all.
    wait_until(lambda: docker.ok("logs", "other").count("ready") == 2)
    assert docker.ok("stop", "-t", "20", "other") == "other"
    assert docker.ok("inspect", "-f", "{{.State.ExitCode}}", "other") == "3"
    assert docker.ok("stop", "other") == "other", "a second stop is no error"
    assert "is not running" in docker.fails("kill", "other")
    docker.ok("start", "other")
    assert docker.ok("kill", "-s", "KILL", "other") == "other"
    assert docker.ok("wait", "other") == "137"
    assert docker.ok("rm", "other") == "other"
    assert "No such container: other" in docker.fails("rm", "other")


def test_a_running_container_is_not_removed_without_force(docker: Cli) -> None:
    docker.ok("run", "-d", "--name", "busy", IMAGE, *FOREVER)
    assert "stop the container before removing or force remove" in docker.fails("rm", "busy")
    assert docker.ok("rm", "-f", "busy") == "busy"


def test_names_are_unique(docker: Cli) -> None:
    docker.ok("create", "--name", "taken", IMAGE)
    said = docker.fails("create", "--name", "taken", IMAGE)
    assert 'Conflict. The container name "/taken" is already in use by container' in said


def test_wait_begun_before_the_end_tells_the_exit_code(docker: Cli) -> None:
    docker.ok("run", "-d", "--name", "later", "-i", IMAGE, "sh", "-c", "read x; exit 5")
    waiting = docker.popen("wait", "later")
    attached = docker.popen("attach", "later")
    attached.communicate(b"go\n", timeout=90)
    assert attached.returncode == 5
    assert waiting.communicate(timeout=90)[0] == b"5\n"


def test_start_attached_follows_a_container_from_its_start(docker: Cli) -> None:
    docker.ok("create", "--name", "again", "-i", IMAGE, "sh", "-c", "cat; exit 4")
    for words in ("one", "two"):
        done = docker.run("start", "-ai", "again", stdin=words)
        assert (done.returncode, done.stdout) == (4, words)


def test_logs(docker: Cli) -> None:
    docker.ok("run", "--name", "talker", IMAGE, "sh", "-c", "for i in 1 2 3; do echo line $i; done; echo bad >&2")
    done = docker.run("logs", "talker")
    assert (done.stdout, done.stderr) == ("line 1\nline 2\nline 3\n", "bad\n")
    assert docker.run("logs", "--tail", "2", "talker").stdout == "line 3\n"
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z line 1\n", docker.run("logs", "-t", "talker").stdout)
    assert docker.run("logs", "--until", "2020-01-01T00:00:00Z", "talker").stdout == ""
    assert docker.run("logs", "--since", "10m", "talker").stdout == "line 1\nline 2\nline 3\n"


def test_log_options(docker: Cli) -> None:
    words = ("--log-opt", "max-size=5k", "--log-opt", "max-file=2")
    count = "i=0; while [ $i -lt 60 ]; do seq $((i*100+1)) $((i*100+100)); i=$((i+1)); sleep 0.02; done"
    docker.ok("run", "--name", "rotated", *words, IMAGE, "sh", "-c", count)
    lines = docker.run("logs", "rotated").stdout.splitlines()
    assert lines == [str(number) for number in range(int(lines[0]), 6001)], "what is kept, the oldest first"
    assert 100 < len(lines) < 6000
    docker.ok("run", "--name", "silent", "--log-driver", "none", IMAGE, "echo", "nothing")
    assert "configured logging driver does not support reading" in docker.fails("logs", "silent")
    assert "no log driver named 'nosuch'" in docker.fails("run", "--log-driver", "nosuch", IMAGE, code=125)


def test_logs_follow_until_the_end(docker: Cli) -> None:
    docker.ok("run", "-d", "-i", "--name", "slow", IMAGE, "sh", "-c", "echo first; read x; echo last")
    following = docker.popen("logs", "-f", "slow")
    assert following.stdout is not None
    assert following.stdout.readline() == b"first\n"
    docker.run("attach", "slow", stdin="go\n")
    assert following.communicate(timeout=90)[0] == b"last\n"
    assert following.returncode == 0


@pytest.mark.usefixtures("many_ids")
def test_exec(docker: Cli) -> None:
    docker.ok("run", "-d", "--name", "host", IMAGE, *FOREVER)
    assert docker.ok("exec", "-e", "A=b", "-w", "/tmp", "-u", "7", "host", "sh", "-c", "echo $A $PWD; id -u") == (
        "b /tmp\n7"
    )
    assert docker.run("exec", "host", "sh", "-c", "exit 9").returncode == 9
    assert docker.ok("exec", "-i", "host", "cat", stdin="through") == "through"
    assert docker.run("exec", "host", "nosuch").returncode == 127
    docker.ok("exec", "-d", "host", "touch", "/tmp/made")
    wait_until(lambda: docker.run("exec", "host", "test", "-e", "/tmp/made").returncode == 0)
    docker.ok("stop", "-t", "20", "host")
    assert "is not running" in docker.fails("exec", "host", "true")


def test_a_terminal_has_its_size_and_detaches_by_its_keys(docker: Cli) -> None:
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 99, 0, 0))
    command = ("run", "-it", "--name", "screen", IMAGE, "sh")
    process = docker.popen(*command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)

    def talk(words: bytes, wanted: bytes) -> None:
        os.write(ours, words)
        seen = b""
        end = time.monotonic() + 90
        while wanted not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(ours, 4096)

    talk(b"echo $((40+2))\n", b"\r\n42\r\n")
    wait_until(lambda: docker.ok("exec", "screen", "true") == "")
    talk(b"stty size; echo sized\n", b"33 99")
    os.write(ours, b"\x10\x11")
    assert process.wait(timeout=90) == 0
    os.close(ours)
    assert docker.ok("ps", "--format", "{{.Names}}") == "screen", "it goes on"


def test_copies_in_both_directions(docker: Cli, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").write_bytes(os.urandom(1 << 20))
    docker.ok("create", "--name", "box", IMAGE, "true")
    docker.ok("cp", str(tmp_path / "folder"), "box:/root")
    docker.ok("cp", "box:/root/folder/deep/file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "folder" / "deep" / "file").read_bytes()
    done = subprocess.run(
        [docker.program, "cp", "box:/root/folder", "-"], env=docker.environment, capture_output=True, timeout=120
    )
    assert "folder/deep/file" in names_in(done.stdout)
    assert re.search("Could not find the file|No such container:path", docker.fails("cp", "box:/no", str(tmp_path)))
    assert docker.ok("diff", "box").splitlines()[:2] == ["C /root", "A /root/folder"]


def test_export(docker: Cli) -> None:
    docker.ok("create", "--name", "whole", IMAGE)
    done = subprocess.run([docker.program, "export", "whole"], env=docker.environment, capture_output=True, timeout=120)
    assert any(name.endswith("bin/busybox") for name in names_in(done.stdout))


def test_top_stats_and_update(docker: Cli) -> None:
    docker.ok("run", "-d", "--name", "used", IMAGE, *FOREVER)
    lines = docker.ok("top", "used").splitlines()
    assert lines[0].split()[:3] == ["UID", "PID", "PPID"]
    assert "trap" in lines[1]
    reading = json.loads(docker.ok("stats", "--no-stream", "--format", "{{json .}}", "used"))
    assert reading["Name"] == "used"
    assert reading["CPUPerc"].endswith("%")
    assert docker.ok("update", "--memory", "64m", "--memory-swap", "64m", "used").splitlines()[0] == "used"
    assert docker.ok("inspect", "-f", "{{.HostConfig.Memory}}", "used") == str(64 << 20)


def test_rules_and_limits_of_single_devices(docker: Cli, needs: Callable[..., None]) -> None:
    disk = next((str(path) for path in Path("/dev").iterdir() if path.is_block_device()), None)
    if disk is None:
        pytest.skip("no block device in /dev to limit")
    limits = ("--device-read-bps", f"{disk}:1mb", "--device-write-iops", f"{disk}:7", "--oom-kill-disable")
    docker.ok("create", "--name", "slow", *limits, "--device-cgroup-rule", "c 10:229 r", IMAGE)
    (told,) = json.loads(docker.ok("inspect", "slow"))
    host = told["HostConfig"]
    assert host["BlkioDeviceReadBps"] == [{"Path": disk, "Rate": 1 << 20}]
    assert host["BlkioDeviceWriteIOps"] == [{"Path": disk, "Rate": 7}]
    assert (host["OomKillDisable"], host["DeviceCgroupRules"]) == (True, ["c 10:229 r"])
    said = docker.fails("create", "--device-cgroup-rule", "c 10", IMAGE, code=125)
    assert "invalid device cgroup format" in said
    needs("cgroup devices")
    line = ("sh", "-c", "mknod /dev/x c 10 229; (: < /dev/x) 2>&1; :")
    assert "not permitted" in docker.ok("run", "--rm", IMAGE, *line)
    # Whether there is a driver behind it is another matter.
    assert "not permitted" not in docker.ok("run", "--rm", "--device-cgroup-rule", "c 10:229 r", IMAGE, *line)


def test_listing_filters_and_sizes(docker: Cli) -> None:
    docker.ok("create", "--name", "first", "--label", "course=os", IMAGE)
    docker.fails("run", "--name", "second", IMAGE, "sh", "-c", "exit 3", code=3)
    names = ("--format", "{{.Names}}")
    assert docker.ok("ps", *names) == ""
    assert docker.ok("ps", "-a", *names) == "second\nfirst"
    assert docker.ok("ps", "-a", "--filter", "label=course=os", *names) == "first"
    assert docker.ok("ps", "-a", "--filter", "exited=3", *names) == "second"
    assert docker.ok("ps", "-l", *names) == "second"
    assert docker.ok("ps", "-n", "1", *names) == "second"
    assert "virtual" in docker.ok("ps", "-as", "--format", "{{.Size}}").splitlines()[0]
    assert "Invalid filter" in (said := docker.fails("ps", "--filter", "nosuch=x")) or "invalid filter" in said


def test_prune_removes_what_does_not_run(docker: Cli) -> None:
    docker.ok("create", "--name", "idle", IMAGE)
    docker.ok("run", "-d", "--name", "alive", IMAGE, *FOREVER)
    assert "Deleted Containers:" in docker.ok("container", "prune", "-f")
    assert docker.ok("ps", "-a", "--format", "{{.Names}}") == "alive"


def test_volumes(docker: Cli) -> None:
    assert docker.ok("volume", "create", "--label", "of=tests", "shared") == "shared"
    docker.ok("run", "--rm", "-v", "shared:/data", IMAGE, "sh", "-c", "echo kept > /data/file")
    assert docker.ok("run", "--rm", "-v", "shared:/data", IMAGE, "cat", "/data/file") == "kept"
    assert "shared" in docker.ok("volume", "ls", "-q", "--filter", "label=of=tests")
    assert json.loads(docker.ok("volume", "inspect", "shared"))[0]["Labels"] == {"of": "tests"}
    assert docker.ok("volume", "rm", "shared") == "shared"
    assert "no such volume" in docker.fails("volume", "rm", "shared").lower()


def test_anonymous_volumes_go_with_a_container_that_removes_itself(docker: Cli, engine: Engine) -> None:
    before = {volume.name for volume in engine.volumes.list()}
    docker.ok("run", "--rm", "-v", "/data", IMAGE, "touch", "/data/x")
    wait_until(lambda: {volume.name for volume in engine.volumes.list()} == before)


def test_networks(docker: Cli, engine: Engine, needs: Callable[..., None]) -> None:
    if engine.driver.name != "root":
        pytest.skip("bridges of the machine need root")
    needs("nftables")
    assert re.fullmatch("[0-9a-f]{64}", docker.ok("network", "create", "--label", "of=tests", "lab-cli"))
    try:
        assert docker.ok("network", "ls", "-q", "-f", "label=of=tests") != ""
        words = ("-d", "--network", "lab-cli", "--network-alias", "www", "-p", "127.0.0.1:0:80")
        docker.ok("run", "--name", "web", *words, IMAGE, "sh", "-c", "echo page > /index.html; httpd -f -p 80 -h /")
        fetch = ("sh", "-c", "until wget -qO- http://www/; do sleep 0.1; done")
        assert docker.ok("run", "--rm", "--network", "lab-cli", IMAGE, *fetch) == "page"
        port = docker.ok("port", "web", "80/tcp")
        assert f"{port}->80/tcp" in docker.ok("ps", "--format", "{{.Ports}}")
        assert f'"{docker.ok("inspect", "-f", "{{.Id}}", "web")}"' in docker.ok("network", "inspect", "lab-cli")
        assert "has active endpoints" in docker.fails("network", "rm", "lab-cli")
        docker.ok("network", "disconnect", "lab-cli", "web")
        docker.ok("network", "connect", "lab-cli", "web")
        assert "already exists" in docker.fails("network", "connect", "lab-cli", "web")
    finally:
        docker.run("rm", "-f", "web")
        docker.ok("network", "rm", "lab-cli")


def test_events_tell_what_happened(docker: Cli) -> None:
    start = str(time.time() - 1)
    docker.ok("run", "--rm", "--name", "seen", IMAGE, "true")

    def actions() -> list[str]:
        words = ("events", "--since", start, "--until", str(time.time()), "--filter", "container=seen")
        return docker.ok(*words, "--format", "{{.Action}}").splitlines()

    wait_until(lambda: {"create", "attach", "start", "die", "destroy"} <= set(actions()))


def test_events_come_as_they_happen(docker: Cli) -> None:
    following = docker.popen("events", "--filter", "event=create", "--format", "{{.Actor.Attributes.name}}")
    assert following.stdout is not None
    deadline = time.monotonic() + 90
    os.set_blocking(following.stdout.fileno(), False)
    seen = b""
    number = 0
    while not seen and time.monotonic() < deadline:
        docker.ok("create", "--name", f"news{number}", IMAGE)
        number += 1
        seen += following.stdout.read() or b""
    following.terminate()
    following.communicate(timeout=60)
    assert seen.startswith(b"news")


def test_no_swarm(docker: Cli) -> None:
    assert "This node is not a swarm manager" in docker.fails("node", "ls")
    assert "This node is not part of a swarm" in docker.fails("swarm", "leave")


def test_disk_usage(docker: Cli) -> None:
    docker.ok("create", "--name", "heavy", IMAGE)
    lines = docker.ok("system", "df").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["Images", "Containers", "Local", "Build"]
    assert lines[2].split()[1] == "1"


def test_disk_usage_of_the_build_cache(docker: Cli, engine: Engine) -> None:
    engine.builds.build(f"FROM {IMAGE}\nRUN --mount=type=cache,id=kept,target=/c echo {time.time_ns()} > /c/f\n")
    held = engine.builds.usage()
    total = docker.ok("system", "df", "--format", "{{.Type}} {{.TotalCount}}").splitlines()[-1]
    assert total == f"Build Cache {len(held)}"
    (mount,) = engine.builds.usage({"type": ["exec.cachemount"], "description": ["kept"]})
    assert mount.id[:12] in docker.ok("system", "df", "-v")
    assert mount.id in docker.ok("builder", "prune", "-f", "--filter", f"id={mount.id}")
    assert len(engine.builds.usage()) == len(held) - 1
    docker.ok("builder", "prune", "-f", "--filter", "until=24h")
    assert len(engine.builds.usage()) == len(held) - 1
