"""`POST /grpc`: BuildKit's control protocol, as `docker buildx` and Compose 2 speak it. The builder is ours.

A build is either asked for in one call (`Control.Solve` with the frontend "dockerfile.v0"), or (what buildx does) led
by its client: `Control.Solve` without a frontend opens it, `LLBBridge.Solve` builds, `LLBBridge.Return` says which
result it is to be, and then the first call exports that. `Control.Status` tells meanwhile. Graphs of BuildKit's own
(LLB), and so other frontends, are refused: the only language here is the Dockerfile's.
Source: BuildKit, control.proto, gateway.proto, worker.proto, caps.proto.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .. import __version__
from ..building.remotecache import CachePlace
from . import protobuf
from .call import Call, Host
from .errors import ApiError
from .frontend import NAME, Stop, answer, cache_places, located, wanted_of
from .grpc import EXISTS, INVALID, NOT_FOUND, PRECONDITION, UNIMPLEMENTED, Method, Rpc, RpcError, Server, code_of
from .http2 import needs_h2
from .routes import Route
from .session import Session, Sessions
from .solving import Export, Solved, export, solve
from .system import architecture
from .threads import in_thread
from .trace import Progress, Trace

if TYPE_CHECKING:
    from ..building.usage import CacheRecord

T = TypeVar("T")
_FILTER = re.compile(r'([A-Za-z-]+)(?:(?:==|~=)("?[^"!=~]*"?))?')
CONTROL, BRIDGE = "/moby.buildkit.v1.Control", "/moby.buildkit.v1.frontend.LLBBridge"
BUILD_ID = "buildkit-controlapi-buildid"
ARRIVE_S = 10.0
WORKER = "labkernel"
_BRIDGE_CAPS = (
    *("solve.base", "return", "returnmap", "proto.refarray", "importcaches", "resolveimage"),
    *("resolveimage.resolvemode", "frontend.inputs", "frontend.caps", "gateway.solve.metadata"),
    *("gateway.solve.evaluate", "gateway.evaluate", "gateway.warnings"),
)
_BUILD_CAPS = ("exporter.multiple",)
_STORED = ("moby", "image")
_SENT = ("docker", "oci", "tar", "local")


class Job:
    """One build from its opening call on."""

    def __init__(self, host: Host, request: Mapping[int, list[Any]]) -> None:
        self.progress = Progress()
        self.stop = Stop()
        self.solved: dict[str, Solved] = {}
        self.returned: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.entitlements = [data.decode(errors="replace") for data in protobuf.items(request, 9)]
        self.outputs = _outputs(request)
        cache = protobuf.decode(protobuf.data(request, 8))
        self.cache_to, self.cache_from = (
            _caches(protobuf.items(cache, 4), "to"),
            _caches(protobuf.items(cache, 5), "from"),
        )
        self._host = host
        self._session = protobuf.text(request, 5)

    async def session(self) -> Session:
        """Raises ApiError when it does not come."""
        return await self._host.shared(Sessions).find(self._session)

    def trace(self) -> Trace:
        return Trace(self.progress.add, warnings_apart=True)

    def end(self) -> None:
        self.stop()
        self.progress.end()
        if not self.returned.cancel() and not self.returned.cancelled():
            self.returned.exception()  # has been seen


class Jobs:
    """The builds of a host by their clients' names for them."""

    def __init__(self, host: Host) -> None:
        self._known: dict[str, Job] = {}
        self._changed = asyncio.Condition()

    async def add(self, ref: str, job: Job) -> None:
        """Raises RpcError."""
        if not ref:
            raise RpcError(INVALID, "a build needs a ref")
        async with self._changed:
            if ref in self._known:
                raise RpcError(EXISTS, f"job ref {ref} already exists")
            self._known[ref] = job
            self._changed.notify_all()

    def forget(self, ref: str) -> None:
        """Soon: who is about to ask what happened in a short build, still can."""
        asyncio.get_running_loop().call_later(ARRIVE_S, self._known.pop, ref, None)

    async def find(self, ref: str) -> Job:
        """Raises RpcError when it does not come."""

        async def wait() -> Job:
            async with self._changed:
                await self._changed.wait_for(lambda: ref in self._known)
            return self._known[ref]

        try:
            return await asyncio.wait_for(wait(), ARRIVE_S)
        except TimeoutError:
            raise RpcError(NOT_FOUND, f"no such job {ref}") from None


class Control:
    """The methods for one connection."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._jobs = host.shared(Jobs)

    def methods(self) -> dict[str, Method]:
        return {
            f"{CONTROL}/Solve": self.solve,
            f"{CONTROL}/Status": self.status,
            f"{CONTROL}/Info": self.info,
            f"{CONTROL}/ListWorkers": self.list_workers,
            f"{CONTROL}/DiskUsage": self.disk_usage,
            f"{CONTROL}/Prune": self.prune,
            f"{BRIDGE}/Ping": self.ping,
            f"{BRIDGE}/Solve": self.bridge_solve,
            f"{BRIDGE}/Return": self.bridge_return,
            f"{BRIDGE}/Evaluate": self.evaluate,
            f"{BRIDGE}/Inputs": self.inputs,
            f"{BRIDGE}/Warn": self.warn,
            f"{BRIDGE}/ResolveImageConfig": self.resolve_image_config,
        }

    # -- builds ----------------------------------------------------------------------------------------------------

    async def solve(self, rpc: Rpc) -> protobuf.Fields:
        request = await rpc.request()
        _refuse_graphs(request, 2)
        frontend, ref = protobuf.text(request, 6), protobuf.text(request, 1)
        job = Job(self._host, request)
        await self._jobs.add(ref, job)
        try:
            solved: Solved | dict[str, bytes] | None
            if frontend:
                solved = await self._build(job, frontend, _pairs(request, 7))
            else:
                id = await job.returned
                solved = job.solved[id] if id is not None else None
            said = await self._export(job, solved) if isinstance(solved, Solved) else {}
            return [(1, [(1, key), (2, value)]) for key, value in said.items()]
        finally:
            job.end()
            self._jobs.forget(ref)

    async def _build(self, job: Job, frontend: str, attributes: Mapping[str, str]) -> Solved | dict[str, bytes]:
        """A result, or the answer to a request that builds nothing."""
        if frontend != NAME:
            raise RpcError(UNIMPLEMENTED, f"no frontend {frontend} here: only Dockerfiles can be built ({NAME})")
        session = await job.session()
        caches: dict[str, Sequence[CachePlace]] = {"cache_to": job.cache_to, "cache_from": job.cache_from}
        wanted = wanted_of(attributes, session, job.stop, entitlements=job.entitlements, **caches)
        engine, request = await in_thread(lambda: self._host.engine), attributes.get("requestid", "")
        try:
            if request:
                return await _stoppable(job, lambda: answer(engine, request, wanted, job.trace()))
            return await _stoppable(job, lambda: solve(engine, wanted, job.trace()))
        except Exception as err:
            details = located(err, wanted.dockerfile, wanted.text)
            if not details or isinstance(err, RpcError):
                raise
            raise RpcError(code_of(err), err.brief, details) from err  # type: ignore[attr-defined]

    async def _export(self, job: Job, solved: Solved) -> dict[str, str]:
        if not job.outputs:
            return {}
        session = await job.session()
        engine = self._host.engine
        return await _stoppable(job, lambda: export(engine, session, solved, job.outputs, job.trace()))

    async def status(self, rpc: Rpc) -> None:
        job = await self._jobs.find(protobuf.text(await rpc.request(), 1))
        async for messages in job.progress.follow():
            await rpc.send(messages)

    async def _led(self, rpc: Rpc) -> Job:
        """The build that a call of its client belongs to."""
        return await self._jobs.find(rpc.metadata.get(BUILD_ID, ""))

    async def bridge_solve(self, rpc: Rpc) -> protobuf.Fields:
        job, request = await self._led(rpc), await rpc.request()
        _refuse_graphs(request, 1)
        found = await self._build(job, protobuf.text(request, 2), _pairs(request, 3))
        if isinstance(found, Solved):
            id = f"{len(job.solved)}-{found.image}"
            job.solved[id] = found
            return [(3, [(3, [(1, id)])])]
        return [(3, [(10, [(1, name), (2, value)]) for name, value in found.items()])]

    async def bridge_return(self, rpc: Rpc) -> protobuf.Fields:
        job, request = await self._led(rpc), await rpc.request()
        if job.returned.done():
            raise RpcError(PRECONDITION, "the result of this build is already set")
        if 2 in request:
            status = protobuf.decode(protobuf.data(request, 2))
            details = [protobuf.decode(each) for each in protobuf.items(status, 3)]
            found = [(protobuf.text(each, 1), protobuf.data(each, 2)) for each in details]
            failure = RpcError(protobuf.number(status, 1) or 2, protobuf.text(status, 2), found)
            job.returned.set_exception(failure)
            return []
        ids = _references(protobuf.decode(protobuf.data(request, 1)))
        if any(id not in job.solved for id in ids):
            raise RpcError(NOT_FOUND, "no such result of this build")
        if len(ids) > 1:
            raise RpcError(UNIMPLEMENTED, "a build has one result here: one platform, without attestations")
        job.returned.set_result(ids[0] if ids else None)
        return []

    async def evaluate(self, rpc: Rpc) -> protobuf.Fields:
        job, request = await self._led(rpc), await rpc.request()
        if protobuf.text(request, 1) not in job.solved:
            raise RpcError(NOT_FOUND, "no such result of this build")
        return []  # there is no result here that has not been built

    async def inputs(self, rpc: Rpc) -> protobuf.Fields:
        await self._led(rpc)
        return []

    async def warn(self, rpc: Rpc) -> protobuf.Fields:
        job, message = await self._led(rpc), await rpc.receive()
        # A WarnRequest has the fields of the VertexWarning that it becomes.
        await in_thread(job.progress.add, protobuf.encode([(4, message or b"")]))
        return []

    async def resolve_image_config(self, rpc: Rpc) -> protobuf.Fields:
        import json

        name = protobuf.text(await rpc.request(), 1)
        image = await in_thread(lambda: self._host.engine.images.resolve(name, notify=lambda line: None))
        return [(1, image.id), (2, json.dumps(image.raw_config).encode()), (3, name)]

    # -- the builder -----------------------------------------------------------------------------------------------

    async def ping(self, rpc: Rpc) -> protobuf.Fields:
        caps = [(1, [(1, name), (2, True)]) for name in _BRIDGE_CAPS]
        return [*caps, *((2, [(1, name), (2, True)]) for name in _BUILD_CAPS), (3, _worker())]

    async def info(self, rpc: Rpc) -> protobuf.Fields:
        return [(1, _version())]

    async def list_workers(self, rpc: Rpc) -> protobuf.Fields:
        return [(1, _worker())]

    async def disk_usage(self, rpc: Rpc) -> protobuf.Fields:
        filters = _filters(await rpc.request())
        found = await in_thread(lambda: self._host.engine.builds.usage(filters))
        return [(1, _usage(record)) for record in found]

    async def prune(self, rpc: Rpc) -> None:
        request = await rpc.request()
        filters, idle_ns = _filters(request), protobuf.number(request, 3)
        if idle_ns:
            filters["until"] = [str(time.time() - idle_ns / 1e9)]
        keep_bytes = max(protobuf.number(request, 4), protobuf.number(request, 5))
        done = await in_thread(lambda: self._host.engine.builds.prune(filters, keep_bytes=keep_bytes))
        for record in done["Records"]:
            await rpc.send(_usage(record))


async def _stoppable(job: Job, work: Callable[[], T]) -> T:
    """The result of `work`, which is stopped when nobody waits for it any more."""
    try:
        return await in_thread(work)
    except asyncio.CancelledError:
        job.stop()
        raise


def _refuse_graphs(request: Mapping[int, list[Any]], field: int) -> None:
    if protobuf.data(request, field):
        raise RpcError(
            UNIMPLEMENTED, "graphs of BuildKit's own (LLB) cannot be solved here: only Dockerfiles can be built"
        )


def _pairs(message: Mapping[int, list[Any]], field: int) -> dict[str, str]:
    """A map of strings."""
    entries = (protobuf.decode(each) for each in protobuf.items(message, field))
    return {protobuf.text(each, 1): protobuf.text(each, 2) for each in entries}


def _caches(entries: Sequence[bytes], way: str) -> list[CachePlace]:
    decoded = (protobuf.decode(each) for each in entries)
    return cache_places([(protobuf.text(each, 1), _pairs(each, 2)) for each in decoded], way)


def _outputs(request: Mapping[int, list[Any]]) -> list[Export]:
    """Raises RpcError."""
    given = [(protobuf.text(each, 1), _pairs(each, 2)) for each in map(protobuf.decode, protobuf.items(request, 13))]
    if not given and protobuf.text(request, 3):
        given = [(protobuf.text(request, 3), _pairs(request, 4))]
    found = []
    for number, (kind, attributes) in enumerate(given):
        names = [name for name in attributes.get("name", "").split(",") if name]
        push = attributes.get("push", "").lower() in ("1", "t", "true")
        if kind not in (*_STORED, *_SENT):
            raise RpcError(UNIMPLEMENTED, f"exporter {kind!r} could not be found")
        if kind in ("docker", "oci") and attributes.get("tar", "").lower() in ("0", "f", "false"):
            raise RpcError(UNIMPLEMENTED, f"the exporter {kind} writes one file here: leave tar=false out")
        found.append(Export("image" if kind in _STORED else kind, names, push, number))
    return found


def _references(result: Mapping[int, list[Any]]) -> list[str]:
    """The ids in a Result, in whichever of its four forms."""
    ids = [protobuf.text(result, 1)]
    if 3 in result:
        ids.append(protobuf.text(protobuf.decode(protobuf.data(result, 3)), 1))
    ids += _pairs(protobuf.decode(protobuf.data(result, 2)), 1).values()
    for entry in protobuf.items(protobuf.decode(protobuf.data(result, 4)), 1):
        ids.append(protobuf.text(protobuf.decode(protobuf.data(protobuf.decode(entry), 2)), 1))
    return [id for id in ids if id]


def _filters(request: Mapping[int, list[Any]]) -> dict[str, list[str]]:
    """containerd's `field==value`, `field~=value` or `field`, several joined by commas, as docker's filters.

    Raises RpcError for what has no meaning here: alternatives, `!=`, patterns of more than plain words."""
    given = [text.decode(errors="replace") for text in protobuf.items(request, 1) if text]
    if len(given) > 1:
        raise RpcError(UNIMPLEMENTED, "several alternative filters cannot be carried out here: give one")
    found: dict[str, list[str]] = {}
    for word in ",".join(given).split(",") if given else []:
        parts = _FILTER.fullmatch(word.strip())
        if parts is None:
            raise RpcError(
                UNIMPLEMENTED, f"filter {word!r} cannot be carried out here: only field==value, field~=value"
            )
        field, value = parts.group(1), (parts.group(2) or "true").strip('"').removeprefix("^")
        found.setdefault(field.lower(), []).append(value)
    return found


def _usage(record: CacheRecord) -> list[tuple[int, Any]]:
    """*moby.buildkit.v1.UsageRecord*."""
    moments = [[(1, int(moment)), (2, int(moment % 1 * 1e9))] for moment in (record.created_at, record.used_at)]
    return [
        (1, record.id),
        (2, record.path is not None),
        (3, record.in_use),
        (4, record.size_bytes),
        (6, moments[0]),
        (7, moments[1]),
        (8, int(record.used_at > record.created_at)),
        (9, record.description),
        (10, record.kind),
        (11, record.shared),
    ]


def _version() -> list[tuple[int, Any]]:
    return [(1, "labkernel"), (2, f"v{__version__}"), (3, "")]


def _worker() -> list[tuple[int, Any]]:
    labels = {
        "org.mobyproject.buildkit.worker.executor": "labkernel",
        "org.mobyproject.buildkit.worker.hostname": os.uname().nodename,
        # buildx asks for no archive where this one is missing
        "org.mobyproject.buildkit.worker.snapshotter": "overlayfs",
    }
    platform = [(1, architecture()), (2, "linux")]
    return [
        (1, WORKER),
        *((2, [(1, key), (2, value)]) for key, value in labels.items()),
        (3, platform),
        (5, _version()),
        *((6, device) for device in _devices()),
    ]


def _devices() -> list[list[tuple[int, Any]]]:
    """The CDI devices that RUN --device can name, as `docker buildx inspect` shows them."""
    from ..runtime import cdi

    return [
        [
            (1, device.name),
            (2, device.allowed_to_builds),
            *((3, [(1, key), (2, value)]) for key, value in device.annotations.items()),
        ]
        for _, device in sorted(cdi.read().devices.items())
    ]


async def open_control(call: Call) -> Any:
    """POST /grpc."""
    if call.headers.get("Upgrade", "").lower() != "h2c":
        raise ApiError(400, "the control protocol is an upgrade to h2c")
    needs_h2()
    duplex = await call.upgrade({"Connection": "Upgrade", "Upgrade": "h2c"})
    await Server(duplex, Control(call.host).methods()).serve()
    return None


ROUTES = (Route("POST", "/grpc", open_control, since=(1, 31)),)
