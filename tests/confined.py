"""Places without any privilege, where the driver proot is what there is: a plain user of this machine, and uid 1000 in
a container of real Docker.

Docker runs with its default system call filter, no further capability and no network; its image is empty, this
machine's /usr and the checkout are mounted into it. There the driver is also what the probe chooses by itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerd import own_docker
from waiting import wait_until

from labkernel.linux.trees import remove_tree

REPO = Path(__file__).resolve().parents[1]
PLAIN_UID = 23457
LIMIT_S = 120


class Place:
    """Somewhere `labkernel` runs as a user without any privilege. `home` is its directory as this machine sees it."""

    def __init__(self, home: Path, prefix: list[str], env: dict[str, str], inner_home: str) -> None:
        self.home = home
        self.prefix = prefix
        self.env = env
        self.inner_home = inner_home

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        line = [*self.prefix, *words]
        return subprocess.run(line, env=self.env, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    def labkernel(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "labkernel.cli", *words)

    def python(self, code: str) -> str:
        done = self.run(sys.executable, "-c", f"import labkernel; lab = labkernel.connect(); {code}")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def ok(self, *words: str) -> str:
        done = self.labkernel(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def logs_hold(self, name: str, text: str) -> None:
        wait_until(lambda: text in self.ok("logs", name))


def environment(home: str) -> dict[str, str]:
    return {
        "HOME": home,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(REPO),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LABKERNEL_ROOT": f"{home}/root",
        "LABKERNEL_RUNTIME_DIR": f"{home}/run",
    }


@contextlib.contextmanager
def plain_place() -> Iterator[Place]:
    home = Path(tempfile.mkdtemp(prefix="lk-p-", dir="/tmp"))
    prefix = []
    if os.geteuid() == 0:
        os.chown(home, PLAIN_UID, PLAIN_UID)
        prefix = ["setpriv", f"--reuid={PLAIN_UID}", f"--regid={PLAIN_UID}", "--clear-groups", "--"]
    place = Place(home, prefix, {**environment(str(home)), "LABKERNEL_DRIVER": "proot"}, str(home))
    try:
        seen = place.run(sys.executable, "-c", "import labkernel")
        if seen.returncode != 0:
            pytest.skip(f"a plain user cannot read this checkout or its interpreter: {seen.stderr.strip()[-200:]}")
        yield place
        place.python("lab.runtime.shutdown(force=True)")
    finally:
        remove_tree(str(home))  # also what lies in directories closed to their owner


@contextlib.contextmanager
def single_place() -> Iterator[Place]:
    """A plain user without subordinate ids, under the driver rootless. Skips where that does not work."""
    with plain_place() as place:
        place.env["LABKERNEL_DRIVER"] = "rootless"
        tried = place.labkernel("run", "--rm", "--network", "none", "lab/busybox", "cat", "/proc/self/uid_map")
        if tried.returncode != 0:
            pytest.skip(f"the driver rootless does not work for a plain user: {tried.stderr.strip()[-300:]}")
        if int(tried.stdout.split()[2]) > 1:
            pytest.skip(f"user {PLAIN_UID} has subordinate ids")
        yield place


@contextlib.contextmanager
def docker_place() -> Iterator[Place]:
    with own_docker() as docker:
        base = docker.base
        docker.call("import", "-", "empty", data=bytes(10240))
        home = base / "home"
        home.mkdir()
        os.chown(home, 1000, 1000)
        binds = {path: os.path.realpath(path) for path in ("/usr", "/bin", "/lib", "/lib64", "/etc")}
        binds |= {str(REPO): str(REPO)}
        mounts = [word for target, source in binds.items() for word in ("-v", f"{source}:{target}:ro")]
        env = [word for item in environment("/home/u").items() for word in ("-e", "=".join(item))]
        docker.call(
            *("run", "-d", "--name", "pod", "--init", "--network", "none", "--user", "1000:1000"),
            *("--tmpfs", "/tmp:mode=1777", *mounts, "-v", f"{home}:/home/u", *env, "empty", "sleep", "infinity"),
        )
        yield Place(home, docker.line("exec", "pod"), dict(os.environ), "/home/u")
        docker.call("rm", "-f", "pod")
