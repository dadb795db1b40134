"""The attributes of BuildKit's frontend "dockerfile.v0" as our builder takes them, and its requests that build nothing.

Source: BuildKit, dockerfile2llb's options ("build-arg:NAME", "context:NAME" …) and the subrequest "frontend.lint".
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..building.remotecache import CachePlace
from ..builds import BuildOptions
from ..errors import UsageError
from ..store.blobs import temporary_directory
from .grpc import UNIMPLEMENTED, RpcError
from .session import Session
from .solving import Wanted, prepare
from .trace import Trace

if TYPE_CHECKING:
    from ..dockerfile.lint import Finding
    from ..engine import Engine

NAME = "dockerfile.v0"
LINT, DESCRIBE = "frontend.lint", "frontend.subrequests.describe"
_SOURCE_ERROR = "github.com/moby/buildkit/errdefs.Source+json"
_REQUEST_ERROR = "github.com/moby/buildkit/errdefs.Subrequest+json"
# What a step's container is not given, and how a client asks for it.
_NOT_APPLIED = {"cgroup-parent": "--cgroup-parent", "hostname": "--hostname"}


class Stop:
    """What ends a build, from any thread; at once where it has been asked for before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._asked = False

    def on(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._calls.append(call)
            asked = self._asked
        if asked:
            call()

    def __call__(self) -> None:
        with self._lock:
            self._asked = True
            calls = list(self._calls)
        for call in calls:
            call()


def wanted_of(
    attributes: Mapping[str, str],
    session: Session,
    stop: Stop,
    *,
    cache_to: Sequence[CachePlace] = (),
    cache_from: Sequence[CachePlace] = (),
    entitlements: Sequence[str] = (),
) -> Wanted:
    """Raises UsageError, RpcError for what cannot be had."""
    attest = sorted(name for name in attributes if name.startswith("attest:"))
    if attest:
        raise RpcError(UNIMPLEMENTED, f"attestations are not made here: {', '.join(attest)}")
    anew = attributes.get("no-cache")
    options = BuildOptions(
        pull=attributes.get("image-resolve-mode") == "pull",
        allow=tuple(entitlements),
        extra_hosts=[word.replace("=", ":", 1) for word in attributes.get("add-hosts", "").split(",") if word],
        platform=attributes.get("platform") or None,
        no_cache_filter=[name for name in (anew or "").split(",") if name],
        limits=_limits(attributes),
        cache_to=list(cache_to),
        cache_from=[*cache_from, *_cache_imports(attributes)],
        stopping=stop.on,
    )
    network = attributes.get("force-network-mode", "")
    settings = {
        "build_args": _under(attributes, "build-arg:"),
        "labels": _under(attributes, "label:"),
        "target": attributes.get("target") or None,
        "no_cache": anew == "",
        "network": "default" if network in ("", "sandbox") else network,
        "options": options,
    }
    local = {kind: attributes.get(f"{kind}key") or kind for kind in ("context", "dockerfile")}
    return Wanted(
        session,
        settings,
        dockerfile=attributes.get("filename") or "Dockerfile",
        remote=attributes.get("context", ""),
        local=local,
        own_dockerfile="dockerfilekey" in attributes,
        contexts=_under(attributes, "context:"),
        not_applied=[flag for name, flag in _NOT_APPLIED.items() if attributes.get(name)],
    )


def _limits(attributes: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if attributes.get("shm-size"):
        found["shm_size"] = attributes["shm-size"]
    if attributes.get("ulimit"):
        found["ulimits"] = attributes["ulimit"].split(",")
    return found


def _under(attributes: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in attributes.items() if name.startswith(prefix)}


def _cache_imports(attributes: Mapping[str, str]) -> list[CachePlace]:
    """What `--cache-from` names: of the kinds that there are, only registries can be asked from here."""
    try:
        entries = json.loads(attributes.get("cache-imports") or "[]")
        found = [(str(each["Type"]), dict(each.get("Attrs") or {})) for each in entries]
    except (ValueError, TypeError, KeyError):
        raise UsageError("invalid cache-imports: not JSON of cache options") from None
    return cache_places(found, "from")


def cache_places(entries: Sequence[tuple[str, Mapping[str, str]]], way: str) -> list[CachePlace]:
    """Cache options as a client sends them; `way` is `from` or `to`. Raises RpcError for kinds there are none of."""
    places = []
    for kind, attributes in entries:
        if kind == "registry" and attributes.get("ref"):
            places.append(CachePlace("registry", attributes["ref"]))
        elif kind == "inline" and way == "to":
            places.append(CachePlace("inline"))
        else:
            resolution = "type=registry,ref=NAME" + (" or type=inline" if way == "to" else "")
            raise RpcError(
                UNIMPLEMENTED, f"--cache-{way} type={kind or '?'} is not available over the API: {resolution}"
            )
    return places


# -- requests that build nothing ---------------------------------------------------------------------------------------


def answer(engine: Engine, request: str, wanted: Wanted, trace: Trace) -> dict[str, bytes]:
    """What a subrequest (`docker build --call`, `--check`) is answered with. Raises RpcError for one there is not."""
    if request == LINT:
        return _lint(engine, wanted, trace)
    if request == DESCRIBE:
        known = [
            {"name": LINT, "version": "1.0.0", "type": "rpc", "description": "Lint a Dockerfile"},
            {"name": DESCRIBE, "version": "1.0.0", "type": "rpc", "description": "List available subrequest types"},
        ]
        text = "".join(f"{each['name']}  {each['description']}\n" for each in known)
        return {"result.json": json.dumps(known).encode(), "result.txt": text.encode(), "version": b"1.0.0"}
    detail = json.dumps({"name": request}).encode()
    raise RpcError(UNIMPLEMENTED, f"unsupported request {request}", [(_REQUEST_ERROR, detail)])


def _lint(engine: Engine, wanted: Wanted, trace: Trace) -> dict[str, bytes]:
    settings = dict(wanted.settings)
    with temporary_directory(engine.layout, "session") as work, ExitStack() as stack:
        text = prepare(engine, wanted, trace, work, settings, stack)
        found = engine.builds.check(text, build_args=settings["build_args"], ignore=settings.get("ignore"))
    warnings = [_warning(each) for each in found]
    source = {
        "fileName": wanted.dockerfile,
        "language": "Dockerfile",
        "definition": None,
        "data": base64.b64encode(text.encode()).decode(),
    }
    document = {"warnings": warnings, "sources": [source] if warnings else []}
    lines = text.split("\n")
    shown = [f"{each.short()}\n{excerpt(lines, each.line, each.end_line)}\n" for each in found]
    return {
        "result.json": json.dumps(document, indent=2).encode(),
        "result.txt": "\n".join(shown).encode(),
        "result.statuscode": b"1" if found else b"0",
        "version": b"1.0.0",
    }


def _warning(finding: Finding) -> dict[str, Any]:
    about = finding.to_dict()
    return {
        "ruleName": finding.rule,
        "description": about["description"],
        "url": about["url"],
        "detail": finding.message,
        "location": {"ranges": [_range(finding.line, finding.end_line)]},
    }


def _range(line: int, end_line: int) -> dict[str, Any]:
    return {"start": {"line": line}, "end": {"line": end_line}}


def excerpt(lines: Sequence[str], line: int, end_line: int) -> str:
    return "\n".join(f"{number} | {lines[number - 1]}" for number in range(line, min(end_line, len(lines)) + 1))


# -- failures ----------------------------------------------------------------------------------------------------------


def located(err: Exception, name: str, text: str) -> list[tuple[str, bytes]]:
    """The lines of the Dockerfile that an error belongs to, so that the client shows them."""
    line = getattr(err, "line", None)
    if not line or not text:
        return []
    info = {"filename": name, "data": base64.b64encode(text.encode()).decode(), "language": "Dockerfile"}
    place = {"info": info, "ranges": [_range(line, getattr(err, "end_line", None) or line)]}
    return [(_SOURCE_ERROR, json.dumps(place).encode())]
