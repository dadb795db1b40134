"""`update --mount` and `--publish`: other mounts and ports for a container that is there (docker has it made anew).

What it has written lies in its own upper layer, its settings in config.json, and each start mounts what that says: so
the container is stopped, its mounts are changed, and it is started again over its own files, with its id and log.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, UsageError
from ..imaging.provision import make_mounts, spec_mount
from ..runtime.settings import normalize
from ..runtime.spec import order_mounts, tmpfs_mounts
from .changing import write_config

if TYPE_CHECKING:
    from .container import Container

PLACES = frozenset({"volumes", "mounts", "tmpfs", "remove_mounts", "ports"})


def remount(container: Container, changes: Mapping[str, Any]) -> list[str]:
    """Mounts at new destinations are added, at known ones replaced, those of `remove_mounts` taken away. Returns
    warnings. Raises UsageError for what cannot be mounted, before anything is changed."""
    service = container._containers
    removed = {os.path.normpath(path) for path in changes.get("remove_mounts") or ()}
    given = normalize({key: value for key, value in changes.items() if key != "remove_mounts"})
    record, config = container.record, container.config()
    known = {mount["destination"] for mount in record["mounts"]} | set(container.settings.get("tmpfs") or {})
    for path in sorted(removed - known):
        raise UsageError(f"container {container.name} has no mount at {path}")
    made: list[str] = []
    lower = (config["labkernel"]["rootfs"].get("lower") or []) if given.get("volumes") or given.get("mounts") else []
    try:
        added = make_mounts(service.volumes, {}, given, lower, made)
    except BaseException:
        for name in made:
            service.volumes.remove(name, force=True)
        raise
    changed = removed | {mount["destination"] for mount in added} | set(given.get("tmpfs") or {})
    kept = [mount for mount in record["mounts"] if mount["destination"] not in changed]
    tmpfs = {path: words for path, words in (container.settings.get("tmpfs") or {}).items() if path not in changed}
    tmpfs |= given.get("tmpfs") or {}
    entries = [entry for entry in config["mounts"] if entry["destination"] not in changed]
    entries += [*map(spec_mount, added), *tmpfs_mounts(given.get("tmpfs") or {})]
    settings = {**container.settings, "tmpfs": tmpfs}
    for key in ("volumes", "mounts"):
        old = [item for item in settings.get(key, ()) if item["destination"] not in changed]
        settings[key] = [*old, *given.get(key, ())]
    if given.get("ports"):
        replaced = {(port["port"], port["proto"]) for port in given["ports"]}
        old = [port for port in settings.get("ports") or () if (port["port"], port["proto"]) not in replaced]
        settings["ports"] = [*old, *given["ports"]]
        service.networks.check(settings)

    def change() -> None:
        write_config(container, {**config, "mounts": order_mounts(entries)})
        service.replace_record(container, {**record, "settings": settings, "mounts": [*kept, *added]})
        service.networks.write(container)

    return _made_anew(container, change)


def _made_anew(container: Container, change: Callable[[], None]) -> list[str]:
    """Stop it, change what its next start reads, start it."""
    was_running = container.status in ("running", "paused", "restarting")
    if was_running:
        container.stop()
    change()
    container._containers.tell(container, "update")
    if not was_running:
        return []
    try:
        container.start()
    except LabkernelError as err:
        err.details = f"container {container.name} was stopped for the change and could not be started again"
        raise
    return [f"{container.name} was stopped and started again: mounts and ports are made at the start"]
