"""A container's networks and ports as `docker inspect`, `docker ps` and `docker port` show them.

Source: Docker Engine API, ContainerInspect (NetworkSettings, HostConfig.PortBindings) and ContainerList (Ports).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..net import addresses
from ..runtime.spec import network_mode

if TYPE_CHECKING:
    from ..running.container import Container

_UP = ("running", "paused")
Bindings = dict[str, list[dict[str, str]] | None]


def port_bindings(settings: Mapping[str, Any]) -> Bindings:
    """HostConfig.PortBindings: what was asked for."""
    found: Bindings = {}
    for each in settings.get("ports") or ():
        host = "" if each["host"] is None else "-".join(map(str, dict.fromkeys(each["host"])))
        bindings = found.setdefault(f"{each['port']}/{each['proto']}", [])
        assert bindings is not None
        bindings.append({"HostIp": each["ip"], "HostPort": host})
    return found


def exposed_ports(container: Container, image_ports: Iterable[str] = ()) -> list[str]:
    """Every port it has: the image's, exposed and published ones, as `80/tcp`."""
    record = container.record
    own = {f"{each['port']}/{each['proto']}" for each in container.settings.get("ports") or ()}
    return sorted({*(record.get("exposed") or image_ports), *own}, key=lambda word: (int(word.split("/")[0]), word))


def ports(container: Container, state: Mapping[str, Any]) -> Bindings:
    """NetworkSettings.Ports: where each of its ports is reached now; empty while it does not run."""
    if state["status"] not in _UP or not state.get("network"):
        return {}
    found: Bindings = dict.fromkeys(exposed_ports(container))
    for each in state["network"]["ports"]:
        binding = {"HostIp": each["ip"] or "0.0.0.0", "HostPort": str(each["host"])}
        key = f"{each['port']}/{each['proto']}"
        found[key] = [*(found.get(key) or []), binding]
    return found


def network_settings(container: Container, state: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of NetworkSettings."""
    mode = network_mode(container.settings)
    running = state["status"] in _UP
    networks = {}
    for row in container._containers.networks.endpoints(container.id):
        networks[row["name"] or row["network_id"]] = _endpoint(container, row, running=running)
    if not networks and mode in ("none", "host"):
        network = container._containers.networks.get(mode)
        networks[mode] = {**_empty(), "NetworkID": network.id if running else ""}
    default = networks.get("bridge") or _empty()
    return {
        "Bridge": "",
        "SandboxID": container.id if running else "",
        "SandboxKey": f"/proc/{state['pid']}/ns/net" if running and state.get("pid") else "",
        "Ports": ports(container, state),
        **{key: default[key] for key in ("EndpointID", "Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen")},
        **{key: default[key] for key in ("IPAddress", "IPPrefixLen", "IPv6Gateway", "MacAddress")},
        "Networks": networks,
    }


def _empty() -> dict[str, Any]:
    return {
        "IPAMConfig": None,
        "Links": None,
        "Aliases": None,
        "MacAddress": "",
        "DriverOpts": None,
        "GwPriority": 0,
        "NetworkID": "",
        "EndpointID": "",
        "Gateway": "",
        "IPAddress": "",
        "IPPrefixLen": 0,
        "IPv6Gateway": "",
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "DNSNames": None,
    }


def _endpoint(container: Container, row: Any, *, running: bool) -> dict[str, Any]:
    aliases = json.loads(row["aliases"])
    found = {
        **_empty(),
        "Aliases": aliases or None,
        "Links": json.loads(row["links"]) or None,
        "NetworkID": row["network_id"],
    }
    asked = (container.settings.get("networking_config") or {}).get(row["name"]) or {}
    if asked.get("ip"):
        found["IPAMConfig"] = {"IPv4Address": asked["ip"]}
    if row["name"] not in (None, "bridge"):
        found["DNSNames"] = list(dict.fromkeys([container.name, *aliases, container.short_id]))
    if running and row["name"] is not None:
        found |= {
            "EndpointID": row["endpoint_id"],
            "Gateway": row["gateway"],
            "IPAddress": row["address"],
            "IPPrefixLen": addresses.parse(row["subnet"]).prefix,
            "MacAddress": row["mac"],
        }
    return found


def port_words(bindings: Mapping[str, Any]) -> str:
    """As the column PORTS of `docker ps`: `0.0.0.0:8080->80/tcp, 443/tcp`, ranges joined."""
    spans: list[list[Any]] = []  # [ip, host, port, proto, count]
    for inside, found in bindings.items():
        port, _, proto = inside.partition("/")
        for each in found or [None]:
            ip, host = (each["HostIp"], int(each["HostPort"])) if each else (None, None)
            spans.append([ip, host, int(port), proto, 1])
    joined: list[list[Any]] = []
    for span in sorted(spans, key=lambda s: (s[0] is None, s[0] or "", s[3], s[2], s[1] or 0)):
        last = joined[-1] if joined else None
        follows = last is not None and (last[0], last[3], last[2] + last[4]) == (span[0], span[3], span[2])
        if last is not None and follows and (span[1] is None or last[1] + last[4] == span[1]):
            last[4] += 1
        else:
            joined.append(span)
    return ", ".join(_span_words(*span) for span in joined)


def _span_words(ip: str | None, host: int | None, port: int, proto: str, count: int) -> str:
    def span(first: int) -> str:
        return str(first) if count == 1 else f"{first}-{first + count - 1}"

    return f"{span(port)}/{proto}" if host is None else f"{ip}:{span(host)}->{span(port)}/{proto}"


def port_lines(bindings: Mapping[str, Any], wanted: str | None = None) -> list[str]:
    """As `docker port` prints them: all as `80/tcp -> 0.0.0.0:8080`, or those of one port as `0.0.0.0:8080`."""
    lines = []
    for inside, found in bindings.items():
        if wanted in (None, inside):
            lines += [f"{'' if wanted else inside + ' -> '}{each['HostIp']}:{each['HostPort']}" for each in found or ()]
    return lines


def summarize_networks(container: Container, state: Mapping[str, Any]) -> dict[str, Any]:
    """What `ps` shows of NetworkSettings, without a look at the database."""
    mode = network_mode(container.settings)
    networks: dict[str, Any] = {"bridge" if mode == "default" else mode: _empty()}
    if state["status"] in _UP and state.get("network"):
        networks = {
            each["network_name"]: {
                **_empty(),
                "NetworkID": each["network"],
                "Gateway": each["gateway"],
                "IPAddress": each["ip"],
                "IPPrefixLen": each["prefix"],
                "MacAddress": each["mac"],
            }
            for each in state["network"]["endpoints"]
        }
    return {"Ports": ports(container, state), "Networks": networks}
