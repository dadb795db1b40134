"""`POST /build?version=2`: docker's BuildKit client before buildx. One build (see `solving`) for one request.

Source: Docker Engine API, ImageBuild.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from ..errors import LabkernelError, UsageError
from .build import settings_of
from .call import Call, Host
from .errors import ApiError
from .records import Emit, error_record, send
from .session import Session, Sessions
from .solving import Export, Wanted, export, solve
from .trace import Trace

UPLOAD = "upload-request"


class Uploads:
    """Contexts that come as the body of a second request, by the build's id."""

    def __init__(self, host: Host) -> None:
        self._known: dict[str, asyncio.Future[tuple[Call, asyncio.Future[None]]]] = {}

    def waiting(self, id: str) -> asyncio.Future[tuple[Call, asyncio.Future[None]]]:
        if id not in self._known:
            self._known[id] = asyncio.get_running_loop().create_future()
        return self._known[id]

    def forget(self, id: str) -> None:
        self._known.pop(id, None)


async def build(call: Call) -> Any:
    """See the module."""
    id = call.query("buildid")
    uploads = call.host.shared(Uploads)
    if id.startswith(f"{UPLOAD}:"):
        return await _upload(call, uploads, id.removeprefix(f"{UPLOAD}:"))
    session = await call.unless_gone(call.host.shared(Sessions).find(call.query("session")))
    if call.query("remote") != UPLOAD:
        return await _answer(call, session, None)
    # Also of a build that is refused: the client waits for both its answers.
    body, done = await call.unless_gone(uploads.waiting(id))
    uploads.forget(id)
    try:
        return await _answer(call, session, body)
    finally:
        if not done.done():
            done.set_result(None)


async def _answer(call: Call, session: Session, body: Call | None) -> Any:
    """Build and tell of it; `body` brings the context."""
    _output(call)

    def work(emit: Emit) -> None:
        # A quiet client shows all it gets: the id has to be all.
        quiet = call.flag("q")

        def tell(message: bytes) -> None:
            if not quiet:
                emit({"id": "moby.buildkit.trace", "aux": base64.b64encode(message).decode()})

        id = _build(call, session, body, Trace(tell))
        if id is not None:
            emit({"stream": f"{id}\n"} if quiet else {"id": "moby.image.id", "aux": {"ID": id}})

    await send(call, work, failure=_failure)
    return None


async def _upload(call: Call, uploads: Uploads, id: str) -> Any:
    """Keep the body open until the build that asked for it has read it."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = uploads.waiting(id)
    if waiting.done():
        raise ApiError(400, f"a context for build {id} came already")
    waiting.set_result((call, done))
    try:
        await call.unless_gone(done)
    finally:
        uploads.forget(id)
    return call.answer(200)


def _output(call: Call) -> str:
    """Where the result goes: `image` (the store), `local` or `tar` (the client). Raises UsageError."""
    outputs = call.document("outputs") or []
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise UsageError("multiple outputs currently unsupported by the API")
    for output in outputs:
        kind = output.get("Type") or output.get("type") if isinstance(output, dict) else None
        if kind in ("local", "tar"):
            return str(kind)
        if kind not in ("moby", "image", "docker"):
            raise UsageError(
                f"the output {kind} is not available over the API", resolution="labkernel build --output writes it"
            )
    return "image"


def _failure(err: Exception) -> dict[str, Any]:
    record = error_record(err)
    details = err.details if isinstance(err, LabkernelError) else None
    if details:
        record["errorDetail"]["message"] = record["error"] = f"{record['error']}\n{details}"
    return record


def _build(call: Call, session: Session, body: Call | None, trace: Trace) -> str | None:
    """The image's id; None when the result went to the client."""
    settings, kind = settings_of(call), _output(call)
    tags = settings.pop("tags")
    wanted = Wanted(
        session,
        settings,
        dockerfile=call.query("dockerfile") or "Dockerfile",
        remote=call.query("remote"),
        upload=body.reader() if body is not None else None,  # type: ignore[arg-type]
    )
    with call.engine.images.adding(unpacks=True):
        solved = solve(call.engine, wanted, trace)
        export(call.engine, session, solved, [Export(kind, tags)], trace)
    return solved.image if kind == "image" else None
