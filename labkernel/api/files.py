"""The files of a container as tar archives. Source: Docker Engine API, ContainerArchive, ContainerExport."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import UsageError
from ..running.files import NoSuchFile
from ..running.files import look as look_at
from .call import Call
from .containers import find
from .routes import Route
from .wire import WireBody

if TYPE_CHECKING:
    from ..running.container import Container

CHUNK = 1 << 20


def _path(call: Call) -> str:
    path = call.query("path")
    if not path:
        raise UsageError('bad parameter: "path" cannot be empty')
    if "\0" in path:
        raise UsageError("invalid path: a zero byte")
    return path


def _stat_header(found: dict[str, Any]) -> str:
    return base64.b64encode(msgspec.json.encode(found)).decode()


def look(call: Call) -> Any:
    container, path = find(call), _path(call)
    found = look_at(container, path)
    if found is None:
        raise NoSuchFile(path, container.name)
    return call.answer(200, X_Docker_Container_Path_Stat=_stat_header(found))


async def get(call: Call) -> Any:
    path = _path(call)
    container = await call.thread(find, call)
    chunks, found = await call.alone(container.get_archive, path, CHUNK)
    await call.begin(200, Content_Type="application/x-tar", X_Docker_Container_Path_Stat=_stat_header(found))
    await call.pour(chunks)
    return None


async def put(call: Call) -> Any:
    path = _path(call)
    container = await call.thread(find, call)
    await call.alone(_put, call, container, path)
    return call.answer(200)


def _put(call: Call, container: Container, path: str) -> None:
    body = call.stream
    container.put_archive(path, body if isinstance(body, WireBody) else iter(body.read, b""))


async def export(call: Call) -> Any:
    container = await call.thread(find, call)
    await call.begin(200, Content_Type="application/octet-stream")
    await call.pour(await call.alone(container.export, CHUNK))
    return None


ROUTES = (
    Route("HEAD", "/containers/{name}/archive", look),
    Route("GET", "/containers/{name}/archive", get, bulk=True),
    Route("PUT", "/containers/{name}/archive", put, bulk=True),
    Route("GET", "/containers/{name}/export", export, bulk=True),
)
