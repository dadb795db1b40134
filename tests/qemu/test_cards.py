"""Frames between a guest and a network: what is answered here, and what is passed on."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable

from labkernel.linux.waiting import readable
from labkernel.qemu import cards

GUEST_MAC, OTHER_MAC = bytes.fromhex("02420a000005"), bytes.fromhex("02420a000006")
GUEST_IP, OTHER_IP = socket.inet_aton("10.0.0.5"), socket.inet_aton("10.0.0.6")
RESOLVER_IP = socket.inet_aton(cards.RESOLVER)


def arp(wanted: bytes) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + GUEST_IP + bytes(6) + wanted
    return b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + body


def udp(to: bytes, payload: bytes, *, port: int = 53, fragment: int = 0, options: bytes = b"") -> bytes:
    header = 20 + len(options)
    datagram = struct.pack(">HHHH", 40000, port, 8 + len(payload), 0) + payload
    ip = struct.pack(">BBHHHBBH", 0x40 | header // 4, 0, header + len(datagram), 7, fragment, 64, 17, 0)
    return OTHER_MAC + GUEST_MAC + b"\x08\x00" + ip + GUEST_IP + to + options + datagram


def total(data: bytes) -> int:
    """The ones' complement sum of 16-bit words: 0xffff for a header with a right checksum (RFC 1071)."""
    value = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def quiet(_fd: int, _events: int, _call: Callable[[int], None] | None) -> None:
    pass


def test_who_asks_for_the_resolver_is_told_its_hardware_address() -> None:
    told: list[bytes] = []
    names = cards.Names(told.append, quiet)
    assert names.take(arp(RESOLVER_IP))
    (answer,) = told
    assert answer[:6] == answer[32:38] == GUEST_MAC
    assert answer[12:14] == b"\x08\x06"
    assert answer[20:22] == b"\0\2"
    assert answer[28:32] == RESOLVER_IP
    assert answer[6:12] == answer[22:28]
    assert not names.take(arp(OTHER_IP))
    assert not names.take(udp(OTHER_IP, b"question"))
    assert len(told) == 1


def test_what_is_no_question_is_passed_nowhere() -> None:
    assert cards.udp_payload(udp(RESOLVER_IP, b"question")) == b"question"
    assert cards.udp_payload(udp(RESOLVER_IP, b"question", options=b"\1" * 8)) == b"question"
    for frame in (
        udp(RESOLVER_IP, b"question", port=80),
        udp(RESOLVER_IP, b"question", fragment=0x2000),
        udp(RESOLVER_IP, b"question")[:36],
        udp(RESOLVER_IP, b"")[:14],
        b"",
    ):
        assert cards.udp_payload(frame) == b""


def test_an_answer_goes_back_to_who_asked() -> None:
    frame = cards.udp_answer(udp(RESOLVER_IP, b"question"), b"answer")
    assert frame[:6] == GUEST_MAC
    assert (frame[26:30], frame[30:34]) == (RESOLVER_IP, GUEST_IP)
    assert total(frame[14:34]) == 0xFFFF
    assert struct.unpack(">HHH", frame[34:40]) == (53, 40000, 14)
    assert frame[42:] == b"answer"


def test_questions_are_told_apart_although_guests_number_them_alike(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(60)
        monkeypatch.setattr(cards, "_SERVER", (*server.getsockname(),))
        told: list[bytes] = []
        ready: dict[int, Callable[[int], None]] = {}

        def watch(fd: int, _events: int, call: Callable[[int], None] | None) -> None:
            ready.pop(fd, None) if call is None else ready.update({fd: call})

        names = cards.Names(told.append, watch)
        port = server.getsockname()[1]
        for words in (b"\0\7first", b"\0\7second"):
            assert names.take(udp(RESOLVER_IP, words, port=port))
        asked = [server.recvfrom(100) for _ in range(2)]
        assert [data[2:] for data, _ in asked] == [b"first", b"second"]
        assert asked[0][0][:2] != asked[1][0][:2]
        for data, address in reversed(asked):
            server.sendto(data[:2] + b"answer to " + data[2:], address)
        (fd,) = ready
        while len(told) < 2:
            assert readable(fd, timeout_s=60)
            ready[fd](select.POLLIN)
        assert [frame[42:] for frame in told] == [b"\0\7answer to second", b"\0\7answer to first"]
        names.close()
        assert not ready


def test_a_frame_waits_for_a_guest_that_has_no_room() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wire, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, wire, far:
        watched: dict[int, int] = {}

        def watch(fd: int, events: int, call: Callable[[int], None] | None) -> None:
            watched.pop(fd, None) if call is None or not events else watched.update({fd: events})

        for sock in (ours, wire):
            sock.setblocking(False)
        card = cards.Card(0, ours, watch)
        card._wire = wire
        sent = [f"frame {number}".encode() for number in range(400)]
        sender = threading.Thread(target=lambda: [far.send(frame) for frame in sent], daemon=True)
        sender.start()
        came: list[bytes] = []
        theirs.settimeout(60)
        while len(came) < len(sent):
            readable(wire.fileno(), timeout_s=0.05)
            if watched.get(ours.fileno(), 0) & select.POLLOUT:
                assert wire.fileno() not in watched  # nothing more is taken in
                came.append(theirs.recv(100))
                card._guest_ready(select.POLLOUT)
            else:
                card._wire_ready(select.POLLIN)
                if not watched.get(ours.fileno(), 0) & select.POLLOUT and readable(theirs.fileno(), timeout_s=0):
                    came.append(theirs.recv(100))
        sender.join(60)
        assert came == sent
