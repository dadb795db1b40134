"""Images of one name for several platforms: the tag names one of them, the others are remembered beside it.

`FROM --platform=$BUILDPLATFORM golang` and `FROM golang` in one Dockerfile need two images of one name, and a tag is
one image's. So what is fetched for another platform than the tag's stays without a tag, and is found again here by name
and platform, until the tag moves, or `prune` takes it with the other images that have no name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import ImageError, InvalidReference, NoSuchImage, UsageError
from ..oci import manifest as oci
from ..oci import platforms, reference
from ..oci.manifest import Platform

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image


def find_for(images: Images, ref: str, wanted: Platform) -> Image | None:
    """The stored image of that name for that platform; None where there is none."""
    image = images.find(ref)
    if image is not None and platforms.fits(image.raw_config, wanted):
        return image
    name = _name(ref)
    id, beside = (images.db.setting(_key(name, wanted)) if name is not None else None) or (None, None)
    if id is None or beside != (image.id if image else None):
        return None  # what the name means now came later, and so may have what it means for others
    found = images.find(id)
    return found if found is not None and platforms.fits(found.raw_config, wanted) else None


def resolve_for(
    images: Images,
    ref: str,
    wanted: Platform,
    *,
    notify: Callable[[str], None],
    ask: bool = True,
    fresh: bool = False,
    tagged: bool = True,
) -> Image:
    """As `Images.resolve`, for one platform. The tag is left to an image that has it, and unless `tagged` to one for
    this machine. `fresh`: where a registry answers, as it is there now.

    Raises UsageError when the name is known for other platforms only."""
    found = find_for(images, ref, wanted)
    name = _name(ref)
    if (found is not None and not fresh) or name is None:
        return found or _refuse(images, ref, wanted)
    builtin = images.is_builtin(name)
    if ask and not builtin and images.registry_answers(name.domain):
        return _pull(images, name, wanted, notify, tagged=tagged)
    if found is not None:
        return found
    if not platforms.fits({"architecture": platforms.host_platform().architecture}, wanted):
        if builtin:
            raise ImageError(
                f"{name.familiar_name} is made of this machine's own programs, so there is none for {wanted}",
                resolution="import a root file system: `labkernel import --platform OS/ARCH FILE.tar NAME`",
            )
        if images.find(ref) is None:
            raise NoSuchImage(
                name.familiar, resolution=f"for {wanted} it has to come from {name.domain}, which does not answer"
            )
    elif images.find(ref) is None:
        return images.resolve(ref, notify=notify, ask=ask)
    return _refuse(images, ref, wanted)


def remember(images: Images, name: reference.Reference, wanted: Platform, image: Image) -> None:
    """That `image` is what `name` means for `wanted` while its tag stays where it is."""
    now = images.find(str(name))
    images.db.remember(_key(name, wanted), [image.id, now.id if now else None])


def remember_set(images: Images, name: reference.Reference, built: Mapping[Platform, Image]) -> None:
    """That these images were built together under `name`, whose tag is one of theirs: a push sends them all."""
    for wanted, image in built.items():
        remember(images, name, wanted, image)
    now = images.get(str(name))
    images.db.remember(f"images-of:{name}", [now.id, {str(wanted): image.id for wanted, image in built.items()}])


def set_of(images: Images, name: reference.Reference) -> dict[str, Image]:
    """The images that were built together under `name`, by platform, while its tag stays where it was.

    Raises ImageError when one of them was removed."""
    found = {platform: (id, images.find(id)) for platform, id in _ids_of(images, f"images-of:{name}").items()}
    for platform, (id, image) in found.items():
        if image is None:
            raise ImageError(
                f"of the images that were built together as {name.familiar}, the one for {platform} ({id[7:19]}) has "
                "been removed",
                resolution="build it again, or give the image you want a name of its own with `tag`",
            )
    return {platform: image for platform, (_, image) in found.items() if image is not None}


def kept(images: Images) -> set[str]:
    """Ids of images without a tag that were built together with one that has its tag still."""
    keys = [row[0] for row in images.db.query("SELECT key FROM settings WHERE key LIKE 'images-of:%'")]
    return {id for key in keys for id in _ids_of(images, key).values()}


def _ids_of(images: Images, key: str) -> dict[str, str]:
    tagged, ids = images.db.setting(key) or (None, {})
    now = images.catalog.find_by_tag(key.removeprefix("images-of:"))
    return ids if tagged is not None and tagged == now else {}


def copy_set(images: Images, ref: str, name: reference.Reference) -> None:
    """After `tag ref name`: what was built together under `ref` is so under `name`, too."""
    source = _name(ref)
    if source is None or not _ids_of(images, f"images-of:{source}"):
        return
    with suppress(ImageError):  # not all of them are there: then it is this image's name alone
        built = set_of(images, source)
        remember_set(images, name, {platforms.parse_platform(word): image for word, image in built.items()})


def index_of(images: Images, built: Mapping[str, Image]) -> oci.Index:
    """An index with one image for each platform (image-index.md)."""
    descriptors = []
    for platform, image in built.items():
        digest = images.catalog_row(image).manifest
        media_type = oci.parse_manifest(images.blobs.read(digest)).media_type or oci.OCI_MANIFEST
        size, of = images.blobs.size(digest), platforms.parse_platform(platform)
        descriptors.append(oci.Descriptor(media_type=media_type, digest=digest, size=size, platform=of))
    return oci.make_index(descriptors)


def _pull(
    images: Images, name: reference.Reference, wanted: Platform, notify: Callable[[str], None], *, tagged: bool
) -> Image:
    from .pulls import Pulls

    notify(f"Unable to find image '{name.familiar}' for {wanted} locally; pulling it from {name.domain}")
    known = images.find(str(name))
    if known is None:
        named = tagged or platforms.rank(wanted, platforms.host_platform()) > 0
    else:
        named = platforms.fits(known.raw_config, wanted)
    image = Pulls(images).pull(str(name), platform=str(wanted), notify=notify, named=named).image
    remember(images, name, wanted, image)
    return image


def _refuse(images: Images, ref: str, wanted: Platform) -> Image:
    image = images.get(ref)
    actual = "/".join(
        str(image.raw_config[part]) for part in ("os", "architecture", "variant") if image.raw_config.get(part)
    )
    raise UsageError(
        f"image with reference {ref} was found but does not match the specified platform: "
        f"wanted {wanted}, actual: {actual}"
    )


def _name(ref: str) -> reference.Reference | None:
    try:
        return reference.parse(ref).with_default_tag()
    except InvalidReference:
        return None  # an id


def _key(name: reference.Reference, wanted: Platform) -> str:
    return f"image-for:{wanted} {name}"
