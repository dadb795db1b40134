"""The small languages inside Compose files: ports, volumes, durations, sizes. Text and nodes in, plain data out.

Source: Compose specification, "services": ports, volumes, "Specifying durations", "Specifying byte values".
"""

from __future__ import annotations

import re
from typing import Any

from .document import Node

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h|d|w)")
_UNITS_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_UNITS_NS |= {"d": 24 * _UNITS_NS["h"], "w": 7 * 24 * _UNITS_NS["h"]}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([bkmgtp]?)(?:i?b)?", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def duration_ns(node: Node) -> int:
    """Nanoseconds of `1m30s`; a bare number is refused, as its unit could be meant in two ways."""
    text = str(node.value).strip()
    if text == "0":
        return 0
    pos, total = 0, 0.0
    while pos < len(text) and (found := _DURATION.match(text, pos)):
        total += float(found[1]) * _UNITS_NS[found[2]]
        pos = found.end()
    if not text or pos != len(text):
        raise node.error(f'invalid duration "{text}"', resolution="a number with its unit: 500ms, 10s, 1m30s")
    return round(total)


def duration_text(nanoseconds: int) -> str:
    """As Go prints it: `1m30s`, `1.5s`, `100ms`."""
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < 10**9:
        for unit in ("ms", "µs"):
            if nanoseconds >= _UNITS_NS[unit]:
                return f"{nanoseconds / _UNITS_NS[unit]:.9g}{unit}"
        return f"{nanoseconds}ns"
    minutes, rest = divmod(nanoseconds, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 10**9:.12g}s"
    return f"{hours}h{minutes}m{seconds}" if hours else f"{minutes}m{seconds}" if minutes else seconds


def size_bytes(node: Node) -> int:
    """Bytes of `64m`, `1.5gb` or a number; units are powers of 1024."""
    if isinstance(node.value, int) and not isinstance(node.value, bool):
        return node.value
    text = str(node.value).strip()
    if text == "-1":
        return -1
    found = _SIZE.fullmatch(text)
    if found is None:
        raise node.error(f"invalid size: '{text}'", resolution="a number with b, k, m or g, such as 64m")
    return int(float(found[1]) * 1024 ** ("bkmgtp".find(found[2].lower() or "b")))


def _range(text: str, node: Node) -> list[int]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise node.error(f"invalid port: {text}", resolution="[[IP:]HOST:]CONTAINER[/tcp|udp], ports may be ranges")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 0 <= first <= last <= 65535:
        raise node.error(f"invalid port range: {text}")
    return list(range(first, last + 1))


def parse_port(node: Node) -> list[dict[str, Any]]:
    """One entry of `ports` in the long form, one for each port of a range."""
    if isinstance(node.value, dict):
        return [_long_port(node)]
    text = str(node.value)
    body, _, protocol = text.partition("/")
    protocol = protocol or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise node.error(f"invalid port: {text}: unknown protocol {protocol}")
    front, _, target = body.rpartition(":")
    address = ""
    if front:
        address, _, front = front.rpartition(":")
        if not _RANGE.fullmatch(front) and front:
            # `127.0.0.1::80`: any port of that address
            address, front = f"{address}:{front}" if address else front, ""
    targets = _range(target, node)
    published = _range(front, node) if front else []
    if published and len(published) != len(targets) and len(targets) != 1:
        raise node.error(f"invalid ranges specified for container and host ports: {text}")
    found = []
    for index, port in enumerate(targets):
        entry: dict[str, Any] = {"mode": "ingress", "target": port, "protocol": protocol}
        if published:
            one = len(published) == len(targets)
            entry["published"] = str(published[index]) if one else f"{published[0]}-{published[-1]}"
        if address:
            entry["host_ip"] = address.strip("[]")
        found.append(entry)
    return found


def _long_port(node: Node) -> dict[str, Any]:
    known = {"name", "target", "published", "host_ip", "protocol", "mode", "app_protocol"}
    for key, item in node.value.items():
        if key not in known and not key.startswith("x-"):
            raise item.error(f"additional properties '{key}' not allowed in a port")
    target = node.get("target")
    if target is None:
        raise node.error("a port needs its target")
    entry: dict[str, Any] = {"mode": "ingress", "target": _range(str(target.value), target)[0], "protocol": "tcp"}
    for key in known - {"target"}:
        item = node.get(key)
        if item is not None and item.value is not None:
            entry[key] = str(item.value)
    if "published" in entry:
        _range(entry["published"], node)
    return entry


def parse_volume(text: str, node: Node) -> dict[str, Any]:
    """The short form `[SOURCE:]TARGET[:MODE]` as the long one; the source of a bind is still as written."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise node.error(f"invalid volume specification: '{text}'", resolution="SOURCE:/TARGET[:ro]")
    if len(parts) == 1:
        return {"type": "volume", "target": parts[0], "volume": {}}
    source, target, modes = parts[0], parts[1], parts[2].split(",") if len(parts) == 3 else []
    bind = source.startswith((".", "/", "~"))
    entry: dict[str, Any] = {"type": "bind" if bind else "volume", "source": source, "target": target}
    details: dict[str, Any] = {"create_host_path": True} if bind else {}
    for mode in modes:
        if mode in ("ro", "rw"):
            entry |= {"read_only": True} if mode == "ro" else {}
        elif mode in ("z", "Z") and bind:
            details["selinux"] = mode
        elif mode == "nocopy" and not bind:
            details["nocopy"] = True
        elif mode in ("private", "rprivate", "shared", "rshared", "slave", "rslave") and bind:
            details["propagation"] = mode
        elif mode not in ("cached", "delegated", "consistent"):
            raise node.error(f"invalid volume specification: '{text}': invalid mode: {mode}")
    entry["bind" if bind else "volume"] = details
    return entry
