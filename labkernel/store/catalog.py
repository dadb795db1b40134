"""What the database knows of images: rows, tags, layers, and who still needs what. SQL only, no bytes and no policy.

Names are canonical strings (`docker.io/library/busybox:latest`), ids are digests. Every look-up is one indexed
statement of some ten microseconds, so nothing is cached here and nothing can be stale.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .database import Database

HOST_LAYER = "application/vnd.labkernel.layer.host"
"""Media type of a layer without a blob: a directory of this machine (`lab/host`). Never leaves the machine."""

_IMAGE = "SELECT id, manifest, created_at, stored_at, provenance FROM images WHERE deleted_at IS NULL"

# Everything that still needs a layer: images (also those removed by force that a container keeps) and the build cache.
_LAYER_NEEDED = """
    SELECT diff_id FROM image_layers UNION SELECT diff_id FROM build_cache WHERE diff_id IS NOT NULL
"""
_BLOB_NEEDED = """
    SELECT id FROM images UNION SELECT manifest FROM images UNION SELECT digest FROM image_layers
    UNION SELECT digest FROM build_cache WHERE digest IS NOT NULL
"""


class LayerInfo(NamedTuple):
    """A layer as an image names it: diff ID of the uncompressed tar; digest, media type and size of its blob."""

    diff_id: str
    digest: str
    media_type: str
    size_bytes: int


class ImageRow(NamedTuple):
    """An image as stored. `created_at` and `stored_at` are seconds since the epoch."""

    id: str
    manifest: str
    created_at: float
    stored_at: float
    provenance: dict[str, Any]


class Catalog:
    """Images, tags and layers of one store."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def add(
        self,
        row: ImageRow,
        layers: Sequence[LayerInfo],
        *,
        tags: Iterable[str] = (),
        repo_digests: Iterable[str] = (),
    ) -> None:
        """Insert the image (or revive it) and move `tags` to it, in one transaction. A set of images that was built
        under such a name (imaging/variants.py) is forgotten, be the image one of it."""
        names = list(tags)
        with self.db.transaction() as tx:
            tx.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT (id) DO UPDATE SET deleted_at = NULL, "
                "provenance = CASE WHEN excluded.provenance = '{}' THEN provenance ELSE excluded.provenance END",
                (row.id, row.manifest, row.created_at, row.stored_at, json.dumps(row.provenance)),
            )
            tx.executemany(
                "INSERT OR IGNORE INTO image_layers VALUES (?, ?, ?, ?, ?, ?)",
                [(row.id, position, *layer) for position, layer in enumerate(layers)],
            )
            now = time.time()
            tx.executemany("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", [(name, row.id, now) for name in names])
            tx.executemany("DELETE FROM settings WHERE key = ?", [(f"images-of:{name}",) for name in names])
            tx.executemany(
                "INSERT OR REPLACE INTO repo_digests VALUES (?, ?)", [(name, row.id) for name in repo_digests]
            )

    def find(self, id: str) -> ImageRow | None:
        """The image with this full id."""
        found = self.db.find(f"{_IMAGE} AND id = ?", (id,))
        return _row(found) if found else None

    def find_by_tag(self, name: str) -> str | None:
        """Id of the image that the canonical tag names."""
        found = self.db.find("SELECT image_id FROM tags WHERE name = ?", (name,))
        return found[0] if found else None

    def find_by_repo_digest(self, name: str) -> str | None:
        """Id of the image known under `repository@digest`."""
        found = self.db.find("SELECT image_id FROM repo_digests WHERE name = ?", (name,))
        return found[0] if found else None

    def find_by_manifest(self, digest: str) -> str | None:
        """Id of the image whose manifest has this digest."""
        found = self.db.find("SELECT id FROM images WHERE manifest = ? AND deleted_at IS NULL", (digest,))
        return found[0] if found else None

    def find_by_prefix(self, prefix: str) -> list[str]:
        """Up to two ids that begin with `sha256:` + `prefix` (hex digits)."""
        low = f"sha256:{prefix}"
        rows = self.db.query(
            "SELECT id FROM images WHERE id >= ? AND id < ? AND deleted_at IS NULL LIMIT 2", (low, low + "g")
        )
        return [row[0] for row in rows]

    def all(self) -> list[ImageRow]:
        """All images, newest first."""
        return [_row(found) for found in self.db.query(f"{_IMAGE} ORDER BY created_at DESC, stored_at DESC, id")]

    def tags(self, image_id: str) -> list[str]:
        """Canonical tags of an image, sorted."""
        return [row[0] for row in self.db.query("SELECT name FROM tags WHERE image_id = ? ORDER BY name", (image_id,))]

    def all_tags(self) -> dict[str, list[str]]:
        """Canonical tags by image id."""
        found: dict[str, list[str]] = {}
        for name, image_id in self.db.query("SELECT name, image_id FROM tags ORDER BY name"):
            found.setdefault(image_id, []).append(name)
        return found

    def repo_digests(self, image_id: str) -> list[str]:
        """`repository@digest` names of an image, sorted."""
        rows = self.db.query("SELECT name FROM repo_digests WHERE image_id = ? ORDER BY name", (image_id,))
        return [row[0] for row in rows]

    def last_tagged(self, image_id: str) -> float | None:
        """When a tag was last set on the image."""
        found = self.db.find("SELECT max(updated_at) FROM tags WHERE image_id = ?", (image_id,))
        return found[0] if found else None

    def layers(self, image_id: str) -> list[LayerInfo]:
        """Layers of an image, bottom first."""
        rows = self.db.query(
            "SELECT diff_id, digest, media_type, size_bytes FROM image_layers WHERE image_id = ? ORDER BY position",
            (image_id,),
        )
        return [LayerInfo(*row) for row in rows]

    def layer_sizes(self, image_id: str) -> list[int]:
        """Bytes of the files of each layer, bottom first; of its blob where it has not been unpacked."""
        rows = self.db.query(
            "SELECT coalesce(l.size_bytes, i.size_bytes) FROM image_layers i LEFT JOIN layers l USING (diff_id) "
            "WHERE image_id = ? ORDER BY position",
            (image_id,),
        )
        return [row[0] for row in rows]

    def tag(self, name: str, image_id: str) -> None:
        """Set (or move) a tag."""
        with self.db.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (name, image_id, time.time()))

    def name_digest(self, name: str, image_id: str) -> None:
        """Remember that `repository@digest` is this image."""
        with self.db.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO repo_digests VALUES (?, ?)", (name, image_id))

    def untag(self, names: Iterable[str]) -> None:
        """Remove tags or repo digests."""
        with self.db.transaction() as tx:
            for name in names:
                tx.execute("DELETE FROM tags WHERE name = ?", (name,))
                tx.execute("DELETE FROM repo_digests WHERE name = ?", (name,))

    def set_provenance(self, image_id: str, provenance: Mapping[str, Any]) -> None:
        """Replace what is remembered of where the image comes from."""
        with self.db.transaction() as tx:
            tx.execute("UPDATE images SET provenance = ? WHERE id = ?", (json.dumps(dict(provenance)), image_id))

    def record_unpacked(self, diff_id: str, size_bytes: int, warnings: Sequence[str]) -> None:
        """Remember that a layer's directory is complete."""
        with self.db.transaction() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO layers VALUES (?, ?, ?, ?)",
                (diff_id, size_bytes, time.time(), json.dumps(list(warnings))),
            )

    def containers_of(self, image_id: str) -> list[tuple[str, str]]:
        """(id, name) of the containers made from an image."""
        rows = self.db.query("SELECT id, name FROM containers WHERE image_id = ? ORDER BY created_at", (image_id,))
        return [(row[0], row[1]) for row in rows]

    def delete(self, image_id: str) -> None:
        """Forget an image, its tags and its layers' names. While a container uses it, only hide it."""
        with self.db.transaction() as tx:
            for table in ("tags", "repo_digests"):
                tx.execute(f"DELETE FROM {table} WHERE image_id = ?", (image_id,))
            tx.execute(
                "UPDATE images SET deleted_at = ? WHERE id = ? AND id IN (SELECT image_id FROM containers)",
                (time.time(), image_id),
            )
            tx.execute("DELETE FROM images WHERE id = ? AND deleted_at IS NULL", (image_id,))

    def forget_hidden(self) -> None:
        """Forget images removed by force whose last container is gone."""
        with self.db.transaction() as tx:
            tx.execute(
                "DELETE FROM images WHERE deleted_at IS NOT NULL AND id NOT IN (SELECT image_id FROM containers)"
            )

    def forget_layers(self, diff_ids: Iterable[str]) -> None:
        """Forget that layers are unpacked."""
        with self.db.transaction() as tx:
            tx.executemany("DELETE FROM layers WHERE diff_id = ?", [(diff_id,) for diff_id in diff_ids])

    def needed_layers(self) -> set[str]:
        """Diff IDs that an image, a container or the build cache still needs."""
        return {row[0] for row in self.db.query(_LAYER_NEEDED)}

    def needed_blobs(self) -> set[str]:
        """Digests that an image, a container or the build cache still names."""
        return {row[0] for row in self.db.query(_BLOB_NEEDED)}


def _row(found: Any) -> ImageRow:
    id, manifest, created_at, stored_at, provenance = found
    return ImageRow(id, manifest, created_at, stored_at, json.loads(provenance))
