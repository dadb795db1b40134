"""Processes of a store that outlive whoever started them: the daemon, a registry, the one that watches repositories.

How they are started and ended. What runs is written down by the process itself, for it can also be started by hand, or
by systemd; a record is believed only with the start time of its process, since numbers of processes come again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from labkernel.errors import LabkernelError
from labkernel.linux.waiting import open_pidfd, readable

from .layout import Layout

Found = TypeVar("Found")

STOP_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 0.02
_MOST_WORDS = 2000


def start(
    layout: Layout,
    words: Sequence[str],
    *,
    log: str,
    find: Callable[[int], Found | None],
    failure: Callable[[str | None], LabkernelError],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> Found:
    """Run `labkernel WORDS` of this store in a session of its own; returns what `find(pid)` finds, once it serves.

    Its output goes to the file `log` of the runtime directory. One that ends, or does not serve within `timeout_s`, is
    ended and raised as `failure(the end of its output)`.
    """
    ours = {
        **{name: value for name, value in os.environ.items() if name != "DOCKER_HOST"},
        "LABKERNEL_ROOT": str(layout.root),
        "LABKERNEL_RUNTIME_DIR": str(layout.runtime_dir),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    path = layout.runtime_dir / log
    with path.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "labkernel.cli", *words],
            env={**ours, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        found = find(process.pid)
        if found is not None:
            return found
        time.sleep(_LOOK_EVERY_S)
    process.kill()
    process.wait()
    raise failure(path.read_text(errors="replace").strip()[-_MOST_WORDS:] or None)


def end(pid: int, *, timeout_s: float = STOP_TIMEOUT_S, kill: bool = True) -> bool:
    """SIGTERM, and with `kill` SIGKILL after `timeout_s`; whether it has gone. Raises ProcessLookupError."""
    pidfd = open_pidfd(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        gone = bool(readable(pidfd, timeout_s=timeout_s))
        if not gone and kill:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            gone = bool(readable(pidfd, timeout_s=timeout_s))
    finally:
        os.close(pidfd)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # our own child, when this process started it
    return gone


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (man 5 proc_pid_stat); None when there is no such process, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])
