"""The same tests as a plain user without any privilege or subordinate ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="this user is a plain one already")
@pytest.mark.parametrize("name", ["test_supervisor.py", "test_survival.py", "test_takeover.py", "test_worker.py"])
def test_as_plain_user(name: str) -> None:
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", sys.executable, "-m", "pytest"]
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={HERE}", str(HERE / name)]
    env = {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *options], env=env, check=False, capture_output=True, text=True, cwd=HERE.parent.parent
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
