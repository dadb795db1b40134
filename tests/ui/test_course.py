"""The course as a student meets it: its notebooks run in a real JupyterLab, watched in a real browser."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STATUS = "() => document.querySelector('.jp-labkernel-status')?.textContent ?? ''"


def text_of(cell: dict[str, Any]) -> str:
    """What a cell shows without a browser: streams, plain values, and the words of errors."""
    texts = []
    for output in cell["outputs"]:
        found = output.get("text") or output.get("data", {}).get("text/plain") or output.get("traceback") or ""
        texts.append(found if isinstance(found, str) else ("\n" if "traceback" in output else "").join(found))
    return "\n".join(texts)


def kinds(cell: dict[str, Any]) -> set[str]:
    return {kind for output in cell["outputs"] for kind in output.get("data", {})}


def unexpected(cells: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {text_of(cell)}"
        for name, cell in cells.items()
        if "raises-exception" not in cell["tags"]
        and any(o["output_type"] == "error" or o.get("name") == "stderr" for o in cell["outputs"])
    ]


def test_preflight_runs_from_top_to_bottom(open_notebook: Any) -> None:
    notebook = open_notebook("00_preflight.ipynb")
    notebook.run_all()
    cells = notebook.executed(timeout_s=300)
    assert unexpected(cells) == []
    assert "hello from a container" in text_of(cells["first"])
    failure = text_of(cells["fail"])
    assert "executable file not found" in failure
    assert "Traceback" not in failure
    for cell in ("doctor", "first", "fail"):
        notebook.show(cell)
        notebook.shot(f"preflight-{cell}")


@pytest.mark.parametrize(("width", "theme"), [(1600, "JupyterLab Light"), (800, "JupyterLab Dark")])
def test_the_course_measures_both_and_keeps_its_pictures(
    open_notebook: Any, expect: Any, width: int, theme: str
) -> None:
    name = "01_containers_and_vms.ipynb"
    notebook = open_notebook(name, width=width)
    notebook.theme(theme)
    notebook.run_all()
    cells = notebook.executed(timeout_s=500)
    assert unexpected(cells) == []
    assert "image/png" in kinds(cells["compare"])
    assert "time to first instruction" in text_of(cells["compare"])
    assert kinds(cells["monitor"]) == {"image/png", "text/plain"}
    assert text_of(cells["exercise-check"]).rstrip().endswith("7.0")
    shown = theme.split()[1].lower()
    for cell in ("build", "run", "ps", "monitor", "exec", "vm-kernel", "compare", "read-md", "exercise-run"):
        notebook.show(cell)
        notebook.shot(f"course-{shown}-{cell}")
    for cell in ("monitor", "compare"):
        notebook.show(cell)
        notebook.page.locator(".jp-OutputArea img").first.wait_for(timeout=60_000)

    saved = json.dumps(notebook.save())
    assert "widget-view" not in saved, "a saved widget opens as an error"
    notebook.page.close()
    again = open_notebook(name, kept=True)
    again.show("monitor")
    again.page.locator(".jp-OutputArea img").first.wait_for(timeout=60_000)
    expect(again.page.locator(".jp-Notebook")).not_to_contain_text("widget", timeout=60_000)
    assert kinds(again.cells()["compare"]) >= {"image/png"}


@pytest.mark.usefixtures("extension")
def test_the_status_bar_counts_running_containers(open_notebook: Any, lab: Any, expect: Any) -> None:
    notebook = open_notebook("status.ipynb", "'open'")
    page = notebook.page
    page.wait_for_function(rf"() => /^lab: \w+ · \d+ running$/.test(({STATUS})())", timeout=120_000)
    before = int(page.evaluate(STATUS).split()[3])
    start = "import labkernel; lab = labkernel.connect(); "
    lab.python(start + "lab.containers.run('busybox', ['sleep', '600'], detach=True, name='seen')")
    page.wait_for_function(rf"() => ({STATUS})().endsWith('· {before + 1} running')", timeout=60_000)
    expect(page.locator(".jp-labkernel-status")).to_have_attribute(
        "title", re.compile("containers running"), timeout=60_000
    )
    notebook.shot("status")
    lab.python(start + "lab.containers.get('seen').remove(force=True)")
    page.wait_for_function(rf"() => ({STATUS})().endsWith('· {before} running')", timeout=60_000)


def test_the_stop_button_ends_a_container_without_a_traceback(open_notebook: Any, lab: Any) -> None:
    run = "%container run --rm --name long busybox sh -c 'echo begun; sleep 300'"
    notebook = open_notebook("stop.ipynb", "%load_ext labkernel", run, "'after'")
    notebook.run_all()
    notebook.running("c1", "begun")
    notebook.page.get_by_role("button", name="Interrupt the kernel").click()
    notebook.page.wait_for_function(
        f"() => {{ {CELL_OF} return cell('c1').state === 'idle' && cell('c1').outputs.length > 1; }}", timeout=60_000
    )
    cell = notebook.cells()["c1"]
    notebook.shot("stopped")
    shown = text_of(cell)
    assert "Traceback" not in shown, shown
    assert "labkernel/" not in shown, shown
    assert "nterrupted" in shown, shown
    names = "import labkernel; print([c.name for c in labkernel.connect().containers.list(all=True)])"
    assert "long" not in lab.python(names)


CELL_OF = """
  const cells = Array.from(window.jupyterapp.shell.currentWidget.content.model.cells);
  const cell = id => { const c = cells.find(c => c.id === id);
                       return {state: c.executionState ?? 'idle', outputs: c.outputs.toJSON()}; };
"""


def test_a_build_shows_its_progress_while_it_runs(open_notebook: Any) -> None:
    slow = (
        "%%dockerfile -t slow --no-cache\nFROM busybox\nRUN for i in 1 2 3 4; do echo line $i; sleep 1; done\nRUN true"
    )
    notebook = open_notebook("progress-real.ipynb", "%load_ext labkernel", slow)
    notebook.run_all()
    notebook.running("c1", "line 2")
    page = notebook.page
    page.wait_for_function("() => /line 2/.test(document.querySelector('details.labkernel-build[open]')?.innerText)")
    notebook.shot("build-running")
    cells = notebook.executed()
    assert unexpected(cells) == []
    assert "Built" in text_of(cells["c1"])


def test_an_error_in_a_dockerfile_names_the_line_of_its_cell(open_notebook: Any) -> None:
    wrong = "%%dockerfile -t wrong\nFROM busybox\n\nRUM echo hello\n"
    failing = "%%dockerfile -t wrong\nFROM busybox\nRUN echo before\nRUN echo gone wrong; exit 3\n"
    notebook = open_notebook("wrong.ipynb", "%load_ext labkernel", wrong)
    notebook.run_all()
    shown = text_of(notebook.executed()["c1"])
    assert "RUM" in shown
    assert "line 4" in shown, "a cell's line, as JupyterLab numbers it"
    assert "labkernel/" not in shown
    notebook.shot("dockerfile-error")
    notebook = open_notebook("failing.ipynb", "%load_ext labkernel", failing)
    notebook.run_all()
    shown = text_of(notebook.executed()["c1"])
    assert "gone wrong" in shown
    assert "4 | >>> RUN echo gone wrong" in shown
    assert "Traceback" not in shown
    notebook.shot("dockerfile-step-failed")
