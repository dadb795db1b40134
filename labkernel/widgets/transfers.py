"""How pulls and pushes show: a line for each layer, redrawn in a terminal and in a cell; plain lines elsewhere."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..display import human_size

_EVERY_S = 0.25
_BAR = 30


class Layer(Protocol):
    """What is known of a layer on its way (`labkernel.imaging.pulls.LayerState`)."""

    id: str
    total: int
    status: str
    current: int


class Transfer:
    """Give it to `pull` or `push` as `watch`. `redraw` takes text and HTML; without it `line` takes lines."""

    def __init__(
        self, redraw: Callable[[str, str | None], None] | None, line: Callable[[str], None], *, quiet: bool = False
    ) -> None:
        self._redraw = redraw
        self._line = line
        self._quiet = quiet
        self._shown: dict[int, str] = {}
        self._drawn_at = 0.0
        self._last = ""

    def __call__(self, layers: Sequence[Layer]) -> None:
        if self._quiet:
            return
        if self._redraw is None:
            for number, layer in enumerate(layers):
                if self._shown.get(number) != layer.status:
                    self._shown[number] = layer.status
                    self._line(f"{layer.id}: {layer.status}")
            return
        final = all(layer.status not in ("Downloading", "Extracting", "Pushing", "Preparing") for layer in layers)
        now = time.monotonic()
        if not layers or (now - self._drawn_at < _EVERY_S and not final):
            return
        text = "\n".join(text_line(layer) for layer in layers)
        if text != self._last:
            self._last, self._drawn_at = text, now
            self._redraw(text, table(layers))


def text_line(layer: Layer) -> str:
    """`4f4fb700ef54: Downloading [====>    ]  3.1MB/29MB`."""
    if layer.status not in ("Downloading", "Pushing") or not layer.total:
        return f"{layer.id}: {layer.status}"
    filled = int(_BAR * layer.current / layer.total)
    bar = ("=" * filled + ">" * (filled < _BAR)).ljust(_BAR)
    return f"{layer.id}: {layer.status} [{bar}] {human_size(layer.current):>8}/{human_size(layer.total)}"


def table(layers: Sequence[Layer]) -> str:
    """The same as HTML: a row with a progress element for each layer."""
    rows = []
    for layer in layers:
        waiting = layer.status in ("Downloading", "Pushing", "Preparing", "Pulling fs layer")
        done = layer.current if waiting else layer.total
        label = html.escape(f"layer {layer.id}: {layer.status}")
        rows.append(
            f"<tr><td><code>{html.escape(layer.id)}</code></td><td>{html.escape(layer.status)}</td>"
            f'<td><progress value="{done}" max="{max(layer.total, 1)}" aria-label="{label}"></progress></td>'
            f'<td style="text-align:right">{human_size(layer.total)}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"
