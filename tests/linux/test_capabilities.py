"""Names, masks, and dropping them for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from labkernel.linux import capabilities


def test_names_and_masks() -> None:
    assert capabilities.mask(["CAP_CHOWN", "cap_kill", "CAP_NOBODY_KNOWS"]) == 0b100001
    assert capabilities.names(0b100001) == ["CAP_CHOWN", "CAP_KILL"]
    assert capabilities.mask(list(capabilities.NAMES)) == (1 << 41) - 1


@pytest.mark.skipif(os.getuid() != 0, reason="needs capabilities to drop")
def test_dropped_for_good() -> None:
    code = (
        "from labkernel.linux import capabilities as c\n"
        "keep = c.mask(['CAP_CHOWN', 'CAP_SETPCAP'])\n"
        "c.drop_bounding(keep)\n"
        "c.apply({'permitted': ['CAP_CHOWN'], 'effective': ['CAP_CHOWN']})\n"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('Cap')])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    zero, chown, bounding = "0" * 16, "0" * 15 + "1", "0" * 13 + "101"
    assert eval(out) == [zero, chown, chown, bounding, zero]
