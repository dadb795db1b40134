"""Waiting for descriptors and for the end of processes. Standard library only.

All of it is poll (man 2 poll): select(2) takes no descriptor above 1023, and a notebook or a daemon that follows many
containers has such.
"""

from __future__ import annotations

import errno
import os
import select


def readable(*fds: int, timeout_s: float | None = None) -> set[int]:
    """Those that can be read without waiting, also because their other side has gone; none after `timeout_s`."""
    watch = select.poll()
    for fd in fds:
        watch.register(fd, select.POLLIN)
    return {fd for fd, _ in watch.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)}


def open_pidfd(pid: int) -> int:
    """man 2 pidfd_open of somebody else's process. Raises ProcessLookupError, also where an older kernel says EINVAL:
    somebody is just waiting for it, so its number is still in use but nobody's."""
    try:
        return os.pidfd_open(pid)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None


def has_ended(pid: int, timeout_s: float) -> bool:
    """Whether a process, of whomever, ends within `timeout_s`; its status is left to its parent."""
    try:
        pidfd = open_pidfd(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(readable(pidfd, timeout_s=timeout_s))
    finally:
        os.close(pidfd)
