"""The rate of the time stamp counter that emulated guests are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkernel.qemu import tsc


def test_the_rate_is_the_median_rounded() -> None:
    windows = [(2_596_134 * 20, 20_000_000), (2_596_120 * 20, 20_000_000), (2_597_000 * 20, 20_000_000)]
    assert tsc.rate_khz(windows) == 2_596_100


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [(0, 20_000_000)] * 3,
        [(2_596_134 * 20, 0)] * 3,
        # a counter that runs as it likes: nothing is told, the guest measures by itself
        [(1_000_000 * 20, 20_000_000), (2_000_000 * 20, 20_000_000), (3_000_000 * 20, 20_000_000)],
    ],
)
def test_windows_that_do_not_agree_give_no_rate(windows: list[tuple[int, int]]) -> None:
    assert tsc.rate_khz(windows) == 0


def test_one_measurement_serves_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "tsc.json"
    first = tsc.khz(cache)
    monkeypatch.setattr(tsc, "measure", lambda: 123_400)
    assert tsc.khz(cache) == first
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({**kept, "boot": "another"}))
    assert tsc.khz(cache) == 123_400
    cache.write_text("no json")
    assert tsc.khz(cache) == 123_400
    assert tsc.khz(tmp_path / "no" / "folder") == 123_400
