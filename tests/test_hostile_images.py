"""Hostile archives through every way into a store and under every driver: refused or contained, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkernel.engine import Engine

SCRIPT = Path(__file__).parent / "hostile.py"
LEAST = 115
PEAK_KIB = 200 << 10
"""Of the process that runs the cases, whose own test data is some 90 MiB of it."""


def assert_contained(lines: list[str], outside: Path, driver: str, ways: set[str]) -> None:
    *cases, end = map(json.loads, lines)
    assert end["driver"] == driver
    assert end["problems"] == []
    assert end["peak_kib"] < PEAK_KIB
    assert {case["way"] for case in cases} == ways
    assert len(cases) >= LEAST * min(len(ways), 2)
    for case in cases:
        assert not case["said"].startswith("BUG"), case
        assert not case["left"], case
        assert "\n" not in case["said"]
    assert [(entry.name, entry.stat().st_mode & 0o7777) for entry in os.scandir(outside)] == [("victim", 0o644)]
    assert (outside / "victim").read_text() == "untouched"


def prepare(base: Path) -> Path:
    outside = base / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    (outside / "victim").chmod(0o644)
    return outside


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the driver root needs root")
def test_as_root(tmp_path: Path, fresh_engine: Engine) -> None:
    outside = prepare(tmp_path)
    layout = fresh_engine.layout
    words = [str(layout.root), str(layout.runtime_dir), str(outside), "import", "load", "pull"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "LABKERNEL_DRIVER": "root"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_contained(done.stdout.splitlines(), outside, "root", {"import", "load", "pull"})


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["rootless", "proot"])
def test_as_a_plain_user(plain_user: Any, driver: str) -> None:
    outside = prepare(plain_user.home)
    if os.geteuid() == 0:
        for path in (outside, outside / "victim"):
            os.chown(path, 23456, 23456)
    plain_user.env["LABKERNEL_DRIVER"] = driver
    root, run = plain_user.env["LABKERNEL_ROOT"], plain_user.env["LABKERNEL_RUNTIME_DIR"]
    done = plain_user.python(str(SCRIPT), root, run, str(outside), "pull", timeout_s=900)
    if done.returncode != 0 and "DriverError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1][:200])
    assert done.returncode == 0, done.stderr[-2000:]
    assert_contained(done.stdout.splitlines(), outside, driver, {"pull"})
