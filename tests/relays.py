"""Things between a client and a registry: an HTTP proxy, and a relay that cuts connections."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from labkernel.linux.waiting import readable

CHUNK = 1 << 14


class _Server:
    """Accepts connections on a free port of 127.0.0.1 and serves each in a thread of its own."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._run, args=(client,), daemon=True).start()

    def _run(self, client: socket.socket) -> None:
        self._open.add(client)
        with client, contextlib.suppress(OSError):
            self.serve(client)
        self._open.discard(client)

    def _pass_on(self, client: socket.socket, server: socket.socket, first: bytes = b"") -> None:
        """Both ways until one side ends, or `counted` says that this was enough."""
        if first and not self.counted(len(first), up=True):
            return
        server.sendall(first)
        peers = {client: server, server: client}
        while True:
            ready = readable(*(sock.fileno() for sock in peers))
            for sock in [sock for sock in peers if sock.fileno() in ready]:
                data = sock.recv(CHUNK)
                if not data or not self.counted(len(data), up=sock is client):
                    return
                peers[sock].sendall(data)

    def counted(self, count: int, *, up: bool) -> bool:
        return True


class Proxy(_Server):
    """An HTTP proxy (CONNECT, and absolute requests) that knows names of its own: `names` by `host:port`."""

    def __init__(self, names: Mapping[str, str], login: str | None = None) -> None:
        self.names = dict(names)
        self.login = login
        self.asked: list[str] = []
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(CHUNK)
            if not data:
                return
            head += data
        lines, _, rest = head.partition(b"\r\n\r\n")
        first, *headers = lines.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        self.asked.append(f"{method} {target}")
        given = dict(line.split(": ", 1) for line in headers)
        if self.login is not None and given.get("Proxy-Authorization") != _basic(self.login):
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        place, path = target, ""
        if method != "CONNECT":
            place, _, path = target.removeprefix("http://").partition("/")
        where = self.names.get(place)
        if where is None:
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        host, _, port = where.rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._pass_on(client, server, rest)
                return
            # One request a connection: the next one may be for elsewhere.
            kept = [line for line in headers if not line.lower().startswith(("proxy-", "connection:"))]
            request = "\r\n".join([f"{method} /{path} HTTP/1.1", *kept, "Connection: close", "", ""])
            self._pass_on(client, server, request.encode("latin-1") + rest)


class Relay(_Server):
    """Passes connections on to `target`, and cuts the first `cuts` of those that carry more than `after` bytes."""

    def __init__(self, target: str, *, after: int, cuts: int, up: bool) -> None:
        self.target = target
        self.after = after
        self.cuts = cuts
        self.up = up
        self.passed = 0
        """Bytes that went the way that is cut."""
        self._on = 0
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        host, _, port = self.target.rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            self._pass_on(client, server)

    def counted(self, count: int, *, up: bool) -> bool:
        if up != self.up:
            return True
        self.passed += count
        self._on += count
        if self.cuts > 0 and self._on > self.after:
            self.cuts -= 1
            self._on = 0
            return False
        return True


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


@contextmanager
def closing(server: _Server) -> Iterator[_Server]:
    try:
        yield server
    finally:
        server.close()
