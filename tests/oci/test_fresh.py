"""Filling and packing in one pass gives what placing and packing one after the other give, on disk and in the tar."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import LayerError
from labkernel.oci import selection, steps
from labkernel.oci.rootfd import Root

EPOCH_S = 1_500_000_000


@pytest.fixture
def context(tmp_path: Path) -> Path:
    base = tmp_path / "context"
    (base / "src/deep/deeper").mkdir(parents=True)
    (base / "src/empty").mkdir(mode=0o711)
    (base / "src/a").write_bytes(b"")
    (base / "src/deep/b").write_bytes(os.urandom(3_000_000))
    (base / "src/deep/deeper/run").write_text("#!/bin/sh\n")
    (base / "src/deep/deeper/run").chmod(0o4755)
    (base / "src/deep.txt").write_text("sorts between a directory's name and its content")
    (base / f"src/{'long' * 50}").write_text("a name for PAX")
    (base / "src/link").symlink_to("deep/nowhere")
    os.mkfifo(base / "src/pipe", 0o622)
    with (base / "src/sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
    os.utime(base / "src/a", ns=(1, 1_234_567_890_123_456_789))
    (base / "src/deep").chmod(0o2750)
    return base


def tree(path: Path) -> dict[str, Any]:
    found = {}
    for name in sorted(path.rglob("*")):
        status = name.lstat()
        data = name.read_bytes() if stat.S_ISREG(status.st_mode) else None
        attributes = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        found[str(name.relative_to(path))] = (*attributes, data)
    return found


def make(
    context: Path, base: Path, *, dest: str = "/app/new", clamp_s: int | None = EPOCH_S, **more: Any
) -> tuple[dict[str, Any], Path]:
    (base / "layers").mkdir(parents=True)
    (base / "work").mkdir()
    lower = base / "lower"
    (lower / "app").mkdir(parents=True)
    with Root.open(str(context)) as root:
        selected = selection.select(root, ["src"])
        common = {"unpack": False, "owner": "", "archive_owner": None, "chmod": None, "mtime_ns": EPOCH_S * 10**9}
        operation = {"do": "copy", "from": 0, "selected": selected, "dest": dest, **common, **more}
        (base / "plan").write_text(json.dumps([operation]))
        done = steps.make_layer(
            base=str(base / "work"),
            lowers=[str(lower)],
            plan=str(base / "plan"),
            layers=str(base / "layers"),
            fds=[root.fd],
            clamp_s=clamp_s,
        )
    return done, base / "layers" / done["diff_id"][7:]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts an overlay, so root or a namespace is needed")
@pytest.mark.parametrize(
    "more", [{}, {"owner": "12:34"}, {"chmod": "u=rwX,go="}, {"dest": "/not/there/yet"}], ids=["plain", *"och"]
)
def test_the_same_as_in_two_passes(
    context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    used: list[bytes] = []
    fresh = steps.fresh_target

    def noted(*args: Any) -> bytes | None:
        used.extend([target] if (target := fresh(*args)) else [])
        return target

    monkeypatch.setattr(steps, "fresh_target", noted)
    first, one = make(context, tmp_path / "one", **more)
    assert used == [more.get("dest", "/app/new").strip("/").encode()]
    monkeypatch.setattr(steps, "fresh_target", lambda *args: None)
    second, other = make(context, tmp_path / "other", **more)
    assert tree(one) == tree(other)
    assert first == second


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts an overlay, so root or a namespace is needed")
def test_the_layer_on_disk_has_the_times_of_its_tar(context: Path, tmp_path: Path) -> None:
    _, layer = make(context, tmp_path / "one")
    times = [values[3] for values in tree(layer).values()]
    assert max(times) == EPOCH_S * 10**9
    assert min(times) == 1_234_567_890_123_456_789


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts an overlay, so root or a namespace is needed")
def test_a_file_that_changes_meanwhile(context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select = selection.select

    def changed(root: Root, patterns: Sequence[str]) -> list[dict[str, Any]]:
        found = select(root, patterns)
        (context / "src/a").write_text("longer")
        return found

    monkeypatch.setattr(selection, "select", changed)
    with pytest.raises(LayerError, match="app/new/a changed while"):
        make(context, tmp_path / "one")
    assert not list((tmp_path / "one/layers").iterdir())
