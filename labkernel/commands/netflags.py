"""docker's network flags of `run` and `create` as the SDK's keyword arguments. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..runtime.netsettings import ports
from .grammar import flag, many, option

FLAGS: list[Callable[[Any], Any]] = [
    many("--network", "--net", metavar="network", help="Connect a container to a network (NAME, none, host, "
         "container:NAME, or name=NAME,alias=…,ip=…); several times for several networks"),
    many("--network-alias", "--net-alias", help="Add network-scoped alias for the container"),
    many("--link", help="Add link to another container (CONTAINER[:NAME], in a network of your own)"),
    option("--ip", metavar="ip", help="IPv4 address (e.g., 172.30.100.104)"),
    option("--mac-address", metavar="string", help="Container MAC address (e.g., 92:d0:c6:0a:29:33)"),
    many("-p", "--publish", help="Publish a container's port(s) to the host ([[IP:]HOST:]PORT[/udp], ranges)"),
    flag("-P", "--publish-all", help="Publish all exposed ports to random ports"),
    many("--expose", help="Expose a port or a range of ports"),
]  # fmt: skip

_KEYS = {"name": "name", "alias": "aliases", "ip": "ip", "mac-address": "mac"}


def network_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`network_mode`, `networking_config`, `ports`, … as far as given. Raises UsageError."""
    settings: dict[str, Any] = {}
    networks = [_network(word) for word in flags.get("network") or ()]
    first = networks[0] if networks else {}
    given = {"aliases": list(flags.get("network_alias") or ()), "ip": flags.get("ip")}
    given["links"] = list(flags.get("link") or ())
    for key, value in given.items():
        if value and first.get(key):
            raise UsageError(f"conflicting options: cannot specify both --{_flag(key)} and per-network {_flag(key)}")
        if value:
            first[key] = value
    name = first.pop("name", "default")
    if networks:
        settings["network_mode"] = name
    config = {name: first} if first else {}
    for other in networks[1:]:
        second = other.pop("name")
        if second in config or second == name:
            raise UsageError(f'network "{second}" is specified multiple times')
        config[second] = other
        config.setdefault(name, first)
    if config:
        settings["networking_config"] = config
    if flags.get("publish"):
        settings["ports"] = _ports(flags["publish"])
    if flags.get("expose"):
        settings["exposed_ports"] = list(flags["expose"])
    if flags.get("publish_all"):
        settings["publish_all_ports"] = True
    if flags.get("mac_address"):
        settings["mac_address"] = flags["mac_address"]
    return settings


def _ports(given: Sequence[str]) -> dict[str, Any]:
    """As the SDK has them: {"80/tcp": 8080 | ("127.0.0.1", 8080) | None, or a list of these}."""
    found: dict[str, Any] = {}
    for each in ports(list(given)):
        low, high = each["host"] or (None, None)
        host = low if low == high else f"{low}-{high}"
        value = (each["ip"], host) if each["ip"] else host
        key = f"{each['port']}/{each['proto']}"
        found[key] = (
            value if key not in found else [*([*found[key]] if isinstance(found[key], list) else [found[key]]), value]
        )
    return found


def _flag(key: str) -> str:
    return {"aliases": "network-alias", "ip": "ip", "links": "link"}[key]


def _network(text: str) -> dict[str, Any]:
    """`NAME`, or docker's long form `name=NAME,alias=A,alias=B,ip=10.0.0.5`."""
    if "=" not in text:
        return {"name": text}
    found: dict[str, Any] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        if key not in _KEYS:
            raise UsageError(f"invalid field key {key}", resolution=f"the keys are {', '.join(_KEYS)}")
        if key == "alias":
            found.setdefault("aliases", []).append(value)
        else:
            found[_KEYS[key]] = value
    if "name" not in found:
        raise UsageError("network name cannot be empty", resolution="--network name=NAME,alias=…")
    return found
