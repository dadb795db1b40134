"""Platforms: what this machine runs, and which manifest of an index fits. Source: OCI image-spec image-index.md."""

from __future__ import annotations

import platform as machines
import re
from collections.abc import Mapping
from typing import Any

from labkernel.errors import ManifestError, UsageError

from .manifest import INDEXES, MANIFESTS, Descriptor, Index, Platform

_ARCHITECTURES = {
    "x86_64": ("amd64", None),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", None),
    "i386": ("386", None),
    "loongarch64": ("loong64", None),
}
_ALIASES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "armhf": "arm", "armel": "arm"}
_NORMAL = {("arm64", "v8"): None, ("amd64", "v1"): None}
_WORD = re.compile(r"[A-Za-z0-9_.-]+")


def host_platform() -> Platform:
    """What images for this machine are for."""
    name = machines.machine()
    architecture, variant = _ARCHITECTURES.get(name, (name, None))
    return Platform(architecture=architecture, os="linux", variant=variant)


def parse_platform(text: str) -> Platform:
    """`linux/arm64`, `linux/arm/v7` or `arm64`, as docker's --platform takes it. Raises UsageError."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(_WORD.fullmatch(part) for part in parts):
        raise UsageError(f'"{text}" is an invalid platform', resolution="os/architecture[/variant], e.g. linux/arm64")
    if len(parts) == 1:
        parts = [parts[0], host_platform().architecture] if parts[0].lower() == "linux" else ["linux", parts[0]]
    system, architecture, *variant = (part.lower() for part in parts)
    return Platform(
        os=system, architecture=_ALIASES.get(architecture, architecture), variant=variant[0] if variant else None
    )


def normal(platform: Platform) -> Platform:
    """The form in which builders name it: no v8 for arm64, v7 for arm."""
    variant = (platform.variant or "").lower()
    if platform.architecture in ("arm", "arm64") and variant.isdigit():
        variant = f"v{variant}"
    if platform.architecture == "arm" and not variant:
        variant = "v7"
    if (platform.architecture, variant) in _NORMAL:
        variant = ""
    return Platform(os=platform.os, architecture=platform.architecture, variant=variant or None)


def rank(offered: Platform, wanted: Platform) -> int:
    """How well a platform fits: 0 not at all, more is better. An older variant of the same architecture still runs."""
    if offered.os != wanted.os or offered.architecture != wanted.architecture:
        return 0
    have, want = _variant(offered), _variant(wanted)
    if have == want:
        return 100
    number, limit = _level(have, offered), _level(want, wanted)
    return 1 + number if number <= limit else 0


def choose(index: Index, wanted: Platform) -> Descriptor:
    """The manifest (or inner index) of the index for `wanted`; the first of equals. Raises ManifestError for none."""
    best: tuple[int, Descriptor | None] = (0, None)
    for descriptor in index.manifests:
        if descriptor.media_type not in MANIFESTS | INDEXES:
            continue
        fits = 1 if descriptor.platform is None else rank(descriptor.platform, wanted) * 2
        if fits > best[0]:
            best = (fits, descriptor)
    if best[1] is None:
        offered = sorted(
            {str(each.platform) for each in index.manifests if each.platform and each.platform.os != "unknown"}
        )
        raise ManifestError(
            f"no matching manifest for {wanted} in the manifest list entries",
            resolution=f"there are: {', '.join(offered[:20]) or 'none'} (choose with --platform)",
        )
    return best[1]


def _variant(platform: Platform) -> str | None:
    return _NORMAL.get((platform.architecture, platform.variant or ""), platform.variant)


def _level(variant: str | None, platform: Platform) -> int:
    if variant and variant[:1] == "v" and variant[1:].isdigit():
        return min(int(variant[1:]), 50)
    return {"arm": 7, "arm64": 8}.get(platform.architecture, 1)


def fits(document: Mapping[str, Any], wanted: Platform) -> bool:
    """Whether an image of this config document runs on `wanted`. What it does not say is taken to fit."""
    offered = Platform(
        os=str(document.get("os") or "linux"),
        architecture=str(document.get("architecture") or wanted.architecture),
        variant=document.get("variant"),
    )
    return rank(offered, wanted) > 0
