"""The anywidget classes: a JavaScript module and a style sheet each. Imported only when something is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

_HERE = Path(__file__).parent


def answer_while_busy(view: Any) -> None:
    """Have the widget's messages handled while a cell runs, as the browser asks for (in a subshell of the kernel).

    ipykernel 7.4 remembers for each comm where it last published from, which is the busy main shell, and sends what
    comes from the browser there (kernelbase.py, `shell_channel_thread_main`): its buttons were dead until that ends.
    """
    comm: Any = getattr(view, "comm", None)
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, asked: asked


def live(key: str) -> dict[str, Any]:
    """Metadata of an output that shows a view with this `key`: when the notebook is saved, our JupyterLab extension
    puts the view's last picture in its place (extension/src/pictures.ts)."""
    return {"labkernel": {"live": key}}


class MonitorView(anywidget.AnyWidget):  # type: ignore[misc, unused-ignore]
    """What `monitor.js` draws. Figures arrive as custom messages and are no part of the widget's state."""

    _esm: Any = _HERE / "monitor.js"
    _css: Any = _HERE / "monitor.css"
    key = traitlets.Unicode().tag(sync=True)
    window_s = traitlets.Float(60.0).tag(sync=True)


class DashboardView(anywidget.AnyWidget):  # type: ignore[misc, unused-ignore]
    """What `dashboard.js` draws. The board arrives as custom messages."""

    _esm: Any = _HERE / "dashboard.js"
    _css: Any = _HERE / "dashboard.css"
    key = traitlets.Unicode().tag(sync=True)
    titles = traitlets.Dict().tag(sync=True)
