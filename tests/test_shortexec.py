"""The short way of `labkernel exec` does what the long way does, and gives way to it before anything has happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_until

from labkernel import __version__
from labkernel.engine import Engine
from labkernel.running import shortexec
from labkernel.running.container import Container

CHECK = """
import sys
from labkernel import __version__
from labkernel.running import shortexec
code = shortexec.carry_out(sys.argv[1:], __version__)
assert "click" not in sys.modules and "labkernel.engine" not in sys.modules
sys.exit(200 if code is None else code)
"""


@pytest.fixture(autouse=True)
def store(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))
    monkeypatch.delenv("LABKERNEL_DRIVER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    monkeypatch.setenv("PASSED_ON", "on")
    monkeypatch.delenv("NOT_THERE", raising=False)


@pytest.fixture
def sleeper(engine: Engine) -> Container:
    settings = {"name": "sleeper", "environment": {"NOT_THERE": "there"}, "detach": True, "init": True}
    container: Container = engine.containers.run("busybox", ["sleep", "1000"], **settings)
    return container


def short(*words: str) -> subprocess.Popen[bytes]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CHECK, *words], stdin=subprocess.DEVNULL, **pipes)


@pytest.mark.parametrize(
    "words",
    [
        ["sleeper", "sh", "-c", "echo out; echo err >&2; exit 7"],
        ["sleeper", "sh", "-c", "head -c 3000000 /dev/zero"],
        ["-u", "7:8", "sleeper", "id"],
        ["--user=7", "--workdir", "/tmp", "sleeper", "sh", "-c", "pwd; id -u; echo $HOME"],
        ["-e", "A=1", "--env", "PASSED_ON", "-e", "NOT_THERE", "sleeper", "sh", "-c", "echo $A $PASSED_ON $NOT_THERE"],
        ["sleeper", "cat"],
        ["ID", "hostname"],
        ["sleeper", "echo", "-e", "-it", "x"],
    ],
)
def test_it_does_what_the_command_does(engine: Engine, sleeper: Container, words: list[str]) -> None:
    if words[0][:2] in ("-u", "--") and engine.driver.id_mapping == "single":
        pytest.skip("containers have one id here: this user has no subordinate ids (/etc/subuid)")
    words = [sleeper.id[:9] if word == "ID" else word for word in words]
    process = short(*words)
    found = (*process.communicate(timeout=60), process.returncode)
    argv = [sys.executable, "-m", "labkernel.cli", "exec", *words]
    env = {**os.environ, "LABKERNEL_DRIVER": engine.driver.name}  # a named driver leads to the long way
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env=env, check=False)
    assert found == (done.stdout, done.stderr, done.returncode)
    assert found[2] in (0, 7)


def test_signals_go_to_the_command(sleeper: Container) -> None:
    """SIGTERM as it is; the third SIGINT is a SIGKILL."""
    script = "trap 'echo term; exit 5' TERM; trap 'echo int' INT; echo up; while :; do sleep 0.1; done"
    process = short("sleeper", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == b"term\n"
    assert process.returncode == 5
    process = short("sleeper", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    for line in (b"int\n", b"int\n", b""):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == line
    assert process.wait(timeout=60) == 137


def test_it_gives_way_before_anything_has_happened(engine: Engine, sleeper: Container) -> None:
    engine.containers.create("busybox", "true", name="created")
    since = time.time()
    for words in (
        [],
        ["sleeper"],
        ["-it", "sleeper", "true"],
        ["-d", "sleeper", "true"],
        ["--privileged", "sleeper", "true"],
        ["--env-file", "x", "sleeper", "true"],
        ["-uroot", "sleeper", "true"],
        ["-e=A=1", "sleeper", "true"],
        ["-e", "", "sleeper", "true"],
        ["-e", "=1", "sleeper", "true"],
        ["--", "sleeper", "true"],
        ["nobody", "true"],
        ["0" * 64, "true"],
        ["created", "true"],
    ):
        assert shortexec.carry_out(words, __version__) is None, words
    sleeper.pause()
    assert shortexec.carry_out(["sleeper", "true"], __version__) is None
    sleeper.unpause()
    said = [event["Action"] for event in engine.history.list(since=since)]
    assert "pause" in said
    assert not [word for word in said if word.startswith("exec")]


def test_it_gives_way_to_who_knows_the_words_for_a_failure(sleeper: Container) -> None:
    assert shortexec.carry_out(["sleeper", "no-such-command"], __version__) is None
    assert shortexec.carry_out(["-w", "/nowhere", "sleeper", "true"], __version__) is None


def test_nobody_elses_supervisor_is_asked(sleeper: Container, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime directory others can write to could have anybody's socket in it."""
    place = engine.layout.runtime_dir
    place.chmod(0o777)
    try:
        assert shortexec.carry_out(["sleeper", "true"], __version__) is None
    finally:
        place.chmod(0o700)
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(place / "none"))
    assert shortexec.carry_out(["sleeper", "true"], __version__) is None


def test_a_reader_that_leaves_ends_it(sleeper: Container) -> None:
    process = short("sleeper", "sh", "-c", "while :; do echo line; done")
    assert process.stdout is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait(timeout=60) != 0
    process.communicate()
    sleeper.remove(force=True)
    wait_until(lambda: not sleeper.directory.exists(), what="the container to be gone")
