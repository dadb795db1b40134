"""The verdict on KVM: always an answer, in words, and kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from labkernel.qemu import kvm


def test_a_verdict_is_reached_and_kept(tmp_path: Path) -> None:
    cache = tmp_path / "kvm.json"
    first = kvm.verdict(cache)
    assert first.reason
    assert first.usable == (first.ns_per_instruction is not None and first.ns_per_instruction < 20)
    kept = json.loads(cache.read_text())
    kept["verdict"]["reason"] = "from the file"
    cache.write_text(json.dumps(kept))
    assert kvm.verdict(cache).reason == "from the file"
    assert kvm.verdict(cache, fresh=True).reason != "from the file"


def test_another_boot_asks_again(tmp_path: Path) -> None:
    cache = tmp_path / "kvm.json"
    cache.write_text(json.dumps({"key": ["another"], "verdict": {"usable": True, "reason": "old"}}))
    assert kvm.verdict(cache).reason != "old"


def test_a_broken_cache_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "kvm.json").write_text("{")
    assert kvm.verdict(tmp_path / "kvm.json").reason


def test_a_guest_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/kvm").exists():
        pytest.skip("no /dev/kvm")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = kvm.probe()
    assert not found.usable
    assert "in time" in found.reason or "permission" in found.reason
