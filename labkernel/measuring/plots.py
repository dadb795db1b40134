"""Pictures of measurements and experiments (matplotlib, imported inside; look and colours are those of figures.py)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import figures as look
from .measurements import outliers
from .words import about, memory_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .density import Density
    from .experiments import Experiment
    from .measurements import Measurements, Row

# Okabe and Ito's colours, and a marker for each family: nothing is told by colour alone.
FAMILIES = {"bare": ("#555555", "s"), "container": (look.CONTAINER, "o"), "vm": (look.MACHINE, "D")}


def show(thing: Any, figure: Callable[[], Figure]) -> None:
    """Display the figure, then the table: two outputs, since an output shows only its richest form."""
    from IPython.display import display

    try:
        bundle, metadata = look.mimebundle(figure(), f"figure: {thing.caption()}")
        display(bundle, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]
        note = ""
    except UsageError as err:
        note = f"\nno figure: {err.brief}"
    display({"text/plain": thing.text() + note, "text/html": thing._repr_html_()}, raw=True)  # type: ignore[no-untyped-call]


def measurements_figure(found: Measurements) -> Figure:
    """A panel per experiment, a line per row: every run a dot, the median named; logarithmic where rows differ much."""
    shown = found.measured
    columns = min(3, len(shown)) or 1
    lines = -(-len(shown) // columns) or 1
    width = 11.5 if columns > 1 else 8.0
    height = lines * (0.62 + 0.24 * len(found.rows)) + 0.95
    figure = look.new_figure(width, height)
    grid = figure.subplots(lines, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(shown):
            axes.set_visible(False)
            continue
        _panel(axes, found, shown[index], named=index % columns == 0)
    look.headline(figure, f"{found.image}: {look.shortened(' '.join(found.command) or 'the measuring program', 80)}")
    times = "1 run each" if found.runs == 1 else f"{found.runs} runs each, interleaved; the large mark is the median"
    foot = [f"{times}; hollow marks are outliers; less is better unless said; log: a logarithmic axis", found.machine]
    look.footnote(figure, "\n".join(foot))
    return figure


_FEW_DECADES = 1.2  # with fewer powers of ten than this on an axis, 2 and 5 are named, too


def _panel(axes: Axes, found: Measurements, experiment: Experiment, *, named: bool) -> None:
    medians = [row.median(experiment.name) for row in found.rows]
    known = [value for row in found.rows for value in row.values.get(experiment.name, ()) if value > 0]
    wide = bool(known) and max(known) / min(known) > 8
    if wide:
        axes.set_xscale("log")
    low, high = min(known), max(known)
    span = math.log10(high / low)
    for place, (row, middle) in enumerate(zip(found.rows, medians, strict=True)):
        _line(axes, row, experiment, middle, len(found.rows) - 1 - place)
    # Room at the right for the words.
    if wide:
        axes.set_xlim(low / 10 ** (span * 0.08), high * 10 ** (span * 0.5))
    else:
        axes.set_xlim(0, high * 1.5)
    axes.set_ylim(-0.7, len(found.rows) - 0.3)
    look.dress(axes, experiment.label)
    better = "more is better" if experiment.more_is_better else ""
    words = ", ".join(filter(None, (better, "log" if wide else "")))
    axes.set_title(words, loc="right", fontsize=7.5, color=look.MUTED)
    axes.grid(visible=False, axis="y")
    labels = [row.label for row in reversed(found.rows)] if named else []
    axes.set_yticks(range(len(found.rows)), labels if named else [""] * len(found.rows), color=look.INK, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    if wide and experiment.say is memory_text:  # round in binary: 1 MiB, 16 MiB, 256 MiB
        powers = range(int(math.log(low, 16)) - 1, int(math.log(high, 16)) + 3)
        axes.set_xticks([16.0**power for power in powers])
        axes.set_xticks([], minor=True)
        axes.set_xlim(low / 10 ** (span * 0.08), high * 10 ** (span * 0.5))
    elif wide and span < _FEW_DECADES:
        axes.xaxis.set_major_locator(_one_two_five())
    axes.xaxis.set_major_formatter(lambda value, _position: _tick(experiment.say(value)) if value > 0 else "0")
    axes.xaxis.set_minor_formatter(lambda _value, _position: "")
    if not wide and experiment.say is memory_text:
        step = 2.0 ** math.ceil(math.log2(high * 1.5 / 4))
        axes.set_xticks([step * place for place in range(int(high * 1.5 / step) + 1)])
    elif not wide:
        axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=7.5)


def _one_two_five() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0), numticks=20)


def _tick(text: str) -> str:
    """`0.10 s` as `0.1 s`, `100.0 s` as `100 s`."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _line(axes: Axes, row: Row, experiment: Experiment, middle: float | None, place: int) -> None:
    colour, marker = FAMILIES.get(row.family, FAMILIES["container"])
    if middle is None:
        axes.annotate("not told", (0.02, place), xycoords=("axes fraction", "data"), fontsize=8, color=look.MUTED,
                      va="center")  # fmt: skip
        return
    values = row.values[experiment.name]
    for value, far in zip(values, outliers(values), strict=True):
        face = "none" if far else colour
        axes.plot([value], [place], "o", markersize=4, markerfacecolor=face, markeredgecolor=colour, alpha=0.55)
    if len(values) > 1:
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1.2, alpha=0.6)
    axes.plot([middle], [place], marker, markersize=7, color=colour, zorder=3)
    axes.annotate(
        experiment.say(statistics.median(values)),
        (max(values), place),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=colour,
    )


def density_figure(found: Density) -> Figure:
    """Memory over the number of idle instances: measured dots, the line through them, and where it meets the memory."""
    figure = look.new_figure(9.5, 4.9)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    mib = 1 << 20
    most = max(curve.fitting(found.memory_bytes) for curve in found.curves)
    least = min(value for curve in found.curves for _, value in curve.points) / mib
    for curve in found.curves:
        colour, marker = FAMILIES[curve.family]
        counts = [count for count, _ in curve.points]
        fits = max(curve.fitting(found.memory_bytes), 1)
        steps = [max(counts) * (fits / max(counts)) ** (i / 60) for i in range(61)]
        axes.plot(steps, [curve.bytes_at(n) / mib for n in steps], color=colour, linestyle=(0, (5, 3)), linewidth=1.4)
        line = [min(counts), max(counts)]
        axes.plot(line, [curve.bytes_at(n) / mib for n in line], color=colour, linewidth=2)
        axes.plot(counts, [value / mib for _, value in curve.points], marker, color=colour, markersize=7,
                  label=f"{curve.label}: measured with up to {max(counts)}")  # fmt: skip
        axes.plot([fits], [found.memory_bytes / mib], marker, color=colour, markersize=9, markerfacecolor="white",
                  markeredgewidth=2, zorder=4)  # fmt: skip
        words = f"{about(fits)} {curve.plural}"
        axes.annotate(words, (fits, found.memory_bytes / mib), xytext=(0, 9), textcoords="offset points",
                      ha="right" if fits > 50 else "center", fontsize=11, fontweight="bold", color=colour)  # fmt: skip
    axes.axhline(found.memory_bytes / mib, color=look.LIMIT, linewidth=1.1, linestyle=(0, (6, 3)))
    axes.annotate(f"memory: {found.memory_text}", (0.005, found.memory_bytes / mib),
                  xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", fontsize=9,
                  color=look.LIMIT)  # fmt: skip
    axes.plot([], [], color=look.MUTED, linestyle=(0, (5, 3)), label="extrapolated, not measured")
    look.dress(axes, y_label="memory of all, MiB", x_label="idle instances")
    axes.set_xlim(0.8, most * 2)
    axes.set_ylim(least / 2, found.memory_bytes / mib * 4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _position: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=look.INK)
    look.headline(figure, "How many fit? Idle containers and idle virtual machines")
    look.footnote(figure, found.machine)
    return figure
