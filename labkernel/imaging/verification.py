"""`image verify`: everything an image stands on is read again and held against its digest; what is damaged is mended.

Checked are the manifest, the config and the layers' blobs (digest and size), that they agree with each other, and what
each layer unpacks to (its diff ID). Left out: the unpacked directories, a cache that containers cannot write to and
that comes back from the blobs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LayerError, ManifestError, NotFoundError, StoreError
from ..oci import imageconfig
from ..oci import manifest as oci
from ..oci.tarstream import BlobStream
from ..store.catalog import HOST_LAYER

if TYPE_CHECKING:
    from ..images import Images
    from ..store.catalog import LayerInfo
    from .image import Image
    from .pulls import Pulls

_UNPACKED_MAX = 1 << 42
_THREADS = 4


class Damage(NamedTuple):
    """One thing that is not as it should be: `part` is `manifest`, `config` or `layer`."""

    part: str
    digest: str
    message: str


class Verdict(NamedTuple):
    """What was found of one image. `blobs` and `size_bytes` count what was read; `repair` says what mends it."""

    image: Image
    name: str
    blobs: int
    size_bytes: int
    damages: tuple[Damage, ...]
    repair: str

    @property
    def good(self) -> bool:
        return not self.damages

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "image": self.image.id,
            "name": self.name,
            "good": self.good,
            "blobs": self.blobs,
            "size_bytes": self.size_bytes,
            "damages": [damage._asdict() for damage in self.damages],
            "repair": self.repair if self.damages else None,
        }


def verify_images(images: Images, names: Sequence[str] = ()) -> list[Verdict]:
    """Read all blobs of these images (all images without names) again. Changes nothing.

    A layer that several images share is read once. Raises NoSuchImage.
    """
    chosen = [images.get(name) for name in names] if names else list(images.list())
    layers = {layer.digest: layer for image in chosen for layer in image.layers if layer.media_type != HOST_LAYER}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="labkernel-verify") as executor:
        found = dict(zip(layers, executor.map(lambda layer: _check_layer(images, layer), layers.values()), strict=True))
    return [_judge(images, image, found) for image in dict.fromkeys(chosen)]


def repair(images: Images, pulls: Pulls, verdict: Verdict) -> Image:
    """Throw the damaged blobs of an image away and fetch them again from where the image came from.

    Raises StoreError when it came from no registry, and what `Pulls.pull` raises; then the damage stays as it is
    except for blobs that were unreadable anyway.
    """
    names = verdict.image.repo_digests
    if not names:
        raise StoreError(f"{verdict.name} came from no registry", resolution=verdict.repair)
    platform = verdict.image.raw_config if not any(d.part == "config" for d in verdict.damages) else {}
    wanted = "/".join(str(platform[key]) for key in ("os", "architecture", "variant") if platform.get(key)) or None
    with images.adding():
        for damage in verdict.damages:
            images.blobs.remove(damage.digest)
    image = pulls.pull(names[0], platform=wanted).image
    if image.id != verdict.image.id:
        raise StoreError(f"{names[0]} is another image by now", resolution=f"labkernel rmi {verdict.name}")
    return image


def _judge(images: Images, image: Image, layers: dict[str, tuple[int, Damage | None]]) -> Verdict:
    row = images.catalog_row(image)
    damages = []
    manifest_raw, trouble = _read(images, "manifest", row.manifest, oci.MANIFEST_MAX)
    damages += trouble
    config_raw, trouble = _read(images, "config", image.id, imageconfig.CONFIG_MAX)
    damages += trouble
    own = [layer for layer in image.layers if layer.media_type != HOST_LAYER]
    damages += [damage for layer in own if (damage := layers[layer.digest][1]) is not None]
    if manifest_raw and config_raw:
        damages += _disagreements(image, row.manifest, manifest_raw, config_raw)
    sizes = {layer.digest: layers[layer.digest][0] for layer in own}
    name = image.tags[0] if image.tags else image.short_id[7:]
    total = sum(sizes.values()) + len(manifest_raw) + len(config_raw)
    unique = tuple(dict.fromkeys(damages))
    return Verdict(image, name, len(sizes) + 2, total, unique, _remedy(image, name))


def _read(images: Images, part: str, digest: str, limit: int) -> tuple[bytes, list[Damage]]:
    try:
        return images.blobs.read(digest, limit), []
    except (StoreError, NotFoundError) as err:
        return b"", [Damage(part, digest, err.brief)]


def _disagreements(image: Image, digest: str, manifest_raw: bytes, config_raw: bytes) -> list[Damage]:
    """Whether manifest, config and catalog tell the same story."""
    try:
        manifest = oci.parse_manifest(manifest_raw)
        config = imageconfig.parse(config_raw)
    except ManifestError as err:
        return [Damage("manifest", digest, err.brief)]
    found = []
    if manifest.config.digest != image.id:
        found.append(Damage("manifest", digest, f"it names another config: {manifest.config.digest}"))
    if [layer.digest for layer in manifest.layers] != [layer.digest for layer in image.layers]:
        found.append(Damage("manifest", digest, "it names other layers than the catalog"))
    if list(config.diff_ids) != [layer.diff_id for layer in image.layers]:
        found.append(Damage("config", image.id, "it names other diff IDs than the catalog"))
    return found


def _check_layer(images: Images, layer: LayerInfo) -> tuple[int, Damage | None]:
    """(bytes read, what is wrong): digest and size of the blob, then what it unpacks to."""
    size = 0
    try:
        images.blobs.verify(layer.digest)
        with images.blobs.open(layer.digest) as file:
            size = os.fstat(file.fileno()).st_size
            if size != layer.size_bytes:
                return size, Damage("layer", layer.digest, f"it has {size} bytes where {layer.size_bytes} are named")
            diff_id, _ = BlobStream(file.fileno(), max_bytes=_UNPACKED_MAX).finish()
    except (StoreError, NotFoundError, LayerError) as err:
        return size, Damage("layer", layer.digest, err.brief)
    except OSError as err:
        return size, Damage("layer", layer.digest, f"it cannot be read: {err.strerror}")
    if diff_id != layer.diff_id:
        return size, Damage("layer", layer.digest, f"it unpacks to {diff_id}, not to {layer.diff_id}")
    return size, None


def _remedy(image: Image, name: str) -> str:
    if image.repo_digests:
        return (
            f"`labkernel image verify --repair {name}` fetches it again from {image.repo_digests[0].partition('@')[0]}"
        )
    builtin = image.provenance.get("builtin") if image.provenance else None
    if builtin:
        return f"`labkernel rmi -f {name}`, then `labkernel pull {builtin}` makes it anew"
    return f"`labkernel rmi -f {name}`, then build, load or import it again"
