"""Volumes. Source: Docker Engine API, "Volume"."""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import UsageError
from .call import Call
from .routes import Route


class Options(msgspec.Struct, rename="pascal"):
    """VolumeCreate."""

    name: str = ""
    driver: str = ""
    driver_opts: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    cluster_volume_spec: Any = None


def listing(call: Call) -> Any:
    filters = call.filters()
    drivers = filters.pop("driver", None)
    found = call.engine.volumes.list(filters=filters)
    return {
        "Volumes": [volume.attrs for volume in found if drivers is None or "local" in drivers],
        "Warnings": None,
    }


def create(call: Call) -> Any:
    given: Options = call.body
    if given.cluster_volume_spec:
        raise UsageError("cluster volumes need a swarm")
    made = call.engine.volumes.create(
        given.name or None, driver=given.driver or "local", driver_opts=given.driver_opts, labels=given.labels
    )
    return call.answer(201, made.attrs)


def inspect(call: Call) -> Any:
    return call.engine.volumes.get(call.params["name"]).attrs


def remove(call: Call) -> Any:
    call.engine.volumes.remove(call.params["name"], force=call.flag("force"))


def prune(call: Call) -> Any:
    filters = call.filters()
    if call.version < (1, 42):
        filters.setdefault("all", ["true"])  # anonymous ones only, since 1.42
    return call.engine.volumes.prune(filters=filters)


ROUTES = (
    Route("GET", "/volumes", listing),
    Route("POST", "/volumes/create", create, body=Options),
    Route("POST", "/volumes/prune", prune, slow=True),
    Route("GET", "/volumes/{name}", inspect),
    Route("DELETE", "/volumes/{name}", remove),
)
