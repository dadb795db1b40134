"""A daemon in the background: start it, find it, end it; and systemd's units for one that starts by itself.

What runs is recorded in the runtime directory by the daemon itself, however it was started, and believed only as long
as that very process lives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..store.layout import Layout

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
RECORD = "daemon.json"


class NoDaemon(NotFoundError):
    """No daemon of this store runs."""

    def __init__(self) -> None:
        LabkernelError.__init__(self, "no daemon runs for this store", resolution="`daemon start` starts one")


@dataclass(frozen=True)
class RunningDaemon:
    """A daemon of this store. `address` is what DOCKER_HOST takes."""

    pid: int
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        return self.addresses[0]

    def __repr__(self) -> str:
        return f"<Daemon on {', '.join(self.addresses)}: process {self.pid}>"


def default_address(layout: Layout) -> str:
    """The socket of a store's daemon when none is given: in the user's runtime directory."""
    return f"unix://{layout.runtime_dir}/docker.sock"


@contextmanager
def recorded(layout: Layout, addresses: Sequence[str]) -> Iterator[None]:
    """While this process serves, it is found by `find`."""
    path = layout.runtime_dir / RECORD
    temporary = layout.runtime_dir / f"{RECORD}.{os.getpid()}"
    facts = {"pid": os.getpid(), "start": _start_ticks(os.getpid()), "addresses": list(addresses)}
    temporary.write_text(json.dumps(facts))
    os.rename(temporary, path)
    try:
        yield
    finally:
        if (_read(path) or {}).get("pid") == os.getpid():
            path.unlink(missing_ok=True)


def find(layout: Layout) -> RunningDaemon | None:
    """The daemon of the store, the last started when there are several; None when none runs."""
    record = _read(layout.runtime_dir / RECORD)
    if record is None or _start_ticks(record["pid"]) != record["start"]:
        return None
    return RunningDaemon(record["pid"], tuple(record["addresses"]))


def start(layout: Layout, driver: str, words: Sequence[str] = ()) -> RunningDaemon:
    """Start a daemon that outlives this process, with the words of `labkernel daemon`; the one that runs, when one
    does. Returns when it answers. Raises LabkernelError when it does not start."""
    running = find(layout)
    if running is not None:
        return running
    env = {
        **{name: value for name, value in os.environ.items() if name != "DOCKER_HOST"},
        "LABKERNEL_ROOT": str(layout.root),
        "LABKERNEL_RUNTIME_DIR": str(layout.runtime_dir),
        "LABKERNEL_DRIVER": driver,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    log = layout.runtime_dir / "daemon.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "labkernel.cli", "daemon", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        running = find(layout)
        if running is not None and running.pid == process.pid:
            return running
        time.sleep(0.02)
    process.kill()
    process.wait()
    said = log.read_text(errors="replace").strip()
    raise LabkernelError("the daemon did not start", details=said[-2000:] or None)


def stop(layout: Layout) -> RunningDaemon:
    """End the daemon; returns when it has gone. Containers go on. Raises NoDaemon."""
    running = find(layout)
    if running is None:
        raise NoDaemon
    try:
        pidfd = os.pidfd_open(running.pid)
    except ProcessLookupError:
        raise NoDaemon from None
    try:
        import select

        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], STOP_TIMEOUT_S)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], STOP_TIMEOUT_S)
    finally:
        os.close(pidfd)
    with suppress(ChildProcessError):
        os.waitpid(running.pid, os.WNOHANG)  # our own child, when this process started it
    return running


def unit(kind: str, layout: Layout) -> str:
    """The text of systemd's user unit `labkernel.service` or `labkernel.socket` for this Python and this store."""
    command = f"{sys.executable} -m labkernel.cli daemon"
    environment = f"Environment=LABKERNEL_ROOT={layout.root}\nEnvironment=LABKERNEL_RUNTIME_DIR={layout.runtime_dir}\n"
    if kind == "socket":
        return (
            "[Unit]\nDescription=Socket of the labkernel daemon (Docker Engine API)\n\n"
            f"[Socket]\nListenStream={default_address(layout).removeprefix('unix://')}\nSocketMode=0600\n"
            "RemoveOnStop=yes\n\n[Install]\nWantedBy=sockets.target\n"
        )
    return (
        "[Unit]\nDescription=labkernel daemon (Docker Engine API)\n\n"
        # Containers belong to the supervisor: KillMode=process leaves them alone when the daemon is restarted.
        f"[Service]\nType=simple\nExecStart={command} -H fd://\n{environment}KillMode=process\nDelegate=yes\n"
        "Restart=on-failure\n\n[Install]\nWantedBy=default.target\n"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return {"pid": int(found["pid"]), "start": found["start"], "addresses": list(found["addresses"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (man 5 proc); None when there is no such process, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
