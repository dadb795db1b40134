"""Containers: create, run, find, list and remove them. The service that joins images, volumes, driver and supervisor.

What a container is lies in three places with three lifetimes: the row (name, image, settings), the directory
(`config.json`, writable layer, log) and the supervisor's `state.json`. The directory comes first and goes first, so a
row without one is a container that has removed itself (`--rm`) and is dropped when it is met.
Names, arguments and results are the Docker SDK's. Source: Docker SDK for Python, `ContainerCollection`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import (
    ConflictError,
    ContainerExit,
    LabkernelError,
    NoSuchContainer,
    NoSuchImage,
    StartError,
    TaskError,
    UsageError,
)
from .events import container_attributes, insert_event, remembered_attributes
from .imaging.provision import (
    Programs,
    RootDirectory,
    add_devices,
    find_warnings,
    inherited_mounts,
    make_mounts,
    needs_no_mknod,
    spec_mount,
)
from .linux.files import read_file
from .running import platforms
from .running.container import Container, ContainerList, disk_bytes
from .runtime import prootprogram, sharing
from .runtime.copies import remove_tree
from .runtime.driver import Driver, cgroup_parent
from .runtime.instances import is_alive
from .runtime.names import random_name
from .runtime.settings import NAME, normalize, parse_command
from .runtime.spec import finalize_args, finalize_spec, without_mknod
from .store.locks import is_abandoned, is_locked
from .volumes import Volumes

if TYPE_CHECKING:
    from .images import Images
    from .imaging.image import Image
    from .networks import Networks
    from .runtime.client import Attachment, Runtime
    from .store.database import Database
    from .store.layout import Layout

Notify = Callable[[str], None]
# `list` is a method of Containers, so the types that need the built-in one are named here.
Words = list[str]
Chunks = list[bytes]
Found = list[Container]

LEFTOVER_AGE_S = 60.0
REATTACH_ATTEMPTS = 4
OOM_HINT = "the kernel killed it for using more memory than its limit: a higher --memory (mem_limit) helps"


class Containers:
    """The containers of one store. Safe to use from several threads and processes at once."""

    def __init__(
        self,
        layout: Layout,
        db: Database,
        runtime: Runtime,
        driver: Driver,
        images: Images | Callable[[], Images],
        volumes: Volumes,
        *,
        networks: Networks,
    ) -> None:
        self.networks = networks
        self.layout = layout
        self.db = db
        self.runtime = runtime
        self.driver = driver
        self._images = images
        self.volumes = volumes
        self.cgroup_parent = cgroup_parent(layout)
        self._programs = Programs(layout.root / "seccomp")
        self._layers: dict[str, Words] = {}
        # Started by this process and not yet seen so in a state file: the supervisor answers before it writes that.
        self._fresh: set[str] = set()

    @property
    def images(self) -> Images:
        """The images of the store; listing containers does not need them."""
        if callable(self._images):
            self._images = self._images()
        return self._images

    @property
    def driver_name(self) -> str:
        return self.driver.name

    # -- making -----------------------------------------------------------------------------------------------------

    def create(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        notify: Notify | None = None,
        **settings: Any,
    ) -> Container:
        """A new container that has not been started. `settings` are the Docker SDK's keyword arguments.

        `notify` gets lines about an image that has to be fetched first. Raises UsageError for settings that do not
        fit, ConflictError when the name is taken, NoSuchImage; then nothing is left behind.
        """
        given = normalize(settings)
        name = given.pop("name", None)
        sharing.resolve(given, self.get)
        inherited = inherited_mounts(given, self.get)
        found = self._image(image, notify, given.get("platform"))
        ref = image if isinstance(image, str) else (found.tags or [found.id])[0]
        words = parse_command(command)
        args = finalize_args(words, found.config, given)
        platform_warnings = platforms.check(found, given)
        self.networks.check(given)
        id = secrets.token_hex(32)
        made: Words = []  # anonymous volumes, to take back when something fails
        directory = str(self.layout.container_dir(id))
        os.mkdir(directory, 0o755)
        try:
            mounts = make_mounts(self.volumes, found.config, given, self._lower(found), made, inherited)
            record = {
                "command": words,
                "args": args,
                "settings": given,
                "labels": {**(found.config.get("Labels") or {}), **given.get("labels", {})},
                "mounts": mounts,
                "exposed": sorted({*(found.config.get("ExposedPorts") or ()), *given.get("exposed_ports", ())}),
                "warnings": [*find_warnings(self.driver, given), *platform_warnings],
            }
            self._write_config(id, directory, found, record)
            return self._insert(id, name, found, ref, record)
        except BaseException as err:
            remove_tree(directory)
            for volume in made:
                self.volumes.remove(volume, force=True)
            if isinstance(err, OSError):
                raise TaskError.from_oserror("create container", err) from err
            raise

    def run(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        stdout: bool = True,
        stderr: bool = False,
        remove: bool = False,
        detach: bool = False,
        stream: bool = False,
        **settings: Any,
    ) -> Any:
        """Create and start. Returns the Container with `detach`, else what it wrote as bytes (or an iterator with
        `stream`), after it has ended. Not detached it ends with this process, also when that is killed.

        Raises StartError when the command cannot be started, ContainerExit when it ends with a status other than 0.
        """
        settings["auto_remove"] = remove or settings.get("auto_remove")
        if detach:
            container = self.create(image, command, **settings)
            with self._taken_back_when_failing(container):
                container.start()
            return container
        container, attachment = self.run_attached(image, command, tied=True, **settings)
        wanted = {name for name, on in (("stdout", stdout), ("stderr", stderr)) if on}
        if stream:
            lines = self._stream(container, attachment, wanted)
            # Who drops it, even before the first line, has detached; who dies has not.
            weakref.finalize(lines, attachment.close).atexit = False
            return lines
        output: Chunks = []
        errors: Chunks = []
        attachment = self._pump(container, attachment, wanted, output, errors)
        self._check_exit(container, attachment, b"".join(errors))
        return b"".join(output)

    def run_attached(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        tied: bool = False,
        kept: bool = True,
        **settings: Any,
    ) -> tuple[Container, Attachment]:
        """Create, attach and start in one go: the container and its live output. Raises StartError."""
        container = self.create(image, command, **settings)
        return container, self.start_attached(container, tied=tied, kept=kept)

    def start_attached(self, container: Container, *, tied: bool = False, kept: bool = True) -> Attachment:
        """Attach to a new container and start it; one that removes itself is taken back when that fails. `tied`: when
        this process dies without having closed the attachment, the container ends (and is removed, unless `kept`)."""
        stdin = bool(container.settings.get("stdin_open"))
        with self._taken_back_when_failing(container):
            attachment = self.runtime.run(container.id, stdin=stdin, tied=tied, kept=kept)
        self._fresh.add(container.id)
        # what only the start could tell: a resource limit that may not be raised, for one
        container.record["warnings"].extend(attachment.warnings)
        return attachment

    # -- finding ----------------------------------------------------------------------------------------------------

    def get(self, container_id: str) -> Container:
        """The container of that id, name or unique beginning of an id. Raises NoSuchContainer, UsageError."""
        wanted = str(container_id).removeprefix("/")
        rows = self.db.query("SELECT * FROM containers WHERE id = ? OR name = ?", (wanted, wanted))
        rows.sort(key=lambda row: row["id"] != wanted)
        if not rows and wanted and len(wanted) < 64 and all(letter in "0123456789abcdef" for letter in wanted):
            rows = self.db.query("SELECT * FROM containers WHERE id >= ? AND id < ?", (wanted, wanted + "g"))
            rows = [row for row in rows if self._is_there(row["id"])]
            if len(rows) > 1:
                raise UsageError(
                    f"multiple IDs found with provided prefix: {wanted}", resolution="give a few more digits"
                )
        for row in rows:
            if self._is_there(row["id"]):
                return self._container(row)
            self._forget(self._container(row))
        raise NoSuchContainer(container_id)

    def list(
        self,
        all: bool = False,  # noqa: FBT001, FBT002 -- the SDK's own signature
        *,
        filters: Mapping[str, Any] | None = None,
        limit: int | None = None,
        **more: Any,
    ) -> ContainerList:
        """Running containers, newest first; all of them with `all`, or the `limit` newest.

        Filters as docker's: id name label status exited ancestor before since volume network."""
        before, since = more.pop("before", None), more.pop("since", None)
        for key in ("sparse", "ignore_removed"):
            more.pop(key, None)
        if more:
            raise UsageError(f"unknown argument: {next(iter(more))}")
        from .running.filters import select_containers

        conditions = dict(filters or {})
        conditions.update({key: value for key, value in (("before", before), ("since", since)) if value})
        return ContainerList(select_containers(self, self._all(), conditions, everything=all, limit=limit))

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Remove all containers that do not run; filters: until, label.

        Returns {"ContainersDeleted": [ids], "SpaceReclaimed": bytes}."""
        from .running.filters import select_stopped

        self.reconcile()
        deleted, reclaimed = [], 0
        for container in select_stopped(self._all(), dict(filters or {})):
            size = disk_bytes(container.directory)
            with contextlib.suppress(NoSuchContainer, ConflictError):
                self.remove(container)
                deleted.append(container.id)
                reclaimed += size
        self.db.add_event("container", "prune", "", {"reclaimed": str(reclaimed)})
        return {"ContainersDeleted": deleted, "SpaceReclaimed": reclaimed}

    # -- what Container calls ---------------------------------------------------------------------------------------

    def start(self, id: str) -> Words:
        """See `Container.start`; returns what only the start could tell, such as a limit that may not be raised."""
        container = self.get(id)
        self.networks.before_start(container)
        try:
            warnings = self.runtime.begin(id).get("warnings") or []
        except StartError:
            if container.settings.get("auto_remove"):
                with contextlib.suppress(LabkernelError):  # gone before anybody is told, as with docker
                    self.remove(container, force=True)
            raise
        # The supervisor answers before it writes the state file, and takes one request after the other: once it has
        # answered this, other processes see the container run, too.
        self.runtime.states([id])
        return [str(line) for line in warnings]

    def state(self, id: str) -> dict[str, Any]:
        """The state of a container; see `Container.runtime_state`."""
        path = f"{self.layout.root}/containers/{id}/state.json"
        state = _read_state(path)
        if id in self._fresh:
            self._fresh.discard(id)
            if state is None or state["status"] not in ("running", "paused"):
                state = self.runtime.states([id]).get(id) or state
        if state is None:
            # Its configuration is there first and goes first: without it, it is being removed at this moment.
            if not os.path.exists(f"{self.layout.root}/containers/{id}/config.json"):
                raise NoSuchContainer(id[:12])
            return {"id": id, "status": "created"}
        if state["status"] in ("running", "paused") and not is_alive(state):
            # It ended a moment ago, or the machine was switched off: the supervisor knows or finds out.
            fresh = self.runtime.states([id]).get(id)
            if fresh is None and not self._is_there(id):
                raise NoSuchContainer(id[:12])
            return fresh or {**state, "status": "exited", "exit_code": 255, "pid": 0}
        return state

    def remove(self, container: Container, *, force: bool = False, volumes: bool = False) -> None:
        """See `Container.remove`."""
        with contextlib.suppress(NoSuchContainer):
            status = self.state(container.id)["status"]
            if status in ("running", "paused", "restarting") and not force:
                told = "stop the container before removing or force remove"
                if status == "paused":
                    told = "unpause and then stop the container before removing or force remove"
                raise ConflictError(
                    f'cannot remove container "/{container.name}": container is {status}: {told}',
                    resolution=f"`container stop {container.name}`, or `rm -f`",
                )
            self.runtime.remove(container.id, force=force)
        self._forget(container, volumes=volumes or bool(container.settings.get("auto_remove")))

    def tell(self, container: Container, action: str, **attributes: Any) -> None:
        """Record an event of a container which the supervisor does not see."""
        about = container_attributes(container.name, container.image_ref, container.labels)
        self.db.add_event("container", action, container.id, {**about, **attributes})

    def replace_record(self, container: Container, record: dict[str, Any]) -> None:
        """Keep something else in the row of a container."""
        with self.db.transaction() as tx:
            tx.execute("UPDATE containers SET settings = ? WHERE id = ?", (json.dumps(record), container.id))
        container._record = record

    def rename(self, container: Container, name: str) -> None:
        """See `Container.rename`."""
        if name == container.name:
            raise UsageError("Renaming a container with the same name as its current name")
        try:
            with self.db.transaction() as tx:
                tx.execute("UPDATE containers SET name = ? WHERE id = ?", (name, container.id))
                about = remembered_attributes(name, container.image_ref, container.record)
                insert_event(tx, "container", "rename", container.id, {**about, "oldName": f"/{container.name}"})
        except sqlite3.IntegrityError:
            raise self._name_taken(name) from None
        container.name = name
        self.networks.refresh(container)

    def reconcile(self) -> dict[str, Sequence[str]]:
        """Drop rows whose container has removed itself, and directories that a crash left without a row.

        Returns {"rows": ids, "directories": ids}. Costs one directory listing."""
        there = {entry.name for entry in os.scandir(self.layout.containers)}
        rows = {row["id"]: row for row in self.db.query("SELECT * FROM containers")}
        gone = [id for id in rows if id not in there]
        for id in gone:
            self._forget(self._container(rows[id]))
        left = [id for id in there - rows.keys() if self._is_leftover(id)]
        for id in left:
            with contextlib.suppress(LabkernelError):
                self.runtime.remove(id, force=True)
            if self._is_there(id):
                remove_tree(str(self.layout.container_dir(id)))
        return {"rows": gone, "directories": left}

    def seccomp_program(self, settings: Mapping[str, Any], warnings: Words) -> str | None:
        """Path of the compiled system call filter for these settings; see `Programs.find`. Builds use it, too."""
        return self._programs.find(settings, warnings)

    _seccomp_program = seccomp_program

    # -- parts ------------------------------------------------------------------------------------------------------

    def _image(self, image: str | Image, notify: Notify | None, platform: str | None = None) -> Image:
        if not isinstance(image, str):
            return image
        if image.startswith("/"):
            return RootDirectory(image)  # type: ignore[return-value]
        if not image:
            raise UsageError("invalid reference format: no image")
        return self.images.resolve(image, notify=notify or (lambda line: None), platform=platform)

    def _lower(self, image: Image) -> Words:
        """The image's layer directories, top first, remembered while they are there."""
        if not image.id:
            return []
        known = self._layers.get(image.id)
        if known is None or not all(map(os.path.isdir, known)):
            known = self._layers[image.id] = [str(path) for path in self.images.layer_dirs(image)]
        return known

    def _rootfs(self, directory: str, image: Image, settings: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(image, RootDirectory):
            return image.rootfs(directory, self.driver)
        lower = self._lower(image)
        if self.driver.overlay == "copy":
            target = f"{directory}/rootfs"
            os.mkdir(target, 0o755)
            self.runtime.task("labkernel.runtime.copies:flatten", lowers=lower, target=target)
            return {"kind": "dir", "path": target}
        return {
            "kind": "overlay",
            "lower": lower,
            "upper": f"{directory}/upper",
            "work": f"{directory}/work",
            # what nobody will look at again needs no sync when it goes
            "volatile": bool(settings.get("auto_remove")),
            "userxattr": self.driver.userxattr,
        }

    def _write_config(self, id: str, directory: str, image: Image, record: dict[str, Any]) -> None:
        settings = record["settings"]
        masked, host_mounts = image.host_masks
        # PRoot needs system calls for itself that a filter would refuse; find_warnings says that there is none.
        program = self._programs.find(settings, record["warnings"]) if self.driver.name != "proot" else None
        config = finalize_spec(
            id=id,
            command=record["command"],
            image_config=image.config,
            settings=settings,
            rootfs=self._rootfs(directory, image, settings),
            directory=directory,
            mounts=[*host_mounts, *(spec_mount(mount) for mount in record["mounts"])],
            single_id=self.driver.single_id,
            limits=self.driver.cgroup_version != 0,
            devices=self.driver.name == "root" and self.driver.cgroups.get("devices") == "kernel",
            seccomp_program=program,
            cgroup_parent=str(settings.get("cgroup_parent") or "") + self.cgroup_parent,
            hidden=masked,
        )
        if needs_no_mknod(self.driver, settings):
            without_mknod(config)
        add_devices(config, settings, self.driver)
        if self.driver.name == "proot":
            prootprogram.adapt(config, self.layout.root, image.architecture)
        fd = os.open(f"{directory}/config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, json.dumps(config, separators=(",", ":")).encode())
        finally:
            os.close(fd)

    def _insert(self, id: str, name: str | None, image: Image, ref: str, record: dict[str, Any]) -> Container:
        text = json.dumps(record, separators=(",", ":"))
        for attempt in range(20):
            chosen = name or random_name(attempt)
            created_at = time.time()
            try:
                with self.db.transaction() as tx:
                    if image.id and tx.execute("SELECT 1 FROM images WHERE id = ?", (image.id,)).fetchone() is None:
                        raise NoSuchImage(ref)  # removed by somebody else since we looked
                    tx.execute(
                        "INSERT INTO containers (id, name, image_id, image_ref, created_at, settings) "
                        "VALUES (?, ?, ?, ?, ?, ?)",
                        (id, chosen, image.id, ref, created_at, text),
                    )
                    self.networks.join(tx, id, record["settings"])
                    insert_event(tx, "container", "create", id, remembered_attributes(chosen, ref, record))
            except sqlite3.IntegrityError:
                if name is not None and not self._drop_if_gone(name):
                    raise self._name_taken(name) from None
                continue
            container = Container(self, id, chosen, image.id, ref, created_at, record)
            self.networks.write(container)
            return container
        raise ConflictError("no free name was found for the container", resolution="give it one: --name NAME")

    def _drop_if_gone(self, name: str) -> bool:
        row = self.db.find("SELECT * FROM containers WHERE name = ?", (name,))
        if row is not None and self._is_there(row["id"]):
            return False
        if row is not None:
            self._forget(self._container(row))
        return True

    def _name_taken(self, name: str) -> ConflictError:
        row = self.db.find("SELECT id FROM containers WHERE name = ?", (name,))
        owner = row["id"] if row else ""
        return ConflictError(
            f'Conflict. The container name "/{name}" is already in use by container "{owner}". '
            "You have to remove (or rename) that container to be able to reuse that name.",
            resolution=f"`container rm {name}`, or choose another --name",
        )

    @contextlib.contextmanager
    def _taken_back_when_failing(self, container: Container) -> Iterator[None]:
        """A container that removes itself leaves nothing behind when it could not even be started."""
        try:
            yield
        except BaseException:
            if container.settings.get("auto_remove"):
                with contextlib.suppress(LabkernelError):
                    self.remove(container, force=True)
            raise

    def _pump(
        self, container: Container, attachment: Attachment, wanted: set[str], output: Chunks, errors: Chunks
    ) -> Attachment:
        """Read until the end. When the supervisor is lost on the way, its successor tells everything from the start."""
        from .runtime.client import SupervisorLost

        for attempt in range(REATTACH_ATTEMPTS):
            try:
                with attachment:
                    for name, data in attachment:
                        if name in wanted:
                            output.append(data)
                        if name == "stderr":
                            errors.append(data)
                return attachment
            except SupervisorLost:
                if attempt == REATTACH_ATTEMPTS - 1:
                    raise
                output.clear()
                errors.clear()
                attachment = self.runtime.attach(container.id, logs=True)
            except KeyboardInterrupt:
                if container.settings.get("auto_remove"):
                    with contextlib.suppress(LabkernelError):
                        self.remove(container, force=True)
                raise
        return attachment

    def _stream(self, container: Container, attachment: Attachment, wanted: set[str]) -> Iterator[bytes]:
        errors: Chunks = []
        with attachment:
            for name, data in attachment:
                if name == "stderr":
                    errors.append(data)
                if name in wanted:
                    yield data
        self._check_exit(container, attachment, b"".join(errors))

    def _check_exit(self, container: Container, attachment: Attachment, errors: bytes) -> None:
        """Forget a container that has removed itself; raise ContainerExit for a status other than 0."""
        if container.settings.get("auto_remove"):
            self._forget(container)
        status = attachment.exit_code
        if status:
            words = " ".join(container.command) or "its command"
            raise ContainerExit(
                f"Command '{words}' in image '{container.image_ref}' returned non-zero exit status {status}",
                status=status,
                container=container.id,
                command=list(container.command),
                image=container.image_ref,
                stderr=errors.decode(errors="replace"),
                details=errors.decode(errors="replace") or None,
                resolution=OOM_HINT if attachment.oom_killed else None,
            )

    def _forget(self, container: Container, *, volumes: bool | None = None) -> None:
        """Drop the row, and the anonymous volumes of one that removes itself."""
        self._fresh.discard(container.id)
        with self.db.transaction() as tx:
            tx.execute("DELETE FROM containers WHERE id = ?", (container.id,))
        if volumes or (volumes is None and container.settings.get("auto_remove")):
            for mount in container.record.get("mounts", ()):
                if mount.get("anonymous"):
                    with contextlib.suppress(LabkernelError):
                        self.volumes.remove(mount["name"], force=True)

    def _all(self) -> Found:
        """Every container that is there, newest first; rows of those that are gone are dropped."""
        rows = self.db.query("SELECT * FROM containers ORDER BY created_at DESC, rowid DESC")
        # After the rows: a container has its directory before it has its row.
        there = set(os.listdir(f"{self.layout.root}/containers")) if rows else set()
        found = []
        for row in rows:
            container = self._container(row)
            if row["id"] in there:
                found.append(container)
            else:
                self._forget(container)
        return found

    def _container(self, row: Any) -> Container:
        return Container(
            self, row["id"], row["name"], row["image_id"], row["image_ref"], row["created_at"], row["settings"]
        )

    def _is_there(self, id: str) -> bool:
        return os.path.isdir(f"{self.layout.root}/containers/{id}")

    def _is_leftover(self, id: str) -> bool:
        """Older than any creation takes, and nobody has written a row for it; or a build step without its builder."""
        directory = self.layout.container_dir(id)
        if len(id) != 64 or NAME.fullmatch(id) is None:
            return False
        if is_abandoned(directory):
            return True
        try:
            age_s = time.time() - os.stat(directory).st_mtime
        except OSError:
            return False
        # A step of a build has no row and may run for hours: its builder holds a lock on the directory.
        return age_s > LEFTOVER_AGE_S and not is_locked(directory)


def _read_state(path: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(read_file(path))
        return found
    except FileNotFoundError:
        return None
