"""Denied system calls of a container, counted (`run --count-denials`, `container explain --run`).

The filter then asks instead of refusing (SECCOMP_RET_USER_NOTIF), and the supervisor refuses for it: the call fails
with EPERM as it would have, and its number is known. A kernel log would say it, too, but only to root. Each denied call
costs a turn of the supervisor's loop, so it is for looking, not for every container. What the kernel itself refuses for
want of a capability never gets to a filter's refusal and is not seen. Source: man 2 seccomp_unotify. Standard library
only.
"""

from __future__ import annotations

import errno
from typing import Any

from . import asking
from .instances import Instance

_SAVE_S = 0.1


class Listener(asking.Listener):
    """Refuses for one container's filter, and counts."""

    def __init__(self, sup: Any, inst: Instance, fd: int) -> None:
        super().__init__(sup, fd)
        self.inst = inst
        self.saving = False
        inst.state.setdefault("denied", {})

    def decide(self, question: asking.Question) -> int:
        denied, number, arch = self.inst.state["denied"], question.number, question.architecture
        key = str(number) if arch & 0x80000000 else f"{arch:x}:{number}"  # __AUDIT_ARCH_64BIT
        denied[key] = denied.get(key, 0) + 1
        if not self.saving:
            self.saving = True
            self.sup.loop.later(_SAVE_S, self._save)
        return errno.EPERM

    def _save(self) -> None:
        self.saving = False
        if not self.inst.leaving:
            self.inst.try_save()


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
