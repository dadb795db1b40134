"""Pseudo-terminals of one devpts instance. Source: man 7 pty, man 2 ioctl_tty."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import termios

_TIOCGPTPEER = 0x5441
_TIOCSPTLCK = 0x40045431


def open_pair(ptmx: str = "/dev/ptmx") -> tuple[int, int]:
    """A new (master, slave) pair of the devpts instance behind `ptmx`.

    The name may lie inside a container, so what was opened is checked to be the multiplexer (5:2), and the slave is
    taken from the master (TIOCGPTPEER, Linux 4.13) and not by name. Raises OSError.
    """
    master = os.open(ptmx, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    info = os.fstat(master)
    if not stat.S_ISCHR(info.st_mode) or os.major(info.st_rdev) != 5 or os.minor(info.st_rdev) != 2:
        os.close(master)
        raise OSError(19, "not a pty multiplexer", ptmx)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return master, slave


def resize(fd: int, rows: int, cols: int) -> None:
    """TIOCSWINSZ: the foreground process group gets SIGWINCH."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def size(fd: int) -> tuple[int, int]:
    """(rows, columns) of the terminal."""
    rows, cols, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return rows, cols


def make_controlling(fd: int) -> None:
    """TIOCSCTTY: make the terminal `fd` the controlling one of this session; call after setsid."""
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
