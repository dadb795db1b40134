"""/etc/hosts and /etc/resolv.conf of a running container, after it was connected to a network or disconnected.

They are changed in place, since they are bind mounts, and inside the container's own root, without following any link
it may have put there: what is written to is a regular file below /etc that the container could write to itself. Lines
that are not ours stay. Standard library only.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from typing import Any

from ..linux.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS, openat2
from .instances import Instance
from .rootfs import host_names, resolver_lines

_MAX_BYTES = 1 << 20


def update(inst: Instance, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """From the addresses and servers `before` to those `after` (see `Switch.files`); returns warnings."""
    names = host_names(inst.config)
    gone = {f"{address}\t{names}" for address in before["addresses"] if address not in after["addresses"]}
    new = [f"{address}\t{names}" for address in after["addresses"] if address not in before["addresses"]]

    def hosts(text: str) -> str:
        kept = [line for line in text.splitlines() if line not in gone]
        return "".join(f"{line}\n" for line in [*kept, *new])

    def resolver(text: str) -> str:
        # What the container has changed itself is its own business, as with docker.
        return resolver_lines(after) if text == resolver_lines(before) else text

    try:
        pid, pidfd = inst.door
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            signal.pidfd_send_signal(pidfd, 0)  # it lives, so that was its root
            _edit(root, "/etc/hosts", hosts)
            _edit(root, "/etc/resolv.conf", resolver)
        finally:
            os.close(root)
    except OSError as err:
        return [f"its /etc/hosts and /etc/resolv.conf do not know of the change: {err.strerror}; restart it"]
    return []


def _edit(root: int, path: str, change: Callable[[str], str]) -> None:
    place = openat2(root, path, os.O_PATH, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return  # a device or a pipe of the container's
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(place)
    try:
        text = os.read(fd, _MAX_BYTES).decode(errors="surrogateescape")
        changed = change(text)
        if changed != text and len(text) < _MAX_BYTES:
            data = changed.encode(errors="surrogateescape")
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
    finally:
        os.close(fd)
