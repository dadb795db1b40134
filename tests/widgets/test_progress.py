"""Build progress from made-up step records: lines for terminals, one output for notebooks."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest

from labkernel.widgets.progress import BuildProgress, notebook_progress, terminal_progress


def step(number: int, status: str, text: str = "RUN make", **parts: Any) -> SimpleNamespace:
    given = {"total": 3, "stage": "", "line": 1, "end_line": 1, "duration_s": None, "size_bytes": None, "why": ""}
    return SimpleNamespace(number=number, status=status, text=text, **{**given, "output": b"", **parts})


def a_build(progress: Any) -> None:
    progress(step(1, "started", "FROM busybox"))
    progress(step(1, "cached", "FROM busybox", duration_s=0.0))
    progress(step(2, "started"))
    progress(step(2, "output", output=b"hel"))
    progress(step(2, "output", output=b"lo\n 10%\r 50%\r100%\n\x1b[31mred\x1b[0m"))
    progress(step(2, "done", duration_s=1.25, size_bytes=2_500_000))


def test_plain_lines_are_buildkits() -> None:
    out = io.StringIO()
    progress = terminal_progress(out, "plain")
    a_build(progress)
    progress(step(3, "started", "RUN false"))
    progress(step(3, "failed", "RUN false", duration_s=0.1, why="exit status 1"))
    progress.close(RuntimeError("x"))
    lines = re.sub(r"#2 \d\.\d{3} ", "#2 T ", out.getvalue()).splitlines()
    assert lines == [
        "#1 [1/3] FROM busybox",
        "#1 CACHED",
        "",
        "#2 [2/3] RUN make",
        "#2 T hello",
        "#2 T 100%",
        "#2 T red",
        "#2 DONE 1.2s 2.5MB",
        "",
        "#3 [3/3] RUN false",
        "#3 ERROR: exit status 1",
    ]


def test_auto_is_plain_without_a_terminal_and_quiet_is_silent() -> None:
    out, silent = io.StringIO(), io.StringIO()
    a_build(terminal_progress(out))
    assert out.getvalue().startswith("#1 [1/3] FROM")
    quiet = terminal_progress(silent, "quiet")
    a_build(quiet)
    quiet.close()
    assert silent.getvalue() == ""


def test_a_terminal_keeps_one_line_per_step() -> None:
    out = io.StringIO()
    with terminal_progress(out, "tty") as progress:
        a_build(progress)
    kept = [line.rpartition("\r\x1b[2K")[2] for line in out.getvalue().rstrip("\n").split("\n")]
    assert kept == [" => CACHED [1/3] FROM busybox  0.0s", " => [2/3] RUN make  1.2s  2.5MB", kept[-1]]
    assert kept[-1].startswith("[+] Built in ")


def test_interleaved_stages_keep_their_numbers() -> None:
    out = io.StringIO()
    progress = terminal_progress(out, "plain")
    progress(step(1, "started", "RUN a", stage="one"))
    progress(step(1, "started", "RUN b", stage="two"))
    progress(step(1, "output", "RUN a", stage="one", output=b"from a\n"))
    assert re.findall(r"^#(\d) (?:\S+ )?(.*)$", out.getvalue(), re.M) == [
        ("1", "1/3] RUN a"),
        ("2", "1/3] RUN b"),
        ("1", "1/3] RUN a"),
        ("1", "from a"),
    ]


class Handle:
    def __init__(self, shown: list[dict[str, str]]) -> None:
        self.shown = shown

    def update(self, data: dict[str, str], **_: Any) -> None:
        self.shown.append(data)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    outputs: list[dict[str, str]] = []

    def display(data: dict[str, str], **_: Any) -> Handle:
        outputs.append(data)
        return Handle(outputs)

    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def test_a_notebook_shows_one_output_that_folds(shown: list[dict[str, str]]) -> None:
    progress = notebook_progress("web")
    a_build(progress)
    progress.close(object())
    assert len(shown) <= 3, "redraws are limited to a few a second"
    last = shown[-1]["text/html"]
    assert last.startswith("<div class='tex2jax_ignore mathjax_ignore'><details class='labkernel-build'><summary")
    assert "Built web in" in last
    assert "2 steps, 1 cached" in last
    assert "2.5MB" in last
    assert "hello" not in last, "the output of a step that went well is folded away"


def test_a_failure_stays_open_with_its_output(shown: list[dict[str, str]]) -> None:
    with pytest.raises(RuntimeError), BuildProgress("FROM x") as progress:  # noqa: PT012
        progress(step(1, "started", "RUN <b>"))
        progress(step(1, "output", "RUN <b>", output=b"<script>oops\n"))
        progress(step(1, "failed", "RUN <b>", duration_s=0.2))
        raise RuntimeError("failed")
    last = shown[-1]["text/html"]
    assert " open>" in last
    assert "&lt;script&gt;oops" in last
    assert "<script>" not in last
    assert "RUN &lt;b&gt;" in last
    assert "failed" in shown[-1]["text/plain"]


def test_the_stop_button_is_no_failure(shown: list[dict[str, str]]) -> None:
    with pytest.raises(KeyboardInterrupt), BuildProgress() as progress:  # noqa: PT012
        progress(step(1, "started"))
        progress(step(1, "output", output=b"so far\n"))
        progress(step(1, "failed", duration_s=0.2))
        raise KeyboardInterrupt
    last = shown[-1]["text/html"]
    assert "Build stopped after" in last
    assert "title='stopped'" in last
    assert "so far" in last
    assert "failed" not in last + shown[-1]["text/plain"]


def test_what_could_not_be_read_shows_no_empty_table(shown: list[dict[str, str]]) -> None:
    BuildProgress("FRM x").close(RuntimeError("unknown instruction"))
    assert shown == []


def test_a_silent_step_is_redrawn_by_the_timer(shown: list[dict[str, str]]) -> None:
    progress = notebook_progress()
    progress(step(1, "started"))
    progress(step(1, "output", output=b"late\n"))
    timer = progress._timer  # type: ignore[attr-defined]
    timer.join(timeout=10)
    assert "late" in shown[-1]["text/html"]
    progress.close()
