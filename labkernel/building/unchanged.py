"""Whether `labkernel build WORDS…` would find everything as it left it, told without loading the builder.

A build whose steps all come from the cache takes 20 ms; Python needs ten times that to load parser, engine and command
line. So a finished build leaves a record of what it depended on: the command line, the Dockerfile and ignore files byte
by byte, inode and change time of every file and directory it took from the context, the ids of its base images, its
cache keys and blobs. `find` looks at all of it again, and the answer is then the one the build would have given.
Whatever is not the same, or cannot be told, is left to the build itself. Change times cannot be set by hand, and a file
younger than the clock's tick is never recorded; that is what git's index relies on, too.

`find` runs before anything else is imported: it uses the standard library's lightest modules only.
"""

from __future__ import annotations

import marshal
import os
import sys
import zlib

from ..store.places import find_root

TYPE_CHECKING = False  # typing itself takes 8 ms to import
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from ..images import Images
    from .result import BuildResult

DIRECTORY = "rebuilds"
_FORMAT = 1
_KEPT = 64
_RACY_NS = 100_000_000  # a file this young may change again within one tick of the clock
# What else decides where the store is and what a build does there.
_VARIABLES = (
    *("LABKERNEL_ROOT", "LABKERNEL_RUNTIME_DIR", "LABKERNEL_DRIVER", "LABKERNEL_CONTEXT"),
    *("XDG_DATA_HOME", "XDG_CONFIG_HOME", "HOME", "SOURCE_DATE_EPOCH"),
)
# Flags under which a build reads or writes something that is not recorded.
_FLAGS_OUT = (
    *("secret", "ssh", "pull", "no_cache", "no_cache_filter", "cache_from", "cache_to", "output", "iidfile", "check"),
    "load",
)


# -- before the build ------------------------------------------------------------------------------------------------


def find(words: Sequence[str], version: str) -> dict[str, Any] | None:
    """The record of the command line `words` when nothing it depends on has changed; None: build.

    {"image": id, "plain": the progress as text, "steps": [(number, total, stage, text, line, end_line, size)],
    "warnings", "lines" (for stdout), "progress"}."""
    identity = _identity(words, version)
    try:
        root = find_root()
        with open(_place(root, identity), "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            record: dict[str, Any] = marshal.loads(file.read())
        if record["identity"] == identity and _files_same(record) and _store_same(root, record):
            return record
    except (OSError, EOFError, ValueError, TypeError, LookupError):
        pass
    return None


def _identity(words: Sequence[str], version: str) -> list[Any]:
    variables = [os.environ.get(name) for name in _VARIABLES]
    place = [os.getcwd(), os.geteuid(), _chosen_context()]
    return [_FORMAT, version, sys.version_info[:3], place, list(words), variables]


def _chosen_context() -> bytes | None:
    """What `labkernel context use` leaves: with another engine nothing here is that engine's answer."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    try:
        with open(f"{base}/labkernel/contexts.json", "rb") as file:
            return file.read()
    except OSError:
        return None


def _place(root: str, identity: Sequence[Any]) -> str:
    return f"{root}/{DIRECTORY}/{zlib.crc32(repr(identity).encode('utf-8', 'surrogateescape')):08x}"


def _files_same(record: Mapping[str, Any]) -> bool:
    for path, content in record["texts"]:
        try:
            with open(path, "rb") as file:
                if file.read() != content:
                    return False
        except FileNotFoundError:
            if content is not None:
                return False
    lstat = os.lstat
    for path, inode, changed_ns in record["stamps"]:
        status = lstat(path)
        if status.st_ino != inode or status.st_ctime_ns != changed_ns:
            return False
    return all(os.stat(path).st_size == size for path, size in record["blobs"])


def _store_same(root: str, record: Mapping[str, Any]) -> bool:
    import sqlite3
    import time

    try:
        db = sqlite3.connect(f"{root}/labkernel.db", timeout=1.0, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            if db.execute("PRAGMA user_version").fetchone()[0] != record["schema"]:
                return False
            if db.execute("SELECT 1 FROM settings WHERE key = 'build-failure' AND value <> 'null'").fetchone():
                return False  # a new build takes that record back
            image = db.execute("SELECT 1 FROM images WHERE id = ? AND deleted_at IS NULL", (record["image"],))
            if image.fetchone() is None:
                return False
            for name, id in record["names"]:
                if db.execute("SELECT image_id FROM tags WHERE name = ?", (name,)).fetchone() != (id,):
                    return False
            keys = record["keys"]
            places = ",".join("?" * len(keys))
            done = db.execute(f"UPDATE build_cache SET used_at = ? WHERE key IN ({places})", (time.time(), *keys))
            return bool(done.rowcount == len(keys))
        finally:
            db.close()
    except sqlite3.Error:
        return False


# -- after a build ---------------------------------------------------------------------------------------------------


def remember(
    words: Sequence[str],
    version: str,
    flags: Mapping[str, Any],
    result: BuildResult,
    images: Images,
    *,
    texts: Mapping[Path, bytes | None],
    plain: str,
    lines: Sequence[str],
) -> bool:
    """Leave a record of `result` for `find`; False when the build depends on what cannot be looked at again.

    `words` and `flags` are its command line, plain and parsed; `texts` the contents of Dockerfile and ignore files,
    None for one that is not there; `plain` and `lines` what such a build writes to stderr and stdout.
    """
    trace = result.trace
    if trace is None or not trace.repeatable or not _can_be_looked_at(flags, texts):
        return False
    stamps = _stamps(trace.directory, trace.taken, trace.began_ns)
    names = [*trace.names.items(), *((name, result.image.id) for name in images.catalog.tags(result.image.id))]
    blobs = _blob_sizes(result, images)
    if stamps is None or blobs is None:
        return False
    identity = _identity(words, version)
    steps = [
        (step.number, step.total, step.stage, step.text, step.line, step.end_line, step.size_bytes)
        for step in result.steps
    ]
    record = {
        "identity": identity,
        "texts": [(str(path), content) for path, content in texts.items()],
        "stamps": stamps,
        "blobs": blobs,
        "schema": images.db.find("PRAGMA user_version")[0],  # type: ignore[index]
        "image": result.image.id,
        "built_ns": trace.began_ns,
        "names": names,
        "keys": sorted(set(trace.keys)),
        "steps": steps,
        "warnings": [str(warning) for warning in result.warnings],
        "plain": plain,
        "lines": list(lines),
        "progress": "quiet" if flags["quiet"] else flags["progress"],
    }
    _write(str(images.layout.root), identity, marshal.dumps(record))
    return True


def _can_be_looked_at(flags: Mapping[str, Any], texts: Mapping[Path, bytes | None]) -> bool:
    if any(flags[name] for name in _FLAGS_OUT) or flags["progress"] in ("json", "rawjson"):
        return False
    if any("=" not in word for word in flags["build_arg"]):
        return False
    ignore = b"".join(content or b"" for path, content in texts.items() if path.name.endswith(".dockerignore"))
    excluded = any(b"--exclude" in (content or b"") and b"!" in (content or b"") for content in texts.values())
    # With exceptions, directories that are left out are looked into, and nothing here would notice.
    return b"!" not in ignore and not excluded


def _stamps(
    directory: Path | None, taken: Sequence[tuple[str, list[dict[str, Any]]]], began_ns: int
) -> list[tuple[str, int, int]] | None:
    """(path, inode, change time) of all that was taken, and of the directories above; None when that is not enough."""
    import stat

    if not taken:
        return []
    names: dict[str, bool] = {}  # path below the context -> whether it has to be a directory
    for pattern, sources in taken:
        clean = os.path.normpath("/" + pattern).lstrip("/")
        above, _, last = clean.rpartition("/")
        wild = any(sign in clean for sign in "*?[")
        if any(sign in above for sign in "*?[") or "**" in last:
            return None
        while True:
            names[above] = True
            if not above:
                break
            above = above.rpartition("/")[0]
        for source in sources:
            path = source["path"]
            if (path if not wild else path.rpartition("/")[0]) != (clean if not wild else clean.rpartition("/")[0]):
                return None  # reached through a link
            if "parents" in source or (wild and path.rpartition("/")[2] != source["name"]):
                return None
            for entry in source["entries"]:
                below = f"{path}/{entry[0]}" if path and entry[0] else path or entry[0]
                names[below] = names.get(below, False) or entry[1] == "d"
    if len(names) > 200_000:
        return None
    base = os.path.realpath(str(directory))
    found = []
    for name, is_directory in names.items():
        path = f"{base}/{name}" if name else base
        status = os.lstat(path)
        # Older than the build, so it is what the build saw.
        if status.st_ctime_ns > began_ns - _RACY_NS or (is_directory and not stat.S_ISDIR(status.st_mode)):
            return None
        found.append((path, status.st_ino, status.st_ctime_ns))
    return found


def _blob_sizes(result: BuildResult, images: Images) -> list[tuple[str, int]] | None:
    row = images.catalog.find(result.image.id)
    if row is None:
        return None
    digests = [row.id, row.manifest, *(layer.digest for layer in result.image.layers)]
    paths = [images.layout.blob_path(digest) for digest in digests]
    return [(str(path), path.stat().st_size) for path in paths] if all(path.exists() for path in paths) else None


def _write(root: str, identity: Sequence[Any], data: bytes) -> None:
    place = _place(root, identity)
    directory = os.path.dirname(place)
    part = f"{place}.{os.getpid()}"
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        os.replace(part, place)
        kept = sorted(os.scandir(directory), key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
        for entry in kept[_KEPT:]:
            os.unlink(entry.path)
    except OSError:
        pass  # the next build is then a build


def forget(root: Path) -> None:
    """Remove all records."""
    import shutil

    shutil.rmtree(root / DIRECTORY, ignore_errors=True)
