"""Images and root file systems as tar archives: one layer from any tar, `docker save` archives, OCI image layouts.

What is read is not trusted: sizes are bounded, digests checked, names inside the archive never become paths.
Source: OCI image-spec image-layout.md; Docker image spec v1.2, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from labkernel.errors import ImageError

from . import manifest as oci

_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


class StoredLayer(NamedTuple):
    """A layer that is in the store: same shape as `store.catalog.LayerInfo`."""

    diff_id: str
    digest: str
    media_type: str
    size_bytes: int


def store_layer(blobs: Any, source: Readable) -> StoredLayer:
    """Store a tar stream (plain, gzip or zstd) as it is, finding its diff ID on the way.

    `blobs` is the store's `Blobs`. Raises ImageError when the stream is no tar, or no whole one.
    """
    head = _read_head(source)
    media_type = _media_type(head)
    decompress = _decompressor(media_type)
    plain = hashlib.sha256()
    seen = bytearray()
    with blobs.writer() as out:
        chunk = head
        while chunk:
            out.write(chunk)
            try:
                data = decompress(chunk)
            except (zlib.error, EOFError, ValueError, OSError) as err:
                raise ImageError(f"the archive is damaged: {err}") from err
            except Exception as err:
                # isal and zstd have exception classes of their own, without a common base.
                raise ImageError(f"the archive is damaged: {err}") from err
            plain.update(data)
            if len(seen) < 512:
                seen += data[: 512 - len(seen)]
                if len(seen) == 512:
                    _check_tar(bytes(seen))
            chunk = source.read(_CHUNK)
        if len(seen) < 512:
            raise ImageError("the archive is empty or cut off", resolution="give a tar of a root file system")
    return StoredLayer(f"sha256:{plain.hexdigest()}", out.blob.digest, media_type, out.blob.size_bytes)


def _read_head(source: Readable) -> bytes:
    head = b""
    while len(head) < 16 and (chunk := source.read(_CHUNK)):
        head += chunk
    return head


def _media_type(head: bytes) -> str:
    if head.startswith(_GZIP_MAGIC):
        return oci.OCI_LAYER_GZIP
    if head.startswith(_ZSTD_MAGIC):
        return oci.OCI_LAYER_ZSTD
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            tool = "xz" if name == "xz" else "bzip2"
            raise ImageError(
                f"{name} archives are not taken",
                resolution=f"decompress it on the way: `{tool} -dc FILE | labkernel import -`",
            )
    return oci.OCI_LAYER


def _check_tar(header: bytes) -> None:
    """A tar header's checksum counts its own field as blanks (POSIX.1, pax interchange format, ustar header)."""
    if not any(header):
        return
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        stored = -1
    if stored != sum(header[:148]) + 8 * 32 + sum(header[156:512]):
        raise ImageError(
            "this is not a tar archive", resolution="give a tar of a root file system, plain, gzip or zstd"
        )


def _decompressor(media_type: str) -> Callable[[bytes], bytes]:
    kind = oci.compression_of(media_type)
    if kind == "none":
        return lambda data: data
    if kind == "gzip":
        return _gunzip()
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return _members(zstd.ZstdDecompressor)


def _gunzip() -> Callable[[bytes], bytes]:
    try:
        from isal import isal_zlib as implementation
    except ImportError:
        implementation = zlib
    return _members(lambda: implementation.decompressobj(wbits=31))


def _members(new: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """A decompressor that goes on after the end of a member: gzip files and zstd frames may follow each other."""
    current = new()

    def decompress(data: bytes) -> bytes:
        nonlocal current
        out = []
        while data:
            if current.eof:
                # Padding after the last member is common in archives written to tape-like devices.
                if not data.strip(b"\0"):
                    break
                current = new()
            out.append(current.decompress(data))
            data = current.unused_data if current.eof else b""
        return b"".join(out)

    return decompress
