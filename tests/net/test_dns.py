"""The embedded name server: its packets, and the process with real sockets on loopback addresses."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from labkernel.linux.waiting import readable
from labkernel.net import dns
from labkernel.net.helpers import Helper

WAIT_S = 60.0


def query(name: str, kind: int = 1, number: int = 7) -> bytes:
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + dns.encode_name(name) + struct.pack(">HH", kind, 1)


def endpoint(network: str, ip: str, *names: str, named: bool = True) -> dict[str, object]:
    return {"network": network, "network_name": f"{network}net", "ip": ip, "names": list(names), "named": named}


def test_questions() -> None:
    found = dns.parse_question(query("Web.Example."))
    assert found is not None
    assert (found.name, found.kind) == ("web.example", 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 12,
        query("a")[:-1],
        query("a")[:14],
        query("a").replace(b"\x01a", b"\xc0\x0c"),  # a pointer in a question leads in a circle
        struct.pack(">HHHHHH", 1, 0x8180, 1, 0, 0, 0) + query("a")[12:],  # an answer
        struct.pack(">HHHHHH", 1, 0x0100, 2, 0, 0, 0) + query("a")[12:],
    ],
)
def test_what_is_no_question(data: bytes) -> None:
    assert dns.parse_question(data) is None


def test_random_bytes_are_borne() -> None:
    for seed in range(2000):
        data = bytearray(query("some.name.here", number=seed))
        data[(seed * 7) % len(data)] ^= (seed * 31) % 255 + 1
        dns.parse_question(bytes(data[: len(data) - seed % 5]))


def test_names_of_the_askers_networks_only() -> None:
    names = dns.Names()
    names.put("web", [endpoint("a", "10.0.0.2", "web", "www")])
    names.put("db", [endpoint("a", "10.0.0.3", "db"), endpoint("b", "10.1.0.3", "db")])
    names.put("far", [endpoint("b", "10.1.0.9", "far")])
    names.put("plain", [endpoint("bridge", "172.17.0.2", "plain", named=False)])
    assert names.addresses("web", "db") == ["10.0.0.3"]
    assert names.addresses("web", "db.anet") == ["10.0.0.3"]
    assert names.addresses("web", "far") == []
    assert names.addresses("db", "far") == ["10.1.0.9"]
    assert names.addresses("db", "www") == ["10.0.0.2"]
    assert names.addresses("plain", "plain") == []
    assert names.name_of("web", "10.0.0.3") == "db.anet"
    assert names.name_of("web", "10.1.0.9") is None
    names.drop("db")
    assert names.addresses("web", "db") == []


@pytest.fixture
def upstream() -> Iterator[socket.socket]:
    """A name server of the world, on an address of loopback; the server asks port 53, which only root may use."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind(("127.9.9.53", 53))
    except OSError as err:
        pytest.skip(f"port 53 of a loopback address: {err.strerror}")
    sock.settimeout(WAIT_S)
    yield sock
    sock.close()


@pytest.fixture
def server() -> Iterator[tuple[Helper, socket.socket, socket.socket]]:
    udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
    udp.bind(("127.0.0.1", 0))
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    helper = Helper(dns.main)
    yield helper, udp, tcp
    helper.end()
    udp.close()
    tcp.close()


def tell(helper: Helper, id: str, endpoints: list[dict[str, object]], fds: list[int], **more: object) -> None:
    assert helper.send(json.dumps({"up": id, "endpoints": endpoints, "servers": ["127.9.9.53"], **more}).encode(), fds)


def ask(server: socket.socket, data: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT_S)
        sock.sendto(data, server.getsockname())
        return sock.recv(4096)


def test_own_names_by_udp_and_tcp(server: tuple[Helper, socket.socket, socket.socket]) -> None:
    helper, udp, tcp = server
    tell(helper, "db", [endpoint("a", "10.0.0.3", "db")], [])
    tell(helper, "web", [endpoint("a", "10.0.0.2", "web")], [udp.fileno(), tcp.fileno()])
    reply = ask(udp, query("DB"))
    assert reply[:2] == b"\x00\x07"
    assert reply.endswith(socket.inet_aton("10.0.0.3"))
    assert struct.unpack_from(">H", reply, 6)[0] == 1
    no_ipv6 = ask(udp, query("db", 28))
    assert struct.unpack_from(">HH", no_ipv6, 4) == (1, 0)
    assert no_ipv6[3] & 0xF == 0
    with socket.create_connection(tcp.getsockname(), timeout=WAIT_S) as stream:
        for _ in range(2):
            data = query("db")
            stream.sendall(len(data).to_bytes(2, "big") + data)
            assert stream.recv(4096)[2:].endswith(socket.inet_aton("10.0.0.3"))


def test_others_are_asked_and_their_numbers_are_not_the_askers(
    server: tuple[Helper, socket.socket, socket.socket], upstream: socket.socket
) -> None:
    helper, udp, _tcp = server
    tell(helper, "web", [endpoint("a", "10.0.0.2", "web")], [udp.fileno()])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT_S)
        sock.sendto(query("example.org"), udp.getsockname())
        data, place = upstream.recvfrom(4096)
        question = dns.parse_question(data)
        assert question is not None
        assert question.name == "example.org"
        upstream.sendto(dns.answer(data, question, [(1, socket.inet_aton("192.0.2.1"))]), place)
        reply = sock.recv(4096)
    assert reply[:2] == b"\x00\x07"
    assert reply.endswith(socket.inet_aton("192.0.2.1"))


def test_an_internal_network_asks_nobody(server: tuple[Helper, socket.socket, socket.socket]) -> None:
    helper, udp, _tcp = server
    tell(helper, "web", [endpoint("a", "10.0.0.2", "web")], [udp.fileno()], forward=False)
    assert ask(udp, query("example.org"))[3] & 0xF == 2


def test_it_ends_with_its_supervisor(server: tuple[Helper, socket.socket, socket.socket]) -> None:
    helper, _udp, _tcp = server
    pidfd = os.pidfd_open(helper.pid)
    helper.sock.close()
    assert readable(pidfd, timeout_s=WAIT_S)
    os.close(pidfd)
