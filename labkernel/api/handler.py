"""Tornado's side of a call: from a request to its row in the table, and from an answer or an error to bytes.

`Dispatch` is a mixin: the daemon serves it as it is, the Jupyter server behind its own login.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from abc import abstractmethod
from collections.abc import Awaitable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from tornado import web
from tornado.iostream import IOStream, StreamClosedError

from .. import __version__
from . import routes
from .call import Answer, Call, Host
from .errors import ApiError, ClientGone, document_of, message_of, status_of
from .hijack import Duplex, take_socket
from .threads import Body
from .wire import Wire, is_chunked

if TYPE_CHECKING:
    _Base = web.RequestHandler
else:
    _Base = object

BULK_BYTES = 1 << 16  # a body that is smaller has mostly come by the time it could be taken over
MAX_BODY_BYTES = 1 << 50  # build contexts and images have no bound of their own; JSON has: call.JSON_MAX_BYTES
REST_S = 1.0
_log = logging.getLogger("labkernel.api")


def words_of(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


COMMON_HEADERS = {
    "Api-Version": words_of(routes.NEWEST),
    "Docker-Experimental": "false",
    "Ostype": "linux",
    "Server": f"Labkernel/{__version__} (linux)",
}


class Dispatch(_Base):
    """Every method of every path below a host's root."""

    SUPPORTED_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")

    # -- what a host decides

    @property
    @abstractmethod
    def api_host(self) -> Host:
        """The engine and what is kept for it, of the server this handler is part of."""

    def api_path(self) -> str:
        """The path as the table knows it, still percent-encoded."""
        return self.request.path

    takes_over = False
    """Whether this host may lead connections past tornado (see `wire`): not where it counts what passes."""

    # -- tornado's events

    def compute_etag(self) -> str | None:
        return None  # hashing every answer is for caches, which docker's clients are not

    def begin_call(self) -> None:
        """At the end of `prepare`: the handler starts now, the body comes meanwhile."""
        self.request.connection.set_max_body_size(MAX_BODY_BYTES)  # type: ignore[union-attr]
        self._call: Call | None = None
        self._body_done = asyncio.Event()
        path = self.api_path()
        version, _ = routes.split_version(path)
        match = routes.find(self.request.method or "", path)
        self._wire = self._take_over() if match is not None and match.route.bulk and self._may_take_over() else None
        if self._wire is not None:
            self._body_done = self._wire.body_done
        self._body = Body()
        self._call = Call(
            self.api_host,
            self.request.method or "",
            match.params if match else {},
            version or routes.NEWEST,
            self.request.query_arguments,
            self.request.headers,
            self._wire.body if self._wire is not None else self._body,
            Transported(self),
        )
        self._task = asyncio.ensure_future(self._serve(match.route if match else None, version))

    def _may_take_over(self) -> bool:
        if not self.takes_over or self.request.version != "HTTP/1.1":
            return False
        stream = getattr(self.request.connection, "stream", None)
        headers = self.request.headers
        length = headers.get("Content-Length", "0")
        # A HEAD has no body to send; what says its length in two ways, or in a strange one, is tornado's to refuse.
        if type(stream) is not IOStream or self.request.method == "HEAD" or not length.isdecimal():
            return False
        if "Transfer-Encoding" in headers:
            return is_chunked(headers) and "Content-Length" not in headers
        return self.request.method == "GET" or int(length) >= BULK_BYTES

    def _take_over(self) -> Wire:
        sock, rest = take_socket(self.detach())
        return Wire(Duplex(sock, b""), rest, self.request.headers, self.on_connection_close)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._body.feed(chunk) if self._call is not None else None

    async def _whole_request(self, *_: Any) -> None:
        if self._call is None:
            return
        self._body.end()
        self._body_done.set()
        await self._task

    get = head = post = put = delete = patch = options = _whole_request

    def on_connection_close(self) -> None:
        if self._call is not None:
            self._call.leave()
            self._body_done.set()

    # -- the answer

    async def _serve(self, route: routes.Route | None, version: tuple[int, int] | None) -> None:
        call = self._call
        assert call is not None
        try:
            _check_version(version)
            if route is None:
                raise ApiError(404, "page not found")
            if self._wire is not None:
                await self._wire.invite()
            if route.body is not None:
                call.body = await call.decode(route.body)
            if inspect.iscoroutinefunction(route.handler):
                result = await route.handler(call)
            else:
                result = await (call.alone if route.slow else call.thread)(route.handler, call)
            await self._send(result)
        except (ClientGone, StreamClosedError):
            self._break_off()
        except asyncio.CancelledError:
            self._break_off()
            raise
        except Exception as err:
            await self._fail(err)
        finally:
            call.stream.drop()

    async def _take_rest(self) -> None:
        """Let the rest of the body come, for a moment: a client that is still sending when the connection is closed
        may see that instead of the answer."""
        assert self._call is not None
        if self._wire is not None:
            await self._wire.drain()
            return
        self._call.stream.drop()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._body_done.wait(), REST_S)

    async def _send(self, result: Any) -> None:
        call = self._call
        assert call is not None
        if call.began:
            if self._wire is not None:
                await self._wire.finish()
            elif not self._finished:
                await self._body_done.wait()
                self.finish()
            return
        if not self._body_done.is_set():
            await self._take_rest()
        answer = result if isinstance(result, Answer) else Answer(204 if result is None else 200, result)
        headers, body = _encoded(answer)
        if self._wire is not None:
            await self._wire.answer(answer.status, {**COMMON_HEADERS, **headers}, body or b"")
            await self._wire.finish()
            return
        self._set_head(answer.status, headers)
        if body is None:
            self.finish()
        else:
            self.finish(body)

    async def _fail(self, err: Exception) -> None:
        call = self._call
        assert call is not None
        status = status_of(err)
        if status == 500 and not hasattr(err, "brief"):
            _log.error("%s %s", self.request.method, self.request.path, exc_info=err)
        if call.began:
            self._break_off()
            return
        document = document_of(err)
        try:
            await self._send(Answer(status, document))
        except (StreamClosedError, ClientGone):
            pass
        except Exception:
            print(f"labkernel: {message_of(err)}", file=sys.stderr)  # noqa: T201
            self._break_off()

    def _break_off(self) -> None:
        """The only way to say that an answer which has begun is not whole."""
        if self._wire is not None:
            self.api_host.background(self._wire.close())
            return
        if self._finished:
            return
        self._finished = True
        connection: Any = self.request.connection
        stream = getattr(connection, "stream", None)
        if stream is not None:
            stream.close()

    def _set_head(self, status: int, headers: dict[str, str]) -> None:
        self.set_status(status, _reason(status))
        self.clear_header("Content-Type")
        for name, value in {**COMMON_HEADERS, **headers}.items():
            self.set_header(name, value)

    # -- what a call asks of its host (`call.Transport`)

    async def begin(self, status: int, headers: dict[str, str]) -> None:
        if self._wire is not None:
            await self._wire.begin(status, {**COMMON_HEADERS, **headers})
            return
        self._set_head(status, headers)
        await self.write_out(b"")

    async def write_out(self, data: bytes) -> None:
        if self._call is not None and self._call.gone:
            raise ClientGone("the client has left")
        if self._wire is not None:
            await self._wire.write(data)
            return
        try:
            if data:
                web.RequestHandler.write(self, data)
            await self.flush()
        except StreamClosedError:
            raise ClientGone("the client has left") from None

    async def pour_out(self, fd: int) -> bool:
        """Send what comes out of a pipe; False where this connection cannot."""
        if self._wire is None:
            return False
        await self._wire.pour(fd)
        return True

    async def hijack(self, status: int, headers: dict[str, str]) -> Duplex:
        await self._body_done.wait()
        if self._call is None or self._call.gone:
            raise ClientGone("the client has left")
        duplex = Duplex(*take_socket(self.detach()))
        lines = [f"HTTP/1.1 {status} {'UPGRADED' if status == 101 else 'OK'}"]
        lines += [f"{name}: {value}" for name, value in {**COMMON_HEADERS, **headers}.items()]
        try:
            await duplex.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
            await duplex.headers_taken()
        except BaseException:
            duplex.close()
            raise
        return duplex


class Transported:
    """A call's way to its handler; `write` is tornado's own name with another meaning."""

    def __init__(self, handler: Dispatch) -> None:
        self._handler = handler
        self.begin = handler.begin
        self.write = handler.write_out
        self.pour = handler.pour_out
        self.hijack = handler.hijack


def _encoded(answer: Answer) -> tuple[dict[str, str], bytes | None]:
    """Headers and bytes of a whole answer; no bytes where the status has no body."""
    headers, body = dict(answer.headers), answer.body
    if body is None:
        if answer.status in (204, 304):
            return headers, None
        return {**headers, "Content-Length": "0"}, None
    if isinstance(body, str):
        data, kind = body.encode(), "text/plain; charset=utf-8"
    elif isinstance(body, bytes):
        data, kind = body, "application/octet-stream"
    else:
        data, kind = msgspec.json.encode(body, enc_hook=str) + b"\n", "application/json"
    headers.setdefault("Content-Type", kind)
    headers["Content-Length"] = str(len(data))
    return headers, data


def _check_version(version: tuple[int, int] | None) -> None:
    if version is None:
        return
    if version < routes.OLDEST:
        raise ApiError(
            400,
            f"client version {words_of(version)} is too old. Minimum supported API version is "
            f"{words_of(routes.OLDEST)}, please upgrade your client to a newer version",
        )
    if version > routes.NEWEST:
        raise ApiError(
            400,
            f"client version {words_of(version)} is too new. Maximum supported API version is "
            f"{words_of(routes.NEWEST)}",
        )


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


@web.stream_request_body
class DaemonHandler(Dispatch, web.RequestHandler):
    """The daemon's: who may open its socket may use it."""

    takes_over = True

    def initialize(self, host: Host, *, guarded: bool = False) -> None:
        self._host = host
        self._guarded = guarded
        self._call = None
        self._wire = None

    @property
    def api_host(self) -> Host:
        return self._host

    def prepare(self) -> None:
        # A browser reaches plain TCP on this machine, and nothing else of ours.
        refused = self._guarded and ("Origin" in self.request.headers or not self._is_addressed_to_us())
        self.begin_call() if not refused else self._refuse()

    def _is_addressed_to_us(self) -> bool:
        """Whether no web page can have sent this by a name of its own for 127.0.0.1 (DNS rebinding)."""
        name = (self.request.host or "").rpartition("]")[0].strip("[]") or self.request.host.partition(":")[0]
        return name in ("", "localhost", "docker") or name.replace(".", "").isdigit() or ":" in name

    def _refuse(self) -> None:
        self.set_status(403)
        self.finish({"message": "requests of web pages are not answered"})
