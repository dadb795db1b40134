"""What a comparison of one command came out as: `Run`, and `Comparison` with its table, figure, DataFrame and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..display import table_html, table_text, without_formulas
from ..errors import UsageError
from ..metrics import dataframe
from .words import disk_text, memory_text, ratio_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .measurements import Measurements

Kind = Literal["container", "vm"]
KINDS: tuple[Kind, Kind] = ("container", "vm")
FORMAT = "labkernel.comparison/1"
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("time to first instruction", "first_instruction_s", seconds_text),
    ("wall time", "wall_s", seconds_text),
    ("CPU time", "cpu_s", seconds_text),
    ("peak memory", "peak_memory_bytes", memory_text),
    ("disk used", "disk_bytes", disk_text),
)

# What the experiments of `compare --workload` call them.
_MEASURED = {
    "start": "first_instruction_s",
    "wall": "wall_s",
    "cpu_time": "cpu_s",
    "peak": "peak_memory_bytes",
    "disk": "disk_bytes",
}


@dataclass
class Run:
    """One run of the command. Seconds count from the moment the run was asked for (image and kernel were ready)."""

    kind: Kind
    number: int
    exit_code: int
    first_instruction_s: float | None
    wall_s: float
    cpu_s: float | None
    peak_memory_bytes: int | None
    disk_bytes: int | None = None
    output: str = ""
    """The end of stdout and stderr, at most 4 KiB."""
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds, CPU µs, memory bytes)"""
    memory_source: str = ""
    """`rusage`: without a cgroup, `peak_memory_bytes` is that of the largest single process"""


@dataclass
class Comparison:
    """What came out. `runs` are in the order in which they ran; medians are over those of one kind."""

    image: str
    command: list[str]
    runs: list[Run]
    accelerator: str
    """`kvm` or `tcg`"""
    kernels: dict[str, str]
    """`uname -r` as the command sees it, by kind"""
    memory_bytes: int | None = None
    cpus: float | None = None
    vm_memory_bytes: int | None = None
    start: str = ""
    """how the VM came up: `cold` or `template`"""
    driver: str = ""
    machine: str = ""
    measured_at: str = ""
    warnings: list[str] = field(default_factory=list)
    no_vm: str = ""
    """why the container was measured alone: what is missing for a virtual machine, and how to get it"""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What was measured."""
        return KINDS[:1] if self.no_vm else KINDS

    def of(self, kind: Kind) -> list[Run]:
        return [run for run in self.runs if run.kind == kind]

    def values(self, kind: Kind, figure: str) -> list[float]:
        """All values of one figure (a field of `Run`), unknown ones left out."""
        found = [getattr(run, figure) for run in self.of(kind)]
        return [float(value) for value in found if value is not None]

    def median(self, kind: Kind, figure: str) -> float | None:
        values = self.values(kind, figure)
        return statistics.median(values) if values else None

    def ratio(self, figure: str) -> float | None:
        """VM / container, of the medians; None when one is unknown or zero."""
        ours, theirs = self.median("container", figure), self.median("vm", figure)
        return theirs / ours if ours and theirs is not None else None

    def by_rusage(self, kind: Kind) -> bool:
        """Whether peak memory is that of the largest single process, for want of a cgroup."""
        return any(run.memory_source == "rusage" for run in self.of(kind))

    @property
    def vm_label(self) -> str:
        """`VM (QEMU, TCG)`: the name under which the VM stands in every table and figure."""
        return f"VM (QEMU, {self.accelerator.upper()})"

    @property
    def command_text(self) -> str:
        import shlex

        return shlex.join(self.command) if self.command else "(the image's own command)"

    # -- as a table

    def table(self) -> list[tuple[str, ...]]:
        """Rows of (figure, container, VM, VM / container), worded for people; without a VM (figure, container)."""
        rows: list[tuple[str, ...]] = [(label, *self._cells(figure, say)) for label, figure, say in FIGURES]
        if self.no_vm:
            rows.append(("kernel seen inside", f"{self.kernels.get('container', '?')} (the host's)", ""))
            rows.append(("exit status", self._codes("container"), ""))
            return [row[:2] for row in rows]
        own = "its own" if self.kernels.get("vm") != self.kernels.get("container") else "its own, same release"
        seen = self.kernels.get("container", "?"), self.kernels.get("vm", "?")
        rows.append(("kernel seen inside", f"{seen[0]} (the host's)", f"{seen[1]} ({own})", ""))
        rows.append(("accelerator", "none needed", self._accelerator_words(), ""))
        codes = [self._codes(kind) for kind in KINDS]
        rows.append(("exit status", codes[0], codes[1], "same" if codes[0] == codes[1] else "differs"))
        return rows

    def _codes(self, kind: Kind) -> str:
        return ", ".join(sorted({str(run.exit_code) for run in self.of(kind)}))

    def header(self) -> tuple[str, ...]:
        found = ("", f"container ({self.driver})" if self.driver else "container", self.vm_label, "VM / container")
        return found[:2] if self.no_vm else found

    def notes(self) -> list[str]:
        """What stands below the table: why something is missing, and warnings."""
        alone = [f"no virtual machine: {self.no_vm}"] if self.no_vm else []
        return [*alone, *(f"warning: {warning}" for warning in self.warnings)]

    def _accelerator_words(self) -> str:
        words = {"kvm": "KVM (hardware)", "tcg": "TCG (emulated in software)"}
        how = {"cold": ", cold boot", "template": ", restored from a template"}.get(self.start, "")
        return words.get(self.accelerator, self.accelerator) + how

    def _cells(self, figure: str, say: Callable[[float], str]) -> tuple[str, str, str]:
        cells = []
        for kind in KINDS:
            values = self.values(kind, figure)
            text = say(statistics.median(values)) if values else "not measured"
            if values and say(min(values)) != say(max(values)):
                text += f" ({say(min(values))} to {say(max(values))})"
            if values and figure == "peak_memory_bytes" and self.by_rusage(kind):
                text += " (largest process, with its set-up)"
            cells.append(text)
        ratio = self.ratio(figure)
        return cells[0], cells[1], "" if ratio is None else ratio_text(ratio)

    def conditions(self) -> str:
        """How often, under which limits and where it ran."""
        count = len(self.of("container"))
        each = "" if self.no_vm else " each"
        parts = [f"1 run{each}" if count == 1 else f"medians of {count} runs{each}"]
        if self.memory_bytes:
            parts.append(f"container limited to {memory_text(self.memory_bytes)}")
        if self.cpus:
            parts.append(f"{self.cpus:g} CPU")
        return "; ".join([*parts, self.machine] if self.machine else parts)

    def caption(self) -> str:
        """One line: what ran, and the conditions."""
        return f"{self.image}: {self.command_text}; {self.conditions()}"

    def text(self) -> str:
        """Caption, table and warnings, for a terminal."""
        lines = [self.caption(), table_text(self.header(), self.table())]
        return "\n".join([*lines, *self.notes()])

    def __repr__(self) -> str:
        return self.text()

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        words = ([f"No virtual machine: {self.no_vm}"] if self.no_vm else []) + self.warnings
        notes = "".join(f"<p><em>{html.escape(word)}</em></p>" for word in words)
        return table_html(self.header(), self.table(), caption=self.caption()) + notes

    # -- as a picture

    def figure(self) -> Figure:
        """CPU and memory over time, both curves, and the figures of the table side by side (matplotlib)."""
        from .figures import comparison_figure

        return comparison_figure(self)

    def to_png(self) -> bytes:
        from .figures import png

        return png(self.figure())

    def _ipython_display_(self) -> None:
        # Two outputs: an output shows only its richest form, and a picture inside the table's HTML would be removed by
        # the sanitizer of a notebook that is not trusted.
        from IPython.display import display

        from .figures import mimebundle

        try:
            bundle, metadata = mimebundle(self.figure(), f"figure: {self.caption()}")
            display(bundle, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]
        except UsageError as err:
            self.warnings.append(f"no figure: {err.brief}")
        display({"text/plain": self.text(), "text/html": self._repr_html_()}, raw=True)  # type: ignore[no-untyped-call]

    # -- as data

    def measurements(self) -> Measurements:
        """The same figures as `compare --rows` has them, which can stand beside those of another machine."""
        from .measurements import Measurements, Row

        labels = {"container": self.header()[1], "vm": self.vm_label}
        rows = [
            Row(kind, labels[kind], kind, {name: self.values(kind, figure) for name, figure in _MEASURED.items()})
            for kind in self.kinds
        ]
        count = len(self.of("container"))
        details: dict[str, Any] = {"machine": self.machine, "measured_at": self.measured_at}
        return Measurements(
            self.image, self.command, list(_MEASURED), rows, count, warnings=list(self.warnings), **details
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per run, numbers with their units in the names; samples and output left out."""
        rows = []
        for run in self.runs:
            row = asdict(run)
            del row["samples"], row["output"]
            rows.append({"image": self.image, "accelerator": self.accelerator if run.kind == "vm" else "", **row})
        return rows

    def to_dataframe(self) -> Any:
        """`rows()` as a pandas DataFrame. Raises UsageError without pandas."""
        return dataframe(self.rows())

    def to_json(self) -> str:
        """Everything, samples too, as one line of JSON that `from_json` reads back on any machine."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """A comparison that was saved with `to_json`. Raises UsageError for anything else."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            runs = data.pop("runs")
            made = cls(runs=[Run(**{**run, "samples": [tuple(s) for s in run["samples"]]}) for run in runs], **data)
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            hint = "it is written by `labkernel compare --json FILE` and by Comparison.to_json()"
            raise UsageError(f"not a saved comparison: {err}", resolution=hint) from err
        return made
