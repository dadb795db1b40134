"""What networks and settings say in a container's `network.json`, from which the supervisor works (`net/switch.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..net import addresses

BRIDGE_ICC = "com.docker.network.bridge.enable_icc"
BRIDGE_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
BRIDGE_MTU = "com.docker.network.driver.mtu"


def wiring(row: Any) -> dict[str, Any]:
    """What an endpoint says of its network: the bridge, its addresses and options."""
    options = json.loads(row["options"])
    return {
        "bridge": row["bridge"],
        "subnet": row["subnet"],
        "gateway": row["gateway"],
        "prefix": addresses.parse(row["subnet"]).prefix,
        "internal": bool(row["internal"]),
        "icc": options.get(BRIDGE_ICC, "true") == "true",
        "masquerade": options.get(BRIDGE_MASQUERADE, "true") == "true",
        "mtu": int(options.get(BRIDGE_MTU) or 0),
    }


def published_ports(settings: Mapping[str, Any], exposed: Iterable[str]) -> list[dict[str, Any]]:
    """What a container publishes: `ports`, and with `publish_all_ports` the exposed ones that are not among them."""
    found = [dict(each) for each in settings.get("ports") or ()]
    if settings.get("publish_all_ports"):
        named = {f"{each['port']}/{each['proto']}" for each in found}
        for word in exposed:
            if word not in named:
                port, _, proto = word.partition("/")
                found.append({"port": int(port), "proto": proto or "tcp", "ip": "", "host": None})
    return found
