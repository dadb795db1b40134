"""Which CDI devices a RUN gets: those its `--device` flags name, if the build is allowed them.

A Dockerfile of somebody else's must not reach into the machine by itself, so a device needs the entitlement `device` of
whoever builds, unless its description allows it to every build. Source: Dockerfile reference, RUN --device; BuildKit's
documentation, cdi.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..dockerfile.flags import parse_device
from ..errors import UsageError
from ..runtime.sharing import CDI_NAME

if TYPE_CHECKING:
    from ..runtime.cdi import Device, Registry

# The annotation of a description (or of one device in it) by which BuildKit names several.
_CLASS = "org.mobyproject.buildkit.device.class"


def allowed_device(word: str) -> tuple[str, str]:
    """`device=NAME[,alias=OTHER]` of --allow: (what a Dockerfile calls it, the device meant). Raises UsageError."""
    name, *rest = word.removeprefix("device=").split(",")
    alias = name
    for field in rest:
        key, equals, value = field.partition("=")
        if key != "alias" or not equals or not value:
            raise UsageError(f"invalid entitlement: {word}", resolution="device=VENDOR/CLASS=NAME[,alias=NAME]")
        alias = value
    _check_name(name)
    return alias, name


def granted_devices(flags: Sequence[str], allow: Iterable[str], warn: Callable[[str], None]) -> tuple[Device, ...]:
    """The devices that the `--device` words mean, each once. Raises UsageError for one that is required and
    not there, and for one that is there and not allowed."""
    from ..runtime import cdi

    registry = cdi.read()
    given = list(allow)
    everything = "device" in given
    named = dict(allowed_device(word) for word in given if word.startswith("device="))
    granted = {device.name for name in named.values() for device in _find(registry, name)}
    found: dict[str, Device] = {}
    for flag in flags:
        asked, required = parse_device(flag)
        name = named.get(asked, asked)
        _check_name(name)
        devices = _find(registry, name)
        if not devices:
            _missing(registry, name, flag, warn, required=required)
        refused = [
            device.name
            for device in devices
            if not everything and device.name not in granted and not device.allowed_to_builds
        ]
        if refused:
            what = f"device {refused[0]} is" if len(refused) == 1 else f"devices {', '.join(refused)} are"
            raise UsageError(
                f"{what} requested by the build but not allowed",
                resolution=f"allow it to this build: --allow device={name}, or --allow device for every one",
            )
        found.update({device.name: device for device in devices})
    return tuple(found.values())


def _check_name(name: str) -> None:
    full = name if "=" in name else f"{name}=x"
    if not CDI_NAME.fullmatch(full.removesuffix("*") + "x" if full.endswith("=*") else full):
        raise UsageError(f'invalid device "{name}"', resolution="VENDOR/CLASS=NAME, VENDOR/CLASS=* or VENDOR/CLASS")


def _find(registry: Registry, name: str) -> list[Device]:
    """One device, `*` for all of their kind, nothing for its first, or the name of a class of them."""
    kind, _, device = name.partition("=")
    alike = [found for _, found in sorted(registry.devices.items()) if found.kind == kind]
    if not device:
        return alike[:1]
    if device == "*":
        return alike
    exact = [found for found in alike if found.name == name]
    return exact or [found for found in alike if found.annotations.get(_CLASS) == device]


def _missing(registry: Registry, name: str, flag: str, warn: Callable[[str], None], *, required: bool) -> None:
    why = registry.unknown(name)
    if required:
        brief = f'required device "{name}" is not registered'
        if name in registry.conflicts:
            brief = f"{brief}: {why.brief}"
        raise UsageError(brief, details=why.details, resolution=why.resolution)
    warn(f'RUN --device={flag}: device "{name}" is not registered, the step runs without it')
    for path, problem in registry.problems.items():
        warn(f"RUN --device={flag}: {path} cannot be used: {problem}")
