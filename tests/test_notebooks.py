"""The course's first notebooks, executed from top to bottom on a new store as `make demo` does it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkernel.engine import Engine

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = REPO / "notebooks"
NAMES = ("00_preflight", "01_containers_and_vms")


def cells_of(path: Path) -> dict[str, dict[str, Any]]:
    return {cell["id"]: cell for cell in json.loads(path.read_text())["cells"]}


def text_of(cell: dict[str, Any]) -> str:
    """Streams, plain values and errors of a cell, without colours."""
    texts = []
    for output in cell["outputs"]:
        found = output.get("text") or output.get("data", {}).get("text/plain") or output.get("traceback") or ""
        texts.append(found if isinstance(found, str) else ("\n" if "traceback" in output else "").join(found))
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(texts))


def kinds(cell: dict[str, Any]) -> set[str]:
    return {kind for output in cell["outputs"] for kind in output.get("data", {})}


def unexpected(cells: dict[str, dict[str, Any]]) -> list[str]:
    """What failed although it is not tagged so; nbgrader takes anything on stderr for a failure too."""
    return [
        f"{name}: {text_of(cell)}"
        for name, cell in cells.items()
        for output in cell.get("outputs", [])
        if (output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", []))
        or output.get("name") == "stderr"
    ]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_committed_without_outputs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in ids), "ids say what a cell is for; random ones do not"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What `make demo` printed, and the folder it wrote to."""
    pytest.importorskip("nbclient")
    pytest.importorskip("nbconvert")
    out = tmp_path_factory.mktemp("demo")
    env = {**os.environ, "LABKERNEL_ROOT": str(out / "store"), "LABKERNEL_RUNTIME_DIR": str(out / "run")}
    command = [sys.executable, str(REPO / "scripts" / "demo.py"), "--out", str(out)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        yield done.stdout, out  # type: ignore[misc]
    finally:
        with Engine.open(out / "store", runtime_dir=out / "run") as lab:
            lab.runtime.shutdown(force=True)
        shutil.rmtree(out, ignore_errors=True)


pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_preflight_tells_what_works_and_runs_a_container(demo: tuple[str, Path]) -> None:
    cells = cells_of(demo[1] / "00_preflight.ipynb")
    assert unexpected(cells) == []
    driver = text_of(cells["driver"]).splitlines()[0]
    assert driver in ("root", "rootless")
    assert f"driver: {driver}" in text_of(cells["doctor"])
    assert "text/html" in kinds(cells["doctor"])
    assert "hello from a container" in text_of(cells["first"])
    assert "exit code 0" in text_of(cells["first"])
    inside = text_of(cells["inside"])
    assert "box" in inside.splitlines(), "after what the machine does not give, as a warning"
    assert re.search(r"^ *1 ", inside, re.MULTILINE)
    shown = text_of(cells["fail"])
    assert "executable file not found in $PATH" in shown
    assert "hint:" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_the_course_builds_runs_and_measures(demo: tuple[str, Path]) -> None:
    printed, out = demo
    cells = cells_of(out / "01_containers_and_vms.ipynb")
    assert unexpected(cells) == []
    assert re.search(r"hello:latest .* 4 layers", text_of(cells["build"]))
    assert "6 steps, 6 cached" in text_of(cells["cached"])
    assert "done after 60000 rounds" in text_of(cells["run"])
    assert "walker" in text_of(cells["ps"])
    assert kinds(cells["monitor"]) == {"image/png", "text/plain"}, "a widget may not stay in a saved notebook"
    assert text_of(cells["logs"]).count("done after 20000 rounds") == 3
    outside, inside = text_of(cells["container-kernel"]), text_of(cells["vm-kernel"])
    assert os.uname().release in outside
    assert re.search(r"^Linux \S+", inside, re.MULTILINE)
    assert "accelerator" in inside
    table = text_of(cells["compare"])
    assert "image/png" in kinds(cells["compare"])
    for row in ("time to first instruction", "wall time", "CPU time", "peak memory", "disk used", "accelerator"):
        assert row in table
    assert "time to first instruction" in printed, "`make demo` prints the measured table"
    assert text_of(cells["exercise-check"]).rstrip().endswith("7.0")
    assert "✗" not in text_of(cells["exercise-check"])


@pytest.mark.slow
def test_a_memory_limit_is_met(demo: tuple[str, Path]) -> None:
    cells = cells_of(demo[1] / "01_containers_and_vms.ipynb")
    if "not enforced" in text_of(cells["run"]) + text_of(cells["limit"]):
        pytest.skip("this machine gives no cgroup for memory")
    assert "67108864" in text_of(cells["fence"])
    assert "exit code 137" in text_of(cells["limit"])


@pytest.mark.slow
def test_the_pages_hold_their_pictures(demo: tuple[str, Path]) -> None:
    for name in NAMES:
        page = (demo[1] / f"{name}.html").read_text()
        assert '<script type="application/vnd.jupyter.widget-view+json">' not in page
    assert len(re.findall(r'<img[^>]*src="data:image/png;base64,', page)) == 2


@pytest.mark.slow
def test_a_plain_user_can_run_the_preflight(plain_user: Any) -> None:
    out = plain_user.home / "out"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import demo; "
        "out = Path(sys.argv[2]); out.mkdir(); demo.execute('00_preflight', out, timeout_s=200)"
    )
    done = plain_user.python("-c", code, str(REPO / "scripts"), str(out), timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = cells_of(out / "00_preflight.ipynb")
    assert unexpected(cells) == []
    assert text_of(cells["driver"]).splitlines()[0] == "rootless"
    assert "hello from a container" in text_of(cells["first"])
