"""One network, as services, magics and the command line hand it around. Source: Docker SDK for Python, `Network`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..display import human_age, table_html, table_text, without_formulas
from ..net import addresses
from ..runtime.logs import timestamp

if TYPE_CHECKING:
    from ..networks import Networks
    from ..running.container import Container


class Network:
    """A network of this store; names and arguments are the Docker SDK's."""

    def __init__(self, networks: Networks, row: Any) -> None:
        self._networks = networks
        self._take(row)

    def _take(self, row: Any) -> None:
        self.id: str = row["id"]
        self.name: str = row["name"]
        self.driver: str = row["driver"]
        self.created_at: float = row["created_at"]
        self.bridge: str = row["bridge"] or ""
        self.subnet: str | None = row["subnet"]
        self.gateway: str | None = row["gateway"]
        self.ip_range: str | None = row["ip_range"]
        self.internal = bool(row["internal"])
        self.options: dict[str, str] = json.loads(row["options"])
        self.labels: dict[str, str] = json.loads(row["labels"])

    @property
    def short_id(self) -> str:
        return self.id[:12]

    @property
    def containers(self) -> list[Container]:
        """The containers connected to it that run."""
        return list(self._networks._running(self))

    @property
    def attrs(self) -> dict[str, Any]:
        """As `docker network inspect` shows it."""
        config: dict[str, str] = {}
        if self.subnet:
            config["Subnet"] = self.subnet
            if self.ip_range:
                config["IPRange"] = self.ip_range
            config["Gateway"] = self.gateway or ""
        running = {container.id for container in self.containers}
        prefix = addresses.parse(self.subnet).prefix if self.subnet else 0
        members = {
            row["container_id"]: {
                "Name": row["container"],
                "EndpointID": row["endpoint_id"],
                "MacAddress": row["mac"],
                "IPv4Address": f"{row['address']}/{prefix}",
                "IPv6Address": "",
            }
            for row in self._networks.members(self)
            if row["container_id"] in running
        }
        return {
            "Name": self.name,
            "Id": self.id,
            "Created": timestamp(int(self.created_at * 1e9)),
            "Scope": "local",
            "Driver": self.driver,
            "EnableIPv4": True,
            "EnableIPv6": False,
            "IPAM": {"Driver": "default", "Options": None, "Config": [config] if config else []},
            "Internal": self.internal,
            "Attachable": False,
            "Ingress": False,
            "ConfigFrom": {"Network": ""},
            "ConfigOnly": False,
            "Containers": members,
            "Options": self.options,
            "Labels": self.labels,
        }

    def connect(
        self,
        container: str | Container,
        *,
        aliases: Sequence[str] | None = None,
        ipv4_address: str | None = None,
        mac_address: str | None = None,
        **more: Any,
    ) -> None:
        """Give a container (object, name or id) an interface here, at once when it runs. `aliases` are further names.

        Raises ConflictError when it is connected already or the address is taken, NoSuchContainer, UsageError."""
        self._networks.connect(
            self, container, aliases=aliases, ipv4_address=ipv4_address, mac_address=mac_address, **more
        )

    def disconnect(self, container: str | Container, *, force: bool = False) -> None:
        """Take a container's interface here away, at once when it runs. Raises ConflictError when it has none."""
        self._networks.disconnect(self, container, force=force)

    def remove(self) -> None:
        """Remove it. Raises ConflictError for a pre-defined network and while running containers are connected."""
        self._networks.remove(self)

    def reload(self) -> None:
        """Read it anew. Raises NoSuchNetwork."""
        fresh = self._networks.get(self.id)
        self.__dict__.update(fresh.__dict__)

    def row(self) -> tuple[str, str, str, str, str, str]:
        return (self.short_id, self.name, self.driver, "local", self.subnet or "", human_age(self.created_at))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Network {self.name} ({self.short_id}) {self.subnet or self.driver}>"

    @without_formulas
    def _repr_html_(self) -> str:
        return NetworkList([self])._repr_html_()


class NetworkList(list[Network]):
    """Networks that display themselves as `docker network ls` does, with subnet and age."""

    header = ("NETWORK ID", "NAME", "DRIVER", "SCOPE", "SUBNET", "CREATED")

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        return [network.row() for network in self]

    def __repr__(self) -> str:
        return table_text(self.header, self.rows())

    @without_formulas
    def _repr_html_(self) -> str:
        return table_html(self.header, self.rows())
