"""The supervisor's side of networks: bridges, containers' interfaces, published ports and names of what runs.

Two modes. `host`: the bridges lie in the machine's own network namespace, ports are sent to containers by nftables.
`user` (rootless, or no CAP_NET_ADMIN here): they lie in a namespace of our own, which slirp4netns or pasta connects
with the world, and a forwarding process carries published ports. What a container asks for stands in its `network.json`
(written by the networks service); what it got, in `state["network"]`, from which a new supervisor goes on. Nothing here
opens the database. Standard library only.

What is where: a veth pair goes with its container's namespace; bridges and the nftables table go when the supervisor
leaves; helper processes end with their socket. After a kill of everything the next supervisor removes what is left.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

from ..errors import StartError
from ..linux import capabilities, netlink, nftables
from ..linux.files import read_file
from . import addresses, dns, firewall, forward, helpers, naming, usermode
from .helpers import Helper
from .member import Member, configure, is_machine, send, way_out, whole_frames, write_sysctl

_HELD = "net:"
_BASE_MTU = 1500


class Switch:
    """All networks of one supervisor. Made with the first container that has one."""

    def __init__(self, sup: Any) -> None:
        self.sup = sup
        self.key = naming.store_key(sup.root)
        self.mode = ""
        self.problem = ""  # why there are no networks here
        self.warning = ""  # what does not work, though there are
        self.route: netlink.Socket | None = None
        self.table: nftables.Table | None = None
        self.netns = -1
        self.stay = -1
        self.bridges: dict[str, dict[str, Any]] = {}
        self.members: dict[str, Member] = {}
        self.dns: Helper | None = None
        self.forward: Helper | None = None
        self.serial = 0

    # -- opening ----------------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Be ready for the first bridge. False, with `problem`, where this machine allows no network at all."""
        if self.mode or self.problem:
            return not self.problem
        try:
            if self._may_change_machine():
                self.mode = "host"
                self.route = netlink.Socket()
            else:
                self._open_namespace()
        except OSError as err:
            self.problem = f"no bridge networks here: {err.strerror}"
            return False
        self._write_rules()
        if self.mode == "host":
            self._allow_forwarding()
            self._bury_dead_stores()
        return True

    def _may_change_machine(self) -> bool:
        if self.sup.settings["driver"] != "root" or "CAP_NET_ADMIN" not in capabilities.effective():
            return False
        # The capability may be one over another user namespace than the network's: the kernel is asked, without effect.
        with netlink.Socket() as sock:
            try:
                sock.send(netlink.delete_link("lk-no-such-one"))
            except OSError as err:
                return err.errno == errno.ENODEV
        return False

    def _open_namespace(self) -> None:
        held = self.sup.context.held.get(_HELD)
        if held:
            fds = held["fds"]
            self.netns, self.stay = fds["netns"], fds.get("stay", -1)
            self.route = netlink.Socket(fd=os.dup(fds["route"]))
            self.netfilter = fds["netfilter"]
        else:
            space = usermode.make_namespace()
            self.netns, self.netfilter = space.netns, space.netfilter
            self.route = netlink.Socket(fd=space.route)
            found = usermode.connect(self.netns)
            if isinstance(found, str):
                self.warning = f"containers reach each other, but nothing outside: {found}"
            else:
                self.stay = found[1]
            fds = {"netns": self.netns, "route": self.route.fileno(), "netfilter": self.netfilter}
            if self.stay >= 0:
                fds["stay"] = self.stay
            self.sup.context.held[_HELD] = {"state": {}, "fds": fds}
            self.sup.tell_keeper({"hold": _HELD, "state": {}, "names": list(fds)}, list(fds.values()))
        self.mode = "user"

    def _write_rules(self) -> None:
        """The table with all that runs now; without nftables ports go through the forwarding process."""
        name = naming.table_name(self.key)
        ports = [port for member in self.members.values() for port in self._published(member)]
        bridges = list(self.bridges.values())
        words = usermode.inside(self.netns, lambda: nftables.run(firewall.script(name, bridges, ports)))
        if words:
            self.table = None
            self.warning = self.warning or (
                f"no rules can be made, so containers reach each other but nothing outside: {words.splitlines()[0]}"
            )
            return
        fd = os.dup(self.netfilter) if self.mode == "user" else None
        self.table = nftables.Table(name, fd)

    def _allow_forwarding(self) -> None:
        try:
            with open("/proc/sys/net/ipv4/ip_forward", "r+", encoding="ascii") as file:
                if file.read().strip() != "1":
                    file.seek(0)
                    file.write("1")
        except OSError as err:
            self.warning = self.warning or f"containers reach nothing outside: net.ipv4.ip_forward: {err.strerror}"
        if self.table is not None and not self.warning:
            found = firewall.foreign_drop()
            if found:
                self.warning = f"another program's firewall may keep containers from the outside: {found}"

    def _bury_dead_stores(self) -> None:
        """Remove the bridges and rules of stores that were deleted while their containers ran: nobody else will."""
        for name in os.listdir("/sys/class/net"):
            if not name.startswith("lk") or name.startswith(naming.prefixes(self.key)):
                continue
            try:
                with open(f"/sys/class/net/{name}/ifalias", encoding="utf-8", errors="replace") as file:
                    word, _, root = file.read().strip().partition(" ")
                busy = os.listdir(f"/sys/class/net/{name}/brif")
            except OSError:
                continue  # no bridge, or its engine has just removed it
            if word == "labkernel" and root.startswith("/") and not busy and not os.path.exists(root):
                usermode.inside(-1, lambda name=name: self._delete_links([name]))
                try:
                    nftables.Table(naming.table_name(naming.store_key(root))).delete()
                except OSError:
                    pass

    # -- a container's life -----------------------------------------------------------------------------------------

    def attach(self, inst: Any, pid: int) -> dict[str, Any] | None:
        """Before the start: interfaces into the namespaces of `pid`, ports bound and published.

        Returns what the first process has to do inside: `interfaces` (linux.netlink.configure), `resolver` (whether it
        makes the resolver's sockets), `hosts`, `resolv`, `host_gateway`; None for a container without a network.
        Raises StartError, and has then taken back everything but the interfaces, which go with the namespace."""
        info = self._read(inst)
        if info is None:
            return None
        if not self.open():
            _warn(inst, f"this container has no network but loopback: {self.problem}")
            return None
        if self.warning:
            _warn(inst, self.warning)
        self.detach(inst)
        member = self.members[inst.id] = Member(inst, info)
        try:
            endpoints = [self._addressed(each) for each in info["endpoints"]]
            interfaces = [self._plug(member, each, pid, number) for number, each in enumerate(endpoints)]
            self._bind_ports(member, info.get("ports") or [])
        except StartError:
            self.detach(inst)
            raise
        except Exception as err:
            self.detach(inst)
            words = err.strerror if isinstance(err, OSError) else f"{type(err).__name__}: {err}"
            raise StartError(f"failed to set up container networking: {words}", exit_code=125) from err
        gateway = way_out(member)
        for interface, each in zip(interfaces, member.endpoints, strict=True):
            interface["gateway"] = each["gateway"] if each is gateway else ""
        member.resolver = self._needs_resolver(inst, member)
        inst.state["network"] = member.record()
        self._tell("connect", member, member.endpoints)
        return self._files(inst, member, interfaces)

    def shared(self, other: Any) -> dict[str, Any] | None:
        """The files of a container that shares the network namespace of `other`."""
        member = self.members.get(other.id)
        return None if member is None else {**self._files(other, member, []), "resolver": False}

    def take_sockets(self, inst: Any, fds: list[int]) -> None:
        """The resolver's sockets, which the first process has made."""
        self._tell_names(inst.id, fds)
        for fd in fds:
            os.close(fd)

    def detach(self, inst: Any) -> None:
        """After the end, or a start that failed. Its interfaces are gone with its namespace."""
        member = self.members.pop(inst.id, None)
        if member is None:
            return
        ports = self._published(member)
        if ports and self.table is not None and self.mode == "host":
            try:
                firewall.withdraw(self.table, ports)
            except OSError:
                self._write_rules()
        elif ports and self.forward is not None:
            self.forward.send(json.dumps({"close": inst.id}).encode())
        for sock in member.sockets:
            helpers.release_port(sock)
        if self.dns is not None:
            self.dns.send(json.dumps({"down": inst.id}).encode())
        self._tell("disconnect", member, member.endpoints)

    def reload(self, inst: Any) -> list[str]:
        """network.json of a running container has changed: connect and disconnect its interfaces, tell its names."""
        info = self._read(inst) or {"endpoints": [], "name": ""}
        if not self.open():
            return [self.problem]
        member = self.members.get(inst.id)
        if member is None:
            member = self.members[inst.id] = Member(inst, info)
        member.name = info.get("name") or member.name
        wanted = {each["network"]: each for each in info["endpoints"]}
        for each in [each for each in member.endpoints if each["network"] not in wanted]:
            self._unplug(member, each)
        for network, endpoint in wanted.items():
            present = next((each for each in member.endpoints if each["network"] == network), None)
            if present is None:
                self._plug_running(member, endpoint)
            else:
                present["names"], present["links"] = endpoint["names"], endpoint.get("links") or []
        if not member.resolver and self._needs_resolver(inst, member):
            member.resolver = True
            self._open_resolver(member)
        else:
            self._tell_names(inst.id, [])
        inst.state["network"] = member.record()
        inst.try_save()
        return []

    def files(self, inst: Any) -> dict[str, Any] | None:
        """What the files of a running container have to say; None while it has no network."""
        member = self.members.get(inst.id)
        return self._files(inst, member, []) if member is not None and member.endpoints else None

    def remove_bridge(self, name: str) -> None:
        """A network is gone."""
        endpoint = self.bridges.pop(name, None)
        if endpoint is None or self.route is None:
            return
        if self.table is not None:
            try:
                firewall.remove_bridge(self.table, endpoint)
            except OSError:
                self._write_rules()
        usermode.inside(-1, lambda: self._delete_links([name]))

    def _tell(self, action: str, member: Member, endpoints: list[dict[str, Any]]) -> None:
        for each in endpoints:
            about = {"container": member.inst.id, "name": each["network_name"], "type": "bridge"}
            self.sup.events.add_other("network", action, each["network"], about)

    # -- a supervisor's life ----------------------------------------------------------------------------------------

    def recover(self, running: list[Any]) -> None:
        """In a new supervisor: go on with what runs, remove what nobody uses."""
        mine = [inst for inst in running if inst.state.get("network")]
        for inst in mine:
            found = inst.state["network"]
            member = self.members[inst.id] = Member(inst, found)
            member.endpoints, member.ports = found["endpoints"], found["ports"]
            member.resolver = bool(found.get("resolver"))
            for each in member.endpoints:
                self.bridges[each["bridge"]] = each
        if mine and self.open():
            assert self.route is not None
            links = self.route.links()
            for name in list(self.bridges):
                if name in links:
                    self.bridges[name] = {**self.bridges[name], "index": links[name]}
                else:
                    del self.bridges[name]  # somebody has deleted it: made anew for the next container
            for member in self.members.values():
                self._bind_again(member)
                if member.resolver:
                    self._open_resolver(member)
        self._sweep()

    def leave(self) -> None:
        """The supervisor goes and nothing runs: remove every trace."""
        for helper in (self.dns, self.forward):
            if helper is not None:
                helper.end()
        if self.mode == "host" and self.route is not None:
            if self.bridges:
                self._delete_links(list(self.bridges))
            if self.table is not None:
                try:
                    self.table.delete()
                except OSError:
                    pass

    def _sweep(self) -> None:
        if self.sup.settings["driver"] != "root":
            return
        left = [name for name in leftovers(self.key) if name not in self.bridges]
        used = {each.get("veth") for member in self.members.values() for each in member.endpoints}
        left = [name for name in left if name not in used]
        if left:
            usermode.inside(-1, lambda: self._delete_links(left))
        if self.mode != "host" and (left or self.members):
            try:
                nftables.Table(naming.table_name(self.key)).delete()
            except OSError:
                pass

    def _delete_links(self, names: list[str]) -> str:
        with netlink.Socket() if self.mode != "user" or self.route is None else self.route as sock:
            sock.send(*map(netlink.delete_link, names), ignore=(errno.ENODEV,))
        return ""

    # -- parts ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _read(inst: Any) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(read_file(f"{inst.directory}/network.json"))
        except FileNotFoundError:
            return None
        return found if found.get("endpoints") else None

    def _ensure_bridge(self, endpoint: dict[str, Any]) -> int:
        """The bridge of an endpoint, made on first use; its index. Raises OSError."""
        assert self.route is not None
        name = endpoint["bridge"]
        if name in self.bridges:
            return int(self.bridges[name]["index"])
        mac = bytes([0x02, 0x42, *socket.inet_aton(endpoint["gateway"])])
        mtu = self._mtu(endpoint)
        words = f"labkernel {self.sup.root}"[:250]
        self.route.send(netlink.add_bridge(name, mtu=mtu, mac=mac, alias=words), ignore=(errno.EEXIST,))
        index = self.route.index(name)
        self.route.send(netlink.add_address(index, endpoint["gateway"], endpoint["prefix"]), ignore=(errno.EEXIST,))
        if self.mode == "host":
            write_sysctl(f"ipv4/conf/{name}/route_localnet", "1")
            write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
        if self.table is not None:
            firewall.add_bridge(self.table, endpoint)
        self.bridges[name] = {**endpoint, "index": index}
        return index

    def _addressed(self, endpoint: dict[str, Any]) -> dict[str, Any]:
        """A container that no database knows (a step of a build) has an address for as long as it runs."""
        if endpoint["ip"]:
            return endpoint
        others = [each for member in self.members.values() for each in member.endpoints]
        used = [addresses.number(each["ip"]) for each in others if each["network"] == endpoint["network"]]
        found = addresses.last_free_address(addresses.parse(endpoint["subnet"]), used)
        if found is None:
            raise StartError(f"no free address in {endpoint['subnet']}", exit_code=125)
        return {**endpoint, "ip": addresses.words(found), "mac": addresses.mac_of(found)}

    def _mtu(self, endpoint: dict[str, Any]) -> int:
        return int(endpoint["mtu"] or (usermode.MTU if self.mode == "user" else _BASE_MTU))

    def _veth(self) -> str:
        self.serial += 1
        return f"{naming.prefixes(self.key)[1]}{os.urandom(4).hex()}"

    def _plug(self, member: Member, endpoint: dict[str, Any], pid: int, number: int) -> dict[str, Any]:
        """A pair of interfaces for one endpoint; returns what `netlink.configure` does with the other end."""
        assert self.route is not None
        mac = bytes.fromhex(endpoint["mac"].replace(":", ""))
        name, peer = self._veth(), f"eth{number}"
        inside = is_machine(member.inst)
        # The address is the guest's own: its monitor's namespace is to take nothing for itself.
        settings: dict[str, Any] = {"mtu": self._mtu(endpoint), "peer_mac": b"" if inside else mac}
        try:
            self.route.send(netlink.add_veth(name, peer, pid, master=self._ensure_bridge(endpoint), **settings))
        except OSError as err:
            # What a bridge gives that is not there any more: somebody has removed it, with `ip link` or a tool's own.
            if err.errno != errno.EINVAL:
                raise
            self.bridges.pop(endpoint["bridge"], None)
            self.route.send(netlink.add_veth(name, peer, pid, master=self._ensure_bridge(endpoint), **settings))
        if not endpoint.get("icc", True):
            self.route.send(netlink.set_isolated(self.route.index(name)))
        if inside:
            usermode.inside(self.netns, lambda: whole_frames(name))
        member.endpoints.append({**endpoint, "veth": name, "interface": peer})
        return {"name": peer, "ip": endpoint["ip"], "prefix": endpoint["prefix"], "gateway": ""}

    def _plug_running(self, member: Member, endpoint: dict[str, Any]) -> None:
        """The same for a container that runs: a child goes into its namespace. Raises StartError."""
        taken = {each["interface"] for each in member.endpoints}
        number = next(number for number in range(len(taken) + 1) if f"eth{number}" not in taken)
        interface = self._plug(member, endpoint, member.inst.pid, number)
        if not endpoint["internal"] and all(each["internal"] for each in member.endpoints[:-1]):
            interface["gateway"] = endpoint["gateway"]
        words = "" if is_machine(member.inst) else usermode.inside(member.inst.door[1], lambda: configure(interface))
        if words:
            raise StartError(f"failed to set up container networking: {words}", exit_code=125)

    def _unplug(self, member: Member, endpoint: dict[str, Any]) -> None:
        member.endpoints.remove(endpoint)
        usermode.inside(-1, lambda: self._delete_links([endpoint["veth"]]))
        other = next((each for each in member.endpoints if not each["internal"]), None)
        if other is not None and not is_machine(member.inst):
            route = netlink.add_default_route(other["gateway"])
            usermode.inside(member.inst.door[1], lambda: send(route))

    def _bind_ports(self, member: Member, wanted: list[dict[str, Any]]) -> None:
        if not wanted or not member.endpoints:
            return
        to = member.endpoints[0]["ip"]
        for each in wanted:
            where = each["ip"] or "0.0.0.0"
            try:
                sock, number = helpers.bind_port(each)
            except OSError as err:
                why = "port is already allocated" if self._is_ours(each) else f"{err.strerror}".lower()
                host = "-".join(map(str, dict.fromkeys(each["host"] or ["?"])))
                raise StartError(
                    f"driver failed programming external connectivity on endpoint {member.name} "
                    f"({member.inst.id[:12]}): Bind for {where}:{host} failed: {why}",
                    exit_code=125,
                    resolution=(
                        "a port from `sysctl net.ipv4.ip_unprivileged_port_start` on, or that setting lower"
                        if err.errno == errno.EACCES
                        else f"another port: -p PORT:{each['port']}; `labkernel ps` shows who has this one"
                    ),
                ) from err
            member.sockets.append(sock)
            bound = {"proto": each["proto"], "ip": each["ip"], "host": number, "to": to, "port": each["port"]}
            member.ports.append(bound)
        self._publish(member)

    def _publish(self, member: Member) -> None:
        if self.mode == "host" and self.table is not None:
            firewall.publish(self.table, member.ports)
            return
        if self.forward is None:
            self._start_forward()
        self._send_ports(member)

    def _send_ports(self, member: Member) -> None:
        assert self.forward is not None
        for port, sock in zip(member.ports, member.sockets, strict=False):
            message = {"open": member.inst.id, "proto": port["proto"], "to": [port["to"], port["port"]]}
            self.forward.send(json.dumps(message).encode(), [sock.fileno()])

    def _start_forward(self) -> None:
        namespace = self.netns if self.netns >= 0 else None
        helper = self.forward = Helper(lambda sock: forward.main(sock, namespace))
        self.sup.loop.watch(helper.sock.fileno(), lambda _events: self._forward_died(helper))

    def _forward_died(self, helper: Helper) -> None:
        self.sup.loop.unwatch(helper.sock.fileno())
        helper.end()
        if self.forward is helper:
            self._start_forward()
            for member in self.members.values():
                self._send_ports(member)

    def _bind_again(self, member: Member, tries: int = 100) -> None:
        """The ports of a container that has run on without a supervisor; its rules have stayed."""
        try:
            for port in member.ports[len(member.sockets) :]:
                member.sockets.append(helpers.bind_port({**port, "host": [port["host"]] * 2})[0])
        except OSError:
            # The process that has forwarded until now is about to end. Or somebody was quicker, and has the port.
            if tries and self.members.get(member.inst.id) is member:
                self.sup.loop.later(0.02, lambda: self._bind_again(member, tries - 1))
            return
        if member.ports and not (self.mode == "host" and self.table is not None):
            self._publish(member)

    def _is_ours(self, wanted: dict[str, Any]) -> bool:
        first, last = wanted["host"] or (0, 0)
        return any(
            first <= port["host"] <= last and port["proto"] == wanted["proto"]
            for member in self.members.values()
            for port in member.ports
        )

    def _published(self, member: Member) -> list[dict[str, Any]]:
        return member.ports

    # Names

    def _needs_resolver(self, inst: Any, member: Member) -> bool:
        """User-defined networks have names. The default one uses the machine's servers where containers reach them."""
        if any(each["named"] for each in member.endpoints):
            return True
        return not inst.own.get("dns") and (self.mode == "user" or not dns.reachable_servers())

    def _open_resolver(self, member: Member, tries: int = 100) -> None:
        try:
            fds = helpers.sockets_inside(member.inst.door[1])
        except OSError as err:
            # The process that has served until now is about to end; or the container uses the address itself.
            if err.errno == errno.EADDRINUSE and tries and self.members.get(member.inst.id) is member:
                self.sup.loop.later(0.02, lambda: self._open_resolver(member, tries - 1))
            return
        self._tell_names(member.inst.id, fds)
        for fd in fds:
            os.close(fd)

    def _tell_names(self, id: str, fds: list[int]) -> None:
        member = self.members.get(id)
        if member is None:
            return
        if self.dns is None:
            if not member.resolver:
                return
            self._start_dns()
            for other in self.members.values():
                if other is not member:
                    self._tell_names(other.inst.id, [])
        assert self.dns is not None
        keys = ("network", "network_name", "ip", "names", "named")
        message = {
            "up": id,
            "endpoints": [
                {**{key: each[key] for key in keys}, "links": each.get("links") or []} for each in member.endpoints
            ],
            "servers": member.inst.own.get("dns") or [],
            "forward": any(not each["internal"] for each in member.endpoints),
        }
        self.dns.send(json.dumps(message).encode(), fds)

    def _start_dns(self) -> None:
        helper = self.dns = Helper(dns.main)
        self.sup.loop.watch(helper.sock.fileno(), lambda _events: self._dns_died(helper))

    def _dns_died(self, helper: Helper) -> None:
        """Somebody killed it: another one takes its place, with new sockets."""
        self.sup.loop.unwatch(helper.sock.fileno())
        helper.end()
        if self.dns is not helper:
            return
        self.dns = None
        for member in self.members.values():
            if member.resolver:
                self._open_resolver(member)

    def _files(self, inst: Any, member: Member, interfaces: list[dict[str, Any]]) -> dict[str, Any]:
        own = inst.own
        servers = [dns.ADDRESS] if member.resolver else own.get("dns") or dns.reachable_servers()
        return {
            "interfaces": interfaces,
            "resolver": member.resolver,
            "addresses": [each["ip"] for each in member.endpoints],
            "servers": servers,
            # "." means none, as docker has it
            "search": [word for word in own.get("dns_search") or dns.host_words("search") if word != "."],
            "options": own.get("dns_opt") or (["ndots:0"] if member.resolver else dns.host_words("options")),
            "host_gateway": member.endpoints[0]["gateway"],
            **({"cards": member.cards(self._mtu)} if is_machine(inst) else {}),
        }


def leftovers(key: str) -> list[str]:
    """The interfaces of this network namespace that are a store's, whoever made them."""
    return [name for name in os.listdir("/sys/class/net") if name.startswith(naming.prefixes(key))]


def _warn(inst: Any, words: str) -> None:
    if words not in inst.warnings:
        inst.warnings.append(words)
