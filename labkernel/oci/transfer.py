"""Blobs on the way: a download that resumes where it broke off, an upload in one piece or in chunks.

Bytes pass through one buffer a thread; whoever gives `write` hashes and checks the digest. Sizes are held to here, so
endless answers end. Source: OCI distribution-spec 1.1, "Pulling blobs", "Pushing a blob", "Mounting a blob".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO
from urllib.parse import urlencode, urljoin

from labkernel.errors import RegistryError

from .connections import Broken, FileBody, Response, check_place
from .registry import Refused, Registry

BUFFER = 1 << 18
PROGRESS = 1 << 16
"""Bytes that a connection must have brought on for its end not to count as a failure: one a connection is none."""

Progress = Callable[[int], None]


def download(
    registry: Registry,
    repository: str,
    digest: str,
    size_bytes: int,
    write: Callable[[memoryview], object],
    *,
    progress: Progress = lambda count: None,
) -> None:
    """Give the blob's bytes to `write`, in order, each once. `progress` gets the bytes that are new.

    A lost connection is taken up again where it broke off (Range), as often as the registry's persistence allows
    without progress. Raises RegistryError for a blob of another size, Refused, Cancelled.
    """
    view = memoryview(bytearray(BUFFER))
    got, attempt = 0, 0
    response: Response | None = None
    while got < size_bytes or not size_bytes:
        before = got
        try:
            with _open(registry, repository, digest, size_bytes, got) as response:
                skip = got if response.status == 200 else 0
                while count := response.readinto(view):
                    if skip:
                        skipped = min(skip, count)
                        skip -= skipped
                        piece = view[skipped:count]
                    else:
                        piece = view[:count]
                    got += len(piece)
                    if got > size_bytes:
                        raise _wrong_size(registry, digest, size_bytes, "more")
                    write(piece)
                    progress(len(piece))
            if got < size_bytes:
                raise Broken("the answer ends early")
            if not size_bytes:
                return
        except Broken as err:
            if got - before >= PROGRESS:
                attempt = 0
            attempt = registry.broke_off(response, attempt) if response else attempt + 1
            if attempt > registry.persistence.retries:
                raise RegistryError(
                    f"{registry.domain} breaks off {digest} after {got} of {size_bytes} bytes: {err.args[0]}",
                    resolution="try again; what was complete is kept",
                ) from err
            registry.pool.pause(registry.persistence.pause_s * 2**attempt)


def _open(registry: Registry, repository: str, digest: str, size_bytes: int, offset: int) -> Response:
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        response = registry.call("GET", repository, f"blobs/{digest}", headers=headers, expected=(200, 206))
    except Refused as err:
        if err.status != 416 or not offset:
            raise
        response = registry.call("GET", repository, f"blobs/{digest}")
    partial = response.status == 206
    if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        response.close()
        raise RegistryError(f"{registry.domain} sends another range of {digest} than it was asked for")
    expected = size_bytes - offset if partial else size_bytes
    if response.length is not None and response.length != expected:
        announced = response.length
        response.close()
        raise _wrong_size(registry, digest, expected, f"{announced}")
    return response


def upload(
    registry: Registry,
    repository: str,
    digest: str,
    size_bytes: int,
    open_blob: Callable[[], BinaryIO],
    *,
    mount_from: str | None = None,
    chunk_bytes: int | None = None,
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
    progress: Progress = lambda count: None,
) -> str:
    """Bring a blob to a repository; returns `mounted` or `pushed`. The caller has asked whether it is there.

    In one piece, or with `chunk_bytes` in chunks; what breaks is asked how far it came and goes on from there. `turn`
    is held while bytes are sent: a registry takes its time to begin an upload, so the next ones begin meanwhile.
    Raises RegistryError, Refused, Cancelled.
    """
    forgotten = False
    while True:
        location = _begin(registry, repository, digest, mount_from)
        if location is None:
            progress(size_bytes)
            return "mounted"
        try:
            with turn():
                _send(registry, repository, location, digest, size_bytes, open_blob, chunk_bytes, progress)
            return "pushed"
        except Refused as err:
            # It knows nothing of what it began: while it waited for its turn, or because the registry began anew.
            if err.status != 404 or forgotten:
                raise
            forgotten = True


def _send(
    registry: Registry,
    repository: str,
    location: str,
    digest: str,
    size_bytes: int,
    open_blob: Callable[[], BinaryIO],
    chunk_bytes: int | None,
    progress: Progress,
) -> None:
    """The bytes of an upload that has begun."""
    sent, attempt = 0, 0
    while True:
        before = sent
        try:
            if chunk_bytes or sent:
                location, sent = _patch(
                    registry, repository, location, sent, size_bytes, open_blob, chunk_bytes, progress
                )
            _finish(registry, repository, location, digest, sent, size_bytes, open_blob, progress)
            return
        except (Broken, Refused) as err:
            # 416: what arrived before the line broke is more than we saw.
            if isinstance(err, Refused) and err.status != 416:
                raise
            location, sent = _how_far(registry, repository, location, size_bytes)
            attempt = 0 if sent - before >= PROGRESS else attempt + 1
            if attempt > registry.persistence.retries:
                raise RegistryError(
                    f"{registry.domain} breaks off the upload of {digest}: {err.args[0]}", resolution="try again"
                ) from err
            registry.pool.pause(registry.persistence.pause_s * 2**attempt)


def _begin(registry: Registry, repository: str, digest: str, mount_from: str | None) -> str | None:
    """Where to send the blob; None when it has been mounted."""
    query = f"?{urlencode({'mount': digest, 'from': mount_from})}" if mount_from else ""
    with registry.call(
        "POST",
        repository,
        f"blobs/uploads/{query}",
        actions="pull,push",
        mount_from=mount_from,
        expected=(201, 202),
    ) as response:
        response.drain()
        return None if response.status == 201 else _location(response, registry)


def _patch(
    registry: Registry,
    repository: str,
    location: str,
    sent: int,
    size_bytes: int,
    open_blob: Callable[[], BinaryIO],
    chunk_bytes: int | None,
    progress: Progress,
) -> tuple[str, int]:
    """Send chunks from `sent` on; (location of what is next, bytes sent)."""
    while sent < size_bytes:
        count = min(chunk_bytes or size_bytes, size_bytes - sent)
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{sent}-{sent + count - 1}"}
        with registry.call(
            "PATCH",
            repository,
            location,
            actions="pull,push",
            headers=headers,
            body=FileBody(open_blob, sent, count, progress),
            size_bytes=count,
            expected=(202, 204),
            again=False,
        ) as response:
            response.drain()
            location = _location(response, registry)
        sent += count
    return location, sent


def _finish(
    registry: Registry,
    repository: str,
    location: str,
    digest: str,
    sent: int,
    size_bytes: int,
    open_blob: Callable[[], BinaryIO],
    progress: Progress,
) -> None:
    rest = size_bytes - sent
    with registry.call(
        "PUT",
        repository,
        f"{location}{'&' if '?' in location else '?'}{urlencode({'digest': digest})}",
        actions="pull,push",
        headers={"Content-Type": "application/octet-stream"},
        body=FileBody(open_blob, sent, rest, progress) if rest else b"",
        size_bytes=rest,
        expected=(200, 201, 202, 204),
        again=False,
    ) as response:
        response.drain()


def _how_far(registry: Registry, repository: str, location: str, size_bytes: int) -> tuple[str, int]:
    """Ask an upload how much it has: (its location, bytes)."""
    with registry.call("GET", repository, location, actions="pull,push", expected=(200, 202, 204)) as response:
        response.drain()
        last = response.headers.get("Range", "").removeprefix("bytes=").partition("-")[2]
        # `0-0` says nothing as well as one byte; the registries in use mean nothing.
        has = int(last) + 1 if last.isdigit() and int(last) else 0
        if has > size_bytes:
            raise RegistryError(f"{registry.domain} says it has {has} of {size_bytes} bytes")
        location = _location(response, registry) if response.headers.get("Location") else location
    return location, has


def _location(response: Response, registry: Registry) -> str:
    location = response.headers.get("Location")
    if not location:
        raise RegistryError(f"{registry.domain} takes an upload and does not say where")
    target = urljoin(response.url, location)
    check_place(target, registry.endpoint)
    return target


def _wrong_size(registry: Registry, digest: str, size_bytes: int, found: str) -> RegistryError:
    return RegistryError(
        f"{registry.domain} sends {digest} with {found} bytes where {size_bytes} were announced: refused",
        resolution="the registry, or something on the way to it, is broken; nothing was stored",
    )
