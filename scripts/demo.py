"""`make demo`: execute the first notebooks on the real engine without a browser.

Prints what the comparison measured and writes each executed notebook as HTML, plots included. The store lies beside the
output and is kept, so that a second run shows cached builds; LABKERNEL_ROOT chooses another one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

import labkernel

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("00_preflight", "01_containers_and_vms")


def execute(name: str, out: Path, *, timeout_s: float) -> nbformat.NotebookNode:
    """Run one notebook from top to bottom in `notebooks/`; the executed copy goes to `out` even when a cell fails."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    started = time.monotonic()
    # A folder of its own: the notebook writes files, and its folder is the context of its builds.
    (work := out / "work").mkdir(exist_ok=True)
    # The pictures stay as images; a saved widget state would only reopen as widgets without a kernel.
    resources = {"metadata": {"path": str(work)}}
    client = NotebookClient(notebook, timeout=timeout_s, resources=resources, store_widget_state=False)
    try:
        client.execute()
    finally:
        # Without these the page would fetch scripts from elsewhere; it shows text, tables and pictures only.
        page = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", widget_renderer_url="")
        body, _ = page.from_notebook_node(notebook)
        (out / f"{name}.html").write_text(body)
        nbformat.write(notebook, out / f"{name}.ipynb")
    print(f"{name}: {time.monotonic() - started:.1f} s, written to {out / name}.html")
    return notebook


def shown_by(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    """The text a cell left: streams and the plain form of its values."""
    cell = next(cell for cell in notebook.cells if cell.get("id") == cell_id)
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    return "\n".join(text.rstrip() for text in texts if text.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=NOTEBOOKS / "out")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a cell may take")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LABKERNEL_ROOT", str(out / "store"))
    executed = None
    try:
        for name in NAMES:
            executed = execute(name, out, timeout_s=options.timeout)
    except CellExecutionError as err:
        print(f"demo: a cell failed\n{err}", file=sys.stderr)
        return 1
    finally:
        # Nothing of a demonstration goes on after it.
        labkernel.connect().runtime.shutdown(force=True)
    assert executed is not None
    print(shown_by(executed, "compare"))
    print(shown_by(executed, "exercise-check"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
