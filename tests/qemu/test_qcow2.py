"""The overlay we write is one that QEMU's own tool finds nothing wrong with."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from labkernel.qemu.qcow2 import make_overlay


@pytest.mark.parametrize("size", [1 << 20, 8 << 30])
def test_qemu_img_agrees(tmp_path: Path, size: int) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img on this machine (qemu-utils)")
    base = tmp_path / "base.img"
    with open(base, "wb") as file:
        file.write(b"base")
        file.truncate(size)
    overlay = tmp_path / "overlay.qcow2"
    make_overlay(overlay, base, size)
    told = json.loads(subprocess.run(["qemu-img", "info", "--output=json", overlay], capture_output=True).stdout)
    assert (told["format"], told["virtual-size"]) == ("qcow2", size)
    assert (told["backing-filename"], told["backing-filename-format"]) == (str(base), "raw")
    assert subprocess.run(["qemu-img", "check", overlay], capture_output=True).returncode == 0
    assert subprocess.run(["qemu-img", "compare", overlay, base], capture_output=True).returncode == 0
