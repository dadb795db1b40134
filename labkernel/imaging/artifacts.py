"""Artifacts: files in a registry beside images or attached to one (signatures, bills of material, notes).

An artifact is a manifest whose layers are files and whose config is empty; one that names an image as its `subject` is
a referrer of it. They stay in the registry: nothing of them enters the store.

Source: OCI image-spec manifest.md, "Guidelines for Artifact Usage"; distribution-spec 1.1, "Listing Referrers" and
"Pushing Manifests with Subject" (with the tag schema for registries that know no referrers).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from ..errors import ManifestError, RegistryError, UsageError
from ..oci import manifest as oci
from ..oci import reference, transfer
from ..oci.registry import Refused, Registry
from .pulls import Pulls

EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"
FILE_TYPE = "application/octet-stream"
DEFAULT_TYPE = "application/vnd.labkernel.attachment"
_MAX_FILES = 1000
_CHUNK = 1 << 20

Notify = Callable[[str], None]


class Referrer(NamedTuple):
    """An artifact that refers to an image. Size in bytes of its manifest."""

    digest: str
    artifact_type: str
    size_bytes: int
    annotations: dict[str, str]


class Artifacts:
    """Artifacts at the registries that images come from."""

    def __init__(self, pulls: Pulls) -> None:
        self._pulls = pulls

    def referrers(
        self, ref: str, *, artifact_type: str | None = None, notify: Notify = lambda line: None
    ) -> Sequence[Referrer]:
        """What refers to the image `ref` (name, tag or digest) at its registry. Raises Refused, RegistryError."""
        wanted = reference.parse(ref).with_default_tag()
        with self._pulls.open(wanted.domain, notify=notify) as registry:
            digest = wanted.digest or registry.manifest(wanted.path, wanted.tag or "latest").digest
            found = [_referrer(each) for each in registry.referrers(wanted.path, digest)]
        return [each for each in found if artifact_type in (None, each.artifact_type)]

    def attach(
        self,
        ref: str,
        files: Sequence[str | os.PathLike[str]],
        *,
        artifact_type: str = DEFAULT_TYPE,
        annotations: Mapping[str, str] | None = None,
        notify: Notify = lambda line: None,
    ) -> str:
        """Attach files to the image `ref` at its registry; the digest of the new artifact.

        Raises UsageError for a file that cannot be read, Refused, RegistryError.
        """
        wanted = reference.parse(ref).with_default_tag()
        if not files:
            raise UsageError("no file to attach")
        with self._pulls.open(wanted.domain, notify=notify, mirrors=False) as registry:
            top = registry.manifest(wanted.path, wanted.digest or wanted.tag or "latest")
            parsed = oci.parse(top.raw, top.media_type)
            kind = parsed.media_type or (oci.OCI_INDEX if isinstance(parsed, oci.Index) else oci.OCI_MANIFEST)
            config = _send(registry, wanted.path, lambda: io.BytesIO(EMPTY), EMPTY_TYPE)
            manifest = {
                "schemaVersion": 2,
                "mediaType": oci.OCI_MANIFEST,
                "artifactType": artifact_type,
                "config": config,
                "layers": [_send_file(registry, wanted.path, Path(path)) for path in files],
                "subject": {"mediaType": kind, "digest": top.digest, "size": len(top.raw)},
                **({"annotations": dict(annotations)} if annotations else {}),
            }
            raw = json.dumps(manifest).encode()
            digest = oci.digest_of(raw)
            knows = registry.put_manifest(wanted.path, digest, raw, oci.OCI_MANIFEST)
            if not knows:
                entry = {
                    "mediaType": oci.OCI_MANIFEST,
                    "digest": digest,
                    "size": len(raw),
                    "artifactType": artifact_type,
                }
                _list_by_tag(
                    registry,
                    wanted.path,
                    top.digest,
                    entry | ({"annotations": dict(annotations)} if annotations else {}),
                )
        return digest

    def fetch(
        self, ref: str, directory: str | os.PathLike[str], *, notify: Notify = lambda line: None
    ) -> Sequence[Path]:
        """Save the files of an artifact (name, tag or digest) below `directory`, verified; their paths.

        Raises ManifestError for an image, and for file names that would lead elsewhere.
        """
        wanted = reference.parse(ref).with_default_tag()
        with self._pulls.open(wanted.domain, notify=notify) as registry:
            top = registry.manifest(wanted.path, wanted.digest or wanted.tag or "latest")
            manifest = oci.parse_manifest(top.raw, top.media_type)
            if manifest.config.media_type in (oci.OCI_CONFIG, oci.DOCKER_CONFIG):
                raise ManifestError(f"{wanted.familiar} is an image", resolution="`labkernel pull` fetches images")
            if len(manifest.layers) > _MAX_FILES:
                raise ManifestError(f"{wanted.familiar} has {len(manifest.layers)} files: refused")
            names = [_name_of(layer) for layer in manifest.layers]
            if len(set(names)) != len(names):
                raise ManifestError(f"{wanted.familiar} has several files of one name")
            os.makedirs(directory, exist_ok=True)
            pairs = zip(manifest.layers, names, strict=True)
            return [_receive(registry, wanted.path, layer, Path(directory) / name) for layer, name in pairs]


def _referrer(entry: Mapping[str, Any]) -> Referrer:
    annotations = entry.get("annotations")
    return Referrer(
        str(entry.get("digest") or ""),
        str(entry.get("artifactType") or ""),
        int(entry.get("size") or 0),
        {str(key): str(value) for key, value in annotations.items()} if isinstance(annotations, dict) else {},
    )


def _send_file(registry: Registry, repository: str, path: Path) -> dict[str, Any]:
    try:
        return {
            **_send(registry, repository, lambda: path.open("rb"), FILE_TYPE),
            "annotations": {TITLE: path.name},
        }
    except OSError as err:
        raise UsageError(f"cannot read {path}: {(err.strerror or '').lower()}", exit_code=1) from err


def _send(registry: Registry, repository: str, open_blob: Callable[[], BinaryIO], media_type: str) -> dict[str, Any]:
    """Upload one blob unless it is there; its descriptor."""
    hashing = hashlib.sha256()
    with open_blob() as file:
        while chunk := file.read(_CHUNK):
            hashing.update(chunk)
        size = file.tell()
    digest = f"sha256:{hashing.hexdigest()}"
    if not registry.has_blob(repository, digest):
        transfer.upload(registry, repository, digest, size, open_blob)
    return {"mediaType": media_type, "digest": digest, "size": size}


def _receive(registry: Registry, repository: str, layer: oci.Descriptor, target: Path) -> Path:
    algorithm = layer.digest.partition(":")[0]
    hashing = hashlib.new(algorithm)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as out:

            def write(piece: memoryview) -> None:
                out.write(piece)
                hashing.update(piece)

            transfer.download(registry, repository, layer.digest, layer.size, write)
        if f"{algorithm}:{hashing.hexdigest()}" != layer.digest:
            raise RegistryError(f"{registry.domain} sends other bytes than those of {layer.digest}")
        os.replace(part, target)
    except OSError as err:
        raise UsageError(f"cannot write {target}: {(err.strerror or '').lower()}", exit_code=1) from err
    finally:
        part.unlink(missing_ok=True)
    return target


def _name_of(layer: oci.Descriptor) -> str:
    name = (layer.annotations or {}).get(TITLE) or layer.digest.partition(":")[2][:12]
    if "/" in name or "\\" in name or name in (".", "..") or "\0" in name or name.startswith(".") or len(name) > 200:
        raise ManifestError(f"the artifact wants to write to {name!r}: refused")
    return name


def _list_by_tag(registry: Registry, repository: str, subject: str, entry: dict[str, Any]) -> None:
    """Add to the list that stands in for the referrers API (distribution-spec, "Referrers Tag Schema")."""
    tag = subject.replace(":", "-", 1)
    manifests: list[Any] = []
    try:
        known = oci.parse(registry.manifest(repository, tag).raw)
        manifests = msgspec.to_builtins(known.manifests) if isinstance(known, oci.Index) else []
    except Refused as err:
        if err.status != 404:
            raise
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [*manifests, entry]}
    registry.put_manifest(repository, tag, json.dumps(index).encode(), oci.OCI_INDEX)
