"""The one table of the Engine API: (method, path pattern, handler), and how a request finds its row.

To add a route, write its handler in the module of its group (a new module is named in `_GROUPS` below) and put a row
into that module's `ROUTES`:

    def tag_image(call: Call) -> Any:                      # plain: runs in a thread, may block
        call.engine.images.tag(call.params["name"], call.query("repo"))
        return call.answer(201)

    async def events(call: Call) -> Any: ...               # async: runs on the event loop, must never block

    ROUTES = (
        Route("POST", "/images/{name:path}/tag", tag_image),
        Route("POST", "/volumes/create", create_volume, body=VolumeOptions),
    )

`{name}` takes one part of the path, `{name:path}` takes slashes, too; `call.params` has them decoded. With `body` the
JSON body is decoded to that type (a msgspec.Struct, or dict) and checked before the handler is called, as `call.body`;
without it the body waits to be read (`call.read`, `call.chunks`, `call.reader`). What a handler returns is the answer:
None is 204, a `call.answer(…)` is itself, anything else is sent as JSON with 200. What it raises is mapped by
`errors.STATUSES`. Streams, hijacking and threads: see `call.Call`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import unquote

NEWEST, OLDEST = (1, 50), (1, 24)
_GROUPS = (
    "system",
    "events",
    "containers",
    "attach",
    "execs",
    "logs",
    "files",
    "volumes",
    "networks",
    "swarm",
    "plugins",
    "images",
    "build",
    "session",
    "control",
    "distribution",
    "auth",
)


class Route(NamedTuple):
    """One row. `since` is the first API version that has it. `slow`: a plain handler that may take long (a stop, a
    prune) runs in a thread of its own instead of one of those that all calls share. `bulk`: its body or its answer is a
    file, which may go past the event loop (see `wire`)."""

    method: str
    pattern: str
    handler: Callable[[Any], Any]
    body: Any = None
    since: tuple[int, int] = OLDEST
    slow: bool = False
    bulk: bool = False


class Match(NamedTuple):
    """The row of a request, the words of its path, and the version it speaks."""

    route: Route
    params: dict[str, str]
    version: tuple[int, int]


_VERSION = re.compile(r"/v(\d{1,3})\.(\d{1,3})(/.*)")
_PART = re.compile(r"\{(\w+)(:path)?\}")


@cache
def table() -> tuple[Route, ...]:
    """Every route. The groups are imported at the first request, not with the package."""
    package = __name__.rpartition(".")[0]
    return tuple(route for group in _GROUPS for route in import_module(f"{package}.{group}").ROUTES)


@cache
def _index() -> dict[tuple[str, str], list[tuple[re.Pattern[str], Route]]]:
    """Routes by method and first part of the path, in the table's order."""
    found: dict[tuple[str, str], list[tuple[re.Pattern[str], Route]]] = {}
    for route in table():
        words = _PART.split(re.sub(r"([.^$*+?()\[\]|])", r"\\\1", route.pattern))
        pattern = "".join(
            word if number % 3 == 0 else f"(?P<{word}>{'.+' if words[number + 1] else '[^/]+'})"
            for number, word in enumerate(words)
            if number % 3 != 2
        )
        found.setdefault((route.method, route.pattern.split("/")[1]), []).append((re.compile(pattern), route))
    return found


def split_version(path: str) -> tuple[tuple[int, int] | None, str]:
    """(version, path without it); no version when the path has none."""
    found = _VERSION.fullmatch(path)
    return ((int(found[1]), int(found[2])), found[3]) if found else (None, path)


def find(method: str, path: str) -> Match | None:
    """The row for a path as it came (still percent-encoded); None when there is none. A path without a version speaks
    the newest one."""
    version, rest = split_version(path)
    asked = version or NEWEST
    for pattern, route in _index().get((method, rest.split("/", 2)[1] if "/" in rest else ""), ()):
        words = pattern.fullmatch(rest)
        if words is not None and route.since <= asked:
            return Match(route, {name: unquote(word) for name, word in words.groupdict().items()}, asked)
    return None
