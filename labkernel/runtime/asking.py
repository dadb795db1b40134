"""A system call filter that asks, and what answers it: one question at a time, from the loop of the supervisor or of a
proot container's first process.

Source: man 2 seccomp_unotify. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

_RECV, _SEND, _VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTICE = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, {nr, arch, ip, args}
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags


class Question(NamedTuple):
    """A call that waits: who makes it (by its number here), and with what."""

    id: int
    pid: int
    number: int
    architecture: int
    args: tuple[int, ...]


class Answering(Protocol):
    """What decides."""

    def decide(self, question: Question) -> int:
        """0 for a call that has been carried out, else its error number."""


def answer(listener: int, answering: Answering) -> None:
    """Receive one question, have it decided, let the call return."""
    buffer = bytearray(_NOTICE.size)
    try:
        fcntl.ioctl(listener, _RECV, buffer)
        id, pid, _, number, architecture, _, *args = _NOTICE.unpack(buffer)
        failed = answering.decide(Question(id, pid, number, architecture, tuple(args)))
        fcntl.ioctl(listener, _SEND, _ANSWER.pack(id, 0, -failed, 0))
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.EINTR):  # it was killed while it waited for the answer
            raise


def still_waits(listener: int, question: Question) -> None:
    """What was read of the caller in /proc was the caller's. Raises OSError (ENOENT) when it has gone."""
    fcntl.ioctl(listener, _VALID, struct.pack("=Q", question.id))


class Listener(ABC):
    """The supervisor's end of one container's filter; `decide` is the subclass's."""

    def __init__(self, sup: Any, fd: int) -> None:
        self.sup = sup
        self.fd = fd
        sup.loop.watch(fd, self._event)

    @abstractmethod
    def decide(self, question: Question) -> int:
        """See Answering."""

    def _event(self, events: int) -> None:
        if events & select.EPOLLIN:
            answer(self.fd, self)
        else:
            self.close()  # nobody is left below the filter

    def close(self) -> None:
        if self.fd >= 0:
            self.sup.loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1
