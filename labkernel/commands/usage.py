"""`system df`: what the store takes on disk, by kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..display import human_size
from .values import Listing, tabulate

TITLES = {
    "Type": "TYPE",
    "TotalCount": "TOTAL",
    "Active": "ACTIVE",
    "Size": "SIZE",
    "Reclaimable": "RECLAIMABLE",
}


def disk_bytes(path: Path) -> int:
    """Bytes a tree takes on disk, hard links once; what may not be read is left out."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, _, names in os.walk(path, onerror=lambda err: None):
        for name in (*names, "."):
            try:
                info = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            if (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_blocks * 512
    return total


def _machines(engine: Any) -> tuple[str, int, int, int, int]:
    """Virtual machines: all can be made again but those that run, and the kernels."""
    machines, sizes = engine.vms.list(all=True), engine.vms.usage()
    active = [vm for vm in machines if vm.status in ("running", "paused")]
    busy = sum(disk_bytes(vm.directory) for vm in active)
    return ("VMs", len(machines), len(active), sum(sizes.values()), sum(sizes.values()) - busy - sizes["kernels"])


def _build_cache(engine: Any) -> tuple[str, int, int, int, int]:
    """Steps, cache mounts and downloads; a layer that an image has as well is counted there."""
    from ..building.usage import taken_bytes

    found = engine.builds.usage()
    active = [record for record in found if record.in_use]
    return ("Build Cache", len(found), len(active), taken_bytes(found), taken_bytes(found) - taken_bytes(active))


def usage_table(engine: Any, form: str | None) -> Listing:
    """docker's four lines: images, containers, local volumes, build cache; and ours for virtual machines."""
    images = engine.images.list(all=True)
    containers = engine.containers.list(all=True)
    volumes = engine.volumes.list()
    layout = engine.layout
    used_images = {str(container.attrs.get("Image", "")) for container in containers}
    used_volumes = {m.get("Name") for c in containers for m in c.attrs.get("Mounts") or () if m.get("Type") == "volume"}
    stopped = [container for container in containers if container.status not in ("running", "paused", "restarting")]
    shared = {layer.diff_id: layer.size_bytes for image in images for layer in image.layers}
    free = {
        layer.diff_id: layer.size_bytes for image in images if image.id not in used_images for layer in image.layers
    }
    kept = {layer.diff_id for image in images if image.id in used_images for layer in image.layers}
    sizes = {volume.name: disk_bytes(layout.volumes / volume.name) for volume in volumes}
    stopped_bytes = sum(disk_bytes(layout.container_dir(container.id)) for container in stopped)
    rows = [
        ("Images", len(images), sum(i.id in used_images for i in images), sum(shared.values()),
         sum(size for diff_id, size in free.items() if diff_id not in kept)),
        ("Containers", len(containers), len(containers) - len(stopped), disk_bytes(layout.containers), stopped_bytes),
        ("Local Volumes", len(volumes), sum(v.name in used_volumes for v in volumes), sum(sizes.values()),
         sum(size for name, size in sizes.items() if name not in used_volumes)),
        _build_cache(engine),
        _machines(engine),
    ]  # fmt: skip

    def view(row: tuple[str, int, int, int, int]) -> dict[str, Any]:
        kind, total, active, size, reclaimable = row
        percent = f" ({100 * reclaimable // size}%)" if size else ""
        return {
            "Type": kind,
            "TotalCount": str(total),
            "Active": str(active),
            "Size": human_size(size),
            "Reclaimable": f"{human_size(reclaimable)}{percent}",
        }

    return tabulate(rows, view, TITLES, columns=tuple(TITLES), form=form)
