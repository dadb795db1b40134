"""A client of BuildKit's control protocol on the gRPC of others (grpcio), for what Compose's client never asks.

grpcio cannot turn an HTTP connection over, so a relay does that: it answers on a unix socket and upgrades towards the
daemon. A session is the same the other way round: grpcio serves, and the relay brings the daemon to it.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, switched

from labkernel.api import protobuf

CONTROL, BRIDGE = "/moby.buildkit.v1.Control", "/moby.buildkit.v1.frontend.LLBBridge"
FILES, RESULT = "/moby.filesync.v1.FileSync/DiffCopy", "/moby.filesync.v1.FileSend/DiffCopy"
UPLOAD = "/moby.upload.v1.Upload/Pull"
Decoded = dict[int, list[Any]]


def sleeping(seconds: str) -> list[str]:
    """The processes that sleep so long."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(path.parent.name)
    return found


def pairs(number: int, given: Mapping[str, str]) -> list[tuple[int, Any]]:
    """A map of strings as a field."""
    return [(number, [(1, key), (2, value)]) for key, value in given.items()]


def upgraded(daemon: Daemon, path: str, headers: Mapping[str, str] = {}) -> socket.socket:
    sock = daemon.connect()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: h2c"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    switched(sock)
    sock.settimeout(None)
    return sock


def joined(one: socket.socket, other: socket.socket) -> None:
    """Bytes from each to the other until one of them ends."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    for source, target in ((one, other), (other, one)):
        threading.Thread(target=pump, args=(source, target), daemon=True).start()


class Client:
    """A client and its session. `directories`: what the session serves by name; `results`: what came back."""

    def __init__(self, daemon: Daemon, folder: Path, directories: Mapping[str, Path] = {}) -> None:
        grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
        self.grpc = grpc
        self.id = os.urandom(8).hex()
        self.directories = directories
        self.uploads: dict[str, bytes] = {}
        self.results: dict[str, bytes] = {}
        self._folder = folder
        self._daemon = daemon
        self._stack = ExitStack()
        listener = self._listen("c")
        self._stack.callback(listener.close)
        threading.Thread(target=self._relay, args=(listener,), daemon=True).start()
        self.channel = grpc.insecure_channel(f"unix:{folder}/c")
        self._stack.callback(self.channel.close)
        self._open_session()

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._folder / name))
        listener.listen()
        return listener

    def _relay(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                joined(client, upgraded(self._daemon, "/grpc"))

    def _open_session(self) -> None:
        server = self.grpc.server(futures.ThreadPoolExecutor(8))
        methods = {FILES: self._files, RESULT: self._result, UPLOAD: self._upload}
        for path, method in methods.items():
            _, service, name = path.split("/")
            handler = self.grpc.stream_stream_rpc_method_handler(method)
            server.add_generic_rpc_handlers((self.grpc.method_handlers_generic_handler(service, {name: handler}),))
        server.add_insecure_port(f"unix:{self._folder}/s")
        server.start()
        self._stack.callback(lambda: server.stop(None).wait())
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(f"{self._folder}/s")
        headers = {
            "X-Docker-Expose-Session-Uuid": self.id,
            "X-Docker-Expose-Session-Grpc-Method": ",".join(methods),
        }
        theirs = upgraded(self._daemon, "/session", headers)
        self._stack.callback(theirs.close)
        joined(ours, theirs)

    def close(self) -> None:
        self._stack.close()

    # -- calls

    def call(self, path: str, fields: Sequence[tuple[int, Any]] = (), build: str = "") -> Decoded:
        metadata = [("buildkit-controlapi-buildid", build)] if build else []
        return protobuf.decode(self.channel.unary_unary(path)(protobuf.encode(fields), metadata=metadata, timeout=120))

    def stream(self, path: str, fields: Sequence[tuple[int, Any]] = ()) -> Iterator[Decoded]:
        for message in self.channel.unary_stream(path)(protobuf.encode(fields), timeout=120):
            yield protobuf.decode(message)

    def solve(
        self, attributes: Mapping[str, str] = {}, *exports: tuple[str, Mapping[str, str]], **more: Any
    ) -> Decoded:
        fields: list[tuple[int, Any]] = [
            (1, os.urandom(8).hex()),
            (5, self.id),
            (6, more.pop("frontend", "dockerfile.v0")),
        ]
        fields += pairs(7, attributes)
        fields += [(13, [(1, kind), *pairs(2, given)]) for kind, given in exports]
        return self.call(f"{CONTROL}/Solve", [*fields, *more.pop("fields", ())])

    # -- the session

    def _files(self, packets: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """The regular files of a directory, as fsutil's sender does it."""
        metadata = dict(context.invocation_metadata())
        root = self.directories[metadata["dir-name"]]
        paths = sorted(path for path in root.iterdir() if path.is_file())
        for path in paths:
            about = path.stat()
            fields = [(1, path.name), (2, stat.S_IMODE(about.st_mode)), (5, about.st_size), (6, about.st_mtime_ns)]
            yield protobuf.encode([(2, fields)])
        yield protobuf.encode([])
        for data in packets:
            packet = protobuf.decode(data)
            number = protobuf.number(packet, 3)
            if protobuf.number(packet, 1) == 3:
                yield protobuf.encode([(1, 3)])
                return
            content = paths[number].read_bytes()
            if content:
                yield protobuf.encode([(1, 2), (3, number), (4, content)])
            yield protobuf.encode([(1, 2), (3, number)])

    def _result(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        number = dict(context.invocation_metadata())["buildkit-attachable-exporter-id"]
        self.results[number] = b"".join(protobuf.data(protobuf.decode(each), 1) for each in messages)
        return iter(())

    def _upload(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield protobuf.encode([(1, self.uploads[dict(context.invocation_metadata())["urlpath"]])])
