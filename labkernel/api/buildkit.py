"""`POST /build?version=2`: docker's BuildKit client. Its files come through its session, and what happens goes back as
BuildKit's own progress records, so that its display is the usual one; the builder is ours.

Source: Docker Engine API, ImageBuild; BuildKit, control.proto (StatusResponse), "filesync", "secrets".
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..building.sources import git_context, is_git, is_url, stream_context, url_context
from ..dockerfile.ignorefile import read_ignorefile
from ..errors import LabkernelError, UsageError
from ..store.blobs import temporary_directory
from . import protobuf
from .agentforward import forwarded_agents, wanted_agents
from .build import keeps_git, read_dockerfile, settings_of
from .call import Call, Host
from .errors import ApiError
from .filesend import send_directory, send_tar
from .filesync import receive
from .records import Emit, error_record, send
from .session import CallFailed, Session, Sessions

if TYPE_CHECKING:
    from ..building.result import BuildStep

UPLOAD = "upload-request"
GET_SECRET = "/moby.buildkit.secrets.v1.Secrets/GetSecret"


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
    # A client that is refused before its session is there may wait for it for ever.
    session = await call.unless_gone(call.host.shared(Sessions).find(call.query("session")))
    _output(call)
    body: Call | None = None
    done: asyncio.Future[None] | None = None
    if call.query("remote") == UPLOAD:
        body, done = await call.unless_gone(uploads.waiting(id))
        uploads.forget(id)

    def work(emit: Emit) -> None:
        # A quiet client shows all it gets: the id has to be all.
        quiet = call.flag("q")
        id = _build(call, session, body, Trace((lambda record: None) if quiet else emit))
        if id is not None:
            emit({"stream": f"{id}\n"} if quiet else {"id": "moby.image.id", "aux": {"ID": id}})

    try:
        await send(call, work, failure=_failure)
    finally:
        if done is not None and not done.done():
            done.set_result(None)
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


class Trace:
    """Tells what happens as BuildKit's StatusResponse records: vertices with their times, and their output."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._salt = f"{time.time_ns()}"
        self._started: dict[str, float] = {}
        self._last = ""

    def digest(self, key: str) -> str:
        return f"sha256:{hashlib.sha256(f'{self._salt} {key}'.encode()).hexdigest()}"

    def vertex(self, key: str, name: str, *, ended: bool = False, cached: bool = False, error: str = "") -> None:
        now = time.time()
        digest = self.digest(key)
        started = self._started.setdefault(key, now)
        fields: list[tuple[int, Any]] = [
            (1, digest),
            (2, self._last if self._last != digest else None),
            (3, name),
            (4, cached),
        ]
        fields += [(5, _timestamp(started)), (6, _timestamp(now) if ended else None), (7, error)]
        self._send(1, fields)
        if ended and not error:
            self._last = digest

    def log(self, key: str, data: bytes) -> None:
        self._send(3, [(1, self.digest(key)), (2, _timestamp(time.time())), (3, 1), (4, data)])

    def status(self, key: str, what: str, current: int, *, ended: bool = False) -> None:
        now = _timestamp(time.time())
        started = _timestamp(self._started.get(key, time.time()))
        fields = [(1, what), (2, self.digest(key)), (3, what), (4, current), (6, now), (7, started)]
        self._send(2, [*fields, (8, now if ended else None)])

    def _send(self, field: int, fields: list[tuple[int, Any]]) -> None:
        message = protobuf.encode([(field, protobuf.encode(fields))])
        self._emit({"id": "moby.buildkit.trace", "aux": base64.b64encode(message).decode()})

    @contextmanager
    def doing(self, name: str) -> Iterator[str]:
        """One step of our own, such as loading the context; yields its key."""
        self.vertex(name, name)
        try:
            yield name
        except Exception as err:
            self.vertex(name, name, ended=True, error=str(err) or type(err).__name__)
            raise
        self.vertex(name, name, ended=True)

    def step(self, step: BuildStep) -> None:
        """A step of the Dockerfile, as BuildKit names them."""
        key = f"step {step.number}"
        name = f"[{step.number}/{step.total}] {' '.join(step.text.split())}"
        if step.status == "started":
            self.vertex(key, name)
        elif step.status == "output":
            self.log(key, bytes(step.output))
        elif step.status == "failed":
            self.vertex(key, name, ended=True, error="did not complete successfully")
        else:
            self.vertex(key, name, ended=True, cached=step.status == "cached")


def _timestamp(seconds: float) -> list[tuple[int, int]]:
    return [(1, int(seconds)), (2, int(seconds % 1 * 1e9))]


class SessionSecrets(Mapping[str, bytes]):
    """Secrets that are asked of the client when a RUN wants them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[str, bytes] = {}

    def __getitem__(self, id: str) -> bytes:
        if id not in self._known:
            if GET_SECRET not in self._session.methods:
                raise KeyError(id)
            try:
                answer = self._session.call(GET_SECRET, protobuf.encode([(1, id)]))
            except CallFailed as err:
                raise KeyError(f"{id}: {err.brief}") from None
            self._known[id] = protobuf.data(protobuf.decode(answer), 1)
        return self._known[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _build(call: Call, session: Session, body: Call | None, trace: Trace) -> str | None:
    """The image's id; None when the result went to the client."""
    settings, output = settings_of(call), _output(call)
    with temporary_directory(call.engine.layout, "session") as work:
        text = _prepare(call, session, body, trace, work, settings)
        settings["secrets"] = SessionSecrets(session)
        with (
            tempfile.TemporaryDirectory(prefix="lk-a-") as sockets,
            forwarded_agents(session, wanted_agents(text), Path(sockets)) as settings["ssh"],
        ):
            result = call.engine.builds.build(text, on_step=trace.step, **settings)
        if output != "image":
            with trace.doing("exporting to client") as key:
                size = _export(call, session, result.image.id, output, work)
                trace.status(key, f"copying files {size}B", size, ended=True)
                _tell_warnings(trace, key, result.warnings)
            return None
    with trace.doing("exporting to image") as key:
        trace.status(key, f"writing image {result.image.id}", 0, ended=True)
        for name in settings["tags"]:
            trace.status(
                key, f"naming to {name if ':' in name.rpartition('/')[2] else f'{name}:latest'}", 0, ended=True
            )
        _tell_warnings(trace, key, result.warnings)
    return str(result.image.id)


def _tell_warnings(trace: Trace, key: str, warnings: Iterable[str]) -> None:
    for warning in warnings:
        trace.log(key, f"WARNING: {warning}\n".encode())


def _export(call: Call, session: Session, image: str, output: str, work: Path) -> int:
    """Send the root file system to the client; bytes sent."""
    if output == "local":
        call.engine.builds.export_directory(image, work / "output")
        return send_directory(session, work / "output")
    with open(work / "output", "w+b") as file:
        call.engine.images.export_rootfs(image, file)
        file.seek(0)
        return send_tar(session, file)


def _prepare(
    call: Call, session: Session, body: Call | None, trace: Trace, work: Path, settings: dict[str, Any]
) -> str:
    """Fetch Dockerfile and context below `work`; returns the Dockerfile, and puts the rest into `settings`."""

    def told(moment_s: int) -> None:
        settings["options"] = replace(settings["options"], context_epoch_s=moment_s)

    name, remote = call.query("dockerfile") or "Dockerfile", call.query("remote")
    context, files = work / "context", work / "dockerfile"
    if body is not None:
        with (
            trace.doing("[internal] load remote build context"),
            stream_context(
                call.engine.layout,
                body.reader(),  # type: ignore[arg-type]
                told=told,
            ) as found,
        ):
            return _kept(found, context, name, settings)
    if is_git(remote):
        with (
            trace.doing("[internal] load git source"),
            git_context(call.engine.layout, remote, keep_git=keeps_git(settings), told=told) as path,
        ):
            return _kept(path, context, name, settings)
    if remote not in ("client-session", ""):
        if not is_url(remote):
            raise UsageError(f"not a build context: {remote}")
        with (
            trace.doing("[internal] load remote build context"),
            url_context(call.engine.layout, remote, told) as found,
        ):
            return _kept(found, context, name, settings)
    files.mkdir()
    with trace.doing(f"[internal] load build definition from {name}") as key:
        follow = [name, f"{name}.dockerignore", name.lower()]
        size = receive(session, "dockerfile", files, follow=follow)
        trace.status(key, f"transferring dockerfile: {size}B", size, ended=True)
        text, path = read_dockerfile(files, name)
    with trace.doing("[internal] load .dockerignore"):
        own = path.with_name(f"{path.name}.dockerignore")
        if own.is_file() and not own.is_symlink():
            settings["ignore"] = own.read_text(errors="replace")
        else:
            general = work / "ignore"
            general.mkdir()
            receive(session, "context", general, follow=[".dockerignore"])
            file = general / ".dockerignore"
            settings["ignore"] = file.read_text(errors="replace") if file.is_file() and not file.is_symlink() else ""
    context.mkdir()
    if _takes_context(text):
        with trace.doing("[internal] load build context") as key:
            size = receive(session, "context", context, exclude=read_ignorefile(settings["ignore"]))
            trace.status(key, f"transferring context: {size}B", size, ended=True)
    settings["context"] = context
    return text


def _takes_context(text: str) -> bool:
    """Whether an instruction of the Dockerfile may read the context; a mere RUN may mount it."""
    return any(word in text.upper() for word in ("COPY", "ADD", "--MOUNT"))


def _kept(found: Path | bytes, context: Path, name: str, settings: dict[str, Any]) -> str:
    """A context that is here only while a block runs, moved to `context`."""
    import shutil

    if isinstance(found, bytes):
        return found.decode("utf-8-sig", "replace")
    shutil.copytree(found, context, symlinks=True)
    settings["context"] = context
    return read_dockerfile(context, name)[0]
