"""What leaves and enters with a build: its files (`--output type=local`) and its cache (`--cache-to`, `--cache-from`).

A cache is a directory in the form of an OCI image layout.
Its manifest's config lists the remembered steps, its layers are theirs, so that any tool that copies OCI layouts copies
it. What comes in is not trusted: digests are verified here, diff IDs when a layer is unpacked. Source: image-spec
image-layout.md and manifest.md ("Guidelines for Artifact Usage").
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BuildError, StoreError, UsageError
from ..store.blobs import Blobs
from ..store.database import Database

if TYPE_CHECKING:
    from ..images import Images

CONFIG_TYPE = "application/vnd.labkernel.building.cache.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_HEX = re.compile(r"[0-9a-f]{64}")
MAX_CONFIG_BYTES = 256 << 20
_COLUMNS = ("key", "diff_id", "digest", "media_type", "layer_bytes", "config")


class Described(NamedTuple):
    """A cache as an artifact: rows of steps, those with a layer by its digest, and the documents that name them."""

    rows: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    config: bytes
    config_digest: str
    manifest: bytes


def describe(db: Database, blobs: Blobs, keys: Sequence[str]) -> Described:
    """The steps `keys` as far as their layers are here."""
    rows = []
    for key in sorted(set(keys)):  # equal caches are equal bytes
        row = db.find(f"SELECT {', '.join(_COLUMNS)} FROM build_cache WHERE key = ?", (key,))
        if row is not None and (row["digest"] is None or blobs.has(row["digest"])):
            rows.append({name: row[name] for name in _COLUMNS})
    layers = {row["digest"]: row for row in rows if row["digest"] is not None}
    config = json.dumps({"rows": rows}).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": _digest(config), "size": len(config)},
        "layers": [
            {"mediaType": row["media_type"], "digest": digest, "size": row["layer_bytes"]}
            for digest, row in layers.items()
        ],
    }
    return Described(rows, layers, config, _digest(config), json.dumps(manifest).encode())


def export_cache(db: Database, blobs: Blobs, keys: Sequence[str], target: Path) -> None:
    """Write the steps `keys` and their layers to the directory `target`. Raises BuildError."""
    found = describe(db, blobs, keys)
    try:
        folder = target / "blobs" / "sha256"
        folder.mkdir(parents=True, exist_ok=True)
        for digest in found.layers:
            place = folder / digest.partition(":")[2]
            if not place.exists():
                part = place.with_suffix(f".{os.getpid()}")
                with blobs.open(digest) as source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                os.replace(part, place)
        for data in (found.config, found.manifest):
            (folder / _digest(data).partition(":")[2]).write_bytes(data)
        entry = {"mediaType": _MANIFEST_TYPE, "digest": _digest(found.manifest), "size": len(found.manifest)}
        index = {"schemaVersion": 2, "manifests": [entry]}
        (target / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        part = target / f"index.json.{os.getpid()}"
        part.write_text(json.dumps(index))
        os.replace(part, target / "index.json")
    except OSError as err:
        raise BuildError(f"cannot write the cache to {target}: {err.strerror}") from err


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def import_cache(db: Database, blobs: Blobs, source: Path) -> int:
    """Take in the steps that `export_cache` wrote to `source`; returns how many are new here.

    Raises BuildError for anything that is no such cache, CorruptBlob for a layer with other bytes.
    """
    try:
        index = json.loads((source / "index.json").read_bytes())
        manifest = _read(source, index["manifests"][0]["digest"])
        if manifest["config"]["mediaType"] != CONFIG_TYPE:
            raise BuildError(
                f"{source} is a build cache of another builder ({manifest['config']['mediaType']})",
                resolution="use one that labkernel wrote with --cache-to",
            )
        rows = [checked_row(row) for row in _read(source, manifest["config"]["digest"])["rows"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
        raise BuildError(f"{source} holds no build cache: {err}") from None
    added = 0
    for row in rows:
        if db.find("SELECT 1 FROM build_cache WHERE key = ?", (row["key"],)) is not None:
            continue
        if row["digest"] is not None and not blobs.has(row["digest"]):
            try:
                with (source / "blobs/sha256" / row["digest"].partition(":")[2]).open("rb") as file:
                    blobs.put(file, row["digest"], size_bytes=row["layer_bytes"])
            except FileNotFoundError:
                continue  # a step whose layer was not copied along is built anew
            except StoreError:
                raise
            except OSError as err:
                raise BuildError(f"cannot read the cache in {source}: {err.strerror}") from err
        add_row(db, row)
        added += 1
    return added


def add_row(db: Database, row: Mapping[str, Any]) -> None:
    """Remember a step that came from elsewhere, checked, its layer stored."""
    with db.transaction() as tx:
        tx.execute(
            "INSERT OR IGNORE INTO build_cache VALUES (?, NULL, ?, ?, ?, ?, ?, strftime('%s','now'), "
            "strftime('%s','now'))",
            tuple(row[name] for name in _COLUMNS),
        )


def export_directory(images: Images, id: str, target: Path) -> None:
    """`--output type=local`: the root file system in a directory; our own files where we cannot give them away.

    Raises UsageError when it cannot be written."""
    import tempfile

    from ..oci.extract import Extractor
    from ..oci.rootfd import Root
    from ..oci.tarstream import BlobStream, members

    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target) as file, Root.open(str(target)) as root:
            images.export_rootfs(id, file)
            file.seek(0)
            owner = None if os.geteuid() == 0 else (os.geteuid(), os.getegid())
            out = Extractor(root, whiteouts=False, owner=owner)
            data = BlobStream(file.fileno(), max_bytes=1 << 42)
            for member in members(data, max_members=50_000_000):
                out.add(member, data)
            data.finish()
            out.finish()
    except OSError as err:
        raise UsageError(f"cannot write to {target}: {err.strerror}", exit_code=1) from None


def _read(source: Path, digest: str) -> Any:
    algorithm, _, encoded = digest.partition(":")
    if algorithm != "sha256" or not _HEX.fullmatch(encoded):
        raise ValueError(f"bad digest {digest}")
    path = source / "blobs" / "sha256" / encoded
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{digest} is too large")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != encoded:
        raise ValueError(f"{digest} has other bytes")
    return json.loads(data)


def checked_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if it is of the form that `export_cache` writes. Raises ValueError, LookupError, TypeError."""
    record = json.loads(row["config"])
    good = _HEX.fullmatch(row["key"]) is not None and isinstance(record["created"], str)
    if row["digest"] is not None:
        for name in ("digest", "diff_id"):
            algorithm, _, encoded = row[name].partition(":")
            good = good and algorithm == "sha256" and _HEX.fullmatch(encoded) is not None
        good = good and isinstance(row["media_type"], str) and isinstance(row["layer_bytes"], int)
    if not good:
        raise ValueError("a step in it is malformed")
    return {name: row[name] for name in _COLUMNS}
