"""`update`: other limits and another restart policy for a container that is there, at once when it runs.

Source: Docker SDK for Python, `Container.update`; Docker Engine API, ContainerUpdate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, UsageError
from ..imaging.provision import find_warnings
from ..runtime.devicelimits import RATES
from ..runtime.settings import normalize
from ..runtime.spec import finalize_resources

if TYPE_CHECKING:
    from .container import Container

LIMITS = frozenset(
    "blkio_weight cpu_period cpu_quota cpu_shares cpuset_cpus cpuset_mems mem_limit mem_reservation memswap_limit "  # noqa: SIM905
    "nano_cpus pids_limit".split()
)
# What stays as it is and is written again with the rest.
_RESOURCES = LIMITS | {"mem_swappiness", "oom_kill_disable", "blkio_weight_device", *RATES}
_CPU = {"nano_cpus": ("cpu_quota", "cpu_period"), "cpu_quota": ("nano_cpus",), "cpu_period": ("nano_cpus",)}


def update(container: Container, changes: Mapping[str, Any]) -> dict[str, Any]:
    """See `Container.update`."""
    from .remounting import PLACES, remount

    unknown = changes.keys() - LIMITS - {"restart_policy"} - PLACES
    if unknown:
        raise UsageError(f"unknown argument: {min(unknown)}")
    places = {key: changes[key] for key in PLACES & changes.keys()}
    if places:
        warnings = remount(container, places)
        rest = {key: value for key, value in changes.items() if key not in PLACES}
        return {"Warnings": [*warnings, *(update(container, rest)["Warnings"] if rest else ())]}
    given = normalize(dict(changes))
    settings = container.settings
    for key in given:
        for other in _CPU.get(key, ()):
            if settings.get(other):
                words = {"nano_cpus": "NanoCPUs", "cpu_quota": "CPU Quota", "cpu_period": "CPU Period"}
                raise ConflictError(
                    f"Conflicting options: {words[key]} cannot be updated as {words[other]} has already been set"
                )
    limits = {key: settings[key] for key in _RESOURCES & settings.keys()} | {
        key: given[key] for key in LIMITS & given.keys()
    }
    if "mem_limit" in given and 0 < limits.get("memswap_limit", 0) < given["mem_limit"]:
        raise ConflictError(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time"
        )
    normalize(limits)  # do they fit together?
    if settings.get("auto_remove") and (given.get("restart_policy") or {}).get("name", "no") != "no":
        raise ConflictError("Restart policy cannot be updated because AutoRemove is enabled for the container")
    resources = finalize_resources(limits, devices=False)
    restart = given.get("restart_policy")
    warnings = container._containers.runtime.update(container.id, _steps(container, resources, given), restart)
    _write(container, resources, restart)
    changed = {**settings, **given}
    known = find_warnings(container._containers.driver, changed)
    container._containers.replace_record(container, {**container.record, "settings": changed, "warnings": known})
    container._containers.tell(container, "update")
    return {"Warnings": [*_not_enforced(container, changed, given), *warnings]}


def _not_enforced(container: Container, changed: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What is said of the limits that were given, and only of them."""
    driver = container._containers.driver
    without = {key: value for key, value in changed.items() if key not in LIMITS}
    said = find_warnings(driver, without)
    return [line for line in find_warnings(driver, {**without, **given}) if line not in said]


def _steps(container: Container, resources: dict[str, Any], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to write, in an order the kernel takes: version 1 refuses a memory limit above that of memory and swap."""
    if not given.keys() & LIMITS:
        return []
    memory = resources.get("memory") or {}
    before = (container.config()["linux"]["resources"].get("memory") or {}).get("swap", 0)
    grows = before > 0 and memory.get("swap", 0) > before
    return [*([{"memory": {"swap": memory["swap"]}}] if grows and "limit" in memory else []), resources]


def _write(container: Container, resources: dict[str, Any], restart: dict[str, Any] | None) -> None:
    """config.json for the next start, whole or not at all."""
    config = container.config()
    devices = config["linux"]["resources"].get("devices")
    config["linux"]["resources"] = {**resources, **({"devices": devices} if devices else {})}
    if restart:
        config["labkernel"]["restart"] = restart
    write_config(container, config)


def write_config(container: Container, config: dict[str, Any]) -> None:
    """Replace config.json, whole or not at all."""
    path = f"{container.directory}/config.json"
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(config, file, separators=(",", ":"))
    os.rename(temporary, path)
