"""lab.dashboard() in a real JupyterLab: it shows what is there, asks before it acts, and leaves a plain table."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START = """import labkernel
lab = labkernel.connect()
one = lab.containers.run("busybox", ["sh", "-c", "echo hello from one; sleep 600"], detach=True, name="board-one")
two = lab.containers.run("busybox", ["sh", "-c", "while true; do :; done"], detach=True, name="board-two",
                         nano_cpus=200_000_000, mem_limit="64m")
volume = lab.volumes.create("board-data")
board = lab.dashboard()"""
FITS = """() => {
  const body = document.querySelector(".labkernel-dashboard .body");
  return body.scrollWidth <= body.clientWidth;
}"""
END = """print(one.wait()["StatusCode"]); board.close()
for c in (one, two):
    c.remove(force=True)"""


@pytest.mark.parametrize(("theme", "width"), [("JupyterLab Light", 1600), ("JupyterLab Dark", 560)])
def test_it_acts_after_a_question_and_leaves_a_table(open_notebook: Any, expect: Any, theme: str, width: int) -> None:
    name = f"dashboard-{theme.split()[1].lower()}"
    notebook = open_notebook(f"{name}.ipynb", START, "board", END, "lab.processes()", "lab.network_map()", width=width)
    page = notebook.page
    notebook.theme(theme)
    notebook.run_all()
    root = page.locator(".labkernel-dashboard")
    row = root.locator("tr", has_text="board-one")
    expect(row).to_contain_text("busybox", timeout=120_000)
    expect(root.locator("tr", has_text="board-two")).to_contain_text("%", timeout=60_000)
    root.scroll_into_view_if_needed()
    page.wait_for_function(FITS, timeout=60_000)  # no button is cut off, however narrow it is
    row.get_by_role("button", name="logs").click()
    expect(root.locator(".logs pre")).to_contain_text("hello from one", timeout=60_000)
    row.get_by_role("button", name="kill").click()
    expect(row.locator(".question")).to_have_text("kill board-one?", timeout=60_000)
    notebook.shot(name)
    row.get_by_role("button", name="no", exact=True).click()
    expect(row.get_by_role("button", name="stop")).to_be_visible(timeout=60_000)
    root.get_by_role("tab", name="Volumes").click()
    expect(root.locator("tr", has_text="board-data")).to_be_visible(timeout=60_000)
    root.locator("tr", has_text="board-data").get_by_role("button", name="remove").click()
    page.keyboard.press("Enter")  # the keyboard stands on "yes"
    expect(root.locator("tr", has_text="board-data")).to_have_count(0, timeout=60_000)
    root.get_by_role("tab", name="Images").click()
    expect(root.locator("td.name").first).to_be_visible(timeout=60_000)
    notebook.shot(f"{name}-images")
    root.get_by_role("tab", name="Containers").click()
    root.locator("tr", has_text="board-one").get_by_role("button", name="kill").click()
    root.locator("tr", has_text="board-one").get_by_role("button", name="yes, kill").click()
    cells = notebook.executed(timeout_s=180)
    assert "137" in json.dumps(cells["c2"]["outputs"])
    expect(root).to_have_count(0, timeout=60_000)
    saved = notebook.save()["cells"][1]["outputs"]
    assert set(saved[0]["data"]) == {"text/html", "text/plain"}, "no widget may stay in a saved notebook"
    assert "board-two" in "".join(saved[0]["data"]["text/html"])
    for cell in ("c3", "c4"):
        notebook.show(cell)
        notebook.shot(f"{name}-{cell}")
    assert "image/svg+xml" in cells["c4"]["outputs"][0]["data"]
