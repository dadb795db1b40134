"""`debug` after a failed build: the file system, user, directory and variables the failing step had."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkernel.building.debug import NoFailedBuild, find_failure
from labkernel.engine import Engine
from labkernel.errors import BuildError
from labkernel.linux.waiting import readable

COMMAND = [sys.executable, "-m", "labkernel.cli"]
TEXT = """\
FROM lab/busybox
ARG WHO=nobody
ENV KEPT=env
RUN echo before > /before
WORKDIR /app
USER 1000:1000
RUN echo half > /tmp/half; echo $WHO; exit 7
"""


@pytest.fixture
def env(engine: Engine) -> dict[str, str]:
    return {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }


def fail(engine: Engine) -> None:
    with pytest.raises(BuildError):
        engine.builds.build(TEXT, build_args={"WHO": "me"})


def test_the_failing_step_is_kept_until_the_next_build(engine: Engine) -> None:
    fail(engine)
    found = find_failure(engine.db)
    assert (found.line, found.environment, found.shell) == (7, {"WHO": "me"}, "/bin/sh")
    assert "RUN echo half" in repr(found)
    engine.builds.build("FROM lab/busybox\nRUN true\n")
    with pytest.raises(NoFailedBuild):
        find_failure(engine.db)


@pytest.mark.usefixtures("many_ids")
def test_a_command_runs_just_before_the_failing_step(engine: Engine, env: dict[str, str]) -> None:
    fail(engine)
    images, containers = len(engine.images.list(all=True)), engine.containers.list(all=True)
    script = "cat /before; pwd; id -u; echo $WHO $KEPT; ls /tmp; exit 3"
    done = subprocess.run(
        [*COMMAND, "debug", "sh", "-c", script], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout == "before\n/app\n1000\nme env\n", done.stderr
    assert done.returncode == 3
    as_root = subprocess.run(
        [*COMMAND, "debug", "-u", "0", "-w", "/", "id", "-u"],
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert as_root.stdout == "0\n"
    assert len(engine.images.list(all=True)) == images
    assert engine.containers.list(all=True) == containers


@pytest.mark.usefixtures("many_ids")
def test_a_shell_in_a_terminal(engine: Engine, env: dict[str, str]) -> None:
    fail(engine)
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(COMMAND[0], [*COMMAND, "debug"], env)
    seen = b""
    asked = False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not readable(fd, timeout_s=1):
            continue
        try:
            data = os.read(fd, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
        if not asked and b"$ " in seen.rpartition(b"\n")[2]:
            asked = True
            os.write(fd, b"echo at=$(pwd)=$WHO; exit 4\n")
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert b"at=/app=me" in seen
    assert b"failed at line 7" in seen


def test_without_a_failed_build_or_its_layers(engine: Engine, env: dict[str, str]) -> None:
    fail(engine)
    engine.builds.prune()
    gone = subprocess.run(
        [*COMMAND, "debug", "true"], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert gone.returncode != 0
    assert "build again" in gone.stderr
    no_terminal = subprocess.run([*COMMAND, "debug"], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "debug COMMAND" in no_terminal.stderr
    engine.builds.build("FROM lab/busybox\n")
    none = subprocess.run(
        [*COMMAND, "debug", "true"], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert "did not fail" in none.stderr
