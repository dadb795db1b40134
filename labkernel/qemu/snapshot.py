"""A snapshot of a running machine: memory and devices as QEMU migrates them, its disk, and what its monitor knows.

    TARGET/memory         the migration stream       TARGET/disk.qcow2    a copy of the machine's own overlay
    TARGET/snapshot.json  open files of shared directories, bytes of stdin on their way, which of the plan's attempts it
                          is (whose command line a restore needs) and how many cards it has; written last

The guest is asked to keep still first, so that no frame is cut in two; its command goes on afterwards as if nothing had
happened. Runs in the monitor, which does nothing else for the third of a second that it takes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from labkernel.errors import LabkernelError, VMError

from .qmp import Qmp

_TIMEOUT_S = 120.0
_FROZEN_S = 20.0
_START_S = 30.0  # QEMU answers when it has set itself up
_APART = [{"capability": "x-ignore-shared", "state": True}]


def take(monitor: Any, client: Any, target: str) -> None:
    """Begin one; `client` is answered when it is there."""
    if monitor.frozen is not None:
        client.answer({"error": "another snapshot is just being taken"})
        return

    def frozen() -> None:
        monitor.frozen = None
        monitor.forget("frozen")
        try:
            _write(monitor, target)
            client.answer({"done": True})
        except (OSError, LabkernelError) as err:
            client.answer({"error": f"the snapshot could not be taken: {getattr(err, 'brief', err)}"})
        finally:
            monitor.thaw()

    def too_late() -> None:
        monitor.frozen = None
        monitor.thaw()
        client.answer({"error": "the guest did not answer in time"})

    monitor.later(_FROZEN_S, too_late, name="frozen")
    monitor.freeze(frozen)


def _write(monitor: Any, target: str) -> None:
    qemu = monitor.qemu
    qmp = monitor.qmp = monitor.qmp or Qmp(qemu.qmp)
    fd = os.open(f"{target}/memory", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        migrate(qmp, fd, qemu.last_words)
    finally:
        os.close(fd)
    try:
        copy_sparse(monitor.plan["overlay"], f"{target}/disk.qcow2")
        main = monitor.processes[0]
        saved = {
            "shares": [server.state() for server in monitor.shares],
            "unconsumed": main.unconsumed,
            "processes": [number for number in monitor.processes if number],
            "attempt": monitor.attempt,
            "cards": len(monitor.cards),
            "accelerator_reason": monitor.facts.get("accelerator_reason"),
        }
        with open(f"{target}/snapshot.json", "x", encoding="utf-8") as file:
            json.dump(saved, file)
    finally:
        qmp.execute("cont")


def migrate(qmp: Qmp, out: int, last_words: Callable[[], str]) -> None:
    """Write the machine's state to the descriptor `out`; it stands still afterwards. Raises VMError."""
    # The default is made for networks: 128 MiB/s, and a guest whose memory is dirtied faster never ends.
    qmp.execute("migrate-set-parameters", timeout_s=_START_S, max_bandwidth=1 << 34)
    qmp.execute("migrate-set-capabilities", capabilities=_APART)
    qmp.execute("getfd", fds=[out], fdname="state")
    qmp.execute("migrate", uri="fd:state")
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        state = qmp.execute("query-migrate").get("status")
        if state == "completed":
            return
        if state in ("failed", "cancelled"):
            break
        time.sleep(0.005)
    raise VMError("QEMU could not write the machine's state", details=last_words() or None)


def come_in(qmp: Qmp, path: str) -> None:
    """Go on where the state in the file `path` was written. Memory that lies in a file of its own is not in it.

    Raises OSError, VMError; that the state itself cannot be read shows later, by QEMU's end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Not to be had on the command line before QEMU 8.
        qmp.execute("migrate-set-capabilities", timeout_s=_START_S, capabilities=_APART)
        qmp.execute("getfd", fds=[fd], fdname="state")
        qmp.execute("migrate-incoming", uri="fd:state")
    finally:
        os.close(fd)


def copy_sparse(source: str, target: str) -> None:
    """Copy a file without its holes. Raises OSError."""
    partial = f"{target}.partial"
    with open(source, "rb") as old, open(partial, "wb") as new:
        end = os.fstat(old.fileno()).st_size
        new.truncate(end)
        place = 0
        while place < end:
            try:
                start = os.lseek(old.fileno(), place, os.SEEK_DATA)
            except OSError:
                break  # only a hole is left
            place = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            old.seek(start)
            new.seek(start)
            left = place - start
            while left and (data := old.read(min(left, 1 << 20))):
                new.write(data)
                left -= len(data)
    os.rename(partial, target)
