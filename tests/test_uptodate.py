"""The short way of a pull that finds everything as it is says what the long way says, and gives way to it otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from registries import Answer, MadeImage, Scripted, scripted

from labkernel.engine import Engine
from labkernel.imaging import uptodate


@pytest.fixture
def fake() -> Iterator[Scripted]:
    with scripted() as registry:
        yield registry


@pytest.fixture
def name(fresh_engine: Engine, fake: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("LABKERNEL_ROOT", str(fresh_engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(fresh_engine.layout.runtime_dir))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("LABKERNEL_REGISTRIES", raising=False)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)
    if machine is None:
        pytest.skip(f"the short way knows no {os.uname().machine}")
    fake.hold(MadeImage({"a": b"1"}, {"b": b"2"}, architecture=machine))
    fresh_engine.pulls.pull(f"{fake.domain}/lab/two")
    return f"{fake.domain}/lab/two"


def pull(*words: str, **env: str) -> str:
    argv = [sys.executable, "-m", "labkernel.cli", "pull", *words]
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_it_says_what_a_pull_says(name: str, tmp_path: Path) -> None:
    settings = tmp_path / "empty.toml"
    settings.write_text("")
    for words in ([name], [f"{name}:latest"], ["-q", name]):
        lines = uptodate.find(words)
        assert lines is not None
        assert pull(*words, LABKERNEL_REGISTRIES=str(settings)) == "".join(f"{line}\n" for line in lines)
        assert pull(*words).splitlines() == lines


def test_it_gives_way_when_anything_is_not_plain(name: str, fake: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (
        [],
        [name, name],
        ["-a", name],
        ["--platform", "linux/arm64", name],
        ["busybox"],
        [f"{name}@sha256:0"],
    ):
        assert uptodate.find(words) is None
    assert uptodate.find([f"{name}:other"]) is None
    fake.rules.append(lambda handler: Answer(b"", 401, WWW_Authenticate='Basic realm="x"'))
    assert uptodate.find([name]) is None
    fake.rules.clear()
    monkeypatch.setenv("LABKERNEL_REGISTRIES", "/x")
    assert uptodate.find([name]) is None


def test_it_gives_way_when_something_has_changed_or_is_missing(name: str, fake: Scripted, fresh_engine: Engine) -> None:
    image = fresh_engine.images.get(name)
    layer = fresh_engine.images.layer_path(image.layers[0])
    shutil.move(layer, f"{layer}-away")
    assert uptodate.find([name]) is None
    shutil.move(f"{layer}-away", layer)
    blob = fresh_engine.images.blobs.path(image.layers[1].digest)
    os.rename(blob, f"{blob}.away")
    assert uptodate.find([name]) is None
    os.rename(f"{blob}.away", blob)
    assert uptodate.find([name]) is not None
    fake.hold(MadeImage({"a": b"another"}))
    assert uptodate.find([name]) is None
    assert pull("-q", name) == f"{name}:latest\n"
    assert uptodate.find([name]) is not None
    fake.close()
    assert uptodate.find([name]) is None
