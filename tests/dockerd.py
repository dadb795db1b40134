"""A Docker daemon of the tests' own, as a peer: its data, sockets and cgroups go with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_S = 120


class Docker:
    """A Docker daemon of our own: data, sockets and pid file below `base`, no bridge, no firewall rules."""

    def __init__(self, base: Path, *words: str) -> None:
        self.base = base
        self.groups = self._groups()
        line = ["dockerd", "--data-root", f"{base}/data", "--exec-root", f"{base}/exec", "--pidfile", f"{base}/pid"]
        line += ["-H", f"unix://{base}/d.sock", "--bridge", "none", "--iptables=false", "--ip6tables=false"]
        line += words
        self.log = open(base / "log", "wb")  # noqa: SIM115 -- as long as the daemon
        self.daemon = subprocess.Popen(line, stdout=self.log, stderr=self.log)

    @staticmethod
    def _groups() -> set[str]:
        top = Path("/sys/fs/cgroup")
        return {str(path) for path in [*top.glob("*/docker"), top / "docker"] if path.is_dir()}

    def line(self, *words: str) -> list[str]:
        return ["docker", "-H", f"unix://{self.base}/d.sock", *words]

    def call(self, *words: str, data: bytes = b"") -> str:
        done = subprocess.run(self.line(*words), input=data, capture_output=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def version(self) -> tuple[int, ...]:
        return tuple(
            int(word) for word in self.call("version", "-f", "{{.Server.Version}}").partition("+")[0].split(".")
        )

    def wait(self) -> bool:
        for _ in range(150):
            if self.daemon.poll() is not None:
                return False
            if subprocess.run(self.line("version"), capture_output=True, timeout=LIMIT_S, check=False).returncode == 0:
                return True
            time.sleep(0.1)
        return False

    def stop(self) -> None:
        self.daemon.send_signal(signal.SIGTERM)
        try:
            self.daemon.wait(30)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        self.log.close()
        for path in self._groups() - self.groups:  # another daemon's have something in them
            with contextlib.suppress(OSError):
                os.rmdir(path)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split()[4].startswith(f"{self.base}/"):
                subprocess.run(["umount", "-l", line.split()[4]], check=False)
        shutil.rmtree(self.base, ignore_errors=True)


@contextlib.contextmanager
def own_docker(*words: str) -> Iterator[Docker]:
    """A daemon that answers, with more words of dockerd's. Skips where none can run."""
    if os.geteuid() != 0:
        pytest.skip("dockerd needs root")
    if not (shutil.which("dockerd") and shutil.which("docker")):
        pytest.skip("no dockerd and docker on this machine")
    base = Path(tempfile.mkdtemp(prefix="lk-d-", dir="/tmp"))
    base.chmod(0o711)
    docker = Docker(base, *words)
    try:
        if not docker.wait():
            pytest.skip(f"dockerd does not run here: {(base / 'log').read_text()[-300:]}")
        yield docker
    finally:
        docker.stop()
