"""A runtime on a throw-away store with a busybox root file system, without the services above it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.runtime.client import Attachment, Runtime

DRIVER = "root" if os.getuid() == 0 else "rootless"
CAPABILITIES = [
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
]
SHM = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "noexec"]}
NAMESPACES = ("pid", "mount", "uts", "ipc", "network", "cgroup")


class Lab:
    """Makes containers by writing their directories, as the service does."""

    def __init__(self, base: Path, *, idle_exit_s: float = 60.0) -> None:
        self.base = base
        self.root = base / "root"
        self.runtime_dir = base / "rt"
        self.rootfs = base / "rootfs"
        self.parent = "/labkernel-test/" + hashlib.sha256(str(self.root).encode()).hexdigest()[:8]
        (self.root / "containers").mkdir(parents=True)
        self.runtime_dir.mkdir()
        self._make_rootfs()
        self.runtime = self.new_runtime(idle_exit_s=idle_exit_s)

    def new_runtime(self, *, idle_exit_s: float = 60.0) -> Runtime:
        return Runtime(
            socket=self.runtime_dir / "supervisor.sock",
            root=self.root,
            runtime_dir=self.runtime_dir,
            driver=DRIVER,
            idle_exit_s=idle_exit_s,
        )

    def _make_rootfs(self) -> None:
        for name in ("bin", "etc", "tmp", "root"):
            (self.rootfs / name).mkdir(parents=True)
        (self.rootfs / "tmp").chmod(0o1777)
        shutil.copy("/bin/busybox", self.rootfs / "bin/busybox")
        for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
            if applet != "busybox":
                (self.rootfs / "bin" / applet).symlink_to("busybox")
        (self.rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
        (self.rootfs / "etc/group").write_text("root:x:0:\nalice:x:1000:\nstaff:x:50:alice\n")

    def create(self, *args: str, **own: Any) -> str:
        """Write config.json; keyword arguments: `tty cwd readonly mounts resources namespaces rlimits nnp env` or any
        property of "labkernel"."""
        container_id = uuid.uuid4().hex * 2
        folder = self.root / "containers" / container_id
        folder.mkdir(0o755)
        for name in ("upper", "work"):
            (folder / name).mkdir(0o755)
        process = {
            "terminal": own.pop("tty", False),
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": own.pop("env", ["PATH=/bin"]),
            "cwd": own.pop("cwd", "/"),
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "rlimits": own.pop("rlimits", []),
            "noNewPrivileges": own.pop("nnp", False),
        }
        config = {
            "ociVersion": "1.2.0",
            "process": process,
            "root": {"path": "rootfs", "readonly": own.pop("readonly", False)},
            "hostname": container_id[:12],
            "mounts": [SHM, *own.pop("mounts", [])],
            "linux": {
                "namespaces": [{"type": name} for name in own.pop("namespaces", NAMESPACES)],
                "resources": own.pop("resources", {}),
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            },
            "labkernel": {
                "rootfs": {
                    "kind": "overlay",
                    "lower": [str(self.rootfs)],
                    "upper": str(folder / "upper"),
                    "work": str(folder / "work"),
                    "volatile": True,
                    "userxattr": DRIVER == "rootless",
                },
                "log": {"path": str(folder / "log.json"), "max_bytes": None},
                "cgroup_parent": self.parent,
                **own,
            },
        }
        (folder / "config.json").write_text(json.dumps(config))
        return container_id

    def output(self, *args: str, input: bytes | None = None, **own: Any) -> tuple[bytes, bytes, int | None]:
        """Run to the end: (stdout, stderr, exit code)."""
        container_id = self.create(*args, stdin_open=input is not None, **own)
        with self.runtime.run(container_id, stdin=input is not None) as attachment:
            if input is not None:
                attachment.send(input)
                attachment.close_stdin()
            return collect(attachment)

    def log(self, container_id: str) -> bytes:
        from labkernel.runtime.logs import read_records

        return b"".join(data for _, data, _ in read_records(self.root / "containers" / container_id / "log.json"))

    def close(self) -> None:
        self.runtime.shutdown(force=True)
        # Files of a user namespace's ids were made readable by the supervisor; what is left is ours.
        subprocess.run(["chmod", "-R", "u+rwx", str(self.base)], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.base)


def collect(attachment: Attachment) -> tuple[bytes, bytes, int | None]:
    parts: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    for stream, data in attachment:
        parts[stream] += data
    return parts["stdout"], parts["stderr"], attachment.exit_code


def find_leftovers(base: Path, parent: str) -> list[str]:
    """Mounts, cgroups and processes that name the store."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(base) in line]
    for folder, names, _ in os.walk("/sys/fs/cgroup"):
        if parent in folder:
            found.append(folder)
        if folder.count("/") > 6:
            names.clear()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(base) in command and "pytest" not in command:
                found.append(f"process {entry.name}: {command}")
    return found


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A runtime that leaves nothing behind: checked at the end of every test."""
    if DRIVER == "rootless":
        probe = subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True, text=True)
        if probe.returncode:
            pytest.skip(f"no user namespaces: {probe.stderr.strip()}")
    if not os.access("/bin/busybox", os.X_OK):
        pytest.skip("no static busybox: apt-get install busybox-static")
    # Unix socket paths end at about 107 bytes, so not tmp_path.
    base = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
    made = Lab(base)
    try:
        yield made
    finally:
        log = made.runtime_dir / "supervisor.log"
        trace = log.read_text() if log.exists() else ""
        made.close()
    # The worker ends by itself when the supervisor has gone, a moment later.
    deadline = time.monotonic() + 60
    while (left := find_leftovers(base, made.parent)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []
    assert "Traceback" not in trace, trace


__all__ = ["DRIVER", "Lab", "collect", "sys"]
