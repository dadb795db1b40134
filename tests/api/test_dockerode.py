"""An SDK in another language: dockerode, which `scripts/setup peers` puts beside the virtual environment's Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import Daemon

PEERS = Path(sys.prefix) / "peers" / "node_modules"


def test_dockerode(daemon: Daemon) -> None:
    own = Path(sys.prefix) / "bin" / "node"
    node = str(own) if own.exists() else shutil.which("node")
    if node is None or not (PEERS / "dockerode").is_dir():
        pytest.skip("no node, or no dockerode: `scripts/setup peers .venv` fetches it")
    done = subprocess.run(
        [node, str(Path(__file__).with_name("dockerode.js")), daemon.path],
        env={**os.environ, "NODE_PATH": str(PEERS)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stdout) == (0, "all is well\n"), done.stderr
