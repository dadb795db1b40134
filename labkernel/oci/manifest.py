"""Manifests, indexes and descriptors, of OCI and of Docker, as typed values that keep the bytes they came from.

Digests are of bytes, so `raw` is what is stored and pushed, never a re-encoding. Unknown properties are ignored, as
image-spec considerations.md, "Extensibility" demands. Source: OCI image-spec descriptor.md, manifest.md,
image-index.md; Docker image manifest version 2, schema 2.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from labkernel.errors import ManifestError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = f"{OCI_LAYER}+gzip"
OCI_LAYER_ZSTD = f"{OCI_LAYER}+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = f"{DOCKER_LAYER}.gzip"

MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})

MANIFEST_MAX = 4 << 20
"""Larger documents are refused, as registries do (distribution-spec, "Pushing Manifests")."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_FOREIGN = ("nondistributable", "foreign")


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a manifest of an index runs on (image-index.md, `platform`)."""

    architecture: str
    os: str
    os_version: str | None = msgspec.field(default=None, name="os.version")
    os_features: list[str] | None = msgspec.field(default=None, name="os.features")
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Names a blob by media type, digest and size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] | None = None
    urls: list[str] | None = None
    platform: Platform | None = None
    artifact_type: str | None = None
    data: str | None = None


class _Document(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", dict=True, kw_only=True):
    """What keeps its bytes. Without fields: those of a subclass are encoded in their own order."""

    @property
    def raw(self) -> bytes:
        """The bytes this was parsed from or encoded to."""
        return _raw(self)

    @property
    def digest(self) -> str:
        return digest_of(self.raw)


class Manifest(_Document, frozen=True, omit_defaults=True, rename="camel", dict=True, kw_only=True):
    """One image for one platform: its config and its layers, bottom first."""

    schema_version: int
    media_type: str | None = None
    artifact_type: str | None = None
    config: Descriptor
    layers: list[Descriptor]
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class Index(_Document, frozen=True, omit_defaults=True, rename="camel", dict=True, kw_only=True):
    """A choice of manifests, mostly by platform."""

    schema_version: int
    media_type: str | None = None
    artifact_type: str | None = None
    manifests: list[Descriptor]
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class _Probe(msgspec.Struct, rename="camel"):
    schema_version: int | None = None
    media_type: str | None = None
    config: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()
    manifests: msgspec.Raw = msgspec.Raw()
    fs_layers: msgspec.Raw = msgspec.Raw()


_T = TypeVar("_T")


def digest_of(data: bytes) -> str:
    """sha256 digest of `data`, as `sha256:` + hex."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: str) -> bool:
    """Whether `text` is a well-formed sha256 or sha512 digest."""
    return _DIGEST.fullmatch(text) is not None


def parse(raw: bytes, media_type: str | None = None) -> Manifest | Index:
    """The manifest or index in `raw`; `media_type` is what the transport called it, where it did.

    Raises ManifestError for what is no such document, for schema 1, and for one that can be read as both a manifest
    and an index (image-spec manifest.md; CVE-2021-41190).
    """
    if len(raw) > MANIFEST_MAX:
        raise ManifestError(f"manifest of {len(raw)} bytes: more than {MANIFEST_MAX} are refused")
    probe = decode(raw, _Probe, "manifest")
    if probe.schema_version == 1 or _given(probe.fs_layers):
        raise ManifestError(
            "Docker image manifest version 2, schema 1 is not supported",
            resolution="push the image again with a tool of this decade; registries stopped taking this format",
        )
    kind = probe.media_type or media_type
    if probe.media_type and media_type and probe.media_type != media_type and media_type in MANIFESTS | INDEXES:
        raise ManifestError(f"manifest says it is {probe.media_type} and was sent as {media_type}")
    is_index = kind in INDEXES or (kind not in MANIFESTS and _given(probe.manifests))
    if is_index and (_given(probe.layers) or _given(probe.config)):
        raise ManifestError("ambiguous manifest: an index with layers or a config")
    if not is_index and _given(probe.manifests):
        raise ManifestError("ambiguous manifest: a manifest that lists manifests")
    return _parse_index(raw) if is_index else _parse_manifest(raw)


def parse_manifest(raw: bytes, media_type: str | None = None) -> Manifest:
    """As `parse`, where only an image manifest will do."""
    parsed = parse(raw, media_type)
    if not isinstance(parsed, Manifest):
        raise ManifestError("an index was found where an image manifest was expected")
    return parsed


def make_manifest(config: Descriptor, layers: Sequence[Descriptor], *, docker: bool = False) -> Manifest:
    """A new OCI (or Docker) manifest; `raw` holds its encoding."""
    manifest = Manifest(
        schema_version=2, media_type=DOCKER_MANIFEST if docker else OCI_MANIFEST, config=config, layers=list(layers)
    )
    return keep_raw(manifest, msgspec.json.encode(manifest))


def make_index(manifests: Sequence[Descriptor], annotations: dict[str, str] | None = None) -> Index:
    """A new OCI index; `raw` holds its encoding."""
    index = Index(schema_version=2, media_type=OCI_INDEX, manifests=list(manifests), annotations=annotations)
    return keep_raw(index, msgspec.json.encode(index))


def is_foreign(media_type: str) -> bool:
    """Whether a layer of this type may be absent from registries (`nondistributable`, Docker's `foreign`)."""
    return any(word in media_type for word in _FOREIGN)


def compression_of(media_type: str) -> str:
    """`gzip`, `zstd` or `none`, as a layer's media type says. Raises ManifestError for what is not a layer."""
    if media_type.endswith(("+gzip", ".gzip")):
        return "gzip"
    if media_type.endswith(("+zstd", ".zstd")):
        return "zstd"
    if media_type.endswith(".tar"):
        return "none"
    raise ManifestError(
        f"unsupported layer media type {media_type}",
        resolution="this is probably not a container image but another kind of artifact",
    )


def decode(raw: bytes, kind: type[_T], what: str) -> _T:
    """`raw` as JSON of `kind`. Raises ManifestError naming `what` and the place that does not fit."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise ManifestError(f"invalid {what}: {err}") from err


def keep_raw(struct: _T, raw: bytes) -> _T:
    """`struct`, remembering the bytes it stands for."""
    vars(struct)["_raw"] = raw
    return struct


def _given(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in (b"", b"null")


def _parse_manifest(raw: bytes) -> Manifest:
    manifest = decode(raw, Manifest, "manifest")
    _check(manifest.schema_version, [manifest.config, *manifest.layers])
    return keep_raw(manifest, raw)


def _parse_index(raw: bytes) -> Index:
    index = decode(raw, Index, "index")
    _check(index.schema_version, index.manifests)
    return keep_raw(index, raw)


def _check(schema_version: int, descriptors: Sequence[Descriptor]) -> None:
    if schema_version != 2:
        raise ManifestError(f"manifest has schemaVersion {schema_version}, expected 2")
    for descriptor in descriptors:
        if not is_digest(descriptor.digest):
            raise ManifestError(f"invalid manifest: not a digest: {descriptor.digest!r}")
        if descriptor.size < 0:
            raise ManifestError(f"invalid manifest: {descriptor.digest} has a negative size")


def _raw(struct: Any) -> bytes:
    raw: bytes | None = vars(struct).get("_raw")
    return msgspec.json.encode(struct) if raw is None else raw
