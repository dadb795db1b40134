"""Denied system calls of a container, counted (`run --count-denials`, `container explain --run`).

The filter then asks instead of refusing (SECCOMP_RET_USER_NOTIF), and the supervisor refuses for it: the call fails
with EPERM as it would have, and its number is known. A kernel log would say it, too, but only to root. Each denied call
costs a turn of the supervisor's loop, so it is for looking, not for every container. What the kernel itself refuses for
want of a capability never gets to a filter's refusal and is not seen. Source: man 2 seccomp_unotify. Standard library
only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any

from .instances import Instance
from .loop import IN

_RECV, _SEND = 0xC0502100, 0xC0182101
_NOTICE = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, {nr, arch, ip, args}
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
_SAVE_S = 0.1


class Listener:
    """The supervisor's end of one container's filter."""

    def __init__(self, sup: Any, inst: Instance, fd: int) -> None:
        self.sup = sup
        self.inst = inst
        self.fd = fd
        self.saving = False
        inst.state.setdefault("denied", {})
        sup.loop.watch(fd, self._event)

    def _event(self, events: int) -> None:
        if not events & IN:
            self.close()  # nobody is left below the filter
            return
        buffer = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self.fd, _RECV, buffer)
            id, _, _, number, arch, *_ = _NOTICE.unpack(buffer)
            fcntl.ioctl(self.fd, _SEND, _ANSWER.pack(id, 0, -errno.EPERM, 0))
        except OSError as err:
            if err.errno in (errno.ENOENT, errno.EINTR):
                return  # it was killed while it waited for the answer
            raise
        denied = self.inst.state["denied"]
        key = str(number) if arch & 0x80000000 else f"{arch:x}:{number}"  # __AUDIT_ARCH_64BIT
        denied[key] = denied.get(key, 0) + 1
        if not self.saving:
            self.saving = True
            self.sup.loop.later(_SAVE_S, self._save)

    def _save(self) -> None:
        self.saving = False
        if not self.inst.leaving:
            self.inst.try_save()

    def close(self) -> None:
        if self.fd >= 0:
            self.sup.loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1


def take(sup: Any, inst: Instance, message: dict[str, Any], fds: list[int]) -> None:
    """What the container's child says of its filter: the descriptor to listen at, or why there is none."""
    if message["listener"]:
        inst.state["denied"] = {}
        inst.denials = Listener(sup, inst, fds[0])
        sup.hold(inst)
    else:
        inst.warnings.append(f"denied system calls are not counted: {message['why']}")


def end(inst: Instance) -> None:
    """The container has ended."""
    listener, inst.denials = inst.denials, None
    if listener is not None:
        listener.close()
