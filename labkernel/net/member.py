"""Who is in the networks of a supervisor, and small acts inside a network namespace (`usermode.inside`).

Standard library only.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ..linux import netlink


class Member:
    """A running container: `endpoints` as in network.json with the `veth` of each, `ports` as bound, `sockets` that
    hold those."""

    def __init__(self, inst: Any, info: dict[str, Any]) -> None:
        self.inst = inst
        self.name: str = info.get("name") or inst.id[:12]
        self.endpoints: list[dict[str, Any]] = []
        self.ports: list[dict[str, Any]] = []
        self.sockets: list[socket.socket] = []
        self.resolver = False

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "endpoints": self.endpoints, "ports": self.ports, "resolver": self.resolver}

    def cards(self, mtu: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        """What a guest has to set up by itself."""
        gateway = way_out(self)
        return [
            {
                **{key: each[key] for key in ("mac", "ip", "prefix")},
                "number": int(each["interface"].removeprefix("eth")),
                "name": each["interface"],
                "mtu": mtu(each),
                "gateway": each["gateway"] if each is gateway else "",
            }
            for each in self.endpoints
        ]


def is_machine(inst: Any) -> bool:
    """Whether a monitor carries the frames of a guest, which has addresses and routes of its own."""
    return "monitor" in inst.own


def way_out(member: Member) -> dict[str, Any] | None:
    return next((each for each in member.endpoints if not each["internal"]), None)


def whole_frames(name: str) -> str:
    netlink.no_offload(name)
    return ""


def configure(interface: dict[str, Any]) -> str:
    netlink.configure([interface])
    return ""


def send(message: bytes) -> str:
    with netlink.Socket() as sock:
        sock.send(message)
    return ""


def write_sysctl(name: str, value: str) -> None:
    try:
        with open(f"/proc/sys/net/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError:
        pass  # no IPv6 in this kernel, for one
