"""`%%dockerfile` cells in a real JupyterLab: highlighted as Dockerfiles, completed by what a Dockerfile may say."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

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
# The colour in which each instruction of the first cell is drawn, and the colour of JupyterLab's keywords.
COLOURS = """() => {
  const colour = node => getComputedStyle(node).color;
  const probe = document.createElement('span');
  probe.style.color = 'var(--jp-mirror-editor-keyword-color)';
  document.body.append(probe);
  const keyword = colour(probe);
  probe.remove();
  const spans = [...document.querySelector('.jp-CodeCell').querySelectorAll('.cm-line span')];
  const found = Object.fromEntries(spans.map(span => [span.textContent, colour(span) === keyword]));
  return ['FROM', 'ARG', 'ENV', 'RUN', 'COPY', 'CMD'].every(word => found[word] === true);
}"""


def test_dockerfile_cells(open_notebook: Any, expect: Any) -> None:
    other = "FROM lab/busybox AS first\n"
    notebook = open_notebook("dockerfile-cells.ipynb", CELL, "FROM = 1  # Python", other, "%load_ext labkernel")
    page = notebook.page
    _mimes(page, "text/x-dockerfile", "text/x-ipython", "text/x-ipython", "text/x-ipython")
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
    _mimes(page, "text/x-dockerfile", "text/x-ipython", "text/x-dockerfile", *["text/x-ipython"] * 2)
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
    _mimes(page, "text/x-dockerfile", *["text/x-ipython"] * 4)


def _mimes(page: Any, *wanted: str) -> None:
    same = f"wanted => JSON.stringify(({MIMES})()) === JSON.stringify(wanted)"
    page.wait_for_function(same, arg=list(wanted), timeout=60_000)
