"""The settings of a container that are about networks, checked and brought to one form. Pure.

Source: Docker SDK for Python, `containers.run` (ports, networking_config); Docker Engine API, ContainerCreate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UsageError

PROTOCOLS = ("tcp", "udp")
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")
_FEW_PORTS = "for example -p 8080:80, -p 127.0.0.1:8080:80/udp or -p 8000-8010:8000-8010"

Published = dict[str, Any]
"""{"port", "proto", "ip" ("" for every address), "host": [first, last] or None for one of the machine's choice}"""


def ports(value: Any) -> list[Published]:
    """`-p` in all its forms: the SDK's mapping {"80/tcp": 8080 | ("127.0.0.1", 8080) | [8080, 8081] | None}, docker's
    words `[[IP:]HOST:]PORT[/PROTO]` with ranges, or this function's own result. Raises UsageError."""
    if isinstance(value, Mapping):
        found = [each for inside, outside in value.items() for each in _mapping(str(inside), outside)]
    else:
        items = [value] if isinstance(value, str) else list(value)
        found = [each for item in items for each in ([dict(item)] if isinstance(item, Mapping) else _words(str(item)))]
    unique: list[Published] = []
    for each in found:
        if each not in unique:
            unique.append(each)
    return unique


def port_range(text: str, whole: str) -> tuple[int, int]:
    """`80` or `80-90`. Raises UsageError."""
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or not 0 <= int(first) <= int(last or first) <= 65535:
        raise UsageError(f"invalid containerPort: {whole}", resolution=_FEW_PORTS)
    return int(first), int(last or first)


def inside_port(text: str) -> tuple[int, int, str]:
    """`80`, `80/udp`, `80-90/tcp` as (first, last, protocol). Raises UsageError."""
    numbers, _, proto = text.partition("/")
    first, last = port_range(numbers, text)
    proto = proto.lower() or "tcp"
    if proto not in PROTOCOLS:
        what = "is not available in this release" if proto == "sctp" else "is no protocol"
        raise UsageError(f"invalid proto: {proto}: {what}", resolution="tcp or udp")
    if first == 0:
        raise UsageError(f"invalid containerPort: {text}", resolution=_FEW_PORTS)
    return first, last, proto


def exposed(value: Iterable[Any]) -> list[str]:
    """`--expose`: `80`, `80/udp`, `80-90` or (80, "udp") as single `80/tcp`."""
    found = []
    for item in value:
        first, last, proto = inside_port("/".join(map(str, item)) if isinstance(item, (tuple, list)) else str(item))
        found += [f"{port}/{proto}" for port in range(first, last + 1)]
    return found


def _mapping(inside: str, outside: Any) -> list[Published]:
    if isinstance(outside, list):
        return [each for item in outside for each in _mapping(inside, item)]
    address, host = "", outside
    if isinstance(outside, Mapping):  # the API's {"HostIp", "HostPort"}
        address, host = str(outside.get("HostIp") or ""), outside.get("HostPort")
    elif isinstance(outside, tuple):
        address, host = str(outside[0]), outside[1] if len(outside) > 1 else None
    elif isinstance(outside, str) and ":" in outside:
        address, _, host = outside.rpartition(":")
    return _expand(address, str(host) if host not in (None, "", 0, "0") else "", inside, inside)


def _words(text: str) -> list[Published]:
    address, rest = "", text
    if rest.startswith("["):
        address, bracket, rest = rest[1:].partition("]:")
        if not bracket:
            raise UsageError(f"invalid publish: {text}", resolution=_FEW_PORTS)
    parts = rest.split(":")
    if len(parts) > 3 or (address and len(parts) > 2):
        raise UsageError(f"invalid publish opts format: {text}", resolution=_FEW_PORTS)
    if len(parts) == 3:
        address, parts = parts[0], parts[1:]
    return _expand(address, parts[0] if len(parts) == 2 else "", parts[-1], text)


def _expand(address: str, host: str, inside: str, whole: str) -> list[Published]:
    first, last, proto = inside_port(inside)
    address = _address(address, whole)
    if not host:
        return [_published(port, proto, address, None) for port in range(first, last + 1)]
    low, high = port_range(host, whole)
    if first == last:
        return [_published(first, proto, address, None if high == 0 else [low, high])]
    if high - low != last - first:
        raise UsageError(f"invalid ranges specified for container and host Ports: {inside} and {host}")
    return [_published(first + step, proto, address, [low + step] * 2) for step in range(last - first + 1)]


def _published(port: int, proto: str, address: str, host: list[int] | None) -> Published:
    return {"port": port, "proto": proto, "ip": address, "host": host}


def _address(text: str, whole: str) -> str:
    if text in ("", "0.0.0.0"):
        return ""
    if text == "localhost":
        return "127.0.0.1"
    if ":" in text:
        raise UsageError(f"IPv6 addresses are not published in this release: {whole}", resolution=_FEW_PORTS)
    parts = text.split(".")
    if len(parts) != 4 or not all(part.isdigit() and int(part) < 256 for part in parts):
        raise UsageError(f"invalid IP address: {text}", resolution=_FEW_PORTS)
    return text


def mac_address(value: Any) -> str:
    """Six bytes in hexadecimal, as `02:42:ac:11:00:02`."""
    if not _MAC.fullmatch(str(value)):
        raise UsageError(f"{value} is not a valid mac address")
    return str(value).lower().replace("-", ":")


def link(value: Any) -> str:
    """`CONTAINER[:NAME]`, or the two as a pair: in this network the container is also NAME to the one that has it."""
    words = [str(word) for word in value] if isinstance(value, list | tuple) else str(value).split(":")
    if len(words) not in (1, 2) or not all(words):
        raise UsageError(f"bad format for links: {value}")
    return f"{words[0].lstrip('/')}:{words[-1].rpartition('/')[2]}"


def networking_config(value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Network -> {"aliases": [...], "ip", "mac", "links"}, only what is given. Takes the API's {"EndpointsConfig": …},
    the SDK's mapping of EndpointConfig, and this function's own result."""
    found = {}
    for name, given in (value.get("EndpointsConfig") or value).items():
        config = given or {}
        ip = config.get("ip") or (config.get("IPAMConfig") or {}).get("IPv4Address") or config.get("IPAddress")
        mac = config.get("mac") or config.get("MacAddress")
        endpoint: dict[str, Any] = {}
        aliases = [str(word) for word in config.get("aliases") or config.get("Aliases") or ()]
        if aliases:
            endpoint["aliases"] = list(dict.fromkeys(aliases))
        links = [link(word) for word in config.get("links") or config.get("Links") or ()]
        if links:
            endpoint["links"] = list(dict.fromkeys(links))
        if ip:
            endpoint["ip"] = str(ip)
        if mac:
            endpoint["mac"] = mac_address(mac)
        found[str(name)] = endpoint
    return found
