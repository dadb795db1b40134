"""Pulls: an image from a registry into the store, every byte verified before anything is visible.

Layers are fetched several at once, the largest first; each is hashed, decompressed and unpacked while it arrives (the
worker reads the growing file), and moves to its place when the digest of the blob and its diff ID are right. Names
come last. Two processes that want the same layer fetch it once: the second waits for the first's lock. A pull that
fails or is interrupted takes back what it added, but keeps verified blobs when only the network broke.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DISK_FULL_HINT, DiskFull, ManifestError, RegistryError
from ..images import LIMITS_HINT, too_many_layers
from ..oci import imageconfig, platforms, reference, transfer
from ..oci import manifest as oci
from ..oci.connections import Cancelled
from ..oci.credentials import Credentials
from ..oci.endpoints import Settings
from ..oci.registry import Refused, Registry
from ..oci.tarstream import GrowingFile
from ..store.blobs import temporary_directory
from ..store.catalog import LayerInfo
from . import unpacking
from .removal import drop_unneeded

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

MAX_INDEXES = 4
"""Indexes that may point at each other before an image has to come."""
POLL_S = 0.1
TASK_END_TIMEOUT_S = 10
_LOCK_POLL_S = 0.03
_IMAGE_CONFIGS = frozenset({oci.OCI_CONFIG, oci.DOCKER_CONFIG})

Notify = Callable[[str], None]


@dataclass
class LayerState:
    """How far one layer is, in docker's words. Sizes in bytes of the blob."""

    id: str
    total: int
    status: str = "Pulling fs layer"
    current: int = 0


Watch = Callable[[Sequence[LayerState]], None]


class Pulled(NamedTuple):
    """What a pull brought: the image, the digest its name stands for at the registry, and whether anything is new."""

    image: Image
    digest: str
    new: bool


class Pulls:
    """Pulls into one store."""

    def __init__(
        self, images: Images, *, settings: Settings | None = None, credentials: Credentials | None = None
    ) -> None:
        self.images = images
        self._settings = settings
        self._credentials = credentials

    @property
    def settings(self) -> Settings:
        """The user's settings about registries, read at the first need."""
        if self._settings is None:
            self._settings = Settings.load()
        return self._settings

    def open(self, domain: str, *, notify: Notify, mirrors: bool = True) -> Registry:
        """A client of the registry `domain`."""
        return Registry(domain, settings=self.settings, credentials=self._credentials, mirrors=mirrors, notify=notify)

    def pull(
        self,
        ref: str,
        *,
        platform: str | None = None,
        unpack: bool = True,
        named: bool = True,
        notify: Notify = lambda line: None,
        watch: Watch = lambda layers: None,
    ) -> Pulled:
        """Bring the image `ref` (name, tag or digest) from its registry.

        `platform` chooses from an index (default: this machine's); with `named=False` the tag stays with the image
        that has it. `unpack=False` leaves the layers packed until they
        are needed. `notify` gets a line when the registry makes us wait; `watch` is called some ten times a second
        from this thread with the state of all layers. Raises RegistryError (Refused), ManifestError, LayerError,
        CorruptBlob, DiskFull; an interrupt ends every transfer and leaves nothing.
        """
        wanted = reference.parse(ref).with_default_tag()
        with self.open(wanted.domain, notify=notify) as registry:
            chosen = platforms.parse_platform(platform) if platform else None
            known = self._find_current(registry, wanted, chosen)
            if known is not None:
                layers = known.image.layers if unpack else []
                if all(self.images.layer_path(layer).is_dir() for layer in layers):
                    return known
            downloads = self.settings.downloads
            job = _Job(self.images, registry, wanted, chosen, unpack=unpack, named=named, downloads=downloads)
            done = job.run(watch)
            return done._replace(new=known is None or known.image.id != done.image.id)

    def tags(self, ref: str, *, notify: Notify = lambda line: None) -> list[str]:
        """The tags of a repository at its registry."""
        wanted = reference.parse(ref)
        with self.open(wanted.domain, notify=notify) as registry:
            return registry.tags(wanted.path)

    def _find_current(
        self, registry: Registry, wanted: reference.Reference, platform: oci.Platform | None
    ) -> Pulled | None:
        """The stored image when it is what the registry has under this name now."""
        images = self.images
        digest = wanted.digest
        if digest is None:
            if (id := images.catalog.find_by_tag(str(wanted))) is None:
                return None
            prefix = f"{wanted.name}@"
            known = {name.removeprefix(prefix) for name in images.catalog.repo_digests(id) if name.startswith(prefix)}
            if not known:
                return None
            try:
                digest = registry.find_digest(wanted.path, wanted.tag or "latest")
            except Refused as err:
                if err.status in (401, 403, 404, 429):
                    raise
                return None  # a registry without HEAD
            if digest not in known:
                return None
        elif (id := images.catalog.find_by_repo_digest(f"{wanted.name}@{digest}")) is None:
            return None
        image = images.find(id)
        if image is None or digest is None:
            return None
        needed = (image.id, images.catalog_row(image).manifest, *(layer.digest for layer in image.layers))
        if not all(map(images.blobs.has, needed)) or not platforms.fits(
            image.raw_config, platform or platforms.host_platform()
        ):
            return None
        return Pulled(image, digest, new=False)


def parse_name(ref: str) -> reference.Reference:
    """The reference a user typed, with its default tag. Raises InvalidReference."""
    return reference.parse(ref).with_default_tag()


@dataclass
class _Layer:
    info: LayerInfo
    state: LayerState
    lock: ExitStack = field(default_factory=ExitStack)
    work: ExitStack = field(default_factory=ExitStack)
    unpacked: tuple[Path, dict[str, Any]] | None = None
    """A directory that waits for the layers below it, and what its task returned."""


class _Job:
    """One pull."""

    def __init__(
        self,
        images: Images,
        registry: Registry,
        wanted: reference.Reference,
        platform: oci.Platform | None,
        *,
        unpack: bool,
        named: bool,
        downloads: int,
    ) -> None:
        self._images = images
        self._registry = registry
        self._wanted = wanted
        self._platform = platform
        self._unpack = unpack
        self._named = named
        self._downloads = downloads
        self._new_blobs: list[str] = []
        self._new_layers: list[str] = []

    def run(self, watch: Watch) -> Pulled:
        images, wanted = self._images, self._wanted
        try:
            with images.adding(unpacks=self._unpack):
                top, manifest = self._find_manifest()
                config = self._find_config(manifest)
                layers = self._plan(manifest, config)
                self._transfer(layers, watch)
                image = images.register(
                    config.raw,
                    manifest.raw,
                    [layer.info for layer in layers],
                    [f"{wanted.name}:{wanted.tag}"] if wanted.tag and self._named else [],
                    repo_digests=[f"{wanted.name}@{top if self._named else manifest.digest}"],
                )
        except BaseException as err:
            keep = isinstance(err, RegistryError) and not isinstance(err, Refused)
            drop_unneeded(images, self._new_layers, [] if keep else self._new_blobs)
            raise
        images.tell(image, "pull", wanted.familiar)
        return Pulled(image, top, new=True)

    # -- documents -------------------------------------------------------------------------------------------------

    def _find_manifest(self) -> tuple[str, oci.Manifest]:
        """(digest the name stands for, manifest for the platform): through at most some indexes, never in a circle."""
        wanted = self._wanted
        reference_ = wanted.digest or wanted.tag or "latest"
        top, fetched = "", None
        size: int | None = None
        seen: set[str] = set()
        while True:
            fetched = self._registry.manifest(wanted.path, reference_)
            top = top or fetched.digest
            if size is not None and len(fetched.raw) != size:
                raise ManifestError(
                    f"manifest {fetched.digest} has {len(fetched.raw)} bytes where its index says {size}: refused"
                )
            parsed = oci.parse(fetched.raw, fetched.media_type)
            if isinstance(parsed, oci.Manifest):
                return top, parsed
            seen.add(fetched.digest)
            if len(seen) > MAX_INDEXES:
                raise ManifestError(f"{wanted.familiar}: more than {MAX_INDEXES} indexes point at each other")
            chosen = platforms.choose(parsed, self._platform or platforms.host_platform())
            if chosen.digest in seen:
                raise ManifestError(f"{wanted.familiar}: an index points at itself")
            reference_, size = chosen.digest, chosen.size

    def _find_config(self, manifest: oci.Manifest) -> imageconfig.ImageConfig:
        head = manifest.config
        if head.media_type not in _IMAGE_CONFIGS:
            kind = manifest.artifact_type or head.media_type
            raise ManifestError(
                f"{self._wanted.familiar} is not a container image but an artifact of type {kind}",
                resolution=f"`labkernel image fetch {self._wanted.familiar} -o DIR` saves its files",
            )
        if head.size > imageconfig.CONFIG_MAX:
            raise ManifestError(f"image config of {head.size} bytes: more than {imageconfig.CONFIG_MAX} are refused")
        blobs = self._images.blobs
        if blobs.has(head.digest):
            raw = blobs.read(head.digest, imageconfig.CONFIG_MAX)
        else:
            raw = self._registry.blob(self._wanted.path, head.digest, head.size, "an image config")
        if len(raw) != head.size:
            raise ManifestError(f"the image config has {len(raw)} bytes where the manifest says {head.size}")
        config = imageconfig.parse(raw)
        self._check_platform(config)
        return config

    def _check_platform(self, config: imageconfig.ImageConfig) -> None:
        wanted = self._platform
        if wanted is None or not config.architecture:
            return
        offered = oci.Platform(os=config.os or "linux", architecture=config.architecture, variant=config.variant)
        if platforms.rank(offered, wanted) == 0:
            raise ManifestError(
                f"image with reference {self._wanted.familiar} was found but does not provide the specified platform "
                f"({wanted})",
                resolution=f"it is for {offered}",
            )

    def _plan(self, manifest: oci.Manifest, config: imageconfig.ImageConfig) -> list[_Layer]:
        descriptors, diff_ids = manifest.layers, config.diff_ids
        if len(descriptors) != len(diff_ids):
            raise ManifestError(f"the manifest has {len(descriptors)} layers and the config {len(diff_ids)}")
        limits = self._images.limits
        if len(descriptors) > limits.layers:
            raise too_many_layers(len(descriptors), limits.layers)
        sizes: dict[str, int] = {}
        layers = []
        for descriptor, diff_id in zip(descriptors, diff_ids, strict=True):
            oci.compression_of(descriptor.media_type)
            if sizes.setdefault(descriptor.digest, descriptor.size) != descriptor.size:
                raise ManifestError(f"layer {descriptor.digest} is there twice, with two sizes")
            info = LayerInfo(diff_id, descriptor.digest, descriptor.media_type, descriptor.size)
            layers.append(_Layer(info, LayerState(descriptor.digest.partition(":")[2][:12], descriptor.size)))
        if sum(sizes.values()) > limits.image_bytes:
            raise ManifestError(
                f"the image's layers have {sum(sizes.values())} bytes: more than {limits.image_bytes} are refused",
                resolution=LIMITS_HINT.format("image_bytes"),
            )
        needed = sum(size for digest, size in sizes.items() if not self._images.blobs.has(digest))
        status = os.statvfs(self._images.layout.root)
        if needed > status.f_bavail * status.f_frsize:
            raise DiskFull(
                f"the image's layers need {needed} bytes on the disk, more than are free", resolution=DISK_FULL_HINT
            )
        return layers

    # -- layers ----------------------------------------------------------------------------------------------------

    def _transfer(self, layers: list[_Layer], watch: Watch) -> None:
        first = {layer.info.digest: layer for layer in reversed(layers)}
        # The largest first: what is left at the end is then small, and no thread idles for long.
        queue = sorted(first.values(), key=lambda layer: -layer.info.size_bytes)
        executor = ThreadPoolExecutor(self._downloads, thread_name_prefix="labkernel-pull")
        states = [layer.state for layer in layers]
        try:
            watch(states)
            pending: set[Future[None]] = {executor.submit(self._fetch, layer) for layer in queue}
            while pending:
                done, pending = wait(pending, timeout=POLL_S, return_when="FIRST_EXCEPTION")
                watch(states)
                for future in done:
                    future.result()
            if self._unpack:
                unpacking.settle(
                    self._images,
                    [layer.info for layer in layers],
                    {layer.info.diff_id: layer.unpacked for layer in layers if layer.unpacked is not None},
                    self._new_layers.append,
                )
            for layer in layers:
                layer.state.status = "Pull complete" if self._unpack else "Download complete"
            watch(states)
        except BaseException:
            self._registry.pool.cancel()
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            for layer in layers:
                layer.work.close()
                layer.lock.close()

    def _fetch(self, layer: _Layer) -> None:
        """Body of a thread: the blob, and its directory where that can be made meanwhile."""
        info, images = layer.info, self._images
        with self._alone(f"blob-{info.digest.partition(':')[2]}"):
            if images.blobs.has(info.digest):
                if images.blobs.size(info.digest) != info.size_bytes:
                    raise ManifestError(f"layer {info.digest} has not the {info.size_bytes} bytes the manifest says")
                layer.state.status = "Already exists"
                task = self._start_unpacking(layer, images.blobs.path(info.digest))
                if task is not None:
                    task.end()
            else:
                task = self._download(layer)
        if task is not None:
            layer.state.status = "Extracting"
            layer.unpacked = task.result()
            if not layer.unpacked[1]["undescribed"]:
                self._place(layer)
        # At once: who waits for another's layer while holding a lock may wait for ever.
        layer.lock.close()

    def _download(self, layer: _Layer) -> _Unpacking | None:
        info, images, state = layer.info, self._images, layer.state
        state.status = "Downloading"
        task: _Unpacking | None = None

        def count(more: int) -> None:
            state.current += more

        try:
            with images.blobs.writer(info.digest, size_bytes=info.size_bytes) as out:
                task = self._start_unpacking(layer, out.path)

                def write(piece: memoryview) -> None:
                    out.write(piece)
                    if task is not None:
                        task.wake()

                transfer.download(
                    self._registry, self._wanted.path, info.digest, info.size_bytes, write, progress=count
                )
                if task is not None and out.digest == info.digest:
                    # Verified: the rest is unpacked while the disk takes the blob.
                    task.end()
            self._new_blobs.append(info.digest)
        except BaseException:
            if task is not None:
                task.give_up()
            raise
        state.status = "Download complete"
        return task

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """An inter-process lock, waited for in a way that a cancelled pull ends."""
        while True:
            with self._images.locks.try_exclusive(name) as held:
                if held:
                    yield
                    return
            self._registry.pool.pause(_LOCK_POLL_S)

    def _start_unpacking(self, layer: _Layer, source: Path) -> _Unpacking | None:
        """Begin to unpack a file that may still grow; None when the layer is unpacked, or is being by another."""
        images = self._images
        target = images.layer_path(layer.info)
        if not self._unpack or target.is_dir():
            return None
        if not layer.lock.enter_context(images.locks.try_exclusive(f"layer-{target.name}")) or target.is_dir():
            return None
        directory = layer.work.enter_context(temporary_directory(images.layout, "layer")) / "root"
        directory.mkdir(mode=0o755)
        return _Unpacking(images, layer.info, source, directory, lambda: self._registry.pool.cancelled)

    def _place(self, layer: _Layer) -> None:
        """Move an unpacked layer to its place; the caller holds its lock. Another process may have been first."""
        assert layer.unpacked is not None
        directory, done = layer.unpacked
        target = self._images.layer_path(layer.info)
        if not target.is_dir():
            self._images.place_layer(layer.info, directory, done)
            self._new_layers.append(layer.info.diff_id)
        layer.unpacked = None
        layer.work.close()
        layer.state.status = "Pull complete"


class _Unpacking:
    """A task that unpacks a layer while its blob arrives."""

    def __init__(
        self, images: Images, info: LayerInfo, source: Path, directory: Path, cancelled: Callable[[], bool]
    ) -> None:
        self._images = images
        self._info = info
        self._directory = directory
        self._cancelled = cancelled
        self._outcome: dict[str, Any] | BaseException | None = None
        self._source = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        self._wake_read, self._wake = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._run, name="labkernel-unpack", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is more to read.

        A task that has failed is not told here: only the whole blob says whether the layer or the registry is bad.
        """
        self._tell(b".")

    def end(self) -> None:
        """The file is complete and verified, if not yet durable."""
        os.set_blocking(self._wake, True)
        self._tell(GrowingFile.END)

    def give_up(self) -> None:
        """There will be no more: the task ends with an error."""
        os.set_blocking(self._wake, True)
        self._tell(GrowingFile.GIVEN_UP)
        self._thread.join()
        self._close()

    def result(self) -> tuple[Path, dict[str, Any]]:
        """(directory, what the task returned). Raises what it raised."""
        self._thread.join()
        self._close()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._directory, self._outcome

    def _tell(self, byte: bytes) -> None:
        try:
            os.write(self._wake, byte)
        except (BlockingIOError, BrokenPipeError):
            pass  # a full pipe wakes as well; a reader that has gone has its reason in the outcome

    def _close(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _run(self) -> None:
        def look(event: dict[str, Any]) -> None:
            if self._cancelled():
                raise Cancelled  # leaving the call ends the task

        try:
            self._outcome = self._images.runtime.task(
                "labkernel.oci.layer:apply_layer",
                fds=[self._source, self._wake_read],
                report=look,
                target=str(self._directory),
                media_type=self._info.media_type,
                diff_id=self._info.diff_id,
                **self._images.unpack_options,
            )
        except BaseException as err:
            self._outcome = err
        finally:
            os.close(self._source)
            os.close(self._wake_read)
            # A task that was left is killed, but not before this thread goes on: until it is gone it may still write
            # to the directory. It was the pipe's last reader.
            gone = select.poll()
            gone.register(self._wake, 0)
            gone.poll(TASK_END_TIMEOUT_S * 1000)
