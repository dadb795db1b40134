"""How many idle containers and idle virtual machines fit into a memory: a few are measured, the rest is a line.

Each count's memory is measured while that many run: of containers what their cgroups are charged with, without cgroups
and of machines the proportional set size of their processes, so that pages they share count once. The line is the one
of least squares; what lies beyond the measured counts is extrapolated and said to be.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..display import table_html, table_text, without_formulas
from ..errors import LabkernelError, UsageError
from ..metrics import dataframe, reader_for, state_of
from .program import INSIDE
from .words import about, machine_text, memory_text, ratio_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..imaging.image import Image
    from .laboratory import Laboratory

CONTAINERS, MACHINES = (1, 4, 8), (1, 2)
_READY_TIMEOUT_S = 180.0
_ONLY_MEMORY = "by memory alone: processes, namespaces and addresses have limits of their own"


@dataclass(frozen=True)
class Curve:
    """Memory over count: `points` are (instances, bytes) as measured."""

    family: str
    label: str
    plural: str
    points: list[tuple[int, int]]

    @property
    def line(self) -> tuple[float, float]:
        """(bytes of none, bytes of each more): least squares, through zero when only one count was measured."""
        count = len(self.points)
        if count == 1:
            return 0.0, self.points[0][1] / self.points[0][0]
        xs, ys = [float(n) for n, _ in self.points], [float(value) for _, value in self.points]
        middle_x, middle_y = sum(xs) / count, sum(ys) / count
        slope = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
        slope /= sum((x - middle_x) ** 2 for x in xs)
        # Less than nothing for each more would be noise: the mean then is the honest figure.
        slope = slope if slope > 0 else sum(ys) / sum(xs)
        return max(0.0, middle_y - slope * middle_x), slope

    def bytes_at(self, count: float) -> float:
        start, each = self.line
        return start + each * count

    def fitting(self, memory_bytes: int) -> int:
        """How many fit into so many bytes, along the line."""
        start, each = self.line
        return max(0, int((memory_bytes - start) / each))


@dataclass(frozen=True, repr=False)
class Density:
    """What was measured, and what follows for `memory_bytes`."""

    image: str
    memory_bytes: int
    curves: list[Curve]
    machine: str
    warnings: list[str]

    @property
    def memory_text(self) -> str:
        return memory_text(self.memory_bytes)

    def curve(self, family: str) -> Curve:
        return next(curve for curve in self.curves if curve.family == family)

    def caption(self) -> str:
        return f"how many idle instances of {self.image} fit into {self.memory_text}; {self.machine}"

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per curve: bytes of each more, how many fit, and how many were really run."""
        return [
            {
                "family": curve.family,
                "each_bytes": curve.line[1],
                "fitting": curve.fitting(self.memory_bytes),
                "measured_up_to": max(count for count, _ in curve.points),
            }
            for curve in self.curves
        ]

    def table(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        for curve in self.curves:
            measured = ", ".join(f"{count}: {memory_text(value)}" for count, value in curve.points)
            fits = f"{about(curve.fitting(self.memory_bytes))} (extrapolated)"
            lines.append((curve.label, measured, memory_text(curve.line[1]), fits))
        return lines

    def header(self) -> tuple[str, ...]:
        return ("", "measured", "each more", f"fit into {self.memory_text}")

    def verdict(self) -> str:
        """One sentence."""
        if len(self.curves) < 2:
            return ""
        ours, theirs = self.curve("container"), self.curve("vm")
        return f"an idle virtual machine takes {ratio_text(theirs.line[1] / ours.line[1])} the memory of a container"

    def text(self) -> str:
        lines = [self.caption(), table_text(self.header(), self.table()), self.verdict(), _ONLY_MEMORY]
        return "\n".join([*filter(None, lines), *(f"warning: {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        return self.text()

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        notes = "".join(
            f"<p><em>{html.escape(note)}</em></p>" for note in (self.verdict(), _ONLY_MEMORY, *self.warnings) if note
        )
        return table_html(self.header(), self.table(), caption=self.caption()) + notes

    def figure(self) -> Figure:
        """Memory over the number of instances, measured and extrapolated (matplotlib)."""
        from .plots import density_figure

        return density_figure(self)

    def to_png(self) -> bytes:
        from .figures import png

        return png(self.figure())

    def _ipython_display_(self) -> None:
        from .plots import show

        show(self, self.figure)

    def to_json(self) -> str:
        return json.dumps({"format": "labkernel.density/1", **asdict(self)}, separators=(",", ":"))

    def to_dataframe(self) -> Any:
        return dataframe(self.rows())


def density(
    lab: Laboratory,
    image: str,
    *,
    memory_bytes: int | None,
    containers: Sequence[int] = CONTAINERS,
    machines: Sequence[int] = MACHINES,
) -> Density:
    """Start idle containers and machines of `image`, as many as the counts say, and measure what all take together.

    `memory_bytes` defaults to this machine's memory. Machines that cannot run here are left out with a warning.
    """
    if any(count < 1 for count in (*containers, *machines)) or not containers:
        raise UsageError("counts are whole numbers from 1 on")
    warnings: list[str] = []
    with lab.instrumented(image) as (made, _name):
        driver = lab.containers.driver_name
        lab.say(f"starting {max(containers)} containers")
        curves = [Curve("container", f"container ({driver})", "containers", _containers(lab, made, containers))]
        if machines:
            lab.say(f"starting {max(machines)} virtual machines")
            try:
                points, accelerator = _machines(lab, made, machines)
                curves.append(Curve("vm", f"VM ({accelerator.upper()}, 256 MiB)", "VMs", points))
            except LabkernelError as err:
                warnings.append(f"no virtual machines: {err.brief}")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Density(image, memory_bytes or total, curves, machine_text(), warnings)


def _containers(lab: Laboratory, image: Image, counts: Sequence[int]) -> list[tuple[int, int]]:
    running: list[tuple[Any, Any]] = []
    points = []
    try:
        for count in sorted(counts):
            while len(running) < count:
                settings: dict[str, Any] = {"network_mode": "none", "entrypoint": [INSIDE], "user": "0"}
                settings |= {"tied": True, "kept": False}
                container, attachment = lab.containers.run_attached(image.id, ["idle"], **settings)
                running.append((container, attachment))
                for _stream, data in attachment:
                    if b"ready" in data:
                        break
            points.append((count, sum(_charged(container) for container, _ in running)))
    finally:
        for container, attachment in running:
            attachment.close()
            container.remove(force=True)
    return points


def _charged(container: Any) -> int:
    reader = reader_for(container)
    if reader is None:
        return 0
    try:
        sample = reader.read()
        if sample is None:
            return 0
        charged = sample.memory_usage_bytes or sample.memory_bytes
        if reader.source != "process tree":
            return charged
        # What proot's tracer shares cannot be told (it is closed to its own user): then all of it counts.
        state = state_of(container) or {}
        shares = [_proportional(pid) for pid in _tree(int(state.get("pid") or 0))]
        return sum(shares) if shares and all(shares) else charged
    finally:
        reader.close()


def _tree(pid: int) -> list[int]:
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def _machines(lab: Laboratory, image: Image, counts: Sequence[int]) -> tuple[list[tuple[int, int]], str]:
    running: list[Any] = []
    points = []
    with ThreadPoolExecutor(max_workers=max(counts)) as pool:
        try:
            for count in sorted(counts):
                while len(running) < count:
                    running.append(_start_machine(lab, image, pool))
                points.append((count, sum(_proportional(vm.pid) for vm in running)))
            accelerator = str(running[0].accelerator)
        finally:
            for vm in running:
                with contextlib.suppress(LabkernelError):  # it has ended by itself
                    vm.kill()
    return points, accelerator


def _start_machine(lab: Laboratory, image: Image, pool: ThreadPoolExecutor) -> Any:
    """A machine whose idle program runs; its `vms.run` waits in a thread of the pool until it is killed."""
    started: list[Any] = []
    ready, ended = threading.Event(), threading.Event()

    def output(_stream: str, data: bytes) -> None:
        if b"ready" in data:
            ready.set()

    def run() -> None:
        try:
            options: dict[str, Any] = {"entrypoint": [INSIDE], "user": "0", "on_start": started.append}
            lab.vms.run(image, ["idle"], on_output=output, **options)
        finally:
            ended.set()
            ready.set()

    future: Future[None] = pool.submit(run)
    if not ready.wait(_READY_TIMEOUT_S) or ended.is_set():
        if started and not ended.is_set():
            started[-1].kill()
        future.result(timeout=_READY_TIMEOUT_S)
        raise LabkernelError("the virtual machine ended before it was measured")
    return started[-1]


def _proportional(pid: int | None) -> int:
    """Proportional set size in bytes: a page that n processes share counts 1/n (proc(5), smaps_rollup); 0 where it may
    not be read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as stream:
            for line in stream:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
