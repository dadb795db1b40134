"""How a build shows while it runs: HTML in a notebook, BuildKit's lines in a terminal.

Both are fed with `BuildStep` records (`labkernel.builds`): call the object with each, and `close()` it with the result
or the error. Nothing here knows how to build; records are read by attribute, so any object of that shape will do.
"""

from __future__ import annotations

import html
import re
import sys
import threading
import time
from collections import deque
from typing import Any, Literal, Protocol, TextIO

from ..display import human_size, no_formulas

Mode = Literal["auto", "plain", "tty", "quiet"]
_TAIL_LINES = 8
_TAIL_LINES_FAILED = 30
_KEEP_LINES = 200
_UPDATE_EVERY_S = 0.25
_ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")


class Progress(Protocol):
    """What a build reports to."""

    def __call__(self, step: Any, /) -> None: ...

    def close(self, outcome: Any = None, /) -> None: ...

    def __enter__(self) -> Progress: ...

    def __exit__(self, kind: object, err: BaseException | None, trace: object, /) -> None: ...


def notebook_progress(title: str = "") -> Progress:
    """Progress as one output of the running cell, redrawn at most four times a second; folds when the build is done."""
    return BuildProgress(title=title)


def terminal_progress(stream: TextIO | None = None, mode: Mode = "auto") -> Progress:
    """Progress as lines on `stream` (stderr, as docker has it).

    `plain` is BuildKit's numbered lines, `tty` one line per step with the running one rewritten in place, `quiet`
    nothing; `auto` is `tty` on a terminal and `plain` elsewhere.
    """
    out = stream or sys.stderr
    if mode == "auto":
        mode = "tty" if out.isatty() else "plain"
    return TerminalProgress(out, mode)


class _Step:
    """What is known of one step so far."""

    def __init__(self, step: Any) -> None:
        self.number = int(step.number)
        self.total = int(step.total)
        self.stage = str(step.stage or "")
        self.text = " ".join(str(step.text).split())
        self.status = "started"
        self.began = time.monotonic()
        self.duration_s: float | None = None
        self.size_bytes: int | None = None
        self.why = ""
        self.lines: deque[str] = deque(maxlen=_KEEP_LINES)
        self._open = ""

    def update(self, step: Any) -> list[str]:
        """Take a record in; returns the output lines it completed."""
        if step.status == "output":
            return self._output(step.output or b"")
        self.total = int(step.total)
        self.status = str(step.status)
        self.duration_s = step.duration_s
        self.size_bytes = step.size_bytes
        self.why = str(step.why or "")
        rest, self._open = self._open, ""
        if rest:
            self.lines.append(rest)
        return [rest] if rest else []

    def _output(self, data: bytes | str) -> list[str]:
        text = data.decode(errors="replace") if isinstance(data, bytes) else data
        *full, self._open = (self._open + _ANSI.sub("", text)).replace("\r\n", "\n").split("\n")
        # A carriage return writes the line again (progress bars): what came last is what a terminal would show.
        done = [line.rstrip("\r").rpartition("\r")[2] for line in full]
        self._open = self._open[-4096:].rpartition("\r")[2] if not self._open.endswith("\r") else self._open[-4096:]
        self.lines.extend(done)
        return done

    @property
    def tail(self) -> list[str]:
        return [*self.lines, *([self._open.rstrip("\r")] if self._open else [])]

    @property
    def label(self) -> str:
        stage = f"{self.stage} " if self.stage and not self.stage.isdigit() else ""
        return f"[{stage}{self.number}/{self.total}]"

    @property
    def reason(self) -> str:
        """Why it was not taken from the cache, where that tells something about this step."""
        told = ("not built before", "--no-cache", "follows ")
        return "" if self.status != "done" or self.why.startswith(told) else self.why

    @property
    def running(self) -> bool:
        return self.status in ("started", "output")

    @property
    def seconds(self) -> float:
        # A running step's record may already hold a zero: its clock is ours until it has ended.
        return time.monotonic() - self.began if self.running or self.duration_s is None else self.duration_s


class _Steps:
    """The steps of one build in the order in which they began. Several may run at the same time."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, int], _Step] = {}
        self.began = time.monotonic()

    def take(self, record: Any) -> tuple[_Step, list[str], bool]:
        """(step, lines it completed, whether it is new)"""
        key = (str(record.stage or ""), int(record.number))
        step = self._by_key.get(key)
        new = step is None
        if step is None:
            step = self._by_key[key] = _Step(record)
        return step, step.update(record), new

    def __iter__(self) -> Any:
        return iter(list(self._by_key.values()))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def _clock(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 100 else f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


# -- notebook

_MARKS = {
    "cached": ("●", "cached"),
    "done": ("✓", "done"),
    "failed": ("✗", "failed"),
    "started": ("▸", "running"),
    "stopped": ("■", "stopped"),
}
_COLOURS = {
    "cached": "var(--jp-info-color1, #0072b2)",
    "done": "var(--jp-success-color1, #2e7d32)",
    "failed": "var(--jp-error-color1, #c62828)",
    "started": "var(--jp-warn-color1, #e65100)",
    "stopped": "var(--jp-warn-color1, #e65100)",
}
# JupyterLab's own rule for tables in outputs is a fixed layout with striped rows.
_TABLE = "table-layout:auto;width:100%;max-width:1000px;border-collapse:collapse;margin:4px 0"
_MUTED = "var(--jp-ui-font-color2, #666)"
_MONO = "font-family:var(--jp-code-font-family, monospace);font-size:var(--jp-code-font-size, 13px)"


class BuildProgress:
    """See `notebook_progress`. Redraws from a timer too, so that a silent step's clock moves.

    As a context manager it closes itself, with the exception when there is one. `dockerfile` is the text that is built;
    what is shown comes from the steps alone.
    """

    def __init__(self, dockerfile: str = "", *, title: str = "") -> None:
        self._title = title
        self._steps = _Steps()
        self._outcome: Any = None
        self._closed = False
        self._lock = threading.Lock()
        self._handle: Any = None
        self._shown_at = self._due = 0.0
        self._timer: threading.Timer | None = None

    def __call__(self, step: Any) -> None:
        with self._lock:
            self._steps.take(step)
            wait = self._shown_at + _UPDATE_EVERY_S - time.monotonic()
            if wait > 0:
                self._later(wait)
            else:
                self._show()
                self._later(1.0)

    def close(self, outcome: Any = None) -> None:
        """The build ended: with its result, or with the exception that ended it."""
        with self._lock:
            self._outcome, self._closed = outcome, True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            # What could not be read has no steps: the error alone tells all there is.
            if self._handle is not None or not isinstance(outcome, BaseException):
                self._show()

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(self, _kind: object, err: BaseException | None, _trace: object) -> None:
        self.close(err)

    def _later(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        if self._closed or (self._timer is not None and self._due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = threading.Timer(seconds, self._tick)
        self._timer.daemon = True
        self._timer.start()

    def _tick(self) -> None:
        with self._lock:
            if self._closed or threading.current_thread() is not self._timer:
                return
            self._timer = None
            self._show()
            self._later(1.0)

    def _show(self) -> None:
        from IPython.display import display

        self._shown_at = time.monotonic()
        data = {"text/html": no_formulas(self.html()), "text/plain": self.text()}
        if self._handle is None:
            # Made in the cell's own thread; later updates find the output by its display id, from any thread.
            self._handle = display(data, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        elif self._handle is not None:
            self._handle.update(data, raw=True)

    def text(self) -> str:
        """The same for a front end without HTML."""
        lines = [self._heading()]
        for step in self._steps:
            size = f" {human_size(step.size_bytes)}" if step.size_bytes else ""
            word = _MARKS[self._look(step)][1]
            lines.append(f"{step.label} {step.text}  {word} {_clock(step.seconds)}{size}")
        return "\n".join(lines)

    def _look(self, step: _Step) -> str:
        if step.running:
            return "stopped" if self._stopped else "started"
        return "stopped" if step.status == "failed" and self._stopped else step.status

    @property
    def _stopped(self) -> bool:
        """The stop button ended it, which is nobody's failure."""
        return isinstance(self._outcome, KeyboardInterrupt)

    def _heading(self) -> str:
        steps = list(self._steps)
        cached = sum(step.status == "cached" for step in steps)
        count = f"{len(steps)} steps" + (f", {cached} cached" if cached else "")
        name = f" {self._title}" if self._title else ""
        if self._stopped:
            return f"Build{name} stopped after {_clock(self._steps.seconds)}"
        if isinstance(self._outcome, BaseException):
            return f"Build{name} failed after {_clock(self._steps.seconds)}"
        if self._closed:
            return f"Built{name} in {_clock(self._steps.seconds)}: {count}"
        total = max((step.total for step in steps), default=0)
        finished = sum(not step.running for step in steps)
        return f"Building{name}: {finished} of {max(total, len(steps))} steps, {_clock(self._steps.seconds)}"

    def html(self) -> str:
        """The steps as a table that folds; open while the build runs and after a failure."""
        folded = self._closed and not isinstance(self._outcome, BaseException)
        rows = "".join(_row_html(step, self._look(step), closed=self._closed) for step in self._steps)
        return (
            f"<details class='labkernel-build'{'' if folded else ' open'}>"
            f"<summary style='cursor:pointer'>{html.escape(self._heading())}</summary>"
            f"<table style='{_TABLE}'>{rows}</table></details>"
        )


def _row_html(step: _Step, look: str, *, closed: bool) -> str:
    mark, word = _MARKS.get(look, ("·", step.status))
    colour = _COLOURS.get(look, "inherit")
    cell = "padding:1px 8px;text-align:left;vertical-align:top;background:none"
    note = word if step.status == "cached" else _clock(step.seconds)
    size = human_size(step.size_bytes) if step.size_bytes else ""
    row = (
        f"<tr style='background:none'><td style='{cell};width:1em;color:{colour}' title='{word}'><b>{mark}</b></td>"
        f"<td style='{cell};width:1%;white-space:nowrap;color:{_MUTED}'>{html.escape(step.label)}</td>"
        f"<td style='{cell};{_MONO};word-break:break-word'>{html.escape(_shortened(step.text))}"
        f"{_reason_html(step)}</td>"
        f"<td style='{cell};width:1%;white-space:nowrap;text-align:right;color:{_MUTED}'>{note}</td>"
        f"<td style='{cell};width:1%;white-space:nowrap;text-align:right;color:{_MUTED}'>{size}</td></tr>"
    )
    failed = step.status == "failed"
    if not (failed or (step.running and not closed)) or not step.tail:
        return row
    lines = step.tail[-(_TAIL_LINES_FAILED if failed else _TAIL_LINES) :]
    text = html.escape("\n".join(line[:300] for line in lines))
    return (
        f"{row}<tr style='background:none'><td></td><td colspan='4' style='{cell}'>"
        f"<pre style='margin:0 0 4px;padding:2px 8px;border-left:3px solid {colour};white-space:pre-wrap;"
        f"{_MONO};opacity:0.85'>{text}</pre></td></tr>"
    )


def _reason_html(step: _Step) -> str:
    if not step.reason:
        return ""
    style = f"font-family:var(--jp-ui-font-family, sans-serif);color:{_MUTED}"
    return f"<div style='{style}'>not cached: {html.escape(step.reason)}</div>"


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# -- terminal


class TerminalProgress:
    """See `terminal_progress`."""

    def __init__(self, stream: TextIO, mode: Mode) -> None:
        self._stream, self._mode = stream, mode
        self._steps = _Steps()
        self._numbers: dict[int, int] = {}
        self._last = 0
        self._status_line = False
        self._drawn_at = 0.0

    def __call__(self, record: Any) -> None:
        step, lines, new = self._steps.take(record)
        if self._mode == "plain":
            self._plain(step, lines, new=new)
        elif self._mode == "tty":
            self._tty(step)

    def close(self, outcome: Any = None) -> None:
        self._wipe()
        if self._mode == "tty" and not isinstance(outcome, BaseException):
            self._write(f"[+] Built in {_clock(self._steps.seconds)} ({len(list(self._steps))} steps)\n")
        self._stream.flush()

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, _kind: object, err: BaseException | None, _trace: object) -> None:
        self.close(err)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    # As `docker build --progress=plain`: every line carries its step's number; a blank line when another one speaks.
    def _plain(self, step: _Step, lines: list[str], *, new: bool) -> None:
        number = self._numbers.setdefault(id(step), len(self._numbers) + 1)
        if self._last not in (0, number):
            self._write("\n")
        if new or self._last != number:
            self._write(f"#{number} {step.label} {step.text}\n")
        self._last = number
        for line in lines:
            self._write(f"#{number} {time.monotonic() - step.began:.3f} {line}\n")
        if step.status == "cached":
            self._write(f"#{number} CACHED\n")
        elif step.status == "done":
            size = f" {human_size(step.size_bytes)}" if step.size_bytes else ""
            why = f"  ({step.reason})" if step.reason else ""
            self._write(f"#{number} DONE {_clock(step.seconds)}{size}{why}\n")
        elif step.status == "failed":
            self._write(f"#{number} ERROR{': ' + step.why if step.why else ''}\n")

    def _tty(self, step: _Step) -> None:
        if step.running:
            if time.monotonic() - self._drawn_at > 0.1:
                self._status(step)
            return
        self._wipe()
        mark = " => CACHED " if step.status == "cached" else " => ERROR " if step.status == "failed" else " => "
        size = f"  {human_size(step.size_bytes)}" if step.size_bytes else ""
        self._write(f"{mark}{step.label} {_shortened(step.text, self._width() - 28)}  {_clock(step.seconds)}{size}\n")
        if step.reason:
            self._write(f"    {step.reason}\n")
        if step.status == "failed":
            self._write("".join(f" > {line}\n" for line in step.tail[-_TAIL_LINES_FAILED:]))

    def _status(self, step: _Step) -> None:
        self._wipe()
        tail = step.tail[-1] if step.tail else ""
        line = f" => {step.label} {step.text}  {_clock(step.seconds)}" + (f"  | {tail}" if tail else "")
        self._write(_shortened(line, self._width() - 1))
        self._status_line, self._drawn_at = True, time.monotonic()

    def _wipe(self) -> None:
        if self._status_line:
            self._write("\r\x1b[2K")
            self._status_line = False

    def _width(self) -> int:
        import shutil

        return max(40, shutil.get_terminal_size().columns)
