"""`%%dockerfile` cells in a real JupyterLab: highlighted as Dockerfiles, completed by what a Dockerfile may say."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

DOCKERFILE = "text/x-labkernel-dockerfile"
CELL = """%%dockerfile -t web
# syntax=docker/dockerfile:1
FROM lab/busybox AS base
ARG NAME="a name"
ENV GREETING=hello \\
    WHO=$NAME
RUN --mount=type=cache,target=/var/cache \\
    echo "$GREETING" > /greeting
COPY --from=base --chown=1000 /greeting /greeting
CMD ["cat", "/greeting"]"""
MIMES = "() => [...window.jupyterapp.shell.currentWidget.content.model.cells].map(cell => cell.mimeType)"
# Whether each of these words of the first cell is drawn in the colour that JupyterLab's theme has for it.
COLOURS = """() => {
  const colour = node => getComputedStyle(node).color;
  const of = name => {
    const probe = document.createElement('span');
    probe.style.color = `var(--jp-mirror-editor-${name}-color)`;
    document.body.append(probe);
    const found = colour(probe);
    probe.remove();
    return found;
  };
  const spans = [...document.querySelector('.jp-CodeCell').querySelectorAll('.cm-line span')];
  const found = Object.fromEntries(spans.map(span => [span.textContent, colour(span)]));
  const wanted = {
    keyword: ['FROM', 'ARG', 'ENV', 'RUN', 'COPY', 'CMD', 'AS'],
    attribute: ['--mount=', '--from=', '--chown='],
    tag: ['lab/busybox'],
    def: ['base'],
    string: ['"a name"', '"/greeting"'],
  };
  return Object.entries(wanted).every(([name, words]) => words.every(word => found[word] === of(name)));
}"""


@pytest.mark.usefixtures("extension")
def test_dockerfile_cells(open_notebook: Any, expect: Any) -> None:
    other = "FROM lab/busybox AS first\n"
    notebook = open_notebook("dockerfile-cells.ipynb", CELL, "FROM = 1  # Python", other, "%load_ext labkernel")
    page = notebook.page
    _mimes(page, DOCKERFILE, "text/x-ipython", "text/x-ipython", "text/x-ipython")
    for theme in ("Light", "Dark"):
        notebook.theme(f"JupyterLab {theme}")
        page.wait_for_function(COLOURS, timeout=60_000)
        notebook.shot(f"dockerfile-cell-{theme.lower()}")

    # The language follows the magic, and the cell can be completed before it was ever run.
    last = page.locator(".jp-CodeCell").nth(3)  # running it adds another one below
    last.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    expect(last.locator(".jp-InputPrompt")).to_have_text("[1]:", timeout=120_000)
    cell = page.locator(".jp-CodeCell").nth(2)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Home")
    page.keyboard.type("%%dockerfile\n")
    _mimes(page, DOCKERFILE, "text/x-ipython", DOCKERFILE, *["text/x-ipython"] * 2)
    page.keyboard.press("Control+End")
    page.keyboard.type("COPY --fr")
    # Until JupyterLab has looked at the line, the key indents it.
    expect(page.locator(".jp-CodeCell .jp-mod-completer-enabled")).to_have_count(1, timeout=60_000)
    for word in ("--from=", "first"):
        page.keyboard.press("Tab")
        # Images of the store are offered, too, so the one that is meant is chosen.
        wanted = page.locator(".jp-Completer-item").filter(has_text=word).first
        expect(wanted).to_be_visible(timeout=60_000)
        notebook.shot(f"dockerfile-completion-{word.strip('-=')}")
        wanted.click()
    expect(cell.locator(".cm-line").last).to_have_text("COPY --from=first", timeout=60_000)
    page.keyboard.press("Control+Home")
    page.keyboard.press("Delete")
    _mimes(page, DOCKERFILE, *["text/x-ipython"] * 4)


LOOP = 'RUN i=0; while [ $i -lt 10000 ]; do echo "line $i of many"; i=$((i+1)); done; '
FORTY = "%%dockerfile -t forty\nFROM lab/busybox\n" + "\n".join(f"ENV N{n}={n}" for n in range(40))
FAILING = f"%%dockerfile -t never --no-cache\nFROM lab/busybox\n{LOOP}true\n{LOOP}exit 3"
STOPPED = "%%dockerfile -t stopped\nFROM lab/busybox\nRUN echo begun; sleep 600"


@pytest.mark.parametrize(("theme", "width"), [("Light", 1280), ("Dark", 700)])
def test_builds_in_cells(open_notebook: Any, expect: Any, theme: str, width: int) -> None:
    """A long build folds, much output stays a tail, a failure shows the cell's lines, the stop button one line; all of
    it is there again without a kernel."""
    cells = (
        "%load_ext labkernel",
        FORTY,
        FAILING,
        "%container debug",
        STOPPED,
        "from IPython.display import HTML\nHTML('$a$')",
    )
    name = f"builds-{theme.lower()}.ipynb"
    notebook = open_notebook(name, *cells, width=width)
    page = notebook.page
    notebook.theme(f"JupyterLab {theme}")
    for index in range(3):
        _run(notebook, index)
    page.evaluate(RUN_CELL, 3)
    for line in ("pwd; echo looked around", "exit"):
        box = page.locator(".jp-Stdin-input:enabled")
        expect(box).to_have_count(1, timeout=60_000)
        notebook.shot(f"debug-{theme.lower()}")
        asked = box.element_handle()
        box.fill(line)
        box.press("Enter")
        asked.wait_for_element_state("hidden", timeout=60_000)  # for a moment it stands beside the next one
    page.wait_for_function(ENDED, arg=3, timeout=120_000)
    made = notebook.cells()
    assert "41 steps" in made["c1"]["outputs"][0]["data"]["text/plain"]
    shown = "".join(made["c2"]["outputs"][0]["data"]["text/html"])
    assert "line 9999 of many" in shown
    assert len(shown) < 20_000, "the last lines, not all of them"
    told = "".join(made["c2"]["outputs"][1]["traceback"])
    assert "4 | >>> RUN i=0" in told
    debugged = "".join(output["text"] for output in made["c3"]["outputs"] if output["output_type"] == "stream")
    assert "failed at line 4 of" in debugged
    assert "looked around" in debugged
    # `$i … $` is no formula, and by the time a formula is drawn below it, it would have become one.
    notebook.show("c2")
    _run(notebook, 5)
    expect(page.locator("details.labkernel-build").last).to_contain_text("while [ $i -lt 10000 ]", timeout=60_000)
    notebook.show("c5")
    expect(page.locator(".jp-CodeCell").last.locator("mjx-container")).to_have_count(1, timeout=60_000)
    expect(page.locator("details.labkernel-build mjx-container")).to_have_count(0, timeout=60_000)
    notebook.show("c2")
    notebook.shot(f"builds-{theme.lower()}")
    page.evaluate(RUN_CELL, 4)
    notebook.running("c4", "begun")
    notebook.command("notebook:interrupt-kernel")
    notebook.page.wait_for_function(ENDED, arg=4, timeout=120_000)
    stopped, error = notebook.cells()["c4"]["outputs"]
    assert "Build stopped after" in stopped["data"]["text/plain"]
    assert (error["ename"], len(error["traceback"])) == ("Interrupted", 1)
    notebook.show("c4")
    notebook.shot(f"builds-stopped-{theme.lower()}")
    notebook.save()
    page.context.close()
    again = open_notebook(name, kept=True, width=width)
    again.show("c2")
    expect(again.page.get_by_text("line 9999 of many").first).to_be_visible(timeout=60_000)


RUN_CELL = """index => {
  window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
  window.jupyterapp.commands.execute('notebook:run-cell');
}"""
ENDED = """index => {
  const cell = [...window.jupyterapp.shell.currentWidget.content.model.cells][index];
  return cell.executionCount !== null && cell.executionState === 'idle';
}"""


def _run(notebook: Any, index: int) -> None:
    notebook.page.evaluate(RUN_CELL, index)
    notebook.page.wait_for_function(ENDED, arg=index, timeout=120_000)


def _mimes(page: Any, *wanted: str) -> None:
    same = f"wanted => JSON.stringify(({MIMES})()) === JSON.stringify(wanted)"
    page.wait_for_function(same, arg=list(wanted), timeout=60_000)
