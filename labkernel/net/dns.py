"""The embedded DNS server: one light process for all containers of a store.

Each container's resolver is 127.0.0.11 inside its own network namespace. The sockets there are made by the container's
first process before it becomes the command (or, after a supervisor's death, from outside) and handed to this process,
which answers names of the container's networks itself and sends everything else on to the machine's name servers from
the machine's own network. It holds no state of its own: when it is killed, the supervisor makes another.

Packets come from containers, so nothing in them is trusted: what cannot be read is dropped. Standard library only.
Sources: RFC 1035 (messages), RFC 7766 (TCP), RFC 6761; Docker documentation, "Embedded DNS server".
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import struct
import time
from typing import Any

from ..linux import syscalls
from ..linux.files import read_file
from ..linux.netlink import RESOLVER

ADDRESS = RESOLVER
TTL_S = 600
_TIMEOUT_S = 3.0
_MAX_PENDING = 4096
_MAX_STREAMS = 256
_A, _PTR, _AAAA, _IN = 1, 12, 28, 1
_SERVFAIL, _NXDOMAIN = 2, 3


class Question:
    """The one question of a query: `name` in lower case without the last dot, and where it ends in the packet."""

    __slots__ = ("end", "kind", "name")

    def __init__(self, name: str, kind: int, end: int) -> None:
        self.name = name
        self.kind = kind
        self.end = end


def parse_question(data: bytes) -> Question | None:
    """The question of a standard query for class IN; None for anything else (RFC 1035, 4.1)."""
    if len(data) < 17:
        return None
    _, flags, questions = struct.unpack_from(">HHH", data)
    if flags & 0xF800 or questions != 1:
        return None
    labels, offset = [], 12
    while True:
        if offset >= len(data):
            return None
        length = data[offset]
        offset += 1
        if length == 0:
            break
        if length > 63 or offset + length > len(data):
            return None
        labels.append(data[offset : offset + length])
        offset += length
    if offset + 4 > len(data):
        return None
    kind, family = struct.unpack_from(">HH", data, offset)
    name = b".".join(labels).decode("ascii", "replace").lower()
    return Question(name, kind, offset + 4) if family == _IN else None


def answer(data: bytes, question: Question, records: list[tuple[int, bytes]], *, code: int = 0) -> bytes:
    """The reply to `data` with (type, rdata) records, recursion available (RFC 1035, 4.1.1)."""
    flags = 0x8080 | (struct.unpack_from(">H", data, 2)[0] & 0x0100) | code
    found = [data[:2], struct.pack(">HHHHH", flags, 1, len(records), 0, 0), data[12 : question.end]]
    for kind, rdata in records:
        found.append(struct.pack(">HHHIH", 0xC00C, kind, _IN, TTL_S, len(rdata)) + rdata)
    return b"".join(found)


def encode_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


class Names:
    """Which container has which names and address in which network; pure."""

    def __init__(self) -> None:
        self.members: dict[str, list[dict[str, Any]]] = {}

    def put(self, id: str, endpoints: list[dict[str, Any]]) -> None:
        self.members[id] = endpoints

    def drop(self, id: str) -> None:
        self.members.pop(id, None)

    def addresses(self, asker: str, name: str) -> list[str]:
        """IPv4 addresses of `name` in the networks that `asker` is in; `name.network` works, too.
        What the asker alone calls so (its links) comes first."""
        found = []
        for own in self.members.get(asker, ()):
            if not own.get("named"):
                continue
            bare = name.removesuffix("." + str(own["network_name"]).lower())
            links = [str(each).lower().partition(":")[::2] for each in own.get("links") or ()]
            meant = {target for target, alias in links if alias in (name, bare)} or {name, bare}
            for endpoints in self.members.values():
                for each in endpoints:
                    if each["network"] == own["network"] and any(word.lower() in meant for word in each["names"]):
                        found.append(str(each["ip"]))
            if found:
                break
        return found

    def name_of(self, asker: str, address: str) -> str | None:
        """`name.network` of the container with this address in one of the asker's networks."""
        networks = {own["network"] for own in self.members.get(asker, ()) if own.get("named")}
        for endpoints in self.members.values():
            for each in endpoints:
                if each["ip"] == address and each["network"] in networks and each["names"]:
                    return f"{each['names'][0]}.{each['network_name']}"
        return None


class Server:
    """The process's loop. `control` brings one JSON message per datagram, see `_obey`."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.names = Names()
        self.epoll = select.epoll()
        self.epoll.register(control.fileno(), select.EPOLLIN)
        self.sockets: dict[int, tuple[str, socket.socket]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.streams: dict[int, _Stream] = {}
        self.upstreams: dict[int, _Upstream] = {}
        self.host = _HostServers()

    def run(self) -> None:
        while True:
            timeout = 1.0 if self.upstreams or self.streams else None
            for fd, _events in self.epoll.poll(timeout):
                try:
                    self._event(fd)
                except OSError:
                    self._close(fd)
            self._expire()

    def _event(self, fd: int) -> None:
        if fd == self.control.fileno():
            self._obey()
        elif fd in self.upstreams:
            self._returned(self.upstreams[fd])
        elif fd in self.streams:
            self._read_stream(self.streams[fd])
        elif fd in self.sockets:
            id, sock = self.sockets[fd]
            if sock.type == socket.SOCK_DGRAM:
                self._read_datagrams(id, sock)
            else:
                self._accept(id, sock)

    def _obey(self) -> None:
        """{"up": id, "endpoints": […], "servers": […], "forward": bool} with the two sockets, or without them for new
        names; {"down": id}."""
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 18, 8)
        if not data:
            os._exit(0)  # the supervisor has gone
        message = json.loads(data)
        if "down" in message:
            self._forget(message["down"])
            return
        id = message["up"]
        self.names.put(id, message["endpoints"])
        self.settings[id] = message
        for fd in fds:
            sock = socket.socket(fileno=fd)
            os.set_blocking(sock.fileno(), False)
            self.sockets[fd] = (id, sock)
            self.epoll.register(fd, select.EPOLLIN)

    def _forget(self, id: str) -> None:
        self.names.drop(id)
        self.settings.pop(id, None)
        mine = [fd for fd, (owner, _) in self.sockets.items() if owner == id]
        mine += [fd for fd, stream in self.streams.items() if stream.id == id]
        mine += [fd for fd, upstream in self.upstreams.items() if upstream.id == id]
        for fd in mine:
            self._close(fd)

    def _close(self, fd: int) -> None:
        thing = self.sockets.pop(fd, (None, None))[1] or self.streams.pop(fd, None) or self.upstreams.pop(fd, None)
        if thing is not None:
            self.epoll.unregister(fd)
            thing.close()

    # What containers ask

    def _read_datagrams(self, id: str, sock: socket.socket) -> None:
        for _ in range(16):  # fair: one container cannot keep the others waiting
            try:
                data, address = sock.recvfrom(4096)
            except BlockingIOError:
                return
            self._ask(id, data, lambda reply, address=address: _send(sock, reply, address))

    def _accept(self, id: str, sock: socket.socket) -> None:
        try:
            client, _ = sock.accept()
        except BlockingIOError:
            return
        if len(self.streams) >= _MAX_STREAMS:
            client.close()
            return
        os.set_blocking(client.fileno(), False)
        self.streams[client.fileno()] = _Stream(id, client)
        self.epoll.register(client.fileno(), select.EPOLLIN)

    def _read_stream(self, stream: _Stream) -> None:
        data = stream.sock.recv(4096)
        if not data:
            self._close(stream.sock.fileno())
            return
        stream.buffer += data
        while len(stream.buffer) >= 2:
            length = int.from_bytes(stream.buffer[:2], "big")
            if len(stream.buffer) < 2 + length:
                break
            query = bytes(stream.buffer[2 : 2 + length])
            del stream.buffer[: 2 + length]
            self._ask(stream.id, query, stream.reply, by_tcp=True)

    def _ask(self, id: str, data: bytes, reply: Any, *, by_tcp: bool = False) -> None:
        question = parse_question(data)
        if question is None:
            return
        own = self._own_answer(id, data, question)
        if own is not None:
            reply(own)
            return
        servers = self._servers(id)
        if not servers or len(self.upstreams) >= _MAX_PENDING:
            reply(answer(data, question, [], code=_SERVFAIL))
            return
        self._forward(_Upstream(id, data, question, reply, servers, by_tcp=by_tcp))

    def _own_answer(self, id: str, data: bytes, question: Question) -> bytes | None:
        if question.kind == _PTR and question.name.endswith(".in-addr.arpa"):
            address = ".".join(reversed(question.name.removesuffix(".in-addr.arpa").split(".")))
            name = self.names.name_of(id, address)
            return answer(data, question, [(_PTR, encode_name(name))]) if name else None
        found = self.names.addresses(id, question.name)
        if not found:
            return None
        random.shuffle(found)
        records = [(_A, socket.inet_aton(address)) for address in found] if question.kind == _A else []
        return answer(data, question, records)

    def _servers(self, id: str) -> list[str]:
        settings = self.settings.get(id) or {}
        if not settings.get("forward", True):
            return []
        return list(settings.get("servers") or self.host.find())

    # What others are asked

    def _forward(self, upstream: _Upstream) -> None:
        while upstream.servers:
            server = upstream.servers.pop(0)
            try:
                upstream.begin(server)
            except OSError:
                continue
            self.upstreams[upstream.fd] = upstream
            self.epoll.register(upstream.fd, select.EPOLLOUT if upstream.by_tcp else select.EPOLLIN)
            return
        upstream.reply(answer(upstream.data, upstream.question, [], code=_SERVFAIL))

    def _returned(self, upstream: _Upstream) -> None:
        fd = upstream.fd
        try:
            found = upstream.advance()
        except BlockingIOError:
            return
        except OSError:
            found = b""
        if found is None:
            self.epoll.modify(fd, select.EPOLLIN)
            return
        self._close(fd)
        if found:
            upstream.reply(found)
        else:
            self._forward(upstream)

    def _expire(self) -> None:
        now = time.monotonic()
        for fd, upstream in list(self.upstreams.items()):
            if upstream.deadline < now:
                self._close(fd)
                self._forward(upstream)
        for fd, stream in list(self.streams.items()):
            if stream.deadline < now:
                self._close(fd)


class _Stream:
    """One TCP connection of a container; it may ask several questions (RFC 7766, 6.2.1)."""

    def __init__(self, id: str, sock: socket.socket) -> None:
        self.id = id
        self.sock = sock
        self.buffer = bytearray()
        self.deadline = time.monotonic() + 30

    def reply(self, data: bytes) -> None:
        try:
            self.sock.send(len(data).to_bytes(2, "big") + data)
        except OSError:
            pass  # it has gone, or does not read

    def close(self) -> None:
        self.sock.close()


class _Upstream:
    """One query on its way: a socket (a port, a number) of its own, so that nobody can guess an answer into it."""

    def __init__(
        self, id: str, data: bytes, question: Question, reply: Any, servers: list[str], *, by_tcp: bool
    ) -> None:
        self.id = id
        self.data = data
        self.question = question
        self.reply = reply
        self.servers = servers
        self.by_tcp = by_tcp
        self.number = b""
        self.deadline = 0.0
        self.buffer = bytearray()
        self.sock: socket.socket | None = None
        self.fd = -1
        self.asked = False

    def begin(self, server: str) -> None:
        self.number = os.urandom(2)
        self.asked = False
        self.buffer.clear()
        self.deadline = time.monotonic() + _TIMEOUT_S
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM if self.by_tcp else socket.SOCK_DGRAM)
        os.set_blocking(self.sock.fileno(), False)
        self.fd = self.sock.fileno()
        try:
            self.sock.connect((server, 53))
        except BlockingIOError:
            return
        except OSError:
            self.sock.close()
            raise
        if not self.by_tcp:
            self.sock.send(self.number + self.data[2:])

    def advance(self) -> bytes | None:
        """The reply, None while there is more to come; b"" for what is none. Raises OSError."""
        assert self.sock is not None
        if self.by_tcp and not self.asked:
            query = self.number + self.data[2:]
            self.sock.send(len(query).to_bytes(2, "big") + query)
            self.asked = True
            return None
        data = self.sock.recv(65535)
        if self.by_tcp:
            self.buffer += data
            if data and (len(self.buffer) < 2 or len(self.buffer) < 2 + int.from_bytes(self.buffer[:2], "big")):
                return None
            data = bytes(self.buffer[2:])
        if len(data) < 12 or data[:2] != self.number:
            return b""
        return self.data[:2] + data[2:]

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()


class _HostServers:
    """The machine's name servers, read again when its file changes."""

    def __init__(self, path: str = "/etc/resolv.conf") -> None:
        self.path = path
        self.seen: tuple[int, int] | None = None
        self.servers: list[str] = []

    def find(self) -> list[str]:
        try:
            info = os.stat(self.path)
            if self.seen != (info.st_mtime_ns, info.st_ino):
                self.seen = info.st_mtime_ns, info.st_ino
                self.servers = read_servers(self.path)
        except OSError:
            self.servers = []
        return self.servers


# What a resolv.conf said when it was what it is now: each start of a container asks for it four times.
_known: dict[str, tuple[tuple[int, int, int], list[list[str]]]] = {}


def _lines_of(path: str) -> list[list[str]]:
    """The words of each line. Raises OSError."""
    info = os.stat(path)
    version = (info.st_ino, info.st_mtime_ns, info.st_size)
    known = _known.get(path)
    if known is None or known[0] != version:
        text = read_file(path)[:65536].decode(errors="replace")
        known = _known[path] = (version, [line.split() for line in text.splitlines()])
    return known[1]


def read_servers(path: str) -> list[str]:
    """The `nameserver` lines of a resolv.conf (man 5 resolv.conf). Raises OSError."""
    lines = _lines_of(path)
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver" and words[1] != ADDRESS]


def _send(sock: socket.socket, data: bytes, address: Any) -> None:
    try:
        sock.sendto(data, address)
    except OSError:
        pass


def main(control: socket.socket) -> None:
    """Body of the process; `control` becomes descriptor 3 and is the only one kept. Never returns."""
    try:
        fd = control.detach()
        os.dup2(fd, 3, inheritable=False) if fd != 3 else None
        syscalls.close_range(4)
        syscalls.set_name(b"labkernel-dns")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        Server(socket.socket(fileno=3)).run()
    finally:
        os._exit(1)


def reachable_servers() -> list[str]:
    """The machine's name servers that a container can reach, too: not those on its loopback."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            found = [server for server in read_servers(path) if not server.startswith("127.") and ":" not in server]
        except OSError:
            continue
        if found:
            return found
    return []


def host_words(key: str) -> list[str]:
    """The words of the machine's resolv.conf behind `key` (`search`, `options`)."""
    try:
        lines = _lines_of("/etc/resolv.conf")
    except OSError:
        return []
    return next((words[1:] for words in lines if words and words[0] == key), [])
