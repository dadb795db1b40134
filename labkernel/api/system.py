"""The engine itself: ping, version, info, disk usage. Source: Docker Engine API, "System"."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import NoSuchContainer, UsageError
from ..runtime.logs import timestamp
from .call import Call
from .handler import words_of
from .routes import NEWEST, OLDEST, Route

if TYPE_CHECKING:
    from ..building.usage import CacheRecord
    from ..engine import Engine

BUILDER_VERSION = "2"
"""What `docker build` takes by default: 1 the classic builder, 2 BuildKit."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_KINDS = ("container", "image", "volume", "build-cache")


async def ping(call: Call) -> Any:
    return call.answer(
        200,
        "OK",
        Builder_Version=BUILDER_VERSION,
        Swarm="inactive",
        Cache_Control="no-cache, no-store, must-revalidate",
        Pragma="no-cache",
    )


def architecture() -> str:
    """Of this machine, in Go's word."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


async def version(call: Call) -> Any:
    kernel, arch = os.uname(), architecture()
    details = {
        "ApiVersion": words_of(NEWEST),
        "Arch": arch,
        "BuildTime": "",
        "Experimental": "false",
        "GitCommit": "",
        "GoVersion": "",
        "KernelVersion": kernel.release,
        "MinAPIVersion": words_of(OLDEST),
        "Os": "linux",
        "PythonVersion": platform.python_version(),
    }
    return {
        "Platform": {"Name": "labkernel"},
        "Components": [{"Name": "Engine", "Version": __version__, "Details": details}],
        "Version": __version__,
        "ApiVersion": words_of(NEWEST),
        "MinAPIVersion": words_of(OLDEST),
        "GitCommit": "",
        "GoVersion": "",
        "Os": "linux",
        "Arch": arch,
        "KernelVersion": kernel.release,
        "BuildTime": "",
    }


def info(call: Call) -> Any:
    engine = call.engine
    states = [container.status for container in engine.containers.list(all=True)]
    running, paused = states.count("running"), states.count("paused")
    return {
        "ID": _identity(engine),
        "Containers": len(states),
        "ContainersRunning": running,
        "ContainersPaused": paused,
        "ContainersStopped": len(states) - running - paused,
        "Images": len(engine.images.list()),
        "Name": os.uname().nodename,
        "ServerVersion": __version__,
        "DockerRootDir": str(engine.layout.root),
        "Labels": [f"labkernel.driver={engine.driver.name}"],
        "Warnings": [str(warning) for warning in engine.driver.warnings] or None,
        **_machine(),
        **_abilities(engine),
        **_devices(),
        **_constants(),
    }


def _devices() -> dict[str, Any]:
    """Where CDI devices are described, and which ones are (API 1.50)."""
    from ..runtime import cdi

    registry = cdi.read()
    return {
        "CDISpecDirs": list(registry.directories),
        "DiscoveredDevices": [{"Source": "cdi", "ID": name} for name in sorted(registry.devices)],
    }


def _identity(engine: Engine) -> str:
    from uuid import NAMESPACE_URL, uuid5

    return str(uuid5(NAMESPACE_URL, f"{os.uname().nodename}{engine.layout.root}"))


def _machine() -> dict[str, Any]:
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        system = {}
    return {
        "OperatingSystem": system.get("PRETTY_NAME", "Linux"),
        "OSVersion": system.get("VERSION_ID", ""),
        "OSType": "linux",
        "Architecture": os.uname().machine,
        "KernelVersion": os.uname().release,
        "NCPU": os.cpu_count() or 1,
        "MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "SystemTime": _now(),
    }


def _now() -> str:
    from datetime import datetime

    return datetime.now().astimezone().isoformat()


def _abilities(engine: Engine) -> dict[str, Any]:
    driver = engine.driver
    limits: Mapping[str, str] = driver.cgroups

    def kept(name: str) -> bool:
        return limits.get(name) == "kernel"

    security = ["name=seccomp,profile=builtin"] if driver.name != "proot" else []
    return {
        "Driver": "overlay2" if driver.overlay != "copy" else "vfs",
        "DriverStatus": [["Labkernel driver", driver.name]],
        "CgroupDriver": "cgroupfs" if driver.cgroup_version else "none",
        "CgroupVersion": str(driver.cgroup_version or 1),
        "SecurityOptions": [*security, *(["name=rootless"] if driver.name != "root" else [])],
        "MemoryLimit": kept("memory"),
        "SwapLimit": kept("memory"),
        "CpuCfsPeriod": kept("cpu"),
        "CpuCfsQuota": kept("cpu"),
        "CPUShares": kept("cpu"),
        "CPUSet": kept("cpuset"),
        "PidsLimit": kept("pids"),
        "OomKillDisable": False,
        "IPv4Forwarding": True,
    }


def _constants() -> dict[str, Any]:
    nowhere = {"ID": "", "Expected": ""}
    return {
        "Plugins": {
            "Volume": ["local"],
            "Network": ["bridge", "host", "null"],
            "Authorization": None,
            "Log": ["json-file"],
        },
        "Swarm": {
            "NodeID": "",
            "NodeAddr": "",
            "LocalNodeState": "inactive",
            "ControlAvailable": False,
            "Error": "",
            "RemoteManagers": None,
        },
        "Debug": False,
        "NFd": 0,
        "NGoroutines": 0,
        "LoggingDriver": "json-file",
        "NEventsListener": 0,
        "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {
            "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128"],
            "IndexConfigs": {},
            "Mirrors": [],
        },
        "GenericResources": None,
        "HttpProxy": os.environ.get("HTTP_PROXY", ""),
        "HttpsProxy": os.environ.get("HTTPS_PROXY", ""),
        "NoProxy": os.environ.get("NO_PROXY", ""),
        "ExperimentalBuild": False,
        "Runtimes": {"labkernel": {"path": ""}},
        "DefaultRuntime": "labkernel",
        "LiveRestoreEnabled": True,
        "Isolation": "",
        "InitBinary": "labkernel",
        "ContainerdCommit": nowhere,
        "RuncCommit": nowhere,
        "InitCommit": nowhere,
    }


def usage(call: Call) -> Any:
    kinds = call.queries("type") or list(_KINDS)
    for kind in kinds:
        if kind not in _KINDS:
            raise UsageError(f"unknown object type: {kind}")
    engine = call.engine
    found: dict[str, Any] = {}
    if "image" in kinds:
        found.update(_image_usage(engine))
        if call.version < (1, 44):
            for row in found["Images"]:
                row["VirtualSize"] = row["Size"]
    if "container" in kinds:
        found["Containers"] = _container_usage(call)
    if "volume" in kinds:
        found["Volumes"] = _volume_usage(engine)
    if "build-cache" in kinds:
        found["BuildCache"] = [_cache_row(record) for record in engine.builds.usage()]
    return found


def _image_usage(engine: Engine) -> dict[str, Any]:
    users: dict[str, int] = {}
    for container in engine.containers.list(all=True):
        users[container.image_id] = users.get(container.image_id, 0) + 1
    images = engine.images.list(all=True)
    times: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for image in images:
        for layer in image.layers:
            times[layer.diff_id] = times.get(layer.diff_id, 0) + 1
            sizes[layer.diff_id] = layer.size_bytes
    rows = []
    for image in images:
        document = image.attrs
        rows.append(
            {
                "Id": image.id,
                "ParentId": "",
                "RepoTags": image.tags or None,
                "RepoDigests": document.get("RepoDigests") or None,
                "Created": _seconds(document.get("Created")),
                "Size": image.size_bytes,
                "SharedSize": sum(layer.size_bytes for layer in image.layers if times[layer.diff_id] > 1),
                "Labels": image.config.get("Labels"),
                "Containers": users.get(image.id, 0),
            }
        )
    return {"LayersSize": sum(sizes.values()), "Images": rows}


def _seconds(text: Any) -> int:
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(str(text)).timestamp())
    except (ValueError, OverflowError):
        return 0


def _container_usage(call: Call) -> list[dict[str, Any]]:
    from .containers import row_of

    rows = []
    for container in call.engine.containers.list(all=True):
        try:
            rows.append(row_of(container, size=True))
        except NoSuchContainer:
            continue
    return rows


def _volume_usage(engine: Engine) -> list[dict[str, Any]]:
    users: dict[str, int] = {}
    for container in engine.containers.list(all=True):
        for mount in container.record.get("mounts", ()):
            if mount["type"] == "volume":
                users[mount["name"]] = users.get(mount["name"], 0) + 1
    return [
        {**volume.attrs, "UsageData": {"Size": volume.size_bytes(), "RefCount": users.get(volume.name, 0)}}
        for volume in engine.volumes.list()
    ]


def _cache_row(record: CacheRecord) -> dict[str, Any]:
    """*SystemDataUsage, BuildCache*. How often a step was used is not kept, only that it was."""
    return {
        "ID": record.id,
        "Type": record.kind,
        "Description": record.description,
        "InUse": record.in_use,
        "Shared": record.shared,
        "Size": record.size_bytes,
        "CreatedAt": timestamp(int(record.created_at * 1e9)),
        "LastUsedAt": timestamp(int(record.used_at * 1e9)),
        "UsageCount": int(record.used_at > record.created_at),
    }


ROUTES = (
    Route("GET", "/_ping", ping),
    Route("HEAD", "/_ping", ping),
    Route("GET", "/version", version),
    Route("GET", "/info", info),
    Route("GET", "/system/df", usage, slow=True),
)
