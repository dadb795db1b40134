"""A build of which nothing has changed is told without the builder; everything that could change it is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import __version__
from labkernel.building.unchanged import find
from labkernel.engine import Engine
from labkernel.terminal import TerminalHost, run

DOCKERFILE = "FROM unchanged-base\nCOPY tree /tree\nCOPY *.txt /texts/\nRUN echo made > /made\n"


class Place:
    """A context beside a store, and `labkernel build` in it."""

    def __init__(self, engine: Engine, base: Path) -> None:
        self.engine = engine
        self.context = base / "context"
        (self.context / "tree/deep").mkdir(parents=True)
        (self.context / "tree/deep/one").write_text("one")
        (self.context / "a.txt").write_text(base.name)
        (self.context / "Dockerfile").write_text(DOCKERFILE)
        (self.context / ".dockerignore").write_text("left-out\n")
        engine.images.tag("lab/busybox", "unchanged-base")

    def words(self, *flags: str) -> list[str]:
        return ["build", "--progress=plain", "-t", "unchanged-out", *flags, str(self.context)]

    def build(self, *flags: str) -> None:
        self.settle()
        words = self.words(*flags)
        assert run(words, TerminalHost(lambda: self.engine, words=words)) == 0

    def settle(self) -> None:
        """Until every file is older than the clock's tick, as it is for people."""
        paths = [self.context, *self.context.rglob("*")]
        while time.time_ns() - max(os.lstat(path).st_ctime_ns for path in paths) < 200_000_000:
            time.sleep(0.05)

    def found(self, *flags: str) -> dict[str, Any] | None:
        return find(self.words(*flags)[1:], __version__)


@pytest.fixture
def place(shared_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    shared_engine.images.resolve("lab/busybox", notify=lambda text: None)
    monkeypatch.setenv("LABKERNEL_ROOT", str(shared_engine.layout.root))
    made = Place(shared_engine, tmp_path)
    yield made
    for name in ("unchanged-out", "unchanged-base"):
        if shared_engine.images.find(name) is not None:
            shared_engine.images.remove(name, force=True)


def test_says_what_the_build_would_say(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.build()
    place.build()
    capfd.readouterr()
    place.build()
    slow = capfd.readouterr()
    command = [sys.executable, "-X", "importtime", "-m", "labkernel.cli", *place.words()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    quick = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.stdout == slow.out
    assert quick == slow.err.splitlines()
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"click", "labkernel.engine", "labkernel.builds", "typing", "json"}


def _edit_keeping_time(place: Place) -> None:
    path = place.context / "tree/deep/one"
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _retag(place: Place) -> None:
    other = place.engine.builds.build("FROM lab/busybox\nLABEL other=base\n", tags=["unchanged-base"])
    assert other.image.id


CHANGES: dict[str, Callable[[Place], object]] = {
    "a file with its old size and time": _edit_keeping_time,
    "a new file": lambda place: (place.context / "tree/deep/new").write_text("x"),
    "a file less": lambda place: (place.context / "tree/deep/one").unlink(),
    "a new match of a pattern": lambda place: (place.context / "b.txt").write_text("x"),
    "another mode": lambda place: (place.context / "tree").chmod(0o700),
    "the Dockerfile": lambda place: (place.context / "Dockerfile").write_text(DOCKERFILE + "LABEL x=y\n"),
    "the ignore file": lambda place: (place.context / ".dockerignore").write_text("tree/deep\n"),
    "an ignore file of its own": lambda place: (place.context / "Dockerfile.dockerignore").write_text("tree/deep\n"),
    "another base": _retag,
    "no image": lambda place: place.engine.images.remove("unchanged-out", force=True),
    "another image of that name": lambda place: place.engine.images.tag("lab/busybox", "unchanged-out"),
    "no cache": lambda place: place.engine.builds.prune(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(place: Place, change: str) -> None:
    place.build()
    record = place.found()
    assert record is not None
    assert record["image"] == place.engine.images.get("unchanged-out").id
    CHANGES[change](place)
    assert place.found() is None
    place.build()
    after = place.found()
    assert after is not None
    assert after["image"] == place.engine.images.get("unchanged-out").id


def test_other_words_and_variables_are_another_build(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.build()
    assert place.found() is not None
    assert place.found("--build-arg=A=b") is None
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.context.parent))
    assert place.found() is None
    place.build()
    assert place.found() is not None
    (place.context.parent / "labkernel").mkdir()
    (place.context.parent / "labkernel/contexts.json").write_text('{"current": "elsewhere"}')
    assert place.found() is None
    (place.context.parent / "labkernel/contexts.json").unlink()
    monkeypatch.setenv("LABKERNEL_DRIVER", "proot")
    assert place.found() is None


@pytest.mark.parametrize("flags", [("--no-cache",), ("--build-arg", "PATH"), ("--secret", "id=x,src=/etc/hostname")])
def test_what_cannot_be_looked_at_again_is_built(place: Place, flags: tuple[str, ...]) -> None:
    place.build(*flags)
    assert place.found(*flags) is None


def test_a_young_file_is_not_trusted(place: Place) -> None:
    place.settle()
    words = place.words()
    (place.context / "a.txt").write_text("just now")
    began = (place.context / "a.txt").stat().st_ctime_ns
    assert run(words, TerminalHost(lambda: place.engine, words=words)) == 0
    record = place.found()
    # On a machine slow enough the file was old already when the build began.
    assert record is None or record["built_ns"] - began > 100_000_000


def test_links_and_exceptions_are_left_to_the_build(place: Place) -> None:
    (place.context / "link").symlink_to("tree")
    (place.context / "Dockerfile").write_text("FROM unchanged-base\nCOPY link/deep /deep\n")
    place.build()
    assert place.found() is None
    (place.context / "Dockerfile").write_text(DOCKERFILE)
    (place.context / ".dockerignore").write_text("*\n!tree/deep/*\n!a.txt\n")
    place.build()
    assert place.found() is None
