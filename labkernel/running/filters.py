"""Docker's filters over containers: which of a list are meant. Source: Docker Engine API, ContainerList."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InvalidFilter, NoSuchContainer, NoSuchImage
from .container import Container, find_image

if TYPE_CHECKING:
    from ..containers import Containers

_STATES = ("created", "restarting", "running", "removing", "paused", "exited", "dead")
_HEALTH = ("none", "starting", "healthy", "unhealthy")
_RUNNING = ("running", "paused", "restarting")

Test = Callable[[Container], bool]


def select_containers(
    service: Containers,
    containers: Sequence[Container],
    filters: Mapping[str, Any],
    *,
    everything: bool,
    limit: int | None,
) -> list[Container]:
    """`containers` (newest first) that fit all filters; only running ones unless `everything`, `limit` or a filter
    for a status asks for more. Raises UsageError for an unknown filter."""
    tests = [_TESTS[_known(key)](service, containers, filter_words(value)) for key, value in filters.items()]
    only_running = not everything and not limit and not {"status", "exited"} & filters.keys()
    found = []
    for container in containers:
        try:
            container.seen = container.runtime_state()
        except NoSuchContainer:
            continue
        if only_running and container.seen["status"] not in _RUNNING:
            continue
        if all(test(container) for test in tests):
            found.append(container)
            if limit and len(found) >= limit:
                break
    return found


def select_stopped(containers: Iterable[Container], filters: dict[str, Any]) -> list[Container]:
    """What `prune` removes: not running, and fitting its filters `until`, `label` and `label!`."""
    from ..runtime.logreader import parse_moment

    until = filter_words(filters.pop("until", None))
    labels = filter_words(filters.pop("label", None))
    unwanted = filter_words(filters.pop("label!", None))
    if filters:
        raise InvalidFilter(f"invalid filter '{next(iter(filters))}'")
    latest = parse_moment(until[0]) if until else None
    return [
        container
        for container in containers
        if container.status in ("created", "exited", "dead")
        and (latest is None or container.created_at < latest)
        and all(has_label(container.labels, label) for label in labels)
        and not any(has_label(container.labels, label) for label in unwanted)
    ]


def filter_words(value: Any) -> list[str]:
    """A filter's values: one, several, or the API's {"value": true}."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [str(key) for key, on in value.items() if on]
    return [str(word) for word in value] if isinstance(value, (list, tuple, set)) else [str(value)]


def has_label(labels: Mapping[str, str], wanted: str) -> bool:
    """`key` or `key=value`."""
    key, separator, value = wanted.partition("=")
    return key in labels and (not separator or labels[key] == value)


def _known(key: str) -> str:
    if key not in _TESTS:
        raise InvalidFilter(f"invalid filter '{key}'", resolution=f"the filters are {', '.join(sorted(_TESTS))}")
    return key


def _by_status(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    for word in words:
        if word not in _STATES:
            raise InvalidFilter(f"invalid filter 'status={word}'", resolution=f"one of {', '.join(_STATES)}")
    return lambda container: container.status in words


def _by_exit(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    for word in words:
        if not word.lstrip("-").isdigit():
            raise InvalidFilter(f"invalid filter 'exited={word}'", resolution="an exit code")
    codes = {int(word) for word in words}

    def test(container: Container) -> bool:
        state = container.runtime_state()
        return state["status"] == "exited" and int(state.get("exit_code") or 0) in codes

    return test


def _by_name(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    patterns = [re.compile(word.removeprefix("/").replace("^/", "^")) for word in words]
    return lambda container: any(pattern.search(container.name) for pattern in patterns)


def _by_id(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    return lambda container: container.id.startswith(tuple(words))


def _by_label(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    return lambda container: all(has_label(container.labels, word) for word in words)


def _by_ancestor(service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    wanted: list[list[str]] = []
    for word in words:
        try:
            wanted.append([layer.diff_id for layer in service.images.get(word).layers])
        except NoSuchImage:
            continue

    def test(container: Container) -> bool:
        image = find_image(container)
        mine = [layer.diff_id for layer in image.layers] if image else []
        return any(mine[: len(layers)] == layers for layers in wanted)

    return test


def _by_time(*, before: bool) -> Callable[[Containers, Sequence[Container], list[str]], Test]:
    def make(service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
        try:
            moment = service.get(words[0]).created_at
        except NoSuchContainer:
            raise NoSuchContainer(words[0]) from None
        if before:
            return lambda container: container.created_at < moment
        return lambda container: container.created_at > moment

    return make


def _by_volume(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    def test(container: Container) -> bool:
        mounts = container.record.get("mounts", ())
        return any(word in (mount.get("name"), mount["destination"]) for mount in mounts for word in words)

    return test


def _by_network(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    def test(container: Container) -> bool:
        endpoints = container._containers.networks.endpoints(container.id)
        own = {word for row in endpoints for word in (row["name"], row["network_id"])}
        own.add(str(container.settings.get("network_mode") or "bridge"))
        return any(word in own or (len(word) >= 12 and any(str(o).startswith(word) for o in own)) for word in words)

    return test


def _by_health(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    for word in words:
        if word not in _HEALTH:
            raise InvalidFilter(f"invalid filter 'health={word}'", resolution=f"one of {', '.join(_HEALTH)}")
    return lambda container: ((container.runtime_state().get("health") or {}).get("Status") or "none") in words


def _by_port(*, published: bool) -> Callable[[Containers, Sequence[Container], list[str]], Test]:
    """`publish=8080[/udp]`, `expose=80-90`: the ports of the machine that are published, those of the container."""

    def make(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
        from ..networking.settings import exposed_ports
        from ..runtime.netsettings import inside_port

        wanted = set()
        for word in words:
            first, last, proto = inside_port(word)
            wanted |= {(port, proto) for port in range(first, last + 1)}

        def test(container: Container) -> bool:
            if not published:
                mine = {(int(port), proto) for port, _, proto in (p.partition("/") for p in exposed_ports(container))}
                return bool(mine & wanted)
            found = set()
            for each in container.settings.get("ports") or ():
                low, high = each["host"] or (1, 0)
                found |= {(port, each["proto"]) for port in range(low, high + 1)}
            for inside, bindings in container.ports.items():
                found |= {(int(each["HostPort"]), inside.partition("/")[2]) for each in bindings or ()}
            return bool(found & wanted)

        return test

    return make


def _by_task(_service: Containers, _all: Sequence[Container], words: list[str]) -> Test:
    none_is = not any(word.lower() in ("1", "true") for word in words)
    return lambda _container: none_is  # containers of a swarm's services; there are none here


_TESTS: dict[str, Callable[[Any, Sequence[Container], list[str]], Test]] = {
    "ancestor": _by_ancestor,
    "before": _by_time(before=True),
    "exited": _by_exit,
    "expose": _by_port(published=False),
    "health": _by_health,
    "id": _by_id,
    "is-task": _by_task,
    "label": _by_label,
    "name": _by_name,
    "network": _by_network,
    "publish": _by_port(published=True),
    "since": _by_time(before=False),
    "status": _by_status,
    "volume": _by_volume,
}
