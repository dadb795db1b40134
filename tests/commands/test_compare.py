"""`compare`: which of its experiments a line means, and what is refused before anything is measured."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labkernel.commands.compare import _telling, compare
from labkernel.commands.grammar import invoke
from labkernel.commands.tree import ROOT
from labkernel.errors import UsageError


class Comparisons:
    """Takes calls down in the place of the service."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, {k: v for k, v in options.items() if k != "notify"}))
            return SimpleNamespace(to_json=lambda: "{}", to_png=lambda: b"png", text=lambda: "the table")

        return call


def run(line: str, folder: Path = Path(), **more: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    comparisons = Comparisons()
    host: Any = SimpleNamespace(
        engine=SimpleNamespace(comparisons=comparisons),
        working_dir=lambda: folder,
        note=print,
        line=print,
        stdin_fd=lambda: None,
        **{"notebook": False, **more},
    )
    invoke(ROOT, ["compare", *line.split()], host, "labkernel")
    return comparisons.calls[0]


def test_a_line_names_its_experiment() -> None:
    assert run("hello -- true")[:2] == ("compare", ("hello", ["true"]))
    assert run("hello --workload syscall,exec -n 2")[1] == ("hello", "syscall,exec")
    name, args, options = run("hello --rows bare,vm -- sh -c ls")
    assert (name, args[0], options["rows"], options["command"]) == ("measure", "hello", "bare,vm", ["sh", "-c", "ls"])
    assert run("--rows all hello -- true")[2].get("rows") is None
    assert run("density hello --memory 8g") == ("density", ("hello",), {"memory": "8g"})
    assert run("isolation")[:2] == ("isolation", ("busybox",))
    assert run("portability hello --docker-context far")[2] == {"docker_context": "far"}
    assert run("density -- true")[:2] == ("compare", ("density", ["true"])), "an image may be called density"


def test_saved_figures_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("A")
    (tmp_path / "b.json").write_text("B")
    assert run("show a.json b.json", tmp_path)[:2] == ("saved", ("A", "B"))


def test_in_a_cell_what_happens_is_one_line_that_opens() -> None:
    drawn: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def live() -> Iterator[Any]:
        yield lambda text, html: drawn.append((text, html))

    host: Any = SimpleNamespace(notebook=True, live=live)
    with _telling(host) as tell:
        tell("making ready: <bare>")
        tell("run 1 of 1")
    assert [text for text, _ in drawn] == ["making ready: <bare>", "run 1 of 1", "making ready: <bare>\nrun 1 of 1"]
    assert "run 1 of 1</summary>" in drawn[1][1]
    assert "measured in 2 steps</summary>" in drawn[2][1]
    assert "&lt;bare&gt;" in drawn[2][1]
    host = SimpleNamespace(notebook=False, note=drawn.append)
    with _telling(host) as tell:
        tell("a line")
    assert drawn[-1] == "a line"


def test_what_cannot_be_saved_is_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that became full while it was measured: nothing measured is lost, nor is the file of last time."""
    run("hello --json a.json --png a.png -- true", tmp_path)
    assert (tmp_path / "a.json").read_text() == "{}\n"
    assert (tmp_path / "a.png").read_bytes() == b"png"
    (tmp_path / "a.json").write_text("the one of last time")

    def full(_file: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    said: list[str] = []
    live = lambda: contextlib.nullcontext(lambda *_: None)  # noqa: E731
    run("hello --json a.json -- true", tmp_path, notebook=True, warn=said.append, live=live)
    assert said[0].startswith("a.json was not written: No space left on device")
    with pytest.raises(UsageError, match=r"a.json was not written: No space.*; a.png was not written") as caught:
        run("hello --json a.json --png a.png -- true", tmp_path)
    assert caught.value.exit_code == 1
    assert "the table" in capsys.readouterr().out
    assert (tmp_path / "a.json").read_text() == "the one of last time"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("isolation --png x.png", "no picture"),
        ("density a b", "takes one image"),
        ("hello --workload all -- true", "either --workload or a command"),
        ("show", "takes one file"),
        ("show none.json", "cannot read"),
        ("hello --json no/where.json -- true", "no such directory"),
    ],
)
def test_bad_lines_are_refused_before_anything_is_measured(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        run(line, tmp_path)


def test_the_help_names_every_experiment() -> None:
    help_text = compare.help or ""
    for word in ("density", "isolation", "portability", "show", "--workload", "--rows"):
        assert word in help_text
