"""Clients that are slow, broken, gone, or many; a daemon that is killed. Nothing stays behind, nobody else notices."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, frames, read_all
from waiting import wait_until

from labkernel.engine import Engine

IMAGE = "lab/busybox"
FOREVER = ["sh", "-c", "trap 'exit 3' TERM; while true; do sleep 0.1; done"]


def create(daemon: Daemon, **config: object) -> str:
    made = daemon.json("POST", "/containers/create", {"Image": IMAGE, "Cmd": FOREVER, **config})
    return str(made["Id"])


@pytest.fixture
def settled(lone_daemon: Daemon, engine: Engine) -> Daemon:
    """A daemon that has answered before and has no client, so that its descriptors can be counted."""
    lone_daemon.json("GET", "/info")
    # It may still be closing what an earlier test's clients have left.
    wait_until(lambda: lone_daemon.connections() == 0, "no client is left")
    return lone_daemon


def test_unknown_places_and_bad_bodies_have_dockers_shape(daemon: Daemon) -> None:
    for method, path in [("GET", "/nosuch"), ("POST", "/v1.43/containers/json"), ("PUT", "/"), ("GET", "/v1.43")]:
        status, _, body = daemon.request(method, path)
        assert (status, json.loads(body)) == (404, {"message": "page not found"}), path
    for body in (b"{", b"[]", b'{"Image": 1}', b'{"HostConfig": {"Memory": "much"}}', b"\xff\xfe", b"[" * 100_000):
        status, _, answer = daemon.request("POST", "/containers/create", body, {"Content-Type": "application/json"})
        assert status == 400, answer
        assert json.loads(answer)["message"]
    status, _, answer = daemon.request("POST", "/containers/create", b"x=1", {"Content-Type": "text/plain"})
    assert (status, b"must be 'application/json'" in answer) == (400, True)


def test_bodies_are_bounded(daemon: Daemon) -> None:
    big = b'{"Image": "' + b"x" * (5 << 20) + b'"}'
    status, _, answer = daemon.request("POST", "/containers/create", big, {"Content-Type": "application/json"})
    assert (status, b"longer than" in answer) == (413, True)


def test_a_body_that_never_ends_is_dropped_with_its_client(settled: Daemon) -> None:
    before = settled.descriptors()
    sock = settled.connect()
    sock.sendall(b"POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
    wait_until(lambda: settled.descriptors() > before)
    sock.close()
    wait_until(lambda: settled.descriptors() <= before)


def test_rubbish_is_refused(settled: Daemon) -> None:
    before = settled.descriptors()
    for rubbish in (
        b"\0" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 300_000,
        b"\x16\x03\x01\x02\0\x01",
    ):
        sock = settled.connect()
        try:
            sock.sendall(rubbish)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        except OSError:
            pass
        sock.close()
    wait_until(lambda: settled.descriptors() <= before)
    assert settled.request("GET", "/_ping")[2] == b"OK"


def test_an_upload_into_nothing_is_refused_and_not_read(daemon: Daemon) -> None:
    id = create(daemon)
    status, _, answer = daemon.request("PUT", f"/containers/{id}/archive?path=/no/such", b"\0" * (32 << 20))
    assert (status, b"Could not find the file" in answer) == (404, True)
    assert daemon.request("PUT", f"/containers/{id}/archive?path=/tmp", b"no tar" * 1000)[0] in (400, 500)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"DeviceCgroupRules": ["c 10:229 r"]}, "device cgroup rules cannot be changed"),
        ({"CgroupParent": "/elsewhere", "Memory": 64 << 20}, "cgroup parent cannot be changed"),
        ({"BlkioDeviceReadBps": [{"Path": "/dev/x", "Rate": 1}]}, "blkio device read bps cannot be changed"),
        ({"BlkioWeightDevice": [{"Path": "/dev/x", "Weight": "much"}]}, "Weight"),
    ],
)
def test_updates_that_cannot_be_carried_out_change_nothing(daemon: Daemon, asked: dict[str, Any], words: str) -> None:
    id = create(daemon)
    before = daemon.json("GET", f"/containers/{id}/json")["HostConfig"]
    status, _, data = daemon.request("POST", f"/containers/{id}/update", asked)
    assert status == 400
    assert words in json.loads(data)["message"]
    assert daemon.json("GET", f"/containers/{id}/json")["HostConfig"] == before


def test_an_upload_that_breaks_off_leaves_nothing_running(settled: Daemon) -> None:
    id = create(settled)
    before, threads = settled.descriptors(), settled.threads()
    sock = settled.connect()
    head = f"PUT /containers/{id}/archive?path=/tmp HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    sock.sendall(head.encode() + b"\0" * 512)
    wait_until(lambda: settled.threads() > threads)
    sock.close()
    wait_until(lambda: settled.descriptors() <= before)
    assert settled.json("GET", f"/containers/{id}/json")["State"]["Status"] == "created"


def test_a_download_nobody_reads_is_held_back_and_ends_with_its_client(settled: Daemon) -> None:
    id = create(settled, Cmd=["sh", "-c", "dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null"])
    settled.request("POST", f"/containers/{id}/start")
    settled.json("POST", f"/containers/{id}/wait")
    before = settled.descriptors()
    sock = settled.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(f"GET /containers/{id}/archive?path=/big HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert memory_bytes(settled) < 250 << 20
    sock.close()
    wait_until(lambda: settled.descriptors() <= before)


def memory_bytes(daemon: Daemon) -> int:
    with open(f"/proc/{daemon.pid}/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))


def test_clients_that_leave_end_their_waits_streams_and_events(settled: Daemon) -> None:
    id = create(settled)
    settled.request("POST", f"/containers/{id}/start")
    before = settled.descriptors()
    for path in (
        f"POST /containers/{id}/wait",
        f"GET /containers/{id}/logs?follow=1&stdout=1",
        f"GET /containers/{id}/stats",
        "GET /events",
    ):
        sock = settled.connect()
        sock.sendall(f"{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert sock.recv(12) == b"HTTP/1.1 200", path
        sock.close()
    attached, _ = settled.hijack(f"/containers/{id}/attach?stream=1&stdout=1&stdin=1")
    attached.close()
    wait_until(lambda: settled.descriptors() <= before)
    assert settled.json("GET", f"/containers/{id}/json")["State"]["Running"] is True


def test_a_reset_connection_ends_its_stream(settled: Daemon) -> None:
    id = create(settled, Cmd=["yes"])
    before = settled.descriptors()
    attached, _ = settled.hijack(f"/containers/{id}/attach?stream=1&stdout=1")
    settled.request("POST", f"/containers/{id}/start")
    attached.recv(1000)
    attached.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    attached.close()
    wait_until(lambda: settled.descriptors() <= before)
    settled.request("DELETE", f"/containers/{id}?force=1")


def test_output_goes_on_after_the_client_closed_its_input(daemon: Daemon) -> None:
    id = create(daemon, Cmd=["sh", "-c", "cat; echo after"], OpenStdin=True, StdinOnce=True, AttachStdin=True)
    attached, _ = daemon.hijack(f"/containers/{id}/attach?stream=1&stdin=1&stdout=1&stderr=1")
    attached.sendall(b"early ")  # before the start: kept until then
    attached.shutdown(socket.SHUT_WR)
    daemon.request("POST", f"/containers/{id}/start")
    assert b"".join(data for _, data in frames(read_all(attached))) == b"early after\n"
    attached.close()


def test_input_of_a_client_that_leaves_is_no_end_of_input_without_stdin_once(daemon: Daemon) -> None:
    id = create(daemon, Cmd=["cat"], OpenStdin=True)
    daemon.request("POST", f"/containers/{id}/start")
    for words in (b"first\n", b"second\n"):
        attached, _ = daemon.hijack(f"/containers/{id}/attach?stream=1&stdin=1&stdout=1")
        attached.sendall(words)
        assert attached.recv(100)[8:] == words
        attached.shutdown(socket.SHUT_WR)
        attached.close()
    assert daemon.json("GET", f"/containers/{id}/json")["State"]["Running"] is True


def with_input(daemon: Daemon, way: str, command: list[str], **config: object) -> socket.socket:
    """A stream into `command` of a container, or of an exec in one."""
    if way == "attach":
        id = create(daemon, Cmd=command, OpenStdin=True, StdinOnce=True, **config)
        sock, _ = daemon.hijack(f"/containers/{id}/attach?stream=1&stdin=1&stdout=1")
        daemon.request("POST", f"/containers/{id}/start")
        return sock
    id = create(daemon)
    daemon.request("POST", f"/containers/{id}/start")
    asked = {"Cmd": command, "AttachStdin": True, "AttachStdout": True}
    exec_id = daemon.json("POST", f"/containers/{id}/exec", asked)["Id"]
    return daemon.hijack(f"/exec/{exec_id}/start", {})[0]


@pytest.mark.parametrize("way", ["attach", "exec"])
def test_a_long_input_comes_whole(daemon: Daemon, way: str) -> None:
    """The most of it goes past the daemon (splice): nothing is lost or twice where that begins."""
    data = os.urandom(9_000_001)
    sock = with_input(daemon, way, ["md5sum"])
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    said = b"".join(data for _, data in frames(read_all(sock)))
    assert said.split()[0].decode() == hashlib.md5(data, usedforsecurity=False).hexdigest()
    sock.close()


@pytest.mark.parametrize("way", ["attach", "exec"])
def test_an_input_that_is_not_read_to_its_end(daemon: Daemon, way: str) -> None:
    sock = with_input(daemon, way, ["sh", "-c", "head -c 3000000 | wc -c; exec 0</dev/null; echo closed; read x"])
    sock.settimeout(60)
    sending = threading.Thread(target=send_all, args=(sock, b"x" * 12_000_000))
    sending.start()
    said = b"".join(data for _, data in frames(read_all(sock)))
    assert said == b"3000000\nclosed\n"
    sock.close()
    sending.join(60)
    assert not sending.is_alive()


def send_all(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the other side has ended
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("way", ["attach", "exec"])
def test_a_client_that_leaves_in_the_middle_of_a_long_input(settled: Daemon, way: str) -> None:
    before = settled.descriptors()
    sock = with_input(settled, way, ["sh", "-c", "sleep 1; wc -c >/dev/null; sleep 0.1"])
    sock.sendall(b"x" * 2_000_000)
    sock.close()
    wait_until(lambda: settled.descriptors() <= before, "nothing is left open")


def test_input_and_output_at_once(daemon: Daemon) -> None:
    """What comes back holds the input back, too: the client reads only after it has sent some."""
    data = os.urandom(6_000_000)
    sock = with_input(daemon, "attach", ["cat"], HostConfig={"NetworkMode": "none"})
    sending = threading.Thread(target=send_all, args=(sock, data))
    sending.start()
    said = b"".join(data for _, data in frames(read_all(sock)))
    sending.join(60)
    sock.close()
    assert said == data


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this process may not open two thousand sockets")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_followers_of_one_container(settled: Daemon, many_files: None) -> None:
    """A thousand `logs -f`, and a thousand attached clients beside them: none costs a thread, or more than a few
    kilobytes."""
    count = 1000
    id = create(settled, Cmd=["sh", "-c", "read x; echo told"], OpenStdin=True)
    settled.request("POST", f"/containers/{id}/start")
    before, threads, memory = settled.descriptors(), settled.threads(), resident_bytes(settled.pid)
    streams = []
    for _ in range(count):
        sock = settled.connect()
        sock.sendall(f"GET /containers/{id}/logs?follow=1&stdout=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        streams += [sock, settled.hijack(f"/containers/{id}/attach?stream=1&stdout=1")[0]]
    for sock in streams[::2]:
        assert sock.recv(12) == b"HTTP/1.1 200"
    assert settled.threads() < threads + 100, "a stream costs no thread"
    assert resident_bytes(settled.pid) - memory < 2 * count * 100_000
    speaker, _ = settled.hijack(f"/containers/{id}/attach?stream=1&stdin=1")
    speaker.sendall(b"go\n")
    for sock in streams:
        assert b"\x01\0\0\0\0\0\0\x05told\n" in read_until_end(sock)
        sock.close()
    speaker.close()
    wait_until(lambda: settled.descriptors() <= before)


def resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmRSS"))


def read_until_end(sock: socket.socket) -> bytes:
    """To the end of the stream: of the connection, or the last chunk of HTTP."""
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n") and (piece := sock.recv(65536)):
        data += piece
    return data


def test_a_killed_daemon_loses_no_container(daemon: Daemon, engine: Engine) -> None:
    id = create(daemon, Cmd=["sh", "-c", "i=0; while true; do i=$((i+1)); echo $i; sleep 0.05; done"])
    daemon.request("POST", f"/containers/{id}/start")
    following = daemon.connect()
    following.sendall(f"GET /containers/{id}/logs?follow=1&stdout=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    attached, _ = daemon.hijack(f"/containers/{id}/attach?stream=1&stdout=1")
    attached.recv(100)
    daemon.stop(signal.SIGKILL)
    for sock in (following, attached):
        while True:
            try:
                if not sock.recv(65536):
                    break
            except ConnectionResetError:
                break
        sock.close()
    daemon.start()
    state = daemon.json("GET", f"/containers/{id}/json")["State"]
    assert (state["Running"], state["Pid"]) == (True, engine.containers.get(id).pid)

    def numbers() -> list[int]:
        _, _, body = daemon.request("GET", f"/containers/{id}/logs?stdout=1")
        return [int(data) for _, data in frames(body)]

    seen = len(numbers())
    wait_until(lambda: len(numbers()) > seen)
    assert (found := numbers()) == list(range(1, len(found) + 1)), "no line was lost"


def test_the_daemon_ends_in_peace_with_streams_open(daemon: Daemon) -> None:
    id = create(daemon)
    daemon.request("POST", f"/containers/{id}/start")
    sock = daemon.connect()
    sock.sendall(f"GET /containers/{id}/logs?follow=1&stdout=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert sock.recv(12) == b"HTTP/1.1 200"
    daemon.stop()
    sock.close()
    daemon.start()
    assert "Traceback" not in daemon.said()
