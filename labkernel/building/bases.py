"""Which image a FROM or a --from means: the one in the store for the platform, one of a registry, a built-in base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import ImageError, InvalidReference, ManifestError, NoSuchImage, RegistryError, UsageError
from ..imaging.variants import find_for, resolve_for

if TYPE_CHECKING:
    from ..images import Images
    from ..imaging.image import Image
    from ..oci.manifest import Platform

Notify = Callable[[str], None]


def find_base(
    images: Images, name: str, platform: Platform, *, exact: bool, pull: bool, notify: Notify
) -> tuple[Image, bool]:
    """The image of that name and whether nothing was fetched; with `pull` asked for anew where a registry answers.

    Unless it has to be `exact`, an image of another platform will do where there is no other. Raises NoSuchImage,
    UsageError and what a pull raises."""
    found = None if pull else find_for(images, name, platform)
    if found is not None:
        return found, True
    if exact:
        return resolve_for(images, name, platform, notify=notify, fresh=pull, tagged=False), False
    local = images.find(name)
    if pull:
        found = _pulled(images, name, notify)
    elif local is not None:
        # It is here for another platform; a registry may have this one's.
        with suppress(RegistryError, ManifestError, ImageError, NoSuchImage, UsageError):
            found = resolve_for(images, name, platform, notify=notify, tagged=False)
    return found or images.resolve(name, notify=notify), local is not None and not pull


def _pulled(images: Images, name: str, notify: Notify) -> Image | None:
    from ..imaging import bases
    from ..oci import reference

    wanted = reference.parse(name).with_default_tag()
    if bases.is_builtin(wanted) or not images.registry_answers(wanted.domain):
        return None
    from ..imaging.pulls import Pulls

    return Pulls(images).pull(str(wanted), notify=notify).image


def canonical_tag(name: str) -> str | None:
    """As the catalogue has it; None for an id or a digest."""
    from ..oci import reference

    try:
        wanted = reference.parse(name).with_default_tag()
    except InvalidReference:
        return None
    return None if wanted.digest else str(wanted)
