"""The steps of a build in a real JupyterLab: live, then folded; open with the output when a step failed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

STEPS = """
import time
from types import SimpleNamespace
from labkernel.widgets.progress import BuildProgress

def step(number, status, text, **parts):
    given = {"total": 5, "stage": "", "line": 1, "end_line": 1, "duration_s": None, "size_bytes": None, "why": ""}
    return SimpleNamespace(number=number, status=status, text=text, **{**given, "output": b"", **parts})

def build(failing, pause):
    progress = BuildProgress("")
    progress(step(1, "started", "FROM busybox"))
    progress(step(1, "cached", "FROM busybox", size_bytes=2_150_000))
    progress(step(2, "started", "COPY greet.sh work.sh ./"))
    progress(step(2, "done", "COPY greet.sh work.sh ./", duration_s=0.02, size_bytes=512))
    text = "RUN echo compiling && make -j4 && make install PREFIX=/usr/local"
    progress(step(3, "started", text))
    for i in range(20):
        progress(step(3, "output", text, output=f"cc -O2 -c file{i}.c -o file{i}.o\\n".encode()))
    time.sleep(pause)
    if failing:
        progress(step(3, "output", text, output=b"file20.c:7: error: expected ';'\\nmake: *** [file20.o] Error 1\\n"))
        progress(step(3, "failed", text, duration_s=pause))
        progress.close(RuntimeError("failed"))
        return
    progress(step(3, "done", text, duration_s=pause, size_bytes=1_250_000))
    progress.close(object())
"""
OPEN = "() => [...document.querySelectorAll('details.labkernel-build')].map(e => e.open)"


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_steps_are_shown_live_and_fold(open_notebook: Any, expect: Any, theme: str) -> None:
    name = f"progress-{theme.split()[1].lower()}"
    notebook = open_notebook(f"{name}.ipynb", STEPS, "build(True, 0.1)", "build(False, 4)", "'the end'")
    page = notebook.page
    notebook.theme(theme)
    notebook.run_all()
    page.wait_for_function(f"() => JSON.stringify(({OPEN})()) === '[true,true]'", timeout=120_000)
    # In one call: the output is replaced several times a second.
    page.evaluate(
        "() => [...document.querySelectorAll('details.labkernel-build')].at(-1).scrollIntoView({ block: 'end' })"
    )
    where = os.environ.get("LABKERNEL_SCREENSHOTS")
    if where:
        Path(where).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(where) / f"{name}.png"))
    page.wait_for_function(f"() => JSON.stringify(({OPEN})()) === '[true,false]'", timeout=120_000)
    builds = page.locator("details.labkernel-build")
    expect(builds.first).to_contain_text("error: expected", timeout=60_000)
    expect(builds.last.locator("summary")).to_have_text(re.compile(r"^\s*Built in"), timeout=60_000)
    cells = notebook.save()["cells"]
    assert len(cells[2]["outputs"]) == 1
