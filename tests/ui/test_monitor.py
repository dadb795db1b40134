"""lab.monitor() in a real JupyterLab: it moves while a cell runs, obeys keys, ends by itself and leaves a picture."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Real processes, followed as a container without a cgroup is: the widget sees the same records either way.
TARGETS = """
import subprocess, sys, time
from labkernel.widgets.monitor import monitor

WORK = '''
import time, sys
keep, end = [], time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    until = time.process_time() + 0.05 * (1 + len(keep) % 4)
    while time.process_time() < until: pass
    keep.append(bytearray(1 << 20) if len(keep) < 60 else b"")
    for i in range(0, len(keep[-1]), 4096): keep[-1][i] = 1
    time.sleep(0.1)
'''

class Work:
    def __init__(self, name, seconds):
        self.name = name
        self.process = subprocess.Popen([sys.executable, "-c", WORK, str(seconds)])
    def runtime_state(self):
        code = self.process.poll()
        if code is None:
            return {"status": "running", "pid": self.process.pid, "cgroup": {"version": 0, "paths": {}}}
        return {"status": "exited", "exit_code": code}
"""


def shot(page: Any, name: str) -> None:
    """Keep a screenshot where LABKERNEL_SCREENSHOTS says, for a person to look at."""
    where = os.environ.get("LABKERNEL_SCREENSHOTS")
    if where:
        Path(where).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(where) / f"{name}.png"))


LIVE = "() => document.querySelector('.labkernel-monitor .status')?.textContent === 'live'"
PIXELS = """() => {
  const canvas = document.querySelector('.labkernel-monitor canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum = (sum * 31 + data[i] + data[i + 1] + data[i + 2]) % 1000000007;
  return sum;
}"""


FITS = """() => {
  const root = document.querySelector('.labkernel-monitor');
  return root.querySelector('canvas').clientWidth <= root.clientWidth && root.scrollWidth <= root.clientWidth + 1;
}"""


def test_it_lives_ends_and_leaves_a_picture(open_notebook: Any, lab: Any, expect: Any) -> None:
    code = "w = Work('web', 600); m = monitor(w)\nm"
    busy = "import pathlib\nwhile not pathlib.Path('enough').exists(): time.sleep(0.1)"
    notebook = open_notebook("monitor.ipynb", TARGETS, code, busy, "w.process.kill(); m.wait(60)\nprint(m.ended)")
    page = notebook.page
    notebook.run_all()
    page.wait_for_function(LIVE, timeout=120_000)
    page.wait_for_function(
        "() => /MiB/.test(document.querySelector('.labkernel-monitor .figures')?.textContent)", timeout=60_000
    )
    # The third cell keeps the kernel busy: the plot moves all the same.
    first = page.evaluate(PIXELS)
    page.wait_for_function(f"() => ({PIXELS})() !== {first}", timeout=60_000)
    root = page.locator(".labkernel-monitor")
    status = root.locator(".status")
    # A user's way: a click puts the keyboard there. It must stay there while other cells of the notebook go on.
    root.locator("canvas").click()
    page.keyboard.press(" ")
    expect(status).to_have_text("paused", timeout=60_000)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("-")
    expect(root.locator("select")).to_have_value("300", timeout=60_000)
    shot(page, "monitor-paused")
    page.keyboard.press(" ")
    expect(status).to_have_text("live", timeout=60_000)
    (lab.home / "enough").touch()
    page.locator(".jp-OutputArea img").wait_for(timeout=120_000)
    page.wait_for_function("() => document.body.innerText.includes('True')", timeout=120_000)
    expect(page.locator(".labkernel-monitor")).to_have_count(0, timeout=60_000)
    shot(page, "monitor-ended")
    output = notebook.save()["cells"][1]["outputs"]
    assert len(output) == 1
    assert set(output[0]["data"]) == {"image/png", "text/plain"}, "no widget may stay in a saved notebook"


@pytest.mark.parametrize("width", [1280, 640])
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_it_fits_themes_and_widths(open_notebook: Any, theme: str, width: int) -> None:
    name = f"{theme.split()[1].lower()}-{width}"
    code = "w = [Work('web', 60), Work('database', 60)]; m = monitor(w)\nm"
    notebook = open_notebook(f"monitor-{name}.ipynb", TARGETS, code, width=width)
    page = notebook.page
    notebook.theme(theme)
    notebook.run_all()
    page.wait_for_function(LIVE, timeout=120_000)
    page.wait_for_timeout(6000 if os.environ.get("LABKERNEL_SCREENSHOTS") else 0)
    page.wait_for_function(FITS, timeout=60_000)
    page.locator(".labkernel-monitor").scroll_into_view_if_needed()
    shot(page, f"monitor-{name}")
    page.get_by_role("button", name="End").click()
    page.locator(".jp-OutputArea img").wait_for(timeout=120_000)


def test_a_kernel_restart_is_said(open_notebook: Any, lab: Any) -> None:
    code = "w = Work('web', 60); m = monitor(w)\nm"
    notebook = open_notebook("monitor-restart.ipynb", TARGETS, code)
    notebook.run_all()
    notebook.page.wait_for_function(LIVE, timeout=120_000)
    session = next(s for s in lab.rest("GET", "sessions") if s["path"] == "monitor-restart.ipynb")
    lab.rest("POST", f"kernels/{session['kernel']['id']}/restart")
    text = "() => /kernel/.test(document.querySelector('.labkernel-monitor .status')?.textContent ?? 'kernel')"
    notebook.page.wait_for_function(text, timeout=60_000)


def test_what_is_gone_offers_nothing(open_notebook: Any, lab: Any, expect: Any) -> None:
    """A container that ended is not running; a kernel that died runs nothing, so its buttons cannot be pressed."""
    code = CONTAINER + "d = lab.containers.run('busybox', ['sleep', '600'], detach=True, name='db')\n"
    code += "m = lab.monitor(c, d); b = lab.dashboard()"
    notebook = open_notebook("monitor-gone.ipynb", code, "m", "b", "d.kill()")
    page = notebook.page
    notebook.run_all()
    root, board = page.locator(".labkernel-monitor"), page.locator(".labkernel-dashboard")
    ended = root.locator(".target", has_text="db")
    expect(ended.locator(".figures")).to_have_text("not running", timeout=120_000)
    expect(ended.get_by_role("button", name="start")).to_be_enabled(timeout=60_000)
    kill = board.locator("tr", has_text="web").get_by_role("button", name="kill")
    expect(kill).to_be_enabled(timeout=60_000)
    session = next(s for s in lab.rest("GET", "sessions") if s["path"] == "monitor-gone.ipynb")
    lab.rest("DELETE", f"sessions/{session['id']}")
    expect(root.locator(".status")).to_contain_text("has the kernel stopped", timeout=60_000)
    expect(ended.get_by_role("button", name="start")).to_be_disabled(timeout=60_000)
    expect(board.locator(".status")).to_contain_text("has the kernel stopped", timeout=60_000)
    expect(kill).to_be_disabled(timeout=60_000)
    lab.python("import labkernel\nfor c in labkernel.connect().containers.list(all=True): c.remove(force=True)")


SAVED = "() => window.jupyterapp.commands.execute('docmanager:save')"


@pytest.mark.usefixtures("extension")
def test_saved_while_it_is_live_it_has_a_picture_and_lives_again(open_notebook: Any, lab: Any, expect: Any) -> None:
    code = "w = [Work('web', 600), Work('database', 600)]; m = monitor(w)\nm"
    board = "import labkernel\nlab = labkernel.connect(); lab.volumes.create('kept'); lab.dashboard(every_s=0.2)"
    notebook = open_notebook("monitor-saved.ipynb", TARGETS, code, board)
    page = notebook.page
    notebook.run_all()
    page.wait_for_function(LIVE, timeout=120_000)
    figures = "() => /MiB/.test(document.querySelector('.labkernel-monitor .figures')?.textContent)"
    page.wait_for_function(figures, timeout=60_000)
    expect(page.locator(".labkernel-dashboard").get_by_role("tab", name="Volumes 1")).to_be_visible(timeout=60_000)
    page.evaluate(SAVED)
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty", timeout=60_000)
    plot, table = (lab.saved("monitor-saved.ipynb")["cells"][i]["outputs"][0] for i in (1, 2))
    assert set(plot["data"]) == {"image/png", "text/plain"}, "no widget may stand in a saved notebook"
    assert base64.b64decode(plot["data"]["image/png"]).startswith(b"\x89PNG")
    assert "kept" in "".join(table["data"]["text/html"])
    assert set(table["data"]) == {"text/html", "text/plain"}
    # The page still shows the live ones; loaded again beside the kernel it does so too, with all of their history.
    expect(page.locator(".labkernel-monitor .status")).to_have_text("live", timeout=60_000)
    page.reload()
    page.wait_for_function(LIVE, timeout=120_000)
    page.wait_for_function(figures, timeout=60_000)
    expect(page.locator(".labkernel-dashboard")).to_have_count(1, timeout=60_000)
    # Without the kernel the picture is what remains.
    session = next(s for s in lab.rest("GET", "sessions") if s["path"] == "monitor-saved.ipynb")
    lab.rest("DELETE", f"sessions/{session['id']}")
    page.evaluate(SAVED)
    page.reload()
    picture = page.locator(".jp-OutputArea img")
    expect(picture).to_have_count(1, timeout=120_000)
    expect(page.get_by_text("model not found")).to_have_count(0)


CONTAINER = """
import labkernel
lab = labkernel.connect()
work = "i=0; while true; do i=$((i+1)); [ $((i % 30000)) = 0 ] || continue; "
work += "dd if=/dev/zero of=/dev/shm/$i bs=1M count=2; sleep 1; done"
limits = {"mem_limit": "64m", "nano_cpus": 300_000_000}
c = lab.containers.run("lab/busybox", ["sh", "-c", work], detach=True, name="web", **limits)
m = lab.monitor(c)
"""


def test_a_container_is_killed_after_a_question_and_its_execs_are_marked(open_notebook: Any, expect: Any) -> None:
    do = "c.exec_run(['true']); print(m.wait(300)); print([event.kind for event in sorted(m.series[0].events)])"
    notebook = open_notebook("monitor-acts.ipynb", CONTAINER, "m", do, "c.remove(force=True)")
    page = notebook.page
    notebook.run_all()
    page.wait_for_function(LIVE, timeout=120_000)
    # Drag over the plot: zoomed, and back by the keyboard.
    canvas = page.locator(".labkernel-monitor canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60, steps=4)
    page.mouse.up()
    status = page.locator(".labkernel-monitor .status")
    expect(status).to_contain_text("zoomed", timeout=60_000)
    page.keyboard.press("Escape")
    expect(status).to_have_text("live", timeout=60_000)
    acts = page.locator(".labkernel-monitor .acts")
    acts.get_by_role("button", name="kill").click()
    expect(acts.locator(".question")).to_have_text("kill web?", timeout=60_000)
    shot(page, "monitor-question")
    acts.get_by_role("button", name="no", exact=True).click()
    expect(acts.get_by_role("button", name="stop")).to_be_visible(timeout=60_000)
    acts.get_by_role("button", name="kill").click()
    page.keyboard.press("Enter")  # the keyboard stands on "yes"
    page.locator(".jp-OutputArea img").wait_for(timeout=120_000)
    page.wait_for_function("() => /'exec'.*'stop'/.test(document.body.innerText)", timeout=60_000)


def test_a_real_container_with_limits(open_notebook: Any) -> None:
    stop = "import time; time.sleep(12 if PICTURES else 3); c.kill(); print(m.wait(60)); c.remove(force=True)"
    pictures = f"PICTURES = {bool(os.environ.get('LABKERNEL_SCREENSHOTS'))}"
    notebook = open_notebook("monitor-container.ipynb", CONTAINER, "m", f"{pictures}\n{stop}")
    page = notebook.page
    notebook.run_all()
    page.wait_for_function(LIVE, timeout=120_000)
    page.wait_for_timeout(11000 if os.environ.get("LABKERNEL_SCREENSHOTS") else 0)
    page.locator(".labkernel-monitor").scroll_into_view_if_needed()
    shot(page, "monitor-container")
    page.locator(".jp-OutputArea img").wait_for(timeout=120_000)
    page.wait_for_function("() => /True/.test(document.body.innerText)", timeout=120_000)
    page.locator(".jp-OutputArea img").scroll_into_view_if_needed()
    shot(page, "monitor-container-ended")
    output = notebook.save()["cells"][1]["outputs"][0]["data"]
    assert "ended" in "".join(output["text/plain"])
