"""Instant machines: a guest that has said hello is written to a migration file once, and every VM starts from it.

The file is taken before a root disk is mounted, so one template serves every image; clock and entropy come with the
first message after a restore. QEMU writes to and reads from a descriptor it is given, for its sandbox forbids spawning.
A template is bound to what `Machine.template_key` hashes: QEMU, kernel, initramfs, memory, devices, command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

from labkernel.errors import VMError

from .command import Machine
from .disk import SIZE_BYTES
from .session import Session

KEPT = 6  # newest templates of a store; each is about 60 MB
_MIGRATION_TIMEOUT_S = 60.0


def template_path(templates: Path, machine: Machine, *, kernel: str) -> Path:
    """Where the template of `machine` lies, or would; `kernel` is the identity of kernel and initramfs."""
    info = os.stat(machine.qemu)
    return templates / f"{machine.template_key(f'{info.st_size}:{info.st_mtime_ns}', kernel)}.vm"


def make_template(path: Path, machine: Machine, launcher: Path, *, scratch: Path, deadline_s: float) -> None:
    """Boot `machine` with an empty disk and write it to `path` (complete or not at all). Raises VMError.

    Takes a boot and some 0.3 s. Removes the oldest templates beyond `KEPT`.
    """
    blank = path.parent / "blank.img"
    with open(blank, "ab") as file:
        file.truncate(SIZE_BYTES)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as out:
            session = Session(dataclasses.replace(machine, disk=blank), launcher, scratch=scratch)
            try:
                session.wait_hello(time.monotonic() + deadline_s)
                _migrate(session, out.fileno())
            finally:
                session.close()
        partial.replace(path)
    except OSError as err:
        raise VMError(f"a VM template could not be written: {err}", resolution="`--cold` boots without") from err
    finally:
        partial.unlink(missing_ok=True)
    _forget_old(path.parent)


def _migrate(session: Session, out: int) -> None:
    qmp = session.process.qmp
    # The default is made for networks: 128 MiB/s, and a guest whose memory is dirtied faster never ends.
    qmp.execute("migrate-set-parameters", max_bandwidth=1 << 34)
    qmp.execute("getfd", fds=[out], fdname="template")
    qmp.execute("migrate", uri="fd:template")
    deadline = time.monotonic() + _MIGRATION_TIMEOUT_S
    while time.monotonic() < deadline:
        state = qmp.execute("query-migrate").get("status")
        if state == "completed":
            return
        if state in ("failed", "cancelled"):
            break
        time.sleep(0.01)
    raise VMError("QEMU could not write a VM template", details=session.process.last_words() or None)


def _forget_old(directory: Path) -> None:
    found = []
    for path in directory.glob("*.vm"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True)[KEPT:]:
        path.unlink(missing_ok=True)
