"""A real JupyterLab and a real Chromium for the browser tests; they skip, with the reason, where either is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

REPO = Path(__file__).resolve().parents[2]
TOKEN = "labkernel-tests"


@pytest.fixture
def extension() -> None:
    """The extension of JupyterLab. An installation that npm's packages were out of reach for goes without."""
    if not (REPO / "labkernel/labextension/package.json").exists():
        pytest.skip("the JupyterLab extension is not built here: npm's packages were out of reach when this was set up")


class Lab:
    """A running JupyterLab with a notebook directory of its own."""

    def __init__(self, home: Path, port: int, env: dict[str, str]) -> None:
        self.home = home
        self.env = env
        self.url = f"http://127.0.0.1:{port}"

    def rest(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", data=data, method=method)
        request.add_header("Authorization", f"token {TOKEN}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def notebook(self, name: str, *cells: str) -> str:
        """Write a notebook of code cells and give its URL path."""
        made = [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell}
            for i, cell in enumerate(cells)
        ]
        spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        text = json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": spec, "cells": made})
        (self.home / name).write_text(text)
        return name

    def copy(self, name: str) -> str:
        """Put one of the course's notebooks into the notebook directory."""
        shutil.copy(REPO / "notebooks" / name, self.home / name)
        return name

    def python(self, code: str) -> str:
        """Run Python on the store of this server, as another process of its user would; gives what it printed."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def saved(self, name: str) -> dict[str, Any]:
        return json.loads((self.home / name).read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    pytest.importorskip("jupyterlab")
    home = Path(tempfile.mkdtemp(prefix="lk-ui-", dir="/tmp"))
    port = free_port()
    env = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / ".config"),
        "JUPYTER_DATA_DIR": str(home / ".data"),
        "JUPYTER_RUNTIME_DIR": str(home / ".runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / ".lab-settings"),
        "IPYTHONDIR": str(home / ".ipython"),
        "LABKERNEL_ROOT": str(home / ".root"),
        "LABKERNEL_RUNTIME_DIR": str(home / ".run"),
    }
    settings = home / ".lab-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        f"--port={port}",
    ]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home}"]
    log = open(home / "server.log", "wb")  # noqa: SIM115
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=home)
    made = Lab(home, port, env)
    deadline = time.monotonic() + 180
    try:
        while True:
            try:
                made.rest("GET", "status")
                break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "JupyterLab did not answer"
                time.sleep(0.2)
        yield made
        for kernel in made.rest("GET", "kernels"):
            made.rest("DELETE", f"kernels/{kernel['id']}")
    finally:
        server.terminate()
        server.wait(timeout=30)
        # A supervisor that a notebook started outlives the kernels on purpose.
        made.python("import labkernel; labkernel.connect().runtime.shutdown(force=True)")
        log.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if path is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    options = [
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync"),
    ]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, headless=True, args=options)
        yield started
        started.close()


@pytest.fixture(scope="session")
def expect() -> Any:
    """Playwright's `expect`: every assertion about the page waits for what it claims, since a browser answers later."""
    return pytest.importorskip("playwright.sync_api").expect


CELLS = """() => {
  const cells = Array.from(window.jupyterapp.shell.currentWidget.content.model.cells);
  return cells.map(cell => ({
    id: cell.id,
    type: cell.type,
    source: cell.sharedModel.getSource(),
    tags: cell.getMetadata('tags') ?? [],
    count: cell.executionCount ?? null,
    state: cell.executionState ?? 'idle',
    outputs: cell.type === 'code' ? cell.outputs.toJSON() : [],
  }));
}"""


class Notebook:
    """One notebook open in the browser with a kernel that answers."""

    def __init__(self, lab: Lab, page: Any, name: str) -> None:
        self.lab, self.page, self.name = lab, page, name

    def run_all(self) -> None:
        self.command("notebook:run-all-cells")

    def cells(self) -> dict[str, dict[str, Any]]:
        """The open notebook's cells by id: type, source, tags, count, state, outputs."""
        return {cell["id"]: cell for cell in self.page.evaluate(CELLS)}

    def executed(self, *, timeout_s: float = 60) -> dict[str, dict[str, Any]]:
        """Wait until each code cell has run, or one failed that is not tagged as failing; gives the cells."""
        over = f"""() => {{
          const cells = ({CELLS})().filter(cell => cell.type === 'code' && cell.source.trim());
          const failed = cell => cell.outputs.some(output => output.output_type === 'error');
          return cells.some(cell => failed(cell) && !cell.tags.includes('raises-exception'))
            || cells.every(cell => cell.count !== null && cell.state === 'idle');
        }}"""
        self.page.wait_for_function(over, timeout=timeout_s * 1000, polling=200)
        return self.cells()

    def running(self, cell_id: str, text: str, *, timeout_s: float = 60) -> None:
        """Wait until a cell that still runs shows `text`."""
        shows = f"""([id, text]) => {{
          const cell = ({CELLS})().find(cell => cell.id === id);
          return cell.state === 'running' && JSON.stringify(cell.outputs).includes(text);
        }}"""
        self.page.wait_for_function(shows, arg=[cell_id, text], timeout=timeout_s * 1000, polling=100)

    def show(self, cell_id: str, *, at: str = "start") -> None:
        """Scroll to a cell; JupyterLab draws only those near the view."""
        index = list(self.cells()).index(cell_id)
        self.page.evaluate(
            "([index, at]) => window.jupyterapp.shell.currentWidget.content.scrollToItem(index, at)", [index, at]
        )

    def shot(self, name: str) -> None:
        """Keep a screenshot where LABKERNEL_SCREENSHOTS says, for a person to look at."""
        where = os.environ.get("LABKERNEL_SCREENSHOTS")
        if where:
            Path(where).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=str(Path(where) / f"{name}.png"))

    def command(self, name: str) -> None:
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name) }", name)

    def theme(self, name: str) -> None:
        self.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)

    def save(self) -> dict[str, Any]:
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return self.lab.saved(self.name)


@pytest.fixture
def open_notebook(lab: Lab, browser: Any) -> Iterator[Any]:
    """`open_notebook("name.ipynb", cell, cell, …, width=…)` gives a `Notebook`.

    Without cells it opens a copy of the course's notebook of that name, or with `kept` what lies there already.
    """
    contexts: list[Any] = []

    def open_it(name: str, *cells: str, width: int = 1280, height: int = 900, kept: bool = False) -> Notebook:
        if cells:
            lab.notebook(name, *cells)
        elif not kept:
            lab.copy(name)
        body = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}}
        lab.rest("POST", "sessions", body)
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{lab.url}/doc/tree/{name}?token={TOKEN}")
        # "idle" comes before a kernel can be used: wait for the application and for the notebook's own session.
        ready = """() => {
          const widget = window.jupyterapp?.shell?.currentWidget;
          return widget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'
            && widget.sessionContext.session.kernel.status === 'idle';
        }"""
        page.wait_for_function(ready, timeout=120_000)
        return Notebook(lab, page, name)

    yield open_it
    for context in contexts:
        context.close()
