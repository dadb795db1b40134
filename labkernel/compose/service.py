"""`lab.compose`: projects brought up, looked at and taken down on the embedded engine.

`load` reads files; `up`, `build`, `pull`, `run` need the project, the rest only its name: containers, networks and
volumes are found by the labels docker compose gives them, so a project outlives the file that made it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, LabkernelError, NoSuchContainer, NoSuchImage, NoSuchVolume
from . import containers as found
from . import resources
from .converge import Converge, Report, UpOptions
from .document import ComposeError
from .project import Project, dependencies, load
from .settings import IMAGE, PREFIX, PROJECT, build_limits, image_name, project_labels

if TYPE_CHECKING:
    from ..building.result import BuildStep
    from ..builds import Builds
    from ..containers import Containers
    from ..imaging.collection import ImageCollection
    from ..networks import Networks
    from ..running.container import Container
    from ..volumes import Volumes

ANONYMOUS_LABEL = "com.docker.volume.anonymous"
Names = Sequence[str]


def _silent(what: str, state: str) -> None:
    """Nobody is told."""


class Compose:
    """The projects of one store. Verbs as docker compose has them; all of them raise LabkernelError."""

    def __init__(
        self, containers: Containers, images: ImageCollection, builds: Builds, networks: Networks, volumes: Volumes
    ) -> None:
        self._containers = containers
        self._images = images
        self._builds = builds
        self._networks = networks
        self._volumes = volumes

    load = staticmethod(load)

    # -- up ------------------------------------------------------------------------------------------------------------

    def up(
        self,
        project: Project,
        services: Names = (),
        *,
        build: bool | None = None,
        pull: str | None = None,
        dependencies: bool = True,
        remove_orphans: bool = False,
        report: Report = _silent,
        on_step: Callable[[str, BuildStep], None] | None = None,
        options: UpOptions | None = None,
    ) -> list[Container]:
        """Make and start the containers of `services` (default: all) and of those they need; returns them.

        `build`: True always, False never, None when an image is missing. `pull`: always, missing, never. Images,
        networks and volumes come first, so a wrong name changes no container. `report` and `on_step` (service, step)
        are told what happens.
        """
        names = project.select(services, with_dependencies=dependencies)
        images = self.prepare(project, names, build=build, pull=pull, report=report, on_step=on_step)
        resources.make_networks(self._networks, project, names, report)
        resources.make_volumes(self._volumes, project, names, report)
        orphans = self.orphans(project)
        work = Converge(self._containers, project, options or UpOptions(), images, report)
        for orphan in orphans if remove_orphans else ():
            work.remove(orphan)
        if orphans and not remove_orphans:
            listed = " ".join(each.name for each in orphans)
            project.warnings.append(
                f"Found orphan containers ([{listed}]) for this project. If you removed or renamed this service in "
                "your compose file, you can run this command with the --remove-orphans flag to clean it up."
            )
        work.run(names, services)
        return [container for name in names for container in work.made[name]]

    def orphans(self, project: Project) -> list[Container]:
        """Containers of the project whose service is in none of its files."""
        known = {*project.services, *project.others}
        there = found.find(self._containers, project.name)
        return [each for each in there if found.service_of(each) not in known]

    def prepare(
        self,
        project: Project,
        services: Names,
        *,
        build: bool | None = None,
        pull: str | None = None,
        report: Report = _silent,
        on_step: Callable[[str, BuildStep], None] | None = None,
    ) -> dict[str, str]:
        """The image of each service, built or fetched: service -> image id."""
        result: dict[str, str] = {}
        for name in services:
            service, ref = project.services[name], image_name(project, name)
            policy = pull or service.get("pull_policy") or "missing"
            platform = service.get("platform")
            image = self._images.find(ref, platform=platform)
            if "build" in service and (build or policy == "build" or (image is None and build is not False)):
                if policy in ("always", "missing") and image is None and "image" in service and build is None and pull:
                    image = self._pull(ref, report, needed=False, platform=platform)
                if image is None or build or policy == "build":
                    image = self.build(project, [name], report=report, on_step=on_step, to_run=True)[name]
            elif image is None and "build" in service:
                raise project.error(name, f"no such image: {ref}", at="build", resolution="up without --no-build")
            elif policy == "always" and "image" in service:
                image = self._pull(ref, report, platform=platform)
            elif image is None:
                if policy == "never":
                    raise project.error(name, f"No such image: {ref}", at="image", resolution="`compose pull` gets it")
                image = self._resolve(project, name, ref, report)
            assert image is not None
            result[name] = image.id
        return result

    def _resolve(self, project: Project, name: str, ref: str, report: Report) -> Any:
        try:
            return self._images.resolve(
                ref, notify=lambda line: report(f"Image {ref}", line), platform=project.services[name].get("platform")
            )
        except LabkernelError as err:
            node = project.nodes.get(name)
            place = node.get("image") if node else None
            if place is not None and place.file:
                err.details = "\n".join(filter(None, (err.details, f"service {name} ({place.file}:{place.line})")))
            raise

    def _pull(self, ref: str, report: Report, *, needed: bool = True, platform: str | None = None) -> Any:
        report(f"Image {ref}", "Pulling")
        try:
            image = self._images.pull(ref, platform=platform)
        except LabkernelError:
            if needed:
                raise
            return None
        report(f"Image {ref}", "Pulled")
        return image

    def pull(
        self, project: Project, services: Names = (), *, ignore_failures: bool = False, report: Report = _silent
    ) -> list[Any]:
        """Fetch the images of services that are not built here."""
        images = []
        for name in project.select(services, with_dependencies=False):
            service = project.services[name]
            if "image" not in service or "build" in service:
                report(f"Service {name}", "Skipped - No image to be pulled")
                continue
            platform = service.get("platform")
            image = self._pull(image_name(project, name), report, needed=not ignore_failures, platform=platform)
            images += [image] if image is not None else []
        return images

    def build(
        self,
        project: Project,
        services: Names = (),
        *,
        no_cache: bool = False,
        pull: bool = False,
        build_args: Mapping[str, str] | None = None,
        report: Report = _silent,
        on_step: Callable[[str, BuildStep], None] | None = None,
        to_run: bool = False,
    ) -> dict[str, Any]:
        """Build the images of `services` (default: all that have a build): service -> Image. `to_run`: for the platform
        that a container of them is for only."""
        built = {}
        for name in project.select(services, with_dependencies=False):
            service = project.services[name]
            if "build" not in service:
                continue
            report(f"Service {name}", "Building")
            given = {**service["build"]}
            given["args"] = {**given.get("args", {}), **(build_args or {})}
            given["no_cache"] = no_cache or given.get("no_cache", False)
            given["pull"] = pull or given.get("pull", False)
            own = [service["platform"]] if service.get("platform") else []
            listed = given.get("platforms") or own
            if own and own[0] not in listed:
                raise project.error(name, f"build.platforms does not hold the service's platform {own[0]}", at="build")
            given["platforms"] = own if to_run else listed
            told = (lambda step, name=name: on_step(name, step)) if on_step is not None else None
            built[name] = self._build(project, name, given, told)
            report(f"Service {name}", "Built")
        return built

    def _build(self, project: Project, name: str, given: Mapping[str, Any], told: Any) -> Any:
        from ..building.epoch import from_environment
        from ..building.namedcontexts import named_contexts
        from ..building.sources import git_context, is_git

        context = given["context"]
        build_args = {key: value for key, value in given["args"].items() if value is not None}
        from_environment(build_args)
        with contextlib.ExitStack() as stack:
            moments: list[int] = []
            if is_git(context):
                folder = stack.enter_context(git_context(self._containers.layout, context, told=moments.append))
            else:
                folder = Path(context)
            if not folder.is_dir():
                raise project.error(name, f"unable to prepare context: path {context!r} not found", at="build")
            text, ignore = self._dockerfile(project, name, folder, given)
            contexts: dict[str, str] = {}
            if "additional_contexts" in given:
                places, layout = given["additional_contexts"], self._containers.layout
                found = named_contexts(self._builds, layout, places, text, project.directory)
                contexts = stack.enter_context(found)
            secrets = {
                str(grant.get("target") or grant["source"]): self._secret(project, name, grant["source"])
                for grant in given.get("secrets", ())
            }
            result = self._builds.build(
                text,
                context=folder,
                tags=[image_name(project, name), *given.get("tags", ())],
                build_args=build_args,
                target=given.get("target"),
                no_cache=given["no_cache"],
                labels={**given.get("labels", {}), **project_labels(project), f"{PREFIX}.service": name},
                network=given.get("network", "default"),
                ignore=ignore,
                on_step=told,
                pull=given["pull"],
                secrets=secrets,
                allow=given.get("entitlements", ()),
                extra_hosts=[each.replace("=", ":", 1) for each in given.get("extra_hosts", ())],
                platform=",".join(given.get("platforms", ())) or None,
                context_epoch_s=moments[-1] if moments else None,
                limits=build_limits(given),
                contexts=contexts,
            )
        return result.image

    def _dockerfile(
        self, project: Project, name: str, folder: Path, given: Mapping[str, Any]
    ) -> tuple[str, str | None]:
        if "dockerfile_inline" in given:
            return given["dockerfile_inline"], None
        path = folder / given.get("dockerfile", "Dockerfile")
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as err:
            reason = getattr(err, "strerror", None) or "not UTF-8 text"
            raise project.error(
                name, f"failed to read dockerfile: {path}: {reason}", at="build", resolution="build: {dockerfile: PATH}"
            ) from None
        own = path.with_name(f"{path.name}.dockerignore")
        return text, own.read_text(errors="replace") if own.is_file() else None

    def _secret(self, project: Project, name: str, source: str) -> bytes:
        entry = project.secrets[source]
        if "environment" in entry:
            return project.environment.get(entry["environment"], "").encode()
        try:
            return Path(entry["file"]).read_bytes()
        except OSError as err:
            raise project.error(name, f"secret {source}: {entry['file']}: {err.strerror}", at="build") from None

    # -- what needs the name only --------------------------------------------------------------------------------------

    def containers(
        self, project: str, services: Names = (), *, stopped: bool = True, oneoff: bool | None = False
    ) -> list[Container]:
        """The containers of a project, by service and number."""
        return found.find(self._containers, project, services, stopped=stopped, oneoff=oneoff)

    def projects(self, *, stopped: bool = False) -> list[dict[str, Any]]:
        """The projects there are: [{"Name", "Status", "ConfigFiles"}]."""
        return found.projects(self._containers, stopped=stopped)

    def container(self, project: str, service: str, *, index: int | None = None) -> Container:
        """The running container of a service that `exec` means. Raises ComposeError."""
        return found.pick(self._containers, project, service, index=index)

    def down(
        self,
        project: str,
        services: Names = (),
        *,
        volumes: bool = False,
        images: str | None = None,
        timeout_s: float | None = None,
        known: Names | None = None,
        remove_orphans: bool = False,
        report: Report = _silent,
    ) -> None:
        """Stop and remove the containers of a project, dependent ones first, then its networks; `volumes` also what it
        keeps; `images` (`local`: those without a name of their own, `all`) also those. Containers of services that are
        not in `known` (None: all are) stay without `remove_orphans`."""
        everything = self.containers(project, services, oneoff=None)
        wanted = everything
        if known is not None and not remove_orphans:
            wanted = [each for each in everything if found.service_of(each) in known]
        used = {each.image_id: each.image_ref for each in wanted}
        anonymous = [
            mount["name"]
            for each in wanted
            for mount in each.record.get("mounts", ())
            if mount["type"] == "volume" and mount.get("name")
        ]
        for group in found.waves(wanted):
            self._stop_all(group, timeout_s, report)
            for container in group:
                report(f"Container {container.name}", "Removing")
                with contextlib.suppress(NoSuchContainer):
                    container.remove(force=True, v=volumes)
                report(f"Container {container.name}", "Removed")
        if services:
            return
        if volumes:
            self._remove_volumes(project, anonymous, report)
        if images:
            self._remove_images(project, used, images, report)
        for network in self._networks.list(filters={"label": f"{PROJECT}={project}"}):
            try:
                network.remove()
                report(f"Network {network.name}", "Removed")
            except ConflictError:
                report(f"Network {network.name}", "Resource is still in use")

    def _remove_volumes(self, project: str, anonymous: Names, report: Report) -> None:
        names = [volume.name for volume in self._volumes.list(filters={"label": f"{PROJECT}={project}"})]
        for name in anonymous:
            with contextlib.suppress(NoSuchVolume):
                if ANONYMOUS_LABEL in self._volumes.get(name).labels:
                    names.append(name)
        for name in dict.fromkeys(names):
            try:
                self._volumes.remove(name, force=True)
                report(f"Volume {name}", "Removed")
            except ConflictError:
                report(f"Volume {name}", "Resource is still in use")

    def _remove_images(self, project: str, used: Mapping[str, str], which: str, report: Report) -> None:
        for id, ref in used.items():
            image = self._images.find(id)
            if image is None:
                continue
            local = image.labels.get(PROJECT) == project and any(tag.startswith(f"{project}-") for tag in image.tags)
            if which == "all" or local:
                try:
                    self._images.remove(ref)
                    report(f"Image {ref}", "Removed")
                except (ConflictError, NoSuchImage):
                    report(f"Image {ref}", "Resource is still in use")

    def _stop_all(self, group: Sequence[Container], timeout_s: float | None, report: Report) -> None:
        """Side by side: each may take its whole time to end."""
        with ThreadPoolExecutor(max(1, len(group)), thread_name_prefix="labkernel-compose") as executor:
            for done in [executor.submit(self._stop, each, timeout_s, report) for each in group]:
                done.result()

    def _stop(self, container: Container, timeout_s: float | None, report: Report) -> None:
        if found.refreshed(container) in ("running", "paused", "restarting"):
            report(f"Container {container.name}", "Stopping")
            with contextlib.suppress(NoSuchContainer):
                container.stop(timeout=timeout_s)
            report(f"Container {container.name}", "Stopped")

    def stop(
        self, project: str, services: Names = (), *, timeout_s: float | None = None, report: Report = _silent
    ) -> None:
        """Stop containers, dependent ones first."""
        for group in found.waves(self.containers(project, services)):
            self._stop_all(group, timeout_s, report)

    def start(self, project: str, services: Names = (), *, report: Report = _silent) -> None:
        """Start containers that are there, those others need first."""
        there = self.containers(project, services)
        if not there:
            what = ", ".join(services) or project
            raise ComposeError(f'no containers to start: "{what}" has none', resolution="`compose up` makes them")
        for group in reversed(found.waves(there)):
            for container in group:
                if container.status not in ("running", "paused"):
                    report(f"Container {container.name}", "Starting")
                    container.start()
                    report(f"Container {container.name}", "Started")

    def restart(
        self, project: str, services: Names = (), *, timeout_s: float | None = None, report: Report = _silent
    ) -> None:
        """Stop and start; also those that depend on one of them with `restart: true`."""
        from .settings import DEPENDS

        everything = self.containers(project)
        names = set(services)
        for each in everything if names else ():
            needs = [word.split(":") for word in each.labels.get(DEPENDS, "").split(",") if word.endswith(":true")]
            if {need[0] for need in needs} & set(services):
                names.add(found.service_of(each))
        for group in reversed(
            found.waves([each for each in everything if not names or found.service_of(each) in names])
        ):
            for container in group:
                report(f"Container {container.name}", "Restarting")
                container.restart(timeout=timeout_s)
                report(f"Container {container.name}", "Started")

    def remove(
        self,
        project: str,
        services: Names = (),
        *,
        force: bool = False,
        volumes: bool = False,
        report: Report = _silent,
    ) -> list[str]:
        """Remove stopped containers (`force`: running ones, too); returns their names."""
        gone = []
        for container in self.containers(project, services):
            if container.status in ("running", "paused", "restarting") and not force:
                continue
            container.remove(force=force, v=volumes)
            report(f"Container {container.name}", "Removed")
            gone.append(container.name)
        return gone

    # -- run -----------------------------------------------------------------------------------------------------------

    def prepare_run(
        self,
        project: Project,
        service: str,
        command: Sequence[str] | None,
        *,
        name: str | None = None,
        start_dependencies: bool = True,
        service_ports: bool = False,
        aliases: bool = False,
        build: bool | None = None,
        change: Mapping[str, Any] | None = None,
        report: Report = _silent,
        on_step: Callable[[str, BuildStep], None] | None = None,
    ) -> Container:
        """The container of `compose run`, not started: as the service has it, without its ports and restart policy.

        `change` replaces settings of the Docker SDK. What the service depends on is brought up first."""
        names = project.select([service])
        needed = [each for each in names if each != service] if start_dependencies else []
        images = self.prepare(project, [*needed, service], build=build, report=report, on_step=on_step)
        resources.make_networks(self._networks, project, [*needed, service], report)
        resources.make_volumes(self._volumes, project, [*needed, service], report)
        # What runs stays as it is: a run is no reason to change how many there are.
        scale = {each: len(self.containers(project.name, [each])) or project.replicas(each) for each in needed}
        work = Converge(self._containers, project, UpOptions(recreate="never", scale=scale), images, report)
        work.run(needed)
        if start_dependencies and dependencies(project.services[service]):
            work._wait_for_dependencies(service)
        changed: dict[str, Any] = {"restart_policy": None, **(change or {})}
        if not service_ports and "ports" not in changed:
            changed["ports"] = None
        if not aliases:
            networks = project.services[service].get("networks") or ()
            changed["networking_config"] = {project.networks[key]["name"]: {} for key in networks} or None
        title = name or f"{project.name}-{service}-run-{os.urandom(6).hex()}"
        return work.make(service, 1, title, oneoff=True, command=command, change=changed)


__all__ = ["IMAGE", "Compose", "Project", "UpOptions"]
