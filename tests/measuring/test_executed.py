"""The course's notebook of experiments, and a live plot that no browser watches, executed by nbclient."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from labkernel.engine import Engine

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_the_textbook_measured.ipynb"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def executed(engine: Engine, monkeypatch: pytest.MonkeyPatch, folder: Path, notebook: Any) -> dict[str, Any]:
    """Run all cells on the store of `engine`; cells by id."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD"):
        monkeypatch.delenv(name, raising=False)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources)
    client.execute(env=dict(os.environ))
    return {cell["id"]: cell for cell in notebook["cells"]}


def words(cell: Any) -> str:
    return "\n".join(
        "".join(output.get("text") or output.get("data", {}).get("text/plain") or "") for output in cell["outputs"]
    )


def test_each_row_of_the_textbook_is_measured(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needs: Any
) -> None:
    nbformat = pytest.importorskip("nbformat")
    needs("vm qemu", "vm mke2fs", "vm init", "vm kernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # One round instead of three, and not what test_measurements.py has already run: a machine's boots are dear.
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].replace("-n 3", "-n 1")
        if cell["id"] == "portability":
            cell["source"] = "from labkernel.measuring.portability import Portability\n"
            cell["source"] += "same = Portability('busybox', 'sha256:0', 'sha256:1', 1, [], {}, '')"
    cells = executed(engine, monkeypatch, tmp_path, notebook)
    assert "this machine and everything on it" in words(cells["isolation"])
    assert re.search(r"time to start: a virtual machine takes \d+", words(cells["ratios"]))
    for cell in ("cost", "density"):
        assert any("image/png" in output.get("data", {}) for output in cells[cell]["outputs"]), cell
    assert "extrapolated" in words(cells["density"])
    assert "MB" in words(cells["effort"])
    beside = cells["beside"]["outputs"][0]["data"]["text/markdown"].splitlines()
    assert len(beside) == 12
    assert all(line.count("|") == 6 for line in beside)
    assert not any("**-**" in line for line in beside), "each claim has what a container and a machine showed beside it"


def test_a_live_plot_without_a_browser_leaves_its_picture(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nbformat = pytest.importorskip("nbformat")
    start = "import labkernel\nlab = labkernel.connect()\n"
    start += "c = lab.containers.run('busybox', ['sleep', '600'], detach=True, name='unwatched')"
    sources = [start, "lab.monitor(c)", "lab.dashboard()", "c.exec_run(['true']); c.kill()", "c.remove(force=True)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    for index, cell in enumerate(notebook["cells"]):
        cell["id"] = f"c{index}"
    cells = executed(engine, monkeypatch, tmp_path, notebook)
    assert set(cells["c1"]["outputs"][0]["data"]) == {"image/png", "text/plain"}
    assert "unwatched" in words(cells["c1"])
    assert "widget-view" not in json.dumps(cells["c2"]["outputs"])
    assert "<table" in cells["c2"]["outputs"][0]["data"]["text/html"]
