"""The containers of a project as they are: found by their labels, so also without the files that made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import NoSuchContainer
from .document import ComposeError
from .settings import DEPENDS, NUMBER, ONEOFF, PROJECT, SERVICE

if TYPE_CHECKING:
    from ..containers import Containers
    from ..running.container import Container


def service_of(container: Container) -> str:
    """The service a container belongs to."""
    return container.labels.get(SERVICE, "")


def number_of(container: Container) -> int:
    """Its number among those of its service; 0 where the label is no number."""
    text = container.labels.get(NUMBER, "")
    return int(text) if text.isdigit() else 0


def find(
    containers: Containers,
    project: str,
    services: Sequence[str] = (),
    *,
    stopped: bool = True,
    oneoff: bool | None = False,
) -> list[Container]:
    """The containers of a project, by service and number. `oneoff`: those of `run`, too (None) or only (True)."""
    found = []
    for container in containers.list(all=stopped, filters={"label": f"{PROJECT}={project}"}):
        once = container.labels.get(ONEOFF, "").lower() == "true"
        if (oneoff is None or once == oneoff) and (not services or service_of(container) in services):
            found.append(container)
    return sorted(found, key=lambda each: (service_of(each), number_of(each), each.created_at))


def pick(containers: Containers, project: str, service: str, *, index: int | None = None) -> Container:
    """The running container that `exec` and `port` mean. Raises ComposeError."""
    found = find(containers, project, [service], stopped=False)
    if index is not None:
        found = [each for each in found if number_of(each) == index]
    if not found:
        what = f'service "{service}" is not running'
        raise ComposeError(
            f"{what} container #{index}" if index is not None else what, resolution="`compose up -d` starts it"
        )
    return found[0]


def waves(containers: Iterable[Container]) -> list[list[Container]]:
    """In groups in which they can be stopped: those that need others first."""
    rest = list(containers)
    needs: dict[str, set[str]] = {}
    for each in rest:
        words = filter(None, each.labels.get(DEPENDS, "").split(","))
        needs.setdefault(service_of(each), set()).update(word.partition(":")[0] for word in words)
    groups = []
    while rest:
        left = {service_of(each) for each in rest}
        wanted = {name for other in left for name in needs.get(other, ()) if name != other}
        group = [each for each in rest if service_of(each) not in wanted] or rest
        groups.append(group)
        rest = [each for each in rest if each not in group]
    return groups


def projects(containers: Containers, *, stopped: bool = False) -> list[dict[str, Any]]:
    """What `compose ls` shows: [{"Name", "Status", "ConfigFiles"}]."""
    from .settings import FILES

    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    for container in containers.list(all=True, filters={"label": PROJECT}):
        name = container.labels[PROJECT]
        found.setdefault(name, {"Name": name, "ConfigFiles": container.labels.get(FILES, "")})
        states = counts.setdefault(name, {})
        status = container.status
        states[status] = states.get(status, 0) + 1
    for name, entry in found.items():
        entry["Status"] = ", ".join(f"{state}({count})" for state, count in sorted(counts[name].items()))
    return [each for _, each in sorted(found.items()) if stopped or "running" in each["Status"]]


def refreshed(container: Container) -> str:
    """Its status now; `removed` where it is gone."""
    try:
        return str(container.runtime_state()["status"])
    except NoSuchContainer:
        return "removed"
