"""The networks and volumes of a project: made before its containers, found again by their labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import NoSuchNetwork, NoSuchVolume
from .converge import Report
from .document import ComposeError
from .project import Project
from .settings import HASH, PREFIX, PROJECT, project_labels

if TYPE_CHECKING:
    from ..networks import Networks
    from ..volumes import Volumes

NETWORK, VOLUME = f"{PREFIX}.network", f"{PREFIX}.volume"
Names = Sequence[str]


def make_networks(networks: Networks, project: Project, services: Names, report: Report) -> None:
    wanted = {key for name in services for key in project.services[name].get("networks") or ()}
    for key in sorted(wanted):
        spec = project.networks[key]
        name = spec["name"]
        try:
            network: Any = networks.get(name)
        except NoSuchNetwork:
            network = None
        if spec.get("external"):
            if network is None:
                raise ComposeError(
                    f"network {name} declared as external, but could not be found",
                    resolution=f"`labkernel network create {name}`",
                )
            continue
        mark = _hash(spec)
        if network is not None:
            _check_network(project, network, mark)
            continue
        report(f"Network {name}", "Creating")
        networks.create(
            name,
            driver=spec.get("driver"),
            options={key: value or "" for key, value in spec.get("driver_opts", {}).items()} or None,
            ipam=_ipam(spec),
            internal=bool(spec.get("internal")),
            labels={**spec.get("labels", {}), **project_labels(project), NETWORK: key, HASH: mark},
            enable_ipv6=bool(spec.get("enable_ipv6")),
            attachable=spec.get("attachable"),
        )
        report(f"Network {name}", "Created")


def _check_network(project: Project, network: Any, mark: str) -> None:
    labels = network.labels
    if labels.get(PROJECT) != project.name:
        project.warnings.append(
            f'a network with name {network.name} exists but was not created for project "{project.name}". '
            "Set `external: true` to use an existing network"
        )
    elif labels.get(HASH) not in (None, mark):
        raise ComposeError(
            f"network {network.name} was created with other settings than the file has now",
            resolution="`compose down` removes it, the next `up` makes it anew",
        )


def make_volumes(volumes: Volumes, project: Project, services: Names, report: Report) -> None:
    wanted = {
        mount["source"]
        for name in services
        for mount in project.services[name].get("volumes", ())
        if mount["type"] == "volume" and mount.get("source")
    }
    for key in sorted(wanted):
        spec = project.volumes[key]
        name = spec["name"]
        try:
            volume: Any = volumes.get(name)
        except NoSuchVolume:
            volume = None
        if spec.get("external"):
            if volume is None:
                raise ComposeError(
                    f'external volume "{name}" not found', resolution=f"`labkernel volume create {name}`"
                )
            continue
        if volume is not None:
            if volume.labels.get(PROJECT) != project.name:
                project.warnings.append(
                    f'volume "{name}" already exists but was not created for project "{project.name}". '
                    "Use `external: true` to use an existing volume"
                )
            continue
        report(f"Volume {name}", "Creating")
        volumes.create(
            name,
            driver=spec.get("driver", "local"),
            driver_opts={key: value or "" for key, value in spec.get("driver_opts", {}).items()} or None,
            labels={**spec.get("labels", {}), **project_labels(project), VOLUME: key},
        )
        report(f"Volume {name}", "Created")


def _hash(spec: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def _ipam(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    given = spec.get("ipam")
    if not given:
        return None
    names = {"subnet": "Subnet", "gateway": "Gateway", "ip_range": "IPRange", "aux_addresses": "AuxiliaryAddresses"}
    config = [{names[key]: value for key, value in each.items()} for each in given.get("config", ())]
    return {"Driver": given.get("driver", "default"), "Config": config}
