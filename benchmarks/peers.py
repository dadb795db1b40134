"""Real peers for the benchmarks: crun, runc and dockerd from Debian, each as it runs on this machine.

crun and runc start in a private mount namespace that hides what they cannot use on a hybrid cgroup machine (both expect
v1 or v2, not v1 plus an empty v2); dockerd runs with its own data root and socket and is ended by its process id.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from labkernel.engine import Engine

HIDE_EMPTY_V2 = (
    "if [ -d /sys/fs/cgroup/unified ]; then"
    "  mkdir -p /sys/fs/cgroup/hugetlb 2>/dev/null && mount -t cgroup -o hugetlb h /sys/fs/cgroup/hugetlb 2>/dev/null;"
    "  umount /sys/fs/cgroup/unified; fi; "
)
TIMER = """
import json, subprocess, sys, time
for line in sys.stdin:
    argv = json.loads(line)
    started = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    took = time.perf_counter() - started
    print(json.dumps([took, done.returncode, done.stderr.decode()[-400:]]), flush=True)
"""

PLAIN_UID = 65433
ROOTLESS = """
import sys, time
import labkernel
lab = labkernel.connect()
uid = lab.containers.run("lab/busybox", ["id", "-u"], remove=True, network_mode="none").decode()
print(uid.strip(), lab.runtime.driver, flush=True)
for _line in sys.stdin:
    deadline = time.monotonic() + 10
    while lab.runtime.ensure().warm < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.perf_counter()
    lab.containers.run("lab/busybox", "true", remove=True, network_mode="none")
    print(time.perf_counter() - started, flush=True)
lab.runtime.shutdown(force=True)
"""


class Rootless:
    """This engine as a plain user's, in a store of its own: another uid, no group, no capability, no entry in passwd.

    Raises RuntimeError where such a user cannot read this checkout or start a container."""

    name = "labkernel, rootless, no network"

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="bench-u-"))
        os.chown(self.home, PLAIN_UID, PLAIN_UID)
        env = {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home), "PATH": os.environ["PATH"]}
        who = ["setpriv", f"--reuid={PLAIN_UID}", f"--regid={PLAIN_UID}", "--clear-groups", "--inh-caps=-all"]
        self.process = subprocess.Popen(
            [*who, sys.executable, "-c", ROOTLESS],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=self.home,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.stdout.readline().split() != ["0", "rootless"]:
            _, said = self.process.communicate()
            shutil.rmtree(self.home, ignore_errors=True)
            raise RuntimeError(f"rootless: {said.strip()[-300:] or 'this user gets no rootless driver'}")

    def run(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()
        shutil.rmtree(self.home, ignore_errors=True)


class LowLevel:
    """`crun run` or `runc run` of a plain root file system with Docker's default isolation."""

    def __init__(self, binary: str, rootfs: Path) -> None:
        self.name = binary
        self.bundle = Path(tempfile.mkdtemp(prefix=f"bench-{binary}-"))
        self._write_config(rootfs)
        self.count = 0
        shell = HIDE_EMPTY_V2 + 'exec "$0" -c "$1"'
        self.timer = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", shell, sys.executable, TIMER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _write_config(self, rootfs: Path) -> None:
        subprocess.run([self.name, "spec"], cwd=self.bundle, check=True)
        path = self.bundle / "config.json"
        config = json.loads(path.read_text())
        config["root"] = {"path": str(rootfs), "readonly": False}
        config["process"].update(args=["true"], terminal=False)
        # This machine's root may lack CAP_SYS_RESOURCE, without which no limit can be raised.
        config["process"].pop("rlimits", None)
        path.write_text(json.dumps(config))

    def run(self) -> float:
        """Seconds of one whole `run` of `true`, process start included."""
        self.count += 1
        argv = [self.name, "run", "--bundle", str(self.bundle), f"bench-{os.getpid()}-{self.count}"]
        assert self.timer.stdin is not None
        assert self.timer.stdout is not None
        self.timer.stdin.write(json.dumps(argv) + "\n")
        self.timer.stdin.flush()
        took, status, stderr = json.loads(self.timer.stdout.readline())
        if status != 0:
            raise RuntimeError(f"{self.name} failed ({status}): {stderr}")
        return float(took)

    def close(self) -> None:
        assert self.timer.stdin is not None
        self.timer.stdin.close()
        self.timer.wait(timeout=10)
        shutil.rmtree(self.bundle)


class Docker:
    """A dockerd of our own, and the docker command line against it."""

    name = "docker"

    def __init__(self, rootfs_tar: Path) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="bench-docker-"))
        self.host = f"unix://{self.base}/docker.sock"
        self.groups_before = set(docker_cgroups())
        self.log = (self.base / "log").open("w")
        # The same version as the daemon where there are two: newer ones build with a plug-in only.
        self.client = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"
        self.daemon = subprocess.Popen(self.argv(), stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 60
        while self._docker("version").returncode != 0:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd did not start: {(self.base / 'log').read_text()[-800:]}")
            time.sleep(0.2)
        done = self._docker("import", str(rootfs_tar), "bench")
        if done.returncode != 0:
            raise RuntimeError(done.stderr)

    def argv(self) -> list[str]:
        """The daemon's command line; without networks, so that the machine's are left alone."""
        return [
            *("unshare", "-m", "sh", "-c", HIDE_EMPTY_V2 + 'exec "$0" "$@"', "dockerd"),
            *("--data-root", str(self.base / "data"), "--exec-root", str(self.base / "exec")),
            *("--pidfile", str(self.base / "pid"), "-H", self.host),
            *("--bridge", "none", "--iptables=false", "--ip6tables=false"),
        ]

    def _docker(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.client, "-H", self.host, *words],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def serve(self, *words: str) -> None:
        """One command of the docker command line. Raises RuntimeError when it fails."""
        done = self._docker(*words)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)

    def run(self) -> float:
        started = time.perf_counter()
        done = self._docker("run", "--rm", "--network", "none", "bench", "true")
        took = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return took

    def close(self) -> None:
        left = self._docker("ps", "-aq").stdout.split()
        if left:
            self._docker("rm", "-f", *left)
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(timeout=30)
        self.log.close()
        shutil.rmtree(self.base, ignore_errors=True)
        self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        """dockerd leaves its own empty groups; only those that were not there before it are ours to remove."""
        for top in set(docker_cgroups()) - self.groups_before:
            for folder, _names, _files in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def docker_cgroups() -> list[str]:
    return glob.glob("/sys/fs/cgroup/docker") + glob.glob("/sys/fs/cgroup/*/docker")


def unpacked_busybox(engine: Engine, target: Path) -> tuple[Path, Path]:
    """The flattened busybox image as (directory, tar), for peers that know nothing of our store."""
    tar = target / "rootfs.tar"
    with tar.open("wb") as out:
        engine.images.export_rootfs("lab/busybox", out)
    rootfs = target / "rootfs"
    rootfs.mkdir(exist_ok=True)
    subprocess.run(["tar", "-xf", str(tar), "-C", str(rootfs)], check=True)
    return rootfs, tar
