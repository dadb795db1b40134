"""The same tests as a plain user without any privilege or subordinate ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_a_container_without_a_cgroup_tells_what_it_used(plain_user: Any) -> None:
    script = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done"
    code = f"""
import json, labkernel
lab = labkernel.connect()
image = lab.images.resolve("lab/busybox")
container, attachment = lab.containers.run_attached(image.id, ["sh", "-c", {script!r}], network_mode="none")
attachment.wait()
print(json.dumps([attachment.usage, container.runtime_state()["usage"], container.runtime_state()["cgroup"]]))
container.remove()
"""
    done = plain_user.python("-c", code)
    assert done.returncode == 0, done.stderr
    told, kept, cgroup = json.loads(done.stdout.splitlines()[-1])
    assert told == kept
    assert told["source"] == ("cgroup" if cgroup["paths"] else "rusage")
    assert told["cpu_usec"] > 0
    assert told["memory_peak_bytes"] > 0
