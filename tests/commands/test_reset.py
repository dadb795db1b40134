"""`system reset`."""

from __future__ import annotations

import os
import subprocess
import sys

from labkernel.engine import Engine


def test_reset_leaves_nothing(fresh_engine: Engine) -> None:
    layout = fresh_engine.layout
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(layout.root),
        "LABKERNEL_RUNTIME_DIR": str(layout.runtime_dir),
        "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
    }
    fresh_engine.containers.run("busybox", ["sleep", "1000"], detach=True, volumes=["kept:/v"])
    line = [sys.executable, "-m", "labkernel.cli", "system", "reset"]
    refused = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert refused.returncode == 1
    assert fresh_engine.containers.list()
    done = subprocess.run([*line, "-f"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.listdir(layout.root) == []
