"""What a private registry keeps, as one directory: blobs by digest, and for each repository what it may show of them.

    blobs/<algorithm>/<hex>                              content, never changed
    repositories/<name>/_blobs/<algorithm>-<hex>         empty: the repository has this blob
    repositories/<name>/_manifests/<algorithm>-<hex>     JSON: media type and size of the manifest
    repositories/<name>/_tags/<tag>                      digest
    repositories/<name>/_referrers/<subject>/<digest>    JSON: descriptor of a manifest that refers to the subject
    uploads/<id>                                         bytes of an unfinished upload; its repository is in <id>.json

Names are checked against the specification's grammar before they become paths; none can begin with `_`. Everything
appears by rename. Deleting takes names away; `collect` removes content that no name needs, and nothing that is younger
than its grace, so never what is just being pushed: who is told that a blob is here makes it young, under a lock that
the collection takes alone. Blobs may lie elsewhere, with others that need them (`StoreDepot`). Knows no HTTP.

Source: OCI distribution-spec 1.1; image-spec for what a manifest names.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from labkernel.errors import ManifestError, StoreError

from . import manifest as oci

GRACE_S = 3600.0
"""Content younger than this, or confirmed to a client within it, is not collected."""
UPLOAD_LIFE_S = 24 * 3600.0

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_UPLOAD = re.compile(r"[0-9a-f]{32}")


class Problem(Exception):
    """A request that cannot be met: HTTP status, the specification's error code, a message."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


class Stored(NamedTuple):
    """A manifest of a repository."""

    raw: bytes
    digest: str
    media_type: str


class Upload:
    """Bytes on their way into a blob. One request at a time writes to it."""

    def __init__(self, depot: Depot, id: str, name: str) -> None:
        self.id = id
        self.name = name
        self.size = 0
        self.busy = False
        self._depot = depot
        self._path = depot.root / "uploads" / id
        self._file: BinaryIO = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append. Raises Problem beyond the quota or on a full disk."""
        self._depot.reserve(len(data))
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as err:
            raise Problem(507, "UNKNOWN", f"cannot store: {err.strerror}") from err
        self._sha256.update(data)
        self.size += len(data)

    def restore(self) -> None:
        """After a restart of the server: hash again what is there."""
        with open(self._path, "rb") as file:
            while chunk := file.read(1 << 20):
                self._sha256.update(chunk)
                self.size += len(chunk)

    def finish(self, digest: str) -> None:
        """Make it a blob. Raises Problem for another digest; the upload is gone either way."""
        algorithm = digest.partition(":")[0]
        if algorithm == "sha256":
            found = f"sha256:{self._sha256.hexdigest()}"
        else:
            with open(self._path, "rb") as file:
                found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
        if found != digest:
            self.cancel()
            raise Problem(400, "DIGEST_INVALID", f"provided digest did not match uploaded content: it is {found}")
        os.fdatasync(self._file.fileno())
        self._file.close()
        target = self._depot.blob_path(digest)
        with self._depot.keeping():
            if target.exists():
                _touch(target)
                self._path.unlink()
                self._depot.reserve(-self.size)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.chmod(self._path, 0o444)
                os.rename(self._path, target)
            self._depot.link_blob(self.name, digest)
        self._depot.forget(self)

    def cancel(self) -> None:
        """Throw the bytes away."""
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._depot.reserve(-self.size)
        self._depot.forget(self)


class Depot:
    """One registry's directory. Used by one server process; `collect` may run beside it."""

    def __init__(self, root: Path, *, quota_bytes: int | None = None, blobs: Path | None = None) -> None:
        """`blobs` is the directory of the content, where it is not the depot's own."""
        self.root = root
        self.quota_bytes = quota_bytes
        self._blobs = blobs or root / "blobs"
        self._uploads: dict[str, Upload] = {}
        try:
            for directory in (self._blobs / "sha256", root / "repositories", root / "uploads"):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(f"cannot use {root} for a registry: {err.strerror}") from err
        self._used = self._measure() if quota_bytes is not None else 0

    @contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        """Between those who find content (shared) and the collection (alone), also of another process."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, mode)
            yield
        finally:
            os.close(fd)

    def keeping(self) -> AbstractContextManager[None]:
        """Held while content gets its name: no collection runs meanwhile."""
        return self._locked(fcntl.LOCK_SH)

    def _measure(self) -> int:
        """Bytes that count against the quota."""
        return _size_of(self._blobs) + _size_of(self.root / "uploads")

    # -- blobs -----------------------------------------------------------------------------------------------------

    def blob_path(self, digest: str) -> Path:
        """File of a blob, whether it is there or not. Raises Problem for what is no digest."""
        if not oci.is_digest(digest):
            raise Problem(400, "DIGEST_INVALID", f"not a digest: {digest[:100]}")
        algorithm, _, encoded = digest.partition(":")
        return self._blobs / algorithm / encoded

    def find_blob(self, name: str, digest: str) -> Path:
        """File of a blob of a repository. Raises Problem (404)."""
        path = self.blob_path(digest)
        link = self._link(name, "_blobs", digest)
        with self._locked(fcntl.LOCK_SH):
            if not link.exists() or not path.exists():
                raise Problem(404, "BLOB_UNKNOWN", "blob unknown to registry")
            # Who was told that it is here may rely on it for a while.
            _touch(link)
            _touch(path)
        return path

    def link_blob(self, name: str, digest: str) -> None:
        """Let a repository have a stored blob."""
        _write(self._link(name, "_blobs", digest), b"")

    def mount(self, name: str, digest: str, source: str | None) -> bool:
        """Link a blob of another repository (without `source`, of any that has it); False when it is not there."""
        if not oci.is_digest(digest) or (source is not None and not _NAME.fullmatch(source)):
            return False
        if source is None and not self.blob_path(digest).exists():
            return False
        with self.keeping():
            for each in (source,) if source is not None else self.repositories():
                try:
                    self.find_blob(each, digest)
                except Problem:
                    continue
                self.link_blob(name, digest)
                return True
        return False

    def delete_blob(self, name: str, digest: str) -> None:
        """Take a blob away from a repository. Raises Problem (404)."""
        self.blob_path(digest)
        try:
            self._link(name, "_blobs", digest).unlink()
        except FileNotFoundError:
            raise Problem(404, "BLOB_UNKNOWN", "blob unknown to registry") from None

    # -- uploads ---------------------------------------------------------------------------------------------------

    def start_upload(self, name: str) -> Upload:
        """A new upload. Raises Problem when the quota is used up."""
        self.reserve(0)
        id = secrets.token_hex(16)
        self._repository(name)
        (self.root / "uploads" / f"{id}.json").write_text(json.dumps({"name": name}))
        upload = self._uploads[id] = Upload(self, id, name)
        return upload

    def find_upload(self, name: str, id: str) -> Upload:
        """An unfinished upload, also of an earlier run of the server. Raises Problem (404)."""
        upload = self._uploads.get(id)
        if upload is None and _UPLOAD.fullmatch(id):
            try:
                kept = json.loads((self.root / "uploads" / f"{id}.json").read_text())
                upload = Upload(self, id, str(kept["name"]))
                upload.restore()
                self._uploads[id] = upload
            except (OSError, ValueError, KeyError):
                upload = None
        if upload is None or upload.name != name:
            raise Problem(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry")
        return upload

    def forget(self, upload: Upload) -> None:
        """An upload has ended."""
        self._uploads.pop(upload.id, None)
        (self.root / "uploads" / f"{upload.id}.json").unlink(missing_ok=True)

    def reserve(self, size_bytes: int) -> None:
        """Count bytes against the quota. Raises Problem when it is used up."""
        if self.quota_bytes is None:
            return
        if size_bytes >= 0 and self._used + size_bytes > self.quota_bytes:
            raise Problem(403, "DENIED", f"this registry's quota of {self.quota_bytes} bytes is used up")
        self._used += size_bytes

    # -- manifests -------------------------------------------------------------------------------------------------

    def find_manifest(self, name: str, reference: str) -> Stored:
        """The manifest of a tag or digest. Raises Problem (404)."""
        digest = self._resolve(name, reference)
        try:
            kept = json.loads(self._link(name, "_manifests", digest).read_bytes())
            raw = self.blob_path(digest).read_bytes()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise _unknown(reference) from None
        return Stored(raw, digest, str(kept["mediaType"]))

    def put_manifest(
        self, name: str, reference: str, raw: bytes, media_type: str, *, partial: bool = False
    ) -> tuple[str, str | None]:
        """Store a manifest under a tag or its digest; (its digest, digest of its subject). Raises Problem.

        What it names has to be there, unless `partial` (a pull-through cache fetches it later).
        """
        try:
            parsed = oci.parse(raw, media_type)
        except ManifestError as err:
            raise Problem(400, "MANIFEST_INVALID", err.brief) from err
        digest = oci.digest_of(raw)
        if oci.is_digest(reference):
            algorithm = reference.partition(":")[0]
            digest = f"{algorithm}:{hashlib.new(algorithm, raw).hexdigest()}"
            if digest != reference:
                raise Problem(400, "DIGEST_INVALID", f"the manifest's digest is {digest}")
        elif not _TAG.fullmatch(reference):
            raise Problem(400, "MANIFEST_INVALID", f"not a tag: {reference[:150]}")
        with self.keeping():
            if not partial:
                self._check_parts(name, parsed)
            path = self.blob_path(digest)
            if not path.exists():
                self.reserve(len(raw))
                _write(path, raw)
            _touch(path)
            facts = {"mediaType": media_type, "size": len(raw)}
            _write(self._link(name, "_manifests", digest), json.dumps(facts).encode())
            if parsed.subject is not None:
                self._refer(name, parsed, parsed.subject.digest, digest, media_type, len(raw))
            if reference != digest:
                _write(self._repository(name) / "_tags" / reference, digest.encode())
        return digest, parsed.subject.digest if parsed.subject else None

    def put_tag(self, name: str, tag: str, digest: str) -> None:
        """Let a tag name a manifest that the repository has. Raises Problem (404)."""
        self.find_manifest(name, digest)
        if not _TAG.fullmatch(tag):
            raise _unknown(tag)
        _write(self._repository(name) / "_tags" / tag, digest.encode())

    def size_in_manifests(self, name: str, digest: str) -> int | None:
        """The size that a manifest of the repository gives a blob; None when none names it."""
        self.blob_path(digest)
        directory = self._repository(name) / "_manifests"
        for link in directory.glob("*-*") if directory.is_dir() else ():
            stored = self.find_manifest(name, link.name.replace("-", ":", 1))
            parsed = oci.parse(stored.raw, stored.media_type)
            for part in (parsed.config, *parsed.layers) if isinstance(parsed, oci.Manifest) else ():
                if part.digest == digest:
                    return part.size
        return None

    def delete_manifest(self, name: str, reference: str) -> None:
        """By tag: the tag alone. By digest: the manifest and every tag on it. Raises Problem (404)."""
        repository = self._repository(name)
        if not oci.is_digest(reference):
            if not _TAG.fullmatch(reference) or not (repository / "_tags" / reference).exists():
                raise _unknown(reference)
            (repository / "_tags" / reference).unlink()
            return
        stored = self.find_manifest(name, reference)
        subject = oci.parse(stored.raw, stored.media_type).subject
        for tag in self.tags(name):
            if (repository / "_tags" / tag).read_text() == stored.digest:
                (repository / "_tags" / tag).unlink()
        if subject is not None and oci.is_digest(subject.digest):
            (repository / "_referrers" / _flat(subject.digest) / _flat(stored.digest)).unlink(missing_ok=True)
        self._link(name, "_manifests", stored.digest).unlink(missing_ok=True)

    def referrers(self, name: str, digest: str) -> list[dict[str, Any]]:
        """Descriptors of the manifests whose subject is `digest`, in no meaningful order but a steady one."""
        self.blob_path(digest)
        directory = self._repository(name) / "_referrers" / _flat(digest)
        if not directory.is_dir():
            return []
        return [json.loads(path.read_bytes()) for path in sorted(directory.iterdir()) if path.name[:1] != "."]

    # -- lists -----------------------------------------------------------------------------------------------------

    def tags(self, name: str) -> list[str]:
        """Tags of a repository in ASCII order. Raises Problem (404) for a repository that is not there."""
        repository = self._repository(name)
        if not repository.is_dir():
            raise Problem(404, "NAME_UNKNOWN", "repository name not known to registry")
        directory = repository / "_tags"
        return sorted(entry for entry in os.listdir(directory) if entry[0] != ".") if directory.is_dir() else []

    def repositories(self) -> list[str]:
        """Names of all repositories, sorted."""
        base = self.root / "repositories"
        found = []
        for directory, names, _ in os.walk(base):
            if any(name in ("_manifests", "_blobs") for name in names):
                found.append(str(Path(directory).relative_to(base)))
            names[:] = [name for name in names if name[0] != "_"]
        return sorted(found)

    # -- collection ------------------------------------------------------------------------------------------------

    def collect(self, *, grace_s: float = GRACE_S) -> tuple[int, int]:
        """Remove blobs that no manifest names and uploads nobody goes on with: (blobs, bytes).

        Safe beside a running server: what is younger than `grace_s`, or was shown to a client within it, stays.
        """
        # The clock first: what is confirmed while we look is younger than that.
        limit = time.time() - grace_s
        needed = set(self._needed())
        for name in self.repositories():
            for link in (self._repository(name) / "_blobs").glob("*-*"):
                if link.name.replace("-", ":", 1) not in needed:
                    self._remove_if_old(link, limit)
        count, freed = self._collect_blobs(needed, limit)
        for path in (self.root / "uploads").iterdir():
            if path.name.partition(".")[0] not in self._uploads and _age_mark(path) < time.time() - UPLOAD_LIFE_S:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        self.reserve(-freed)
        return count, freed

    def _collect_blobs(self, needed: set[str], limit: float) -> tuple[int, int]:
        """Remove blobs that nobody names and nobody was shown since `limit`: (blobs, bytes)."""
        count = freed = 0
        for path in self._blobs.glob("*/*"):
            if f"{path.parent.name}:{path.name}" not in needed:
                size = self._remove_if_old(path, limit)
                count, freed = count + (size is not None), freed + (size or 0)
        return count, freed

    def _remove_if_old(self, path: Path, limit: float) -> int | None:
        """Remove it unless somebody was told of it since `limit`; its bytes, None when it stays."""
        if _age_mark(path) >= limit:
            return None
        with self._locked(fcntl.LOCK_EX):
            try:
                status = path.stat()
                if status.st_mtime >= limit:
                    return None
                path.unlink()
            except FileNotFoundError:
                return None
        return status.st_size

    def _needed(self) -> Iterator[str]:
        for name in self.repositories():
            directory = self._repository(name) / "_manifests"
            for link in directory.glob("*-*") if directory.is_dir() else ():
                digest = link.name.replace("-", ":", 1)
                yield digest
                try:
                    parsed = oci.parse(self.blob_path(digest).read_bytes(), json.loads(link.read_bytes())["mediaType"])
                except (OSError, ValueError, ManifestError):
                    continue
                if isinstance(parsed, oci.Manifest):
                    yield from (parsed.config.digest, *(layer.digest for layer in parsed.layers))
                else:
                    yield from (each.digest for each in parsed.manifests)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _repository(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or len(name) > 255:
            raise Problem(400, "NAME_INVALID", f"invalid repository name: {name[:100]}")
        return self.root / "repositories" / name

    def _link(self, name: str, kind: str, digest: str) -> Path:
        return self._repository(name) / kind / _flat(digest)

    def _resolve(self, name: str, reference: str) -> str:
        repository = self._repository(name)
        if oci.is_digest(reference):
            return reference
        if not _TAG.fullmatch(reference):
            raise _unknown(reference)
        try:
            return (repository / "_tags" / reference).read_text()
        except (FileNotFoundError, NotADirectoryError):
            raise _unknown(reference) from None

    def _check_parts(self, name: str, parsed: oci.Manifest | oci.Index) -> None:
        if isinstance(parsed, oci.Index):
            missing = [d.digest for d in parsed.manifests if not self._link(name, "_manifests", d.digest).exists()]
        else:
            parts = [parsed.config, *(layer for layer in parsed.layers if not oci.is_foreign(layer.media_type))]
            missing = []
            for part in parts:
                try:
                    self.find_blob(name, part.digest)
                except Problem:
                    missing.append(part.digest)
        if missing:
            raise Problem(400, "MANIFEST_BLOB_UNKNOWN", f"blob unknown to registry: {', '.join(missing[:5])}")

    def _refer(
        self, name: str, parsed: oci.Manifest | oci.Index, subject: str, digest: str, media_type: str, size: int
    ) -> None:
        if not oci.is_digest(subject):
            raise Problem(400, "MANIFEST_INVALID", "the subject has no digest")
        kind = parsed.artifact_type
        if kind is None and isinstance(parsed, oci.Manifest):
            kind = parsed.config.media_type
        descriptor = {"mediaType": media_type, "digest": digest, "size": size}
        if kind:
            descriptor["artifactType"] = kind
        if parsed.annotations:
            descriptor["annotations"] = parsed.annotations
        path = self._repository(name) / "_referrers" / _flat(subject) / _flat(digest)
        _write(path, json.dumps(descriptor).encode())


def page(found: list[str], count: int | None, last: str | None) -> tuple[list[str], bool]:
    """The entries after `last`, at most `count`; and whether there are more (distribution-spec, "Listing Tags")."""
    rest = found[bisect.bisect_right(found, last) :] if last is not None else found
    return (rest, False) if count is None else (rest[:count], len(rest) > count)


def _flat(digest: str) -> str:
    return digest.replace(":", "-", 1)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}"
    temporary.write_bytes(data)
    os.rename(temporary, path)


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        pass  # read-only: then nothing is collected either


def _age_mark(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _size_of(root: Path) -> int:
    total = 0
    for directory, _, names in os.walk(root):
        total += sum(os.path.getsize(os.path.join(directory, name)) for name in names)
    return total


def _unknown(reference: str) -> Problem:
    return Problem(404, "MANIFEST_UNKNOWN", f"manifest unknown: {reference[:150]}")
