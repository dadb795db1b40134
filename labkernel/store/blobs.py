"""Content by digest: `blobs/<algorithm>/<hex>`, the blob directory of an OCI image layout.

A blob is written to a temporary name in `tmp/`, hashed on the way, fsynced, checked, and renamed to its digest; from
then on it never changes. A crash at any point leaves at most a file in `tmp/`, which its writer had locked with
flock(2): the next opener removes what nobody locks any more (`sweep_temporary`).

Source: OCI image-spec image-layout.md, "Blobs"; descriptor.md, "Digests". Nothing here knows what a blob means.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from labkernel.errors import DISK_FULL_HINT, CorruptBlob, DiskFull, NotFoundError, StoreError, file_of

from ..linux.trees import remove_tree
from .layout import Layout
from .locks import names_file, try_flock

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_CHUNK = 1 << 20


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


class Blob(NamedTuple):
    """A stored blob: digest (`sha256:` + hex) and size in bytes."""

    digest: str
    size_bytes: int


class NoSuchBlob(NotFoundError):
    """No blob of this digest is in the store."""

    kind = "blob"


class BlobWriter:
    """A blob being written. Bytes go to `tmp/`; `Blobs.writer` renames them when its block ends well."""

    def __init__(self, file: BinaryIO, path: Path, algorithm: str) -> None:
        self.path = path
        self.size_bytes = 0
        self.blob: Blob | None = None
        """Set once the block of `Blobs.writer` has ended well."""
        self._file = file
        self._hash = hashlib.new(algorithm)

    @property
    def digest(self) -> str:
        """Digest of what has been written so far."""
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data`. Raises DiskFull when the disk is."""
        try:
            rest = memoryview(data)
            while rest:
                # A disk that is nearly full takes a part first; the next write then says ENOSPC.
                rest = rest[self._file.write(rest) :]
        except OSError as err:
            raise storage_error("writing a blob", err) from err
        self._hash.update(data)
        self.size_bytes += len(data)
        return len(data)


class Blobs:
    """The blobs of one store. Safe to use from several threads and processes at once."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def put(self, data: bytes | Readable, expected: str | None = None, *, size_bytes: int | None = None) -> Blob:
        """Store `data` (bytes, or a stream read to its end) and return its digest and size. Idempotent.

        With `expected` (a digest) or `size_bytes` other bytes raise CorruptBlob and leave nothing; when that blob is
        here already nothing is read. Raises DiskFull when the disk is full, also leaving nothing.
        """
        if expected is not None and self.has(expected):
            return Blob(expected, self.size(expected))
        with self.writer(expected, size_bytes=size_bytes) as out:
            if isinstance(data, bytes):
                out.write(data)
            else:
                while chunk := data.read(_CHUNK):
                    out.write(chunk)
        assert out.blob is not None
        return out.blob

    @contextmanager
    def writer(self, expected: str | None = None, *, size_bytes: int | None = None) -> Iterator[BlobWriter]:
        """Write a blob piece by piece; when the block ends without an exception it is stored and `.blob` is set."""
        algorithm = check_digest(expected).partition(":")[0] if expected else "sha256"
        fd, path = make_temporary_file(self.layout, "blob")
        out = BlobWriter(os.fdopen(fd, "wb", buffering=0), path, algorithm)
        try:
            yield out
            self._commit(out, expected, size_bytes)
        finally:
            # The name is gone after a commit; the lock goes with the descriptor.
            if out.blob is None:
                _unlink(path)
            out._file.close()

    def adopt(self, path: Path, digest: str, *, verify: bool = True) -> Blob:
        """Make the file at `path` (on the store's file system) the blob `digest`; the name `path` goes away.

        `verify=False` is for a file which this process, or a task it called, has just written and hashed.
        Raises CorruptBlob when the bytes are others; the file is then removed.
        """
        target = self._path(digest)
        try:
            size_bytes = path.stat().st_size
            if verify and _digest_file(path, digest) != digest:
                _unlink(path)
                raise CorruptBlob(f"{path.name} does not hold the bytes of {digest}")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.chmod(path, 0o444)
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)
            fsync_directory(target.parent)
        except OSError as err:
            raise storage_error(f"storing {digest}", err) from err
        return Blob(digest, size_bytes)

    def has(self, digest: str) -> bool:
        """Whether the blob is here. Its bytes are not looked at."""
        return self._path(digest).exists()

    def size(self, digest: str) -> int:
        """Size in bytes. Raises NoSuchBlob."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: str) -> BinaryIO:
        """A binary file on the blob. Not verified: readers of layers check the diff ID of what they unpack."""
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError:
            raise _missing(digest) from None

    def read(self, digest: str, limit: int = 8 << 20) -> bytes:
        """All bytes of a small blob (manifest, config), verified. Raises CorruptBlob, NoSuchBlob, StoreError."""
        with self.open(digest) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise StoreError(f"blob {digest} is larger than the {limit} bytes allowed here")
        if f"{digest.partition(':')[0]}:{hashlib.new(digest.partition(':')[0], data).hexdigest()}" != digest:
            raise _corrupt(digest)
        return data

    def verify(self, digest: str) -> None:
        """Read the whole blob; raises CorruptBlob when its bytes are not those of its digest."""
        path = self._path(digest)
        if not path.exists():
            raise _missing(digest)
        if _digest_file(path, digest) != digest:
            raise _corrupt(digest)

    def path(self, digest: str) -> Path:
        """File of the blob, whether it exists or not."""
        return self._path(digest)

    def remove(self, digest: str) -> int:
        """Remove the blob and return the bytes freed (0 when it was not here). The caller knows nobody names it."""
        path = self._path(digest)
        try:
            size_bytes = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size_bytes

    def __iter__(self) -> Iterator[str]:
        """Digests of all stored blobs, in no order."""
        for directory in self.layout.blobs.iterdir():
            for entry in os.scandir(directory):
                digest = f"{directory.name}:{entry.name}"
                if _DIGEST.fullmatch(digest):
                    yield digest

    def _path(self, digest: str) -> Path:
        return self.layout.blob_path(check_digest(digest))

    def _commit(self, out: BlobWriter, expected: str | None, size_bytes: int | None) -> None:
        digest = out.digest
        if size_bytes is not None and out.size_bytes != size_bytes:
            raise CorruptBlob(f"{expected or digest} should have {size_bytes} bytes and has {out.size_bytes}")
        if expected is not None and digest != expected:
            raise CorruptBlob(f"the bytes received are not those of {expected}: their digest is {digest}")
        target = self._path(digest)
        try:
            if not target.exists():
                os.fsync(out._file.fileno())
                os.fchmod(out._file.fileno(), 0o444)
                target.parent.mkdir(exist_ok=True)
                os.rename(out.path, target)
                fsync_directory(target.parent)
            else:
                _unlink(out.path)
        except OSError as err:
            raise storage_error(f"storing {digest}", err) from err
        out.blob = Blob(digest, out.size_bytes)


def check_digest(digest: str) -> str:
    """`digest` itself when it is a well-formed sha256 or sha512 digest: it becomes a file name. Else StoreError."""
    if not _DIGEST.fullmatch(digest):
        raise StoreError(f"not a digest this store can hold: {digest!r}")
    return digest


def make_temporary_file(layout: Layout, prefix: str) -> tuple[int, Path]:
    """A new flock'ed file in `tmp/`, open for reading and writing: (descriptor, path). The caller closes it."""
    while True:
        path = layout.tmp / f"{prefix}-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise storage_error("making a temporary file", err) from err
        # Between open and flock a sweeper may have taken the file for rubbish.
        if try_flock(fd) and names_file(path, fd):
            return fd, path
        os.close(fd)


@contextmanager
def temporary_directory(layout: Layout, prefix: str) -> Iterator[Path]:
    """A new directory in `tmp/`, locked while the block runs. What is still under its name afterwards is removed.

    Rename it away to keep it. Files of subordinate users cannot be removed by a plain process: those are left to
    `sweep_temporary` with a `remove` that may.
    """
    while True:
        path = layout.tmp / f"{prefix}-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            path.mkdir(mode=0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as err:
            raise storage_error("making a temporary directory", err) from err
        if try_flock(fd) and names_file(path, fd):
            break
        os.close(fd)
    try:
        yield path
    finally:
        with suppress(OSError):
            remove_tree(str(path))
        os.close(fd)


def sweep_temporary(layout: Layout) -> list[Path]:
    """Remove what dead writers left in `tmp/`; return what could not be removed (files of subordinate users)."""
    stubborn = []
    for entry in list(os.scandir(layout.tmp)):
        path = Path(entry.path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:
            _unlink(path)
            continue
        try:
            if not try_flock(fd):
                continue
            if entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    remove_tree(str(path))
                if path.exists():
                    stubborn.append(path)
            else:
                _unlink(path)
        finally:
            os.close(fd)
    return stubborn


def storage_error(act: str, err: OSError) -> StoreError:
    """`act` failed with `err`: DiskFull when that is what it was."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{act}: no space left on device", resolution=DISK_FULL_HINT)
    where = f" {file_of(err)}" if file_of(err) else ""
    return StoreError(f"{act}{where}: {err.strerror or err}")


def fsync_directory(path: Path) -> None:
    """Make the names in `path` durable (man 2 fsync: the file's own fsync does not cover its directory entry)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest_file(path: Path, digest: str) -> str:
    algorithm = digest.partition(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _missing(digest: str) -> NoSuchBlob:
    return NoSuchBlob(digest, resolution="pull, load or build the image again")


def _corrupt(digest: str) -> CorruptBlob:
    return CorruptBlob(
        f"blob {digest} is corrupt: its bytes are not those of its digest",
        resolution="`labkernel system check` lists what is damaged; remove the image and pull, load or build it again",
    )
