"""Bodies and files that go past the event loop: the same bytes, the same answers, and nothing left behind."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import struct
import tarfile
import termios
import threading

import pytest
from daemons import Daemon, read_all
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_until

from labkernel.api.errors import ClientGone
from labkernel.api.wire import Chunked, Counted, WireBody
from labkernel.engine import Engine
from labkernel.errors import UsageError


def chunked(pieces: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces if piece)
    return body + b"0\r\n" + trailer + b"\r\n"


def archive(content: bytes, name: str = "file") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unread(sock: socket.socket) -> int:
    """Bytes that the daemon has not taken yet (man 7 unix, SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


@settings(deadline=None)
@given(
    pieces=st.lists(st.binary(max_size=40), max_size=6),
    step=st.integers(1, 50),
    extension=st.sampled_from([b"", b";a=b", b" ; c"]),
    trailer=st.sampled_from([b"", b"X: y\r\n"]),
)
def test_chunks_are_put_together_however_they_come(
    pieces: list[bytes], step: int, extension: bytes, trailer: bytes
) -> None:
    form, found = Chunked(), b""
    data = chunked(pieces, extension=extension, trailer=trailer)
    for at in range(0, len(data), step):
        assert not form.ended
        found += b"".join(form.feed(memoryview(data[at : at + step])))
    assert (form.ended, found) == (True, b"".join(pieces))


@pytest.mark.parametrize(
    "data", [b"-1\r\n", b"0x5\r\nhello", b"\r\n", b"1_0\r\n", b"5\r\nhelloo\r\n", b"f" * 16 + b"\r\n", b"1" * 9000]
)
def test_broken_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="malformed chunked encoding"):
        Chunked().feed(memoryview(data))


def test_a_body_of_known_length_ends_there() -> None:
    form = Counted(5)
    assert [bytes(piece) for piece in form.feed(memoryview(b"abc"))] == [b"abc"]
    assert [bytes(piece) for piece in form.feed(memoryview(b"defgh"))] == [b"de"]
    assert form.ended
    assert Counted(0).ended


def poured(data: bytes, form: Chunked | Counted, *, step: int, rest: int = 0) -> tuple[bytes, BaseException | None]:
    """What comes out of the pipe when `data` arrives in steps, its first `rest` bytes with the headers."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    ours.setblocking(False)
    body = WireBody(ours, data[:rest], form, lambda: None)
    failures: list[BaseException] = []

    def pour() -> None:
        try:
            body.pour(writing)
        except BaseException as err:
            failures.append(err)
        finally:
            os.close(writing)

    def feed() -> None:
        for at in range(rest, len(data), step):
            theirs.sendall(data[at : at + step])
        theirs.close()

    threads = [threading.Thread(target=each) for each in (pour, feed)]
    for thread in threads:
        thread.start()
    with os.fdopen(reading, "rb") as file:
        found = file.read()
    for thread in threads:
        thread.join()
    ours.close()
    return found, failures[0] if failures else None


@settings(deadline=None)
@given(
    pieces=st.lists(st.binary(max_size=40), max_size=6),
    step=st.integers(1, 50),
    rest=st.integers(0, 60),
    trailer=st.sampled_from([b"", b"X: y\r\n"]),
)
def test_a_body_is_poured_into_a_pipe_as_it_comes(pieces: list[bytes], step: int, rest: int, trailer: bytes) -> None:
    data = chunked(pieces, trailer=trailer)
    whole = b"".join(pieces)
    assert poured(data, Chunked(), step=step, rest=rest) == (whole, None)
    assert poured(whole, Counted(len(whole)), step=step, rest=rest) == (whole, None)


def test_a_large_body_is_poured_whole() -> None:
    content = os.urandom(5 << 20)
    pieces = [content[at : at + 32768] for at in range(0, len(content), 32768)]
    assert poured(chunked(pieces), Chunked(), step=100_000) == (content, None)


@pytest.mark.parametrize(
    ("data", "found", "failure"),
    [
        (b"5\r\nhel", b"hel", ClientGone),
        (b"5\r\nhello\r\n", b"hello", ClientGone),
        (b"5\r\nhelloo\r\n", b"hello", UsageError),
        (b"zz\r\n", b"", UsageError),
    ],
)
def test_a_poured_body_that_breaks_off_is_noticed(data: bytes, found: bytes, failure: type[Exception]) -> None:
    came, error = poured(data, Chunked(), step=1000)
    assert (came, type(error)) == (found, failure)


@pytest.fixture
def container(lone_daemon: Daemon, engine: Engine) -> str:
    lone_daemon.json("GET", "/info")
    wait_until(lambda: lone_daemon.connections() == 0, "no client is left")
    return str(lone_daemon.json("POST", "/containers/create", {"Image": "lab/busybox", "Cmd": ["true"]})["Id"])


def test_an_archive_comes_out_as_it_went_in(lone_daemon: Daemon, container: str) -> None:
    content = os.urandom(3 << 20) + bytes(1 << 20) + b"the end"
    path = f"/containers/{container}/archive?path=/tmp"
    sock = lone_daemon.connect()
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = archive(content)
    sock.sendall(head.encode() + chunked([data[at : at + 32768] for at in range(0, len(data), 32768)]))
    answer = read_all(sock)  # which ends: the connection is closed
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Api-Version:" in answer
    sock.close()
    status, headers, found = lone_daemon.request("GET", f"/containers/{container}/archive?path=/tmp/file")
    assert (status, headers["content-type"], "x-docker-container-path-stat" in headers) == (
        200,
        "application/x-tar",
        True,
    )
    with tarfile.open(fileobj=io.BytesIO(found)) as tar:
        member = tar.extractfile("file")
        assert member is not None
        assert member.read() == content
    exported = lone_daemon.request("GET", f"/containers/{container}/export")[2]
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        assert "tmp/file" in tar.getnames()


def test_a_client_that_asks_first_is_invited(lone_daemon: Daemon, container: str) -> None:
    data = archive(os.urandom(200_000))
    sock = lone_daemon.connect()
    path = f"/containers/{container}/archive?path=/tmp"
    sock.sendall(
        f"PUT {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    )
    assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sock.sendall(data)
    assert read_all(sock).startswith(b"HTTP/1.1 200")
    sock.close()


def test_an_answer_reaches_who_is_still_sending(lone_daemon: Daemon, container: str) -> None:
    before = lone_daemon.descriptors()
    for place, body, expected in [
        ("/no/such", chunked([bytes(1 << 20)] * 8), b"HTTP/1.1 404"),
        ("/tmp", b"zz\r\n" + bytes(100), b"HTTP/1.1 400"),
        ("/tmp", chunked([b"no tar at all" * 10000]), b"HTTP/1.1 "),
    ]:
        sock = lone_daemon.connect()
        head = "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(f"PUT /containers/{container}/archive?path={place} {head}".encode() + body)
        answer = read_all(sock)
        assert answer.startswith(expected), answer
        assert isinstance(json.loads(answer.partition(b"\r\n\r\n")[2])["message"], str)
        sock.close()
    wait_until(lambda: lone_daemon.descriptors() <= before, "no descriptor is left")


def test_what_a_client_leaves_in_the_middle_ends(lone_daemon: Daemon, container: str) -> None:
    data = archive(os.urandom(8 << 20))
    assert lone_daemon.request("PUT", f"/containers/{container}/archive?path=/tmp", data)[0] == 200
    before = lone_daemon.descriptors()
    head = "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for request, part in [
        (f"PUT /containers/{container}/archive?path=/tmp", b"4000\r\n" + data[:4000]),
        ("POST /build", b"4000\r\n" + data[:4000]),
        ("POST /images/load", b"4000\r\n" + data[:4000]),
        (f"GET /containers/{container}/archive?path=/tmp/file", b"0\r\n\r\n"),
        (f"GET /containers/{container}/export", b"0\r\n\r\n"),
    ]:
        sock = lone_daemon.connect()
        sock.sendall(f"{request} {head}".encode() + part)
        if request.startswith("GET"):
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        else:
            wait_until(lambda sock=sock: not unread(sock), f"{request} is read")
        sock.close()
        wait_until(lambda: lone_daemon.descriptors() <= before, f"no descriptor of {request} is left")
    assert lone_daemon.json("GET", f"/containers/{container}/json")["State"]["Status"] == "created"


def test_a_connection_kept_open_goes_on_after_small_bodies(lone_daemon: Daemon, container: str) -> None:
    import http.client

    connection = http.client.HTTPConnection("localhost")
    connection.sock = lone_daemon.connect()
    for _ in range(2):
        connection.request("PUT", f"/containers/{container}/archive?path=/tmp", archive(b"small"))
        assert connection.getresponse().read() == b""
        assert connection.sock is not None
    connection.close()
