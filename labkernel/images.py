"""Images: look up, import, tag, list, remove, prune, and the unpacked layers that containers stand on.

An image is immutable; its id is the digest of its config. Names (tags) point at ids and are set last, so a failure
leaves at most content that nothing names, which `prune` and `remove` collect. Content comes here from `builds`,
`containers.commit`, `import`, `load`, the built-in bases (`imaging/bases.py`) and registries (`imaging/pulls.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from .errors import (
    DriverError,
    ImageError,
    InvalidReference,
    LabkernelError,
    ManifestError,
    NoSuchImage,
    RegistryError,
    StoreError,
    UsageError,
)
from .imaging.filters import make_test
from .imaging.image import Image, ImageList
from .oci import reference
from .oci.config import add_history, apply_changes, encode, new_document, parse_timestamp
from .store.blobs import Blobs, temporary_directory
from .store.catalog import HOST_LAYER, Catalog, ImageRow, LayerInfo
from .store.database import Database
from .store.layout import Layout
from .store.locks import Locks

if TYPE_CHECKING:
    from .oci.endpoints import Limits
    from .store.blobs import Readable

REGISTRY_TIMEOUT_S = 0.8
REGISTRY_VERDICT_AGE_S = 300.0
_NO_IMAGE_HINT = (
    "without a registry there are lab/busybox, lab/debian and lab/host; "
    "`labkernel import FILE.tar NAME` makes an image of any root file system"
)

LIMITS_HINT = "LABKERNEL_LIMITS={}=… or [limits] in registries.toml sets another limit"

Notify = Callable[[str], None]
Records = list[dict[str, str]]
Steps = list[dict[str, Any]]
Paths = list[Path]


class Tasks(Protocol):
    """The part of `Runtime` that images need."""

    def task(self, call: str, /, *, fds: Sequence[int] = ..., report: Any = ..., **args: Any) -> Any: ...


class DriverLike(Protocol):
    """The part of `Driver` that images need."""

    @property
    def name(self) -> str: ...

    @property
    def id_mapping(self) -> str: ...

    @property
    def overlay(self) -> str: ...


class Images:
    """The images of one store. Safe to use from several threads and processes at once."""

    def __init__(self, layout: Layout, blobs: Blobs, db: Database, runtime: Tasks, driver: DriverLike) -> None:
        self.layout = layout
        self.blobs = blobs
        self.db = db
        self.runtime = runtime
        self.driver = driver
        self.catalog = Catalog(db)
        self.locks = Locks(layout.locks)
        self._known: dict[str, Image] = {}
        self._claimed = False

    # -- looking up ----------------------------------------------------------------------------------------------

    def get(self, ref: str) -> Image:
        """The stored image of a name, digest, id or unique id prefix. Raises NoSuchImage; never asks a registry."""
        image = self._find(ref)
        if image is None:
            raise NoSuchImage(ref, resolution=f"`labkernel images` lists what there is; {_NO_IMAGE_HINT}")
        return image

    def find(self, ref: str, *, platform: str | None = None) -> Image | None:
        """As `get`, but None where there is no such image, or none for `platform`."""
        if platform is None:
            return self._find(ref)
        from .imaging.variants import find_for
        from .oci.platforms import parse_platform

        return find_for(self, ref, parse_platform(platform))

    def resolve(
        self, ref: str, *, notify: Notify = lambda line: None, platform: str | None = None, ask: bool = True
    ) -> Image:
        """The image to run or build on: the stored one, else from its registry, else a built-in base.

        `notify` gets lines for the user: progress, and that a built-in image stands in for a name of Docker Hub since
        no registry answers. With `ask=False` none is asked. `platform`: the image of that name for another machine
        (imaging/variants.py). Raises NoSuchImage (nothing of that name within reach), UsageError (not for that
        platform), RegistryError and what `Pulls.pull` raises.
        """
        if platform is not None:
            from .imaging.variants import resolve_for
            from .oci.platforms import parse_platform

            return resolve_for(self, ref, parse_platform(platform), notify=notify, ask=ask)
        image = self._find(ref)
        if image is not None:
            return image
        try:
            wanted = reference.parse(ref).with_default_tag()
        except InvalidReference as err:
            if "64-byte" in err.brief:
                raise NoSuchImage(ref, resolution=_NO_IMAGE_HINT) from None
            raise
        from .imaging import bases

        if bases.is_builtin(wanted):
            return bases.ensure(self, wanted, notify)
        failure: RegistryError | None = None
        if ask and self.registry_answers(wanted.domain):
            from .imaging.pulls import Pulls

            notify(f"Unable to find image '{wanted.familiar}' locally; pulling it from {wanted.domain}")
            try:
                return Pulls(self).pull(str(wanted), notify=notify).image
            except RegistryError as err:
                if getattr(err, "status", None) is not None:
                    raise  # an answer, if a bad one
                failure = err
        stand_in = bases.find_stand_in(wanted)
        if stand_in is not None:
            notify(f"{wanted.familiar}: no registry answers; the built-in {stand_in.familiar_name} stands in")
            return bases.ensure_stand_in(self, wanted, stand_in, notify)
        raise failure or NoSuchImage(
            wanted.familiar, resolution=f"it is not in the store and {wanted.domain} does not answer; {_NO_IMAGE_HINT}"
        )

    def list(
        self, name: str | None = None, *, all: bool = False, filters: Mapping[str, Any] | None = None
    ) -> ImageList:
        """Images, newest first. `name`: a repository or a pattern. `all` is taken for the SDK's sake.

        `filters`: `reference` (patterns), `dangling` (bool), `label` (`key`, `key=value`), `before`, `since` (images),
        `until` (a moment, or an age such as `24h`). Others raise UsageError.
        """
        test = make_test(self, filters, patterns=[name] if name else [])
        tags = self.catalog.all_tags()
        found = ImageList()
        for row in self.catalog.all():
            image = self._image(row)
            if test(image, [reference.parse(tag) for tag in tags.get(row.id, ())]):
                found.append(image)
        return found

    def names(self, repository: str) -> Sequence[str]:
        """Canonical tags of a canonical repository name, sorted."""
        every = [name for tags in self.catalog.all_tags().values() for name in tags]
        return sorted(name for name in every if name.rpartition(":")[0] == repository)

    def is_builtin(self, wanted: reference.Reference) -> bool:
        """Whether the name is one of the bases made on this machine."""
        from .imaging import bases

        return bases.is_builtin(wanted)

    def history(self, ref: str) -> Steps:
        """Steps of the image, newest first: Id, Created (s), CreatedBy, Tags, Size (bytes), Comment."""
        image = self.get(ref)
        sizes = iter(self.catalog.layer_sizes(image.id))
        steps = []
        entries = image.raw_config.get("history") or [{} for _ in image.layers]
        for entry in entries:
            steps.append(
                {
                    "Id": "<missing>",
                    "Created": int(parse_timestamp(entry.get("created"))),
                    "CreatedBy": entry.get("created_by") or "",
                    "Tags": None,
                    "Size": 0 if entry.get("empty_layer") else next(sizes, 0),
                    "Comment": entry.get("comment") or "",
                }
            )
        if steps:
            steps[-1].update({"Id": image.id, "Tags": image.tags or None})
        return steps[::-1]

    def tell(self, image: Image, action: str, name: str) -> None:
        """Record an event of an image, with its labels. One whose config is damaged can be untagged all the same."""
        labels: dict[str, str] = {}
        with contextlib.suppress(LabkernelError, OSError, ValueError):
            labels = image.labels
        self.db.add_event("image", action, image.id, {**labels, "name": name})

    # -- names ---------------------------------------------------------------------------------------------------

    def tag(self, ref: str, name: str) -> None:
        """Give a stored image the name `name` (`:latest` filled in), taking it from the image that had it."""
        target = str(reference.parse_tag(name))
        image = self.get(ref)
        self.catalog.tag(target, image.id)
        from .imaging.variants import copy_set

        copy_set(self, ref, reference.parse(target))
        self.tell(image, "tag", reference.parse(target).familiar)

    def remove(self, ref: str, *, force: bool = False) -> Records:
        """Remove a name, and with its last name the image: records `{"Untagged": …}` and `{"Deleted": …}`.

        Docker's rules (Docker Engine API, ImageDelete): by name only the name goes while others remain; a container
        that uses the image raises ConflictError, which `force` overrides unless it runs; by id an image with names in
        several places needs `force`. Layers that a stopped container stands on stay until it goes.
        """
        from .imaging.removal import remove_image

        return remove_image(self, ref, force=force)

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Remove images without a name (`{"dangling": False}`: all that no container uses) and unnamed content.

        Returns `{"ImagesDeleted": [records], "SpaceReclaimed": bytes}`.
        """
        from .imaging.removal import prune_images

        return prune_images(self, filters or {})

    def sweep(self) -> int:
        """Remove blobs and unpacked layers that nothing needs, and rubbish in `tmp/`; return the bytes freed.

        Waits for those who are adding content. Called by `prune`; `remove` collects its own image's content.
        """
        from .imaging.removal import sweep

        return sweep(self)

    # -- content -------------------------------------------------------------------------------------------------

    def needed_blobs(self) -> set[str]:
        """Digests that an image, the build cache or the registry on this store needs."""
        from .imaging.published import published_blobs

        return self.catalog.needed_blobs() | published_blobs(self.layout)

    def adding(self, *, unpacks: bool = False) -> AbstractContextManager[None]:
        """Hold this (`with images.adding():`) from the first `blobs.put` until `commit_layers` has returned.

        It keeps `prune` from taking content that nothing names yet. Who unpacks layers meanwhile says so: those that
        another driver left here can only go before. Raises DriverError then, when containers stand on them.
        """
        if unpacks:
            self._claim_layers()
        return self.locks.shared("content")

    def commit_layers(
        self,
        config: Mapping[str, Any],
        layers: Sequence[LayerInfo],
        tags: Iterable[str] = (),
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> Image:
        """Make an image of stored layers (bottom first) and a config document; set `tags` last.

        `config` is the whole document of image-spec config.md; its `rootfs` is filled from `layers`.
        Raises StoreError when a layer's blob is not in the store, InvalidReference for a bad tag.
        """
        document = {**config, "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}}
        return self.register(encode(document), None, layers, tags, provenance=provenance)

    def register(
        self,
        config: bytes,
        manifest: bytes | None,
        layers: Sequence[LayerInfo],
        tags: Iterable[str] = (),
        *,
        repo_digests: Iterable[str] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> Image:
        """As `commit_layers` for a config (and manifest) whose bytes must be kept: what `pull` and `load` use."""
        from .oci import manifest as oci

        names = [str(reference.parse_tag(name)) for name in tags]
        if manifest is not None and len(layers) > self.limits.layers:
            raise too_many_layers(len(layers), self.limits.layers)
        for layer in layers:
            if layer.media_type != HOST_LAYER and not self.blobs.has(layer.digest):
                raise StoreError(f"layer {layer.digest} is not in the store")
        with self.adding():
            stored = self.blobs.put(config)
            if manifest is None:
                descriptors = [
                    oci.Descriptor(media_type=layer.media_type, digest=layer.digest, size=layer.size_bytes)
                    for layer in layers
                ]
                head = oci.Descriptor(media_type=oci.OCI_CONFIG, digest=stored.digest, size=stored.size_bytes)
                manifest = oci.make_manifest(head, descriptors).raw
            manifest_digest = self.blobs.put(manifest).digest
            created = parse_timestamp(json.loads(config).get("created"))
            row = ImageRow(stored.digest, manifest_digest, created, time.time(), dict(provenance or {}))
            self.catalog.add(row, layers, tags=names, repo_digests=repo_digests)
        self._known.pop(stored.digest, None)
        return self.get(stored.digest)

    def layer_path(self, layer: LayerInfo) -> Path:
        """Where a layer is, or will be, unpacked; `/` for the layer of `lab/host`."""
        return Path("/") if layer.media_type == HOST_LAYER else self.layout.layer_dir(layer.diff_id)

    def layer_dirs(self, image: Image) -> Paths:
        """Directories of the image's layers, top first (overlay's order); unpacks what is missing.

        Raises LayerError, CorruptBlob, DiskFull, and DriverError for `lab/host` where the driver cannot.
        """
        if image.uses_host:
            from .imaging.bases import refuse_host

            refuse_host(self.driver)
        self._claim_layers()
        paths = [self.layer_path(layer) for layer in reversed(image.layers)]
        if not all(map(os.path.isdir, paths)):
            from .imaging.unpacking import unpack_missing

            unpack_missing(self, image.layers)
        # A layer that occurs twice (two empty ones) counts at its top place: overlay refuses a directory twice.
        return list(dict.fromkeys(paths))

    def unpack(self, layer: LayerInfo, lowers: Sequence[Path] = ()) -> Path:
        """Unpack one layer unless it is; two processes that ask at once do it once. Returns its directory.

        `lowers` are the directories of the layers below it, top first.
        """
        self._claim_layers()
        target = self.layer_path(layer)
        with self.locks.exclusive(f"layer-{target.name}"):
            if target.is_dir():
                return target
            from .imaging.unpacking import unpack_into

            with temporary_directory(self.layout, "layer") as work:
                self.place_layer(layer, *unpack_into(self, layer, work, lowers))
        return target

    def place_layer(self, layer: LayerInfo, directory: Path, done: Mapping[str, Any]) -> None:
        """Move an unpacked layer to its place; `done` is what its task returned. The caller holds the layer's lock."""
        self.catalog.record_unpacked(layer.diff_id, int(done["size_bytes"]), done.get("warnings") or [])
        try:
            self.move_layer(directory, self.layer_path(layer))
        except BaseException:
            self.catalog.forget_layers([layer.diff_id])
            raise

    def move_layer(self, source: Path, target: Path) -> None:
        """Rename an unpacked layer's directory, also where the image gives it an owner or a mode that forbids us to."""
        try:
            os.rename(source, target)
        except PermissionError:
            self.runtime.task("labkernel.oci.layer:move", source=str(source), target=str(target))

    @property
    def layer_options(self) -> dict[str, Any]:
        """How this driver's layers are written: the options of `oci.layer` tasks."""
        return {"userxattr": self.driver.name != "root", "single_id": self.driver.id_mapping == "single"}

    @property
    def unpack_options(self) -> dict[str, Any]:
        """As `layer_options`, with the user's limits."""
        limits = self.limits
        return {**self.layer_options, "max_bytes": limits.layer_bytes, "max_members": limits.layer_members}

    @cached_property
    def limits(self) -> Limits:
        """What an image may make us do at most: the user's settings."""
        from .oci.endpoints import Settings

        return Settings.load().limits

    def import_tar(
        self,
        source: str | os.PathLike[str] | Readable,
        repository: str | None = None,
        tag: str | None = None,
        changes: Sequence[str] = (),
        *,
        message: str = "",
        platform: str | None = None,
    ) -> Image:
        """Make an image of one layer from a tar of a root file system (plain, gzip or zstd; a path or a stream).

        `changes` are Dockerfile instructions such as `CMD ["sh"]` (see `oci.config.CHANGES`). The layer is unpacked
        before the image exists, so a bad archive raises LayerError (ImageError for no archive) and leaves nothing.
        """
        name = (f"{repository}:{tag}" if tag else repository) if repository else None
        if name:
            reference.parse_tag(name)
        where = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "-"
        document = apply_changes(new_document(), changes)
        if platform:
            from .oci.platforms import parse_platform

            chosen = parse_platform(platform)
            document |= {"os": chosen.os, "architecture": chosen.architecture}
            document |= {"variant": chosen.variant} if chosen.variant else {}
        add_history(document, "", comment=message or f"Imported from {where}")
        from .oci.archive import store_layer

        with self.adding(unpacks=True):
            if isinstance(source, (str, os.PathLike)):
                try:
                    stream: BinaryIO = open(source, "rb")  # noqa: SIM115
                except OSError as err:
                    raise UsageError(f"cannot read {where}: {err.strerror}") from err
                with stream:
                    layer = LayerInfo(*store_layer(self.blobs, stream))
            else:
                layer = LayerInfo(*store_layer(self.blobs, source))
            try:
                self.unpack(layer)
            except Exception:
                self._drop_unnamed(layer)
                raise
            image = self.commit_layers(document, [layer], [name] if name else [])
        if name:
            self.tell(image, "tag", reference.parse_tag(name).familiar)
        self.tell(image, "import", name or image.id)
        return image

    def export_rootfs(self, ref: str, out: BinaryIO) -> None:
        """Write the flattened root file system as an uncompressed tar to `out`, which needs a file descriptor."""
        image = self.get(ref)
        if image.uses_host:
            raise ImageError(
                "lab/host is this machine's own root directory and cannot be exported",
                resolution="export a container or an image built on lab/busybox or lab/debian",
            )
        out.flush()
        lowers = [str(path) for path in self.layer_dirs(image)]
        self.runtime.task("labkernel.oci.layer:export_tree", fds=[out.fileno()], lowers=lowers, **self.layer_options)

    def load(
        self, source: str | os.PathLike[str] | bytes | Readable, *, notify: Notify = lambda line: None
    ) -> ImageList:
        """Load the images of a `docker save` archive or an OCI image layout (a tar, plain, gzip or zstd, as path, bytes
        or stream; or the layout's directory). `notify` gets a line for each name that is in the archive."""
        from .imaging.removal import drop_unneeded
        from .oci.archive import Bounds, load_archive

        if isinstance(source, bytes):
            import io

            source = io.BytesIO(source)
        limits, stored = self.limits, list[str]()
        bounds = Bounds(limits.layers, limits.layer_bytes, limits.image_bytes)
        try:
            with self.adding():
                found = load_archive(self.blobs, source, bounds=bounds, stored=stored)
                names = [[reference.parse_tag(name).familiar for name in item.tags] for item in found]
                loaded = ImageList()
                for item, tags in zip(found, names, strict=True):
                    layers = [LayerInfo(*layer) for layer in item.layers]
                    loaded.append(self.register(item.config, item.manifest, layers, item.tags))
                    id = loaded[-1].id
                    for line in [f"Loaded image: {tag}" for tag in tags] or [f"Loaded image ID: {id}"]:
                        notify(line)
                    self.tell(loaded[-1], "load", tags[0] if tags else id)
        except BaseException:
            drop_unneeded(self, [], stored)
            raise
        return loaded

    def check_platform(self, image: Image, platform: str | None) -> None:
        """Raises ImageError when the image is not for `platform` (`os/architecture[/variant]`)."""
        if platform:
            from .oci.platforms import fits, parse_platform

            if not fits(image.raw_config, parse_platform(platform)):
                raise ImageError(f"{(image.tags or [image.short_id])[0]} does not provide the platform {platform}")

    def save(
        self, refs: Sequence[str], out: BinaryIO, *, platform: str | None = None, names: Sequence[str] = ()
    ) -> None:
        """Write images as one tar that is a `docker save` archive and an OCI image layout at once. `names`: further
        ones that the last of them has in the archive alone."""
        from .imaging.removal import find_name
        from .oci.archive import SavedImage, save_archive

        saved: dict[str, SavedImage] = {}
        for ref in refs:
            image = self.get(ref)
            self.check_platform(image, platform)
            if image.uses_host:
                raise ImageError("an image on lab/host cannot leave this machine: its lowest layer is the machine")
            name = find_name(self, image, ref)
            manifest = self.catalog_row(image).manifest
            entry = saved.setdefault(image.id, SavedImage(image.id, manifest, image.layers, []))
            if name and "@" not in name and name not in entry.tags:
                entry.tags.append(name)
        entry.tags.extend(str(reference.parse_tag(name)) for name in names)
        save_archive(self.blobs, list(saved.values()), out)
        for entry in saved.values():
            name = reference.parse(entry.tags[0]).familiar if entry.tags else entry.config
            self.tell(self.get(entry.config), "save", name)

    def catalog_row(self, image: Image) -> ImageRow:
        """The stored row of an image. Raises NoSuchImage when it has been removed meanwhile."""
        row = self.catalog.find(image.id)
        if row is None:
            raise NoSuchImage(image.id)
        return row

    def registry_answers(self, domain: str, *, fresh: bool = False) -> bool:
        """Whether the registry of `domain` takes connections; the verdict is remembered for some minutes.

        Loopback is always tried: a connection there is answered or refused at once.
        """
        from .oci.endpoints import Settings

        endpoints = Settings.load().endpoints(domain)
        if all(endpoint.is_local for endpoint in endpoints):
            return True
        key = f"registry-answers:{domain}"
        if not fresh:
            known = self.db.setting(key, max_age_s=REGISTRY_VERDICT_AGE_S)
            if known is not None:
                return bool(known)
        from .oci import reach

        verdict = reach.connects(endpoints, REGISTRY_TIMEOUT_S)
        self.db.remember(key, verdict)
        return verdict

    # -- inside --------------------------------------------------------------------------------------------------

    def _find(self, ref: str) -> Image | None:
        text = ref.removeprefix("sha256:")
        if len(text) == 64 or text is not ref:
            return self._find_id(text)
        try:
            wanted = reference.parse(ref).with_default_tag()
        except InvalidReference:
            return self._find_id(text)
        if wanted.digest:
            found = self.catalog.find_by_repo_digest(f"{wanted.name}@{wanted.digest}")
            return self._by_id(found or self.catalog.find_by_manifest(wanted.digest))
        return self._by_id(self.catalog.find_by_tag(str(wanted))) or self._find_id(text)

    def _find_id(self, text: str) -> Image | None:
        if not text or len(text) > 64 or set(text) - set("0123456789abcdef"):
            return None
        if len(text) == 64:
            return self._by_id(f"sha256:{text}") or self._by_id(self.catalog.find_by_manifest(f"sha256:{text}"))
        found = self.catalog.find_by_prefix(text)
        return self._by_id(found[0]) if len(found) == 1 else None

    def _by_id(self, id: str | None) -> Image | None:
        row = self.catalog.find(id) if id else None
        return self._image(row) if row else None

    def _image(self, row: ImageRow) -> Image:
        known = self._known.get(row.id)
        if known is None or known._row != row:
            known = self._known[row.id] = Image(self, row)
        return known

    def _claim_layers(self) -> None:
        """Make sure that the unpacked layers are of this driver's kind: owners and whiteouts differ between them."""
        if self._claimed:
            return
        kind, known = f"{self.driver.name} ({self.driver.id_mapping})", self.db.setting("layers-of")
        if known not in (None, kind):
            if self.db.find("SELECT 1 FROM containers"):
                raise DriverError(
                    f"the containers of this store were made with the driver {known}; this is {kind}",
                    resolution=f"set LABKERNEL_DRIVER={known.split()[0]}, remove them, or use another LABKERNEL_ROOT",
                )
            from .imaging.removal import forget_unpacked

            forget_unpacked(self)
        if known != kind:
            self.db.remember("layers-of", kind)
        self._claimed = True

    def _drop_unnamed(self, layer: LayerInfo) -> None:
        if layer.digest not in self.needed_blobs():
            self.blobs.remove(layer.digest)


def too_many_layers(count: int, most: int) -> ManifestError:
    """The error for an image of more layers than the kernel stacks, or the user wants."""
    return ManifestError(
        f"the image has {count} layers: more than {most} are refused", resolution=LIMITS_HINT.format("layers")
    )
