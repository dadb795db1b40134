"""Network interfaces by raw rtnetlink messages: so far, bringing the loopback interface up.

Standard library only and no external `ip`: a container start may spend half a millisecond here. Left out: everything
the bridge networks will need. Source: man 7 netlink, man 7 rtnetlink.
"""

from __future__ import annotations

import os
import socket
import struct

_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLMSG_ERROR = 0x2
_RTM_NEWLINK = 16
_IFF_UP = 0x1
_LOOPBACK_INDEX = 1  # the first interface of every network namespace (net/core/dev.c registers it first)

# struct nlmsghdr (length, type, flags, sequence, port) + struct ifinfomsg (family, pad, type, index, flags, change)
_MESSAGE = struct.pack(
    "=IHHIIBxHiII",
    32,
    _RTM_NEWLINK,
    _NLM_F_REQUEST | _NLM_F_ACK,
    1,
    0,
    socket.AF_UNSPEC,
    0,
    _LOOPBACK_INDEX,
    _IFF_UP,
    _IFF_UP,
)


def loopback_up() -> None:
    """Set `lo` of the caller's network namespace up; the kernel then gives it 127.0.0.1/8 and ::1/128 by itself.

    Needs CAP_NET_ADMIN in the user namespace that owns the network namespace. Raises OSError (EPERM)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.send(_MESSAGE)
        answer = sock.recv(4096)
    kind = struct.unpack_from("=H", answer, 4)[0]
    if kind != _NLMSG_ERROR:
        raise OSError(0, f"netlink answered with message type {kind}")
    status = struct.unpack_from("=i", answer, 16)[0]
    if status:
        raise OSError(-status, os.strerror(-status), "lo")
