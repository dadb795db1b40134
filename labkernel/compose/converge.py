"""From what is to what the files say: the containers of each service are made, made anew, started, removed.

A container stays when its hash label says it is as the files have it and its image is the same; otherwise another takes
its name and its anonymous volumes. Services are brought up side by side, each when those it depends on are as far as
its condition asks. Source: docker compose documentation, "docker compose up"; Compose specification, "depends_on".
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, NoSuchContainer
from .containers import find, number_of
from .document import ComposeError
from .project import Project, dependencies
from .settings import (
    HASH,
    IMAGE,
    config_hash,
    container_labels,
    container_settings,
    granted_files,
    image_name,
)

if TYPE_CHECKING:
    from ..containers import Containers
    from ..running.container import Container

POLL_S = 0.05
Report = Callable[[str, str], None]
"""Called with what (`Container web-1`) and its new state (`Started`), from several threads, one at a time."""


@dataclass
class UpOptions:
    """How `up` goes about it; names are those of its flags. `recreate`: `diverged`, `force` or `never`."""

    recreate: str = "diverged"
    recreate_dependencies: bool = False
    start: bool = True
    scale: Mapping[str, int] = field(default_factory=dict)
    timeout_s: float | None = None
    renew_anonymous_volumes: bool = False
    wait: bool = False
    wait_timeout_s: float | None = None


class Converge:
    """One `up` under way."""

    def __init__(
        self, containers: Containers, project: Project, options: UpOptions, images: Mapping[str, str], report: Report
    ) -> None:
        self._containers = containers
        self._project = project
        self._options = options
        self._images = images
        self._lock = threading.Lock()
        self._told = report
        self._stopped = threading.Event()
        self.made: dict[str, list[Container]] = {}
        self.fresh: set[str] = set()
        """Ids of containers that were made or started by us."""

    def run(self, names: Sequence[str], asked: Sequence[str] = ()) -> None:
        """Bring `names` (dependencies first) up. The first failure stops what has not begun. Raises LabkernelError."""
        if not names:
            return
        futures: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(len(names), thread_name_prefix="labkernel-compose") as executor:
            try:
                for name in names:
                    before = {other: futures[other] for other in dependencies(self._project.services[name])
                              if other in futures}  # fmt: skip
                    futures[name] = executor.submit(self._service, name, before, not asked or name in asked)
                for future in futures.values():
                    while not future.done():
                        # An interrupt has to find its way between two looks.
                        with contextlib.suppress(TimeoutError):
                            future.exception(timeout=0.2)
                errors = [err for future in futures.values() if (err := future.exception()) is not None]
                for err in sorted(errors, key=lambda err: isinstance(err, _NotReached)):
                    raise err
                if self._options.wait and self._options.start:
                    self._wait_for_all(names)
            except BaseException:
                self._stopped.set()
                raise

    def tell(self, container: str, state: str) -> None:
        with self._lock:
            self._told(f"Container {container}", state)

    # -- one service -------------------------------------------------------------------------------------------------

    def _service(self, name: str, before: Mapping[str, Future[None]], asked: bool) -> None:  # noqa: FBT001
        for other, future in before.items():
            required = dependencies(self._project.services[name])[other]["required"]
            if future.exception() is not None and required:
                raise _NotReached(other)
        if self._stopped.is_set():
            raise _NotReached(name)
        try:
            if self._options.start:
                self._wait_for_dependencies(name)
            self.made[name] = self._converge(name, asked=asked)
            if self._options.start:
                for container in self.made[name]:
                    self._start(container)
        except BaseException:
            self._stopped.set()
            raise

    def _wait_for_dependencies(self, name: str) -> None:
        for other, how in dependencies(self._project.services[name]).items():
            containers = self.made.get(other)
            if containers is None:
                containers = find(self._containers, self._project.name, [other])
            try:
                for container in containers:
                    self._wait_for(container, how["condition"])
            except ComposeError:
                if how["required"]:
                    raise
                self.tell(other, "not reached, and not required")

    def _wait_for(self, container: Container, condition: str, deadline: float | None = None) -> None:
        if condition == "service_started":
            return
        complete = condition == "service_completed_successfully"
        self.tell(container.name, "Waiting")
        while not self._stopped.is_set():
            state = container.runtime_state()
            ended = state["status"] in ("exited", "dead")
            if complete and ended:
                code = int(state.get("exit_code") or 0)
                if code != 0:
                    raise ComposeError(
                        f'service "{container.labels.get("com.docker.compose.service")}" '
                        f"didn't complete successfully: exit {code}",
                        resolution=f"`container logs {container.name}` shows what it said",
                    )
                self.tell(container.name, "Exited")
                return
            if not complete and self._is_healthy(container, state, ended=ended):
                self.tell(container.name, "Healthy")
                return
            if deadline is not None and time.monotonic() > deadline:
                raise ComposeError(f"application not healthy after {self._options.wait_timeout_s:g}s")
            self._stopped.wait(POLL_S)
        raise _NotReached(container.name)

    def _is_healthy(self, container: Container, state: Mapping[str, Any], *, ended: bool) -> bool:
        if ended:
            raise ComposeError(
                f"dependency failed to start: container {container.name} exited ({state.get('exit_code')})",
                resolution=f"`container logs {container.name}` shows what it said",
            )
        health = state.get("health")
        status = str((health or {}).get("Status") or "")
        if status == "unhealthy":
            last = ((health or {}).get("Log") or [{}])[-1]
            raise ComposeError(
                f"dependency failed to start: container {container.name} is unhealthy",
                details=str(last.get("Output") or "").strip() or None,
                resolution=f"its check said so {(health or {}).get('FailingStreak', 0)} times; "
                f"`container inspect {container.name}` shows its log",
            )
        if health is None and not _has_check(container):
            raise ComposeError(
                f"dependency failed to start: container {container.name} has no healthcheck configured",
                resolution="give the service a healthcheck, or depend on service_started",
            )
        return status == "healthy"

    def _wait_for_all(self, names: Sequence[str]) -> None:
        timeout = self._options.wait_timeout_s
        deadline = None if timeout is None else time.monotonic() + timeout
        for name in names:
            for container in self.made[name]:
                if _has_check(container):
                    self._wait_for(container, "service_healthy", deadline)
                elif container.status in ("exited", "dead"):
                    code = int(container.runtime_state().get("exit_code") or 0)
                    if code:
                        raise ComposeError(f"container {container.name} exited ({code})", exit_code=1)

    # -- containers --------------------------------------------------------------------------------------------------

    def _converge(self, name: str, *, asked: bool) -> list[Container]:
        """The containers the service is to have: numbers from 1, those that fit kept."""
        wanted = self._options.scale.get(name, self._project.replicas(name))
        there = find(self._containers, self._project.name, [name])
        wrong = [each for each in there if self._diverged(each, name, asked=asked)]
        there.sort(key=lambda each: (each in wrong, number_of(each)))
        for extra in there[wanted:]:
            self.remove(extra)
        kept = [self._recreate(each, name) if each in wrong else each for each in there[:wanted]]
        numbers = {number_of(each) for each in kept}
        free = (number for number in range(1, wanted + len(numbers) + 1) if number not in numbers)
        while len(kept) < wanted:
            kept.append(self.create(name, next(free)))
        for each in kept:
            if each.id not in self.fresh:
                self.tell(each.name, "Running" if each.status == "running" else each.status.capitalize())
        return sorted(kept, key=number_of)

    def _diverged(self, container: Container, name: str, *, asked: bool) -> bool:
        how = self._options.recreate
        if how == "never":
            return False
        if how == "force" and (asked or self._options.recreate_dependencies):
            return True
        if how == "diverged" and not asked and self._options.recreate_dependencies:
            return True
        labels = container.labels
        if labels.get(HASH) != config_hash(self._project, name) or labels.get(IMAGE) != self._images[name]:
            return True
        if container.status == "dead":
            return True
        # Whose namespace or volumes it shares is known by id, and that container may be another one now.
        for key in ("ipc", "pid", "network_mode"):
            kind, _, other = str(self._project.services[name].get(key) or "").partition(":")
            setting = "network_mode" if key == "network_mode" else f"{key}_mode"
            if kind == "service" and container.settings.get(setting) != f"container:{self._id_of(other)}":
                return True
        return False

    def _id_of(self, service: str) -> str:
        made = self.made.get(service) or find(self._containers, self._project.name, [service])
        if not made:
            raise ComposeError(f'service "{service}" has no container to share')
        return made[0].id

    def create(self, name: str, number: int) -> Container:
        """A new container of a service, with its secrets in it, not started."""
        own = self._project.services[name].get("container_name")
        title = str(own or f"{self._project.name}-{name}-{number}")
        self.tell(title, "Creating")
        container = self.make(name, number, title)
        self.tell(title, "Created")
        return container

    def make(
        self,
        name: str,
        number: int,
        title: str | None,
        *,
        inherited: Mapping[str, str] | None = None,
        oneoff: bool = False,
        command: Sequence[str] | None = None,
        change: Mapping[str, Any] | None = None,
    ) -> Container:
        """As `create`. `inherited`: place -> volume that takes an anonymous one's place; `change` replaces settings
        (None takes one out), `command` the command. Nothing stays when it fails."""
        settings = container_settings(self._project, name, self._id_of)
        words = settings.pop("command", None)
        left = dict(inherited or {})
        mounts = [f"{left.pop(word)}:{word}" if word in left else word for word in settings.get("volumes", ())]
        settings["volumes"] = [*mounts, *(f"{volume}:{place}" for place, volume in left.items())]
        for key, value in (change or {}).items():
            settings.pop(key, None)
            if value is not None:
                settings[key] = value
        files = granted_files(self._project, name)
        if files and settings.get("read_only"):
            raise self._project.error(
                name,
                f"services.{name}: secrets and configs of variables need a writable root file system",
                at="read_only",
                resolution="use `file:` for them",
            )
        labels = container_labels(self._project, name, number, self._images[name], oneoff=oneoff)
        image = image_name(self._project, name)
        try:
            container = self._containers.create(
                image, command if command is not None else words, name=title, labels=labels, **settings
            )
        except LabkernelError as err:
            raise _of_service(self._project, name, err) from err
        try:
            if files:
                _put(container, files)
        except BaseException:
            with contextlib.suppress(LabkernelError):
                container.remove(force=True, v=True)
            raise
        self.fresh.add(container.id)
        return container

    def _recreate(self, old: Container, name: str) -> Container:
        title = old.name
        self.tell(title, "Recreate")
        volumes = {} if self._options.renew_anonymous_volumes else self._inherited(old, name)
        own = self._project.services[name].get("container_name")
        number = number_of(old) or 1
        new_title = str(own or f"{self._project.name}-{name}-{number}")
        # Its ports and addresses have to be free before the other one starts.
        old.stop(timeout=self._options.timeout_s)
        old.rename(f"{old.short_id}_{title}")
        try:
            new = self.make(name, number, new_title, inherited=volumes)
        except BaseException:
            with contextlib.suppress(LabkernelError):
                old.rename(title)
            raise
        with contextlib.suppress(NoSuchContainer):
            old.remove(force=True)
        self.tell(new_title, "Recreated")
        return new

    def _inherited(self, old: Container, name: str) -> dict[str, str]:
        """The anonymous volumes of a container, for the one that takes its place: place -> volume."""
        mounts = self._project.services[name].get("volumes", ())
        named = {each["target"] for each in mounts if each["type"] != "volume" or each.get("source")}
        image = self._containers.images.get(self._images[name]).config.get("Volumes") or ()
        places = ({each["target"] for each in mounts} | set(image)) - named
        return {
            mount["destination"]: mount["name"]
            for mount in old.record.get("mounts", ())
            if mount["type"] == "volume" and mount.get("name") and mount["destination"] in places
        }

    def _start(self, container: Container) -> None:
        if container.status in ("running", "paused", "restarting"):
            return
        if container.id not in self.fresh and container.status == "exited" and self._completed(container):
            return
        self.tell(container.name, "Starting")
        try:
            container.start()
        except LabkernelError as err:
            raise _of_service(self._project, container.labels["com.docker.compose.service"], err) from err
        self.fresh.add(container.id)
        self.tell(container.name, "Started")

    def _completed(self, container: Container) -> bool:
        """Whether it ended well and others only need that: such a service runs once."""
        name = container.labels["com.docker.compose.service"]
        if int(container.runtime_state().get("exit_code") or 0) != 0:
            return False
        asks = [
            service["depends_on"][name]["condition"]
            for service in self._project.services.values()
            if name in service.get("depends_on", {})
        ]
        return bool(asks) and all(each == "service_completed_successfully" for each in asks)

    def remove(self, container: Container) -> None:
        """Stop and remove one that is not wanted any more."""
        self.tell(container.name, "Stopping")
        with contextlib.suppress(NoSuchContainer):
            container.stop(timeout=self._options.timeout_s)
            container.remove(force=True)
        self.tell(container.name, "Removed")


class _NotReached(ComposeError):
    """A service that was not brought up because another one failed; that one's error is the one to show."""

    def __init__(self, name: str) -> None:
        super().__init__(f"not started, since {name} is not up")


def _has_check(container: Container) -> bool:
    own = container.settings.get("healthcheck") or {}
    check = {**(container.image.config.get("Healthcheck") or {}), **{key: value for key, value in own.items() if value}}
    test = check.get("Test") or check.get("test")
    return bool(test) and str(test[0]) != "NONE"  # type: ignore[index]


def _of_service(project: Project, name: str, err: LabkernelError) -> LabkernelError:
    """The same error; where the class knows no place of its own, the service is said."""
    if isinstance(err, ComposeError):
        return err
    node = project.nodes.get(name)
    if node is not None and node.file:
        err.details = "\n".join(filter(None, (err.details, f"service {name} ({node.file}:{node.line})")))
    return err


def _put(container: Container, files: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> None:
    from ..running.files import look

    buffer = io.BytesIO()
    made: set[str] = set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, data, grant in files:
            for parent in _parents(path):
                if parent not in made and look(container, parent) is None:
                    folder = tarfile.TarInfo(parent.strip("/"))
                    folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(folder)
                made.add(parent)
            member = tarfile.TarInfo(path.strip("/"))
            member.size, member.mode = len(data), int(str(grant.get("mode", "0444")), 8)
            member.uid, member.gid = int(grant.get("uid", 0)), int(grant.get("gid", 0))
            member.mtime = int(time.time())
            tar.addfile(member, io.BytesIO(data))
    container.put_archive("/", buffer.getvalue())


def _parents(path: str) -> list[str]:
    parts = path.strip("/").split("/")[:-1]
    return ["/" + "/".join(parts[: count + 1]) for count in range(len(parts))]
