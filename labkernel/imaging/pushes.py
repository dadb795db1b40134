"""Pushes: a stored image to a registry, blobs first, manifest last; what is there already is not sent.

The manifest goes out as it is stored, so its digest stays. Blobs are the stored ones: nothing is compressed again. What
this store once pulled from another repository of the same registry is mounted from there instead of sent.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..errors import ImageError
from ..oci import manifest as oci
from ..oci import reference, transfer
from ..oci.registry import Refused, Registry
from ..store.catalog import HOST_LAYER
from .pulls import POLL_S, LayerState, Pulls, Watch
from .variants import index_of, set_of

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

UPLOADS = 3
BEGUN = 8
"""Blobs that are asked for and begun at once; UPLOADS of them are being sent."""

Notify = Callable[[str], None]


class Pushed(NamedTuple):
    """What a push did: the name, the manifest's digest and size in bytes."""

    name: str
    digest: str
    size_bytes: int


class Pushes:
    """Pushes from one store."""

    def __init__(self, images: Images, pulls: Pulls) -> None:
        self.images = images
        self.pulls = pulls

    def push(
        self,
        ref: str,
        *,
        chunk_bytes: int | None = None,
        notify: Notify = lambda line: None,
        watch: Watch = lambda layers: None,
    ) -> Pushed:
        """Bring the image tagged `ref` to the registry of that name; with those built for other platforms together with
        it, as an index.

        `chunk_bytes` sends blobs in chunks of that size (for proxies that limit a request) instead of in one piece.
        `watch` is called some ten times a second with the state of all layers. Raises NoSuchImage, RegistryError.
        """
        wanted = reference.parse_tag(ref)
        image = self.images.get(str(wanted))
        if image.uses_host:
            raise ImageError("an image on lab/host cannot leave this machine: its lowest layer is the machine")
        together = set_of(self.images, wanted)
        raw, media_type = b"", ""
        with self.pulls.open(wanted.domain, notify=notify, mirrors=False) as registry, self.images.adding():
            for each in together.values() or [image]:
                raw = self.images.blobs.read(self.images.catalog_row(each).manifest)
                manifest = oci.parse_manifest(raw)
                media_type = manifest.media_type or oci.OCI_MANIFEST
                _Job(self.images, registry, wanted, each, chunk_bytes).send(manifest, watch)
                if together:
                    registry.put_manifest(wanted.path, manifest.digest, raw, media_type)
            if together:
                raw, media_type = index_of(self.images, together).raw, oci.OCI_INDEX
            registry.put_manifest(wanted.path, wanted.tag or "latest", raw, media_type)
        digest = oci.digest_of(raw)
        self.images.catalog.name_digest(f"{wanted.name}@{digest}", image.id)
        self.images.tell(image, "push", wanted.familiar)
        return Pushed(wanted.familiar, digest, len(raw))


class _Job:
    def __init__(
        self,
        images: Images,
        registry: Registry,
        wanted: reference.Reference,
        image: Image,
        chunk_bytes: int | None,
    ) -> None:
        self._images = images
        self._registry = registry
        self._wanted = wanted
        self._chunk_bytes = chunk_bytes
        self._turns = _Turns(UPLOADS)
        prefix = f"{wanted.domain}/"
        names = (name.partition("@")[0] for name in images.catalog.repo_digests(image.id))
        elsewhere = {name.removeprefix(prefix) for name in names if name.startswith(prefix)} - {wanted.path}
        self._mount_from = min(elsewhere, default=None)

    def send(self, manifest: oci.Manifest, watch: Watch) -> None:
        """All blobs of the manifest, several at once."""
        blobs = {descriptor.digest: descriptor for descriptor in (*manifest.layers, manifest.config)}
        states = {
            digest: LayerState(digest.partition(":")[2][:12], each.size, "Preparing") for digest, each in blobs.items()
        }
        for descriptor in manifest.layers:
            if descriptor.media_type == HOST_LAYER or not self._images.blobs.has(descriptor.digest):
                raise ImageError(f"layer {descriptor.digest} is not in the store, so it cannot be pushed")
        shown = [state for digest, state in states.items() if digest != manifest.config.digest]
        queue = sorted(blobs.values(), key=lambda each: -each.size)
        self._turns.order([each.digest for each in queue])
        executor = ThreadPoolExecutor(BEGUN, thread_name_prefix="labkernel-push")
        try:
            watch(shown)
            pending: set[Future[None]] = {executor.submit(self._blob, each, states[each.digest]) for each in queue}
            while pending:
                done, pending = wait(pending, timeout=POLL_S, return_when="FIRST_EXCEPTION")
                watch(shown)
                for future in done:
                    future.result()
        except BaseException:
            self._registry.pool.cancel()
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _blob(self, descriptor: oci.Descriptor, state: LayerState) -> None:
        try:
            self._bring(descriptor, state)
        finally:
            self._turns.settle(descriptor.digest)

    def _bring(self, descriptor: oci.Descriptor, state: LayerState) -> None:
        path, digest = self._wanted.path, descriptor.digest
        if self._registry.has_blob(path, digest):
            state.status = "Layer already exists"
            return
        state.status = "Pushing"

        def count(more: int) -> None:
            state.current = min(state.current + more, state.total)

        mount_from = self._mount_from
        try:
            done = self._upload(descriptor, mount_from, count)
        except Refused as err:
            # Who may not read there may still write here.
            if mount_from is None or err.status not in (401, 403):
                raise
            done = self._upload(descriptor, None, count)
        state.status = f"Mounted from {mount_from}" if done == "mounted" else "Pushed"

    def _upload(self, descriptor: oci.Descriptor, mount_from: str | None, count: Callable[[int], None]) -> str:
        def open_blob() -> BinaryIO:
            return self._images.blobs.open(descriptor.digest)

        return transfer.upload(
            self._registry,
            self._wanted.path,
            descriptor.digest,
            descriptor.size,
            open_blob,
            mount_from=mount_from,
            chunk_bytes=self._chunk_bytes,
            turn=lambda: self._turns.of(descriptor.digest),
            progress=count,
        )


class _Turns:
    """Who may send: so many at once, in the order given, however quickly each upload begins.

    The largest first: what ends last is then small, and so is what its registry has still to write to its disk.
    """

    def __init__(self, at_once: int) -> None:
        self._free = threading.Semaphore(at_once)
        self._settled: dict[str, threading.Event] = {}
        self._before: dict[str, threading.Event] = {}

    def order(self, names: list[str]) -> None:
        """The names in the order of their turns."""
        self._settled = {name: threading.Event() for name in names}
        self._before = {later: self._settled[earlier] for earlier, later in itertools.pairwise(names)}

    def settle(self, name: str) -> None:
        """It has had its turn, or needs none: the next may have theirs."""
        self._settled[name].set()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """A turn, waited for."""
        if name in self._before:
            self._before[name].wait()
        with self._free:
            self.settle(name)
            yield
