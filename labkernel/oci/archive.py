"""Images and root file systems as tar archives: one layer from any tar, `docker save` archives, OCI image layouts.

Archives are read forward, once, so a pipe will do: each file in it becomes a blob or a small document in memory, and
what it means is worked out at the end. Nothing read is trusted: sizes are bounded, digests checked, names inside the
archive never become paths. `blobs` is the store's `Blobs`, handed in.

Source: OCI image-spec image-layout.md; Docker image spec v1.2, "Combined Image JSON + Filesystem Changeset Format",
and what docker 25 and later write: both at once.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple, Protocol

from labkernel.errors import (
    DISK_FULL_HINT,
    DiskFull,
    ImageError,
    InvalidReference,
    LayerError,
    ManifestError,
    UsageError,
)

from . import imageconfig, reference
from . import manifest as oci
from .config import host_architecture
from .tarstream import LIMIT_HINT, BlobStream, members

_CHUNK = 1 << 20
_MAX_BYTES = 1 << 40
_MAX_MEMBERS = 100_000
_DOCUMENT_MAX = 8 << 20
_DOCUMENTS = ("manifest.json", "index.json", "oci-layout", "repositories")
_MAX_DEPTH = 4
_MAX_DESCRIPTORS = 10_000
"""Looked at in all the indexes of an archive: a few that name each other many times make billions."""
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_TAR_HINT = "give a tar of a root file system: plain, gzip or zstd"
_ARCHIVE_HINT = (
    "`load` takes what `docker save` or `skopeo copy … oci-archive:` wrote; for a root file system use `import`"
)


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


class StoredLayer(NamedTuple):
    """A layer that is in the store: same shape as `store.catalog.LayerInfo`."""

    diff_id: str
    digest: str
    media_type: str
    size_bytes: int


class LoadedImage(NamedTuple):
    """An image found in an archive; its blobs are in the store. `manifest` is None where the archive has none."""

    config: bytes
    manifest: bytes | None
    layers: list[StoredLayer]
    tags: list[str]


class SavedImage(NamedTuple):
    """An image to be written: digests of config and manifest, its layers, and canonical tags."""

    config: str
    manifest: str
    layers: Sequence[Any]
    tags: list[str]


# -- one layer ---------------------------------------------------------------------------------------------------


def store_layer(blobs: Any, source: Readable) -> StoredLayer:
    """Store a tar stream (plain, gzip or zstd) byte for byte, and find its diff ID.

    Raises ImageError when the stream is no tar, or no whole one; nothing is then left.
    """
    with blobs.writer() as out:
        while chunk := source.read(_CHUNK):
            out.write(chunk)
        with open(out.path, "rb", buffering=0) as file:
            head = file.read(512)
            _refuse_other_formats(head)
            file.seek(0)
            stream = BlobStream(file.fileno(), max_bytes=_MAX_BYTES)
            _check_tar(stream.read(512))
            diff_id, _ = stream.finish()
    return StoredLayer(diff_id, out.blob.digest, media_type_of(head), out.blob.size_bytes)


def media_type_of(head: bytes) -> str:
    """Layer media type of a blob, by its first bytes; those of the wild are wrong too often to be asked."""
    if head.startswith(b"\x1f\x8b"):
        return oci.OCI_LAYER_GZIP
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return oci.OCI_LAYER_ZSTD
    return oci.OCI_LAYER


def _refuse_other_formats(head: bytes) -> None:
    for magic, tool in _OTHERS.items():
        if head.startswith(magic):
            raise ImageError(
                f"{tool} archives are not taken",
                resolution=f"decompress it on the way: `{tool} -dc FILE | labkernel import - NAME`",
            )


def _check_tar(header: bytes) -> None:
    """A tar header's checksum counts its own field as blanks (POSIX pax, "ustar Interchange Format")."""
    if len(header) < 512:
        raise ImageError("the archive is empty or cut off", resolution=_TAR_HINT)
    if not any(header):
        return
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        stored = -1
    if stored != sum(header[:148]) + 8 * 32 + sum(header[156:512]):
        raise ImageError("this is not a tar archive", resolution=_TAR_HINT)


# -- load --------------------------------------------------------------------------------------------------------


class Bounds(NamedTuple):
    """What an archive may hold at most: layers of an image, bytes of a layer unpacked, bytes of all that is stored."""

    layers: int = 500
    layer_bytes: int = 1 << 36
    image_bytes: int = _MAX_BYTES


def load_archive(
    blobs: Any,
    source: str | os.PathLike[str] | Readable,
    *,
    bounds: Bounds | None = None,
    stored: list[str] | None = None,
) -> list[LoadedImage]:
    """Store the images of an archive (plain, gzip or zstd; a path or a stream), or of a directory that is an OCI image
    layout, and say what they are.

    `stored` gets the digests of blobs that were not there before, also of a load that fails: then they are unnamed
    content. Hold `images.adding()` until the result is registered.
    Raises ImageError, LayerError, ManifestError, CorruptBlob, DiskFull.
    """
    reading = _Reading(blobs, bounds or Bounds(), [] if stored is None else stored)
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        contents = reading.directory(os.fspath(source))
    else:
        with _descriptor(source) as fd:
            contents = reading.archive(fd)
    if "manifest.json" in contents.documents:
        found = list(_docker_images(reading, contents))
    elif "index.json" in contents.documents:
        found = list(_layout_images(reading, contents))
    else:
        raise ImageError("the archive holds neither manifest.json nor index.json", resolution=_ARCHIVE_HINT)
    if not found:
        raise ImageError("the archive holds no image for this machine", resolution=_ARCHIVE_HINT)
    return found


class _Contents(NamedTuple):
    documents: dict[str, bytes]
    files: dict[str, str]
    """Digest of the blob by name inside the archive."""


@contextmanager
def _descriptor(source: str | os.PathLike[str] | Readable) -> Iterator[int]:
    if isinstance(source, (str, os.PathLike)):
        try:
            file: IO[bytes] = open(source, "rb", buffering=0)  # noqa: SIM115
        except OSError as err:
            raise UsageError(f"cannot read {os.fspath(source)}: {err.strerror}") from err
        with file:
            yield file.fileno()
        return
    try:
        fd = source.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        with tempfile.TemporaryFile() as spool:
            while chunk := source.read(_CHUNK):
                spool.write(chunk)
            spool.seek(0)
            yield spool.fileno()
    else:
        yield fd


class _Reading:
    """An archive being read: its store, its bounds, and what is known of it."""

    def __init__(self, blobs: Any, bounds: Bounds, stored: list[str]) -> None:
        self.blobs = blobs
        self.bounds = bounds
        self._stored = stored
        self._bytes = 0
        self._layers: dict[tuple[str, str], StoredLayer] = {}
        self._looked_at = 0

    def archive(self, fd: int) -> _Contents:
        """Store the files, keep the documents. Raises ImageError."""
        # Each file in it is hashed for itself; the whole archive's digest is nobody's.
        stream = BlobStream(fd, max_bytes=_MAX_BYTES, hashed=False)
        contents = _Contents({}, {})
        links: dict[str, str] = {}
        try:
            for member in members(stream, max_members=_MAX_MEMBERS):
                name = posixpath.normpath(member.name)
                if member.issym():
                    # Old `docker save` wrote a layer once and linked to it from its other places.
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                elif member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.isreg() and name in _DOCUMENTS:
                    contents.documents[name] = _read_document(stream.read, name, member.size)
                elif member.isreg():
                    if member.sparse is not None:
                        raise ImageError(f"the archive's {name} is a sparse file: refused", resolution=_ARCHIVE_HINT)
                    contents.files[name] = self._store(name, member.size, stream.chunks(member.size))
        except LayerError as err:
            raise ImageError(f"the archive is damaged: {err}", resolution=_ARCHIVE_HINT) from err
        for name, target in links.items():
            if target in contents.files:
                contents.files.setdefault(name, contents.files[target])
        return contents

    def directory(self, path: str) -> _Contents:
        """As `archive`, of an image layout on the disk. Links are not followed. Raises ImageError."""
        contents = _Contents({}, {})
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        names = [name for name in ("oci-layout", "index.json") if os.path.lexists(os.path.join(path, name))]
        for algorithm in ("sha256", "sha512"):
            place = os.path.join(path, "blobs", algorithm)
            found = sorted(os.listdir(place)) if os.path.isdir(place) else []
            names += [f"blobs/{algorithm}/{each}" for each in found if oci.is_digest(f"{algorithm}:{each}")]
        if len(names) > _MAX_MEMBERS:
            raise ImageError(f"{path} holds more than {_MAX_MEMBERS} files")
        for name in names:
            try:
                with open(os.open(os.path.join(path, name), flags), "rb") as file:
                    status = os.fstat(file.fileno())
                    if not stat.S_ISREG(status.st_mode):
                        raise ImageError(f"{name} in {path} is no file")
                    if name in _DOCUMENTS:
                        contents.documents[name] = _read_document(file.read, name, status.st_size)
                    else:
                        contents.files[name] = self._store(name, status.st_size, iter(lambda: file.read(_CHUNK), b""))
            except OSError as err:
                raise ImageError(f"cannot read {name} in {path}: {err.strerror}") from err
        return contents

    def _store(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> str:
        self._bytes += size
        if size > self.bounds.layer_bytes or self._bytes > self.bounds.image_bytes:
            raise ImageError(
                f"the archive's {name} has {size} bytes: more than the limits allow",
                resolution=LIMIT_HINT.format("layer_bytes"),
            )
        status = os.statvfs(self.blobs.layout.root)
        if size > status.f_bavail * status.f_frsize:
            raise DiskFull(f"the archive's {name} has {size} bytes, more than are free", resolution=DISK_FULL_HINT)
        parts = name.split("/")
        claimed = f"{parts[1]}:{parts[2]}" if len(parts) == 3 and parts[0] == "blobs" else None
        if claimed is not None and not oci.is_digest(claimed):
            claimed = None
        known = claimed is not None and self.blobs.has(claimed)
        with self.blobs.writer(claimed, size_bytes=size) as out:
            for piece in chunks:
                out.write(piece)
            known = known or self.blobs.has(out.digest)
        digest: str = out.blob.digest
        if not known:
            self._stored.append(digest)
        return digest

    def layers(self, config: imageconfig.ImageConfig, digests: Sequence[str]) -> list[StoredLayer]:
        """The layers of an image, each with its diff ID checked."""
        if len(digests) != len(config.diff_ids):
            raise ManifestError(
                f"the image has {len(digests)} layers and its config names {len(config.diff_ids)}: they must be as many"
            )
        if len(digests) > self.bounds.layers:
            raise ManifestError(
                f"the image has {len(digests)} layers: more than {self.bounds.layers} are refused",
                resolution=LIMIT_HINT.format("layers"),
            )
        return [self._layer(digest, diff_id) for digest, diff_id in zip(digests, config.diff_ids, strict=True)]

    def _layer(self, digest: str, diff_id: str) -> StoredLayer:
        # An archive may name one layer as often as it likes.
        if (digest, diff_id) not in self._layers:
            with self.blobs.open(digest) as file:
                head = file.read(512)
                if digest != diff_id:
                    os.lseek(file.fileno(), 0, os.SEEK_SET)
                    found, _ = BlobStream(file.fileno(), max_bytes=self.bounds.layer_bytes).finish()
                    if found != diff_id:
                        raise LayerError(
                            f"layer {digest} unpacks to {found}, its config says {diff_id}",
                            resolution="the archive is damaged: save it again",
                        )
            kept = StoredLayer(diff_id, digest, media_type_of(head), self.blobs.size(digest))
            self._layers[digest, diff_id] = kept
        return self._layers[digest, diff_id]

    def walk(self, index: oci.Index, depth: int = 0) -> Iterator[tuple[oci.Descriptor, oci.Manifest]]:
        """The image manifests of an index for this machine, each with the outermost descriptor that leads to it."""
        if depth > _MAX_DEPTH:
            raise ManifestError("the archive's indexes are nested too deeply")
        machine = host_architecture()
        for descriptor in index.manifests:
            self._looked_at += 1
            if self._looked_at > _MAX_DESCRIPTORS:
                raise ManifestError(f"the archive's indexes name more than {_MAX_DESCRIPTORS} manifests")
            platform = descriptor.platform
            if platform is not None and (platform.os != "linux" or platform.architecture != machine):
                continue
            if descriptor.media_type not in oci.MANIFESTS | oci.INDEXES or not self.blobs.has(descriptor.digest):
                continue
            parsed = oci.parse(self.blobs.read(descriptor.digest), descriptor.media_type)
            if isinstance(parsed, oci.Manifest):
                yield descriptor, parsed
            else:
                for _, manifest in self.walk(parsed, depth + 1):
                    yield descriptor, manifest


def _read_document(read: Callable[[int], bytes], name: str, size: int) -> bytes:
    if size > _DOCUMENT_MAX:
        raise ImageError(f"the archive's {name} has {size} bytes: more than {_DOCUMENT_MAX} are refused")
    return read(size)


def _docker_images(reading: _Reading, contents: _Contents) -> Iterator[LoadedImage]:
    try:
        entries = json.loads(contents.documents["manifest.json"])
        wanted = [(str(e["Config"]), [str(n) for n in e["Layers"] or ()], e.get("RepoTags") or []) for e in entries]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise ManifestError(f"the archive's manifest.json is not as it should be: {err!r}") from err
    manifests = _manifests_by_config(reading, contents)
    for config_name, layer_names, tags in wanted:
        raw = reading.blobs.read(_lookup(contents, config_name))
        config = imageconfig.parse(raw)
        layers = reading.layers(config, [_lookup(contents, name) for name in layer_names])
        yield LoadedImage(raw, manifests.get(config.digest), layers, [str(tag) for tag in tags])


def _layout_images(reading: _Reading, contents: _Contents) -> Iterator[LoadedImage]:
    index = oci.parse(contents.documents["index.json"], oci.OCI_INDEX)
    if not isinstance(index, oci.Index):
        raise ManifestError("the archive's index.json is not an image index")
    for descriptor, manifest in reading.walk(index):
        raw = reading.blobs.read(manifest.config.digest)
        config = imageconfig.parse(raw)
        layers = reading.layers(config, [layer.digest for layer in manifest.layers])
        yield LoadedImage(raw, manifest.raw, layers, _tags_of(descriptor))


def _manifests_by_config(reading: _Reading, contents: _Contents) -> dict[str, bytes]:
    raw = contents.documents.get("index.json")
    if raw is None:
        return {}
    index = oci.parse(raw, oci.OCI_INDEX)
    if not isinstance(index, oci.Index):
        return {}
    return {manifest.config.digest: manifest.raw for _, manifest in reading.walk(index)}


def _tags_of(descriptor: oci.Descriptor) -> list[str]:
    notes = descriptor.annotations or {}
    for key in ("io.containerd.image.name", "org.opencontainers.image.ref.name"):
        name = notes.get(key, "")
        # A bare tag (`latest`) names no image: image-layout.md leaves its meaning to the user of the layout.
        if ":" in name or "/" in name:
            try:
                return [str(reference.parse_tag(name))]
            except InvalidReference:
                continue
    return []


def _lookup(contents: _Contents, name: str) -> str:
    digest = contents.files.get(posixpath.normpath(name))
    if digest is None:
        raise ManifestError(f"the archive names {name} and does not hold it")
    return digest


# -- save --------------------------------------------------------------------------------------------------------


def save_archive(blobs: Any, images: Sequence[SavedImage], out: BinaryIO) -> None:
    """Write images as one tar: an OCI image layout, with `manifest.json` and `repositories` for docker beside it.

    Blobs are written once each, as they are stored; all times are 0, so that equal images give equal archives.
    """
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add_directories(tar)
        _add_blobs(tar, blobs, images)
        _add_document(tar, "index.json", _index_of(blobs, images))
        _add_document(tar, "manifest.json", _encode([_docker_entry(image) for image in images]))
        _add_document(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add_document(tar, "repositories", _encode(_repositories(images)))


def save_index(blobs: Any, index: bytes, images: Sequence[SavedImage], names: Sequence[str], out: BinaryIO) -> None:
    """Write an index (of images for several platforms) as an OCI image layout, under the canonical tags `names`."""
    digest = oci.digest_of(index)
    entries: list[dict[str, str] | None] = [_notes(name) for name in names]
    top = [
        oci.Descriptor(media_type=oci.OCI_INDEX, digest=digest, size=len(index), annotations=notes)
        for notes in entries or [None]
    ]
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add_directories(tar)
        _add_blobs(tar, blobs, images)
        _add_document(tar, _blob_name(digest), index)
        _add_document(tar, "index.json", oci.make_index(top).raw)
        _add_document(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')


def _add_directories(tar: tarfile.TarFile) -> None:
    for directory in ("blobs", "blobs/sha256"):
        member = tarfile.TarInfo(directory)
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)


def _add_blobs(tar: tarfile.TarFile, blobs: Any, images: Sequence[SavedImage]) -> None:
    written: set[str] = set()
    for image in images:
        for digest in (*(layer.digest for layer in image.layers), image.config, image.manifest):
            if digest not in written:
                written.add(digest)
                _add_blob(tar, blobs, digest)


def _notes(tag: str) -> dict[str, str]:
    return {"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": tag.rpartition(":")[2]}


def _index_of(blobs: Any, images: Sequence[SavedImage]) -> bytes:
    descriptors = []
    for image in images:
        media_type = oci.parse_manifest(blobs.read(image.manifest)).media_type or oci.OCI_MANIFEST
        size = blobs.size(image.manifest)
        notes: list[dict[str, str] | None] = [_notes(tag) for tag in image.tags]
        descriptors += [
            oci.Descriptor(media_type=media_type, digest=image.manifest, size=size, annotations=note)
            for note in notes or [None]
        ]
    return oci.make_index(descriptors).raw


def _docker_entry(image: SavedImage) -> dict[str, Any]:
    return {
        "Config": _blob_name(image.config),
        "RepoTags": [reference.parse(tag).familiar for tag in image.tags] or None,
        "Layers": [_blob_name(layer.digest) for layer in image.layers],
    }


def _repositories(images: Sequence[SavedImage]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for image in images:
        if image.layers:
            for tag in image.tags:
                name = reference.parse(tag)
                found.setdefault(name.familiar_name, {})[name.tag or ""] = image.layers[-1].digest.partition(":")[2]
    return found


def _add_blob(tar: tarfile.TarFile, blobs: Any, digest: str) -> None:
    member = tarfile.TarInfo(_blob_name(digest))
    member.size, member.mode = blobs.size(digest), 0o444
    with blobs.open(digest) as file:
        tar.addfile(member, file)


def _add_document(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _encode(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
