"""A few rounds of `chaos` with a fixed seed; hundreds by hand: `python tests/chaos.py --rounds 200`."""

from __future__ import annotations

import os

import pytest
from chaos import attack

from labkernel import consistency, containers


@pytest.mark.parametrize(("seed", "both"), [(20261121, False), (12, True)])
def test_kills_at_random(seed: int, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "SETTLING_S", consistency.SETTLING_S)  # `finish` changes them
    monkeypatch.setattr(containers, "LEFTOVER_AGE_S", containers.LEFTOVER_AGE_S)
    assert attack(int(os.environ.get("LABKERNEL_CHAOS_ROUNDS", "15")), seed, both=both) == []
