"""The kernel's half of lab.monitor(): what it sends, when it ends, what it leaves. The browser's half: tests/ui."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

from labkernel.errors import UsageError
from labkernel.metrics import Event, Limits, Sample, Sampler, Series
from labkernel.widgets.monitor import Monitor, _Feed, monitor


class Work:
    """A process that is followed like a container without a cgroup."""

    def __init__(self, name: str = "web") -> None:
        self.name = name
        self.process = subprocess.Popen(["sleep", "60"])

    def runtime_state(self) -> dict[str, Any]:
        code = self.process.poll()
        if code is None:
            return {"status": "running", "pid": self.process.pid, "cgroup": {"version": 0, "paths": {}}}
        return {"status": "exited", "exit_code": code}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def work() -> Any:
    made = Work()
    yield made
    made.end()


class View:
    """Stands where the anywidget stands."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, Any], list[tuple[float, ...]]]] = []

    def send(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        self.sent.append((message, list(struct.iter_unpack("<5d", buffers[0]))))


def a_monitor(*things: Any, **options: Any) -> tuple[Monitor, View]:
    made, view = monitor(*things, **options), View()
    made._view = view
    return made, view


def test_first_frames_are_full_and_later_ones_bring_what_is_new(work: Work) -> None:
    made, view = a_monitor(work)
    made.tick()
    made.tick()
    message, rows = view.sent[-1]
    assert message["full"]
    assert message["counts"] == [2]
    assert message["fresh"] == [1]
    assert message["targets"] == [{"name": "web", "kind": "container", "can": [], "cpu": None, "mem": None}]
    assert [mark["kind"] for mark in message["marks"]] == ["start"]
    assert math.isnan(rows[0][1])
    assert rows[1][2] > 0
    made._origin -= 100
    made.tick()
    message, rows = view.sent[-1]
    assert not message["full"]
    assert len(rows) == 1
    assert "targets" not in message
    assert message["marks"] == []
    made._message(None, {"kind": "hello"}, [])
    made.tick()
    assert view.sent[-1][0]["full"], "a page that was reloaded asks for everything"
    made.stop()


def test_gaps_are_sent_as_nan() -> None:
    made, view = a_monitor({"status": "created"})
    series = made.series[0]
    series.points.extend([Sample(time.monotonic(), 0, 1)])
    made._push()
    series.points.append(None)
    made._push()
    made._push()
    assert [message["fresh"] for message, _ in view.sent] == [[1], [1], [0]]
    assert all(math.isnan(figure) for figure in view.sent[1][1][-1][1:])


def test_it_ends_with_its_targets_and_leaves_a_picture(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.update_display", lambda data, **_: updates.append(data))
    made, view = a_monitor(work, hz=10)
    made._handles.append("x")
    made.start()
    wait_until(lambda: made.series[0].samples)
    work.end()
    assert made.wait(30)
    assert view.sent[-1][0]["state"] == "ended"
    assert [mark["kind"] for mark in view.sent[-1][0]["marks"]] == ["start", "stop"]
    assert set(updates[0]) == {"image/png", "text/plain"}
    assert "ended" in repr(made)


def test_a_target_that_is_removed_has_ended(work: Work) -> None:
    made, _ = a_monitor(work, hz=10)
    from labkernel.errors import NoSuchContainer

    def gone() -> dict[str, Any]:
        raise NoSuchContainer("web")

    made.start()
    work.runtime_state = gone  # type: ignore[method-assign]
    work.end()
    assert made.wait(30)


def test_stop_and_duration_end_it(work: Work) -> None:
    made, _ = a_monitor(work)
    made.start()
    made._message(None, {"kind": "stop"}, [])
    assert made.wait(30)
    timed, _ = a_monitor(work, duration_s=0.3)
    assert timed.start().wait(30)


def test_a_dead_page_does_not_end_the_measuring(work: Work) -> None:
    made = monitor(work)

    class Dead:
        def send(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("comm is closed")

    made._view = Dead()
    made.tick()
    made.tick()
    assert len(made.series[0].samples) == 2
    made.stop()


def test_no_picture_without_matplotlib(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data, _ = monitor(work)._picture()
    assert set(data) == {"text/plain"}
    assert "no picture" in data["text/plain"]


def test_a_frame_is_cheap() -> None:
    """Of twenty curves it brings one point each and no words: no name, limit or mark is sent again."""
    made, view = a_monitor([{"status": "running", "pid": os.getpid(), "cgroup": {}}] * 20)
    made.tick()
    made._origin -= 100
    costs = []
    for _ in range(50):
        made.tick()
        costs.append(made.frame_cpu_s)
    print(f"a frame of 20 targets without the comm: {sorted(costs)[25] * 1e3:.2f} ms of CPU")
    made._sampler.stop()
    message, rows = view.sent[-1]
    assert len(rows) == 20
    assert len(json.dumps(message)) < 400
    assert message["marks"] == []
    assert "targets" not in message


def test_bad_calls_are_refused(work: Work) -> None:
    with pytest.raises(UsageError, match="nothing to monitor"):
        monitor()
    with pytest.raises(UsageError, match="not between"):
        monitor(work, hz=100)
    with pytest.raises(UsageError, match="cannot be monitored"):
        monitor("web")
    with pytest.raises(UsageError, match="21 curves in one plot"):
        monitor([work] * 21)


def test_a_clock_that_jumps_bends_no_curve(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(work)
    made.history = SimpleNamespace(list=lambda **_options: [])
    real = time.time
    for ahead in (0.0, 86400.0, -86400.0, 0.0):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
        made._asked_events_at = 0.0
        made.tick()
    times = [sample.time_s for sample in made.series[0].samples]
    assert times == sorted(times)
    assert times[-1] - times[0] < 3600
    assert all(percent < 1e6 for _, percent in made.series[0].cpu_percent())
    made._sampler.stop()


def test_the_figure_draws_gaps_limits_and_events() -> None:
    made, _ = a_monitor({"status": "created"}, title="a title")
    series = made.series[0]
    series.limits = series.limits._replace(memory_bytes=64 << 20, cpus=0.5)
    for i in range(10):
        series.points.append(None if i == 5 else Sample(float(i), i * 100_000, 10 << 20, pids=2, throttled_usec=i))
    series.events.extend([Event(0.0, "start"), Event(8.0, "oom"), Event(9.0, "stop", "137")])
    figure = made.figure()
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == ["CPU", "memory", "throttled", "processes"]
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"start", "OOM kill", "stop (137)", "limit 50 %", "limit 64 MiB"} <= words


def test_words_in_the_figure_do_not_lie_over_each_other() -> None:
    made, _ = a_monitor({"status": "created"})
    series = made.series[0]
    series.limits = series.limits._replace(cpus=0.1)
    series.points.extend(Sample(i / 5, i * 15_000, 10 << 20) for i in range(50))
    happened = [(0.0, "start", ""), (0.0, "throttled", ""), (4.0, "exec", "sh -c 'echo one'"), (4.1, "exec", "true")]
    for time_s, kind, text in [*happened, (9.6, "oom", ""), (9.8, "stop", "137")]:
        series.mark(Event(time_s, kind, text))
    figure = made.figure()
    figure.canvas.draw()
    cpu = figure.axes[0]
    boxes = [text.get_window_extent() for text in cpu.texts]
    assert len(boxes) == 7, "six events and the limit"
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    whole = cpu.get_window_extent()
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in boxes), "and none leaves the plot"


def test_what_ended_before_it_was_read_has_a_figure() -> None:
    from labkernel.measuring.figures import history_figure, png

    gone = Series("gone", 10)
    gone.mark(Event(41_000.0, "stop", "0"))
    figure = history_figure([gone])
    assert png(figure).startswith(b"\x89PNG")
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["stop (0)", "nothing was measured: it did not run"]


def test_what_happens_again_and_again_is_said_once_and_to_whom() -> None:
    from labkernel.measuring.figures import history_figure

    many = [Series(name, 200) for name in ("web", "database", "cache")]
    for series in many:
        series.points.extend(Sample(float(i), i, 1 << 20) for i in range(101))
        series.mark(Event(0.1, "start", ""))
    for second in (20.0, 21.0, 22.0, 60.0):
        many[0].mark(Event(second, "oom", ""))
    many[1].mark(Event(40.0, "exec", "ls /"))
    many[1].mark(Event(41.0, "exec", "ls /tmp"))
    many[0].mark(Event(80.0, "stop", "137"))
    many[1].mark(Event(80.0, "stop", "0"))
    figure = history_figure(many)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "start",
        "OOM kill ×3 web",  # noqa: RUF001
        "database exec ls /",
        "database exec ls /tmp",
        "OOM kill web",
        "stop database, web",
    ]
    assert figure.axes[0].get_xlim() == (0, 100)


def test_more_curves_than_colours_are_told_apart() -> None:
    from labkernel.measuring.figures import history_figure

    many = []
    for number in range(20):
        many.append(Series(f"c{number}", 10))
        many[-1].points.extend(Sample(float(i), i, i << 20) for i in range(5))
    looks = {(line.get_color(), line.get_linestyle()) for line in history_figure(many).axes[0].lines}
    assert len(looks) == 20
    assert "nothing was measured" in history_figure([Series("c", 10)]).axes[0].texts[0].get_text()


@pytest.mark.parametrize("count", [2, 8, 20])
@pytest.mark.parametrize("name", ["worker", "a-container-with-a-name-that-somebody-chose-for-its-beauty"])
def test_names_of_any_length_leave_headline_and_legend_apart(name: str, count: int) -> None:
    from labkernel.measuring.figures import history_figure

    many = [Series(f"{name}-{number}" if number else name, 10) for number in range(count)]
    for series in many:
        series.points.extend(Sample(float(i), i, i << 20) for i in range(3))
    figure = history_figure(many, title="monitor of " + ", ".join(series.name for series in many))
    figure.canvas.draw()  # the places of things are known when it was drawn
    [headline] = [text for text in figure.texts if text.get_text().startswith("monitor of")]
    title, legend = headline.get_window_extent(), figure.legends[0].get_window_extent()
    assert not title.overlaps(legend)
    assert title.x0 >= 0
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1


def test_a_figure_shows_itself_without_inline_plots() -> None:
    from IPython.core.formatters import DisplayFormatter

    from labkernel.measuring.figures import history_figure

    data, metadata = DisplayFormatter().format(history_figure([Series("c", 10)]))
    assert set(data) == {"image/png", "text/plain"}
    assert metadata["image/png"]["width"] > 100


def test_limits_say_whose_they_are() -> None:
    from labkernel.measuring.figures import history_figure

    many = [Series(name, 10, Limits(memory_bytes=size << 20)) for name, size in (("a", 8), ("b", 8), ("c", 500))]
    for series in many:
        series.points.extend(Sample(float(i), i, 6 << 20) for i in range(3))
    words = [text.get_text() for text in history_figure(many).axes[1].texts]
    assert words == ["a, b: limit 8 MiB", "c: limit 500 MiB, far above"]


def test_a_button_acts_in_a_thread_and_tells_what_went_wrong(work: Work) -> None:
    made, view = a_monitor(work)
    said: list[str] = []
    work.stop = lambda: said.append("stopped")  # type: ignore[attr-defined]

    def refused() -> None:
        raise UsageError("not now")

    work.kill = refused  # type: ignore[attr-defined]
    made.tick()
    assert view.sent[-1][0]["targets"][0]["can"] == ["stop", "kill"]
    made._message(None, {"kind": "act", "index": 0, "verb": "stop"}, [])
    wait_until(lambda: said)
    made._message(None, {"kind": "act", "index": 0, "verb": "remove"}, [])
    made._message(None, {"kind": "act", "index": 7, "verb": "stop"}, [])
    notes: list[dict[str, Any]] = []
    made._view = SimpleNamespace(send=lambda message, buffers: notes.append(message))
    made._message(None, {"kind": "act", "index": 0, "verb": "kill"}, [])
    wait_until(lambda: notes)
    assert notes[0] == {"kind": "note", "text": "kill: not now"}
    assert said == ["stopped"]
    made.stop()


def test_execs_are_marked_once_and_a_broken_history_ends_nothing(work: Work) -> None:
    made, _ = a_monitor(work)
    work.id = "abc"  # type: ignore[attr-defined]
    now = time.time_ns()
    about = {"Actor": {"ID": "abc"}, "timeNano": now}
    other = {**about, "Actor": {"ID": "other"}}
    events = [
        {**about, "Action": "exec_start: sh -c ls"},
        {**about, "Action": "exec_die"},
        {**other, "Action": "exec_start: x"},
    ]
    made.history = SimpleNamespace(list=lambda since: events)
    made._origin = time.monotonic() - 60
    made.tick()
    made._asked_events_at = 0.0
    made.tick()
    assert [(e.kind, e.text) for e in made.series[0].events] == [("start", ""), ("exec", "sh -c ls")]
    made.history = None
    made.history = SimpleNamespace()
    made._asked_events_at = 0.0
    made.tick()
    made.stop()


def test_throttling_is_marked_where_it_begins() -> None:
    sampler = Sampler({"status": "created"})
    target = sampler._targets[0]
    for second, throttled_ms in enumerate((0, 0, 500, 900, 900, 900)):
        target._mark_throttling(Sample(float(second), 0, 1, throttled_usec=throttled_ms * 1000))
    assert [(event.kind, event.time_s) for event in target.series.events] == [("throttled", 1.0)]
    target._mark_throttling(Sample(60.0, 0, 1, throttled_usec=50_000_000))
    assert len(target.series.events) == 2


def test_each_mark_is_sent_once_however_many_there_are() -> None:
    series = Series("web", 10)
    feed = _Feed(series, 10)
    sent = []
    for number in range(600):
        series.mark(Event(float(number), "exec", str(number)))
        if number % 2:
            sent += [mark["text"] for mark in feed.marks(0, 0.0, everything=False)]
    assert sent == [str(number) for number in range(600)]
    assert len(feed.marks(0, 0.0, everything=True)) == 256, "only so many are kept"
    assert feed.marks(0, 0.0, everything=False) == []
