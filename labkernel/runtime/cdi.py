"""Devices by name, as their vendors describe them in files: what the files say, and what a container gets of it.

A device such as `vendor.com/gpu=0` stands for edits of a container's config: nodes, mounts, variables, groups. Left out
are hooks, network devices and resource control, which are refused by name where a device has them, and whether a build
may have a device (building/devices.py). Source: Container Device Interface, SPEC.md, up to version 1.1.0.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import UsageError
from ..linux.mounts import parse_options
from .sharing import CDI_NAME, device_rules
from .spec import order_mounts

VARIABLE = "LABKERNEL_CDI_SPEC_DIRS"
DIRECTORIES = ("/etc/cdi", "/var/run/cdi")

_SUFFIXES = (".json", ".yaml", ".yml")
_LARGEST_BYTES = 8 << 20
_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
_TRUE = ("1", "t", "T", "true", "True", "TRUE")
_DEFAULT_MODE = 0o666  # of a node whose description has none, as runc and crun make it


class Node(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class Mount(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    host_path: str
    container_path: str
    options: list[str] = []
    type: str = ""


class Hook(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    hook_name: str
    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None


class Edits(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    env: list[str] = []
    device_nodes: list[Node] = []
    net_devices: list[dict[str, str]] = []
    mounts: list[Mount] = []
    hooks: list[Hook] = []
    intel_rdt: dict[str, Any] | None = None
    additional_gids: list[int] = []

    def is_empty(self) -> bool:
        return self == Edits()


class _Device(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    name: str
    container_edits: Edits
    annotations: dict[str, str] = {}


class _Spec(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    cdi_version: str
    kind: str
    devices: list[_Device]
    container_edits: Edits = msgspec.field(default_factory=Edits)
    annotations: dict[str, str] = {}


@dataclass(frozen=True)
class Device:
    """A device of a file. `edits`: the file's own, which all its devices share, then those of the device."""

    name: str
    path: str
    shared: Edits
    own: Edits
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.partition("=")[0]

    @property
    def allowed_to_builds(self) -> bool:
        """Whether its description lets every build have it, by BuildKit's annotation."""
        return self.annotations.get("org.mobyproject.buildkit.device.autoallow") in _TRUE


@dataclass(frozen=True)
class Registry:
    """What the files of this machine say. `problems`: path -> why nothing of that file counts; `conflicts`: name ->
    the files of one directory that both describe it, so that nobody can tell which one is meant."""

    devices: Mapping[str, Device]
    problems: Mapping[str, str]
    conflicts: Mapping[str, Sequence[str]]
    directories: Sequence[str]

    def find(self, name: str) -> Device:
        """The device of that full name. Raises UsageError, which names the files that could not be used."""
        found = self.devices.get(name)
        if found is None:
            raise self.unknown(name)
        return found

    def unknown(self, name: str) -> UsageError:
        """Why there is no such device."""
        if name in self.conflicts:
            files = " and ".join(self.conflicts[name])
            return UsageError(f'CDI device "{name}" is described twice: {files}', resolution="remove one of them")
        details = "\n".join(f"{path}: {why}" for path, why in self.problems.items()) or None
        near = difflib.get_close_matches(name, self.devices, 1, 0.75)
        places = ", ".join(self.directories)
        if near:
            hint = f"did you mean {near[0]}?"
        elif self.devices:
            hint = f"there is: {', '.join(sorted(self.devices))}"
        else:
            hint = f"no device is described in {places} ({VARIABLE} names other directories)"
        brief = f'unresolvable CDI device "{name}"'
        if details:
            brief += f"; {len(self.problems)} of the files could not be used"
        return UsageError(brief, details=details, resolution=hint)


def directories() -> list[str]:
    """Where descriptions are looked for; a later one counts more."""
    given = os.environ.get(VARIABLE)
    return list(DIRECTORIES) if given is None else [path for path in given.split(os.pathsep) if path]


def read(places: Sequence[str] | None = None) -> Registry:
    """All descriptions in `places` (default: `directories()`). A file that is wrong takes only its own devices away."""
    places = directories() if places is None else list(places)
    devices: dict[str, Device] = {}
    problems: dict[str, str] = {}
    conflicts: dict[str, list[str]] = {}
    for place in places:
        here: dict[str, list[Device]] = {}
        for path in _files(place):
            try:
                for device in _parse(path):
                    here.setdefault(device.name, []).append(device)
            except (OSError, ValueError, UsageError) as err:
                problems[path] = _reason(err)
        for name, found in here.items():
            devices.pop(name, None)
            conflicts.pop(name, None)
            if len(found) == 1:
                devices[name] = found[0]
            else:
                conflicts[name] = [device.path for device in found]
    return Registry(devices, problems, conflicts, places)


def apply(config: dict[str, Any], found: Sequence[Device], driver: str) -> None:
    """Put the devices into a runtime-spec config. Raises UsageError for what cannot be had here."""
    done: set[str] = set()
    for device in found:
        for edits in (device.shared if device.path not in done else Edits(), device.own):
            try:
                _refuse(edits)
                _edit(config, edits, driver)
            except UsageError as err:
                brief = f'CDI device "{device.name}" ({device.path}): {err.brief}'
                raise UsageError(brief, resolution=err.resolution) from None
        done.add(device.path)


# -- files -----------------------------------------------------------------------------------------------------------


def _files(place: str) -> list[str]:
    try:
        names = sorted(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return [f"{place.rstrip('/')}/{name}" for name in names if name.endswith(_SUFFIXES) and not name.startswith(".")]


def _parse(path: str) -> list[Device]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST_BYTES:
            raise UsageError(f"not a file of at most {_LARGEST_BYTES >> 20} MiB")
        data = file.read()
    if path.endswith(".json"):
        raw = json.loads(data)
    else:
        import yaml  # takes 30 ms, and most machines have no such file

        try:
            raw = yaml.safe_load(data)
        except yaml.YAMLError as err:
            raise UsageError(" ".join(str(err).split())) from None
    spec = msgspec.convert(raw, _Spec)
    _check(spec)
    return [
        Device(
            name=f"{spec.kind}={device.name}",
            path=path,
            shared=spec.container_edits,
            own=device.container_edits,
            annotations={**spec.annotations, **device.annotations},
        )
        for device in spec.devices
    ]


def _reason(err: Exception) -> str:
    if isinstance(err, UsageError):
        return err.brief
    return (err.strerror or str(err)) if isinstance(err, OSError) else str(err)


def _check(spec: _Spec) -> None:
    """What the types do not say. Raises UsageError."""
    version = spec.cdi_version.removeprefix("v")
    if version not in _VERSIONS:
        raise UsageError(f'unknown cdiVersion "{spec.cdi_version}" (known: {_VERSIONS[0]} to {_VERSIONS[-1]})')
    if not CDI_NAME.fullmatch(f"{spec.kind}=x"):
        raise UsageError(f'invalid kind "{spec.kind}": it is VENDOR/CLASS')
    if not spec.devices:
        raise UsageError("it describes no device")
    names = [device.name for device in spec.devices]
    for device in spec.devices:
        if not CDI_NAME.fullmatch(f"{spec.kind}={device.name}"):
            raise UsageError(f'invalid name of a device: "{device.name}"')
        if names.count(device.name) > 1:
            raise UsageError(f'the device "{device.name}" is described twice')
        if device.container_edits.is_empty():
            raise UsageError(f'the device "{device.name}" has no containerEdits')
    for edits in (spec.container_edits, *(device.container_edits for device in spec.devices)):
        _check_edits(edits)
    needed = max(_needed(spec), key=lambda item: _VERSIONS.index(item[0]), default=("0.1.0", ""))
    if _VERSIONS.index(needed[0]) > max(_VERSIONS.index(version), _VERSIONS.index("0.3.0")):
        raise UsageError(f"cdiVersion {version} has no {needed[1]}; that came with {needed[0]}")


def _needed(spec: _Spec) -> list[tuple[str, str]]:
    """(version, what) for all that is newer than 0.3.0."""
    every = [spec.container_edits, *(device.container_edits for device in spec.devices)]
    asked = {
        ("0.4.0", "type of a mount"): any(mount.type for edits in every for mount in edits.mounts),
        ("0.5.0", "hostPath of a node"): any(node.host_path for edits in every for node in edits.device_nodes),
        ("0.5.0", "name of a device that begins with a digit"): any(d.name[0].isdigit() for d in spec.devices),
        ("0.6.0", "annotations"): bool(spec.annotations or any(device.annotations for device in spec.devices)),
        ("0.6.0", "dot in the class of a kind"): "." in spec.kind.partition("/")[2],
        ("0.7.0", "intelRdt"): any(edits.intel_rdt is not None for edits in every),
        ("0.7.0", "additionalGids"): any(edits.additional_gids for edits in every),
        ("1.1.0", "netDevices"): any(edits.net_devices for edits in every),
    }
    return [item for item, there in asked.items() if there]


def _check_edits(edits: Edits) -> None:
    for word in edits.env:
        if word.find("=") < 1:
            raise UsageError(f'invalid variable "{word}" of env: it is NAME=VALUE')
    for node in edits.device_nodes:
        if not node.path.startswith("/") or (node.host_path and not node.host_path.startswith("/")):
            raise UsageError(f'the path of a node is not absolute: "{node.host_path or node.path}"')
        if node.type not in ("", "b", "c", "u", "p"):
            raise UsageError(f'invalid type "{node.type}" of the node {node.path}: one of b, c, u, p')
        if node.permissions != "none" and not set(node.permissions) <= set("rwm"):
            raise UsageError(f'invalid permissions "{node.permissions}" of the node {node.path}: of r, w, m')
        numbers = (node.major, node.minor, node.file_mode or 0, node.uid or 0, node.gid or 0)
        if any(not 0 <= number < 1 << 32 for number in numbers) or (node.file_mode or 0) > 0o7777:
            raise UsageError(f"a number of the node {node.path} is out of range")
    for mount in edits.mounts:
        if not mount.container_path.startswith("/") or not mount.host_path:
            raise UsageError(f'invalid mount "{mount.host_path}" at "{mount.container_path}"')
    if any(not 0 <= number < 1 << 32 for number in edits.additional_gids):
        raise UsageError("a number of additionalGids is out of range")


# -- a container's config ----------------------------------------------------------------------------------------------


def _refuse(edits: Edits) -> None:
    """Raises UsageError for edits that mean programs or parts of the machine which a container here cannot be given."""
    if edits.hooks:
        names = ", ".join(f"{hook.hook_name} {hook.path}" for hook in edits.hooks)
        raise UsageError(
            f"it needs hooks, which are not run here: {names}",
            resolution="a hook is a program of this machine that runs as its user, outside of the container",
        )
    if edits.net_devices:
        raise UsageError("it needs netDevices, which are not moved into containers here")
    if edits.intel_rdt is not None:
        raise UsageError("it needs intelRdt, which is not set up here")


def _edit(config: dict[str, Any], edits: Edits, driver: str) -> None:
    process, linux = config["process"], config["linux"]
    if edits.env:
        given = dict(word.split("=", 1) for word in edits.env)
        kept = [word for word in process["env"] if word.partition("=")[0] not in given]
        process["env"] = [*kept, *(f"{name}={value}" for name, value in given.items())]
    user = process["user"]
    for node in edits.device_nodes:
        made = _finalize_node(node, user, driver)
        others = [other for other in linux.get("devices") or () if other["path"] != made["path"]]
        linux["devices"] = [*others, made]
        rules = (linux.get("resources") or {}).get("devices")
        if rules is not None and made["access"] and made["type"] != "p":
            rules.extend(device_rules([made]))
    if edits.mounts:
        new = [_finalize_mount(mount) for mount in edits.mounts]
        places = {mount["destination"] for mount in new}
        config["mounts"] = order_mounts([*(m for m in config["mounts"] if m["destination"] not in places), *new])
    gids = [gid for gid in edits.additional_gids if gid]
    if gids:
        user["additionalGids"] = list(dict.fromkeys([*(user.get("additionalGids") or ()), *gids]))


def _finalize_node(node: Node, user: Mapping[str, Any], driver: str) -> dict[str, Any]:
    source = node.host_path or node.path
    kind, major, minor = "c" if node.type == "u" else node.type, node.major, node.minor
    try:
        info = os.stat(source)
    except OSError as err:
        info = None
        if kind != "p" and (driver != "root" or not kind or not major):
            raise UsageError(f"its node {source} is not there: {(err.strerror or '').lower()}") from None
    if info is not None and kind != "p":
        there = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
        if not there:
            raise UsageError(f"{source} is not a device node")
        if kind and kind != there:
            raise UsageError(f"{source} is a device of type {there}, not {kind}")
        if not major:
            major, minor = os.major(info.st_rdev), os.minor(info.st_rdev)
        elif driver != "root" and (major, minor) != (os.major(info.st_rdev), os.minor(info.st_rdev)):
            raise UsageError(f"{source} is not {major}:{minor}, and only the driver root makes another node")
        kind = there
    if kind == "p" and driver == "proot":
        raise UsageError(f"the driver proot makes no named pipe ({node.path})")
    return {
        "path": node.path,
        "type": kind,
        "major": major,
        "minor": minor,
        "fileMode": _DEFAULT_MODE if node.file_mode is None else node.file_mode,
        "uid": node.uid if node.uid is not None else user.get("uid", 0),
        "gid": node.gid if node.gid is not None else user.get("gid", 0),
        "source": source,
        "access": "" if node.permissions == "none" else node.permissions or "rwm",
    }


def _finalize_mount(mount: Mount) -> dict[str, Any]:
    options = list(mount.options)
    kind = mount.type or "bind"
    if kind == "bind":
        unknown = parse_options(options)[2]
        if unknown:
            raise UsageError(f'unknown option "{unknown}" of its mount {mount.container_path}')
        if not {"bind", "rbind"} & set(options):
            options.append("rbind")
        if not os.path.exists(mount.host_path):
            raise UsageError(f"its mount {mount.host_path} is not there")
    elif kind != "tmpfs":
        raise UsageError(f'its mount {mount.container_path} is of type "{kind}": only bind and tmpfs are made here')
    return {
        "destination": os.path.normpath(mount.container_path),
        "type": kind,
        "source": mount.host_path,
        "options": options,
    }
