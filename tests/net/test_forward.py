"""The process that carries published ports where there is no NAT, with real sockets."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from labkernel.net import forward, helpers
from labkernel.net.helpers import Helper

WAIT_S = 60.0


@pytest.fixture
def helper() -> Iterator[Helper]:
    found = Helper(lambda sock: forward.main(sock, None))
    yield found
    found.end()


def publish(helper: Helper, proto: str, target: tuple[str, int]) -> tuple[str, int]:
    sock, number = helpers.bind_port({"proto": proto, "ip": "127.0.0.1", "host": None})
    message = {"open": "c", "proto": proto, "to": list(target)}
    assert helper.send(json.dumps(message).encode(), [sock.fileno()])
    sock.close()
    return "127.0.0.1", number


def connect(place: tuple[str, int]) -> socket.socket:
    while True:  # until the process has taken the port over
        try:
            return socket.create_connection(place, timeout=WAIT_S)
        except ConnectionRefusedError:
            continue


def test_tcp_in_both_directions_and_half_closed(helper: Helper) -> None:
    data = os.urandom(8 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)

        def serve() -> None:
            conn, _ = server.accept()
            with conn:
                seen = hashlib.sha256()
                while chunk := conn.recv(1 << 16):
                    seen.update(chunk)
                conn.sendall(seen.digest() + data)

        thread = threading.Thread(target=serve)
        thread.start()
        with connect(publish(helper, "tcp", server.getsockname())) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            back = b""
            while chunk := client.recv(1 << 16):
                back += chunk
        thread.join(WAIT_S)
    assert back == hashlib.sha256(data).digest() + data


def test_a_refused_connection_is_closed(helper: Helper) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = server.getsockname()
    with connect(publish(helper, "tcp", target)) as client:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass


def test_udp_answers_find_their_asker(helper: Helper) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(WAIT_S)
        place = publish(helper, "udp", server.getsockname())
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for number, client in enumerate(clients):
            client.settimeout(WAIT_S)
            client.sendto(b"%d" % number, place)
        for _ in clients:
            data, peer = server.recvfrom(100)
            server.sendto(data * 2, peer)
        assert [client.recv(100) for client in clients] == [b"00", b"11", b"22"]
        for client in clients:
            client.close()


def test_a_port_can_be_held_once() -> None:
    sock, number = helpers.bind_port({"proto": "tcp", "ip": "", "host": None})
    with pytest.raises(OSError, match="in use"):
        helpers.bind_port({"proto": "tcp", "ip": "", "host": [number, number]})
    sock.close()
    again, _ = helpers.bind_port({"proto": "tcp", "ip": "", "host": [number, number]})
    again.close()


def test_the_first_free_port_of_a_range() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        if number > 65000:
            pytest.skip("the kernel chose a port at the end")
        sock, found = helpers.bind_port({"proto": "tcp", "ip": "127.0.0.1", "host": [number, number + 100]})
        assert number < found <= number + 100
        sock.close()


@pytest.mark.parametrize("listening", [False, True])
def test_a_released_port_is_free_though_a_fork_holds_a_copy(*, listening: bool) -> None:
    sock, number = helpers.bind_port({"proto": "tcp", "ip": "127.0.0.1", "host": None})
    if listening:  # as bind_port's second try leaves it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.listen(1)
    copy = os.dup(sock.fileno())
    wanted = {"proto": "tcp", "ip": "127.0.0.1", "host": [number, number]}
    with pytest.raises(OSError, match="in use"):
        helpers.bind_port(wanted)
    helpers.release_port(sock)
    again, found = helpers.bind_port(wanted)
    assert found == number
    with pytest.raises(OSError, match="in use"):
        helpers.bind_port(wanted)  # and nobody else can have it
    again.close()
    os.close(copy)
