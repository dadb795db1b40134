"""Published ports without NAT: one light process that carries connections from the machine to containers.

Used where the bridges do not lie in the machine's own network namespace (rootless), and where there is no nftables. The
listening sockets are made by the supervisor in the machine's network; this process lives where the bridges are, so that
its own connections reach the containers. Bytes go by splice(2) through a pipe and are never copied into Python.
Containers see the bridge's address as their peer. Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from typing import Any

from ..linux import syscalls

_PIPE_BYTES = 1 << 20
_UDP_IDLE_S = 60.0
_MAX_UDP_PEERS = 4096
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class _Way:
    """One direction of a connection: source → pipe → target."""

    __slots__ = ("done", "held", "pipe", "source", "target")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            import fcntl

            fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # the user's share of pipe memory is used up (man 7 pipe)
        self.held = 0
        self.done = False

    def move(self) -> None:
        """Carry what there is. Raises OSError when either side is gone."""
        for _ in range(64):
            moved = self._fill() + self._drain()
            if not moved:
                break
        if self.done and not self.held:
            try:
                self.target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def _fill(self) -> int:
        if self.done or self.held >= _PIPE_BYTES // 2:
            return 0
        try:
            count = os.splice(self.source.fileno(), self.pipe[1], _PIPE_BYTES, flags=_FLAGS)
        except BlockingIOError:
            return 0
        if count == 0:
            self.done = True
        self.held += count
        return count

    def _drain(self) -> int:
        if not self.held:
            return 0
        try:
            count = os.splice(self.pipe[0], self.target.fileno(), self.held, flags=_FLAGS)
        except BlockingIOError:
            return 0
        self.held -= count
        return count

    @property
    def finished(self) -> bool:
        return self.done and not self.held

    def close(self) -> None:
        os.close(self.pipe[0])
        os.close(self.pipe[1])


class _Connection:
    """A client's TCP connection and ours to the container."""

    def __init__(self, key: str, client: socket.socket, server: socket.socket) -> None:
        self.key = key
        self.client = client
        self.server = server
        self.connected = False
        self.ways = (_Way(client, server), _Way(server, client))

    def interest(self, sock: socket.socket) -> int:
        """What to wait for on one of the two sockets."""
        reading = next(way for way in self.ways if way.source is sock)
        writing = next(way for way in self.ways if way.target is sock)
        wants = _IN if not reading.done and reading.held < _PIPE_BYTES // 2 else 0
        return wants | (_OUT if writing.held or not self.connected else 0)

    def close(self) -> None:
        for way in self.ways:
            way.close()
        self.client.close()
        self.server.close()


class _Peer:
    """A UDP client of a published port: a socket of its own towards the container."""

    def __init__(self, key: str, listener: socket.socket, address: Any, server: socket.socket) -> None:
        self.key = key
        self.listener = listener
        self.address = address
        self.server = server
        self.used = time.monotonic()

    def close(self) -> None:
        self.server.close()


class Forwarder:
    """The process's loop. `control` brings {"open": key, "proto", "to": [address, port]} with the listening sockets,
    and {"close": key}."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.epoll = select.epoll()
        self.epoll.register(control.fileno(), _IN)
        self.listeners: dict[int, tuple[str, socket.socket, str, tuple[str, int]]] = {}
        self.connections: dict[int, _Connection] = {}
        self.peers: dict[int, _Peer] = {}
        self.by_address: dict[tuple[int, Any], _Peer] = {}

    def run(self) -> None:
        while True:
            for fd, events in self.epoll.poll(10.0 if self.peers else None):
                if fd == self.control.fileno():
                    self._obey()
                elif fd in self.listeners:
                    self._arrive(fd)
                elif fd in self.connections:
                    self._carry(self.connections[fd], events)
                elif fd in self.peers:
                    self._answer(self.peers[fd])
            self._expire()

    def _obey(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
        if not data:
            os._exit(0)  # the supervisor has gone
        message = json.loads(data)
        if "close" in message:
            self._forget(message["close"])
            return
        for fd in fds:
            sock = socket.socket(fileno=fd)
            os.set_blocking(fd, False)
            if message["proto"] == "tcp":
                # Its connections take this over, and only then can the port be bound again while they are in TIME_WAIT.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.listen(1024)
            self.listeners[fd] = (message["open"], sock, message["proto"], (message["to"][0], message["to"][1]))
            self.epoll.register(fd, _IN)

    def _forget(self, key: str) -> None:
        for fd, (owner, sock, _, _) in list(self.listeners.items()):
            if owner == key:
                del self.listeners[fd]
                self.epoll.unregister(fd)
                sock.close()
        for connection in {id(each): each for each in self.connections.values() if each.key == key}.values():
            self._drop(connection)
        for peer in [each for each in self.peers.values() if each.key == key]:
            self._leave(peer)

    def _arrive(self, fd: int) -> None:
        key, listener, proto, target = self.listeners[fd]
        for _ in range(32):
            try:
                if proto == "tcp":
                    self._accept(key, listener, target)
                else:
                    self._datagram(key, listener, target)
            except BlockingIOError:
                return
            except OSError as err:
                if err.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.01)  # the listener stays readable: without a pause this would be a busy loop
                return

    def _accept(self, key: str, listener: socket.socket, target: tuple[str, int]) -> None:
        client, _ = listener.accept()
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for sock in (client, server):
            os.set_blocking(sock.fileno(), False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            server.connect(target)
        except BlockingIOError:
            pass
        except OSError:
            client.close()
            server.close()
            return
        connection = _Connection(key, client, server)
        for sock in (client, server):
            self.connections[sock.fileno()] = connection
            self.epoll.register(sock.fileno(), _OUT if sock is server else 0)

    def _carry(self, connection: _Connection, events: int) -> None:
        try:
            if not connection.connected:
                failed = connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if failed:
                    raise OSError(failed, os.strerror(failed))
                connection.connected = True
            for way in connection.ways:
                way.move()
        except OSError:
            self._drop(connection)
            return
        if all(way.finished for way in connection.ways) or (
            events & select.EPOLLHUP and not any(way.held for way in connection.ways)
        ):
            self._drop(connection)
            return
        for sock in (connection.client, connection.server):
            self.epoll.modify(sock.fileno(), connection.interest(sock))

    def _drop(self, connection: _Connection) -> None:
        for sock in (connection.client, connection.server):
            if self.connections.pop(sock.fileno(), None) is not None:
                self.epoll.unregister(sock.fileno())
        connection.close()

    def _datagram(self, key: str, listener: socket.socket, target: tuple[str, int]) -> None:
        data, address = listener.recvfrom(65535)
        place = (listener.fileno(), address)
        peer = self.by_address.get(place)
        if peer is None:
            if len(self.peers) >= _MAX_UDP_PEERS:
                return
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            os.set_blocking(server.fileno(), False)
            server.connect(target)
            peer = self.by_address[place] = self.peers[server.fileno()] = _Peer(key, listener, address, server)
            self.epoll.register(server.fileno(), _IN)
        peer.used = time.monotonic()
        try:
            peer.server.send(data)
        except OSError:
            pass  # refused, or full: UDP loses

    def _answer(self, peer: _Peer) -> None:
        for _ in range(32):
            try:
                data = peer.server.recv(65535)
            except BlockingIOError:
                return
            except OSError:
                return  # refused: the next datagram may fare better
            peer.used = time.monotonic()
            try:
                peer.listener.sendto(data, peer.address)
            except OSError:
                pass

    def _leave(self, peer: _Peer) -> None:
        self.peers.pop(peer.server.fileno(), None)
        self.by_address = {place: each for place, each in self.by_address.items() if each is not peer}
        self.epoll.unregister(peer.server.fileno())
        peer.close()

    def _expire(self) -> None:
        if self.peers:
            oldest = time.monotonic() - _UDP_IDLE_S
            for peer in [each for each in self.peers.values() if each.used < oldest]:
                self._leave(peer)


def main(control: socket.socket, namespace: int | None) -> None:
    """Body of the process: in the network namespace `namespace` (None: the caller's own). Never returns."""
    try:
        if namespace is not None:
            syscalls.setns(namespace, syscalls.CLONE_NEWNET)
        fd = control.detach()
        os.dup2(fd, 3, inheritable=False) if fd != 3 else None
        syscalls.close_range(4)
        syscalls.set_name(b"labkernel-ports")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        Forwarder(socket.socket(fileno=3)).run()
    finally:
        os._exit(1)
