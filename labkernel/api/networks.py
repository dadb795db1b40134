"""Networks. Source: Docker Engine API, "Network"."""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import UsageError
from .call import Call
from .configs import Endpoint
from .routes import Route


class Pool(msgspec.Struct, rename="pascal", omit_defaults=True):
    subnet: str = ""
    ip_range: str = msgspec.field(default="", name="IPRange")
    gateway: str = ""
    auxiliary_addresses: dict[str, str] | None = None


class Ipam(msgspec.Struct, rename="pascal"):
    driver: str = ""
    config: list[Pool] | None = None
    options: dict[str, str] | None = None


class Options(msgspec.Struct, rename="pascal"):
    """NetworkCreate."""

    name: str = ""
    check_duplicate: bool = False
    driver: str = ""
    scope: str = ""
    internal: bool = False
    attachable: bool = False
    ingress: bool = False
    config_only: bool = False
    ipam: Ipam | None = msgspec.field(default=None, name="IPAM")
    enable_ipv4: bool | None = msgspec.field(default=None, name="EnableIPv4")
    enable_ipv6: bool | None = msgspec.field(default=None, name="EnableIPv6")
    options: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class Connect(msgspec.Struct, rename="pascal"):
    container: str = ""
    endpoint_config: Endpoint | None = None


class Disconnect(msgspec.Struct, rename="pascal"):
    container: str = ""
    force: bool = False


def listing(call: Call) -> Any:
    return [network.attrs for network in call.engine.networks.list(filters=call.filters())]


def inspect(call: Call) -> Any:
    return call.engine.networks.get(call.params["name"]).attrs


def create(call: Call) -> Any:
    given: Options = call.body
    if given.config_only:
        raise UsageError("networks that are only a configuration are not available in this release")
    ipam = None
    if given.ipam is not None:
        pools = msgspec.to_builtins(given.ipam.config or [])
        ipam = {"Driver": given.ipam.driver or "default", "Config": pools, "Options": given.ipam.options}
    made = call.engine.networks.create(
        given.name,
        driver=given.driver or None,
        options=given.options,
        ipam=ipam,
        internal=given.internal,
        labels=given.labels,
        enable_ipv6=bool(given.enable_ipv6),
        attachable=given.attachable or None,
        scope=given.scope or None,
        ingress=given.ingress or None,
    )
    return call.answer(201, {"Id": made.id, "Warning": ""})


def remove(call: Call) -> Any:
    call.engine.networks.get(call.params["name"]).remove()


def connect(call: Call) -> Any:
    given: Connect = call.body
    if not given.container:
        raise UsageError("no container was given")
    end = given.endpoint_config or Endpoint()
    ipam = end.ipam_config or {}
    call.engine.networks.get(call.params["name"]).connect(
        given.container,
        aliases=end.aliases,
        links=end.links,
        ipv4_address=ipam.get("IPv4Address") or None,
        ipv6_address=ipam.get("IPv6Address") or None,
        driver_opt=end.driver_opts,
        mac_address=end.mac_address or None,
    )
    return call.answer(200)


def disconnect(call: Call) -> Any:
    given: Disconnect = call.body
    if not given.container:
        raise UsageError("no container was given")
    call.engine.networks.get(call.params["name"]).disconnect(given.container, force=given.force)
    return call.answer(200)


def prune(call: Call) -> Any:
    return call.engine.networks.prune(filters=call.filters())


ROUTES = (
    Route("GET", "/networks", listing),
    Route("POST", "/networks/create", create, body=Options),
    Route("POST", "/networks/prune", prune, slow=True),
    Route("GET", "/networks/{name}", inspect),
    Route("DELETE", "/networks/{name}", remove),
    Route("POST", "/networks/{name}/connect", connect, body=Connect),
    Route("POST", "/networks/{name}/disconnect", disconnect, body=Disconnect),
)
