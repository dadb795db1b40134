"""What a user can get wrong, in the terminal, in a notebook and from Python: one clear line, docker's exit code, a
hint, and nothing half done. The world (store, mounts, cgroups, processes) is listed before and after each case."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from bad_input.cases import CASES, MISSING, MISSPELT, Case
from bad_input.world import BUSYBOX, Unchanged, differences, environment, expect_error, labkernel, settle

from labkernel.engine import Engine
from labkernel.errors import LabkernelError, VMError

cases = pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with what the cases name: Dockerfiles, an empty context, broken archives."""
    (tmp_path / "context").mkdir()
    (tmp_path / "misspelt").write_text(MISSPELT)
    (tmp_path / "missing").write_text(MISSING)
    (tmp_path / "garbage.tar").write_bytes(bytes(range(256)) * 200)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = 40_000
        tar.addfile(member, io.BytesIO(b"x" * member.size))
    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[:20_000])
    leaving = io.BytesIO()
    with tarfile.open(fileobj=leaving, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../leaves"))
    (tmp_path / "leaving.tar").write_bytes(leaving.getvalue())
    return tmp_path


@cases
def test_terminal(lab: Engine, folder: Path, case: Case) -> None:
    with Unchanged(lab):
        expect_error(labkernel(environment(lab), *case.words, cwd=folder), case.code, case.brief, case.hint)


@cases
def test_notebook(shell: Any, lab: Engine, folder: Path, capfd: pytest.CaptureFixture[str], case: Case) -> None:
    line = " ".join(f"'{word}'" if " " in word else word for word in case.words)
    with Unchanged(lab):
        capfd.readouterr()
        done = shell.run_cell(case.cell or f"%docker {line}")
        seen = capfd.readouterr()
        text = seen.out + seen.err
        assert isinstance(done.error_in_exec, LabkernelError), text
        assert case.brief in str(done.error_in_exec)
        assert case.brief in text
        assert case.hint is None or "hint: " in text
        assert "Traceback" not in text
        assert ".py" not in text, "a line of a traceback"


@cases
def test_python(lab: Engine, folder: Path, case: Case) -> None:
    with Unchanged(lab), pytest.raises(case.error) as caught:
        case.call(lab, folder)
    assert "\n" not in caught.value.brief
    assert len(caught.value.render()) <= 8


def test_a_dockerfile_error_points_at_the_line_of_the_cell(shell: Any, lab: Engine) -> None:
    for text, wrong in ((MISSPELT, "COPPY a b"), (MISSING, "COPY nothing.txt /")):
        cell = f"%%dockerfile -t lk-test/bad\n{text}"
        line = cell.splitlines().index(wrong) + 1
        err = shell.run_cell(cell).error_in_exec
        assert err.line == line
        assert f"{line} | >>> {wrong}" in err.details
    # the same from the terminal
    done = labkernel(environment(lab), "build", "-", input=MISSPELT, stdin=None)
    assert "3 | >>> COPPY a b" in done.stderr


def test_a_kernel_shows_brief_and_hint_only(lab: Engine, tmp_path: Path) -> None:
    """What a front end gets in `traceback` for an error: a few lines, none with a file or a line of Python."""
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    env = environment(lab, JUPYTER_RUNTIME_DIR=str(tmp_path / "jupyter"), IPYTHONDIR=str(tmp_path / "ipython"))
    manager, client = start_new_kernel(kernel_name="python3", env=env, cwd=str(tmp_path), startup_timeout=60)
    try:
        client.execute_interactive("%load_ext labkernel", timeout=60, output_hook=lambda _message: None)
        for name in ("command not found", "name in use", "Dockerfile syntax", "unknown image"):
            case = CASES[name]
            answer = client.execute_interactive(
                case.cell or f"%docker {' '.join(case.words)}", timeout=60, output_hook=lambda _message: None
            )["content"]
            assert answer["status"] == "error"
            assert case.brief in answer["evalue"]
            assert case.brief in answer["traceback"][0]
            assert not any(".py" in line or "Traceback" in line for line in answer["traceback"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


CREATE = f"""
import sys, labkernel
from labkernel.errors import ConflictError
lab = labkernel.connect()
lab.images.resolve({BUSYBOX!r}); lab.runtime.ensure()
print("ready", flush=True); sys.stdin.readline()
try:
    print("made", lab.containers.create({BUSYBOX!r}, "true", name="wanted-by-two").name)
except ConflictError as err:
    print("refused", err.brief)
"""


def test_two_creates_of_one_name_at_the_same_instant(lab: Engine) -> None:
    before = settle(lab)
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE],
            env=environment(lab),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    answers = [client.communicate(timeout=60) for client in clients]
    assert sorted(out.split()[0] for out, _ in answers) == ["made", "refused", "refused", "refused"], answers
    assert all("already in use" in out for out, _ in answers if out.startswith("refused"))
    lab.containers.get("wanted-by-two").remove()
    assert differences(lab, before) == {}
    assert lab.check() == []


def test_no_qemu(lab: Engine, tmp_path: Path) -> None:
    env = environment(lab, PATH=str(tmp_path))
    with Unchanged(lab):
        done = labkernel(env, "vm", "run", BUSYBOX, "true")
        expect_error(done, 125, "QEMU is not installed", "qemu")


def test_no_qemu_in_python(lab: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Unchanged(lab), pytest.raises(VMError):
        lab.vms.run(BUSYBOX, "true")


NO_BUSYBOX = """
import os, sys
from labkernel.imaging import basefiles
basefiles.is_static_program = lambda path: False
os.environ["PATH"] = sys.argv[1]
from labkernel.cli import main
sys.argv = ["labkernel", "run", "--rm", "--network", "none", "busybox", "true"]
main()
"""


def test_no_busybox(base: Path, fresh_engine: Engine) -> None:
    """No static busybox, and neither apt nor dpkg-deb to fetch one."""
    fresh_engine.runtime.ensure()
    before = settle(fresh_engine)
    done = subprocess.run(
        [sys.executable, "-c", NO_BUSYBOX, str(base)],
        env=environment(fresh_engine),
        capture_output=True,
        text=True,
        timeout=60,
    )
    expect_error(done, 125, "no static busybox was found on this machine", "apt-get install busybox-static")
    assert differences(fresh_engine, before) == {}
    assert fresh_engine.check() == []
