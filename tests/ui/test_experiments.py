"""Experiments in a real JupyterLab: their pictures and tables fit light and dark, wide and narrow pages."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MEASURE = "%compare busybox --workload start,idle,disk,syscall,exec,file --rows bare,container -n 2"
DENSITY = """from labkernel.measuring.density import Curve, Density
mib = 1 << 20
Density("busybox", 8 << 30, [
    Curve("container", "container (root)", "containers", [(1, mib // 4), (4, mib), (8, 2 * mib)]),
    Curve("vm", "VM (TCG, 256 MiB)", "VMs", [(1, 130 * mib), (2, 250 * mib)]),
], "2 CPUs", [])"""
FITS = """() => [...document.querySelectorAll('.jp-OutputArea-output')].every(output =>
  output.querySelector('img') === null || output.querySelector('img').clientWidth <= output.clientWidth + 1)"""


@pytest.mark.parametrize(("theme", "width"), [("JupyterLab Light", 1600), ("JupyterLab Dark", 800)])
def test_pictures_and_tables_fit(open_notebook: Any, expect: Any, theme: str, width: int) -> None:
    name = f"experiments-{theme.split()[1].lower()}"
    notebook = open_notebook(f"{name}.ipynb", "%load_ext labkernel", MEASURE, DENSITY, width=width)
    notebook.theme(theme)
    notebook.run_all()
    cells = notebook.executed(timeout_s=240)
    for cell, words in (("c1", "one system call"), ("c2", "extrapolated")):
        notebook.show(cell)
        expect(notebook.page.get_by_text(words).first).to_be_visible(timeout=60_000)
        assert any("image/png" in output.get("data", {}) for output in cells[cell]["outputs"])
        notebook.page.wait_for_function(FITS, timeout=60_000)
        notebook.shot(f"{name}-{cell}")
