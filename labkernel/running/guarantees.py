"""What holds a container: for each isolation and each limit it was given, who sees to it on this machine.

The words are `kernel` (the kernel refuses), `per-process` (each process for itself), `best-effort` (as long as the
program does not work against it) and `none`. Shown by `inspect` and in a notebook; docs/threat-model.md says more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..runtime import prootprogram
from ..runtime.devicelimits import RATES

if TYPE_CHECKING:
    from ..runtime.driver import Driver
    from .container import Container

_NAMESPACES = {
    "processes": "pid",
    "network": "network",
    "ipc": "ipc",
    "hostname": "uts",
    "control groups": "cgroup",
}
_CONTROLLERS = {
    "mem_limit": "memory",
    "mem_reservation": "memory",
    "memswap_limit": "memory",
    "mem_swappiness": "memory",
    "oom_kill_disable": "memory",
    "nano_cpus": "cpu",
    "cpu_quota": "cpu",
    "cpu_period": "cpu",
    "cpu_shares": "cpu",
    "cpuset_cpus": "cpuset",
    "cpuset_mems": "cpuset",
    "pids_limit": "pids",
    "blkio_weight": "blkio",
    "blkio_weight_device": "blkio",
    **dict.fromkeys(RATES, "blkio"),
}
# What `cgroups.Cgroup.limit` calls a setting that the kernel did not take.
_UNENFORCED = {
    "memswap_limit": "memory-swap",
    "mem_reservation": "memory-reservation",
    "mem_swappiness": "memory-swappiness",
    "nano_cpus": "cpus",
    "cpu_quota": "cpus",
    "mem_limit": "memory",
}


def guarantees(container: Container) -> dict[str, dict[str, str]]:
    """{"Isolation": {name: word}, "Limits": {setting: word}}; limits only where one was set."""
    driver, settings = container._containers.driver, container.settings
    config = container.config()
    found = isolation(driver, settings, config)
    return {"Isolation": found, "Limits": limits(driver, settings, container.warnings)}


def isolation(driver: Driver, settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """By name what it is kept apart from."""
    if driver.name == "proot":
        return prootprogram.isolation()
    own = {space["type"] for space in config["linux"]["namespaces"] if not space.get("path")}
    spaces = {name: "kernel" if space in own else "none" for name, space in _NAMESPACES.items()}
    if driver.cgroup_version == 0:
        spaces["control groups"] = "none"
    privileged = bool(settings.get("privileged"))
    devices = driver.name == "rootless" or driver.cgroups.get("devices") == "kernel"
    return {
        "files": "kernel",
        **spaces,
        "users": "kernel" if driver.name == "rootless" else "none",
        "capabilities": "none" if privileged or "ALL" in settings.get("cap_add", ()) else "kernel",
        "system calls": "kernel" if config["labkernel"].get("seccomp_program") else "none",
        "kernel settings": "kernel" if config["linux"].get("readonlyPaths") else "none",
        "devices": "kernel" if devices and not privileged else "none",
    }


def limits(driver: Driver, settings: Mapping[str, Any], warnings: list[str]) -> dict[str, str]:
    """By docker's flag who holds it."""
    found = {}
    for setting, controller in _CONTROLLERS.items():
        if not settings.get(setting):
            continue
        word = driver.cgroups.get(controller, "none")
        if setting == "mem_reservation" and word == "kernel":
            word = "best-effort"  # the kernel's own word for a soft limit
        name = _UNENFORCED.get(setting, setting.replace("_", "-"))
        if any(line.startswith(f"{name} is not enforced") for line in warnings):
            word = "none"
        found[_flag(setting)] = word
    for name in settings.get("ulimits") or {}:
        found[f"ulimit {name}"] = "kernel" if name == "nproc" else "per-process"
    return found


def _flag(setting: str) -> str:
    words = {"nano_cpus": "cpus", "mem_limit": "memory", "memswap_limit": "memory-swap"}
    return words.get(setting, setting.replace("mem_", "memory_")).replace("_", "-")


def as_html(found: Mapping[str, Mapping[str, str]], driver: str) -> str:
    """A folded line below a container in a notebook."""
    import html

    def listed(levels: Mapping[str, str]) -> str:
        by_word: dict[str, list[str]] = {}
        for name, word in levels.items():
            by_word.setdefault(word, []).append(name)
        return "; ".join(f"<b>{word}</b>: {html.escape(', '.join(names))}" for word, names in by_word.items())

    parts = [f"{title.lower()} — {listed(levels)}" for title, levels in found.items() if levels]
    return f"<details><summary>driver {html.escape(driver)}</summary>{'<br>'.join(parts)}</details>"
