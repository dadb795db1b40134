"""`lab.monitor(container, vm, …)`: a live plot of CPU, memory, throttling and processes while they run.

Drawn by the browser on a canvas (`monitor.js`): the kernel only pushes numbers (with twenty curves some 2 ms of its CPU
a frame, sending included) from a thread of its own, so the plot moves while a cell runs and never holds one up. When
the targets end, or End is pressed, the output becomes a picture (matplotlib, by display id) without any widget in it: a
saved notebook shows it anywhere.
Saved while it is live, a notebook has the browser's own last picture (extension/src/pictures.ts).
"""

from __future__ import annotations

import contextvars
import os
import secrets
import sys
import threading
import time
from array import array
from typing import Any

from ..display import table_text
from ..errors import UsageError
from ..metrics import SUMMARY_HEADER, Event, Sample, Sampler, Series, state_of, summary

_FIELDS = 5  # t, cpu, memory, throttled, pids: float64 each, little-endian; monitor.js reads the same
_SENT_AGAIN = 1500  # points of history a full frame brings to a page that was reloaded
_FULL_EVERY_S = 30.0
_FULL_AT_FIRST_S = 5.0
_AFTER_END_S = 1.0
_EVENTS_EVERY_S, _EVENTS_BACK_S = 1.0, 5.0
_FIRST_SAMPLES_S = 2.0
MOST_CURVES = 20
# A Jupyter server names its session, VS Code itself: there a browser shows what is live, even if it is late to say so.
_SHOWN_BY = ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD")
_NAN = float("nan")
VERBS = ("start", "stop", "kill")


def monitor(
    *things: Any,
    hz: float = 5.0,
    window_s: float = 60.0,
    duration_s: float | None = None,
    title: str = "",
    history: Any = None,
) -> Monitor:
    """A live plot of up to 20 containers and VMs (also lists of them). Shows itself as the value of a cell.

    `hz` samples a second, 1 to 10; `window_s` is what the plot shows at first (15, 60, 300; 0: all). It ends by itself
    when all its targets have ended. With `duration_s` it ends after so many seconds at the latest, and the cell that
    shows it lasts as long (so a notebook that is executed without a browser has the picture too); Jupyter's stop button
    ends it early. Where no browser shows it (nbclient, nbconvert --execute) the picture is brought up to date after
    each cell. `history` (the engine's events) marks each exec. Raises UsageError for something that cannot be followed.
    """
    flat: list[Any] = []
    for thing in things:
        flat.extend(thing if isinstance(thing, list | tuple) else [thing])
    if not flat:
        raise UsageError("nothing to monitor", resolution="name a container or a VM: lab.monitor(c)")
    for thing in flat:
        if state_of(thing) is None and not isinstance(getattr(thing, "pid", thing), int | None):
            raise UsageError(f"cannot be monitored: {thing!r}", resolution="give it a container, a VM or a pid")
    if len(flat) > MOST_CURVES:
        raise UsageError(
            f"{len(flat)} curves in one plot cannot be told apart; at most {MOST_CURVES} are drawn",
            resolution="name some of them; lab.dashboard() lists all, lab.metrics(*things) follows hundreds",
        )
    if not 1 <= hz <= 10:
        raise UsageError(f"hz={hz:g} is not between 1 and 10", resolution="use a Sampler for more samples a second")
    made = Monitor(flat, hz=hz, window_s=window_s, duration_s=duration_s, title=title)
    made.history = history
    return made


class _Feed:
    """Turns the samples of one series into rows for the browser."""

    def __init__(self, series: Series, capacity: int) -> None:
        self.series = series
        self.rows = array("d")
        self._capacity = capacity * _FIELDS
        self._last: Sample | None = None
        self._marked = 0

    def take(self, origin: float) -> int:
        """Add what the last tick brought; returns how many rows that are (0 or 1)."""
        points = self.series.points
        point = points[-1] if points else None
        if point is self._last:
            return 0
        before, self._last = self._last, point
        if point is None:
            assert before is not None
            self.rows.extend((before.time_s - origin, _NAN, _NAN, _NAN, _NAN))
        else:
            cpu = throttled = _NAN
            if before is not None and point.time_s > before.time_s:
                passed = (point.time_s - before.time_s) * 1e4
                cpu = max(0, point.cpu_usec - before.cpu_usec) / passed
                if point.throttled_usec is not None:
                    throttled = max(0, point.throttled_usec - (before.throttled_usec or 0)) / passed
            pids = _NAN if point.pids is None else float(point.pids)
            self.rows.extend((point.time_s - origin, cpu, float(point.memory_bytes), throttled, pids))
        if len(self.rows) > 2 * self._capacity:
            del self.rows[: -self._capacity]
        return 1

    def tail(self, count: int) -> bytes:
        part = self.rows[-count * _FIELDS :] if count else array("d")
        if sys.byteorder == "big":
            part.byteswap()
        return part.tobytes()

    def marks(self, index: int, origin: float, *, everything: bool) -> list[dict[str, Any]]:
        # Both fields are written by the thread that asks here.
        events, count = list(self.series.events), self.series.marked - self._marked
        fresh = events if everything else events[max(0, len(events) - count) :]
        self._marked = self.series.marked
        return [{"s": index, "t": e.time_s - origin, "kind": e.kind, "text": e.text} for e in fresh]


class Monitor:
    """A running (or ended) monitor. `series` has what was measured; `stop()` ends it, `wait()` waits for its end."""

    def __init__(self, things: list[Any], *, hz: float, window_s: float, duration_s: float | None, title: str) -> None:
        self._sampler = Sampler(hz=hz, window_s=3600.0)
        self.series = [self._sampler.add(thing) for thing in things]
        self.title = title
        self.window_s = window_s
        self.duration_s = duration_s
        self._interval_s = 1.0 / hz
        self._capacity = int(3600 * hz)
        self._feeds = [_Feed(series, self._capacity) for series in self.series]
        self._origin = time.monotonic()
        self._view: Any = None
        self._targets: list[dict[str, Any]] = []
        self._handles: list[str] = []
        self._stop = threading.Event()
        self._full_wanted = threading.Event()
        self._frames = 0
        self._full_at = 0.0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._things = things
        self._seen_by_browser = False
        self._asked_events_at = 0.0
        self._known_events: set[str] = set()
        self.history: Any = None
        self.ended = False
        self.frame_cpu_s = 0.0
        """CPU time the last frame cost the kernel."""

    # -- life

    def start(self) -> Monitor:
        """Begin to measure; showing the monitor does this."""
        with self._lock:
            if self._thread is None and not self.ended:
                self._origin = time.monotonic()
                # What a thread displays goes to the cell whose context it runs in: this one, not a later one.
                context = contextvars.copy_context()
                run = threading.Thread(target=context.run, args=(self._run,), name="labkernel-monitor", daemon=True)
                self._thread = run
                run.start()
        return self

    def stop(self) -> None:
        """End it now and leave the picture; waits for that (well under two seconds)."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the targets have ended and the picture is there; False when `timeout_s` passed before."""
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)
        return self.ended

    def _run(self) -> None:
        due = time.monotonic()
        gone_since: float | None = None
        try:
            while not self._stop.is_set():
                self.tick()
                now = time.monotonic()
                if not all(series.ended for series in self.series):
                    gone_since = None
                elif gone_since is None:
                    gone_since = now
                elif now - gone_since >= _AFTER_END_S:  # a restart within a second goes on in the same plot
                    break
                if self.duration_s is not None and now - self._origin >= self.duration_s:
                    break
                due = max(due + self._interval_s, now)
                self._stop.wait(due - now)
        finally:
            self._sampler.stop()
            self.ended = True
            self._push()
            self._leave_picture()

    def tick(self) -> None:
        """One reading of all targets, pushed to the browser."""
        began = time.thread_time()
        self._sampler.tick()
        self._mark_execs()
        self._push()
        self.frame_cpu_s = time.thread_time() - began

    def _mark_execs(self) -> None:
        """Once a second, what was executed in the containers since: docker's event `exec_start: COMMAND`."""
        now = time.monotonic()
        if self.history is None or now - self._asked_events_at < _EVENTS_EVERY_S:
            return
        self._asked_events_at = now
        ids = {getattr(thing, "id", None): series for thing, series in zip(self._things, self.series, strict=True)}
        try:
            found = self.history.list(since=time.time() - _EVENTS_BACK_S)
        except Exception:  # a busy database, an engine that was closed: a mark less, and no end of the plot
            return
        for event in found:
            series = ids.get(event["Actor"]["ID"])
            key = f"{event['timeNano']}{event['Action']}"
            if series is None or not event["Action"].startswith("exec_start") or key in self._known_events:
                continue
            self._known_events.add(key)
            # Events have the clock's time, samples the monotonic one.
            moment = now - max(0.0, time.time() - event["timeNano"] / 1e9)
            if moment >= self._origin:
                series.mark(Event(moment, "exec", event["Action"].partition(": ")[2]))

    # -- to the browser

    def _push(self) -> None:
        fresh = [feed.take(self._origin) for feed in self._feeds]
        if self._view is None:
            return
        message, data = self._frame(fresh)
        try:
            self._view.send(message, buffers=[data])
        except Exception:  # the kernel is shutting down or the page is gone; measuring goes on
            pass

    def _frame(self, fresh: list[int]) -> tuple[dict[str, Any], bytes]:
        # The page may be reloaded while a cell keeps the kernel from answering it: full frames come by themselves too.
        now = time.monotonic()
        full = self._full_wanted.is_set() or now - self._full_at > _FULL_EVERY_S
        full = full or now - self._origin < _FULL_AT_FIRST_S or self.ended
        counts = [
            min(_SENT_AGAIN, len(feed.rows) // _FIELDS) if full else n
            for feed, n in zip(self._feeds, fresh, strict=True)
        ]
        marks = [mark for i, feed in enumerate(self._feeds) for mark in feed.marks(i, self._origin, everything=full)]
        self._frames += 1
        message = {
            "kind": "frame",
            "seq": self._frames,
            "full": full,
            "state": "ended" if self.ended else "live",
            "counts": counts,
            "fresh": fresh,
            "capacity": self._capacity,
            "marks": marks,
        }
        targets = [_target(thing, series) for thing, series in zip(self._things, self.series, strict=True)]
        if full or targets != self._targets:
            message["targets"] = self._targets = targets
        if full:
            self._full_at = now
            self._full_wanted.clear()
        return message, b"".join(feed.tail(count) for feed, count in zip(self._feeds, counts, strict=True))

    def _message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == "stop":
            self._stop.set()
        elif kind == "hello":
            self._seen_by_browser = True
            self._full_wanted.set()
        elif kind == "act" and content.get("verb") in VERBS and content.get("index") in range(len(self._things)):
            arguments = self._things[content["index"]], content["verb"]
            threading.Thread(target=self._act, args=arguments, name="labkernel-act", daemon=True).start()

    def _act(self, thing: Any, verb: str) -> None:
        """Start, stop or kill a target, as the browser asked after its user confirmed; tells what went wrong."""
        try:
            getattr(thing, verb)()
        except Exception as err:  # whatever it is, the user who pressed the button should read it
            words = getattr(err, "brief", None) or str(err) or type(err).__name__
            if self._view is not None:
                self._view.send({"kind": "note", "text": f"{verb}: {words}"}, buffers=[])

    # -- showing

    def _ipython_display_(self) -> None:
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        shell = get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            self.start()
            print(repr(self))  # noqa: T201
            return
        if self.ended:
            data, metadata = self._picture()
            display(data, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]
            return
        from .view import live

        handle = f"labkernel-monitor-{id(self):x}-{len(self._handles)}"
        self._handles.append(handle)
        data = {**self._view_bundle(), "text/plain": f"{self._heading()}: live, needs a running kernel"}
        display(data, metadata=live(self._view.key), raw=True, display_id=handle)  # type: ignore[no-untyped-call]
        self.start()
        if not any(name in os.environ for name in _SHOWN_BY):
            shell.events.register("post_run_cell", self._after_cell)
        if self.duration_s is not None:
            try:
                self.wait()
            except KeyboardInterrupt:
                self.stop()

    def _after_cell(self, _result: Any = None) -> None:
        """Without a browser there is nothing live, and no moment at which a notebook is saved: a picture after each
        cell, until the first sign of a browser."""
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if self.ended or self._seen_by_browser:
            if shell is not None:
                shell.events.unregister("post_run_cell", self._after_cell)
            return
        until = time.monotonic() + _FIRST_SAMPLES_S
        while len(self.series[0].points) < 3 and not self.ended and time.monotonic() < until:
            time.sleep(0.05)
        if not self.ended:
            self._leave_picture()

    def _view_bundle(self) -> dict[str, Any]:
        if self._view is None:
            from .view import MonitorView, answer_while_busy

            self._view = MonitorView(window_s=self.window_s, key=secrets.token_hex(8))
            self._view.on_msg(self._message)
            answer_while_busy(self._view)
        bundle = self._view._repr_mimebundle_()
        return dict(bundle[0] if isinstance(bundle, tuple) else bundle)

    def _heading(self) -> str:
        return self.title or "monitor of " + ", ".join(series.name for series in self.series)

    def figure(self) -> Any:
        """The history so far as a matplotlib figure."""
        from ..measuring.figures import history_figure

        return history_figure(self.series, title=self._heading())

    def _picture(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from ..measuring.figures import mimebundle

        try:
            return mimebundle(self.figure(), repr(self))
        except Exception as err:  # no matplotlib, or its font cache cannot be written: the figures remain as text
            return {"text/plain": f"{self!r}\n(no picture: {err})"}, {}

    def _leave_picture(self) -> None:
        if not self._handles:
            return
        from IPython.display import update_display

        data, metadata = self._picture()
        for handle in self._handles:
            try:
                update_display(data, metadata=metadata, raw=True, display_id=handle)  # type: ignore[no-untyped-call]
            except Exception:  # the kernel is shutting down
                return

    def __repr__(self) -> str:
        return f"{self._heading()}\n{table_text(SUMMARY_HEADER, (summary(series) for series in self.series))}"


def _target(thing: Any, series: Series) -> dict[str, Any]:
    cpus, memory = series.limits.cpus, series.limits.memory_bytes
    return {
        "name": series.name,
        "kind": series.kind,
        "can": _verbs(thing, running=bool(series.points) and not series.ended),
        "cpu": None if cpus is None else cpus * 100,
        "mem": None if memory is None else memory / (1 << 20),
    }


def _verbs(thing: Any, *, running: bool) -> list[str]:
    """What may be done to it now: a machine's figures are followed by pid only, and a pid has no verbs."""
    return [verb for verb in (("stop", "kill") if running else ("start",)) if callable(getattr(thing, verb, None))]
