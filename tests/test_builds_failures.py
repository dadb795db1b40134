"""Builds that fail, are interrupted, killed, or meet a full disk: one clear error, and nothing half done stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from building import BASE, build, fresh, store

from labkernel.building.result import BuildStep
from labkernel.engine import Engine
from labkernel.errors import BuildError, DiskFull, DockerfileError, InvalidReference, NoSuchImage, UsageError
from labkernel.store.locks import is_abandoned


def test_a_failing_run_tells_status_lines_and_output(engine: Engine) -> None:
    before = store(engine)
    text = fresh(BASE + "RUN echo kept > /kept\nRUN echo last words && \\\n  exit 37\nRUN never\n")
    seen: list[BuildStep] = []
    with pytest.raises(BuildError) as caught:
        build(engine, text, tags=["lk-test/never"], on_step=seen.append)
    err = caught.value
    assert (err.status, err.line, err.end_line, err.exit_code) == (37, 4, 5, 1)
    assert "exit code: 37" in err.brief
    assert "last words" in (err.details or "")
    assert seen[-1].status == "failed"
    assert store(engine) == before
    # what was finished is not done again
    again = build(engine, text.split("RUN echo last")[0])
    assert all(step.cached for step in again.steps)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("FROM lab/busybox\nRUNN x\n", DockerfileError, "unknown instruction: RUNN"),
        ("RUN x\n", DockerfileError, "no build stage"),
        ("", DockerfileError, "(?i)empty|instruction|dockerfile"),
        ("FROM lab/nothing-like-it:1\n", BuildError, "nothing-like-it"),
        ("FROM --platform=linux/s390x lab/busybox\n", BuildError, "none for linux/s390x"),
        (BASE + "RUN no-such-command-here\n", BuildError, "exit code: 127"),
        (BASE + 'RUN ["/no/such"]\n', BuildError, "exit code: 127"),
        (BASE + "USER nobody-here\nRUN true\n", BuildError, "nobody-here"),
        (BASE + "EXPOSE 99999999\n", DockerfileError, "invalid containerPort"),
        (BASE + "STOPSIGNAL NOPE\n", DockerfileError, "NOPE"),
    ],
)
def test_bad_input_is_one_clear_error(engine: Engine, text: str, error: type[Exception], words: str) -> None:
    before = store(engine)
    with pytest.raises(error, match=words):
        build(engine, text, tags=["lk-test/never"])
    assert store(engine) == before


def test_bad_arguments(engine: Engine) -> None:
    with pytest.raises(InvalidReference):
        build(engine, BASE, tags=["Not A Name"])
    with pytest.raises(UsageError):
        build(engine, BASE, network="bridge")
    with pytest.raises(BuildError, match="no context"):
        build(engine, BASE + "COPY app.sh /\n")
    with pytest.raises(NoSuchImage):
        engine.images.get("lk-test/never")


def test_an_interrupt_leaves_nothing_and_keeps_finished_steps(engine: Engine) -> None:
    before = store(engine)
    text = fresh(BASE + "RUN echo done > /done\nRUN echo started; sleep 60\n")

    def interrupt(step: BuildStep) -> None:
        if step.output == b"started\n":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(engine, text, on_step=interrupt)
    assert store(engine) == before
    assert not engine.runtime.states()
    again = build(engine, text.replace("sleep 60", "true"))
    assert again.steps[2].cached


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own needs root (mount)")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "labkernel-test", disk], check=True)
    try:
        with Engine.open(disk / "root", runtime_dir=tmp_path / "run") as engine:
            try:
                build(engine, BASE + "RUN true\n")  # the base is unpacked
                before = store(engine)
                layers = sorted(os.listdir(engine.layout.layers))
                with pytest.raises(DiskFull):
                    build(engine, BASE + "RUN dd if=/dev/urandom of=/big bs=1M count=60\n", tags=["full"])
                with pytest.raises(DiskFull):
                    # it fits as files, and not once more as a blob
                    build(engine, BASE + "RUN dd if=/dev/urandom of=/big bs=1M count=13\n", tags=["full"])
                (tmp_path / "big").write_bytes(os.urandom(30 << 20))
                with pytest.raises(DiskFull):
                    build(engine, BASE + "COPY big /\n", context=tmp_path, tags=["full"])
                assert store(engine) == before
                assert sorted(os.listdir(engine.layout.layers)) == layers
                build(engine, BASE + "RUN echo it goes on\n")
            finally:
                engine.runtime.shutdown(force=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_running_step_is_no_leftover(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkernel.containers.LEFTOVER_AGE_S", -1.0)
    found: list[dict[str, Any]] = []

    def tidy(step: BuildStep) -> None:
        if step.output:
            found.append(engine.containers.reconcile())

    build(engine, fresh(BASE + "RUN echo running\n"), on_step=tidy)
    assert [sorted(item["directories"]) for item in found] == [[]]


def test_a_steps_directory_is_its_builders_until_it_is_gone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the search for leftovers, which goes on beside the steps, removes it at the same time."""
    seen: list[bool] = []
    remove = engine.runtime.remove

    def looking(id: str, **given: Any) -> Any:
        seen.append(is_abandoned(engine.layout.container_dir(id)))
        return remove(id, **given)

    monkeypatch.setattr(engine.runtime, "remove", looking)
    with pytest.raises(BuildError, match="exit code: 3"):
        build(engine, fresh(BASE + "RUN exit 3\n"))
    assert seen == [False]


_KILLED = """
import sys, labkernel
with labkernel.connect() as lab:
    lab.builds.build(sys.argv[1], tags=["killed"], on_step=lambda step: print(step.output.decode(), flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_builder_leaves_nothing_running(engine: Engine, number: signal.Signals) -> None:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "LABKERNEL_DRIVER": engine.driver.name,
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    before = set(engine.runtime.states())
    text = fresh(BASE + "RUN echo one > /one\nRUN echo two > /two\nRUN echo begun; sleep 600\n")
    command = [sys.executable, "-c", _KILLED, text]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert any("begun" in line for line in builder.stdout)
        builder.send_signal(number)
    deadline = time.monotonic() + 60
    while any(state["pid"] for id, state in engine.runtime.states().items() if id not in before):
        assert time.monotonic() < deadline, "the command goes on without its builder"
        time.sleep(0.05)
    assert "killed:latest" not in [tag for image in engine.images.list() for tag in image.tags]
    again = build(engine, text.replace("; sleep 600", ""))
    assert again.steps[2].cached, "the last finished step, or the one before, is there"
    while engine.check():
        assert time.monotonic() < deadline, engine.check()
        time.sleep(0.05)
