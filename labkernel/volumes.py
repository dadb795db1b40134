"""Named volumes: directories of the store that outlive containers.

A new volume takes over what the image has at the place where it is first mounted (copy-up), as with docker. Snapshots
are in `running/snapshots`. Left out: volume drivers, and of the local driver's options all but a directory elsewhere.
Source: Docker Engine API, Volume.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .display import human_age, table_html, table_text, without_formulas
from .errors import ConflictError, InvalidFilter, NoSuchVolume, TaskError, UsageError
from .events import insert_event
from .runtime.copies import remove_tree
from .runtime.logs import timestamp
from .runtime.settings import check_volume_name

if TYPE_CHECKING:
    from .runtime.client import Runtime
    from .store.database import Database
    from .store.layout import Layout

ANONYMOUS_LABEL = "com.docker.volume.anonymous"


class Volumes:
    """The volumes of one store. Safe to use from several threads and processes at once."""

    def __init__(self, layout: Layout, db: Database, runtime: Runtime) -> None:
        self.layout = layout
        self.db = db
        self.runtime = runtime

    def create(
        self,
        name: str | None = None,
        driver: str = "local",
        driver_opts: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """A new volume, or the one of that name. Without a name it gets 64 hex digits. Raises UsageError."""
        if driver != "local":
            raise UsageError(f'error looking up volume plugin {driver}: plugin "{driver}" not found')
        options = _check_options(driver_opts or {})
        name = check_volume_name(name) if name else secrets.token_hex(32)
        existing = self._find(name)
        if existing is not None:
            return existing
        (self.layout.volumes / name / "_data").mkdir(parents=True, mode=0o755, exist_ok=True)
        with self.db.transaction() as tx:
            tx.execute(
                "INSERT OR IGNORE INTO volumes (name, created_at, labels, options) VALUES (?, ?, ?, ?)",
                (name, time.time(), json.dumps(dict(labels or {})), json.dumps(options)),
            )
            insert_event(tx, "volume", "create", name, {"driver": "local"})
        return self.get(name)

    def get(self, name: str) -> Volume:
        """The volume of that name. Raises NoSuchVolume."""
        found = self._find(name)
        if found is None:
            raise NoSuchVolume(name)
        return found

    def list(self, filters: Mapping[str, Any] | None = None) -> VolumeList:
        """All volumes by name; filters: name, label, dangling."""
        volumes = [self._volume(row) for row in self.db.query("SELECT * FROM volumes ORDER BY name")]
        conditions = dict(filters or {})
        names = _words(conditions.pop("name", None))
        labels = _words(conditions.pop("label", None))
        unwanted = _words(conditions.pop("label!", None))
        dangling = _words(conditions.pop("dangling", None))
        if conditions:
            raise InvalidFilter(f"invalid filter '{next(iter(conditions))}'")
        if names:
            volumes = [volume for volume in volumes if any(name in volume.name for name in names)]
        for word in [*labels, *unwanted]:
            key, separator, value = word.partition("=")
            fitting = [v for v in volumes if key in v.labels and (not separator or v.labels[key] == value)]
            volumes = fitting if word in labels else [v for v in volumes if v not in fitting]
        if dangling:
            used = self._used()
            if dangling[0].lower() not in ("0", "1", "false", "true"):
                raise InvalidFilter(f"invalid filter 'dangling={dangling[0]}'")
            wanted = dangling[0].lower() in ("1", "true")
            volumes = [volume for volume in volumes if (volume.name not in used) == wanted]
        return VolumeList(volumes)

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Remove anonymous volumes that no container names; all unused ones with the filter `all`.

        Returns {"VolumesDeleted": [names], "SpaceReclaimed": bytes}."""
        conditions = dict(filters or {})
        everything = (_words(conditions.pop("all", None)) or ["false"])[0].lower() in ("1", "true")
        deleted, reclaimed = [], 0
        for volume in self.list({**conditions, "dangling": "true"}):
            if everything or ANONYMOUS_LABEL in volume.labels:
                reclaimed += volume.size_bytes()
                volume.remove()
                deleted.append(volume.name)
        self.db.add_event("volume", "prune", "", {"reclaimed": str(reclaimed)})
        return {"VolumesDeleted": deleted, "SpaceReclaimed": reclaimed}

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a volume and its files.

        Raises ConflictError while a container names it, and without `force` NoSuchVolume."""
        volume = self._find(name)
        if volume is None:
            if force:
                return
            raise NoSuchVolume(name)
        users = self._used().get(name)
        if users:
            raise ConflictError(
                f"remove {name}: volume is in use - [{', '.join(users)}]", resolution="remove the container first"
            )
        with self.db.transaction() as tx:
            tx.execute("DELETE FROM volumes WHERE name = ?", (name,))
            insert_event(tx, "volume", "destroy", name, {"driver": "local"})
        directory = self.layout.volumes / name
        try:
            remove_tree(str(directory))
        except PermissionError:
            # files of ids that exist only inside the driver's user namespace
            self.runtime.task("labkernel.runtime.copies:remove_tree", path=str(directory))
        except OSError as err:
            raise TaskError.from_oserror(f"remove volume {name}", err) from err

    def prepare(self, name: str, *, layers: Sequence[str], destination: str, copy: bool) -> Path:
        """The data directory of volume `name`, made and filled from the image's `destination` on first use."""
        volume = self._find(name)
        if volume is None:
            volume = self.create(name)
        if volume.options and not volume.source.is_dir():
            raise UsageError(f"failed to mount local volume: no such directory: {volume.source}")
        if copy and _may_be_empty(volume.source) and any(_has_entry(layer, destination) for layer in layers):
            self.runtime.task(
                "labkernel.runtime.copies:copy_up",
                lowers=list(layers),
                path=destination,
                target=str(volume.source),
            )
        return volume.source

    def _find(self, name: str) -> Volume | None:
        row = self.db.find("SELECT * FROM volumes WHERE name = ?", (name,))
        return self._volume(row) if row else None

    def _volume(self, row: Any) -> Volume:
        return Volume(self, row["name"], row["created_at"], json.loads(row["labels"]), json.loads(row["options"]))

    def running_users(self, name: str) -> Sequence[str]:
        """Ids of the containers that run and mount the volume."""
        users = self._used().get(name) or []
        states = self.runtime.states(users) if users else {}
        return [id for id, state in states.items() if state["status"] in ("running", "paused", "restarting")]

    def _used(self) -> dict[str, Sequence[str]]:
        """Volume -> ids of the containers that mount it."""
        found: dict[str, Any] = {}
        for row in self.db.query("SELECT id, settings FROM containers WHERE settings LIKE '%\"volume\"%'"):
            for mount in json.loads(row["settings"]).get("mounts", ()):
                if mount.get("type") == "volume" and (self.layout.containers / row["id"]).is_dir():
                    found.setdefault(mount["name"], []).append(row["id"])
        return found


class Volume:
    """One named volume."""

    def __init__(
        self,
        volumes: Volumes,
        name: str,
        created_at: float,
        labels: Mapping[str, str],
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._volumes = volumes
        self.name = name
        self.created_at = created_at
        self.labels = dict(labels)
        self.options = dict(options or {})

    @property
    def id(self) -> str:
        return self.name

    @property
    def short_id(self) -> str:
        return self.name[:20]

    @property
    def mountpoint(self) -> Path:
        """The volume's directory in the store."""
        return self._volumes.layout.volumes / self.name / "_data"

    @property
    def source(self) -> Path:
        """The directory with the volume's files: `mountpoint`, or the one elsewhere that its options name."""
        return Path(self.options["device"]) if self.options else self.mountpoint

    def snapshot(self, name: str | None = None) -> str:
        """Keep its files as they are now; returns the snapshot's name. See `running.snapshots.take`."""
        from .running import snapshots

        made = snapshots.take(self, name)
        self._tell("snapshot", made)
        return made

    def restore(self, name: str | None = None) -> str:
        """Go back to a snapshot, the newest when none is named; returns its name. Raises NoSuchSnapshot, and
        ConflictError while a running container uses the volume."""
        from .running import snapshots

        used = snapshots.restore(self, name)
        self._tell("restore", used)
        return used

    def snapshots(self) -> list[dict[str, Any]]:
        """Its snapshots, oldest first: {"Name", "CreatedAt"}."""
        from .running import snapshots

        return snapshots.listed(self)

    def remove_snapshot(self, name: str) -> None:
        """Raises NoSuchSnapshot."""
        from .running import snapshots

        snapshots.remove(self, name)

    def _tell(self, action: str, snapshot: str) -> None:
        self._volumes.db.add_event("volume", action, self.name, {"driver": "local", "snapshot": snapshot})

    @property
    def attrs(self) -> dict[str, Any]:
        """As `docker volume inspect` shows it."""
        return {
            "CreatedAt": timestamp(int(self.created_at * 1e9)),
            "Driver": "local",
            "Labels": self.labels or None,
            "Mountpoint": str(self.mountpoint),
            "Name": self.name,
            "Options": self.options or None,
            "Scope": "local",
            **({"Labkernel": {"Snapshots": kept}} if (kept := self.snapshots()) else {}),
        }

    def size_bytes(self) -> int:
        """Disk space of the files, as far as this user may look."""
        total = 0
        for directory, _, files in os.walk(self.mountpoint):
            for name in files:
                try:
                    total += os.lstat(os.path.join(directory, name)).st_blocks * 512
                except OSError:
                    pass
        return total

    def remove(self, *, force: bool = False) -> None:
        """Remove the volume and its files; see `Volumes.remove`."""
        self._volumes.remove(self.name, force=force)

    def reload(self) -> None:
        """Read labels and age anew. Raises NoSuchVolume."""
        fresh = self._volumes.get(self.name)
        self.created_at, self.labels, self.options = fresh.created_at, fresh.labels, fresh.options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Volume) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<Volume: {self.short_id}>"

    @without_formulas
    def _repr_html_(self) -> str:
        return VolumeList([self])._repr_html_()


class VolumeList(list[Volume]):
    """Volumes that display themselves as `docker volume ls` does."""

    header = ("DRIVER", "VOLUME NAME", "CREATED")

    def rows(self) -> list[tuple[str, str, str]]:
        return [("local", volume.name, human_age(volume.created_at)) for volume in self]

    def __repr__(self) -> str:
        return table_text(self.header, self.rows())

    @without_formulas
    def _repr_html_(self) -> str:
        return table_html(self.header, self.rows())


def _check_options(given: Mapping[str, str]) -> dict[str, str]:
    """The local driver's `type`, `o` and `device`, of which a bound directory is possible: it needs no mount that would
    outlive a container. Raises UsageError."""
    options = {str(key).lower(): str(value) for key, value in given.items()}
    foreign = next((key for key in options if key not in ("type", "o", "device")), None)
    if foreign:
        raise UsageError(f'invalid option: "{foreign}"', resolution="the options are type, o and device")
    if not options:
        return {}
    words = options.get("o", "").split(",")
    if options.get("type", "none") not in ("none", "bind", "") or not {"bind", "rbind"} & set(words):
        raise UsageError(
            f"local volumes of type {options.get('type') or 'none'} with o={options.get('o', '')} are not available",
            resolution="type=none,o=bind,device=/DIRECTORY is; for memory: run --tmpfs DIRECTORY:size=…",
        )
    if not options.get("device", "").startswith("/"):
        raise UsageError("missing device in volume options", resolution="device=/DIRECTORY")
    return options


def _may_be_empty(directory: Path) -> bool:
    try:
        return not os.listdir(directory)
    except PermissionError:
        return True  # of an id that exists only inside the driver's user namespace: `copy_up` looks there again


def _has_entry(layer: str, destination: str) -> bool:
    try:
        os.lstat(f"{layer}/{destination.strip('/')}")
    except PermissionError:
        return True  # as above
    except OSError:
        return False
    return True


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, Mapping):  # the API's {"value": true}
        return [str(key) for key, on in value.items() if on]
    return [str(word) for word in value] if isinstance(value, (list, tuple, set)) else [str(value)]
