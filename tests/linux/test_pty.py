"""Pseudo-terminals of this machine's devpts."""

from __future__ import annotations

import os

import pytest

from labkernel.linux import pty
from labkernel.linux.waiting import readable


def test_pair_carries_data_and_size() -> None:
    master, slave = pty.open_pair("/dev/ptmx")
    pty.resize(master, 40, 132)
    assert pty.size(slave) == (40, 132)
    os.write(slave, b"hi\n")
    assert readable(master, timeout_s=60)
    assert os.read(master, 100) == b"hi\r\n"
    os.close(master)
    os.close(slave)


def test_something_else_is_refused() -> None:
    with pytest.raises(OSError, match="not a pty multiplexer"):
        pty.open_pair("/dev/null")
