"""The same image and command as a container and as a virtual machine, measured side by side from outside.

`compare()` runs both, alternating when there are several runs, and gives a `Comparison`: a table, a figure, a
DataFrame, JSON. Nothing is inferred: kernel release and exit status are asked from inside, CPU and memory are read from
the container's cgroup (without one: the rusage of its first process) and from the process of QEMU. Every table and
figure names the accelerator, since what a VM costs under TCG (emulation) says little about KVM. Drawing is in
`figures.py`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .display import table_html, table_text
from .errors import StartError, UsageError
from .metrics import Sampler, Series, dataframe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .containers import Containers
    from .image import Image
    from .images import Images
    from .runtime.client import Attachment
    from .vms import VM, VMs

Kind = Literal["container", "vm"]
FORMAT = "labkernel.comparison/1"
SAMPLES_PER_SECOND = 50.0
VM_MEMORY_BYTES = 256 << 20
_OUTPUT_KEPT = 4096
_SHARED_SETTINGS = {"environment", "user", "working_dir", "entrypoint", "hostname", "read_only"}


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

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of (figure, container, VM, VM / container), worded for people."""
        rows = [(label, *self._cells(figure, say)) for label, figure, say in FIGURES]
        own = "its own" if self.kernels.get("vm") != self.kernels.get("container") else "its own, same release"
        seen = self.kernels.get("container", "?"), self.kernels.get("vm", "?")
        rows.append(("kernel seen inside", f"{seen[0]} (the host's)", f"{seen[1]} ({own})", ""))
        rows.append(("accelerator", "none needed", self._accelerator_words(), ""))
        codes = [", ".join(sorted({str(run.exit_code) for run in self.of(kind)})) for kind in ("container", "vm")]
        rows.append(("exit status", codes[0], codes[1], "same" if codes[0] == codes[1] else "differs"))
        return rows

    def header(self) -> tuple[str, str, str, str]:
        return ("", f"container ({self.driver})" if self.driver else "container", self.vm_label, "VM / container")

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
                text += " (largest process)"
            cells.append(text)
        ratio = self.ratio(figure)
        return cells[0], cells[1], "" if ratio is None else ratio_text(ratio)

    def conditions(self) -> str:
        """How often, under which limits and where it ran."""
        count = len(self.of("container"))
        parts = ["1 run each" if count == 1 else f"medians of {count} runs each"]
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
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        import html

        notes = "".join(f"<p><em>{html.escape(warning)}</em></p>" for warning in self.warnings)
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
        except ImportError as err:
            self.warnings.append(f"no figure: {err}")
        display({"text/plain": self.text(), "text/html": self._repr_html_()}, raw=True)  # type: ignore[no-untyped-call]

    # -- as data

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


KINDS: tuple[Kind, Kind] = ("container", "vm")


def seconds_text(seconds: float) -> str:
    """`4.13 ms`, `0.29 s`, `12.4 s`."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def memory_text(size_bytes: float) -> str:
    """`38.2 MiB`"""
    return _scaled(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def disk_text(size_bytes: float) -> str:
    """`181 MB`"""
    return _scaled(size_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    place = 0
    while value >= base and place < len(units) - 1:
        value, place = value / base, place + 1
    return f"{value:.3g} {units[place]}" if value < 100 else f"{value:.0f} {units[place]}"


def ratio_text(ratio: float) -> str:
    """How many times: two digits below ten, whole numbers above."""
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2g}×"  # noqa: RUF001


FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("time to first instruction", "first_instruction_s", seconds_text),
    ("wall time", "wall_s", seconds_text),
    ("CPU time", "cpu_s", seconds_text),
    ("peak memory", "peak_memory_bytes", memory_text),
    ("disk used", "disk_bytes", disk_text),
)


class Comparisons:
    """The service `engine.comparisons`."""

    def __init__(self, containers: Containers, vms: VMs, images: Images) -> None:
        self._containers = containers
        self._vms = vms
        self._images = images

    def compare(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        runs: int = 1,
        memory: str | int | None = None,
        cpus: float | None = None,
        cold: bool = False,
        notify: Callable[[str], None] | None = None,
        timeout_s: float = 300.0,
        **settings: Any,
    ) -> Comparison:
        """Run `command` in `image` as a container and as a VM, `runs` times each in alternation.

        `memory` (`"64m"` or bytes) and `cpus` limit the container; the VM gets at least the memory its kernel needs.
        `cold` boots the VM from nothing each time instead of restoring a template. `settings` (`environment`, `user`,
        `working_dir`) go to both. `notify` is told what happens. Before the first measured run each side runs
        `uname -r` once: that asks for the kernel and makes everything ready, so that no run pays for unpacking.

        Raises UsageError, NoSuchImage, VMError (no QEMU, no kernel), StartError (126, 127). A command that ends with
        a status other than 0 is a result, with a warning.
        """
        if runs < 1:
            raise UsageError(f"runs={runs}: at least one run is needed")
        for key in settings.keys() - _SHARED_SETTINGS:
            raise UsageError(
                f"{key} cannot be compared: a container and a VM do not both have it",
                resolution=f"what both have: {', '.join(sorted(_SHARED_SETTINGS))}",
            )
        words = [command] if isinstance(command, str) else list(command or [])
        if isinstance(command, str):
            import shlex

            words = shlex.split(command)
        say = notify or (lambda _line: None)
        found = self._images.resolve(image, notify=say)
        bench = _Bench(self._containers, self._vms, found, words, settings)
        bench.memory, bench.cpus, bench.cold, bench.timeout_s = memory_bytes(memory), cpus, cold, timeout_s
        bench.say = say
        say("making both ready: uname -r in a container and in a virtual machine")
        kernels = bench.kernels()
        done: list[Run] = []
        for number in range(1, runs + 1):
            # Alternating and not one kind after the other: what else the machine does then hits both alike.
            for kind in KINDS if number % 2 else KINDS[::-1]:
                say(f"run {number} of {runs}: {'container' if kind == 'container' else bench.vm_words()}")
                done.append(bench.container(number) if kind == "container" else bench.vm(number))
        return Comparison(
            image=image,
            command=words,
            runs=done,
            accelerator=bench.accelerator,
            kernels=kernels,
            memory_bytes=bench.memory,
            cpus=cpus,
            vm_memory_bytes=bench.vm_memory,
            start=bench.start,
            driver=self._containers.driver_name,
            machine=machine_text(),
            measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            warnings=_warnings(done, bench),
        )


class _Bench:
    """Runs one image and command either way and measures it; remembers what it learnt about the VM."""

    def __init__(
        self, containers: Containers, vms: VMs, image: Image, command: list[str], settings: Mapping[str, Any]
    ) -> None:
        self._containers, self._vms, self._image = containers, vms, image
        self._command, self._settings = command, dict(settings)
        self.memory: int | None = None
        self.cpus: float | None = None
        self.cold = False
        self.timeout_s = 300.0
        self.say: Callable[[str], None] = lambda _line: None
        self.accelerator = self.start = self._guest_kernel = ""
        self.found: list[str] = []

    @property
    def vm_memory(self) -> int:
        return max(VM_MEMORY_BYTES, self.memory or 0)

    @property
    def vm_cpus(self) -> int:
        return max(1, math.ceil(self.cpus or 1))

    def vm_words(self) -> str:
        return f"virtual machine ({self.accelerator.upper()})"

    def kernels(self) -> dict[str, str]:
        """`uname -r` from inside either; also the warm-up. Raises VMError when the guest does not answer."""
        # Past the image's entrypoint, and with no user or directory of ours: this is not what is measured.
        asking: dict[str, Any] = {"entrypoint": ["uname"]}
        inside = machine = ""
        try:
            inside = self._run_container(["-r"], 0, {**asking, "network_mode": "none"}).output.strip()
        except StartError:
            pass  # an image without uname (FROM scratch) shares the host's kernel all the same
        try:
            machine = self._run_vm(["-r"], 0, asking).output.strip()
        except StartError:
            pass  # the guest's kernel was chosen by us: VMResult names it
        return {"container": inside or platform.release(), "vm": machine or self._guest_kernel}

    def container(self, number: int) -> Run:
        return self._run_container(self._command, number, {**self._settings, **self._limits()})

    def vm(self, number: int) -> Run:
        return self._run_vm(self._command, number, self._settings)

    def _limits(self) -> dict[str, Any]:
        # Neither has a network: the VM has none of its own, and so there is nothing to warn of.
        limits: dict[str, Any] = {"network_mode": "none"}
        if self.memory:
            limits["mem_limit"] = self.memory
        if self.cpus:
            limits["nano_cpus"] = int(self.cpus * 1e9)
        return limits

    def _run_container(self, command: list[str], number: int, settings: Mapping[str, Any]) -> Run:
        asked_at = time.monotonic()
        name = f"compare-{secrets.token_hex(6)}"
        try:
            container, attachment = self._containers.run_attached(
                self._image.id, command or None, name=name, **settings
            )
        except StartError:
            # As with docker, what could not be started stays created; nobody asked for this one.
            self._containers.get(name).remove(force=True)
            raise
        sampler = Sampler(hz=SAMPLES_PER_SECOND, window_s=self.timeout_s, retry_s=0.002)
        try:
            series = sampler.add(container, kind="container")
            sampler.start()
            output = _collect(attachment, asked_at + self.timeout_s)
            ended_at = time.monotonic()
            sampler.stop()
            self.found += [warning for warning in container.warnings if warning not in self.found]
            state = container.runtime_state()
            usage = state.get("usage") or {}
            samples = _relative(series, asked_at)
            cpu_usec, peak = _spent(state, series)
            return Run(
                kind="container",
                number=number,
                exit_code=-1 if attachment.exit_code is None else attachment.exit_code,
                first_instruction_s=attachment.exec_at - asked_at if attachment.exec_at else None,
                wall_s=ended_at - asked_at,
                cpu_s=None if cpu_usec is None else cpu_usec / 1e6,
                peak_memory_bytes=peak,
                disk_bytes=self._image.size_bytes,
                output=output,
                samples=samples,
                memory_source=str(usage.get("source", "")),
            )
        finally:
            sampler.stop()
            attachment.close()
            container.remove(force=True)

    def _run_vm(self, command: list[str], number: int, settings: Mapping[str, Any]) -> Run:
        sampler = Sampler(hz=SAMPLES_PER_SECOND, window_s=self.timeout_s, retry_s=0.01)
        followed: list[Series] = []
        asked: list[float] = []

        def started(vm: VM) -> None:
            asked.append(time.monotonic())  # again when QEMU had to be started a second time
            if not followed:
                followed.append(sampler.add(vm, kind="vm"))
                sampler.start()

        try:
            result = self._vms.run(
                self._image,
                command or None,
                mem_limit=self.vm_memory,
                cpus=self.vm_cpus,
                cold=self.cold,
                timeout_s=self.timeout_s,
                notify=self.say,
                on_start=started,
                **settings,
            )
        finally:
            sampler.stop()
        self.accelerator, self.start, self._guest_kernel = result.accelerator, result.start, result.kernel
        self.found += [warning for warning in result.warnings if warning not in self.found]
        samples = [entry for entry in _relative(followed[0], asked[-1]) if entry[0] >= 0] if followed else []
        return Run(
            kind="vm",
            number=number,
            exit_code=result.exit_code,
            first_instruction_s=result.timings["exec_s"],
            wall_s=result.timings["wall_s"],
            cpu_s=result.usage.cpu_s,
            peak_memory_bytes=max([result.usage.peak_rss_bytes, *(memory for _, _, memory in samples)]) or None,
            disk_bytes=result.disk_bytes,
            output=(result.stdout + result.stderr)[-_OUTPUT_KEPT:].decode(errors="replace"),
            samples=samples,
        )


def _spent(state: Mapping[str, Any], series: Series) -> tuple[int | None, int | None]:
    """(CPU µs, peak memory in bytes) of a container that has ended. `state["usage"]` is what was read at the very end
    (runtime/usage.py); samples, up to 20 ms older, stand in for figures its cgroup does not tell. Samples of a process
    stand in for nothing: of a short one they saw the moments before its exec, or none."""
    usage = state.get("usage") or {}
    cpu_usec, peak = usage.get("cpu_usec"), usage.get("memory_peak_bytes")
    if usage.get("source") == "rusage" or not (state.get("cgroup") or {}).get("paths"):
        return cpu_usec, peak
    if cpu_usec is None and series.samples:
        cpu_usec = series.samples[-1].cpu_usec
    peaks = [peak, *(sample.memory_peak_bytes for sample in series.samples)]
    known = [value for value in peaks if value] or [sample.memory_bytes for sample in series.samples]
    return cpu_usec, max(known, default=None)


def _relative(series: Series, asked_at: float) -> list[tuple[float, int, int]]:
    return [(round(s.time_s - asked_at, 5), s.cpu_usec, s.memory_bytes) for s in series.samples]


def _collect(attachment: Attachment, deadline: float) -> str:
    """Read what a run writes until it ends, keeping the end of it."""
    kept = b""
    try:
        while (piece := attachment.read(max(0.0, deadline - time.monotonic()))) is not None:
            kept = (kept + piece[1])[-_OUTPUT_KEPT:]
    except TimeoutError:
        raise UsageError("the command did not end in time", resolution="give it more time (`--timeout`)") from None
    return kept.decode(errors="replace")


def _warnings(runs: list[Run], bench: _Bench) -> list[str]:
    found = list(bench.found)
    failed = sorted({run.exit_code for run in runs if run.exit_code})
    if failed:
        found.append(f"the command ended with exit status {', '.join(map(str, failed))}")
    if any(run.memory_source == "rusage" for run in runs):
        found.append(
            "the container had no cgroup: its CPU time is that of processes that were waited for, its peak memory that"
            " of the largest one, counting the engine's own process that became the command"
        )
    if bench.memory and bench.memory < bench.vm_memory:
        need = memory_text(bench.vm_memory)
        found.append(f"the VM got {need}, since its kernel needs memory of its own; the container's limit is smaller")
    if bench.cpus and bench.cpus != bench.vm_cpus:
        found.append(f"the container was limited to {bench.cpus:g} CPU; the VM had {bench.vm_cpus} whole")
    if bench.accelerator == "tcg":
        found.append("under TCG the VM's processor is emulated in software: its CPU figures are not those of KVM")
    return found


def memory_bytes(memory: str | int | None) -> int | None:
    """`64m`, `1g`, `1048576` or a number, in bytes. Raises UsageError."""
    if memory is None or isinstance(memory, int):
        return memory
    text = memory.strip().lower().removesuffix("b").removesuffix("i")
    scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:], 1)
    try:
        return int(float(text.rstrip("kmgt")) * scale)
    except ValueError:
        raise UsageError(f"invalid size: '{memory}'", resolution="sizes look like 64m or 1g") from None


def machine_text() -> str:
    """The machine in a few words: processors, memory, kernel."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} CPUs, {memory_text(memory)}, {platform.machine()}, Linux {platform.release()}"
