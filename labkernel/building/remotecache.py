"""Build caches in registries: an artifact of their own (`type=registry`), or inside the image's config (`type=inline`).

The artifact is what `--cache-to type=local` writes (transport.py), pushed under a tag. Inline, the config of the image
lists the steps under `labkernel.cache.v0`; the layers are the image's own. Either is read without fetching any layer:
one comes when a step is found by its key. What comes is not trusted: blobs are verified by digest, diff IDs when one
is unpacked. Source: image-spec manifest.md, "Guidelines for Artifact Usage"; Docker documentation, "Cache storage".
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from msgspec import Struct

from ..errors import BuildError, RegistryError
from ..oci import manifest as oci
from ..oci import platforms, reference
from .transport import CONFIG_TYPE, MAX_CONFIG_BYTES, checked_row, describe, export_cache, import_cache

if TYPE_CHECKING:
    from ..images import Images
    from ..oci.registry import Registry
    from ..store.catalog import LayerInfo

INLINE = "labkernel.cache.v0"

Notify = Callable[[str], None]


class CachePlace(Struct, frozen=True):
    """Where a cache is kept. `kind`: local (`where` is a directory), registry (a name), inline."""

    kind: str
    where: str = ""


Given = str | Path | CachePlace


def cache_places(given: Given | Sequence[Given] | None) -> list[CachePlace]:
    """Where `cache_from` or `cache_to` is; a bare path is a directory."""
    several = [given] if isinstance(given, str | Path | CachePlace) else list(given or ())
    return [each if isinstance(each, CachePlace) else CachePlace("local", str(each)) for each in several]


def import_caches(images: Images, places: Sequence[CachePlace], *, notify: Notify) -> list[RemoteCache]:
    """Take in the steps of directories; of registries, what is fetched when it is found. Raises BuildError."""
    found = []
    for place in places:
        if place.kind == "local":
            import_cache(images.db, images.blobs, Path(place.where))
        else:
            found.append(RemoteCache(images, place.where, notify=notify))
            found[-1].load()
    return found


def export_caches(images: Images, places: Sequence[CachePlace], keys: Sequence[str], *, notify: Notify) -> None:
    """Bring the steps `keys` to directories and registries. Raises BuildError, RegistryError."""
    for place in places:
        if place.kind == "local":
            export_cache(images.db, images.blobs, keys, Path(place.where))
        elif place.kind == "registry":
            RemoteCache(images, place.where, notify=notify).store(keys)


class RemoteCache:
    """The steps a registry keeps under one name. `fetch` brings a layer when its step is wanted."""

    def __init__(self, images: Images, name: str, *, notify: Notify) -> None:
        """Nothing is asked yet. Raises InvalidReference."""
        self._images = images
        self._wanted = reference.parse(name).with_default_tag()
        self._notify = notify
        self.rows: dict[str, dict[str, Any]] = {}

    def load(self) -> None:
        """Read what steps there are. No such name there, or no answer: told, and there are none. Raises BuildError."""
        path, tag = self._wanted.path, self._wanted.digest or self._wanted.tag or "latest"
        try:
            with self._open() as registry:
                manifest = self._manifest(registry, path, tag)
                raw = registry.blob(path, manifest.config.digest, MAX_CONFIG_BYTES, "a build cache")
        except RegistryError as err:
            self._notify(f"importing the cache from {self._wanted.familiar}: {err.brief}")
            return
        try:
            config = json.loads(raw)
            inside = config if manifest.config.media_type == CONFIG_TYPE else config.get(INLINE) or {"rows": []}
            rows = inside["rows"]
            self.rows = {row["key"]: row for row in map(checked_row, rows)}
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise BuildError(f"{self._wanted.familiar} holds no build cache: {err}") from None

    def fetch(self, row: Mapping[str, Any]) -> bool:
        """Store the layer of a step; False when it cannot be had. Raises CorruptBlob, DiskFull."""
        blobs = self._images.blobs
        if row["digest"] is None or blobs.has(row["digest"]):
            return True
        from ..oci import transfer  # a client of registries takes 15 ms to load, and most builds need none

        try:
            with self._open() as registry, blobs.writer(row["digest"], size_bytes=row["layer_bytes"]) as out:
                transfer.download(registry, self._wanted.path, row["digest"], row["layer_bytes"], out.write)
        except RegistryError as err:
            self._notify(f"a cached layer of {self._wanted.familiar} cannot be fetched: {err.brief}")
            return False
        return True

    def _open(self, *, mirrors: bool = True) -> Registry:
        from ..imaging.pulls import Pulls

        return Pulls(self._images).open(self._wanted.domain, notify=self._notify, mirrors=mirrors)

    def _manifest(self, registry: Registry, path: str, tag: str) -> oci.Manifest:
        fetched = registry.manifest(path, tag)
        parsed = oci.parse(fetched.raw, fetched.media_type)
        if not isinstance(parsed, oci.Manifest):
            fetched = registry.manifest(path, platforms.choose(parsed, platforms.host_platform()).digest)
            parsed = oci.parse_manifest(fetched.raw)
        return parsed

    def store(self, keys: Sequence[str]) -> None:
        """Push the steps `keys` with their layers. Raises RegistryError."""
        images, path = self._images, self._wanted.path
        found = describe(images.db, images.blobs, keys)
        with self._open(mirrors=False) as registry:
            for digest, row in found.layers.items():
                self._upload(registry, digest, row["layer_bytes"], partial(images.blobs.open, digest))
            self._upload(registry, found.config_digest, len(found.config), partial(io.BytesIO, found.config))
            registry.put_manifest(path, self._wanted.tag or "latest", found.manifest, oci.OCI_MANIFEST)

    def _upload(self, registry: Registry, digest: str, size_bytes: int, open_blob: Callable[[], BinaryIO]) -> None:
        from ..oci import transfer

        if not registry.has_blob(self._wanted.path, digest):
            transfer.upload(registry, self._wanted.path, digest, size_bytes, open_blob)


def inline_rows(images: Images, keys: Sequence[str], layers: Sequence[LayerInfo]) -> list[dict[str, Any]]:
    """The steps that an image with these layers can bring along, without what only explains a miss."""
    digests = {layer.digest for layer in layers}
    found = []
    for row in describe(images.db, images.blobs, keys).rows:
        if row["digest"] is None or row["digest"] in digests:
            record = json.loads(row["config"])
            kept = {name: record[name] for name in ("created", "text", "place", "size_bytes") if name in record}
            found.append({**row, "config": json.dumps(kept)})
    return found
