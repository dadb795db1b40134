"""The fields docker's templates know of our objects: one dictionary per container, image or volume. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ..display import human_age, human_duration, human_size, joined_command
from ..networking.settings import port_words

CONTAINER_TITLES = {
    "ID": "CONTAINER ID",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "CreatedAt": "CREATED AT",
    "RunningFor": "CREATED",
    "Ports": "PORTS",
    "State": "STATE",
    "Status": "STATUS",
    "Size": "SIZE",
    "Names": "NAMES",
    "Labels": "LABELS",
    "Mounts": "MOUNTS",
    "Networks": "NETWORKS",
    "LocalVolumes": "LOCAL VOLUMES",
}
CONTAINER_COLUMNS = ("ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names")

IMAGE_TITLES = {
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "Digest": "DIGEST",
    "ID": "IMAGE ID",
    "CreatedSince": "CREATED",
    "CreatedAt": "CREATED AT",
    "Size": "SIZE",
}
IMAGE_COLUMNS = ("Repository", "Tag", "ID", "CreatedSince", "Size")


def epoch(moment: Any) -> float:
    """Seconds since the epoch of an RFC 3339 text or a number; 0.0 for what is neither (docker's year 1 included)."""
    if isinstance(moment, (int, float)):
        return float(moment)
    if isinstance(moment, datetime):
        return moment.timestamp()
    text = str(moment or "")
    if not text or text.startswith("0001-"):
        return 0.0
    head, dot, rest = text.partition(".")
    if dot:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        text = f"{head}.{digits[:6].ljust(6, '0')}{rest[len(digits) :]}"
    try:
        parsed = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def created_at(seconds: float) -> str:
    """As docker prints CreatedAt: `2026-11-02 10:20:30 +0000 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime(seconds)) if seconds else "N/A"


def age(moment: Any) -> str:
    seconds = epoch(moment)
    return human_age(seconds) if seconds else "N/A"


def container_status(state: Mapping[str, Any]) -> str:
    """docker's STATUS column: `Up 5 seconds (Paused)`, `Exited (0) 2 minutes ago`, `Created`."""
    status = str(state.get("Status", "created")).lower()
    if status in ("running", "paused", "restarting"):
        up = human_duration(max(0.0, time.time() - (epoch(state.get("StartedAt")) or time.time())))
        health = (state.get("Health") or {}).get("Status")
        if status == "restarting":
            return f"Restarting ({state.get('ExitCode', 0)}) {age(state.get('FinishedAt'))}"
        shown = "health: starting" if health == "starting" else health
        suffix = " (Paused)" if status == "paused" else f" ({shown})" if health and health != "none" else ""
        return f"Up {up}{suffix}"
    if status in ("exited", "stopped"):
        return f"Exited ({state.get('ExitCode', 0)}) {age(state.get('FinishedAt'))}"
    return {"created": "Created", "dead": "Dead", "removing": "Removal In Progress"}.get(status, status.title())


def _sizes(container: Any) -> str:
    own, all_of_it = container.sizes()
    return f"{human_size(own)} (virtual {human_size(all_of_it)})"


def container_view(container: Any, *, no_trunc: bool = False, sizes: bool = False) -> dict[str, Any]:
    """The fields of `docker ps --format`; from the object's attrs (docker inspect shape). `sizes` are looked for only
    when asked for: they cost a walk over its files."""
    attrs: Mapping[str, Any] = container.summary
    config = attrs.get("Config") or {}
    words = [attrs.get("Path") or "", *(attrs.get("Args") or ())]
    command = joined_command(words).replace("\n", " ")
    short = command if no_trunc or len(command) <= 20 else f"{command[:19]}…"
    labels = config.get("Labels") or {}
    mounts = [str(m.get("Name") or m.get("Source") or "") for m in attrs.get("Mounts") or ()]
    network: Mapping[str, Any] = attrs.get("NetworkSettings") or {}
    created = epoch(attrs.get("Created"))
    return {
        "ID": container.id if no_trunc else container.id[:12],
        "Image": config.get("Image") or attrs.get("Image", ""),
        "Command": f'"{short}"',
        "CreatedAt": created_at(created),
        "RunningFor": age(created),
        "Ports": port_words(network.get("Ports") or {}),
        "State": str((attrs.get("State") or {}).get("Status", "created")),
        "Status": container_status(attrs.get("State") or {}),
        "Size": _sizes(container) if sizes else "0B",
        "Names": container.name,
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "Mounts": ",".join(m if no_trunc or len(m) <= 15 else f"{m[:14]}…" for m in mounts),
        "Networks": ",".join(network.get("Networks") or ()),
        "LocalVolumes": str(sum(1 for m in attrs.get("Mounts") or () if m.get("Type") == "volume")),
        "Label": lambda name: labels.get(name, ""),
    }


ImageRow = tuple[Any, str, str, str]


def image_rows(image: Any, *, digests: bool = False) -> list[ImageRow]:
    """(image, repository, tag, digest) of each name, as docker lists images; `<none>` where there is none.

    A repository that knows the image by digest only has a row of its own; with `digests` each digest has one.
    """
    known: dict[str, list[str]] = {}
    for name, _, digest in (each.partition("@") for each in image.repo_digests):
        known.setdefault(name, []).append(digest)
    rows: list[ImageRow] = []
    for reference in image.tags:
        name, colon, tag = reference.rpartition(":")
        if not colon or "/" in tag:
            name, tag = reference, "latest"
        found = known.get(name) or ["<none>"]
        rows += [(image, name, tag, digest) for digest in (found if digests else found[:1])]
    tagged = {row[1] for row in rows}
    for name, found in known.items():
        if name not in tagged:
            rows += [(image, name, "<none>", digest) for digest in (found if digests else found[:1])]
    return rows or [(image, "<none>", "<none>", "<none>")]


def deleted(record: Mapping[str, str]) -> str:
    """A record of ImageDelete as `docker image prune` prints it: `untagged: web:v1`."""
    return ", ".join(f"{what.lower()}: {name}" for what, name in record.items())


def image_view(row: ImageRow, *, no_trunc: bool = False) -> dict[str, Any]:
    """The fields of `docker images --format`."""
    image, name, tag, digest = row
    created = epoch(image.created)
    return {
        "Repository": name,
        "Tag": tag,
        "Digest": digest,
        "ID": image.id if no_trunc else image.id.removeprefix("sha256:")[:12],
        "CreatedSince": age(created),
        "CreatedAt": created_at(created),
        "Size": human_size(image.size_bytes),
        "VirtualSize": human_size(image.size_bytes),
        "Containers": "N/A",
        "SharedSize": "N/A",
        "UniqueSize": "N/A",
    }
