"""What the build cache holds, and which of it a prune means: docker's `system df -v`, `buildx du`, `builder prune`.

Three kinds are kept: steps (rows of the table `build_cache`, whose layers others may share), the directories of
`RUN --mount=type=cache`, and what ADD has downloaded. Source: Docker Engine API, SystemDataUsage and BuildPrune.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..errors import InvalidFilter, UsageError
from ..store.locks import try_flock
from .mounts import cache_mounts, tree_bytes

if TYPE_CHECKING:
    from ..store.database import Database
    from ..store.layout import Layout

STEP, MOUNT, DOWNLOAD = "regular", "exec.cachemount", "source.http"
"""BuildKit's words for the three kinds."""


class CacheRecord(Struct, frozen=True):
    """One thing kept. `size_bytes`: of its files; of a `shared` step an image has the same layer, and pruning frees
    nothing. `in_use`: a build holds it now. Times are seconds since the epoch. `path`: of a directory of its own."""

    id: str
    kind: str
    description: str
    size_bytes: int
    created_at: float
    used_at: float
    shared: bool = False
    in_use: bool = False
    path: str | None = None
    diff_id: str | None = None


def records(db: Database, layout: Layout) -> list[CacheRecord]:
    """Everything the cache holds, last used first."""
    found = [*_steps(db), *_directories(layout)]
    return sorted(found, key=lambda record: (-record.used_at, record.id))


def taken_bytes(found: Sequence[CacheRecord]) -> int:
    """What would be free without them. A layer counts once, and not at all where an image has it too."""
    layers = {record.diff_id: record.size_bytes for record in found if record.diff_id and not record.shared}
    return sum(layers.values()) + sum(record.size_bytes for record in found if record.kind != STEP)


def _steps(db: Database) -> list[CacheRecord]:
    rows = db.query(
        "SELECT key, diff_id, layer_bytes, created_at, used_at, json_extract(config, '$.text'), "
        "(SELECT size_bytes FROM layers WHERE layers.diff_id = build_cache.diff_id), "
        "EXISTS (SELECT 1 FROM image_layers WHERE image_layers.diff_id = build_cache.diff_id) FROM build_cache"
    )
    return [
        CacheRecord(
            id=key,
            kind=STEP,
            description=str(text or ""),
            size_bytes=int(layer_bytes if unpacked is None else unpacked),
            created_at=created_at,
            used_at=used_at,
            shared=bool(shared),
            diff_id=diff_id,
        )
        for key, diff_id, layer_bytes, created_at, used_at, text, unpacked, shared in rows
    ]


def _directories(layout: Layout) -> list[CacheRecord]:
    found = []
    for each in cache_mounts(layout):
        path = Path(each["path"])
        try:
            made_at, in_use = path.stat().st_mtime, _held(path)
        except FileNotFoundError:
            continue  # pruned meanwhile
        used_at = float(each.get("used_at") or made_at)
        found.append(
            CacheRecord(
                id=f"{path.parent.name}.{path.name}",
                kind=MOUNT if "target" in each else DOWNLOAD,
                description=_described(each),
                size_bytes=tree_bytes(path),
                created_at=min(made_at, used_at),
                used_at=used_at,
                in_use=in_use,
                path=str(path),
            )
        )
    return found


def _described(kept: Mapping[str, Any]) -> str:
    if "target" not in kept:
        return f"download {kept['id']}"
    where = "" if kept["id"] == kept["target"] else f" at {kept['target']}"
    return f"cache mount {kept['id']}{where}"


def _held(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return not try_flock(fd)
    finally:
        os.close(fd)


# -- what a prune means ----------------------------------------------------------------------------------------------

Test = Callable[[CacheRecord], bool]


def selected(
    found: Sequence[CacheRecord],
    filters: Mapping[str, Any] | None = None,
    *,
    keep_bytes: int = 0,
    held: bool = False,
) -> list[CacheRecord]:
    """The records that fit all `filters`, those that a build holds only with `held`. With `keep_bytes` only the oldest
    of them, so many that no more than that is left.

    Raises InvalidFilter for an unknown filter, UsageError for a value that means nothing."""
    from ..running.filters import filter_words

    tests = [_test(key, filter_words(value)) for key, value in (filters or {}).items()]
    meant = [record for record in found if (held or not record.in_use) and all(test(record) for test in tests)]
    if keep_bytes <= 0:
        return meant
    # Oldest first, until what is left fits. What is shared takes nothing, so it goes only with a filter that names it.
    left, gone = taken_bytes(found), []
    for record in reversed(meant):
        if left <= keep_bytes:
            break
        gone.append(record)
        left = taken_bytes([other for other in found if other not in gone])
    return gone


def _test(key: str, words: Sequence[str]) -> Test:
    make = _TESTS.get(key)
    if make is None:
        raise InvalidFilter(f"invalid filter '{key}'", resolution=f"the filters are {', '.join(sorted(_TESTS))}")
    return make(words)


def _until(words: Sequence[str]) -> Test:
    from ..runtime.logreader import parse_moment

    if len(words) != 1:
        raise UsageError("more than one until filter specified", resolution="give one duration (24h) or moment")
    latest = parse_moment(words[0])
    return lambda record: record.used_at < latest


def _on(value: Callable[[CacheRecord], bool]) -> Callable[[Sequence[str]], Test]:
    def make(words: Sequence[str]) -> Test:
        # `--filter shared` and `--filter shared=false`, as the CLI and the API's {"shared": {"true": true}} say it
        off = [word for word in words if word.lower() in ("0", "f", "false")]
        return (lambda record: not value(record)) if off else value

    return make


def _like(value: Callable[[CacheRecord], str]) -> Callable[[Sequence[str]], Test]:
    return lambda words: lambda record: any(word in value(record) for word in words)


_TESTS: dict[str, Callable[[Sequence[str]], Test]] = {
    "description": _like(lambda record: record.description),
    "id": lambda words: lambda record: record.id.startswith(tuple(words)),
    "inuse": _on(lambda record: record.in_use),
    # `docker system prune --filter label=…` asks for the cache with the same filters; nothing in it has labels
    "label": lambda words: lambda record: False,
    "label!": lambda words: lambda record: True,
    "private": _on(lambda record: not record.shared),
    "shared": _on(lambda record: record.shared),
    "type": lambda words: lambda record: record.kind in words,
    "until": _until,
    "unused-for": _until,
}
