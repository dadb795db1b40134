"""Network interfaces, addresses and routes by raw rtnetlink messages, several in one send.

Standard library only and no external `ip`: a container start may spend a millisecond here. Left out: everything our
bridges do not need (IPv6, neighbours, traffic control). Sources: man 7 netlink, man 7 rtnetlink, man 4 veth;
linux/if_link.h for the attributes' numbers.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLMSG_ERROR = 0x2
NLMSG_DONE = 0x3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
IFF_UP = 0x1
LOOPBACK_INDEX = 1  # the first interface of every network namespace (net/core/dev.c registers it first)

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER = 1, 3, 4, 10
_IFLA_LINKINFO, _IFLA_NET_NS_PID, _IFLA_IFALIAS, _IFLA_PROTINFO = 18, 19, 20, 12
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_IFLA_BRPORT_ISOLATED = 33
_NESTED = 0x8000
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute (struct nlattr), padded to four bytes."""
    length = 4 + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, flags: int, body: bytes) -> bytes:
    """One message (struct nlmsghdr); its sequence number is filled in by `Socket.send`."""
    return _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, 0, 0) + body


def add_bridge(name: str, *, mtu: int = 0, mac: bytes = b"", alias: str = "") -> bytes:
    """A bridge, up. Without a `mac` of its own it takes over those of its ports, and changes with them. `alias` shows
    in `ip link`."""
    body = _LINK.pack(0, 0, 0, IFF_UP, IFF_UP) + text(_IFLA_IFNAME, name)
    body += number(_IFLA_MTU, mtu) if mtu else b""
    body += attribute(_IFLA_ADDRESS, mac) if mac else b""
    body += attribute(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"))
    return message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body) + (set_alias(name, alias) if alias else b"")


def add_veth(
    name: str,
    peer: str,
    pid: int,
    *,
    mtu: int = 0,
    master: int = 0,
    peer_mac: bytes = b"",
) -> bytes:
    """A pair: `name` here, up and a port of the bridge `master` (0: of none), and `peer` in the namespace of `pid`.

    The pair is gone with either namespace (man 4 veth), so a container's end takes it along."""
    # Not up yet: it cannot open before its other end is there (ENOTCONN).
    inner = _LINK.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, peer) + number(_IFLA_NET_NS_PID, pid)
    inner += number(_IFLA_MTU, mtu) if mtu else b""
    inner += attribute(_IFLA_ADDRESS, peer_mac) if peer_mac else b""
    info = text(_IFLA_INFO_KIND, "veth") + attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, inner))
    body = _LINK.pack(0, 0, 0, IFF_UP, IFF_UP) + text(_IFLA_IFNAME, name)
    body += number(_IFLA_MTU, mtu) if mtu else b""
    body += number(_IFLA_MASTER, master) if master else b""
    return message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body + attribute(_IFLA_LINKINFO, info))


def set_isolated(index: int) -> bytes:
    """A bridge's port that can't talk to its other isolated ports (if_link.h, IFLA_BRPORT_ISOLATED)."""
    protocol = attribute(_IFLA_PROTINFO | _NESTED, attribute(_IFLA_BRPORT_ISOLATED, b"\x01"))
    return message(RTM_SETLINK, 0, _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0) + protocol)


def set_alias(name: str, alias: str) -> bytes:
    return message(RTM_NEWLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name) + text(_IFLA_IFALIAS, alias))


def delete_link(name: str) -> bytes:
    return message(RTM_DELLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name))


def add_address(index: int, address: str, prefix: int) -> bytes:
    """An IPv4 address of the interface; the kernel adds the subnet's route by itself."""
    packed = socket.inet_aton(address)
    mask = (1 << (32 - prefix)) - 1
    broadcast = (int.from_bytes(packed, "big") | mask).to_bytes(4, "big")
    body = struct.pack("=BBBBi", socket.AF_INET, prefix, 0, 0, index)
    body += attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed) + attribute(_IFA_BROADCAST, broadcast)
    return message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body)


def add_default_route(gateway: str) -> bytes:
    """The IPv4 default route; `gateway` has to lie in a subnet of an interface that is up."""
    # table main, protocol boot, scope universe, type unicast
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 3, 0, 1, 0)
    return message(RTM_NEWROUTE, NLM_F_CREATE, body + attribute(_RTA_GATEWAY, socket.inet_aton(gateway)))


class Socket:
    """A route (or other) netlink socket; it stays in the network namespace it was made in, whoever uses it later."""

    def __init__(self, family: int = socket.NETLINK_ROUTE, fd: int | None = None) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self.sock = socket.socket(socket.AF_NETLINK, kind, family) if fd is None else socket.socket(fileno=fd)
        self.serial = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, *messages: bytes, ignore: tuple[int, ...] = ()) -> None:
        """Send messages (each may be several in a row) at once and wait for every answer.

        Raises OSError with the first error whose number is not in `ignore`; the messages after it were tried, too."""
        batch = bytearray(b"".join(messages))
        count = offset = 0
        while offset < len(batch):
            self.serial += 1
            struct.pack_into("=I", batch, offset + 8, self.serial)
            length, _kind, flags = struct.unpack_from("=IHH", batch, offset)
            count += bool(flags & NLM_F_ACK)
            offset += length
        self.sock.send(batch)
        failed = 0
        while count:
            for kind, _flags, body in self._receive():
                if kind == NLMSG_ERROR:
                    count -= 1
                    status = -struct.unpack_from("=i", body)[0]
                    failed = failed or (0 if status in ignore else status)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The bodies of what a dump request lists."""
        self.serial += 1
        self.sock.send(_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self.serial, 0) + body)
        while True:
            for found, _flags, data in self._receive():
                if found == NLMSG_DONE:
                    return
                if found == NLMSG_ERROR:
                    status = -struct.unpack_from("=i", data)[0]
                    raise OSError(status, os.strerror(status))
                yield data

    def _receive(self) -> list[tuple[int, int, bytes]]:
        data = self.sock.recv(1 << 17)
        found, offset = [], 0
        while offset + 16 <= len(data):
            length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
            found.append((kind, flags, data[offset + 16 : offset + length]))
            offset += (length + 3) & ~3
        return found

    def links(self) -> dict[str, int]:
        """Name -> index of every interface."""
        found = {}
        for body in self.dump(RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
            index = _LINK.unpack_from(body)[2]
            name = attributes(body, 16).get(_IFLA_IFNAME, b"").rstrip(b"\0").decode()
            found[name] = index
        return found

    def index(self, name: str) -> int:
        """The index of an interface of the socket's namespace. Raises OSError (ENODEV)."""
        self.serial += 1
        body = _LINK.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name)
        self.sock.send(_HEADER.pack(16 + len(body), RTM_GETLINK, NLM_F_REQUEST, self.serial, 0) + body)
        for kind, _flags, data in self._receive():
            if kind == NLMSG_ERROR:
                status = -struct.unpack_from("=i", data)[0]
                raise OSError(status, os.strerror(status), name)
            return int(_LINK.unpack_from(data)[2])
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)

    def routes(self) -> list[tuple[str, int, int]]:
        """(destination, prefix length, interface index) of the IPv4 routes of the main table."""
        found = []
        for body in self.dump(RTM_GETROUTE, struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
            family, prefix, _source, _tos, table = struct.unpack_from("=BBBBB", body)
            if family == socket.AF_INET and table == 254:
                parts = attributes(body, 12)
                index = struct.unpack("=I", parts[_RTA_OIF])[0] if _RTA_OIF in parts else 0
                found.append((socket.inet_ntoa(parts.get(_RTA_DST, bytes(4))), prefix, index))
        return found

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attributes(body: bytes, offset: int) -> dict[int, bytes]:
    """The attributes of a message's body from `offset` on."""
    found = {}
    while offset + 4 <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = body[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def loopback_up() -> None:
    """Set `lo` of the caller's network namespace up; the kernel then gives it 127.0.0.1/8 and ::1/128 by itself.

    Needs CAP_NET_ADMIN in the user namespace that owns the network namespace. Raises OSError (EPERM)."""
    with Socket() as sock:
        try:
            sock.send(message(RTM_NEWLINK, 0, _LINK.pack(0, 0, LOOPBACK_INDEX, IFF_UP, IFF_UP)))
        except OSError as err:
            raise OSError(err.errno, err.strerror, "lo") from None


def no_offload(name: str) -> None:
    """Have an interface of the caller's namespace send frames of the wire's length with complete checksums.

    Between virtual interfaces the kernel leaves both to a card that is never reached; who reads frames from a packet
    socket (a machine's monitor) would pass them on unfinished. Raises OSError. Source: linux/ethtool.h."""
    value = array.array("B", struct.pack("=II", _ETHTOOL_STXCSUM, 0))  # segmentation goes with it
    request = struct.pack("16sP", name.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request.ljust(40, b"\0"))


def configure(interfaces: list[dict[str, object]]) -> None:
    """In a container's network namespace: give each of its new interfaces its address, up, and the default route.
    Each change waits for the kernel's one lock of all networks, so there are no more than these.

    Each of `interfaces` has `name`, `ip`, `prefix` and `gateway` (may be empty). Raises OSError."""
    batch = b""
    for each in interfaces:
        index = socket.if_nametoindex(str(each["name"]))
        batch += message(RTM_NEWLINK, 0, _LINK.pack(0, 0, index, IFF_UP, IFF_UP))
        batch += add_address(index, str(each["ip"]), int(str(each["prefix"])))
    for each in interfaces:
        if each["gateway"]:
            batch += add_default_route(str(each["gateway"]))
    with Socket() as sock:
        sock.send(batch)


RESOLVER = "127.0.0.11"
"""Where a container's embedded name server is, as with docker."""


def resolver_sockets() -> list[socket.socket]:
    """UDP and TCP at port 53 of `RESOLVER` in the caller's network namespace. Raises OSError."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    udp.bind((RESOLVER, 53))
    tcp.bind((RESOLVER, 53))
    tcp.listen(64)
    return [udp, tcp]
