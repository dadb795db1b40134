"""For which platforms a build is: `--platform` in words, the arguments a Dockerfile may ask for, and one image of each.

Source: Dockerfile reference, "Automatic platform ARGs in the global scope"; containerd's normal forms of platforms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ..oci import platforms
from ..oci.config import new_document
from ..oci.manifest import Platform

if TYPE_CHECKING:
    import tarfile

    from ..images import Images
    from ..imaging.image import Image
    from .result import BuildResult


def build_platform() -> Platform:
    """This machine's, where everything runs."""
    return platforms.normal(platforms.host_platform())


def targets(text: str | None) -> list[Platform]:
    """`linux/amd64,linux/arm64` as platforms, each once; nothing for nothing. Raises UsageError."""
    words = [word.strip() for word in (text or "").split(",")]
    return list(dict.fromkeys(platforms.normal(platforms.parse_platform(word)) for word in words if word))


def arguments(target: Platform) -> dict[str, str]:
    """The predefined ARGs: BUILDPLATFORM, TARGETARCH and their like."""
    found: dict[str, str] = {}
    for kind, platform in (("BUILD", build_platform()), ("TARGET", target)):
        found |= {
            f"{kind}PLATFORM": str(platform),
            f"{kind}OS": platform.os,
            f"{kind}OSVERSION": "",
            f"{kind}ARCH": platform.architecture,
            f"{kind}VARIANT": platform.variant or "",
        }
    return found


def empty_document(platform: Platform) -> dict[str, Any]:
    """The config of `FROM scratch` for a platform."""
    document = new_document(WorkingDir="/")
    document.pop("variant", None)
    document |= {"os": platform.os, "architecture": platform.architecture}
    if platform.variant:
        document["variant"] = platform.variant
    return document


def platform_of(document: Mapping[str, Any]) -> Platform:
    """What an image's config says it is for; this machine's where it says nothing."""
    return platforms.normal(
        Platform(
            os=str(document.get("os") or "linux"),
            architecture=str(document.get("architecture") or build_platform().architecture),
            variant=document.get("variant"),
        )
    )


def directory_name(platform: str) -> str:
    """Where an output of several platforms keeps one of them: `linux_arm64`."""
    return platform.replace("/", "_")


def joined(
    images: Images, wanted: Sequence[Platform], results: Sequence[BuildResult], tags: Sequence[str]
) -> BuildResult:
    """One result of the builds for several platforms; their names are set here, after the last one has succeeded."""
    from ..imaging.variants import remember_set
    from ..oci import reference
    from .result import BuildResult

    own = build_platform()
    built = dict(zip(wanted, (result.image for result in results), strict=True))
    first = next((image for platform, image in built.items() if platforms.rank(platform, own)), results[0].image)
    for tag in tags:
        images.tag(first.id, tag)
        remember_set(images, reference.parse_tag(tag), built)
    warnings = dict.fromkeys(line for result in results for line in result.warnings)
    return BuildResult(
        first,
        [step for result in results for step in result.steps],
        list(warnings),
        results[-1].duration_s,
        images={str(platform): image for platform, image in built.items()},
    )


def save_index(images: Images, built: Mapping[str, Image], names: Sequence[str], out: BinaryIO) -> None:
    """`--output type=oci` of several platforms: an image layout whose index has one image for each."""
    from ..imaging.variants import index_of
    from ..oci import archive
    from ..oci.reference import parse_tag

    rows = {image.id: images.catalog_row(image).manifest for image in built.values()}
    saved = [archive.SavedImage(image.id, rows[image.id], image.layers, []) for image in built.values()]
    tags = [str(parse_tag(name)) for name in names]
    archive.save_index(images.blobs, index_of(images, built).raw, saved, tags, out)


def export_all(images: Images, built: Mapping[str, Image], out: BinaryIO) -> None:
    """`--output type=tar` of several platforms: the files of each below a directory of its own (`linux_arm64/`)."""
    import tarfile
    import tempfile

    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for platform, image in built.items():
            top = tarfile.TarInfo(directory_name(platform))
            top.type, top.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(top)
            with tempfile.TemporaryFile(dir=images.layout.tmp) as file:
                images.export_rootfs(image.id, file)
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as source:
                    for member in source:
                        _add_below(tar, directory_name(platform), member, source)


def _add_below(tar: tarfile.TarFile, folder: str, member: tarfile.TarInfo, source: tarfile.TarFile) -> None:
    name = member.name.removeprefix("./").strip("/")
    if not name or name == ".":
        return
    member.name = f"{folder}/{name}"
    if member.islnk():
        member.linkname = f"{folder}/{member.linkname.removeprefix('./').lstrip('/')}"
    member.pax_headers = {key: value for key, value in member.pax_headers.items() if key not in ("path", "linkpath")}
    tar.addfile(member, source.extractfile(member) if member.isreg() else None)
