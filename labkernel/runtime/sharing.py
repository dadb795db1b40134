"""What a container may share with the machine or with another container: namespaces, devices, kernel parameters.

Checks and reading only; `settings` and `spec` use it. Sources: Docker documentation, "docker run"; runtime-spec
config-linux.md, "Devices"; man 7 namespaces.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UsageError

# Parameters that belong to a namespace of the container, as docker lets through. Others would change the machine.
_IPC_PARAMETERS = frozenset(
    "kernel.msgmax kernel.msgmnb kernel.msgmni kernel.sem kernel.shmall kernel.shmmax kernel.shmmni "  # noqa: SIM905
    "kernel.shm_rmid_forced".split()
)
_PARAMETER = re.compile(r"[a-zA-Z0-9_./-]+")
# VENDOR/CLASS=NAME of a Container Device Interface (SPEC.md, "Kind" and "CDI Devices").
_WORD = r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
CDI_NAME = re.compile(rf"{_WORD}/{_WORD}=[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
SHARED = {"pid": "pid_mode", "network": "network_mode", "ipc": "ipc_mode", "uts": "uts_mode", "cgroup": "cgroupns"}


def mode_check(flag: str, *words: str, container: bool = False) -> Callable[[Any], str]:
    """A check of `--pid`, `--ipc`, …: one of `words`, or with `container` also `container:NAME`."""

    def check(value: Any) -> str:
        text = str(value)
        if text in words or (container and text.startswith("container:") and text != "container:"):
            return text
        if text.startswith("container:") and not container:
            raise UsageError(f"--{flag} {text}: sharing this namespace with a container is not in this release")
        raise UsageError(f"--{flag}: invalid {flag} mode: {text}")

    return check


def only(what: str, complaint: str, *words: str) -> Callable[[Any], str]:
    """A check of a setting docker has many values for and this engine one (spelled in `words`)."""

    def check(value: Any) -> str:
        if str(value) not in words:
            raise UsageError(f"{complaint}: {value}", resolution=f"the {what} here is {words[0]}")
        return str(value)

    return check


def cgroup_parent(value: Any) -> str:
    """`--cgroup-parent`: a path below each hierarchy's root (below the delegated group in version 2)."""
    path = os.path.normpath(f"/{value}").replace("//", "/")
    if ".." in str(value).split("/") or path == "/" or path.endswith(".slice"):
        raise UsageError(f"invalid cgroup parent: {value}", resolution="a path such as /lab/class-1")
    return path


def resolve(settings: dict[str, Any], find: Callable[[str], Any]) -> None:
    """Put ids where `container:NAME` was said. Raises UsageError for IPC of a container that keeps it private."""
    for key in ("pid_mode", "network_mode", "ipc_mode"):
        kind, colon, other = str(settings.get(key) or "").partition(":")
        if kind == "container" and colon:
            donor = find(other)
            settings[key] = f"container:{donor.id}"
            mode = str(donor.settings.get("ipc_mode") or "private")
            if key == "ipc_mode" and mode == "private":
                raise UsageError(
                    f"can't join IPC of container {donor.id}: non-shareable IPC "
                    "(hint: use IpcMode:shareable for the donor container)",
                    resolution=f"run {donor.name} with --ipc shareable",
                )


def sysctls(value: Any) -> dict[str, str]:
    """`{"net.core.somaxconn": "1024"}` or docker's words `name=value`. Only parameters of a namespace."""
    pairs = value.items() if isinstance(value, Mapping) else [str(word).partition("=")[::2] for word in value]
    found = {str(name): str(text) for name, text in pairs}
    for name in found:
        known = name in _IPC_PARAMETERS or name.startswith(("net.", "fs.mqueue."))
        if not known or not _PARAMETER.fullmatch(name) or ".." in name:
            raise UsageError(
                f"sysctl '{name}' is not allowed: it is not a parameter of the container's own namespaces",
                resolution="net.*, fs.mqueue.*, kernel.msg*, kernel.sem and kernel.shm* are",
            )
    return found


def check_sysctls(settings: Mapping[str, Any]) -> None:
    """A parameter of a namespace that is the machine's here would change the machine. Raises UsageError."""
    network = settings.get("network_mode") or settings.get("network")
    for name in settings.get("sysctls", ()):
        if name.startswith("net.") and network == "host":
            raise UsageError(f'sysctl "{name}" not allowed in host network namespace')
        if not name.startswith("net.") and settings.get("ipc_mode") == "host":
            raise UsageError(f'sysctl "{name}" is not allowed in the hosts ipc namespace')


def devices(value: Any) -> list[str]:
    """`SOURCE[:TARGET[:rwm]]`, the API's {"PathOnHost", "PathInContainer", "CgroupPermissions"}, or the name of a CDI
    device."""
    words = []
    for item in [value] if isinstance(value, str) else value:
        if isinstance(item, Mapping):
            source = str(item["PathOnHost"])
            item = f"{source}:{item.get('PathInContainer') or source}:{item.get('CgroupPermissions') or 'rwm'}"
        if not CDI_NAME.fullmatch(str(item)):
            parse_device(str(item))
        words.append(str(item))
    return words


def device_requests(value: Any) -> list[str]:
    """Names of CDI devices, from the API's {"Driver": "cdi", "DeviceIDs": […]} or plain. Raises UsageError for requests
    of other drivers, with docker's words."""
    names: list[str] = []
    for item in value:
        if isinstance(item, Mapping):
            asked = {key.replace("_", "").lower(): given for key, given in item.items() if given}
            if asked.get("driver") != "cdi":
                sets = " ".join(f"[{' '.join(map(str, each))}]" for each in asked.get("capabilities", ()))
                raise UsageError(
                    f'could not select device driver "{asked.get("driver", "")}" with capabilities: [{sets}]',
                    resolution="devices are asked for by their CDI names: --device VENDOR/CLASS=NAME",
                )
            for key in ("count", "options"):
                if key in asked:
                    raise UsageError(f"unexpected {key} in CDI device request")
            names += map(str, asked.get("deviceids", ()))
        else:
            names.append(str(item))
    for name in names:
        if not CDI_NAME.fullmatch(name):
            raise UsageError(f'invalid name of a CDI device: "{name}"', resolution="VENDOR/CLASS=NAME")
    return names


def sort_devices(settings: dict[str, Any]) -> None:
    """Put the CDI names among the `devices` to the `device_requests`, as docker's command does."""
    words = settings.get("devices") or []
    names = [word for word in words if not word.startswith("/")]
    if names:
        settings["device_requests"] = [*(settings.get("device_requests") or ()), *names]
        settings["devices"] = [word for word in words if word.startswith("/")]
    if not settings.get("device_requests"):
        settings.pop("device_requests", None)


def parse_device(text: str) -> tuple[str, str, str]:
    """(source, target, access)."""
    parts = text.split(":")
    source, rest = parts[0], parts[1:]
    target, access = source, "rwm"
    if len(rest) == 1 and set(rest[0]) <= set("rwm") and rest[0]:
        access = rest[0]
    elif rest:
        target, access = rest[0], rest[1] if len(rest) > 1 else "rwm"
    if len(parts) > 3 or not source.startswith("/") or not target.startswith("/") or not set(access) <= set("rwm"):
        raise UsageError(
            f"invalid device specification: {text}", resolution="/dev/x[:/dev/y[:rwm]] or VENDOR/CLASS=NAME"
        )
    return source, target, access or "rwm"


def find_devices(words: Sequence[str], *, everything: bool = False) -> list[dict[str, Any]]:
    """The device nodes meant, as runtime-spec `linux.devices` with `source` and `access`; a directory means all in it.

    With `everything` (a privileged container) those of the machine's /dev come first. Raises UsageError.
    """
    found: dict[str, dict[str, Any]] = {}
    if everything:
        found = {node["path"]: node for node in _below("/dev", "/dev", "rwm")}
    for word in words:
        source, target, access = parse_device(word)
        try:
            info = os.stat(source)
        except OSError:
            raise UsageError(
                f'error gathering device information while adding custom device "{source}": no such file or directory'
            ) from None
        nodes = _below(source, target, access) if stat.S_ISDIR(info.st_mode) else [_node(source, target, access, info)]
        found.update({node["path"]: node for node in nodes if node})
        if None in nodes:
            raise UsageError(
                f'error gathering device information while adding custom device "{source}": not a device node'
            )
    return list(found.values())


def _below(source: str, target: str, access: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for folder, names, files in os.walk(source):
        # These are file systems of the container's own.
        names[:] = [name for name in names if f"{folder}/{name}" not in ("/dev/pts", "/dev/shm", "/dev/mqueue")]
        for name in files:
            path = f"{folder}/{name}"
            try:
                node = _node(path, target + path.removeprefix(source), access, os.lstat(path))
            except OSError:
                continue
            if node and path not in ("/dev/console", "/dev/ptmx", "/dev/tty"):
                found.append(node)
    return found


def _node(source: str, target: str, access: str, info: os.stat_result) -> dict[str, Any] | None:
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    if not kind:
        return None
    return {
        "path": target,
        "type": kind,
        "major": os.major(info.st_rdev),
        "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "source": source,
        "access": access,
    }


def device_rules(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the device cgroup lets through for these nodes."""
    return [{"allow": True, **{key: node[key] for key in ("type", "major", "minor", "access")}} for node in nodes]
