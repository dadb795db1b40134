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


MECHANISM = ["test_supervisor.py", "test_survival.py", "test_takeover.py", "test_worker.py"]
SANDBOX = ["test_safety.py", "test_escapes.py", "../test_containers_files.py"]
"""With an engine, so with the fixtures of the folder above."""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="this user is a plain one already")
@pytest.mark.parametrize("name", [*MECHANISM, *SANDBOX])
def test_as_plain_user(name: str) -> None:
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", sys.executable, "-m", "pytest"]
    top = HERE.parent if name in SANDBOX else HERE
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={top}", str(HERE / name)]
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


def test_the_killers_score_is_raised_and_what_cannot_be_is_said(plain_user: Any) -> None:
    """A process that may not be looked into has files in /proc that are root's, whoever's it is."""
    line = ["-m", "labkernel.cli", "run", "--rm", "--network", "none", "--oom-score-adj"]
    show = ["lab/busybox", "cat", "/proc/self/oom_score_adj"]
    raised = plain_user.python(*line, "900", *show)
    assert (raised.returncode, raised.stdout) == (0, "900\n"), raised.stderr
    lowered = plain_user.python(*line, "-900", *show)
    assert lowered.returncode == 0, lowered.stderr
    assert lowered.stdout != "-900\n"
    assert "oom-score-adj -900 is not possible" in lowered.stderr


def test_flags_that_need_a_cgroup_are_named(plain_user: Any) -> None:
    code = """
import dataclasses, labkernel
from labkernel.imaging.provision import find_warnings
driver = dataclasses.replace(labkernel.connect().driver, cgroups={}, cgroup_version=0)
settings = {"mem_swappiness": 0, "device_cgroup_rules": ["c 1:3 rwm"], "cgroup_parent": "/x"}
print([line.partition(" ")[0] for line in find_warnings(driver, settings)])
print([line for line in find_warnings(driver, {"mem_swappiness": -1}) if line.startswith("--")])
"""
    done = plain_user.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--memory-swappiness', '--device-cgroup-rule', '--cgroup-parent']\n[]\n"
