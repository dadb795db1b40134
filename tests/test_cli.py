"""`labkernel …` as a process of its own, on the real engine: output, exit codes, stdin, terminals, signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import DEADLINE_S

from labkernel.engine import Engine
from labkernel.linux.waiting import readable

Cli = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = [sys.executable, "-m", "labkernel.cli"]


@pytest.fixture
def env(engine: Engine) -> dict[str, str]:
    root = Path(__file__).resolve().parent.parent
    # Otherwise the first command would say which built-in image stands in for `busybox`.
    engine.images.resolve("busybox")
    return {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(root),
    }


@pytest.fixture
def cli(env: dict[str, str]) -> Cli:
    def run(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        settings = {"capture_output": True, "text": True, "timeout": 60, "stdin": subprocess.DEVNULL, "env": env}
        if "input" in kwargs:
            del settings["stdin"]
        return subprocess.run([*COMMAND, *words], **{**settings, **kwargs})

    return run


def test_run_passes_output_and_exit_code(cli: Cli) -> None:
    done = cli("run", "--rm", "--network", "none", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert cli("ps", "-aq").stdout == ""


@pytest.mark.parametrize(
    ("words", "code", "brief"),
    [
        (["run", "--rm", "busybox", "no-such-command"], 127, "executable file not found"),
        (["run", "--rm", "busybox", "/etc"], 126, "/etc"),
        (["run", "--rm", "nobody/nothing:9"], 125, "nobody/nothing:9"),
        (["run", "--frob", "busybox"], 125, "unknown flag: --frob"),
        (["run", "--rm", "-m", "1k", "busybox"], 125, "memory"),
        (["exec", "nobody", "true"], 1, "No such container: nobody"),
        (["rm", "nobody"], 1, "No such container: nobody"),
        (["rmi", "nobody/nothing"], 1, "nobody/nothing"),
        (["inspect", "nobody"], 1, "No such object: nobody"),
        (["frobnicate"], 1, "unknown command"),
    ],
)
def test_errors_are_one_line_and_a_hint(cli: Cli, words: list[str], code: int, brief: str) -> None:
    done = cli(*words)
    first, *rest = done.stderr.splitlines()
    assert done.returncode == code
    assert first.startswith("labkernel: ")
    assert brief in first
    assert len(rest) <= 2
    assert "Traceback" not in done.stderr
    assert cli("ps", "-aq").stdout == "", "something half done was left"


def test_life_of_a_container(cli: Cli) -> None:
    id = cli("run", "-d", "--name", "web", "--label", "a=b", "busybox", "sh", "-c", "echo up; sleep 300").stdout.strip()
    assert len(id) == 64
    assert cli("ps", "--format", "{{.Names}} {{.Image}} {{.State}}").stdout == "web busybox running\n"
    assert cli("ps", "-q", "--no-trunc").stdout.strip() == id
    assert cli("ps", "-q", "--filter", "label=a=b").stdout.strip() == id[:12]
    assert cli("exec", "-e", "X=1", "-w", "/tmp", "web", "sh", "-c", "echo $X $PWD; exit 4").stdout == "1 /tmp\n"
    assert cli("exec", "web", "sh", "-c", "exit 4").returncode == 4
    assert cli("exec", "web", "nothing-there").returncode == 127
    assert cli("logs", "web").stdout == "up\n"
    assert cli("inspect", "-f", "{{.State.Status}} {{.Name}}", "web").stdout == "running /web\n"
    assert json.loads(cli("inspect", id[:12]).stdout)[0]["Id"] == id
    assert "sleep 300" in cli("top", "web").stdout
    assert cli("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "web").stdout.startswith("web ")
    assert cli("rm", "web").returncode == 1
    assert cli("rename", "web", "site").returncode == 0
    assert cli("kill", "-s", "KILL", "site").stdout == "site\n"
    assert cli("wait", "site").stdout == "137\n"
    assert cli("start", "site").stdout == "site\n"
    assert cli("stop", "-t", "0", "site").stdout == "site\n"
    both = cli("rm", "site", "nobody")
    assert (both.returncode, both.stdout) == (1, "site\n")
    assert cli("rm", "-f", "nobody").returncode == 0


def test_name_in_use(cli: Cli) -> None:
    cli("create", "--name", "web", "busybox")
    done = cli("run", "--name", "web", "busybox", "true")
    assert done.returncode == 125
    assert 'container name "/web" is already in use' in done.stderr


def test_stdin_is_passed_on_and_its_end_too(cli: Cli) -> None:
    assert cli("run", "--rm", "-i", "busybox", "cat", input="hello\n").stdout == "hello\n"
    big = "x" * 3_000_000
    assert cli("run", "--rm", "-i", "busybox", "wc", "-c", input=big).stdout.strip() == "3000000"
    assert cli("run", "--rm", "busybox", "wc", "-c", input="not wanted").stdout.strip() == "0"
    cli("run", "-d", "--name", "web", "busybox", "sleep", "300")
    assert cli("exec", "-i", "web", "cat", input="in there\n").stdout == "in there\n"


def test_tty_needs_a_terminal(cli: Cli) -> None:
    done = cli("run", "--rm", "-it", "busybox", "sh")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "labkernel: the input device is not a TTY")


def read_until(fd: int, wanted: bytes, timeout_s: float = DEADLINE_S) -> bytes:
    seen = b""
    end = time.monotonic() + timeout_s
    while wanted not in seen:
        assert readable(fd, timeout_s=max(0, end - time.monotonic())), f"no {wanted!r} in {seen!r}"
        try:
            data = os.read(fd, 65536)
        except OSError:
            data = b""
        assert data, f"no {wanted!r} in {seen!r}"
        seen += data
    return seen


def resize(fd: int, rows: int, columns: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Terminal:
    """A command on a pseudo-terminal, as a person has it."""

    def __init__(self, env: dict[str, str], *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *words], env)
        resize(self.fd, 33, 99)

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def see(self, wanted: bytes) -> bytes:
        return read_until(self.fd, wanted)

    def end(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_terminal_is_raw_has_our_size_and_follows_it(env: dict[str, str]) -> None:
    # The size goes its own way to the container, beside what is typed: it may come after the first instruction.
    wait = 'until [ "$(stty size 2>/dev/null)" = "%s" ]; do sleep 0.05; done; echo %s'
    script = f"{wait % ('33 99', 'sized')}; {wait % ('20 70', 'sized again')}; exit 5"
    terminal = Terminal(env, "run", "--rm", "-it", "busybox", "sh", "-c", script)
    terminal.see(b"sized")
    resize(terminal.fd, 20, 70)
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.see(b"sized again")
    assert terminal.end() == 5


def test_control_c_goes_to_the_foreground_process(env: dict[str, str]) -> None:
    terminal = Terminal(env, "run", "--rm", "-it", "busybox", "sh")
    terminal.see(b"# ")
    terminal.type(b"echo g\\o; sleep 100\n")
    terminal.see(b"go\r\n")
    # The shell gives its terminal to the command a moment after it has begun it; a person presses again.
    end = time.monotonic() + DEADLINE_S
    while not readable(terminal.fd, timeout_s=1) or b"# " not in os.read(terminal.fd, 65536):
        assert time.monotonic() < end
        terminal.type(b"\x03")
    terminal.type(b"exit 7\n")
    assert terminal.end() == 7


def test_detach_keys_leave_the_container_running(env: dict[str, str], engine: Engine) -> None:
    terminal = Terminal(env, "run", "--name", "web", "-it", "busybox", "sh")
    terminal.see(b"# ")
    terminal.type(b"\x10\x11")
    assert terminal.end() == 0
    container = engine.containers.get("web")
    assert container.status == "running"
    again = Terminal(env, "attach", "web")
    again.type(b"echo a\\gain\n")
    again.see(b"again")
    again.type(b"exit 3\n")
    assert again.end() == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(env: dict[str, str], number: int) -> None:
    traps = "trap 'echo got INT; exit 42' INT; trap 'echo got TERM; exit 43' TERM"
    script = f"{traps}; echo ready; while :; do sleep 0.1; done"
    words = [*COMMAND, "run", "--rm", "busybox", "sh", "-c", script]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(timeout=20) == {signal.SIGINT: 42, signal.SIGTERM: 43}[signal.Signals(number)]
    assert rest.startswith("got ")


def test_images_as_files(cli: Cli, env: dict[str, str], tmp_path: Path) -> None:
    cli("pull", "busybox")
    assert "busybox" in cli("images", "--format", "{{.Repository}}").stdout.split()
    assert cli("tag", "busybox", "course/box:1").returncode == 0
    assert cli("save", "-o", str(tmp_path / "box.tar"), "course/box:1").returncode == 0
    assert "Untagged: course/box:1" in cli("rmi", "course/box:1").stdout
    # Of the image's names those that are in the archive.
    assert cli("load", "-i", str(tmp_path / "box.tar")).stdout == "Loaded image: course/box:1\n"
    with (tmp_path / "root.tar").open("wb") as out:
        subprocess.run([*COMMAND, "image", "export", "course/box:1"], env=env, stdout=out, check=True, timeout=60)
    with tarfile.open(tmp_path / "root.tar") as tar:
        assert any(name.removeprefix("./") == "bin/busybox" for name in tar.getnames())
    made = cli("import", "-c", 'CMD ["echo", "imported"]', str(tmp_path / "root.tar"), "course/made")
    assert made.stdout.startswith("sha256:")
    assert cli("run", "--rm", "course/made").stdout == "imported\n"
    assert cli("history", "-q", "course/made").returncode == 0
    title, row = cli("history", "--human=false", "course/made").stdout.splitlines()[:2]
    assert "CREATED AT" in title
    assert re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ .* \d+ ", row)
    cli("rmi", "course/made", "course/box:1")


def test_of_an_images_names_those_that_are_asked_for(cli: Cli) -> None:
    for name in ("named/one:1", "named/two:2"):
        assert cli("tag", "lab/busybox", name).returncode == 0
    try:
        form = "{{.Repository}}:{{.Tag}}"
        for words in (["--filter", "reference=named/*:1"], ["named/one"]):
            assert cli("images", *words, "--format", form).stdout.split() == ["named/one:1"]
        found = cli("images", "--filter", "reference=named/*", "--format", form).stdout.split()
        assert found == ["named/one:1", "named/two:2"]
    finally:
        cli("rmi", "named/one:1", "named/two:2")


def test_archives_are_not_written_halfway(cli: Cli, tmp_path: Path) -> None:
    done = cli("save", "-o", str(tmp_path / "x.tar"), "nobody/nothing")
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []
    assert cli("load", "-i", str(tmp_path / "none.tar")).returncode == 1


def test_an_archive_never_takes_the_place_of_what_is_no_file(cli: Cli, tmp_path: Path) -> None:
    """`save -o /dev/null` as root once made a file of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["wc", "-c", str(pipe)], stdout=subprocess.PIPE) as count:
        assert cli("save", "-o", str(pipe), "lab/busybox").returncode == 0
        assert int(count.communicate(timeout=60)[0].split()[0]) > 1_000_000
    assert pipe.is_fifo()
    (tmp_path / "real.tar").write_text("old")
    (tmp_path / "link.tar").symlink_to("real.tar")
    assert cli("save", "-o", str(tmp_path / "link.tar"), "lab/busybox").returncode == 0
    assert (tmp_path / "link.tar").is_symlink()
    assert tarfile.is_tarfile(tmp_path / "real.tar")
    done = cli("save", "-o", str(tmp_path), "lab/busybox")
    assert (done.returncode, "directory" in done.stderr) == (1, True)
    assert sorted(os.listdir(tmp_path)) == ["link.tar", "pipe", "real.tar"]


def test_volumes(cli: Cli) -> None:
    assert cli("volume", "create", "data").stdout == "data\n"
    assert cli("volume", "ls", "-q").stdout == "data\n"
    cli("run", "--rm", "-v", "data:/d", "busybox", "sh", "-c", "echo kept > /d/file")
    assert cli("run", "--rm", "-v", "data:/d:ro", "busybox", "cat", "/d/file").stdout == "kept\n"
    assert cli("volume", "inspect", "-f", "{{.Name}}", "data").stdout == "data\n"
    assert cli("volume", "rm", "data").stdout == "data\n"
    assert cli("volume", "rm", "data").returncode == 1


def test_build_from_a_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text('FROM busybox\nCOPY hello.txt /\nCMD ["cat", "/hello.txt"]\n')
    (tmp_path / "hello.txt").write_text("hello from a file\n")
    done = cli("build", "-t", "course/cli:1", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Successfully tagged course/cli:1" in done.stdout
    assert cli("run", "--rm", "course/cli:1").stdout == "hello from a file\n"
    quiet = cli("build", "-q", "-t", "course/cli:1", str(tmp_path))
    assert quiet.stdout.startswith("sha256:")
    piped = cli("build", "-t", "course/cli:2", "-", input="FROM busybox\nCMD echo piped\n")
    assert piped.returncode == 0, piped.stderr
    (tmp_path / "Dockerfile").write_text("FROM busybox\nRUN exit 9\n")
    failed = cli("build", str(tmp_path))
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr
    cli("rmi", "course/cli:1", "course/cli:2")


def test_system(cli: Cli) -> None:
    assert json.loads(cli("info", "--format", "json").stdout)["Driver"] in ("root", "rootless")
    assert cli("version", "-f", "{{.Server.Os}}").stdout == "linux\n"
    assert cli("system", "df").stdout.startswith("TYPE")
    report = json.loads(cli("doctor", "--json").stdout)
    assert report["driver"] in ("root", "rootless")
    assert {"name", "ok", "cause", "remedy"} <= set(report["capabilities"][0])


def test_prune_asks_or_is_told(cli: Cli) -> None:
    cli("create", "--name", "old", "busybox")
    asked = cli("container", "prune")
    assert asked.returncode == 1
    assert "-f" in asked.stderr
    assert "Deleted Containers:" in cli("container", "prune", "-f").stdout
    assert cli("ps", "-aq").stdout == ""


def test_a_reader_that_leaves_is_no_error(env: dict[str, str]) -> None:
    done = subprocess.run(
        f"{' '.join(COMMAND)} --help | head -1", shell=True, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["dockerfile", "parse"],
        ["images"],
        ["save", "busybox"],
        ["run", "--rm", "--network=none", "busybox", "echo", "x"],
    ],
)
def test_a_full_disk_behind_the_output_is_one_line(env: dict[str, str], words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        argv = [*COMMAND, *words]
        done = subprocess.run(
            argv, env=env, input="FROM x\n", stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "labkernel: write /dev/stdout: no space left on device\n"


def test_what_is_to_be_done_at_the_end_is_done(env: dict[str, str]) -> None:
    """A command leaves without taking its interpreter down, but not before others are through."""
    program = (
        "import atexit, sys, threading, time\n"
        "from labkernel.cli import main\n"
        "if sys.argv.pop(1) == 'thread':\n"
        "    threading.Thread(target=lambda: (threading.main_thread().join(), print('thread'))).start()\n"
        "atexit.register(print, 'at exit')\n"
        "main()\n"
    )
    for first, lines, words, code in (
        ("alone", ["at exit"], ["run", "--rm", "busybox", "sh", "-c", "exit 3"], 3),
        ("thread", ["thread", "at exit"], ["run", "--rm", "busybox", "sh", "-c", "exit 3"], 3),
        ("alone", ["at exit"], ["rm", "nobody"], 1),
    ):
        env.pop("PYTHONUNBUFFERED", None)  # with it nothing that is printed could be lost
        argv = [sys.executable, "-c", program, first, *words]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert (done.stdout.splitlines(), done.returncode) == (lines, code), done.stderr


def test_plain_user(plain_user: Any) -> None:
    done = plain_user.labkernel("run", "--rm", "--network", "none", "busybox", "sh", "-c", "id -u; exit 3")
    if "DriverError" in done.stderr or done.returncode == 125:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout) == (3, "0\n")
    assert plain_user.labkernel("run", "--frob").returncode == 125
    assert plain_user.labkernel("ps", "-aq").stdout == ""


def test_shell_completion(env: dict[str, str]) -> None:
    asked = {**env, "_LABKERNEL_COMPLETE": "bash_complete", "COMP_WORDS": "labkernel im", "COMP_CWORD": "1"}
    done = subprocess.run(COMMAND, env=asked, capture_output=True, text=True, timeout=60)
    assert {"plain,image", "plain,images", "plain,import"} <= set(done.stdout.split())


def test_a_build_has_named_contexts_and_limits(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("from the context\n")
    (tmp_path / "data" / "left").write_text("")
    (tmp_path / "data" / ".dockerignore").write_text("left\n")
    (tmp_path / "Dockerfile").write_text(
        "FROM base\nCOPY --from=data . /data/\n"
        "RUN ls /data > /seen; ulimit -n >> /seen; df -k /dev/shm | tail -1 >> /seen\n"
    )
    words = ["--build-context", "base=docker-image://lab/busybox", "--build-context", "data=data", "-t", "named"]
    words += ["--build-context", "unused=no/such/place", "--ulimit", "nofile=111:222", "--shm-size", "3m"]
    done = cli("build", *words, ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = cli("run", "--rm", "--network", "none", "named", "cat", "/seen", "/data/file").stdout.splitlines()
    assert [seen[0], seen[1], seen[2].split()[1], seen[3]] == ["file", "111", "3072", "from the context"]
    for place, brief in (("data=none", "not found"), ("data=oci-layout://x", "not available"), ("data", "key=value")):
        refused = cli("build", *words[:2], "--build-context", place, ".", cwd=tmp_path)
        assert refused.returncode == 1
        assert brief in refused.stderr
    assert len(cli("images", "-aq", "--filter", "label=labkernel.context").stdout.split()) == 0
