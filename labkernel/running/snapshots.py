"""Snapshots of volumes: a copy of the files under a name, and the way back to it (`volume snapshot`, `restore`).

They lie beside the volume's files, in `volumes/NAME/snapshots`, and go with it. A snapshot appears under its name when
it is whole; a restore exchanges two directories, so whoever looks finds the old files or the new ones. Copies are
reflinks where the file system can. Work on files is done in the worker, inside the driver's namespaces.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, NotFoundError, UsageError
from ..runtime.logs import timestamp
from ..runtime.settings import VOLUME_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from ..volumes import Volume

_FOLDER = "snapshots"
_PARTIAL = "."  # no snapshot's name begins so


class NoSuchSnapshot(NotFoundError):
    """A volume has no snapshot of that name, or none at all."""

    kind = "snapshot"
    listing = "volume inspect"


def take(volume: Volume, name: str | None = None) -> str:
    """Keep the files of `volume` as they are now; returns the snapshot's name, which is the time when none is given.

    Of a volume that a running container writes to, each file is as it was when it was copied.
    Raises UsageError for a name that is none, ConflictError for one that is taken."""
    if name is not None and not VOLUME_NAME.fullmatch(name):
        raise UsageError(f"Invalid snapshot name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    folder = _folder(volume)
    folder.mkdir(mode=0o755, exist_ok=True)
    name = name or _time_name(folder)
    if (folder / name).exists():
        raise ConflictError(f"volume {volume.name} has a snapshot {name}", resolution="choose another name")
    volume._volumes.runtime.task(
        "labkernel.runtime.copies:snapshot",
        source=str(volume.source),
        partial=str(folder / f"{_PARTIAL}{secrets.token_hex(8)}"),
        target=str(folder / name),
    )
    return name


def restore(volume: Volume, name: str | None = None) -> str:
    """Put the files of snapshot `name` (the newest, when none is given) in the place of the volume's; returns the name.

    What a running container has mounted would not change for it, so then ConflictError. Raises NoSuchSnapshot."""
    known = [each["Name"] for each in listed(volume)]
    if not known or (name is not None and name not in known):
        raise NoSuchSnapshot(f"{volume.name}:{name}" if name else volume.name)
    name = name or known[-1]
    users = volume._volumes.running_users(volume.name)
    if users:
        raise ConflictError(
            f"restore {volume.name}: volume is in use by running containers - [{', '.join(users)}]",
            resolution=f"`container stop {users[0][:12]}`, restore, then start it again",
        )
    folder = _folder(volume)
    volume._volumes.runtime.task(
        "labkernel.runtime.copies:restore",
        source=str(folder / name),
        partial=str(folder / f"{_PARTIAL}{secrets.token_hex(8)}"),
        target=str(volume.source),
    )
    return name


def remove(volume: Volume, name: str) -> None:
    """Raises NoSuchSnapshot."""
    if name not in [each["Name"] for each in listed(volume)]:
        raise NoSuchSnapshot(f"{volume.name}:{name}")
    volume._volumes.runtime.task("labkernel.runtime.copies:remove_tree", path=str(_folder(volume) / name))


def listed(volume: Volume) -> list[dict[str, Any]]:
    """{"Name", "CreatedAt"} of each, oldest first."""
    found = []
    try:
        with os.scandir(_folder(volume)) as entries:
            for entry in entries:
                if not entry.name.startswith(_PARTIAL):
                    found.append((entry.stat(follow_symlinks=False).st_ctime_ns, entry.name))
    except FileNotFoundError:
        return []
    # ctime: the time of the rename that gave it its name; mtime is the copied directory's own
    return [{"Name": name, "CreatedAt": timestamp(moment)} for moment, name in sorted(found)]


def _folder(volume: Volume) -> Path:
    return volume._volumes.layout.volumes / volume.name / _FOLDER


def _time_name(folder: Path) -> str:
    name = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    number = 1
    while (folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}-{number}"
