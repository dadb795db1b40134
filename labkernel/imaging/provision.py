"""What a new container needs before its configuration can be written: volumes, a system call filter, warnings.

Part of the containers service, which calls it while it creates; nothing here knows the database's containers.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, UsageError
from ..runtime import prootprogram
from ..runtime.devicelimits import RATES
from ..runtime.driver import Driver
from ..runtime.spec import finalize_capabilities, network_mode, security_options
from ..volumes import ANONYMOUS_LABEL, Volumes

if TYPE_CHECKING:
    from pathlib import Path

    from ..running.container import Container

_LIMITS = {
    "memory": ("mem_limit", "mem_reservation", "memswap_limit"),
    "cpu": ("nano_cpus", "cpu_quota", "cpu_shares", "cpu_period"),
    "pids": ("pids_limit",),
    "cpuset": ("cpuset_cpus", "cpuset_mems"),
    "blkio": ("blkio_weight", "blkio_weight_device", *RATES),
}


def find_warnings(driver: Driver, settings: Mapping[str, Any]) -> list[str]:
    """What of the settings does not hold on this machine or in this release."""
    if driver.name == "proot":
        return prootprogram.warnings(settings, network=network_mode(settings))
    found: list[str] = []
    causes = {capability.name: capability.cause for capability in driver.capabilities}
    for controller, keys in _LIMITS.items():
        if driver.cgroups.get(controller) != "kernel" and any(settings.get(key) for key in keys):
            cause = causes.get(f"cgroup {controller}") or "no such cgroup"
            found.append(f"the {controller} limit is not enforced here: {cause}")
    if driver.cgroups.get("memory") != "kernel" and settings.get("mem_swappiness", -1) not in (None, -1):
        found.append("--memory-swappiness is not possible here: no memory cgroup")
    if driver.cgroups.get("devices") != "kernel" and settings.get("device_cgroup_rules"):
        found.append("--device-cgroup-rule is not possible here: no devices cgroup")
    if driver.cgroup_version == 0 and settings.get("cgroup_parent"):
        found.append("--cgroup-parent is not possible here: no cgroup can be made")
    if settings.get("oom_kill_disable") and not settings.get("mem_limit"):
        found.append("OOM killer is disabled for the container, but no memory limit is set: this machine may run out")
    mode = network_mode(settings)
    if mode in ("none", "host") and (settings.get("ports") or settings.get("publish_all_ports")):
        found.append(f"Published ports are discarded when using {mode} network mode")
    if driver.single_id and settings.get("group_add"):
        found.append("--group-add is not possible for a user with one id only")
    if needs_no_mknod(driver, settings):
        found.append("CAP_MKNOD is dropped: no device cgroup keeps the container from the machine's devices")
    if driver.overlay == "copy":
        found += [line for line in driver.warnings if line.startswith("no overlay")]
    return found


def make_mounts(
    volumes: Volumes,
    image_config: Mapping[str, Any],
    settings: Mapping[str, Any],
    layers: Sequence[str],
    anonymous: list[str],
    inherited: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Volumes and bind mounts, as the container's record keeps them; makes the volumes and directories they name.

    `inherited` are those of other containers (`--volumes-from`); what is asked for at the same place wins.

    `layers` are the image's directories, top first, for copy-up. Names of new anonymous volumes go to `anonymous` at
    once, so that the caller can take them back when something later fails."""
    wanted: list[Mapping[str, Any]] = [
        {"type": "bind" if volume["source"].startswith("/") else "volume", **volume}
        for volume in settings.get("volumes", ())
    ]
    wanted += settings.get("mounts", ())
    taken = {mount["destination"] for mount in wanted} | {os.path.normpath(p) for p in settings.get("tmpfs", ())}
    given = {mount["destination"]: dict(mount) for mount in inherited if mount["destination"] not in taken}
    for path in image_config.get("Volumes") or ():
        place = os.path.normpath(path)
        if place not in taken and place not in given:
            wanted.append({"type": "volume", "source": "", "destination": place, "mode": "rw"})
    return [*given.values(), *(_make_mount(volumes, mount, layers, anonymous) for mount in wanted)]


def inherited_mounts(settings: Mapping[str, Any], find: Callable[[str], Container]) -> list[dict[str, Any]]:
    """The mounts of the containers that `volumes_from` names (`NAME[:ro|rw]`), the last one wins."""
    found: dict[str, dict[str, Any]] = {}
    for word in settings.get("volumes_from", ()):
        name, _, mode = word.partition(":")
        if mode not in ("", "ro", "rw", "z", "Z"):
            raise UsageError(f"invalid volumes-from specification: {word}: invalid mode: {mode}")
        for mount in find(name).record.get("mounts", ()):
            if mount["type"] != "tmpfs":
                # It goes with the container it was made for.
                changed = {"anonymous": False} | ({"rw": False, "mode": "ro"} if mode == "ro" else {})
                found[mount["destination"]] = {**mount, **changed}
    return list(found.values())


def _make_mount(
    volumes: Volumes, mount: Mapping[str, Any], layers: Sequence[str], anonymous: list[str]
) -> dict[str, Any]:
    kind, source, destination = mount["type"], mount["source"], mount["destination"]
    modes = mount["mode"].split(",")
    kept = {"type": kind, "destination": destination, "rw": "ro" not in modes, "mode": mount["mode"]}
    if kind == "tmpfs":
        return {**kept, "source": "", "size": mount.get("size")}
    if kind == "bind":
        try:
            os.makedirs(source, exist_ok=True)  # as docker's -v: a missing directory is made
        except FileExistsError:
            pass  # a file
        except OSError as err:
            raise UsageError(f"error while creating mount source path '{source}': {err.strerror}") from err
        _check_propagation(source, modes)
        return {**kept, "source": source}
    name, labels = source, None
    if not name:
        name, labels = secrets.token_hex(32), {ANONYMOUS_LABEL: ""}
        anonymous.append(name)
    volumes.create(name, labels=labels)
    path = volumes.prepare(name, layers=layers, destination=destination, copy="nocopy" not in modes)
    return {**kept, "name": name, "source": str(path), "anonymous": labels is not None}


def _check_propagation(source: str, modes: Sequence[str]) -> None:
    """Mounts can only come from, or go to, a mount of the machine that takes part in it (mount_namespaces(7)).

    Raises UsageError in docker's words for one that is private: the mode would be given and not hold."""
    wanted = next((mode.removeprefix("r") for mode in modes if mode.endswith(("shared", "slave"))), "")
    if not wanted:
        return
    place = os.path.realpath(source)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        rows = [line.partition(" - ")[0].split() for line in file]
    points = ((row[4].replace("\\040", " "), row[6:]) for row in rows)
    above = [(point, tags) for point, tags in points if f"{place}/".startswith(f"{point.rstrip('/')}/")]
    point, tags = max(reversed(above), key=lambda each: len(each[0]))  # of several at one place the last one shows
    kinds = {tag.partition(":")[0] for tag in tags}
    if "shared" not in kinds and not (wanted == "slave" and "master" in kinds):
        needed = "a shared mount" if wanted == "shared" else "a shared or slave mount"
        raise UsageError(
            f"path {source} is mounted on {point} but it is not {needed}",
            resolution=f"as root: `mount --make-rshared {point}`",
        )


def spec_mount(mount: Mapping[str, Any]) -> dict[str, Any]:
    """A record's mount as the runtime-spec has it."""
    access = "rw" if mount["rw"] else "ro"
    if mount["type"] == "tmpfs":
        size = [f"size={mount['size']}"] if mount.get("size") else []
        options = ["nosuid", "nodev", "noexec", *size, *(["ro"] if access == "ro" else [])]
        return {"destination": mount["destination"], "type": "tmpfs", "source": "tmpfs", "options": options}
    propagation = next((m for m in mount["mode"].split(",") if m.endswith(("private", "slave", "shared"))), "rprivate")
    return {
        "destination": mount["destination"],
        "type": "bind",
        "source": mount["source"],
        "options": ["rbind", access, propagation],
    }


def needs_no_mknod(driver: Driver, settings: Mapping[str, Any]) -> bool:
    """Without a device cgroup root could make a node of the machine's disk and open it: MKNOD is then not docker's
    default any more, but for who asks for it by name."""
    asked = settings.get("privileged") or {"CAP_MKNOD", "ALL"} & set(settings.get("cap_add", ()))
    return driver.name == "root" and driver.cgroups.get("devices") != "kernel" and not asked


def add_devices(config: dict[str, Any], settings: Mapping[str, Any], driver: Driver) -> None:
    """Put the CDI devices of the settings into a container's config. Raises UsageError for what cannot be had."""
    names = settings.get("device_requests")
    if names:
        from ..runtime import cdi

        registry = cdi.read()
        cdi.apply(config, [registry.find(name) for name in dict.fromkeys(names)], driver.name)


class RootDirectory:
    """A directory in the place of an image (`run --rootfs DIR`): nothing of it is copied, and the container writes into
    it; with `:O` at its end, over it."""

    id = ""
    architecture = ""
    uses_host = False
    host_masks: tuple[list[str], list[dict[str, Any]]] = ([], [])

    def __init__(self, path: str) -> None:
        self.path = path.removesuffix(":O")
        self.over = path.endswith(":O")
        self.tags: list[str] = []
        self.config: dict[str, Any] = {}
        self.layers: list[Any] = []
        self.short_id = self.path
        if not os.path.isdir(self.path):
            raise UsageError(f"root file system {self.path}: no such directory", exit_code=125)

    def rootfs(self, directory: str, driver: Driver) -> dict[str, Any]:
        """The property "rootfs" of config.json."""
        if not self.over:
            return {"kind": "dir", "path": self.path}
        if driver.overlay == "copy":
            raise UsageError("a directory cannot be used with :O where there is no overlay", exit_code=125)
        upper = {"upper": f"{directory}/upper", "work": f"{directory}/work", "userxattr": driver.userxattr}
        return {"kind": "overlay", "lower": [self.path], "volatile": False, **upper}


class Programs:
    """Compiled system call filters, remembered by profile and capabilities; their files lie in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[tuple[str, ...], str] = {}

    def find(self, settings: Mapping[str, Any], warnings: list[str]) -> str | None:
        """Path of the program for these settings. None for `seccomp=unconfined` and, with a line in `warnings`, where
        none can be made. Raises UsageError for a profile that cannot be read."""
        option = security_options(settings).get("seccomp", "")
        if option == "unconfined" or (settings.get("privileged") and not option):
            return None
        capabilities = tuple(finalize_capabilities(settings))
        known = self._known.get(capabilities)
        if known is not None and option in ("", "builtin"):
            return known
        from ..linux import seccomp

        own_profile = option not in ("", "builtin")
        profile = seccomp.load_profile(option, capabilities) if own_profile else seccomp.docker_profile(capabilities)
        try:
            path = seccomp.cached_program(profile, str(self.directory))
        except UsageError:
            raise
        except LabkernelError as err:
            if own_profile:
                raise
            warnings.append(f"no system call filter: {err.brief} ({err.resolution})")
            return None
        if not own_profile:  # a file may change
            self._known[capabilities] = path
        return path
