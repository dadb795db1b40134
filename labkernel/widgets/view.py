"""The anywidget classes: a JavaScript module and a style sheet each. Imported only when something is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

_HERE = Path(__file__).parent


class MonitorView(anywidget.AnyWidget):  # type: ignore[misc, unused-ignore]
    """What `monitor.js` draws. Figures arrive as custom messages and are no part of the widget's state."""

    _esm: Any = _HERE / "monitor.js"
    _css: Any = _HERE / "monitor.css"
    window_s = traitlets.Float(60.0).tag(sync=True)
