"""How the programs of user-mode networks are started."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from waiting import wait_until

from labkernel.net import usermode

HELD = """#!/bin/sh
grep SigIgn /proc/self/status > {told}
for fd in 0 1 2 3 4 5; do [ -e /proc/self/fd/$fd ] && echo fd $fd >> {told}; done
echo "no such luck" >&2
exit 1
"""


def test_a_program_that_fails_says_why_and_has_usual_signals(tmp_path: Path) -> None:
    """pasta takes an ignored SIGPIPE, as Python leaves it, for an error; and its words had been thrown away."""
    told, program = tmp_path / "told", tmp_path / "pasta"
    program.write_text(HELD.format(told=told))
    program.chmod(stat.S_IRWXU)
    elsewhere = subprocess.Popen(["unshare", "--net", *([] if os.geteuid() == 0 else ["-r"]), "sleep", "1000"])
    try:
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{elsewhere.pid}/ns/net") != own or elsewhere.poll() is not None)
        if elsewhere.poll() is not None:
            pytest.skip("no network namespaces here")
        namespace = os.open(f"/proc/{elsewhere.pid}/ns/net", os.O_RDONLY)
        assert usermode._start_pasta(str(program), namespace) == "no such luck"
        os.close(namespace)
    finally:
        elsewhere.kill()
        elsewhere.wait()
    ignored, *descriptors = told.read_text().splitlines()
    assert int(ignored.split()[1], 16) & ~(3 << 31) == 0  # 32 and 33 are the C library's own
    assert {line.split()[1] for line in descriptors} >= {"0", "1", "2", "3"}
