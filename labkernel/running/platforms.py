"""For which platform a container's image is: the one asked for with `--platform`, and a warning where none was asked
for and the image is another machine's. Whether its programs run is the kernel's to say, when they are executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..imaging.image import Image


def check(image: Image, settings: Mapping[str, Any]) -> list[str]:
    """Warnings. Raises UsageError when the image is not for the platform asked for."""
    from ..linux import elf

    asked = settings.get("platform")
    if not image.architecture or (not asked and elf.native(image.architecture)):
        return []
    from ..oci.platforms import fits, host_platform, parse_platform

    actual = f"{image.raw_config.get('os') or 'linux'}/{image.architecture}"
    if not asked:
        return [
            f"The requested image's platform ({actual}) does not match the detected host platform "
            f"({host_platform()}) and no specific platform was requested"
        ]
    wanted = parse_platform(str(asked))
    if not fits(image.raw_config, wanted):
        raise UsageError(
            f"image with reference {image.short_id} was found but does not match the specified platform: "
            f"wanted {wanted}, actual: {actual}"
        )
    return []
