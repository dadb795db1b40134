"""Figures of what runs, over time: one thread, the `Sampler`, follows containers and virtual machines alike.

A reading is a `Sample` (`measuring/samples.py` reads it from the kernel); a `Series` is the ring buffer of one target,
with what happened to it; `measuring/stats.py` says the same in docker's words. Drawing is not here, and nothing heavy
is imported: pandas only by `to_dataframe()`.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from .display import human_memory, table_html, table_text, without_formulas
from .errors import LabkernelError, NotFoundError, UsageError
from .measuring.guest import GuestReader
from .measuring.processes import ProcessReader, ProcessTreeReader
from .measuring.prometheus import Reading, Server, prometheus_text
from .measuring.readers import kind_of, reader_for, state_of
from .measuring.samples import CgroupReader, Limits, Reader, Sample
from .measuring.stats import STATS_HEADER, stats_json, stats_of_ended, stats_row, stats_stream

__all__ = [
    "STATS_HEADER",
    "CgroupReader",
    "Event",
    "Limits",
    "Metrics",
    "ProcessReader",
    "ProcessTreeReader",
    "Reader",
    "Sample",
    "Sampler",
    "Series",
    "dataframe",
    "reader_for",
    "state_of",
    "stats_json",
    "stats_of_ended",
    "stats_row",
    "stats_stream",
]

# -- collecting

_THROTTLED_SHARE, _THROTTLED_AGAIN_S = 0.05, 10.0
_FEW_TARGETS, _DETAIL_S = 20, 2.0
_REST_S, _STILL_READINGS = 1.0, 3
CORE_SHARE = 0.01  # of a core's time that a sampler takes
_TOLD_S = 5.0  # the rate that is told is that of so long: opening files once makes one long wait, not a slow sampler
# What may be spent ahead, as seconds of the share: opening the files of hundreds takes 0.1 s of CPU time once, and what
# is dear is not read in every round.
_AHEAD_S = 10.0
_GOLDEN = 0.618034  # multiples of it fall evenly between two whole numbers
_STATE_FOLLOWS_S = 5.0  # how long a state may say "running" of a container whose processes are gone


class Event(NamedTuple):
    """What happened to a target: `start`, `stop` (text: exit status), `oom`, `throttled`, `exec` (text: command)."""

    time_s: float
    kind: str
    text: str = ""


class Series:
    """The ring buffer of one target. Gaps (the target was not there) are None; two are never side by side."""

    def __init__(self, name: str, capacity: int, limits: Limits = Limits(), kind: str = "container") -> None:  # noqa: B008
        self.name = name
        self.kind = kind
        self.limits = limits
        self.points: deque[Sample | None] = deque(maxlen=capacity)
        self.events: deque[Event] = deque(maxlen=256)  # in the order they were noticed in; sorted, that of their times
        self.marked = 0
        self.ended = False

    @property
    def samples(self) -> list[Sample]:
        return [point for point in list(self.points) if point is not None]

    def append(self, sample: Sample | None) -> None:
        if sample is not None or (self.points and self.points[-1] is not None):
            self.points.append(sample)

    def mark(self, event: Event) -> None:
        """Keep an event; the oldest of very many go. `marked` counts all there ever were."""
        self.events.append(event)
        self.marked += 1

    def cpu_percent(self) -> list[tuple[float, float]]:
        """(time_s, percent of one core) between each two samples; NaN stands at a gap."""
        return [(t, rate / 1e4) for t, rate in self._rate(1)]

    def throttled_percent(self) -> list[tuple[float, float]]:
        """(time_s, percent of the time in which the CPU limit held the target back)."""
        return [(t, rate / 1e4) for t, rate in self._rate(6)]

    def _rate(self, index: int) -> Iterator[tuple[float, float]]:
        last: Sample | None = None
        for point in list(self.points):
            if point is None:
                if last is not None:
                    yield last.time_s, float("nan")
            elif last is not None and point.time_s > last.time_s:
                yield point.time_s, max(0, (point[index] or 0) - (last[index] or 0)) / (point.time_s - last.time_s)
            last = point

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per sample: all its fields, `target` and `cpu_percent`."""
        percent = dict(self.cpu_percent())
        return [
            {"target": self.name, **s._asdict(), "cpu_percent": percent.get(s.time_s, float("nan"))}
            for s in self.samples
        ]

    def __repr__(self) -> str:
        return f"<Series {self.name}: {len(self.points)} samples{', ended' if self.ended else ''}>"


SUMMARY_HEADER = ("NAME", "STATE", "CPU TIME", "PEAK MEMORY", "LAST MEMORY", "PIDS", "OOM KILLS")


def summary(series: Series) -> tuple[str, ...]:
    """One line about a series: the cells of `SUMMARY_HEADER`."""
    samples = series.samples
    state = "ended" if series.ended else "running" if samples else "waiting"
    if not samples:
        return (series.name, state, "-", "-", "-", "-", "-")
    last = samples[-1]
    return (
        series.name,
        state,
        f"{last.cpu_usec / 1e6:.2f} s",
        human_memory(max(sample.memory_bytes for sample in samples)),
        human_memory(last.memory_bytes),
        "-" if last.pids is None else str(last.pids),
        "-" if last.oom_kills is None else str(last.oom_kills),
    )


class _Target:
    """A thing being followed: its reader is opened again when it starts again."""

    def __init__(self, thing: Any, series: Series, *, net: bool, retry_s: float) -> None:
        self.thing, self.series, self.net, self.retry_s = thing, series, net, retry_s
        self.reader: Reader | None = None
        self.detail_s = self.phase = 0.0
        self.retry_at = 0.0
        self.gone_at: float | None = None
        self.ooms = 0
        self.before: Sample | None = None
        self.throttled_at = float("-inf")
        self.rest_until = 0.0
        self.cpu_usec, self.still = -1, 0

    def tick(self, now: float) -> None:
        if self.reader is None and now >= self.retry_at:
            self._look(now)
        if self.reader is None:
            return
        sample = self.reader.read()
        self.series.append(sample)
        if sample is None:
            self.reader.close()
            self.reader = None
            self._look(now)
            return
        if (sample.oom_kills or 0) > self.ooms:
            self.ooms = sample.oom_kills or 0
            self.series.mark(Event(sample.time_s, "oom"))
        self._mark_throttling(sample)
        if self.detail_s:
            self._rest(now, sample.cpu_usec)

    def _rest(self, now: float, cpu_usec: int) -> None:
        """One of hundreds that has used no CPU time for some readings is left alone for a while."""
        self.still = self.still + 1 if cpu_usec == self.cpu_usec else 0
        self.cpu_usec = cpu_usec
        if self.still >= _STILL_READINGS:
            self.rest_until = now + _REST_S

    def _mark_throttling(self, sample: Sample) -> None:
        """Mark the moment from which the CPU limit holds it back; again only after a while without."""
        before, self.before = self.before, sample
        if before is None or sample.throttled_usec is None or sample.time_s <= before.time_s:
            return
        held = (sample.throttled_usec - (before.throttled_usec or 0)) / (sample.time_s - before.time_s) / 1e6
        if held > _THROTTLED_SHARE:
            if sample.time_s - self.throttled_at > _THROTTLED_AGAIN_S:
                self.series.mark(Event(before.time_s, "throttled"))
            self.throttled_at = sample.time_s

    def _look(self, now: float) -> None:
        self.retry_at = now + self.retry_s
        try:
            self.reader = reader_for(self.thing, net=self.net)
            state = state_of(self.thing) or _vm_state(self.thing)
        except (LabkernelError, OSError):
            self.reader, state = None, {"status": "exited"}  # removed (--rm): as ended as can be
        if self.reader is not None:
            self.series.ended = False
            self.gone_at = None
            self._spare_reader()
            limits = self.reader.limits()
            if limits.memory_bytes is None and self.series.kind == "vm":
                limits = limits._replace(memory_bytes=getattr(self.thing, "memory_bytes", None))
            self.series.limits = limits
            self.ooms, self.before = 0, None
            self.series.mark(Event(now, "start"))
            return
        if self.gone_at is None:
            self.gone_at = now
        # Its processes are gone before its state says so, and only then the exit status is known.
        waiting = state.get("status") in ("running", "paused") and now - self.gone_at < _STATE_FOLLOWS_S
        if not self.series.ended and not waiting and state.get("status") != "created":
            self._end(now, state)

    def _end(self, now: float, state: Mapping[str, Any]) -> None:
        self.series.ended = True
        if state.get("oom_killed") and not any(event.kind == "oom" for event in self.series.events):
            self.series.mark(Event(now, "oom"))
        code = state.get("exit_code")
        self.series.mark(Event(now, "stop", "" if code is None else str(code)))

    def spare(self, detail_s: float, *, phase: float) -> None:
        """Read what is dear only every `detail_s` seconds; `phase` (0 to 1) is where among others its turn lies."""
        self.detail_s, self.phase = detail_s, phase
        self._spare_reader()

    def _spare_reader(self) -> None:
        if isinstance(self.reader, CgroupReader):
            self.reader.detail_s, self.reader.phase = self.detail_s, self.phase

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None


def _vm_state(thing: Any) -> dict[str, Any]:
    """The same words for a VM (`status`, `exit_code`); a bare pid that cannot be read has ended."""
    return {"status": getattr(thing, "status", "exited"), "exit_code": getattr(thing, "exit_code", None)}


class Sampler:
    """Follows targets from one thread, `hz` times a second (1 to 200), keeping the last `window_s` seconds.

        with Sampler(container, vm, hz=10) as sampler:
            container.wait()
        sampler.series(container).cpu_percent()

    A target may start later, end, and start again; one that fails is a gap. The thread is a daemon: it ends with
    `stop()`, and never keeps an interpreter alive. `retry_s` is how often a target that is not there is looked for.

    It takes no more than `core_share` of a core's time (1 is a whole one): where `hz` would take more, it reads less
    often, and `rate_hz` says how often. Beyond twenty targets, those that use no CPU time are read once a second.
    """

    def __init__(
        self,
        *things: Any,
        hz: float = 5.0,
        window_s: float = 600.0,
        net: bool = False,
        retry_s: float = 0.5,
        core_share: float = CORE_SHARE,
    ) -> None:
        if not 0.1 <= hz <= 200:
            raise UsageError(f"hz={hz:g} is not between 0.1 and 200", resolution="1 to 20 samples a second is usual")
        if core_share <= 0:
            raise UsageError(f"core_share={core_share:g} is not above 0")
        self.interval_s = 1.0 / hz
        self.core_share = core_share
        self._debt_s = 0.0  # CPU time spent beyond the share
        self._cpu_s = 0.0  # of its thread, up to the last round
        self._round_at = 0.0
        self._rounds: deque[float] = deque()  # when they were, of late
        self._due = 0.0  # when the next one is to be
        self._capacity = max(2, int(window_s * hz))
        self._net = net
        self._retry_s = retry_s
        self._targets: list[_Target] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._gate = threading.Lock()  # held while it runs: waiting for it costs a third of waiting for the event
        self._awake: list[_Target] = []
        self._roll_call_at = float("-inf")
        self._thread: threading.Thread | None = None
        for thing in things:
            self.add(thing)

    def add(self, thing: Any, *, name: str | None = None, kind: str | None = None) -> Series:
        """Follow `thing` (what `reader_for` takes) from now on; returns its series."""
        kind = kind or kind_of(thing)
        label = name or str(getattr(thing, "name", "") or getattr(thing, "short_id", "") or thing)
        series = Series(label, self._capacity, kind=kind)
        with self._lock:
            self._targets = [*self._targets, _Target(thing, series, net=self._net, retry_s=self._retry_s)]
            self._roll_call_at = float("-inf")
            if len(self._targets) > _FEW_TARGETS:
                for number, target in enumerate(self._targets):
                    target.spare(_DETAIL_S, phase=number * _GOLDEN % 1)
        return series

    def series(self, thing: Any) -> Series:
        """The series of a thing that was added, or of its name."""
        for target in self._targets:
            if target.thing is thing or target.series.name == thing:
                return target.series
        raise UsageError(f"not followed by this sampler: {thing}", resolution="add(...) it first")

    def all_series(self) -> list[Series]:
        return [target.series for target in self._targets]

    @property
    def rate_hz(self) -> float:
        """How often it reads now: as often as was asked for, or as its share of a core allows."""
        rounds = list(self._rounds)
        asked = 1.0 / self.interval_s
        return min(asked, len(rounds) / (self._due - rounds[0])) if rounds else asked

    def note(self) -> str:
        """A sentence where it reads clearly less often than was asked for, else ""."""
        if self.rate_hz * self.interval_s > 0.9:
            return ""
        rates = f"{self.rate_hz:.2g} times a second instead of {1 / self.interval_s:g}"
        return f"read {rates}: more would take over {self.core_share * 100:g} % of a core"

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Sampler:
        if not self.running:
            self._stop.clear()
            self._gate.acquire(blocking=False)
            self._thread = threading.Thread(target=self._run, name="labkernel-sampler", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread, after one last reading, and close all descriptors; the series stay."""
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # it did not run
            self._gate.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        for target in self._targets:
            target.close()

    def __enter__(self) -> Sampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        due = self._round_at = time.monotonic()
        self._cpu_s, self._debt_s = time.thread_time(), 0.0
        self._rounds.clear()
        while True:
            due += self._round()
            now = time.monotonic()
            if due < now:  # the machine was asleep or busy: no burst of readings to catch up
                due = now
            if self._gate.acquire(timeout=max(0.0, due - now)) or self._stop.is_set():
                break
        self.tick()

    def _round(self) -> float:
        """Read the targets that do not rest; returns the seconds until the next round."""
        now = time.monotonic()
        if now >= self._roll_call_at:
            self._roll_call_at = now + _REST_S / 4
            self._awake = [target for target in self._targets if now >= target.rest_until]
        for target in self._awake:
            if now >= target.rest_until:
                target.tick(now)
        # The wait before it is part of what a round costs. An account and no guess from one round: rounds cost unlike.
        before, self._cpu_s = self._cpu_s, time.thread_time()
        since, self._round_at = self._round_at, now
        earned = (now - since) * self.core_share
        self._debt_s = max(0.0, self._debt_s + self._cpu_s - before - earned)
        wait_s = max(self.interval_s, self._debt_s / self.core_share - _AHEAD_S)
        self._due = now + wait_s  # before the round it follows: another thread asks for the rate
        self._rounds.append(now)
        while now - self._rounds[0] > _TOLD_S:
            self._rounds.popleft()
        return wait_s

    def tick(self) -> None:
        """Read every target once, in the calling thread."""
        now = time.monotonic()
        for target in self._targets:
            target.tick(now)

    def rows(self) -> list[dict[str, Any]]:
        return [row for series in self.all_series() for row in series.rows()]

    def to_dataframe(self) -> Any:
        """All samples as a pandas DataFrame, one row per sample and target. Raises UsageError without pandas."""
        return dataframe(self.rows())

    def figure(self) -> Any:
        """CPU, memory, throttling and processes over time (matplotlib)."""
        from .measuring.figures import history_figure

        return history_figure(self.all_series())

    def __repr__(self) -> str:
        table = table_text(SUMMARY_HEADER, (summary(series) for series in self.all_series()))
        return "\n".join(filter(None, (table, self.note())))

    @without_formulas
    def _repr_html_(self) -> str:
        rows = [summary(series) for series in self.all_series()]
        return table_html(SUMMARY_HEADER, rows, caption=self.note() or None)

    def to_csv(self, stream: IO[str]) -> None:
        """All samples as CSV with a header line; unknown figures are empty."""
        import csv

        writer = csv.DictWriter(stream, ["target", *Sample._fields, "cpu_percent"])
        writer.writeheader()
        writer.writerows({k: "" if v is None or v != v else v for k, v in row.items()} for row in self.rows())


def dataframe(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Rows as a DataFrame. pandas is optional: raises UsageError when it is not installed."""
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError as err:
        raise UsageError("to_dataframe() needs pandas", resolution="`pip install pandas`, or use rows()") from err
    return pandas.DataFrame(list(rows))


class Metrics:
    """The service `engine.metrics`: figures of this engine's containers and machines.

        history = lab.metrics(c)          # follows it from now on, in the background
        history.to_dataframe()            # what was seen so far; also history.figure(), history.to_csv(stream)

    `running` gives what runs now: containers and virtual machines.
    """

    def __init__(self, running: Callable[[], Iterable[Any]] = tuple) -> None:
        self._running = running
        self._histories: dict[tuple[str, ...], Sampler] = {}

    def __call__(self, *things: Any, hz: float = 5.0, seconds: float | None = None, inside: bool = False) -> Sampler:
        """Follow containers, VMs or pids (default: all that run), and return the running `Sampler`.

        Asked again for the same things, it returns the same sampler with what it has seen since; with `seconds` it
        waits so long first. `inside` adds what a virtual machine's own kernel says. Raises UsageError for something
        that has no figures.
        """
        found = list(things) or list(self._running())
        if not found:
            raise UsageError("nothing runs", resolution="start a container or a virtual machine, or name one")
        for thing in found:
            if state_of(thing) is None and not isinstance(getattr(thing, "pid", thing), int | None):
                raise UsageError(f"has no figures: {thing!r}", resolution="give it a container, a VM or a pid")
        key = (f"{hz:g}", str(inside), *(str(getattr(thing, "id", thing)) for thing in found))
        sampler = self._histories.get(key)
        if sampler is None:
            sampler = self._histories[key] = self.sampler(*found, hz=hz, net=True)
            for thing in found if inside else ():
                if callable(getattr(thing, "inside", None)):
                    sampler.add(_Inside(thing), name=f"{thing.name} (inside)", kind="vm")
            sampler.tick()
        sampler.start()
        if seconds:
            threading.Event().wait(seconds)
        return sampler

    def find(self, *names: str) -> list[Any]:
        """What runs, or of that what has one of these names (or begins of ids). Raises NotFoundError."""
        running = list(self._running())
        if not names:
            return running
        found = []
        for name in names:
            same = [thing for thing in running if name and (thing.name == name or thing.id.startswith(name))]
            if not same:
                raise NotFoundError(f"no running container or virtual machine is called {name}", resolution="see `ps`")
            found.append(same[0])
        return found

    def readings(self, *names: str) -> list[Reading]:
        """One reading of each thing that runs (or is named); what ends meanwhile is left out."""
        found = []
        for thing in self.find(*names):
            try:
                reader = reader_for(thing, net=True)
            except (LabkernelError, OSError):
                continue
            if reader is None:
                continue
            try:
                sample, limits = reader.read(), reader.limits()
            finally:
                reader.close()
            if sample is not None:
                labels = {"name": thing.name, "id": thing.id, "image": _image_name(thing), "kind": kind_of(thing)}
                found.append(Reading(labels, sample, limits))
        return found

    def prometheus(self, *names: str) -> str:
        """Prometheus' text format of one reading of all that runs (or is named)."""
        return prometheus_text(self.readings(*names))

    def serve(self, listen: str = "127.0.0.1:9323", *names: str) -> Server:
        """A server of `prometheus()` at http://LISTEN/metrics, not serving yet: call its `serve()` or `start()`."""
        return Server(listen, lambda: self.prometheus(*names))

    def reader(self, thing: Any, *, net: bool = False) -> Reader | None:
        """See `reader_for`."""
        return reader_for(thing, net=net)

    def sampler(self, *things: Any, hz: float = 5.0, window_s: float = 600.0, net: bool = False) -> Sampler:
        """A `Sampler` of these things, not started yet."""
        return Sampler(*things, hz=hz, window_s=window_s, net=net)

    def sample(self, thing: Any, *, net: bool = True) -> Sample | None:
        """One reading, None when the thing does not run."""
        reader = reader_for(thing, net=net)
        if reader is None:
            return None
        try:
            return reader.read()
        finally:
            reader.close()

    def close(self) -> None:
        """End every sampler that was started here."""
        histories, self._histories = self._histories, {}
        for sampler in histories.values():
            sampler.stop()


def _image_name(thing: Any) -> str:
    image = getattr(thing, "image", "")
    return image if isinstance(image, str) else str((getattr(image, "tags", None) or [getattr(image, "id", "")])[0])


class _Inside:
    """A virtual machine as its own kernel sees it, with the attributes by which a sampler follows a target."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine

    @property
    def status(self) -> str:
        return str(self._machine.status)

    @property
    def exit_code(self) -> int | None:
        code: int | None = self._machine.exit_code
        return code

    def figures_reader(self) -> Reader | None:
        return GuestReader(self._machine.inside) if self.status == "running" else None
