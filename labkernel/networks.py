"""Networks: create, list, connect, disconnect, remove. Who may talk to whom, with which address, under which name.

This service decides and records (SQLite: `networks`, `endpoints`); what is needed at a container's start lies in its
directory as `network.json`, which the supervisor reads: bridges, interfaces, rules and names come and go there, with
the containers that run. An address is given once, with the container, and stays its own until it is removed.
Names and arguments are the Docker SDK's. Source: Docker SDK for Python, `NetworkCollection`; Docker Engine API.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import (
    ConflictError,
    InvalidFilter,
    LabkernelError,
    NoSuchContainer,
    NoSuchNetwork,
    NoSuchVM,
    StartError,
    UsageError,
)
from .events import insert_event
from .net import addresses
from .net.addresses import Subnet
from .net.naming import bridge_name, store_key
from .networking.network import Network, NetworkList
from .networking.wiring import published_ports, wiring
from .running.filters import filter_words, has_label
from .runtime.spec import network_mode

if TYPE_CHECKING:
    from .containers import Containers
    from .running.container import Container
    from .runtime.client import Runtime
    from .runtime.driver import Driver
    from .store.database import Database
    from .store.layout import Layout
    from .vms import VMs

Words = list[str]  # `list` is a method of Networks
Rows = list[Any]

PREDEFINED = ("bridge", "host", "none")
BRIDGE_NAME = "com.docker.network.bridge.name"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type")
_OWN_NETWORK = "`labkernel network create NAME`, then --network NAME: names are resolved there"
_ENDPOINTS = (
    "SELECT e.*, n.name, n.bridge, n.subnet, n.gateway, n.internal, n.options FROM endpoints e "
    "LEFT JOIN networks n ON n.id = e.network_id WHERE e.container_id = ? ORDER BY e.position"
)


class Networks:
    """The networks of one store. Safe to use from several threads and processes at once."""

    def __init__(
        self,
        layout: Layout,
        db: Database,
        runtime: Runtime,
        driver: Driver,
        containers: Containers | Callable[[], Containers],
        machines: Callable[[], VMs],
    ) -> None:
        self.layout = layout
        self.db = db
        self.runtime = runtime
        self.driver = driver
        self._containers = containers
        self._machines = machines

    @property
    def containers(self) -> Containers:
        if callable(self._containers):
            self._containers = self._containers()
        return self._containers

    # -- what the Docker SDK has ------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        driver: str | None = None,
        options: Mapping[str, Any] | None = None,
        ipam: Mapping[str, Any] | None = None,
        check_duplicate: bool | None = None,  # noqa: FBT001 -- the SDK's own signature
        internal: bool = False,  # noqa: FBT001, FBT002
        labels: Mapping[str, str] | Sequence[str] | None = None,
        enable_ipv6: bool = False,  # noqa: FBT001, FBT002
        attachable: bool | None = None,  # noqa: FBT001
        scope: str | None = None,
        ingress: bool | None = None,  # noqa: FBT001
    ) -> Network:
        """A new bridge network. `ipam` is the API's {"Config": [{"Subnet", "IPRange", "Gateway"}]}; without a subnet a
        free one is chosen. Raises ConflictError when the name is taken, UsageError for what does not fit."""
        if not _NAME.fullmatch(name or ""):
            raise UsageError(f"invalid network name: {name!r}: only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
        self._check_kind(driver, scope, enable_ipv6=enable_ipv6, ingress=bool(ingress))
        given = {str(key): str(value) for key, value in (options or {}).items()}
        pairs = labels.items() if isinstance(labels, Mapping) else (word.partition("=")[::2] for word in labels or ())
        id = secrets.token_hex(32)
        bridge = given.get(BRIDGE_NAME) or bridge_name(store_key(self.layout.root), id)
        if not 0 < len(bridge) < 16 or "/" in bridge:
            raise UsageError(f"invalid name of a bridge: {bridge}", resolution="at most 15 characters")
        asked = _ipam(ipam)
        try:
            with self.db.transaction() as tx:
                row = tx.execute("SELECT id FROM networks WHERE name = ?", (name,)).fetchone()
                if row is not None:
                    raise ConflictError(f"network with name {name} already exists")
                subnet = self._choose(tx, id, asked)
                gateway = asked.get("gateway") or addresses.words(subnet.first + 1)
                tx.execute(
                    "INSERT INTO networks (id, name, created_at, driver, bridge, subnet, gateway, ip_range, asked, "
                    "internal, options, labels) VALUES (?, ?, ?, 'bridge', ?, ?, ?, ?, ?, ?, ?, ?)",
                    (id, name, time.time(), bridge, str(subnet), gateway, asked.get("range"), int("subnet" in asked),
                     int(internal), json.dumps(given), json.dumps({str(k): str(v) for k, v in pairs})),
                )  # fmt: skip
                insert_event(tx, "network", "create", id, {"name": name, "type": "bridge"})
        except sqlite3.IntegrityError as err:
            raise ConflictError(f"bridge {bridge} is in use by another network: {err}") from err
        return self.get(id)

    def get(self, network_id: str, *, verbose: bool | None = None, scope: str | None = None) -> Network:
        """The network of that id, name or unique beginning of an id. Raises NoSuchNetwork."""
        wanted = str(network_id)
        rows = self.db.query("SELECT * FROM networks WHERE id = ? OR name = ?", (wanted, wanted))
        rows.sort(key=lambda row: row["name"] != wanted)
        if not rows and wanted and set(wanted) <= set("0123456789abcdef"):
            rows = self.db.query("SELECT * FROM networks WHERE id >= ? AND id < ?", (wanted, wanted + "g"))
            if len(rows) > 1:
                raise UsageError(f"network {wanted} is ambiguous ({len(rows)} matches found based on ID prefix)")
        if not rows:
            raise NoSuchNetwork(wanted)
        return Network(self, rows[0])

    def list(
        self,
        names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        filters: Mapping[str, Any] | None = None,
        greedy: bool = False,  # noqa: FBT001, FBT002 -- the SDK's own signature
    ) -> NetworkList:
        """All networks by name. Filters as docker's: dangling driver id label name scope type."""
        conditions = {key: filter_words(value) for key, value in (filters or {}).items()}
        conditions.setdefault("name", []).extend(names or ())
        conditions.setdefault("id", []).extend(ids or ())
        for key in conditions:
            if key not in _FILTERS:
                raise InvalidFilter(f"invalid filter '{key}'", resolution=f"the filters are {', '.join(_FILTERS)}")
        used = self._used() if conditions.get("dangling") else set()
        rows = self.db.query("SELECT * FROM networks ORDER BY name")
        return NetworkList(each for each in (Network(self, row) for row in rows) if _fits(each, conditions, used))

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Remove the networks no container is connected to; filters: until, label.

        Returns {"NetworksDeleted": names}."""
        from .runtime.logreader import parse_moment

        conditions = dict(filters or {})
        until = filter_words(conditions.pop("until", None))
        labels = filter_words(conditions.pop("label", None))
        unwanted = filter_words(conditions.pop("label!", None))
        if conditions:
            raise InvalidFilter(f"invalid filter '{next(iter(conditions))}'")
        latest = parse_moment(until[0]) if until else None
        used, deleted = self._used(), []
        for network in self.list():
            fits = all(has_label(network.labels, word) for word in labels)
            fits = fits and not any(has_label(network.labels, word) for word in unwanted)
            if network.name in PREDEFINED or network.id in used or not fits:
                continue
            if latest is None or network.created_at < latest:
                with contextlib.suppress(NoSuchNetwork, ConflictError):
                    self.remove(network)
                    deleted.append(network.name)
        self.db.add_event("network", "prune", "", {"reclaimed": "0"})
        return {"NetworksDeleted": deleted}

    # -- what Network calls -----------------------------------------------------------------------------------------

    def remove(self, network: Network) -> None:
        """See `Network.remove`."""
        if network.name in PREDEFINED:
            raise ConflictError(f"{network.name} is a pre-defined network and cannot be removed")
        users = self._running(network)
        if users:
            words = ", ".join(f'name:"{container.name}" id:"{container.short_id}"' for container in users)
            raise ConflictError(
                f"error while removing network: network {network.name} has active endpoints ({words})",
                resolution=f"`network disconnect -f {network.name} {users[0].name}`, or stop the containers first",
            )
        with self.db.transaction() as tx:
            if tx.execute("DELETE FROM networks WHERE id = ?", (network.id,)).rowcount == 0:
                raise NoSuchNetwork(network.name)
            insert_event(tx, "network", "destroy", network.id, {"name": network.name, "type": network.driver})
        for row in self.members(network):
            with contextlib.suppress(LabkernelError):
                self.write(self._member(row["container_id"]))
        if self.layout.socket.exists():
            with contextlib.suppress(LabkernelError):
                self.runtime.network(remove=network.bridge)

    def connect(
        self,
        network: Network,
        container: str | Container,
        *,
        aliases: Sequence[str] | None = None,
        ipv4_address: str | None = None,
        mac_address: str | None = None,
        links: Any = None,
        **more: Any,
    ) -> None:
        """See `Network.connect`."""
        from .runtime.netsettings import networking_config

        if any(more.values()):
            raise UsageError("IPv6 and driver options of an endpoint are not available in this release")
        if links and network.name == "bridge":
            raise UsageError("links are available in user defined networks only", resolution=_OWN_NETWORK)
        found = self._member(container) if isinstance(container, str) else container
        mode = network_mode(found.settings)
        if mode in ("host", "none") or mode.startswith("container:"):
            sharing = "container sharing network namespace with another container or host" + " cannot be connected to"
            raise ConflictError(
                f"{sharing} any other network" if mode != "none" else
                "container cannot be connected to multiple networks with one of the networks in private (none) mode"
            )  # fmt: skip
        if network.name in ("host", "none"):
            raise ConflictError(f"container cannot be disconnected from or connected to {network.name} network")
        self.check_driver()
        found.check_networks(1)
        asked = networking_config(
            {network.name: {
                "aliases": aliases or (), "ip": ipv4_address, "mac": mac_address,
                "links": list(links.items() if isinstance(links, Mapping) else links or ()),
            }}
        )  # fmt: skip
        with self.db.transaction() as tx:
            row = (found.id, network.id)
            if tx.execute("SELECT 1 FROM endpoints WHERE container_id = ? AND network_id = ?", row).fetchone():
                raise ConflictError(f"endpoint with name {found.name} already exists in network {network.name}")
            self._allocate(tx, found.id, network.name, asked[network.name])
            found.connected(tx, network.name)
            about = {"container": found.id, "name": network.name, "type": network.driver}
            insert_event(tx, "network", "connect", network.id, about)
        self.refresh(found)

    def disconnect(self, network: Network, container: str | Container, *, force: bool = False) -> None:
        """See `Network.disconnect`."""
        found = self._member(container) if isinstance(container, str) else container
        if network.name == "host":
            raise ConflictError("container cannot be disconnected from host network or connected to host network")
        with self.db.transaction() as tx:
            done = tx.execute(
                "DELETE FROM endpoints WHERE container_id = ? AND network_id = ?", (found.id, network.id)
            ).rowcount
            if not done and not force:
                raise ConflictError(f"container {found.id} is not connected to network {network.name}")
            about = {"container": found.id, "name": network.name, "type": network.driver}
            insert_event(tx, "network", "disconnect", network.id, about)
        self.refresh(found)

    def members(self, network: Network) -> Rows:
        """The endpoints of a network, with the names of their containers."""
        return self.db.query(
            "SELECT e.*, c.name AS container FROM endpoints e JOIN (SELECT id, name, created_at FROM containers "
            "UNION ALL SELECT id, name, created_at FROM vms) c ON c.id = e.container_id "
            "WHERE e.network_id = ? ORDER BY c.created_at",
            (network.id,),
        )

    # -- what Containers calls --------------------------------------------------------------------------------------

    def check(self, settings: Mapping[str, Any]) -> None:
        """That the networks which a container's settings name are there. Raises NoSuchNetwork, UsageError."""
        mode = network_mode(settings)
        config = settings.get("networking_config") or {}
        if mode in ("none", "host") or mode.startswith("container:"):
            self._check_alone(mode, settings)
            return
        wanted = [mode, *config] if mode not in ("default", "bridge") else list(config)
        for name in wanted:
            if name not in ("default", "bridge"):
                try:
                    self.get(name)
                except NoSuchNetwork as err:
                    err.exit_code = 125  # as `docker run`
                    raise
        for name in ("default", "bridge"):
            if config.get(name, {}).get("aliases"):
                raise UsageError("network-scoped alias is supported only for containers in user defined networks")
            if config.get(name, {}).get("links"):
                raise UsageError("links are available in user defined networks only", resolution=_OWN_NETWORK)

    def _check_alone(self, mode: str, settings: Mapping[str, Any]) -> None:
        if mode.startswith("container:"):
            for key, what in (("ports", "port publishing"), ("mac_address", "mac-address"), ("dns", "dns")):
                if settings.get(key):
                    raise UsageError(f"conflicting options: {what} and the container type network mode")
        asked = (settings.get("networking_config") or {}).get(mode, {})
        if any(asked.get(key) for key in ("ip", "aliases", "links")):
            raise UsageError("invalid network configuration: addresses, aliases and links need a user defined network")

    def join(self, tx: sqlite3.Connection, container_id: str, settings: Mapping[str, Any]) -> None:
        """In the transaction that makes a container: its addresses in the networks it is to be in."""
        mode = network_mode(settings)
        if self.driver.name == "proot" or mode in ("none", "host") or mode.startswith("container:"):
            return
        config = {("bridge" if name == "default" else name): each
                  for name, each in (settings.get("networking_config") or {}).items()}  # fmt: skip
        first = "bridge" if mode == "default" else mode
        known = {name for name in config if self._same(tx, name, first)}
        asked = dict(config.get(next(iter(known), first), {}))
        if settings.get("mac_address"):
            asked["mac"] = settings["mac_address"]
        self._allocate(tx, container_id, first, asked)
        for name in config:
            if name not in known:
                self._allocate(tx, container_id, name, config[name])

    def refresh(self, container: Container) -> None:
        """Write what the supervisor reads at the container's start, and tell it now when the container runs."""
        self.write(container)
        if self.layout.socket.exists() and container.status in ("running", "paused"):
            answer = self.runtime.network(id=container.id)
            warnings = list(answer.get("warnings") or ())
            if answer.get("wires"):
                warnings += container.rewire(answer["wires"])
            for warning in warnings:
                container.record.setdefault("warnings", []).append(warning)

    def write(self, container: Container) -> None:
        """Write `network.json`: endpoints, names and published ports. Nothing for a container without a network."""
        endpoints = [self._endpoint(row, container) for row in self.db.query(_ENDPOINTS, (container.id,))]
        path = f"{container.directory}/network.json"
        if not endpoints and not os.path.exists(path):
            return
        image_ports = container.record.get("exposed") or []
        found = {
            "name": container.name,
            "endpoints": [each for each in endpoints if each is not None],
            "ports": published_ports(container.settings, image_ports),
        }
        temporary = f"{path}.{secrets.token_hex(4)}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(found, file, separators=(",", ":"))
        os.rename(temporary, path)

    def lend(self, directory: str) -> None:
        """Let a container that has no row, a step of a build, be in the default network: `network.json` in its
        directory. The supervisor gives it an address at its start and takes it back at its end."""
        if self.driver.name == "proot":
            return
        with self.db.transaction() as tx:
            row = self._settle(tx, tx.execute("SELECT * FROM networks WHERE name = 'bridge'").fetchone())
        endpoint = {**wiring(row), "network": row["id"], "network_name": row["name"], "ip": "", "mac": ""}
        found = {"name": "", "endpoints": [{**endpoint, "names": [], "named": False}], "ports": []}
        with open(f"{directory}/network.json", "w", encoding="utf-8") as file:
            json.dump(found, file, separators=(",", ":"))

    def before_start(self, container: Container) -> None:
        """Before a start: that its networks are still there. Raises StartError."""
        for row in self.db.query(_ENDPOINTS, (container.id,)):
            if row["name"] is None:
                raise StartError(f"network {row['network_id']} not found", exit_code=125)
        if not os.path.exists(f"{container.directory}/network.json"):
            self.write(container)

    def sweep(self) -> Words:
        """Remove interfaces and rules that a crash has left; returns their names."""
        from .networking.check import remove_leaks

        return remove_leaks(self)

    def endpoints(self, container_id: str) -> Rows:
        """The rows of a container's endpoints, in the order of its interfaces; without a `name` the network is gone."""
        return self.db.query(_ENDPOINTS, (container_id,))

    # -- parts ------------------------------------------------------------------------------------------------------

    def _endpoint(self, row: Any, container: Container) -> dict[str, Any] | None:
        if row["name"] is None:
            return None
        user_defined = row["name"] != "bridge"
        aliases = json.loads(row["aliases"])
        hostname = container.settings.get("hostname")
        names = [container.name, *aliases, container.short_id, *([hostname] if hostname else [])]
        return {
            "network": row["network_id"],
            "network_name": row["name"],
            "ip": row["address"],
            "mac": row["mac"],
            **wiring(row),
            "names": list(dict.fromkeys(names)) if user_defined else [],
            "named": user_defined,
            "links": json.loads(row["links"]),
        }

    def _allocate(self, tx: sqlite3.Connection, container_id: str, name: str, asked: Mapping[str, Any]) -> None:
        row = tx.execute("SELECT * FROM networks WHERE name = ? OR id = ?", (name, name)).fetchone()
        if row is None:
            row = tx.execute("SELECT * FROM networks WHERE id >= ? AND id < ?", (name, name + "g")).fetchone()
        if row is None:
            raise NoSuchNetwork(name)
        row = self._settle(tx, row)
        subnet = addresses.parse(row["subnet"])
        taken = tx.execute("SELECT address, container_id FROM endpoints WHERE network_id = ?", (row["id"],)).fetchall()
        used = {addresses.number(each["address"]) for each in taken} | {addresses.number(row["gateway"])}
        if asked.get("ip"):
            address = self._asked_address(row, subnet, str(asked["ip"]), used)
        else:
            within = addresses.parse(row["ip_range"]) if row["ip_range"] else None
            free = addresses.free_address(subnet, used, within)
            if free is None:
                gone = [each for each in taken if not self._is_there(each["container_id"])]
                used -= {addresses.number(each["address"]) for each in gone}
                for each in gone:
                    tx.execute("DELETE FROM endpoints WHERE container_id = ?", (each["container_id"],))
                free = addresses.free_address(subnet, used, within)
            if free is None:
                raise ConflictError(f"no available IPv4 addresses on network {row['name']}: {row['subnet']}")
            address = free
        position = tx.execute(
            "SELECT COALESCE(MAX(position) + 1, 0) FROM endpoints WHERE container_id = ?", (container_id,)
        ).fetchone()[0]
        tx.execute(
            "INSERT INTO endpoints (network_id, container_id, endpoint_id, address, mac, aliases, position, links) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (row["id"], container_id, secrets.token_hex(32), addresses.words(address),
             asked.get("mac") or addresses.mac_of(address), json.dumps(asked.get("aliases") or []), position,
             json.dumps(asked.get("links") or [])),
        )  # fmt: skip

    def _asked_address(self, row: Any, subnet: Subnet, text: str, used: set[int]) -> int:
        if row["name"] == "bridge":
            raise UsageError("user specified IP address is supported on user defined networks only")
        if not row["asked"]:
            raise UsageError(
                "user specified IP address is supported only when connecting to networks with user configured subnets",
                resolution="`network create --subnet 10.5.0.0/24 NAME`",
            )
        try:
            address = addresses.number(text)
        except ValueError as err:
            raise UsageError(str(err)) from None
        if address not in subnet:
            raise UsageError(
                f"invalid config for network {row['name']}: invalid endpoint settings: "
                f"no configured subnet or ip-range contain the IP address {text}"
            )
        if address in used or address in (subnet.first, subnet.last):
            raise ConflictError("Address already in use", resolution=f"another address of {row['subnet']}")
        return address

    def _settle(self, tx: sqlite3.Connection, row: Any) -> Any:
        """Give a network its subnet when its first container comes, and another one when somebody has taken it since
        it was chosen for us and nobody of ours uses it."""
        if row["driver"] != "bridge":
            raise ConflictError(f"container cannot be connected to the {row['name']} network")
        if row["asked"] or tx.execute("SELECT 1 FROM endpoints WHERE network_id = ?", (row["id"],)).fetchone():
            return row
        if row["subnet"] is not None:
            mine = addresses.parse(row["subnet"])
            if not any(mine.overlaps(other) for _, other in addresses.machine_subnets((row["bridge"],))):
                return row
        subnet = self._choose(tx, row["id"], {})
        bridge = row["bridge"] or bridge_name(store_key(self.layout.root), row["id"])
        tx.execute(
            "UPDATE networks SET subnet = ?, gateway = ?, bridge = ? WHERE id = ?",
            (str(subnet), addresses.words(subnet.first + 1), bridge, row["id"]),
        )
        return tx.execute("SELECT * FROM networks WHERE id = ?", (row["id"],)).fetchone()

    def _choose(self, tx: sqlite3.Connection, id: str, asked: Mapping[str, Any]) -> Subnet:
        rows = tx.execute("SELECT subnet FROM networks WHERE subnet IS NOT NULL AND id != ?", (id,)).fetchall()
        ours = [addresses.parse(row["subnet"]) for row in rows]
        if "subnet" in asked:
            subnet: Subnet = asked["subnet"]
            if any(subnet.overlaps(other) for other in ours):
                raise ConflictError("Pool overlaps with other one on this address space")
            return subnet
        machine = [subnet for _, subnet in addresses.machine_subnets()]
        # slirp4netns's own network, which rootless containers go out through
        found = addresses.free_subnet(str(self.layout.root), [*ours, *machine, addresses.parse("10.0.2.0/24")])
        if found is None:
            raise ConflictError(
                "could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the "
                "network",
                resolution="name one: --subnet 10.5.0.0/24; `network prune` removes unused networks",
            )
        return found

    def _same(self, tx: sqlite3.Connection, name: str, other: str) -> bool:
        if name == other:
            return True
        row = tx.execute("SELECT id, name FROM networks WHERE name = ? OR id = ?", (other, other)).fetchone()
        return row is not None and (name == row["name"] or (len(name) >= 12 and str(row["id"]).startswith(name)))

    def _running(self, network: Network) -> Sequence[Container]:
        found = []
        for row in self.members(network):
            with contextlib.suppress(LabkernelError):
                container = self._member(row["container_id"])
                if container.status in ("running", "paused", "restarting"):
                    found.append(container)
        return found

    def _used(self) -> set[str]:
        rows = self.db.query("SELECT DISTINCT network_id, container_id FROM endpoints")
        return {row["network_id"] for row in rows if self._is_there(row["container_id"])}

    def _is_there(self, id: str) -> bool:
        return self.layout.container_dir(id).is_dir() or self.layout.vm_dir(id).is_dir()

    def _member(self, wanted: str) -> Container:
        """A container, or a virtual machine. Raises NoSuchContainer."""
        try:
            return self.containers.get(wanted)
        except NoSuchContainer:
            with contextlib.suppress(NoSuchVM):
                return self._machines().get(wanted)
            raise

    def check_driver(self) -> None:
        """That there are networks under this driver. Raises ConflictError."""
        if self.driver.name == "proot":
            raise ConflictError(
                "the driver proot has no networks: its containers share this machine's",
                resolution="`labkernel doctor` says what the drivers root and rootless need",
            )

    @staticmethod
    def _check_kind(driver: str | None, scope: str | None, *, enable_ipv6: bool, ingress: bool) -> None:
        if driver in ("host", "null", "none"):
            kind = "host" if driver == "host" else "null"
            raise ConflictError(f'only one instance of "{kind}" network is allowed')
        if driver not in (None, "", "default", "bridge"):
            raise UsageError(
                f'could not find plugin {driver} in v1 plugin registry: plugin "{driver}" not found',
                resolution="networks of this engine are bridges: leave --driver out",
            )
        if enable_ipv6:
            raise UsageError("IPv6 networks are not available in this release", resolution="leave --ipv6 out")
        if scope not in (None, "", "local") or ingress:
            raise UsageError("networks of a swarm need a swarm: the scope here is local")


def _ipam(ipam: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"subnet": Subnet, "range": text, "gateway": text}, only what was given. Raises UsageError."""
    if not ipam:
        return {}
    if ipam.get("Driver") not in (None, "", "default"):
        raise UsageError(f"could not find IPAM driver {ipam['Driver']}")
    pools = [pool for pool in ipam.get("Config") or () if ":" not in str(pool.get("Subnet") or "")]
    if len(pools) != len(ipam.get("Config") or ()) or len(pools) > 1:
        raise UsageError("a network has one IPv4 subnet in this release")
    if not pools or not pools[0].get("Subnet"):
        if pools and (pools[0].get("IPRange") or pools[0].get("Gateway")):
            raise UsageError("invalid subnet : invalid CIDR block notation", resolution="give --subnet, too")
        return {}
    pool = pools[0]
    try:
        subnet = addresses.parse(str(pool["Subnet"]))
        found: dict[str, Any] = {"subnet": subnet}
        if pool.get("IPRange"):
            within = addresses.parse(str(pool["IPRange"]))
            if within.first not in subnet or within.last not in subnet:
                raise UsageError(f"no matching subnet for range {pool['IPRange']}")
            found["range"] = str(within)
        if pool.get("Gateway"):
            if addresses.number(str(pool["Gateway"])) not in subnet:
                raise UsageError(f"no matching subnet for gateway {pool['Gateway']}")
            found["gateway"] = str(pool["Gateway"])
    except ValueError as err:
        raise UsageError(f"invalid subnet {pool['Subnet']}: {err}", resolution="for example 10.5.0.0/24") from None
    if subnet.prefix > 29:
        raise UsageError(f"the subnet {subnet} is too small", resolution="/29 has room for five containers")
    return found


def _fits(network: Network, conditions: Mapping[str, Sequence[str]], used: set[str]) -> bool:
    kind = "builtin" if network.name in PREDEFINED else "custom"
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda word: word in network.name,
        "id": network.id.startswith,
        "driver": lambda word: word == network.driver,
        "scope": lambda word: word == "local",
        "type": lambda word: word == kind,
        "dangling": lambda word: (word.lower() in ("1", "true")) == (kind == "custom" and network.id not in used),
    }
    for key, words in conditions.items():
        if key == "label":
            if not all(has_label(network.labels, word) for word in words):
                return False
        elif words and not any(tests[key](word) for word in words):
            return False
    return True
