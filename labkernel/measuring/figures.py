"""Pictures that stay: the comparison of a container and a virtual machine, and the history a live widget leaves.

matplotlib is imported inside the functions, without pyplot (1.4 s, and a global state that a notebook's own plots
share) and with its Agg canvas, so no display is needed. Colours are Okabe and Ito's, which the colour-blind can tell
apart, and no curve is told from another by colour alone: line style and labels repeat it.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..metrics import Event, Series
    from .comparison import Comparison, Run

CONTAINER, MACHINE = "#0072B2", "#D55E00"
_TINT = {"container": "#c9e0f0", "vm": "#fbe9de"}  # opaque: one area over another must not become a third colour
PALETTE = (CONTAINER, MACHINE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
INK, MUTED, GRID, LIMIT = "#1b1f24", "#57606a", "#d8dee4", "#8c1d40"
_MIB = 1 << 20
_LIMIT_WORDS_SHARE = 0.15  # of the axis that the words above a limit's line take


def dress(axes: Axes, title: str = "", *, y_label: str = "", x_label: str = "") -> None:
    """Our look, set on the axes themselves: rcParams are global, and a live plot ends in a thread of its own."""
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.tick_params(colors=MUTED, labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    if title:
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_ylabel(y_label, color=INK, fontsize=9.5)
    axes.set_xlabel(x_label, color=INK, fontsize=9.5)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in our look. As the value of a cell it shows itself: a Figure of matplotlib's does so only where
    `%matplotlib inline` is active, which nothing here needs. Raises UsageError where matplotlib cannot be used."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as err:  # ValueError: MPLBACKEND names none that it knows
        hint = "`pip install matplotlib`; the figures are there without it (to_dataframe, to_csv, rows)"
        raise UsageError(
            "a picture needs matplotlib, which cannot be loaded here", details=str(err), resolution=hint
        ) from err

    class Picture(Figure):
        def _repr_mimebundle_(self, **_options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            return mimebundle(self, repr(self))

    figure = Picture(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, *, dpi: float = 160) -> bytes:
    """The figure as PNG bytes."""
    import io

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def mimebundle(figure: Figure, text: str, *, width: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, metadata) for IPython's display: a sharp PNG shown at `width` CSS pixels, and `text` where none can be."""
    import base64

    shown = width or round(figure.get_figwidth() * 96)
    data = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": text}
    return data, {"image/png": {"width": shown}}


# -- the comparison


def comparison_figure(comparison: Comparison) -> Figure:
    """CPU and memory over time with both curves, and each figure of the table on a scale where the container is 1."""
    figure = new_figure(11.0, 5.6)
    alone = bool(comparison.no_vm)
    grid = figure.add_gridspec(
        2, 1 if alone else 2, width_ratios=(1,) if alone else (1.75, 1), hspace=0.06, wspace=0.06
    )
    cpu = figure.add_subplot(grid[0, 0])
    memory = figure.add_subplot(grid[1, 0], sharex=cpu)
    _draw_cpu(cpu, comparison)
    _draw_memory(memory, comparison)
    if not alone:
        _draw_ratios(figure.add_subplot(grid[:, 1]), comparison)
    cpu.tick_params(labelbottom=False)
    longest = max((run.wall_s for run in comparison.runs), default=1.0)
    memory.set_xlim(0, longest * 1.03)
    headline(figure, f"{comparison.image}: {shortened(comparison.command_text, 80)}")
    footnote(figure, _conditions(comparison))
    return figure


def headline(figure: Figure, text: str) -> None:
    figure.suptitle(plain(text), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)


def footnote(figure: Figure, text: str) -> None:
    """Small lines below everything."""
    figure.supxlabel(plain(text), x=0.01, ha="left", fontsize=8, color=MUTED, linespacing=1.5)


def plain(text: str) -> str:
    """Text as it is: between two dollar signs matplotlib would read a formula, and shell commands are full of them."""
    return text.replace("$", r"\$")


def shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _conditions(comparison: Comparison) -> str:
    kernels = comparison.kernels
    if comparison.no_vm:
        inside = f"kernel seen inside: {kernels.get('container', '?')} (the host's)"
        return "\n".join((comparison.conditions(), f"no virtual machine: {comparison.no_vm}", inside))
    words = {"tcg": "TCG (processor emulated in software; KVM would be faster)", "kvm": "KVM"}
    how = {"cold": ", cold boot", "template": ", restored from a template"}.get(comparison.start, "")
    return "\n".join(
        (
            comparison.conditions(),
            f"accelerator of the VM: {words.get(comparison.accelerator, comparison.accelerator)}{how}",
            f"kernel seen inside: container {kernels.get('container', '?')} (the host's), "
            f"VM {kernels.get('vm', '?')} (its own)",
        )
    )


def _look(kind: str, comparison: Comparison) -> tuple[str, str, str]:
    """Colour, line style and label of one kind."""
    return (CONTAINER, "-", "container") if kind == "container" else (MACHINE, "--", comparison.vm_label)


def _typical(runs: Sequence[Run]) -> Run:
    """The run whose wall time is the (lower) median: the one drawn in full colour."""
    return sorted(runs, key=lambda run: run.wall_s)[(len(runs) - 1) // 2]


def cpu_steps(run: Run, *, bins: int = 48) -> tuple[list[float], list[float]]:
    """Edges (seconds) and percent of one core between them, from the CPU time used until each edge.

    The process of QEMU counts in clock ticks of 10 ms, so its bins are never narrower than 0.1 s. A run shorter
    than that is one step: its CPU time over its time.
    """
    begin = (run.first_instruction_s or 0.0) if run.kind == "container" else 0.0
    begin = min(begin, run.wall_s)
    total = run.samples[-1][1] if run.samples else 0
    if run.cpu_s is not None:
        total = max(total, round(run.cpu_s * 1e6))
    points = [(begin, 0.0), *((t, float(used)) for t, used, _ in run.samples if begin < t < run.wall_s)]
    points.append((max(run.wall_s, begin + 1e-6), float(total)))
    length = points[-1][0] - begin
    least = 0.04 if run.kind == "container" else 0.1
    count = max(1, min(bins, int(length / least)))
    edges = [begin + length * i / count for i in range(count + 1)]
    used = [_between(points, edge) for edge in edges]
    width = length / count
    return edges, [max(0.0, b - a) / width / 1e4 for a, b in itertools.pairwise(used)]


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def _draw_cpu(axes: Axes, comparison: Comparison) -> None:
    for kind in reversed(comparison.kinds):
        runs = comparison.of(kind)
        colour, style, label = _look(kind, comparison)
        for run in runs:
            edges, percents = cpu_steps(run)
            typical = run is _typical(runs)
            axes.stairs(
                percents,
                edges,
                color=colour,
                linestyle=style if typical else "-",
                linewidth=1.8 if typical else 0.6,
                alpha=1 if typical else 0.35,
                label=label if typical else None,
                zorder=2,
            )
            if typical:
                axes.stairs(percents, edges, color=_TINT[kind], fill=True, linewidth=0, zorder=1.2)
                if run.first_instruction_s is not None:
                    x = run.first_instruction_s
                    axes.plot([x], [0], marker="^", markersize=8, color=colour, clip_on=False, zorder=5, linestyle="")
    axes.plot([], [], marker="^", color=MUTED, linestyle="", label="first instruction of the command")
    axes.set_ylim(0, max(axes.get_ylim()[1], 110.0) * 1.02)
    if comparison.cpus:
        _limit(axes, comparison.cpus * 100, f"container's CPU limit: {comparison.cpus:g}")
    dress(axes, "CPU", y_label="% of one core")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] != "container", i))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        borderaxespad=0.1,
        handlelength=2.2,
    )


def _draw_memory(axes: Axes, comparison: Comparison) -> None:
    top = 0.0
    for kind in reversed(comparison.kinds):
        runs = comparison.of(kind)
        colour, style, _ = _look(kind, comparison)
        for run in runs:
            times, values = memory_curve(run)
            typical = run is _typical(runs)
            top = max([top, *values])
            width, alpha = (1.8, 1.0) if typical else (0.6, 0.35)
            axes.plot(times, values, color=colour, linestyle=style, linewidth=width, alpha=alpha)
            if typical:
                axes.fill_between(times, values, color=_TINT[kind], linewidth=0, zorder=1.2)
    if comparison.memory_bytes and comparison.memory_bytes / _MIB < 8 * top:
        limit = comparison.memory_bytes / _MIB
        _limit(axes, limit, f"container's memory limit: {limit:g} MiB")
        top = max(top, limit)
    axes.set_ylim(0, max(top, 1.0) * 1.12)
    measured = "largest process" if comparison.by_rusage("container") else "cgroup"
    title = f"Memory: the container's {measured}" + ("" if comparison.no_vm else ", the process of QEMU")
    dress(axes, title, y_label="MiB", x_label="seconds since the run was asked for")


def memory_curve(run: Run) -> tuple[list[float], list[float]]:
    """Seconds and MiB, from nothing to nothing; a run that ended between two samples is drawn at its peak."""
    begin = min((run.first_instruction_s or 0.0) if run.kind == "container" else 0.0, run.wall_s)
    points = [(t, memory / _MIB) for t, _, memory in run.samples if t <= run.wall_s]
    if len(points) < 2:
        points = [(t, (run.peak_memory_bytes or 0) / _MIB) for t in (begin, run.wall_s)]
    points = [(min(begin, points[0][0]), 0.0), *points, (run.wall_s, points[-1][1]), (run.wall_s, 0.0)]
    return [t for t, _ in points], [value for _, value in points]


def _limit(axes: Axes, y: float, text: str, *, crowded: bool = False) -> None:
    """A line and its words above it; `crowded`, with another line close above, in the line itself."""
    axes.axhline(y, color=LIMIT, linewidth=1.1, linestyle=(0, (6, 3)))
    axes.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 0 if crowded else 2.5),
        textcoords="offset points",
        ha="right",
        va="center" if crowded else "baseline",
        fontsize=8,
        color=LIMIT,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 1 if crowded else 0.65, "linewidth": 0},
    )


def _draw_ratios(axes: Axes, comparison: Comparison) -> None:
    from .comparison import FIGURES, KINDS
    from .words import ratio_text

    rows = [row for row in FIGURES if comparison.median("container", row[1]) and comparison.values("vm", row[1])]
    reach = [1.0]
    for place, (label, figure, say) in enumerate(reversed(rows)):
        ours, theirs = comparison.median("container", figure), comparison.median("vm", figure)
        assert ours is not None
        assert theirs is not None
        ratio = max(theirs / ours, 1e-6)
        spread = [
            [value / ours for value in comparison.values(kind, figure)]
            for kind in (KINDS if ratio >= 1 else reversed(KINDS))
        ]
        ends = min(spread[0]), max(spread[1])
        reach += ends
        axes.plot([1, ratio], [place, place], color=GRID, linewidth=3.5, solid_capstyle="round", zorder=1)
        for kind, centre, marker in zip(KINDS, (1.0, ratio), "oD", strict=True):
            colour = _look(kind, comparison)[0]
            values = [value / ours for value in comparison.values(kind, figure)]
            if len(values) > 1:
                axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1.6, zorder=2)
            axes.plot([centre], [place], marker=marker, color=colour, markersize=8, zorder=3)
        left, right = (ours, theirs) if ratio >= 1 else (theirs, ours)
        colours = (CONTAINER, MACHINE) if ratio >= 1 else (MACHINE, CONTAINER)
        _value(axes, ends[0], place, say(left), colours[0], side=-1)
        _value(axes, ends[1], place, say(right), colours[1], side=1)
        _text = f"{label}:  {ratio_text(theirs / ours)}"
        axes.annotate(
            _text, (0.01, place + 0.24), xycoords=("axes fraction", "data"), fontsize=9.5, fontweight="bold", color=INK
        )
    low, high = min(reach), max(reach)
    span = max(math.log10(high / low), 0.5)
    axes.set_xscale("log")
    dress(axes, f"{comparison.vm_label} / container", x_label="relative to the container (logarithmic)")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(low / 10 ** (span * 0.42), high * 10 ** (span * 0.42))
    axes.set_ylim(-0.45, len(rows) - 0.35)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.axvline(1, color=CONTAINER, linewidth=0.9, alpha=0.5, zorder=0)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}×")  # noqa: RUF001


def _value(axes: Axes, x: float, y: float, text: str, colour: str, *, side: int) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(8 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=9.5,
        color=colour,
    )


# -- the history of a live widget

_EVENT_ROWS, _EVENT_POINTS = 4, 9.5
_CPU_POINTS = 113.0  # the height of the CPU panel, about
_LETTER_SHARE = 0.0085  # the width of a letter, as a part of the axes' width
_TOGETHER_SHARE = 0.11  # of the axes' width, within which the same thing happening again is said once


_NAME_LENGTH = 24
_LEGEND_POINTS, _HEADLINE_POINTS = 6.2, 9.0  # width of a letter


def history_figure(series: Sequence[Series], *, title: str = "") -> Figure:
    """CPU, memory, throttling and processes over time, with limits as lines and start, stop and OOM marked."""
    throttled = any(s.limits.cpus for s in series) or any(_any_throttled(s) for s in series)
    panels = ["cpu", "memory", *(["throttled"] if throttled else []), "pids"]
    origin, end = _time_span(series)
    heights = [1.5 if name in ("cpu", "memory") else 0.7 for name in panels]
    longest = max((len(shortened(s.name, _NAME_LENGTH)) for s in series), default=0)
    columns = min(4 if longest <= 14 else 3 if longest <= 18 else 2, len(series))
    legend_rows = 0 if len(series) < 2 else math.ceil(len(series) / columns) - 1  # one fits beside the headline
    figure = new_figure(9.0, 0.9 + 1.05 * sum(heights) + 0.22 * legend_rows)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    grid[0][0].set_xlim(0, end - origin)
    for axes, name in zip([row[0] for row in grid], panels, strict=True):
        _draw_history(axes, series, name, origin, end - origin)
    grid[-1][0].set_xlabel("seconds", color=INK, fontsize=9.5)
    beside = columns * (longest + 6) * _LEGEND_POINTS if len(series) > 1 else 0  # how wide the legend is, in points
    room = int((9.0 * 72 - beside) / _HEADLINE_POINTS)
    headline(figure, shortened(title or ", ".join(s.name for s in series), max(room, 16)))
    if len(series) > 1:
        handles, labels = grid[0][0].get_legend_handles_labels()
        place: Any = {"loc": "outside upper right", "ncols": columns, "frameon": False, "labelcolor": INK}
        figure.legend(handles, labels, **place)
    if not any(s.samples for s in series):
        words = "nothing was measured: it did not run"
        grid[0][0].annotate(words, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=MUTED)
    return figure


def _time_span(series: Sequence[Series]) -> tuple[float, float]:
    """When the first and the last thing was measured or happened: what ended before it was read has an end only."""
    times = [sample.time_s for one in series if one.samples for sample in (one.samples[0], one.samples[-1])]
    times += [event.time_s for one in series for event in one.events]
    origin = min(times, default=0.0)
    return origin, max([*times, origin + 0.1]) if times else 1.0


def _dashes(index: int) -> str:
    """No two of the first 32 curves have both the same colour and the same dashes, as in monitor.js."""
    return ("-", "--", ":", "-.")[(index + index // len(PALETTE)) % 4]


def _any_throttled(series: Series) -> bool:
    return any((sample.throttled_usec or 0) > 0 for sample in series.samples)


_PANELS = {
    "cpu": ("CPU\n(% of one core)", 10.0),
    "memory": ("memory\n(MiB)", 1.0),
    "throttled": ("throttled\n(% of time)", 10.0),
    "pids": ("processes", 2.0),
}


def _draw_history(axes: Axes, series: Sequence[Series], name: str, origin: float, span: float) -> None:
    label, least = _PANELS[name]
    top = least
    for index, one in enumerate(series):
        colour = PALETTE[index % len(PALETTE)]
        times, values = _history_points(one, name, origin)
        top = max([top, *(v for v in values if v == v)])
        axes.plot(
            times,
            values,
            color=colour,
            linestyle=_dashes(index),
            linewidth=1.6,
            label=plain(shortened(one.name, _NAME_LENGTH)),
        )
        for event in one.events if name == "cpu" or len(series) == 1 else ():
            line = LIMIT if event.kind == "oom" else colour
            axes.axvline(event.time_s - origin, color=line, linewidth=0.9, linestyle=":", alpha=0.8)
    top = _draw_limits(axes, series, name, top)
    # The words of what happened have a band of their own above everything, also above a limit and its words.
    band = _name_events(axes, series, origin, span) * _EVENT_POINTS / _CPU_POINTS if name == "cpu" else 0.0
    axes.set_ylim(0, top * 1.15 / (1 - band))
    axes.locator_params(axis="y", nbins=3 if name in ("throttled", "pids") else 5, integer=True)
    dress(axes, y_label=label)


def _draw_limits(axes: Axes, series: Sequence[Series], name: str, top: float) -> float:
    """A line for each limit, with whose it is where not all have it; one far above the curves is only named. Gives what
    the axis has to reach."""
    holders: dict[float, list[str]] = {}
    for one in series:
        limit = {"cpu": (one.limits.cpus or 0) * 100, "memory": (one.limits.memory_bytes or 0) / _MIB}.get(name, 0.0)
        if limit:
            holders.setdefault(limit, []).append(one.name)
    far = 5 if len(series) > 1 else 8  # as monitor.js: a limit beyond that would flatten the curves
    above, drawn = [], []
    for limit, names in sorted(holders.items()):
        more = f" +{len(names) - 2}" if len(names) > 2 else ""
        whose = (
            ""
            if len(names) == len(series)
            else f"{', '.join(shortened(name, _NAME_LENGTH) for name in names[:2])}{more}: "
        )
        words = plain(f"{whose}limit {limit:g}{' MiB' if name == 'memory' else ' %'}")
        if limit < far * top:
            drawn.append((limit, words))
            top = max(top, limit)
        else:
            above.append(f"{words}, far above")
    for number, (limit, words) in enumerate(drawn):
        next_above = drawn[number + 1][0] if number + 1 < len(drawn) else math.inf
        _limit(axes, limit, words, crowded=next_above - limit < top * _LIMIT_WORDS_SHARE)
    place: Any = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 8, "color": LIMIT}
    if above:
        axes.annotate("\n".join(above), (0.995, 0.98), **place)
    return top


def _history_points(series: Series, name: str, origin: float) -> tuple[list[float], list[float]]:
    if name in ("cpu", "throttled"):
        pairs = series.cpu_percent() if name == "cpu" else series.throttled_percent()
        return [t - origin for t, _ in pairs], [value for _, value in pairs]
    times: list[float] = []
    values: list[float] = []
    for point in list(series.points):
        if point is None:
            times.append(times[-1] if times else 0.0)
            values.append(float("nan"))
        else:
            times.append(point.time_s - origin)
            values.append(point.memory_bytes / _MIB if name == "memory" else float(point.pids or 0))
    return times, values


def _name_events(axes: Axes, series: Sequence[Series], origin: float, span: float) -> int:
    """Write what happened, and to whom, along the upper edge: no two words over each other. Gives the number of lines
    that it takes; what finds no room keeps its vertical line only."""
    events = sorted((event, index) for index, one in enumerate(series) for event in one.events)
    taken: list[list[tuple[float, float]]] = []
    for group in _together(events, span * _TOGETHER_SHARE):
        (event, index), words = group[0], _group_words(group, series)
        x, width = (event.time_s - origin) / span, (len(words) + 2) * _LETTER_SHARE
        ahead = x + width < 1
        start, end = (x, x + width) if ahead else (x - width, x)
        row = next((i for i, row in enumerate(taken) if all(end <= a or b <= start for a, b in row)), len(taken))
        if row == _EVENT_ROWS:
            continue
        if row == len(taken):
            taken.append([])
        taken[row].append((start, end))
        of_many = len({place for _, place in group}) > 1
        axes.annotate(
            plain(words),
            (event.time_s - origin, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3 if ahead else -3, -1 - _EVENT_POINTS * row),
            textcoords="offset points",
            ha="left" if ahead else "right",
            va="top",
            fontsize=7.5,
            color=LIMIT if event.kind == "oom" else INK if of_many else PALETTE[index % len(PALETTE)],
            # the lines of other events end behind the words
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "alpha": 0.85, "linewidth": 0},
        )
    return len(taken)


def _together(events: Sequence[tuple[Event, int]], within_s: float) -> list[list[tuple[Event, int]]]:
    """The same thing happening again soon after is said once; each exec is another command."""
    groups: list[list[tuple[Event, int]]] = []
    for event, index in events:
        kinds = (g for g in reversed(groups) if g[0][0].kind == event.kind and event.kind != "exec")
        group = next(kinds, None)
        if group is not None and event.time_s - group[-1][0].time_s < within_s:
            group.append((event, index))
        else:
            groups.append([(event, index)])
    return groups


def _group_words(group: Sequence[tuple[Event, int]], series: Sequence[Series]) -> str:
    """What, how often and to whom where it is not all: as monitor.js words it."""
    event = group[0][0]
    whom = list(dict.fromkeys(index for _, index in group))
    times = f" ×{len(group)}" if len(group) > len(whom) else ""  # noqa: RUF001
    more = f" +{len(whom) - 2}" if len(whom) > 2 else ""
    who = "" if len(whom) == len(series) else ", ".join(shortened(series[i].name, 16) for i in whom[:2]) + more
    if event.kind == "exec":
        return f"{who} exec {shortened(event.text, 24)}".strip()
    text = f" ({event.text})" if event.kind == "stop" and event.text and len(group) == 1 else ""
    return f"{'OOM kill' if event.kind == 'oom' else event.kind}{text}{times} {who}".strip()
