"""The private registry on the store itself: its images can be pulled, and what is pushed lies among its blobs.

Every tagged image of the store is there to be pulled, under its name without the registry's part: `busybox` and
`lab/debian` as they are, `127.0.0.1:5000/class/web` as `class/web`. What is pushed comes first where both have a name.
The registry never changes the store's images. Its own names are in `<store>/published` (as in `oci/depot`); the blobs
they need are the store's, so nothing is there twice, and `prune` and `rmi` leave them (`published_blobs`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError
from ..oci import manifest as oci
from ..oci import reference
from ..oci.depot import Depot, Problem, Stored
from ..store.layout import Layout

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

_LIBRARY = "library/"


class StoreDepot(Depot):
    """A depot over the images and blobs of a store. `address` (HOST:PORT) is the part of names that is ours."""

    def __init__(self, images: Images, *, address: str, quota_bytes: int | None = None) -> None:
        self._images = images
        self._address = address
        super().__init__(images.layout.root / "published", quota_bytes=quota_bytes, blobs=images.layout.blobs)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Also the store's own collection waits."""
        with self._images.adding(), super().keeping():
            yield

    def find_blob(self, name: str, digest: str) -> Path:
        try:
            return super().find_blob(name, digest)
        except Problem as err:
            path = self.blob_path(digest)
            if err.status != 404 or not path.exists() or digest not in self._content(name):
                raise
            return path

    def find_manifest(self, name: str, reference: str) -> Stored:
        try:
            return super().find_manifest(name, reference)
        except Problem as err:
            if err.status != 404:
                raise
            for image, tag in self._tagged(name):
                digest = self._images.catalog_row(image).manifest
                if reference in (tag, digest):
                    try:
                        raw = self._images.blobs.read(digest, oci.MANIFEST_MAX)
                    except StoreError:
                        raise err from None
                    return Stored(raw, digest, oci.parse(raw).media_type or oci.OCI_MANIFEST)
            raise

    def delete_manifest(self, name: str, reference: str) -> None:
        try:
            super().delete_manifest(name, reference)
        except Problem as err:
            if err.status == 404 and any(
                reference in (tag, self._images.catalog_row(image).manifest) for image, tag in self._tagged(name)
            ):
                raise Problem(405, "UNSUPPORTED", "an image of the store: `labkernel rmi` removes it") from None
            raise

    def tags(self, name: str) -> list[str]:
        ours = {tag for _, tag in self._tagged(name)}
        try:
            return sorted(ours | set(super().tags(name)))
        except Problem:
            if not ours:
                raise
            return sorted(ours)

    def repositories(self) -> list[str]:
        names = (reference.parse(name) for tags in self._images.catalog.all_tags().values() for name in tags)
        return sorted({each.path.removeprefix(_LIBRARY) for each in names} | set(self._own_repositories()))

    def _own_repositories(self) -> list[str]:
        return super().repositories()

    def _measure(self) -> int:
        sizes = {digest: self.blob_path(digest) for digest in published_blobs(self._images.layout)}
        uploads = (path.stat().st_size for path in (self.root / "uploads").iterdir())
        return sum(path.stat().st_size for path in sizes.values() if path.exists()) + sum(uploads)

    def _collect_blobs(self, needed: set[str], limit: float) -> tuple[int, int]:
        """Names are gone by now: the store's own sweep takes what neither an image nor the registry needs."""
        before = sum(1 for _ in self._images.blobs)
        freed = self._images.sweep()
        return max(0, before - sum(1 for _ in self._images.blobs)), freed

    def _tagged(self, name: str) -> list[tuple[Image, str]]:
        """Images of the store that this repository has, with their tags: ours first, then Docker Hub's, then others."""
        paths = {name, name if "/" in name else f"{_LIBRARY}{name}"}
        found = []
        for id, tags in self._images.catalog.all_tags().items():
            for each in map(reference.parse, tags):
                if each.path in paths and each.tag:
                    rank = (each.domain != self._address, each.domain != "docker.io", each.domain)
                    found.append((rank, id, each.tag))
        images: dict[str, tuple[Image, str]] = {}
        for _, id, tag in sorted(found):
            image = self._images.find(id)
            if image is not None and not image.uses_host:
                images.setdefault(tag, (image, tag))
        return list(images.values())

    def _content(self, name: str) -> set[str]:
        found: set[str] = set()
        for image, _ in self._tagged(name):
            found |= {image.id, *(layer.digest for layer in image.layers)}
        return found


def published_blobs(layout: Layout) -> set[str]:
    """Digests of the blobs and manifests that the registry on this store names."""
    return set(_named(layout.root / "published" / "repositories"))


def _named(base: Path) -> Iterator[str]:
    for directory, names, _ in os.walk(base):
        for kind in ("_blobs", "_manifests"):
            if kind in names:
                entries = os.listdir(os.path.join(directory, kind))
                yield from (entry.replace("-", ":", 1) for entry in entries if entry[0] != ".")
        names[:] = [name for name in names if name[0] != "_"]
