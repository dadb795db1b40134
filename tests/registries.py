"""Registries for tests: Debian's docker-registry, and one of a few lines that answers as a test wants, true or not."""

from __future__ import annotations

import ctypes
import ctypes.util
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from waiting import wait_until

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class MadeImage:
    """An image in memory: `blobs` by digest, `manifest` bytes. `describe` changes the documents before encoding."""

    def __init__(
        self,
        *layers: dict[str, bytes],
        describe: Callable[[dict[str, Any], dict[str, Any]], None] = lambda manifest, config: None,
        architecture: str = "amd64",
    ) -> None:
        self.blobs: dict[str, bytes] = {}
        tars = [layer_tar(files) for files in layers]
        packed = [gzip.compress(tar, 1, mtime=0) for tar in tars]
        config: dict[str, Any] = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/x"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
        }
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "layers": [{"mediaType": OCI_LAYER, "digest": digest_of(b), "size": len(b)} for b in packed],
        }
        describe(manifest, config)
        raw = json.dumps(config).encode()
        manifest.setdefault("config", {"mediaType": OCI_CONFIG, "digest": digest_of(raw), "size": len(raw)})
        self.blobs = {digest_of(blob): blob for blob in (*packed, raw)}
        self.layers = [digest_of(blob) for blob in packed]
        self.manifest = json.dumps(manifest).encode()
        self.digest = digest_of(self.manifest)


class Answer:
    """What a scripted registry says: status, headers, body; `send` may write the body in its own way, `raw` is sent as
    it is, and then the connection ends."""

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        *,
        send: Callable[[BaseHTTPRequestHandler], None] | None = None,
        raw: bytes | Callable[[BaseHTTPRequestHandler], None] | None = None,
        **headers: str,
    ) -> None:
        self.body = body
        self.status = status
        self.send = send
        self.raw = raw
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def wire(self) -> bytes:
        """The whole answer as HTTP has it."""
        lines = [f"HTTP/1.1 {self.status} X", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes in the middle is nothing to tell."""


class Scripted:
    """A registry on 127.0.0.1 that holds images; `rules` (tried first) may answer anything instead."""

    def __init__(self) -> None:
        self.documents: dict[str, tuple[bytes, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.rules: list[Callable[[BaseHTTPRequestHandler], Answer | None]] = []
        self.asked: list[str] = []
        self.server = _Quiet(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.domain = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def hold(self, image: MadeImage, tag: str = "latest") -> None:
        self.blobs.update(image.blobs)
        self.document(tag, image.manifest, OCI_MANIFEST)

    def document(self, reference: str, raw: bytes, media_type: str) -> None:
        self.documents[reference] = self.documents[digest_of(raw)] = (raw, media_type)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _find(self, handler: BaseHTTPRequestHandler) -> Answer:
        for rule in self.rules:
            answer = rule(handler)
            if answer is not None:
                return answer
        return self.honest(handler)

    def honest(self, handler: BaseHTTPRequestHandler) -> Answer:
        """What a registry would say."""
        kind, _, reference = handler.path.rpartition("/")[0].rpartition("/")[2], "", handler.path.rpartition("/")[2]
        if kind == "manifests" and reference in self.documents:
            raw, media_type = self.documents[reference]
            return Answer(raw, Content_Type=media_type, Docker_Content_Digest=digest_of(raw))
        if kind == "blobs" and reference in self.blobs:
            return ranged(self.blobs[reference], handler)
        return Answer(b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}', 404)

    def _handler(outer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
                length = int(self.headers.get("Content-Length") or 0)
                self.body = self.rfile.read(length) if length else b""
                answer = outer._find(self)
                if answer.raw is not None:
                    self.close_connection = True
                    try:
                        answer.raw(self) if callable(answer.raw) else self.wfile.write(answer.raw)
                    except OSError:
                        pass
                    return
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.send is None or "Content-Length" in answer.headers:
                    if "Content-Length" not in answer.headers:
                        self.send_header("Content-Length", str(len(answer.body)))
                else:
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                try:
                    if answer.send is not None:
                        answer.send(self)
                        self.close_connection = True
                    elif self.command != "HEAD":
                        self.wfile.write(answer.body)
                except OSError:
                    self.close_connection = True

            do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def ranged(blob: bytes, handler: BaseHTTPRequestHandler) -> Answer:
    wanted = handler.headers.get("Range")
    if not wanted:
        return Answer(blob)
    first = int(wanted.removeprefix("bytes=").partition("-")[0])
    return Answer(blob[first:], 206, Content_Range=f"bytes {first}-{len(blob) - 1}/{len(blob)}")


@contextmanager
def scripted() -> Iterator[Scripted]:
    registry = Scripted()
    try:
        yield registry
    finally:
        registry.close()


@contextmanager
def docker_registry(directory: Path, *, extra: str = "") -> Iterator[str]:
    """Debian's docker-registry on a port of its own; yields its domain. Skips where it is not installed."""
    binary = shutil.which("docker-registry")
    if binary is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")
    domain = f"127.0.0.1:{free_port()}"
    config = directory / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/content}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{domain}'}}\n{extra}"
    )
    env = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    process = subprocess.Popen([binary, "serve", str(config)], env=env, stderr=subprocess.DEVNULL)
    try:
        wait_for(domain, process)
        yield domain
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(domain: str, process: subprocess.Popen[Any]) -> None:
    """Until something listens there. Ends with the process."""
    host, _, port = domain.rpartition(":")

    def listens() -> bool:
        assert process.poll() is None, "the registry ended"
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True

    wait_until(listens, f"{domain} listens")


def make_bcrypt(password: str) -> str:
    """An htpasswd hash of a password. Skips where crypt(3) makes none."""
    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    found = library.crypt(password.encode(), b"$2y$05$abcdefghijklmnopqrstuu")
    if found is None or not found.startswith(b"$2y$"):
        pytest.skip("crypt(3) of this machine knows no bcrypt")
    return str(found.decode())


@contextmanager
def serving(directory: Path, *words: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """`labkernel registry serve` on a port of its own; yields its domain. It must end with 0 on SIGTERM."""
    domain = f"127.0.0.1:{free_port()}"
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(directory / "root"),
        "LABKERNEL_RUNTIME_DIR": str(directory / "run"),
        **(env or {}),
    }
    argv = [sys.executable, "-m", "labkernel.cli", "registry", "serve", "--listen", domain, *words]
    process = subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL)
    try:
        wait_for(domain, process)
        yield domain
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


class Reply:
    def __init__(self, raw: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = raw.status, raw.headers, raw.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["errors"][0]["code"])


def ask(domain: str, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
    connection = http.client.HTTPConnection(domain, timeout=20)
    try:
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        return Reply(connection.getresponse())
    finally:
        connection.close()


def give(domain: str, name: str, blob: bytes) -> str:
    digest = digest_of(blob)
    reply = ask(domain, "POST", f"/v2/{name}/blobs/uploads/?digest={digest}", blob)
    assert reply.status == 201
    return digest


def give_image(domain: str, name: str, tag: str, image: MadeImage) -> Reply:
    for blob in image.blobs.values():
        give(domain, name, blob)
    return ask(domain, "PUT", f"/v2/{name}/manifests/{tag}", image.manifest, Content_Type=OCI_MANIFEST)
