"""What `compare --workload` found: values of each experiment in each row, as table, figure, JSON and DataFrame."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..display import table_html, table_text, without_formulas
from ..errors import UsageError
from ..metrics import dataframe
from .experiments import BY_NAME, Experiment
from .words import ratio_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "labkernel.measurements/1"
_MAD = 1.4826  # scales the median absolute deviation to a standard deviation, for normal errors


def outliers(values: Sequence[float]) -> list[bool]:
    """Which values lie more than 3.5 robust standard deviations (from the median absolute deviation) off the median.

    Source: Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993). Fewer than five values have none.
    """
    if len(values) < 5:
        return [False] * len(values)
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values) * _MAD
    return [spread > 0 and abs(value - middle) > 3.5 * spread for value in values]


@dataclass
class Row:
    """One way to run: `values` maps experiments to what was measured, in the order of the runs."""

    name: str
    label: str
    family: str
    values: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def median(self, experiment: str) -> float | None:
        found = self.values.get(experiment)
        return statistics.median(found) if found else None


@dataclass
class Measurements:
    """Rows and experiments. `left_out` says of each row that was asked for and could not run, why."""

    image: str
    command: list[str]
    experiments: list[str]
    rows: list[Row]
    runs: int
    machine: str = ""
    measured_at: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """The row of that name. Raises UsageError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise UsageError(f"no such row: {name}", resolution=f"it has {', '.join(row.name for row in self.rows)}")

    def median(self, row: str, experiment: str) -> float | None:
        return self.row(row).median(experiment)

    @property
    def measured(self) -> list[Experiment]:
        """The experiments for which any row has a value."""
        known = [BY_NAME[name] for name in self.experiments]
        return [one for one in known if any(row.values.get(one.name) for row in self.rows)]

    # -- as a table

    def header(self) -> tuple[str, ...]:
        return ("", *(row.label for row in self.rows))

    def table(self) -> list[tuple[str, ...]]:
        """One line per experiment: median (lowest to highest; * outliers) in each row."""
        return [(one.label, *(self._cell(row, one) for row in self.rows)) for one in self.measured]

    def _cell(self, row: Row, experiment: Experiment) -> str:
        values = row.values.get(experiment.name)
        if not values:
            return "-"
        say = experiment.say
        text = say(statistics.median(values))
        low, high = say(min(values)), say(max(values))
        if low != high:
            text += f" ({low} to {high})"
        count = sum(outliers(values))
        return text + (f" *{count}" if count else "")

    def caption(self) -> str:
        import shlex

        what = shlex.join(self.command) if self.command else "the measuring program"
        times = "1 run each" if self.runs == 1 else f"medians of {self.runs} runs in interleaved order"
        return "; ".join(filter(None, (f"{self.image}: {what}", f"{times} (lowest to highest)", self.machine)))

    def notes(self) -> list[str]:
        """What a reader must know: rows left out, outliers, warnings."""
        found = [f"{name}: left out: {why}" for name, why in self.left_out.items()]
        if any(any(outliers(values)) for row in self.rows for values in row.values.values()):
            found.append("*n: so many values are far from the others; they count, and medians bear them")
        if any(row.family == "vm" for row in self.rows) and "fsync" in self.experiments:
            found.append("fsync in a VM ends in its disk's file on this machine, which is thrown away and not synced")
        return [*found, *self.warnings]

    def text(self) -> str:
        return "\n".join([self.caption(), table_text(self.header(), self.table()), *self.notes()])

    def __repr__(self) -> str:
        return self.text()

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        notes = "".join(f"<p><em>{html.escape(note)}</em></p>" for note in self.notes())
        table = table_html(self.header(), self.table(), caption=self.caption())
        return f"<div style='overflow-x:auto'>{table}</div>{notes}"

    # -- as a picture

    def figure(self) -> Figure:
        """A panel per experiment, a line per row: every run as a dot, the median named (matplotlib)."""
        from .plots import measurements_figure

        return measurements_figure(self)

    def to_png(self) -> bytes:
        from .figures import png

        return png(self.figure())

    def _ipython_display_(self) -> None:
        from .plots import show

        show(self, self.figure)

    # -- as data

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per value: image, row, experiment, run (from 1), value, outlier."""
        return [
            {"image": self.image, "row": row.name, "experiment": name, "run": i, "value": value, "outlier": far}
            for row in self.rows
            for name, values in row.values.items()
            for i, (value, far) in enumerate(zip(values, outliers(values), strict=True), 1)
        ]

    def to_dataframe(self) -> Any:
        """`records()` as a pandas DataFrame. Raises UsageError without pandas."""
        return dataframe(self.records())

    def to_json(self) -> str:
        """Everything, as one line of JSON that `from_json` reads back on any machine."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Measurements:
        """What was saved with `to_json`. Raises UsageError for anything else."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            rows = [Row(**row) for row in data.pop("rows")]
            made = cls(rows=rows, **data)
            made.experiments = [name for name in made.experiments if name in BY_NAME]
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            hint = "they are written by `compare --json FILE` and by to_json()"
            raise UsageError(f"not saved measurements: {err}", resolution=hint) from err
        return made

    def beside(self, other: Measurements) -> Measurements:
        """Both in one table: the rows of `other` (another machine, another day) after ours, each named with its own
        machine. Experiments that only one of them has stay."""
        rows = [
            Row(f"{row.name}@{mark}", f"{row.label} @{mark}", row.family, row.values, row.notes)
            for mark, one in (("1", self), ("2", other))
            for row in one.rows
        ]
        names = [*self.experiments, *(name for name in other.experiments if name not in self.experiments)]
        where = f"@1: {self.machine}, {self.measured_at}; @2: {other.machine}, {other.measured_at}"
        warnings = list(dict.fromkeys([*self.warnings, *other.warnings]))
        return Measurements(self.image, self.command, names, rows, max(self.runs, other.runs), where, "", {}, warnings)

    def ratio(self, experiment: str, row: str, to: str) -> str:
        """How many times `row` is `to`, as a word (`12×`), or an empty one."""  # noqa: RUF002
        ours, theirs = self.median(row, experiment), self.median(to, experiment)
        return ratio_text(ours / theirs) if ours and theirs else ""
