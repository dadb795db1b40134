"""What builds remember: layers by the content of their step, and digests of context files by their stat.

A key is a digest of (parent, instruction, digests of inputs), never of times or names of images, so equal work is found
again whoever did it, in any process. Rows keep what made them, so that a miss can say why ("COPY changed: app.py").
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..oci.selection import content_digest
from ..store.blobs import Blobs
from ..store.catalog import LayerInfo
from ..store.database import Database
from .transport import add_row

if TYPE_CHECKING:
    from .remotecache import RemoteCache

SELECTION = "the selected files"  # the whole of what COPY takes, beside the entries for single files
_MAX_COMPARED, _COMPARED = 50, 400  # steps, and characters of each, that a changed one is looked for among
_SHELL_FORM = "RUN /bin/sh -c "
_RACY_NS = 100_000_000  # a file this young may change again within one tick of the clock


class CachedStep(Struct, frozen=True):
    """A remembered step. `created` is an RFC 3339 moment; `record` what `BuildCache.store` was given."""

    layer: LayerInfo | None
    created: str
    record: dict[str, Any]


def digest_of(*parts: Any) -> str:
    """One digest of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class BuildCache:
    """The table `build_cache`. Rows whose blob has gone count as missing."""

    def __init__(self, db: Database, blobs: Blobs) -> None:
        self._db = db
        self._blobs = blobs
        self._used: list[str] = []
        self.elsewhere: list[RemoteCache] = []
        self.used: list[str] = []
        """Keys of the steps that were found or stored, in order."""

    def find(self, key: str) -> CachedStep | None:
        """The step of this key, None when it is not known; from `elsewhere` when it is known there."""
        row = self._row(key)
        if row is None and any(self._fetched(source, key) for source in self.elsewhere):
            row = self._row(key)
        if row is None:
            return None
        layer = None
        if row["diff_id"] is not None:
            layer = LayerInfo(row["diff_id"], row["digest"], row["media_type"], row["layer_bytes"])
        record = json.loads(row["config"])
        self._used.append(key)
        self.used.append(key)
        return CachedStep(layer, record["created"], record)

    def _row(self, key: str) -> Any:
        """Of a step whose layer is here."""
        row = self._db.find("SELECT * FROM build_cache WHERE key = ?", (key,))
        if row is None or row["digest"] is None:
            return row
        whole = self._blobs.has(row["digest"]) and self._blobs.size(row["digest"]) == row["layer_bytes"]
        return row if whole else None

    def _fetched(self, source: RemoteCache, key: str) -> bool:
        row = source.rows.get(key)
        if row is None or not source.fetch(row):
            return False
        add_row(self._db, row)
        return True

    def store(self, key: str, layer: LayerInfo | None, record: Mapping[str, Any]) -> None:
        """Remember a finished step. `record` holds at least `created`; `place` and `inputs` serve `why`."""
        now = time.time()
        self.used.append(key)
        columns = tuple(layer) if layer else (None, None, None, 0)
        with self._db.transaction() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO build_cache VALUES (?, NULL, ?, ?, ?, ?, ?, ?, ?)",
                (key, *columns, json.dumps(dict(record)), now, now),
            )

    def touch(self) -> None:
        """Note in one go that the found steps were used now."""
        used, self._used = self._used, []
        if used:
            with self._db.transaction() as tx:
                now = time.time()
                tx.executemany("UPDATE build_cache SET used_at = ? WHERE key = ?", [(now, key) for key in used])

    def why(self, place: str, inputs: Mapping[str, str], text: str) -> str:
        """Why there is no row for a step at `place` (parent and kind of instruction): what differed last time."""
        # Newest first by the index alone: what follows a row's JSON (with 2,000 files 140 KB) is dear to come by.
        rows = self._db.query(
            "SELECT key FROM build_cache WHERE json_extract(config, '$.place') = ? ORDER BY rowid DESC LIMIT ?",
            (place, _MAX_COMPARED),
        )
        others: list[str] = []
        same: dict[str, Any] | None = None
        for row in rows:
            record = self._record(row["key"])
            if record.get("text") == text:
                same = record
                break
            others.append(str(record.get("text")))
        if same is None:
            # Others build on the same base: only what resembles this step can be what it was before.
            near = _nearest(text, others)
            return f"instruction changed: it was {shortened(near)}" if near else "not built before"
        name = text.split(" ", 1)[0]
        before: dict[str, str] = same.get("inputs") or {}
        changed = [key for key in {**before, **inputs} if before.get(key) != inputs.get(key)]
        changed = [key for key in changed if key != SELECTION] or changed
        if not changed:
            return "its layer is no longer in the store"
        shown = ", ".join(sorted(changed)[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        return f"{name} changed: {shown}"

    def _record(self, key: str) -> dict[str, Any]:
        row = self._db.find("SELECT config FROM build_cache WHERE key = ?", (key,))
        record: dict[str, Any] = {} if row is None else json.loads(row["config"])
        return record

    def forget(self, keys: Iterable[str]) -> int:
        """Forget steps; returns how many. Their content goes with the next sweep."""
        with self._db.transaction() as tx:
            done = tx.executemany("DELETE FROM build_cache WHERE key = ?", [(key,) for key in keys])
            return int(done.rowcount)


def _nearest(text: str, texts: Sequence[str]) -> str | None:
    """Of `texts` the one that `text` may have been: alike in what its author wrote, so without the words that every
    instruction of its kind begins with."""
    from difflib import get_close_matches

    own = {_written(other)[:_COMPARED]: other for other in reversed(texts)}
    near = get_close_matches(_written(text)[:_COMPARED], list(own), 1, 0.6)
    return own[near[0]] if near else None


def _written(text: str) -> str:
    return text.removeprefix(_SHELL_FORM) if text.startswith(_SHELL_FORM) else text.partition(" ")[2]


def shortened(text: str) -> str:
    """The first line of an instruction as a cache key has it, in the words of the Dockerfile."""
    line = text.replace(_SHELL_FORM, "RUN ", 1) if text.startswith(_SHELL_FORM) else text
    first = line.split("\n")[0]
    return first if len(first) <= 60 else first[:59] + "…"


class ContextDigests:
    """sha256 of context files, remembered by (size, mtime, ctime, inode) across builds of the same directory."""

    def __init__(self, db: Database, directory: str) -> None:
        self._db = db
        self._setting = f"build-context:{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}"
        self._known: dict[str, list[Any]] | None = None
        self._changed = False
        self._lock = threading.Lock()

    def __call__(self, dir_fd: int, name: str, path: str, status: os.stat_result) -> str:
        if self._known is None:
            with self._lock:
                self._known = self._known or self._db.setting(self._setting, {})
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(path)
        if known is not None and known[:4] == stamp:
            return str(known[4])
        digest = content_digest(dir_fd, name, path, status)
        if status.st_ctime_ns < time.time_ns() - _RACY_NS:
            self._known[path] = [*stamp, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was learned."""
        if self._changed and self._known is not None:
            self._changed = False
            self._db.remember(self._setting, self._known)
