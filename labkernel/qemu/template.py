"""Instant machines: a guest that has said hello is kept once, and every VM starts from it.

    templates/<key>.vm    a migration stream with the states of its devices        templates/<key>.ram   its memory

It is taken before a root disk is mounted, so one template serves every image; clock and entropy come with the first
message after a restore. A machine maps the memory privately: it is read as it is touched, shared with all machines of
the template as far as nobody writes, and a start costs no copy (with the memory in the stream it cost 0.15 s of CPU and
60 MB for each). QEMU writes to and reads from a descriptor it is given, for its sandbox forbids spawning.
A template is bound to what `Machine.template_key` hashes: QEMU, kernel, initramfs, memory, devices, command line, and
under KVM the processor.

`make` runs in a child of the worker (`Runtime.task`): it has one thread, as starting a QEMU needs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkernel.errors import TaskError, VMError
from labkernel.linux.waiting import readable

from .channel import Decoder, Kind
from .command import Machine
from .disk import SIZE_BYTES
from .qcow2 import make_overlay
from .qmp import Qmp
from .snapshot import migrate
from .spawn import Qemu

KEPT = 6  # newest templates of a store; each is about 60 MB


def template_path(templates: Path, machine: Machine, *facts: str) -> Path:
    """Where the template of `machine` lies, or would; `facts` are the identities of kernel and initramfs, and under KVM
    that of the processor."""
    info = os.stat(machine.qemu)
    return templates / f"{machine.template_key(f'{info.st_size}:{info.st_mtime_ns}', *facts)}.vm"


def memory_path(template: Path) -> Path:
    """Where the memory of a template lies."""
    return template.with_suffix(".ram")


def make(*, path: str, argv: Sequence[str], disk: str, ram: str, cards: int, deadline_s: float) -> dict[str, Any]:
    """Boot the machine of `argv`, whose disk is the file `disk` and whose memory `ram`, and keep it at `path`: complete
    or not at all.

    Takes a boot and some 0.3 s. Removes the oldest templates beyond `KEPT`. Raises VMError, TaskError, DiskFull.
    """
    target = Path(path)
    blank, overlay = target.with_name("blank.img"), Path(disk)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    memory = Path(ram)
    try:
        with open(blank, "ab") as file:
            file.truncate(SIZE_BYTES)
        make_overlay(overlay, blank, SIZE_BYTES)
        with open(partial, "wb") as out:
            qemu = Qemu(argv, cards=cards)
            try:
                _wait_hello(qemu, time.monotonic() + deadline_s)
                migrate(Qmp(qemu.qmp), out.fileno(), qemu.last_words)
            finally:
                qemu.end()
        with open(memory, "rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a template with half of its memory
        memory.replace(memory_path(target))
        partial.replace(target)
    except OSError as err:
        raise TaskError.from_oserror("write a template of a machine", err) from err
    finally:
        for path_ in (partial, overlay, memory):
            path_.unlink(missing_ok=True)
    _forget_old(target.parent)
    return {"size_bytes": (target.stat().st_blocks + memory_path(target).stat().st_blocks) * 512}


def _wait_hello(qemu: Qemu, deadline: float) -> None:
    decoder = Decoder()
    fds = [qemu.channel.fileno(), qemu.console.fileno(), qemu.stderr]
    while fds[0] >= 0:
        ready = readable(*(fd for fd in fds if fd >= 0), timeout_s=deadline - time.monotonic())
        if not ready:
            raise VMError("the guest did not answer in time", details=qemu.last_words() or None)
        for fd in ready:
            data = os.read(fd, 65536)
            if not data:
                fds[fds.index(fd)] = -1
            elif fd == fds[0]:
                if any(frame.kind == Kind.HELLO for frame in decoder.feed(data)):
                    return
            else:
                qemu.keep(data)
    qemu.end()
    raise VMError("the guest ended before it was ready", details=qemu.last_words() or None)


def _forget_old(directory: Path) -> None:
    found = []
    for path in directory.glob("*.vm"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True)[KEPT:]:
        path.unlink(missing_ok=True)
        memory_path(path).unlink(missing_ok=True)
