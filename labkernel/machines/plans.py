"""From a virtual machine's settings to what its monitor reads: checks, ports, shared directories, config.json.

Part of the service `vms`; nothing here starts anything.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..display import human_memory
from ..errors import ConflictError, UsageError
from ..qemu.command import CARDS, Port
from ..qemu.machine import MEMORY_FLOOR_MIB
from ..runtime.settings import normalize, parse_size
from ..runtime.spec import finalize_environment, finalize_resources, stop_signal

if TYPE_CHECKING:
    from ..runtime.driver import Driver
    from .vm import VM

DEFAULT_MEMORY = "256m"
MONITOR = "labkernel.qemu.monitor:main"
# What QEMU needs beside the guest's memory: translated code, devices, and the pages of files that it reads.
OVERHEAD_BYTES = 256 << 20
_PIDS = 256
_ALLOWED = {
    *("name", "environment", "user", "working_dir", "entrypoint", "hostname", "read_only", "labels", "tty"),
    *("stdin_open", "auto_remove", "volumes", "mounts", "ports", "network_mode", "network", "stop_signal"),
    *("stop_timeout", "console_size", "networking_config", "mac_address"),
}
_OPEN_NETWORKS = ("bridge", "default", "user", "nat")
# Settings of containers that are about sharing a kernel; anything else that is not known is a mistake.
_CONTAINERS_ONLY = "a virtual machine has a kernel of its own, so there is nothing of this kind to set"


def check_settings(given: Mapping[str, Any], *, cpus: float | None) -> tuple[dict[str, Any], float]:
    """(settings, processors) of a new machine. Raises UsageError for what does not fit."""
    memory_bytes = parse_size(given.get("mem_limit") or DEFAULT_MEMORY, "memory")
    if memory_bytes < MEMORY_FLOOR_MIB << 20:
        raise UsageError(
            f"a guest kernel needs at least {MEMORY_FLOOR_MIB} MiB; {human_memory(max(0, memory_bytes))} were given",
            resolution=f"`--memory {MEMORY_FLOOR_MIB}m` or more; a container has no kernel of its own to feed",
        )
    nano = given.get("nano_cpus")
    wanted = float(cpus if cpus is not None else nano / 1e9 if nano else 1)
    available = len(os.sched_getaffinity(0))
    if not 0.01 <= wanted <= available:
        raise UsageError(f"cpus={wanted:g}: a VM gets from 0.01 to {available} processors here")
    rest = {key: value for key, value in given.items() if key not in ("mem_limit", "nano_cpus") and value is not None}
    settings = normalize(rest)
    for key in settings:
        if key not in _ALLOWED:
            raise UsageError(f"{key} is no setting of a virtual machine", resolution=_CONTAINERS_ONLY)
    settings["mem_limit"] = memory_bytes
    settings["nano_cpus"] = int(wanted * 1e9)
    return settings, wanted


def network_of(settings: Mapping[str, Any]) -> str:
    """ "" (none), "closed" (published ports only), "open" (QEMU's user-mode network), or "wired": networks that users
    made. Raises UsageError for what a machine cannot have."""
    wanted = settings.get("network_mode") or settings.get("network")
    others = [name for name in settings.get("networking_config") or () if name != wanted]
    if wanted == "host" or str(wanted).startswith("container:"):
        raise UsageError(
            f"network {wanted} is not available to a virtual machine: it has a kernel of its own",
            resolution="--network NAME of `network create`, bridge (QEMU's user-mode network, outwards), or none",
        )
    if wanted in (None, "", "none", *_OPEN_NETWORKS):
        if others or settings.get("mac_address") or (settings.get("networking_config") or {}).get(wanted):
            raise UsageError(
                f"addresses, aliases and further networks need a network of your own, not {wanted or 'none'}",
                resolution="`network create NAME`, then --network NAME",
            )
        return "open" if wanted in _OPEN_NETWORKS else "closed" if settings.get("ports") else ""
    if len(others) >= CARDS:
        raise UsageError(f"a virtual machine can be in {CARDS} networks")
    return "wired"


def choose_ports(settings: Mapping[str, Any]) -> list[list[Any]]:
    """[protocol, address, port here, port inside] of what is published. Raises UsageError, ConflictError."""
    found = []
    if network_of(settings) == "wired":
        return []  # they lead to its address, as a container's do
    for each in settings.get("ports") or ():
        first, last = each["host"] or (0, 0)
        found.append([each["proto"], each["ip"], _free_port(each["proto"], each["ip"], first, last), each["port"]])
    return found


def _free_port(proto: str, address: str, first: int, last: int) -> int:
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    for number in range(first, last + 1):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address or "0.0.0.0", number))  # docker's default
            except OSError as err:
                problem = err.strerror
                continue
            return int(sock.getsockname()[1])
    raise ConflictError(
        f"Bind for {address or '0.0.0.0'}:{first} failed: {problem}", resolution="publish another port (`-p`)"
    )


def ports_of(machine: Mapping[str, Any]) -> tuple[Port, ...]:
    return tuple(Port(*each) for each in machine.get("ports") or ())


def shares_of(mounts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Shared directories for the guest, parents before what lies in them."""
    found = [
        {"source": mount["source"], "target": mount["destination"], "writable": bool(mount["rw"])} for mount in mounts
    ]
    return sorted(found, key=lambda share: str(share["target"]).rstrip("/").count("/"))


def finalize_config(
    vm: VM, plan: dict[str, Any], image_config: Mapping[str, Any], driver: Driver, cgroup_parent: str
) -> dict[str, Any]:
    """config.json of a machine: in the shape of a container's (runtime-spec), with the monitor and its plan."""
    settings, record = vm.settings, vm.record
    hostname = settings.get("hostname") or vm.id[:12]
    directory = str(vm.directory)
    size = settings.get("console_size")
    limited = {"mem_limit": most_memory(settings), "pids_limit": _PIDS}
    if settings["nano_cpus"] % 1_000_000_000:
        limited["nano_cpus"] = settings["nano_cpus"]
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": bool(settings.get("tty")),
            **({"consoleSize": {"height": size[0], "width": size[1]}} if size else {}),
            "user": {"uid": 0, "gid": 0},
            "args": record["args"],
            "env": finalize_environment(image_config, settings, hostname),
            "cwd": settings.get("working_dir") or image_config.get("WorkingDir") or "/",
        },
        "root": {"path": f"{directory}/disk.qcow2", "readonly": bool(settings.get("read_only"))},
        "hostname": hostname,
        "mounts": [],
        "linux": {
            "namespaces": [{"type": "network"}] if _alone(vm, driver) else [],
            "resources": finalize_resources(limited, devices=False),
        },
        "labkernel": {
            "monitor": MONITOR,
            "machine": {**plan, "hostname": hostname, "readonly": bool(settings.get("read_only"))},
            "rootfs": {"kind": "dir", "path": f"{directory}/disk.qcow2"},
            "stdin_open": bool(settings.get("stdin_open")),
            "auto_remove": bool(settings.get("auto_remove")),
            "log": {"path": f"{directory}/log.json", "max_bytes": None},
            "stop_signal": stop_signal(image_config, settings),
            "stop_timeout_s": float(settings.get("stop_timeout", 10.0)),
            "cgroup_parent": cgroup_parent if driver.cgroup_version else "",
            "user_unresolved": settings.get("user") or image_config.get("User") or "",
            "restart": {"name": "no", "max_retries": 0},
        },
    }


def _alone(vm: VM, driver: Driver) -> bool:
    """Whether QEMU and its monitor are in a network namespace of their own: what is not to reach anybody by this
    machine's network is not in it, and may be connected to networks that users made, also later."""
    return vm.wired or (not vm.record["machine"]["network"] and driver.name != "proot")


def most_memory(settings: Mapping[str, Any]) -> int:
    """Bytes that QEMU's process may use: the guest's memory, and what QEMU needs beside it."""
    return int(settings["mem_limit"]) + OVERHEAD_BYTES


def processors(wanted: float) -> int:
    """Virtual processors for a share of the machine's."""
    return max(1, math.ceil(wanted))
