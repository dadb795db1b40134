"""The private registry's HTTP side: the OCI distribution spec 1.1 with tornado, over a `Depot`.

Bodies are streamed both ways, so memory does not grow with blobs. Optional: Basic authentication against an htpasswd
file, TLS, read-only mode, and an upstream that missing content is fetched from (`Upstream`, which the service makes).

Source: OCI distribution-spec 1.1, "API"; RFC 9110, 14 for ranges.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

import tornado.httpserver
import tornado.iostream
import tornado.web

from labkernel.errors import RegistryError, UsageError

from . import manifest as oci
from .depot import Depot, Problem, Stored, Upload, page

CHUNK = 1 << 20
MAX_BLOB_BYTES = 1 << 40
MAX_SENT_BYTES = 64 << 20
"""How much of a manifest that is too large is read, and forgotten, so that its sender can be told."""
FIRST_BYTE_TIMEOUT_S = 60.0
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CONTENT_RANGE = re.compile(r"(?:bytes[ =])?(\d+)-(\d+)(?:/(?:\d+|\*))?")
_CHANGES = {"POST", "PUT", "PATCH", "DELETE"}


class Upstream(Protocol):
    """Another registry that missing content comes from. Called in threads."""

    def manifest(self, depot: Depot, name: str, reference: str) -> None: ...

    def blob(self, depot: Depot, name: str, digest: str) -> None: ...


@dataclass
class Service:
    """What the handlers share."""

    depot: Depot
    read_only: bool = False
    logins: Logins | None = None
    upstream: Upstream | None = None


class Logins:
    """An htpasswd file: bcrypt and what else crypt(3) of this machine knows, and `{SHA}`."""

    def __init__(self, path: Path) -> None:
        self._entries: dict[str, str] = {}
        self._good: set[bytes] = set()
        try:
            lines = path.read_text().splitlines()
        except OSError as err:
            raise UsageError(f"cannot read {path}: {err.strerror}") from err
        for line in lines:
            user, colon, hashed = line.strip().partition(":")
            if colon and not user.startswith("#"):
                self._entries[user] = hashed
        if not self._entries:
            raise UsageError(f"{path} holds no users", resolution="htpasswd -Bc FILE USER writes one")

    def accepts(self, header: str) -> bool:
        """Whether an Authorization header is of a user with the right password."""
        mark = hashlib.sha256(header.encode("utf-8", "surrogateescape")).digest()
        if mark in self._good:
            return True
        try:
            kind, _, encoded = header.partition(" ")
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except ValueError:
            return False
        hashed = self._entries.get(user)
        if kind.lower() != "basic" or hashed is None or not _verify(password, hashed):
            return False
        # bcrypt is slow on purpose; a client sends the same header with every request.
        self._good.add(mark)
        return True


def _verify(password: str, hashed: str) -> bool:
    if hashed.startswith("{SHA}"):
        found = "{SHA}" + base64.b64encode(hashlib.sha1(password.encode()).digest()).decode()
        return hmac.compare_digest(found, hashed)
    import ctypes
    import ctypes.util

    if not hashed.startswith("$") or "\0" in password:
        return False
    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    found_bytes = library.crypt(password.encode(), hashed.encode())
    return found_bytes is not None and hmac.compare_digest(found_bytes, hashed.encode())


class _Handler(tornado.web.RequestHandler):
    def initialize(self, service: Service) -> None:
        self.service = service
        self.depot = service.depot

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Docker-Distribution-API-Version", "registry/2.0")
        self.set_header("X-Content-Type-Options", "nosniff")

    def prepare(self) -> Awaitable[None] | None:
        logins = self.service.logins
        if logins is not None and not logins.accepts(self.request.headers.get("Authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="labkernel registry", charset="UTF-8"'}
            raise Problem(401, "UNAUTHORIZED", "authentication required", challenge)
        if self.service.read_only and self.request.method in _CHANGES:
            raise Problem(405, "UNSUPPORTED", "this registry is read-only", {"Allow": "GET, HEAD"})
        return None

    def answer(self, status: int, **headers: Any) -> None:
        """An empty answer with headers (`_` for `-`)."""
        self.set_status(status)
        self.clear_header("Content-Type")
        for name, value in headers.items():
            self.set_header(name.replace("_", "-"), str(value))

    def send_json(self, value: Any, media_type: str = "application/json") -> None:
        self.set_header("Content-Type", media_type)
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        err = kwargs.get("exc_info", (None, None, None))[1]
        code, message = "UNKNOWN", self._reason
        if isinstance(err, Problem):
            code, message = err.code, err.message
            self.set_status(err.status)
            for name, value in err.headers.items():
                self.set_header(name, value)
        elif isinstance(err, RegistryError):
            code, message = getattr(err, "code", "") or code, err.brief
            self.set_status(getattr(err, "status", None) or 502)
        elif status_code == 405:
            code, message = "UNSUPPORTED", "the operation is unsupported"
            self.set_header("Allow", ", ".join(self.allowed()))
        elif status_code == 404:
            code, message = "NAME_UNKNOWN", "no such place in the API"
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}))

    def allowed(self) -> list[str]:
        """The methods there are here."""
        base = tornado.web.RequestHandler
        names = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        return [name for name in names if getattr(type(self), name.lower()) is not getattr(base, name.lower())]

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, (Problem, RegistryError)):
            super().log_exception(typ, value, tb)

    async def in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, call, *args)

    def count(self) -> int | None:
        """The `n` of a list. Raises Problem for what is no number."""
        text = self.get_query_argument("n", None)
        if text is None:
            return None
        if not text.isascii() or not text.isdigit():
            raise Problem(400, "PAGINATION_NUMBER_INVALID", "n is not a number")
        return int(text[:9])

    def send_page(self, key: str, found: list[str], **more: Any) -> None:
        count = self.count()
        part, has_more = page(found, count, self.get_query_argument("last", None))
        if has_more and part:
            query = urlencode({"n": count, "last": part[-1]})
            self.set_header("Link", f'<{self.request.path}?{query}>; rel="next"')
        self.send_json({**more, key: part})


class _Root(_Handler):
    def get(self) -> None:
        self.send_json({})

    head = get


class _Catalog(_Handler):
    def get(self) -> None:
        self.send_page("repositories", self.depot.repositories())


class _Tags(_Handler):
    def get(self, name: str) -> None:
        self.send_page("tags", self.depot.tags(name), name=name)


class _Referrers(_Handler):
    def get(self, name: str, digest: str) -> None:
        found = self.depot.referrers(name, digest)
        kind = self.get_query_argument("artifactType", None)
        if kind is not None:
            found = [each for each in found if each.get("artifactType") == kind]
            self.set_header("OCI-Filters-Applied", "artifactType")
        self.send_json({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": found}, oci.OCI_INDEX)


@tornado.web.stream_request_body
class _Manifests(_Handler):
    def prepare(self) -> Awaitable[None] | None:
        super().prepare()
        self.sent = bytearray()
        self.sent_bytes = 0
        connection: Any = self.request.connection
        connection.set_max_body_size(MAX_SENT_BYTES)
        return None

    def data_received(self, chunk: bytes) -> None:
        self.sent_bytes += len(chunk)
        if self.sent_bytes <= oci.MANIFEST_MAX:
            self.sent += chunk

    async def get(self, name: str, reference: str) -> None:
        stored = await self._find(name, reference)
        self.answer(200, Docker_Content_Digest=stored.digest, Content_Length=len(stored.raw))
        self.set_header("Content-Type", stored.media_type)
        if self.request.headers.get("If-None-Match", "").strip('"') == stored.digest:
            self.clear_header("Content-Length")
            self.set_status(304)
            return
        self.set_header("Etag", f'"{stored.digest}"')
        if self.request.method == "GET":
            self.write(stored.raw)

    head = get

    async def _find(self, name: str, reference: str) -> Stored:
        upstream = self.service.upstream
        if upstream is not None:
            await self.in_thread(upstream.manifest, self.depot, name, reference)
        return self.depot.find_manifest(name, reference)

    async def put(self, name: str, reference: str) -> None:
        raw = bytes(self.sent)
        if self.sent_bytes > oci.MANIFEST_MAX:
            raise Problem(413, "MANIFEST_INVALID", f"manifests have at most {oci.MANIFEST_MAX} bytes")
        media_type = self.request.headers.get("Content-Type", "").partition(";")[0].strip()
        if media_type not in oci.MANIFESTS | oci.INDEXES:
            raise Problem(400, "MANIFEST_INVALID", f"not a media type of a manifest: {media_type[:100]!r}")
        digest, subject = await self.in_thread(self.depot.put_manifest, name, reference, raw, media_type)
        self.answer(201, Location=f"/v2/{name}/manifests/{digest}", Docker_Content_Digest=digest)
        if subject is not None:
            self.set_header("OCI-Subject", subject)

    def delete(self, name: str, reference: str) -> None:
        self.depot.delete_manifest(name, reference)
        self.answer(202)


class _Blobs(_Handler):
    async def get(self, name: str, digest: str) -> None:
        path = await self._find(name, digest)
        size = path.stat().st_size
        first, last = 0, size - 1
        self.answer(200, Docker_Content_Digest=digest, Accept_Ranges="bytes", Etag=f'"{digest}"')
        self.set_header("Content-Type", "application/octet-stream")
        wanted = _RANGE.fullmatch(self.request.headers.get("Range", "").strip())
        if wanted and (wanted[1] or wanted[2]):
            first, last = _clamp(wanted[1], wanted[2], size)
            self.set_status(206)
            self.set_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.set_header("Content-Length", str(last - first + 1))
        if self.request.method == "HEAD":
            return
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            rest = last - first + 1
            while rest > 0:
                data = file.read(min(rest, CHUNK))
                if not data:
                    break
                rest -= len(data)
                self.write(data)
                try:
                    await self.flush()
                except tornado.iostream.StreamClosedError:
                    return

    head = get

    async def _find(self, name: str, digest: str) -> Path:
        try:
            return self.depot.find_blob(name, digest)
        except Problem as err:
            upstream = self.service.upstream
            if upstream is None or err.status != 404:
                raise
            await self.in_thread(upstream.blob, self.depot, name, digest)
            return self.depot.find_blob(name, digest)

    def delete(self, name: str, digest: str) -> None:
        self.depot.delete_blob(name, digest)
        self.answer(202)


@tornado.web.stream_request_body
class _Uploads(_Handler):
    """POST begins an upload (or does it at once), PATCH goes on, PUT ends it, GET tells how far it is."""

    upload: Upload | None = None
    refused: Problem | None = None

    def prepare(self) -> Awaitable[None] | None:
        super().prepare()
        connection: Any = self.request.connection
        connection.set_max_body_size(MAX_BLOB_BYTES)
        name, id = self.path_args[0], self.path_args[1] if len(self.path_args) > 1 else ""
        if (self.request.method == "POST") == bool(id):
            raise Problem(405, "UNSUPPORTED", "the operation is unsupported", {"Allow": ", ".join(self.allowed())})
        if self.request.method == "POST":
            if self.get_query_argument("digest", None) is not None and self._has_body():
                self.upload = self.depot.start_upload(name)
        elif self.request.method in ("PATCH", "PUT"):
            upload = self.depot.find_upload(name, id)
            if upload.busy:
                raise Problem(409, "BLOB_UPLOAD_INVALID", "another request writes to this upload")
            self._check_range(upload)
            upload.busy = True
            self.upload = upload
        return None

    def _has_body(self) -> bool:
        return self.request.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.request.headers

    def _check_range(self, upload: Upload) -> None:
        text = self.request.headers.get("Content-Range")
        if text is None:
            return
        match = _CONTENT_RANGE.fullmatch(text.strip())
        length = self.request.headers.get("Content-Length")
        fits = match is not None and int(match[1]) == upload.size
        if fits and match is not None and length is not None and length.isdigit() and int(length):
            fits = int(match[2]) - int(match[1]) + 1 == int(length)
        if not fits:
            where = {"Location": self._place(upload), "Range": _range(upload), "Docker-Upload-UUID": upload.id}
            raise Problem(416, "BLOB_UPLOAD_INVALID", f"the upload stands at byte {upload.size}", where)

    def data_received(self, chunk: bytes) -> None:
        # What is raised here ends the connection without an answer: it is told when the body has been read.
        if self.upload is not None and self.refused is None:
            try:
                self.upload.write(chunk)
            except Problem as err:
                self.refused = err

    def _check_body(self) -> None:
        if self.refused is not None:
            if self.upload is not None and self.request.method == "POST":
                self.upload.cancel()
            raise self.refused

    def on_connection_close(self) -> None:
        # What has come so far stays: the client asks and goes on.
        if self.upload is not None:
            self.upload.busy = False

    def on_finish(self) -> None:
        if self.upload is not None:
            self.upload.busy = False

    def allowed(self) -> list[str]:
        return ["GET", "PATCH", "PUT", "DELETE"] if len(self.path_args) > 1 else ["POST"]

    async def post(self, name: str) -> None:
        self._check_body()
        digest = self.get_query_argument("digest", None)
        mounted = self.get_query_argument("mount", None)
        if self.upload is not None and digest is not None:
            await self._finish(self.upload, name, digest)
            return
        if mounted is not None and self.depot.mount(name, mounted, self.get_query_argument("from", None)):
            self.answer(201, Location=f"/v2/{name}/blobs/{mounted}", Docker_Content_Digest=mounted)
            return
        self._accept(self.depot.start_upload(name), 202)

    def patch(self, name: str, id: str) -> None:
        self._check_body()
        assert self.upload is not None
        self._accept(self.upload, 202)

    async def put(self, name: str, id: str) -> None:
        self._check_body()
        assert self.upload is not None
        digest = self.get_query_argument("digest", None)
        if digest is None:
            raise Problem(400, "DIGEST_INVALID", "digest missing")
        await self._finish(self.upload, name, digest)

    def get(self, name: str, id: str) -> None:
        self._accept(self.depot.find_upload(name, id), 204)

    def delete(self, name: str, id: str) -> None:
        self.depot.find_upload(name, id).cancel()
        self.answer(204)

    async def _finish(self, upload: Upload, name: str, digest: str) -> None:
        self.depot.blob_path(digest)
        await self.in_thread(upload.finish, digest)
        self.answer(201, Location=f"/v2/{name}/blobs/{digest}", Docker_Content_Digest=digest)

    def _accept(self, upload: Upload, status: int) -> None:
        self.answer(status, Location=self._place(upload), Range=_range(upload), Docker_Upload_UUID=upload.id)

    def _place(self, upload: Upload) -> str:
        return f"/v2/{upload.name}/blobs/uploads/{upload.id}"


def make_application(service: Service) -> tornado.web.Application:
    """The routes of distribution-spec "Endpoints" over a service."""
    shared = {"service": service}
    name, reference = r"/v2/(.+)", r"([^/]+)"
    return tornado.web.Application(
        [
            (r"/v2/?", _Root, shared),
            (r"/v2/_catalog", _Catalog, shared),
            (rf"{name}/tags/list", _Tags, shared),
            (rf"{name}/manifests/{reference}", _Manifests, shared),
            (rf"{name}/referrers/{reference}", _Referrers, shared),
            (rf"{name}/blobs/uploads/?", _Uploads, shared),
            (rf"{name}/blobs/uploads/{reference}", _Uploads, shared),
            (rf"{name}/blobs/{reference}", _Blobs, shared),
        ],
        default_handler_class=_Nowhere,
        default_handler_args=shared,
        log_function=lambda handler: None,
    )


class _Nowhere(_Handler):
    def prepare(self) -> Awaitable[None] | None:
        super().prepare()
        raise Problem(404, "NAME_UNKNOWN", "no such place in the API")


class _Server(tornado.httpserver.HTTPServer):
    """Tells TLS from HTTP by the first byte. docker, podman and skopeo try TLS first; tornado would wait for the end
    of a request that never comes, and they for a handshake, ten seconds long."""

    def handle_stream(self, stream: tornado.iostream.IOStream, address: tuple[Any, ...]) -> None:
        if self.ssl_options is not None:
            super().handle_stream(stream, address)
            return
        loop = asyncio.get_running_loop()
        serve = super().handle_stream

        def look() -> None:
            timeout.cancel()
            loop.remove_reader(stream.socket)
            try:
                first = stream.socket.recv(1, socket.MSG_PEEK)
            except OSError:
                first = b""
            if first in (b"", b"\x16"):  # a TLS handshake record
                stream.close()
            else:
                serve(stream, address)

        def give_up() -> None:
            loop.remove_reader(stream.socket)
            stream.close()

        timeout = loop.call_later(FIRST_BYTE_TIMEOUT_S, give_up)
        loop.add_reader(stream.socket, look)


def make_server(service: Service, *, context: ssl.SSLContext | None = None) -> tornado.httpserver.HTTPServer:
    """An HTTP server for the service; add sockets to it."""
    return _Server(
        make_application(service),
        ssl_options=context,
        chunk_size=1 << 18,
        max_body_size=oci.MANIFEST_MAX + 1024,
        max_header_size=1 << 16,
        idle_connection_timeout=600,
        body_timeout=None,
    )


def _clamp(first: str, last: str, size: int) -> tuple[int, int]:
    """A byte range of `size` bytes. Raises Problem (416)."""
    if first:
        low, high = int(first[:19]), min(int(last[:19]) if last else size - 1, size - 1)
    else:
        low, high = max(0, size - int(last[:19])), size - 1
    if low > high:
        raise Problem(416, "RANGE_INVALID", "no such range", {"Content-Range": f"bytes */{size}"})
    return low, high


def _range(upload: Upload) -> str:
    return f"0-{max(upload.size - 1, 0)}"
