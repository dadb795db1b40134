"""How images leave: docker's rules for `rmi`, pruning, and the collection of content that nothing needs.

Order is always downward: names, then rows, then unpacked layers, then blobs. A crash in between leaves content
without a name, which the next sweep finds.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, LabkernelError
from ..linux.trees import remove_tree
from ..oci import reference
from ..store.blobs import sweep_temporary
from .filters import is_true, words

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

ADDING_WAIT_S = 10.0


def remove_image(images: Images, ref: str, *, force: bool) -> list[dict[str, str]]:
    """Docker's ImageDelete; see `Images.remove`."""
    image = images.get(ref)
    names = _names_of(images, image)
    named = find_name(images, image, ref)
    if named is None:
        _refuse_by_id(images, image, names, force=force)
        return _delete(images, image, names)
    if _are_one(names) and not force:
        _refuse_while_used(images, image, ref)
    gone = [named]
    repository, its_digest = _split(named)
    if not its_digest and not any(_split(name) == (repository, "") for name in names if name != named):
        # With its last tag a repository's digests go, too.
        gone += [name for name in names if name != named and _split(name)[0] == repository]
    images.catalog.untag(gone)
    records = [_untagged(images, image, name) for name in gone]
    if len(gone) < len(names) or _find_user(images, image, running=True):
        # Forced while a container runs: the name goes, the image stays without one.
        return records
    return records + _delete(images, image, ())


def _names_of(images: Images, image: Image) -> list[str]:
    """Canonical tags, then `repository@digest` names: docker counts both as references."""
    return [*images.catalog.tags(image.id), *images.catalog.repo_digests(image.id)]


def _split(name: str) -> tuple[str, str]:
    """(repository, digest) of a canonical name; no digest for a tag."""
    repository, at, digest = name.partition("@")
    return (repository, digest) if at else (name.rpartition(":")[0], "")


def _are_one(names: list[str]) -> bool:
    """Whether these are one name in docker's sense: a tag at most, and digests of no repository but its own."""
    tags = [name for name in names if not _split(name)[1]]
    return len(tags) <= 1 and len({_split(name)[0] for name in names}) <= 1


def prune_images(images: Images, filters: Mapping[str, Any]) -> dict[str, Any]:
    """Docker's ImagePrune; see `Images.prune`."""
    chosen = dict(filters)
    named_too = not is_true("dangling", words(chosen.pop("dangling", None)) or ["true"])
    records: list[dict[str, str]] = []
    from .variants import kept

    together = kept(images)
    for image in images.list(filters=chosen):
        tags = images.catalog.tags(image.id)
        if ((tags or image.id in together) and not named_too) or images.catalog.containers_of(image.id):
            continue
        records += [_untagged(images, image, name) for name in _names_of(images, image)]
        images.catalog.delete(image.id)
        images.db.add_event("image", "delete", image.id, {"name": image.id})
        records.append({"Deleted": image.id})
    freed = sweep(images)
    images.db.add_event("image", "prune", "", {"reclaimed": str(freed)})
    return {"ImagesDeleted": records, "SpaceReclaimed": freed}


def sweep(images: Images) -> int:
    """Remove all content that nothing needs; see `Images.sweep`. Raises StoreError when others add content for long."""
    images.catalog.forget_hidden()
    with images.locks.exclusive("content", timeout_s=ADDING_WAIT_S):
        needed_layers = images.catalog.needed_layers()
        unneeded = [path for path in images.layout.layers.iterdir() if f"sha256:{path.name}" not in needed_layers]
        freed = _remove_layers(images, unneeded)
        needed = images.needed_blobs()
        freed += sum(images.blobs.remove(digest) for digest in list(images.blobs) if digest not in needed)
        for left in sweep_temporary(images.layout):
            _remove_tree(images, left)
    return freed


def drop_unneeded(images: Images, diff_ids: Iterable[str], digests: Iterable[str]) -> None:
    """Take back layers and blobs that a failed pull or load added, except those that something needs by now."""
    diff_ids, digests = set(diff_ids), set(digests)
    if not diff_ids and not digests:
        return
    # As in `rmi`: while somebody else adds content it is left to the next prune.
    with images.locks.try_exclusive("content") as alone:
        if alone:
            gone = diff_ids - images.catalog.needed_layers()
            _remove_layers(images, [images.layout.layer_dir(diff_id) for diff_id in gone])
            for digest in digests - images.needed_blobs():
                images.blobs.remove(digest)


def forget_unpacked(images: Images) -> None:
    """Remove every unpacked layer; they are a cache, and come back from their blobs."""
    with images.locks.exclusive("content", timeout_s=ADDING_WAIT_S):
        _remove_layers(images, list(images.layout.layers.iterdir()))


def find_name(images: Images, image: Image, ref: str) -> str | None:
    """The canonical name that `ref` is, None when `ref` is an id (or a prefix of one)."""
    try:
        wanted = reference.parse(ref).with_default_tag()
    except LabkernelError:
        return None
    if wanted.digest:
        name = f"{wanted.name}@{wanted.digest}"
        return name if images.catalog.find_by_repo_digest(name) == image.id else None
    return str(wanted) if images.catalog.find_by_tag(str(wanted)) == image.id else None


def _delete(images: Images, image: Image, names: Iterable[str]) -> list[dict[str, str]]:
    layers, manifest = image.layers, images.catalog_row(image).manifest
    records = [_untagged(images, image, name) for name in names]
    images.catalog.delete(image.id)
    images.catalog.forget_hidden()
    images.db.add_event("image", "delete", image.id, {"name": image.id})
    records.append({"Deleted": image.id})
    # Not worth waiting for: content left because somebody adds some just now is found by the next prune.
    with images.locks.try_exclusive("content") as alone:
        if alone:
            needed = images.catalog.needed_layers()
            gone = [layer.diff_id for layer in layers if layer.diff_id not in needed]
            _remove_layers(images, [images.layout.layer_dir(diff_id) for diff_id in gone])
            records += [{"Deleted": diff_id} for diff_id in gone]
            named = images.needed_blobs()
            for digest in {image.id, manifest, *(layer.digest for layer in layers)} - named:
                images.blobs.remove(digest)
    return records


def _remove_layers(images: Images, paths: Iterable[Path]) -> int:
    """Remove unpacked layers; returns the bytes of their files as recorded when they were unpacked."""
    present = [path for path in paths if path.is_dir() and path.parent == images.layout.layers]
    sizes = {row["diff_id"]: row["size_bytes"] for row in images.db.query("SELECT diff_id, size_bytes FROM layers")}
    diff_ids = [f"sha256:{path.name}" for path in present]
    images.catalog.forget_layers(diff_ids)
    for path in present:
        # Renamed first: a layer directory is either complete or not there.
        grave = images.layout.tmp / f"removed-{os.getpid()}-{secrets.token_hex(6)}"
        images.move_layer(path, grave)
        _remove_tree(images, grave)
    return sum(sizes.get(diff_id, 0) for diff_id in diff_ids)


def _remove_tree(images: Images, path: Path) -> None:
    # First as we are, which is enough for root and for a single mapped id; else the namespaces' root does it.
    with suppress(OSError):
        remove_tree(str(path))
    if os.path.lexists(path):
        images.runtime.task("labkernel.oci.layer:discard", paths=[str(path)])


def _untagged(images: Images, image: Image, name: str) -> dict[str, str]:
    familiar = reference.parse(name).familiar
    images.tell(image, "untag", familiar)
    return {"Untagged": familiar}


def _refuse_while_used(images: Images, image: Image, ref: str) -> None:
    user = _find_user(images, image)
    if user:
        raise ConflictError(
            f'conflict: unable to remove repository reference "{ref}" (must force) - container {user[:12]} is using '
            f"its referenced image {image.short_id[7:]}",
            resolution=f"remove the container first (`labkernel rm {user[:12]}`), or `rmi -f`",
        )


def _refuse_by_id(images: Images, image: Image, names: list[str], *, force: bool) -> None:
    short = image.short_id[7:]
    running = _find_user(images, image, running=True)
    if running:
        raise ConflictError(
            f"conflict: unable to delete {short} (cannot be forced) - image is being used by running container "
            f"{running[:12]}",
            resolution=f"stop it first: `labkernel rm -f {running[:12]}`",
        )
    if force:
        return
    if not _are_one(names):
        raise ConflictError(
            f"conflict: unable to delete {short} (must be forced) - image is referenced in multiple repositories",
            resolution="name the tag to remove, or use `rmi -f`",
        )
    stopped = _find_user(images, image)
    if stopped:
        raise ConflictError(
            f"conflict: unable to delete {short} (must be forced) - image is being used by stopped container "
            f"{stopped[:12]}",
            resolution=f"remove the container first (`labkernel rm {stopped[:12]}`), or `rmi -f`",
        )


def _find_user(images: Images, image: Image, *, running: bool = False) -> str | None:
    """Id of a container of the image (a running one), None when there is none. Rows of vanished ones do not count."""
    for id, _name in images.catalog.containers_of(image.id):
        directory = images.layout.container_dir(id)
        if directory.is_dir() and (not running or _is_running(directory)):
            return id
    return None


def _is_running(directory: Path) -> bool:
    try:
        state = json.loads((directory / "state.json").read_bytes())
    except (OSError, ValueError):
        return False
    pid = state.get("pid") or 0
    # After a reboot the last state is still on disk; its process is not.
    return state.get("status") in {"running", "paused", "restarting"} and os.path.exists(f"/proc/{pid}")
