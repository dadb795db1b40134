"""A project: what its Compose files say together, checked, ready to be carried out. Reads files and the environment.

Source: Compose specification, "Version and name", "Profiles", "Extend", "Include"; docker compose documentation,
"Environment variables" (COMPOSE_FILE, COMPOSE_PROFILES, COMPOSE_PROJECT_NAME) and "Specify a project name".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .document import ComposeError, Node, read
from .merging import merge_documents, merge_services
from .reading import Surroundings, absent, fields, flag, keys, labels, optional, pairs, text
from .schema import read_service
from .variables import Substitution, parse_env

NAMES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
PROJECT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
SERVICE_NAME = re.compile(r"[a-zA-Z0-9._-]+")
SECTIONS = ("name", "version", "include", "services", "networks", "volumes", "secrets", "configs")
MAX_DEPTH = 20


@dataclass
class Project:
    """A project. `services` are those that its active profiles leave, each as `schema.read_service` gives it; `others`
    those of profiles that are not active."""

    name: str
    directory: Path
    files: list[str]
    services: dict[str, dict[str, Any]]
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    volumes: dict[str, dict[str, Any]] = field(default_factory=dict)
    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """What `config` prints: the files joined, with everything that is implied."""
        found: dict[str, Any] = {"name": self.name, "services": self.services}
        for section in ("networks", "volumes", "secrets", "configs"):
            if getattr(self, section):
                found[section] = getattr(self, section)
        return found

    def error(self, service: str, brief: str, *, at: str = "", **parts: Any) -> ComposeError:
        """An error at the place of a service, or of its attribute `at`."""
        node = self.nodes.get(service)
        place = (node.get(at) if node is not None and at else None) or node
        return place.error(brief, **parts) if place is not None else ComposeError(brief, **parts)

    def replicas(self, service: str) -> int:
        """How many containers the files ask for."""
        found = self.services[service]
        return int(found.get("scale", found.get("deploy", {}).get("replicas", 1)))

    def select(self, names: Sequence[str], *, with_dependencies: bool = True) -> list[str]:
        """The services a command is about, dependencies first. Named ones are taken out of inactive profiles."""
        for name in names:
            if name not in self.services:
                if name not in self.others:
                    raise ComposeError(
                        f"no such service: {name}", resolution=f"the services are: {', '.join(sorted(self.services))}"
                    )
                active = set(self.others[name].get("profiles", ()))
                self._activate(active)
        self.check_dependencies()
        wanted = set(names or self.services)
        if with_dependencies:
            todo = list(wanted)
            while todo:
                more = set(dependencies(self.services[todo.pop()])) & self.services.keys() - wanted
                wanted |= more
                todo += more
        return [name for name in self.order() if name in wanted]

    def _activate(self, profiles: set[str]) -> None:
        for name in [name for name, found in self.others.items() if profiles & set(found.get("profiles", ()))]:
            self.services[name] = self.others.pop(name)

    def order(self) -> list[str]:
        """All services, each after those it depends on. Raises ComposeError for a circle."""
        done: list[str] = []
        path: list[str] = []

        def visit(name: str) -> None:
            if name in done or name not in self.services:
                return
            if name in path:
                circle = " -> ".join([*path[path.index(name) :], name])
                raise self.error(name, f"dependency cycle detected: {circle}", at="depends_on")
            path.append(name)
            for other in dependencies(self.services[name]):
                visit(other)
            path.pop()
            done.append(name)

        for name in self.services:
            visit(name)
        return done

    def check_dependencies(self) -> None:
        """Raises ComposeError when a service needs one that is not there or not active."""
        for name, service in self.services.items():
            for other, how in dependencies(service).items():
                if other in self.services or not how["required"]:
                    continue
                if other in self.others:
                    profiles = ", ".join(self.others[other].get("profiles", ()))
                    raise self.error(
                        name,
                        f'service "{name}" depends on "{other}", which is in the profile {profiles}',
                        at="depends_on",
                        resolution=f"--profile {profiles.split(',')[0]} activates it",
                    )
                raise self.error(
                    name,
                    f'service "{name}" depends on undefined service "{other}": invalid compose project',
                    at="depends_on",
                )


def dependencies(service: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The services one depends on, with condition; those it only names (`service:X`, links) must have started."""
    found: dict[str, dict[str, Any]] = {}
    started = {"condition": "service_started", "required": True}
    for key in ("network_mode", "ipc", "pid"):
        kind, _, name = str(service.get(key) or "").partition(":")
        if kind == "service":
            found[name] = started
    for word in service.get("volumes_from", ()):
        if not word.startswith("container:"):
            found[word.partition(":")[0]] = started
    for link in service.get("links", ()):
        found[link.partition(":")[0]] = started
    return {**found, **service.get("depends_on", {})}


# -- loading ---------------------------------------------------------------------------------------------------------


def load(
    files: Sequence[str | Path] = (),
    *,
    texts: Mapping[str, str] | None = None,
    name: str | None = None,
    directory: str | Path | None = None,
    working_dir: Path | None = None,
    profiles: Iterable[str] = (),
    env_files: Sequence[str | Path] = (),
    environment: Mapping[str, str] | None = None,
    interpolate: bool = True,
) -> Project:
    """Read a project. Without `files` they are looked for in `working_dir` (default: the current) and above it.

    `texts` gives files that are no files (stdin, a notebook's cell) by their name in `files`. `environment` defaults
    to this process's. Raises ComposeError with file and line; changes nothing.
    """
    base = working_dir or Path.cwd()
    outer = dict(os.environ if environment is None else environment)
    given = dict(texts or {})
    chosen = _find_files(files, base, outer, given)
    if directory is not None:
        home = base / Path(directory).expanduser()
    else:
        home = Path(chosen[0]).parent if chosen[0] not in given else base
    home = Path(os.path.abspath(home))
    variables = {**_dot_env(env_files, home, base, outer), **outer}
    loader = _Loader(Surroundings(home, variables), given, interpolate=interpolate)
    document = loader.load(chosen)
    active = [*profiles, *filter(None, re.split(r"[, ]+", variables.get("COMPOSE_PROFILES", "")))]
    project = _Reader(loader, document).project(_project_name(name, document, home, variables), chosen, set(active))
    project.environment = variables
    return project


def _find_files(files: Sequence[str | Path], base: Path, env: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    names = [str(each) for each in files]
    if not names and env.get("COMPOSE_FILE"):
        names = env["COMPOSE_FILE"].split(env.get("COMPOSE_PATH_SEPARATOR") or os.pathsep)
    if names:
        return [each if each in given else os.path.abspath(base / os.path.expanduser(each)) for each in names]
    for place in [base, *base.resolve().parents]:
        found = [place / each for each in NAMES if (place / each).is_file()]
        if found:
            stems = [each.replace("compose.", "compose.override.") for each in NAMES]
            over = [place / each for each in stems if (place / each).is_file()]
            return [os.path.abspath(each) for each in [found[0], *over[:1]]]
    raise ComposeError(
        "no configuration file provided: not found", resolution=f"-f FILE, or one of {', '.join(NAMES)} here or above"
    )


def _dot_env(files: Sequence[str | Path], home: Path, base: Path, outer: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    paths = [base / Path(each).expanduser() for each in files]
    for path in paths or [home / ".env"]:
        try:
            content = path.read_text()
        except FileNotFoundError:
            if paths:
                raise ComposeError(f"couldn't find env file: {path}") from None
            continue
        except (OSError, UnicodeDecodeError) as err:
            raise ComposeError(f"cannot read env file {path}: {err}") from None
        parsed = parse_env(content, str(path), {**found, **outer})
        found.update({key: value for key, value in parsed.items() if value is not None})
    return found


def _project_name(given: str | None, document: Node, home: Path, env: Mapping[str, str]) -> str:
    inside = document.get("name")
    chosen = given or env.get("COMPOSE_PROJECT_NAME") or (str(inside.value) if inside and inside.value else "")
    if chosen:
        if PROJECT_NAME.fullmatch(chosen):
            return chosen
        brief = (
            f'invalid project name "{chosen}": must consist only of lowercase alphanumeric characters, hyphens, and '
            "underscores as well as start with a letter or number"
        )
        raise inside.error(brief) if inside and chosen == str(inside.value) else ComposeError(brief)
    name = re.sub(r"[^a-z0-9_-]", "", home.name.lower()).lstrip("_-")
    if not name:
        raise ComposeError("project name must not be empty", resolution="-p NAME, or `name:` in the file")
    return name


class _Loader:
    """Reads files, with what they include and extend."""

    def __init__(self, around: Surroundings, texts: Mapping[str, str], *, interpolate: bool) -> None:
        self.around = around
        self._texts = texts
        self._interpolate = interpolate
        self._known: dict[str, Node] = {}

    def load(self, files: Sequence[str]) -> Node:
        document: Node | None = None
        for file in files:
            found = self._included(self._extended(self.read(file)), [file])
            document = found if document is None else merge_documents(document, found)
        assert document is not None
        return document

    def read(self, file: str, variables: Mapping[str, str] | None = None) -> Node:
        """A file as a tree with its variables filled in."""
        if file in self._known:
            return self._known[file]
        try:
            content = self._texts[file] if file in self._texts else Path(file).read_text()
        except (OSError, UnicodeDecodeError) as err:
            reason = getattr(err, "strerror", None) or str(err)
            raise ComposeError(f"open {file}: {reason.lower()}") from None
        node = read(content, file)
        keys(node, "the file", SECTIONS)
        if node.get("version") is not None:
            self.around.warnings.append(f"{file}: the attribute `version` is obsolete, it will be ignored")
        if self._interpolate:
            values = Substitution(self.around.environment if variables is None else variables)
            node = values.node(node)
            for each in values.unset:
                line = f'The "{each}" variable is not set. Defaulting to a blank string.'
                if line not in self.around.warnings:
                    self.around.warnings.append(line)
        services = node.get("services")
        for name, item in keys(services, "services", services.value).items() if services and services.value else ():
            if not isinstance(item.value, dict) and item.tag != "!reset":
                raise item.error(f"services.{name} must be a mapping")
        self._known[file] = node
        return node

    # -- extends

    def _extended(self, document: Node) -> Node:
        services = document.get("services")
        if services is None or not isinstance(services.value, dict):
            return document
        done = {
            name: self._extend(document, name, []) if isinstance(item.value, dict) else item
            for name, item in services.value.items()
            if not name.startswith("x-")
        }
        return document.with_value({**document.value, "services": services.with_value(done)})

    def _extend(self, document: Node, name: str, trail: list[tuple[str, str]]) -> Node:
        node = document.get("services", name)
        assert node is not None
        extends = node.get("extends")
        if extends is None:
            return node
        step = (node.file, name)
        if step in trail or len(trail) > MAX_DEPTH:
            raise extends.error(f"services.{name} extends itself: {' -> '.join(each for _, each in [*trail, step])}")
        if isinstance(extends.value, str):
            wanted, source = extends.value, document
        else:
            parts = fields(extends, f"services.{name}.extends", self.around, {"service": text, "file": text})
            if "service" not in parts:
                raise extends.error(f"services.{name}.extends needs the name of a service")
            wanted, source = parts["service"], document
            if "file" in parts:
                path = self.around.path(extends, parts["file"])
                if path != document.file:
                    source = self._other(path, extends)
        if source.get("services", wanted) is None:
            raise extends.error(f'cannot extend service "{name}" in {node.file}: service "{wanted}" not found')
        base = self._extend(source, wanted, [*trail, step])
        own = node.with_value({key: item for key, item in node.value.items() if key != "extends"})
        return merge_services(base, own)

    def _other(self, path: str, place: Node) -> Node:
        try:
            document = self.read(path)
        except ComposeError as err:
            raise (place.error(err.brief) if err.line is None else err) from None
        self.around.bases.setdefault(path, Path(path).parent)
        return document

    # -- include

    def _included(self, document: Node, trail: list[str]) -> Node:
        include = document.get("include")
        if include is None or include.value is None:
            return document
        if not isinstance(include.value, list):
            raise include.error("include must be a list")
        result = document
        for item in include.value:
            for found in self._include(item, trail):
                result = _added(result, found, item)
        return result

    def _include(self, item: Node, trail: list[str]) -> Iterator[Node]:
        if isinstance(item.value, dict):
            known = keys(item, "include", ("path", "project_directory", "env_file"))
        else:
            known = {"path": item}
        if "path" not in known:
            raise item.error("include needs a path")
        given = known["path"].value if isinstance(known["path"].value, list) else [known["path"]]
        paths = [self.around.path(each, str(each.value)) for each in given]
        if set(paths) & set(trail):
            raise item.error(f"include cycle detected: {' -> '.join([*trail, *paths])}")
        folder = known.get("project_directory")
        home = Path(self.around.path(folder, str(folder.value))) if folder else Path(paths[0]).parent
        env_file = known.get("env_file")
        files = [self.around.path(env_file, str(env_file.value))] if env_file else []
        variables = {**_dot_env(files, home, home, self.around.environment), **self.around.environment}
        document: Node | None = None
        for path in paths:
            try:
                found = self.read(path, variables)
            except ComposeError as err:
                raise (item.error(err.brief) if err.line is None else err) from None
            self.around.bases[path] = home
            found = self._included(self._extended(found), [*trail, *paths])
            document = found if document is None else merge_documents(document, found)
        if document is not None:
            yield document


def _added(document: Node, included: Node, place: Node) -> Node:
    result = dict(document.value)
    for section in ("services", "networks", "volumes", "secrets", "configs"):
        more = included.get(section)
        if more is None or not more.value:
            continue
        own = result.get(section)
        mine = dict(own.value) if own is not None and own.value else {}
        for name, node in more.value.items():
            if name in mine and mine[name].plain() != node.plain():
                raise place.error(f"{section}.{name} conflicts with imported resource")
            mine[name] = node
        result[section] = more.with_value(mine)
    return document.with_value(result)


# -- from the tree to the project ------------------------------------------------------------------------------------

_IPAM = {
    "driver": text,
    "options": absent("options of address management are"),
    "config": lambda node, path, around: [
        fields(
            item,
            f"{path}.{index}",
            around,
            {"subnet": text, "gateway": text, "ip_range": text, "aux_addresses": pairs},
        )
        for index, item in enumerate(node.value or ())
    ],
}
_NETWORK = {
    "name": text,
    "external": lambda node, path, around: _external(node, path, around),
    "driver": optional(text),
    "driver_opts": pairs,
    "internal": flag,
    "attachable": flag,
    "enable_ipv6": flag,
    "enable_ipv4": flag,
    "labels": labels,
    "ipam": optional(lambda node, path, around: fields(node, path, around, _IPAM)),
}
_VOLUME = {
    "name": text,
    "external": _NETWORK["external"],
    "driver": optional(text),
    "driver_opts": pairs,
    "labels": labels,
}
_FILE = {"name": text, "external": _NETWORK["external"], "file": text, "environment": text, "labels": labels}
_SECRET = {**_FILE, "driver": absent("drivers of secrets are"), "template_driver": absent("templates are")}
_CONFIG = {**_FILE, "content": text, "template_driver": absent("templates are")}


def _external(node: Node, path: str, around: Surroundings) -> Any:
    # `external: {name: X}` is the old form.
    if isinstance(node.value, dict):
        return fields(node, path, around, {"name": text}).get("name") or True
    return flag(node, path, around)


class _Reader:
    def __init__(self, loader: _Loader, document: Node) -> None:
        self._around = loader.around
        self._document = document

    def project(self, name: str, files: list[str], active: set[str]) -> Project:
        around, document = self._around, self._document
        section = document.get("services")
        if section is None or not section.value:
            raise document.error("no service selected: the file has no services", resolution="services: {NAME: …}")
        services: dict[str, dict[str, Any]] = {}
        nodes: dict[str, Node] = {}
        for each, node in keys(section, "services", section.value).items():
            if not SERVICE_NAME.fullmatch(each):
                raise node.error(f"services additional properties '{each}' not allowed")
            services[each], nodes[each] = read_service(node, each, around), node
        project = Project(name, around.directory, files, {}, warnings=around.warnings, nodes=nodes)
        for each, service in services.items():
            wanted = set(service.get("profiles", ()))
            on = not wanted or "*" in active or bool(wanted & active)
            (project.services if on else project.others)[each] = service
        project.networks = self._section(project, "networks", _NETWORK)
        project.volumes = self._section(project, "volumes", _VOLUME)
        project.secrets = self._section(project, "secrets", _SECRET)
        project.configs = self._section(project, "configs", _CONFIG)
        self._check_files(project)
        for each in services:
            self._complete(project, each, services[each])
        used = {key for service in services.values() for key in service.get("networks") or ()}
        if "default" in used:
            project.networks.setdefault("default", {"name": f"{name}_default"})
        project.networks = {key: value for key, value in project.networks.items() if key in used}
        project.order()
        project.check_dependencies()
        return project

    def _section(self, project: Project, section: str, table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        node = self._document.get(section)
        found = {}
        for key, item in keys(node, section, node.value).items() if node is not None and node.value else ():
            entry = fields(item, f"{section}.{key}", self._around, table)
            external = entry.pop("external", False)
            if external:
                entry["external"] = True
                entry["name"] = external if isinstance(external, str) else entry.get("name", key)
            else:
                entry.setdefault("name", f"{project.name}_{key}")
            if entry.get("file"):
                entry["file"] = self._around.path(item, entry["file"])
            found[key] = entry
        return found

    def _check_files(self, project: Project) -> None:
        for section in ("secrets", "configs"):
            for key, entry in getattr(project, section).items():
                node = self._document.get(section, key)
                assert node is not None
                if entry.get("external"):
                    raise node.error(
                        f"{section}.{key}: external {section} are kept by a swarm: not available in labkernel",
                        resolution="file: PATH, or environment: VARIABLE",
                    )
                sources = [each for each in ("file", "environment", "content") if each in entry]
                if len(sources) != 1:
                    raise node.error(f"{section}.{key}: exactly one of file, environment, content is needed")

    def _complete(self, project: Project, name: str, service: dict[str, Any]) -> None:
        """What a service does not say, and whether what it refers to is there."""
        node = project.nodes[name]

        def undefined(kind: str, which: str, at: str) -> ComposeError:
            place = node.get(at) or node
            return place.error(f'service "{name}" refers to undefined {kind} {which}: invalid compose project')

        if "network_mode" not in service:
            service["networks"] = service.get("networks") or {"default": None}
        for key in service.get("networks") or ():
            if key not in project.networks and key != "default":
                raise undefined("network", key, "networks")
        for mount in service.get("volumes", ()):
            source = mount.get("source") if mount["type"] == "volume" else None
            if source and source not in project.volumes:
                raise undefined("volume", source, "volumes")
        for section in ("secrets", "configs"):
            grants = [*service.get(section, ()), *(service.get("build", {}).get(section, ()))]
            for grant in grants:
                if grant["source"] not in getattr(project, section):
                    raise undefined(section[:-1], grant["source"], section)
