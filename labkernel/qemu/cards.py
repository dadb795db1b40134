"""A machine's network cards: frames between QEMU and the interfaces that the supervisor put into the monitor's network
namespace.

    guest eth0 = QEMU = a pair of datagram sockets = this process = packet socket on eth0 = veth = bridge = containers

No tap device is needed, so it works as well for a plain user where /dev/net/tun may not be opened: who may make a
network namespace may have a packet socket in it. The supervisor gives the namespace the same interface as it gives a
container, so addresses, rules, isolation and published ports are those of containers; only the address is the guest's.

Names: a guest cannot reach 127.0.0.11, where the store's resolver listens in this namespace. What it sends by UDP to
`RESOLVER` is passed on there, and that address is answered for on each card (ARP). Left out: names over TCP.
Runs in the machine's monitor. Standard library only. Sources: man 7 packet; RFC 826 (ARP), 791 (IP), 768 (UDP).
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

RESOLVER = "169.254.127.11"  # link-local, so of no network of anybody's; guest/net.c has a route to it
_SERVER = ("127.0.0.11", 53)
_RESOLVER_IP = socket.inet_aton(RESOLVER)
_RESOLVER_MAC = bytes.fromhex("0242a9fe7f0b")
_FRAME_BYTES = 65535 + 18
_BURST = 64  # frames of one card before others have their turn
_WAITING = 512  # questions for names that may be without an answer
_ETH_P_ALL, _IFF_UP, _IFF_NOARP = 3, 0x1, 0x80
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_IP, _ARP = b"\x08\x00", b"\x08\x06"
_ASKS_FOR_RESOLVER = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)

Watch = Callable[[int, int, Callable[[int], None] | None], None]


class Card:
    """Number `number` of a machine; `sock` is QEMU's, one frame in each message."""

    def __init__(self, number: int, sock: socket.socket, watch: Watch) -> None:
        self.number, self.sock = number, sock
        self._watch = watch
        self._wire: socket.socket | None = None
        self._late: bytes | None = None  # for the guest, which had no room for it
        self._names = Names(self._to_guest, watch)
        watch(sock.fileno(), select.POLLIN, self._guest_ready)

    @property
    def plugged(self) -> bool:
        return self._wire is not None

    def plug(self, interface: str) -> None:
        """Carry frames to and from `interface` of this network namespace from now on. Raises OSError."""
        self.unplug()
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        try:
            wire.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            _bring_up(wire, interface)
            wire.bind((interface, _ETH_P_ALL))
        except OSError:
            wire.close()
            raise
        self._wire = wire
        self._watch(wire.fileno(), select.POLLIN, self._wire_ready)

    def unplug(self) -> None:
        """What the guest sends goes nowhere."""
        if self._wire is not None:
            self._watch(self._wire.fileno(), 0, None)
            self._wire.close()
            self._wire = None

    def close(self) -> None:
        """QEMU has ended."""
        self.unplug()
        self._watch(self.sock.fileno(), 0, None)
        self._names.close()

    # -- from the guest

    def _guest_ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self._retry()
        if not events & ~select.POLLOUT:
            return
        for _ in range(_BURST):
            try:
                frame = self.sock.recv(_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._watch(self.sock.fileno(), 0, None)
                return
            if self._wire is None or self._names.take(frame):
                continue
            try:
                self._wire.send(frame)
            except OSError:
                continue  # too long, or the interface has just gone: a network may lose frames

    # -- to the guest

    def _wire_ready(self, _events: int) -> None:
        assert self._wire is not None
        for _ in range(_BURST):
            try:
                frame = self._wire.recv(_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as err:
                # Told once when the interface goes down or away; the supervisor says when there is another one.
                if err.errno != errno.ENETDOWN:
                    self.unplug()
                return
            if not self._to_guest(frame):
                self._late = frame
                self._watch(self._wire.fileno(), 0, None)
                self._watch(self.sock.fileno(), select.POLLIN | select.POLLOUT, self._guest_ready)
                return

    def _to_guest(self, frame: bytes) -> bool:
        """False when it has to wait."""
        try:
            self.sock.send(frame)
        except BlockingIOError:
            return False
        except OSError:
            pass  # QEMU has gone; or a guest that takes no frame of this length
        return True

    def _retry(self) -> None:
        if self._late is not None and not self._to_guest(self._late):
            return
        self._late = None
        self._watch(self.sock.fileno(), select.POLLIN, self._guest_ready)
        if self._wire is not None:
            self._watch(self._wire.fileno(), select.POLLIN, self._wire_ready)


def _bring_up(sock: socket.socket, interface: str) -> None:
    """Up, and deaf to ARP: the namespace itself has no address here, and must not answer for anybody."""
    request = struct.pack("16sH14x", interface.encode(), 0)
    flags = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)[0]
    fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", interface.encode(), flags | _IFF_UP | _IFF_NOARP))


class Names:
    """A guest's questions for names: `take(frame)` answers ARP for `RESOLVER` and passes what is sent there on."""

    def __init__(self, to_guest: Callable[[bytes], Any], watch: Watch) -> None:
        self._to_guest, self._watch = to_guest, watch
        self._sock: socket.socket | None = None
        self._waiting: dict[int, tuple[bytes, bytes]] = {}  # our number of a question -> (its own, frame to answer)
        self._serial = 0

    def take(self, frame: bytes) -> bool:
        """Whether the frame was meant for us."""
        kind = frame[12:14]
        if kind == _ARP:
            if frame[38:42] != _RESOLVER_IP or frame[14:22] != _ASKS_FOR_RESOLVER:
                return False
            self._to_guest(arp_answer(frame))
            return True
        if kind != _IP or frame[30:34] != _RESOLVER_IP:
            return False
        question = udp_payload(frame)
        if len(question) >= 2:
            self._ask(frame, question)
        return True

    def _ask(self, frame: bytes, question: bytes) -> None:
        self._serial = (self._serial + 1) & 0xFFFF
        while len(self._waiting) >= _WAITING:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[self._serial] = (question[:2], frame)
        try:
            if self._sock is None:
                self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                self._sock.connect(_SERVER)
                self._watch(self._sock.fileno(), select.POLLIN, self._answered)
            self._sock.send(struct.pack(">H", self._serial) + question[2:])
        except OSError:
            return  # the resolver is just being made anew: the guest asks again

    def _answered(self, _events: int) -> None:
        assert self._sock is not None
        for _ in range(_BURST):
            try:
                answer = self._sock.recv(65535)
            except BlockingIOError:
                return
            except OSError:
                return
            found = self._waiting.pop(int.from_bytes(answer[:2], "big"), None) if len(answer) >= 2 else None
            if found is not None:
                own, frame = found
                self._to_guest(udp_answer(frame, own + answer[2:]))

    def close(self) -> None:
        if self._sock is not None:
            self._watch(self._sock.fileno(), 0, None)
            self._sock.close()
            self._sock = None


def arp_answer(frame: bytes) -> bytes:
    """To who asks for the resolver's hardware address (RFC 826)."""
    asker, address = frame[22:28], frame[28:32]
    answer = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + _RESOLVER_MAC + _RESOLVER_IP + asker + address
    return asker + _RESOLVER_MAC + _ARP + answer


def udp_payload(frame: bytes) -> bytes:
    """What a frame carries to port 53 by UDP; nothing for any other, and for one that makes no sense."""
    header = (frame[14] & 15) * 4 if len(frame) > 34 else 0
    udp = frame[14 + header : 22 + header]
    if header < 20 or frame[23] != socket.IPPROTO_UDP or len(udp) < 8:
        return b""
    _source, port, length, _checksum = struct.unpack(">HHHH", udp)
    whole = int.from_bytes(frame[20:22], "big") & 0x3FFF == 0  # no fragment
    return frame[22 + header : 14 + header + length] if port == _SERVER[1] and whole else b""


def udp_answer(frame: bytes, payload: bytes) -> bytes:
    """The frame with `payload` back to who sent `frame` to the resolver's port 53."""
    header = (frame[14] & 15) * 4
    port, guest = frame[14 + header : 16 + header], frame[26:30]
    udp = struct.pack(">H2sHH", _SERVER[1], port, 8 + len(payload), 0) + payload  # 0: no checksum (RFC 768)
    start = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, socket.IPPROTO_UDP, 0)
    ip = start[:10] + struct.pack(">H", _checksum(start + _RESOLVER_IP + guest)) + _RESOLVER_IP + guest
    return frame[6:12] + _RESOLVER_MAC + _IP + ip + udp


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


__all__ = ["RESOLVER", "Card", "Names", "arp_answer", "udp_answer", "udp_payload"]
