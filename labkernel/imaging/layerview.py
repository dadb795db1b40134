"""What is in an image, layer by layer: added, changed, removed, and bytes that are carried along and never seen.

`explore` asks the worker (oci/layerscan.py) and returns `Layers`, which shows itself: text in a terminal, and in a
notebook HTML of nested `<details>` that needs neither script nor kernel, so a saved notebook keeps working.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..display import human_size, table_text, without_formulas
from ..errors import UsageError

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

_SHOWN = 400  # changes of one layer in HTML, and lines of one layer in text
_MARKS = {"added": "+", "changed": "~", "removed": "-"}
_COLOURS = {
    "added": "var(--jp-success-color1, #2e7d32)",
    "changed": "var(--jp-warn-color1, #b45309)",
    "removed": "var(--jp-error-color1, #c62828)",
}
_MUTED = "color:var(--jp-ui-font-color2, #666)"
_MONO = "font-family:var(--jp-code-font-family, monospace)"


@dataclass(frozen=True)
class Change:
    """A path of a layer. `kind` is `f d l c b p`; `before_bytes` what was there before (of a whole tree: its sum)."""

    path: str
    change: str
    kind: str
    size_bytes: int
    before_bytes: int

    @property
    def text(self) -> str:
        size = self.before_bytes if self.change == "removed" else self.size_bytes
        shown = human_size(size) if self.kind == "f" or size else ""
        return f"{_MARKS[self.change]} {shown:>9}  {self.path}{'/' if self.kind == 'd' else ''}"


@dataclass(frozen=True)
class LayerView:
    """One layer, bottom is number 1. `wasted_bytes` of its files are hidden by layers above."""

    number: int
    diff_id: str
    created_by: str
    size_bytes: int
    wasted_bytes: int
    added: int
    changed: int
    removed: int
    changes: list[Change] = field(repr=False)

    @property
    def left_out(self) -> int:
        """Changes that are counted and not listed."""
        return self.added + self.changed + self.removed - len(self.changes)


@dataclass(frozen=True, repr=False)
class Layers:
    """The layers of an image. `wasted` names the paths that waste most: [(path, bytes)]."""

    name: str
    layers: list[LayerView]
    size_bytes: int
    wasted: list[tuple[str, int]]

    @property
    def wasted_bytes(self) -> int:
        return sum(layer.wasted_bytes for layer in self.layers)

    @property
    def efficiency(self) -> float:
        """Part of the stored bytes that is visible in the end, 1.0 for an image without waste."""
        stored = sum(layer.size_bytes for layer in self.layers)
        return 1.0 if not stored else (stored - self.wasted_bytes) / stored

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "wasted_bytes": self.wasted_bytes, "efficiency": self.efficiency}

    # -- text --------------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """Every layer with what it did: what a terminal prints."""
        parts = [self._heading()]
        for layer in self.layers:
            parts.append("")
            parts.append(f"{layer.number}  {layer.diff_id[7:19]}  {_short(layer.created_by)}")
            parts.append(f"   {_summary(layer)}")
            parts += [f"   {change.text}" for change in layer.changes[:_SHOWN]]
            more = len(layer.changes) - _SHOWN + layer.left_out if len(layer.changes) > _SHOWN else layer.left_out
            parts += [f"   … and {more} more"] if more else []
        if self.wasted:
            parts += ["", "wasted: stored, and hidden by a later layer"]
            parts += [f"  {human_size(size):>9}  {path}" for path, size in self.wasted[:10]]
        return "\n".join(parts)

    def __repr__(self) -> str:
        rows = [
            [
                str(layer.number),
                _short(layer.created_by, 60),
                human_size(layer.size_bytes),
                human_size(layer.wasted_bytes) if layer.wasted_bytes else "",
                f"+{layer.added} ~{layer.changed} -{layer.removed}",
            ]
            for layer in self.layers
        ]
        return f"{self._heading()}\n{table_text(['LAYER', 'STEP', 'SIZE', 'WASTED', 'FILES'], rows)}"

    def _heading(self) -> str:
        waste = f"{human_size(self.wasted_bytes)} wasted" if self.wasted_bytes else "nothing wasted"
        count = f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}"
        return (
            f"{self.name}: {count}, {human_size(self.size_bytes)} visible, {waste} (efficiency {self.efficiency:.0%})"
        )

    # -- HTML --------------------------------------------------------------------------------------------------

    @without_formulas
    def _repr_html_(self) -> str:
        largest = max((layer.size_bytes for layer in self.layers), default=0) or 1
        rows = "".join(_layer_html(layer, largest) for layer in self.layers)
        wasted = "".join(
            f"<div style='{_MONO}'>{html.escape(human_size(size)):>9} {html.escape(path)}</div>"
            for path, size in self.wasted[:20]
        )
        waste = (
            f"<details style='margin-top:6px'><summary style='cursor:pointer'>wasted: stored, and hidden by a later "
            f"layer</summary><div style='margin-left:18px'>{wasted}</div></details>"
            if wasted
            else ""
        )
        legend = " &nbsp; ".join(
            f"<span style='color:{_COLOURS[word]};white-space:nowrap'><b>{mark}</b> {word}</span>"
            for word, mark in _MARKS.items()
        )
        return (
            f"<div class='labkernel-layers'><div><b>{html.escape(self._heading())}</b></div>"
            f"<div style='{_MUTED};margin-bottom:4px'>from the base up: each layer opens &nbsp; {legend}</div>"
            f"{rows}{waste}</div>"
        )


def explore(images: Images, name: str) -> Layers:
    """What each layer of the local image `name` does. Unpacks what is missing. Raises NoSuchImage, UsageError."""
    image = images.get(name)
    paths = _directories(images, image)
    found = images.runtime.task("labkernel.oci.layerscan:scan_layers", directories=paths)
    steps = [entry for entry in image.raw_config.get("history") or [] if not entry.get("empty_layer")]
    views = []
    for index, (layer, one) in enumerate(zip(image.layers, found["layers"], strict=True)):
        step = steps[index].get("created_by") or "" if index < len(steps) else ""
        changes = [Change(*entry) for entry in one.pop("entries")]
        views.append(LayerView(number=index + 1, diff_id=layer.diff_id, created_by=step, changes=changes, **one))
    title = image.tags[0] if image.tags else image.short_id
    return Layers(title, views, found["size_bytes"], [(path, size) for path, size in found["wasted"]])


def differences(images: Images, first: str, second: str) -> list[Change]:
    """How the file system of the image `second` differs from that of `first`, by path."""
    sides = [_directories(images, images.get(name)) for name in (first, second)]
    found = images.runtime.task("labkernel.oci.layerscan:compare_trees", first=sides[0], second=sides[1])
    return [Change(*entry) for entry in found["entries"]]


def _directories(images: Images, image: Image) -> list[str]:
    """Directories of all layers, bottom first; one that occurs twice is there twice."""
    if image.uses_host:
        raise UsageError(
            "its lowest layer is this machine's own file system, which is not walked",
            resolution="an image on lab/busybox or lab/debian can be explored",
        )
    images.layer_dirs(image)
    return [str(images.layer_path(layer)) for layer in image.layers]


def _short(text: str, length: int = 100) -> str:
    line = text.removesuffix(" # labkernel").replace("RUN /bin/sh -c ", "RUN ", 1).split("\n")[0]
    return line if len(line) <= length else line[: length - 1] + "…"


def _summary(layer: LayerView) -> str:
    counts = [f"{getattr(layer, word)} {word}" for word in _MARKS if getattr(layer, word)]
    waste = [f"{human_size(layer.wasted_bytes)} of it hidden above"] if layer.wasted_bytes else []
    return ", ".join([human_size(layer.size_bytes), *counts, *waste])


def _layer_html(layer: LayerView, largest: int) -> str:
    width = max(1.0, 100 * layer.size_bytes / largest)
    hidden = 100 * layer.wasted_bytes / layer.size_bytes if layer.size_bytes else 0
    bar = (
        f"<span style='flex:0 0 90px;margin-right:8px'><span style='display:inline-block;height:9px;"
        f"width:{width:.0f}%;background:linear-gradient(to right, {_COLOURS['removed']} {hidden:.0f}%, "
        f"var(--jp-brand-color1, #1976d2) {hidden:.0f}%)' title='{html.escape(_summary(layer))}'></span></span>"
    )
    counts = " ".join(
        f"<span style='color:{_COLOURS[word]}'>{mark}{getattr(layer, word)}</span>"
        for word, mark in _MARKS.items()
        if getattr(layer, word)
    )
    waste = f", {human_size(layer.wasted_bytes)} wasted" if layer.wasted_bytes else ""
    shown = layer.changes[:_SHOWN]
    left = len(layer.changes) - len(shown) + layer.left_out
    more = f"<div style='{_MUTED}'>… and {left} more</div>" if left else ""
    step = html.escape(_short(layer.created_by, 72) or "(base)")
    return (
        # In a narrow window the words wrap beside their bar, not under it.
        f"<details><summary style='cursor:pointer'><span style='display:inline-flex;width:calc(100% - 20px);"
        f"vertical-align:top'>{bar}<span style='min-width:0'>"
        f"<code title='{html.escape(layer.created_by)}'>{step}</code>"
        f" &nbsp;<span style='{_MUTED};white-space:nowrap'>{human_size(layer.size_bytes)}{waste}</span> &nbsp;{counts}"
        "</span></span></summary>"
        f"<div style='margin:2px 0 6px 112px'><div style='{_MUTED};{_MONO}'>{html.escape(layer.diff_id[:19])}</div>"
        f"{_tree_html(shown)}{more}</div></details>"
    )


def _tree_html(changes: Sequence[Change]) -> str:
    """Changes as a tree of folders: small ones are open."""
    tree: dict[str, Any] = {}
    for change in changes:
        *parents, name = change.path.strip("/").split("/")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        place.setdefault(name, {})[""] = change
    return _branch_html(tree, unfolded=len(changes) <= 40)


def _branch_html(tree: dict[str, Any], *, unfolded: bool) -> str:
    parts = []
    for name, below in sorted((name, below) for name, below in tree.items() if name):
        change: Change | None = below.get("")
        label = html.escape(name)
        while change is None and len(below) == 1:  # usr/share/doc: folders with one thing in them take one line
            (inner, below), change = next(iter(below.items())), None
            change, label = below.get(""), f"{label}/{html.escape(inner)}"
        inside = _branch_html(below, unfolded=unfolded) if any(below_name for below_name in below) else ""
        line = _line_html(change, label) if change else f"<span style='{_MONO}'>{label}/</span>"
        if inside:
            state = " open" if unfolded else ""
            total = sum(found.size_bytes for found in _all(below))
            note = f" <span style='{_MUTED}'>{human_size(total)}</span>" if total else ""
            parts.append(
                f"<details{state}><summary style='cursor:pointer'>{line}{note}</summary>"
                f"<div style='margin-left:18px'>{inside}</div></details>"
            )
        else:
            parts.append(f"<div style='margin-left:14px'>{line}</div>")
    return "".join(parts)


def _all(tree: dict[str, Any]) -> list[Change]:
    return [found for name, below in tree.items() for found in ([below] if not name else _all(below))]


def _line_html(change: Change, label: str) -> str:
    size = change.before_bytes if change.change == "removed" else change.size_bytes
    note = f" <span style='{_MUTED}'>{human_size(size)}</span>" if size else ""
    slash = "/" if change.kind == "d" else ""
    return (
        f"<span style='{_MONO};color:{_COLOURS[change.change]}' title='{change.change}'><b>{_MARKS[change.change]}</b> "
        f"{label}{slash}</span>{note}"
    )
