"""The layer explorer in a real JupyterLab: it opens without a kernel, and reads well in light and dark."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BUILD = """%load_ext labkernel
dockerfile = '''FROM lab/busybox
RUN mkdir -p /data/deep && head -c 3000000 /dev/urandom > /data/big && echo gone > /data/gone
COPY <<END /app/main.py
print("hello")
END
RUN head -c 100 /dev/zero > /data/big && rm /data/gone && chmod 700 /data/deep
'''
image = lab.builds.build(dockerfile, tags=["explored"]).image"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_layers_open_without_a_kernel(open_notebook: Any, expect: Any, theme: str) -> None:
    name = f"layers-{theme.split()[1].lower()}"
    notebook = open_notebook(f"{name}.ipynb", BUILD, 'lab.layers("explored")', "%container image layers explored")
    page = notebook.page
    notebook.theme(theme)
    notebook.run_all()
    page.wait_for_function("() => document.querySelectorAll('.labkernel-layers').length === 2", timeout=120_000)
    explorer = page.locator(".labkernel-layers").first
    expect(explorer).to_contain_text("wasted", timeout=60_000)
    layers = explorer.locator(":scope > details")
    for index in (1, 3):
        layers.nth(index).locator("summary").first.click()
    expect(explorer.get_by_text("big").first).to_be_visible(timeout=60_000)
    page.evaluate("() => document.querySelector('.labkernel-layers').scrollIntoView({ block: 'start' })")
    where = os.environ.get("LABKERNEL_SCREENSHOTS")
    if where:
        Path(where).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(where) / f"{name}.png"))
    # What was saved is enough: no script, no kernel, no JupyterLab.
    saved = "".join(notebook.save()["cells"][1]["outputs"][0]["data"]["text/html"])
    alone = page.context.new_page()
    alone.set_content(saved)
    expect(alone.get_by_text("main.py", exact=False).last).to_be_hidden(timeout=60_000)
    alone.locator(".labkernel-layers > details").nth(2).locator("summary").first.click()
    expect(alone.get_by_text("+ main.py")).to_be_visible(timeout=60_000)
    alone.close()
