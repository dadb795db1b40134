"""Landlock: a process gives up the files it does not need, for itself and its descendants. No privileges needed.

Used where there are no mount namespaces (the driver proot): what lies outside of a container's own directories stays
closed to it, whatever happens to the program that translates its paths. A restricted process can also no longer trace
or look into processes outside (man 7 landlock, "Ptrace restrictions"). Source: man 7 landlock, linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from .syscalls import PR_SET_NO_NEW_PRIVS, prctl

_libc = ctypes.CDLL(None, use_errno=True)
_NR_CREATE_RULESET, _NR_ADD_RULE, _NR_RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
ALL = (1 << 16) - 1
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEV
_ABSTRACT_SOCKETS = 1

# Version 1 (Linux 5.13) lets no file be renamed into another directory, which breaks too much.
LEAST_VERSION = 2


def version() -> int:
    """The kernel's Landlock version; 0 where there is none, or where an outer filter forbids it."""
    found = _libc.syscall(_NR_CREATE_RULESET, None, 0, 1)
    return int(found) if found > 0 else 0


def restrict(rules: list[tuple[str, int]]) -> None:
    """Leave this thread and all it makes only `rules`: (path, rights below it). Missing paths are left out.

    Sets no_new_privs. Also closes abstract unix sockets of processes outside where the kernel can (version 6).
    Raises OSError."""
    known = version()
    handled = ALL & ~(0 if known >= 3 else _TRUNCATE) & ~(0 if known >= 5 else _IOCTL_DEV)
    attributes = struct.pack("QQQ", handled, 0, _ABSTRACT_SOCKETS if known >= 6 else 0)[: 8 if known < 4 else 24]
    if known in (4, 5):
        attributes = attributes[:16]
    ruleset = _check(_libc.syscall(_NR_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for path, rights in rules:
            _add(ruleset, path, rights & handled)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        _check(_libc.syscall(_NR_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _add(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        _check(_libc.syscall(_NR_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, fd), 0))
    finally:
        os.close(fd)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "landlock")
    return int(result)
