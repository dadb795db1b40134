"""A real sshd on a port of the loopback interface, with keys of its own, and an `ssh` that knows the way there."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from ports import free_port
from waiting import wait_until

PRIVSEP = Path("/run/sshd")


class Sshd:
    """`address` with `environment` (its PATH) reaches it; `far` is a folder of programs that come first over there."""

    def __init__(self, base: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.base = base
        self.far = base / "far"
        self.address = f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
        self.process = process
        self.path = f"{base}/near:{os.environ['PATH']}"


@contextlib.contextmanager
def own_sshd(variables: Mapping[str, str]) -> Iterator[Sshd]:
    """One whose sessions have these variables. Skips where none can run."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.path.exists(program) or shutil.which("ssh") is None:
        pytest.skip("no sshd and ssh on this machine (Debian: openssh-server)")
    base = Path(tempfile.mkdtemp(prefix="lk-ssh-", dir="/tmp"))
    made = os.geteuid() == 0 and not PRIVSEP.exists()
    process = None
    try:
        if made:
            PRIVSEP.mkdir(mode=0o755)
        for name in ("host", "user"):
            line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{base}/{name}"]
            subprocess.run(line, check=True, capture_output=True)
        port = _settings(base, variables)
        with (base / "log").open("wb") as log:
            process = subprocess.Popen([program, "-D", "-e", "-f", f"{base}/sshd_config"], stdout=log, stderr=log)
        wait_until(lambda: process.poll() is not None or _answers(port), "sshd answers")
        if process.poll() is not None:
            pytest.skip(f"sshd does not run here: {(base / 'log').read_text()[-300:]}")
        yield Sshd(base, port, process)
    finally:
        if process is not None:
            process.terminate()
            process.wait()
        if made:
            PRIVSEP.rmdir()
        shutil.rmtree(base)


def _settings(base: Path, variables: Mapping[str, str]) -> int:
    port = free_port()
    (base / "far").mkdir()
    (base / "near").mkdir()
    shutil.copy(base / "user.pub", base / "authorized")
    path = f"{base}/far:/usr/bin:/bin"
    words = " ".join(f'"{name}={value}"' for name, value in {**variables, "PATH": path}.items())
    (base / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {base}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {base}/authorized\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nMaxStartups 100\nMaxSessions 100\nPrintMotd no\nSetEnv {words}\n"
    )
    (base / "known").write_text(f"[127.0.0.1]:{port} {(base / 'host.pub').read_text()}")
    (base / "config").write_text(
        f"IdentityFile {base}/user\nIdentitiesOnly yes\nUserKnownHostsFile {base}/known\nBatchMode yes\n"
    )
    ssh = base / "near" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {base}/config "$@"\n')
    ssh.chmod(0o755)
    return port


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            return sock.recv(3) == b"SSH"
    except OSError:
        return False
