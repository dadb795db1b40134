"""Networks with real bridges, rules and name servers; under the driver root with an outside machine (a namespace)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel import terminal
from labkernel.engine import Engine
from labkernel.errors import ConflictError, NoSuchNetwork, StartError, UsageError
from labkernel.linux import netlink, nftables, syscalls
from labkernel.net import firewall, naming
from labkernel.networking.network import Network
from labkernel.running.container import Container

WAIT_S = 60.0
SLEEP = ["sleep", "1000"]
HTTPD = ["httpd", "-f", "-p", "80", "-h", "/etc"]


@pytest.fixture(autouse=True)
def bridges(request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue("shared_engine")
    if engine.driver.name == "proot":
        pytest.skip("the driver proot has no networks")


@pytest.fixture
def net(engine: Engine) -> Iterator[Callable[..., Network]]:
    """Makes networks that are removed again, with what is connected to them."""
    made: list[Network] = []

    def create(name: str, **settings: Any) -> Network:
        made.append(engine.networks.create(name, **settings))
        return made[-1]

    yield create
    for container in engine.containers.list(all=True):
        container.remove(force=True)
    for network in made:
        with contextlib.suppress(NoSuchNetwork):
            network.remove()


@pytest.fixture
def host_mode(engine: Engine) -> None:
    found = {capability.name: capability for capability in engine.doctor()}
    if engine.driver.name != "root":
        pytest.skip("bridges of the machine need root")
    if not found["nftables"].ok:
        pytest.skip(f"nftables: {found['nftables'].cause}")


def start(engine: Engine, command: list[str], **settings: Any) -> Container:
    found: Container = engine.containers.run("busybox", command, detach=True, **settings)
    return found


def tell(container: Container, script: str) -> str:
    """What a script prints inside, with its status at the end when that is not 0."""
    code, output = container.exec_run(["sh", "-c", script])
    return f"{output.decode().strip()} [{code}]".strip() if code else str(output.decode().strip())


def hears(container: Container, script: str, words: str) -> None:
    """Wait until a script inside prints these words: a server that was started may not listen yet."""
    wait_until(lambda: tell(container, script) == words, f"{words} from `{script}`")


def fetch(address: str, port: int) -> str:
    """An HTTP answer's body, as soon as somebody answers."""

    def attempt() -> str | None:
        try:
            with socket.create_connection((address, port), timeout=WAIT_S) as sock:
                sock.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
                data = b""
                while chunk := sock.recv(65536):
                    data += chunk
        except ConnectionError:
            return None
        return data.partition(b"\r\n\r\n")[2].decode().strip() or None

    return str(wait_until(attempt, f"an answer of {address}:{port}"))


def refused(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return True
    return False


class World:
    """An outside machine: a network namespace with an interface to this one."""

    here, there = "198.51.100.1", "198.51.100.2"

    def __init__(self) -> None:
        self.process = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{self.process.pid}/ns/net") != own, "a namespace")
        self.name = f"world{os.getpid() % 100000}"
        with netlink.Socket() as sock:
            sock.send(netlink.add_veth(self.name, "eth0", self.process.pid))
            sock.send(netlink.add_address(sock.index(self.name), self.here, 24))
        code = (
            "from labkernel.linux import netlink; netlink.loopback_up(); netlink.configure([{"
            f"'name': 'eth0', 'ip': '{self.there}', 'prefix': 24, 'gateway': '{self.here}'}}])"
        )
        self.run(sys.executable, "-c", code)

    def argv(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.process.pid), "-n", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.argv(*command), capture_output=True, text=True, timeout=WAIT_S, check=False)
        return done.stdout.strip() + (f" [{done.returncode}] {done.stderr.strip()[-200:]}" if done.returncode else "")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        wait_until(lambda: self.name not in os.listdir("/sys/class/net"), "the end of the interface")


@pytest.fixture
def world(host_mode: None) -> Iterator[World]:
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} in PATH")
    found = World()
    yield found
    found.close()


CONNECT = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2); "
ASK = CONNECT + "s.sendall(b'GET /hostname HTTP/1.0\\r\\n\\r\\n'); print(s.makefile('rb').read().split()[-1].decode())"
WHO = (
    "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('ready', flush=True)\n"
    "while True:\n c, a = s.accept(); c.sendall(a[0].encode()); c.close()"
)


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_aliases_and_ids_of_a_network(engine: Engine, net: Callable[..., Network]) -> None:
    net("lab")
    web = start(engine, HTTPD, name="web", network="lab", networking_config={"lab": {"aliases": ["www"]}})
    cli = start(engine, SLEEP, name="cli", network="lab", hostname="client")
    for name in ("web", "WWW", web.short_id, "web.lab"):
        hears(cli, f"wget -qO- http://{name}/hostname", web.short_id)
    assert tell(cli, "nslookup no-such-name.lab >/dev/null") == "[1]"
    ip = cli.attrs["NetworkSettings"]["Networks"]["lab"]["IPAddress"]
    assert f"{ip}\tclient" in tell(cli, "cat /etc/hosts").splitlines()
    assert tell(cli, "cat /etc/resolv.conf").splitlines()[0] == "nameserver 127.0.0.11"
    assert ip in tell(web, "nslookup client")
    cli.rename("other")
    assert ip in tell(web, "nslookup other")
    cli.remove(force=True)
    assert tell(web, "nslookup other >/dev/null") == "[1]"


def test_the_default_network_has_no_names(engine: Engine) -> None:
    web = start(engine, HTTPD, name="web")
    ip = web.attrs["NetworkSettings"]["IPAddress"]
    cli = start(engine, SLEEP, name="cli", extra_hosts={"other": "10.1.2.3", "machine": "host-gateway"})
    hears(cli, f"wget -qO- http://{ip}/hostname", web.short_id)
    assert tell(cli, "nslookup web >/dev/null 2>&1").endswith("[1]")
    gateway = web.attrs["NetworkSettings"]["Gateway"]
    lines = tell(cli, "cat /etc/hosts").splitlines()
    assert "10.1.2.3\tother" in lines
    assert f"{gateway}\tmachine" in lines


def test_dns_settings(engine: Engine) -> None:
    given = start(engine, SLEEP, dns=["192.0.2.1"], dns_search=["example.org"], dns_opt=["timeout:1"])
    lines = tell(given, "cat /etc/resolv.conf").splitlines()
    assert lines == ["nameserver 192.0.2.1", "search example.org", "options timeout:1"]


# -- who reaches whom ------------------------------------------------------------------------------------------------


def test_networks_are_apart_until_a_container_connects_both(engine: Engine, net: Callable[..., Network]) -> None:
    one, two = net("one"), net("two")
    web = start(engine, HTTPD, name="web", network="one")
    far = start(engine, SLEEP, name="far", network="two")
    ip = web.attrs["NetworkSettings"]["Networks"]["one"]["IPAddress"]
    assert tell(far, f"timeout 1 wget -qO- http://{ip}/ >/dev/null 2>&1") != ""
    assert tell(far, "nslookup web >/dev/null") == "[1]"
    one.connect(far, aliases=["visitor"])
    hears(far, "wget -qO- http://web/hostname", web.short_id)
    assert tell(web, "nslookup visitor >/dev/null") == ""
    assert set(far.attrs["NetworkSettings"]["Networks"]) == {"one", "two"}
    with pytest.raises(ConflictError, match="already exists in network one"):
        one.connect(far)
    one.disconnect("far")
    assert tell(far, "nslookup web >/dev/null") == "[1]"
    assert tell(far, "ls /sys/class/net").split() == ["eth0", "lo"]
    with pytest.raises(ConflictError, match="is not connected to network one"):
        one.disconnect(far)
    two.disconnect(far)
    far.restart(timeout=0)
    assert tell(far, "ls /sys/class/net") == "lo"


@pytest.mark.parametrize("auto_remove", [False, True])
def test_files_of_a_running_container_follow_its_networks(
    engine: Engine, net: Callable[..., Network], *, auto_remove: bool
) -> None:
    one, _two = net("one"), net("two")
    start(engine, HTTPD, name="web", network="one")
    cli = start(engine, SLEEP, name="cli", hostname="cli.lab", auto_remove=auto_remove)
    before = tell(cli, "cat /etc/hosts /etc/resolv.conf")
    if engine.driver.name == "root":  # else the default network, too, is resolved by the engine
        assert "127.0.0.11" not in before
    assert tell(cli, "echo 10.1.2.3 mine >> /etc/hosts") == ""
    one.connect(cli)
    cli.reload()
    ip = cli.attrs["NetworkSettings"]["Networks"]["one"]["IPAddress"]
    assert f"{ip}\tcli.lab cli\n" in tell(cli, "cat /etc/hosts") + "\n"
    hears(cli, "wget -qO- http://web/hostname", engine.containers.get("web").short_id)
    one.disconnect(cli)
    hosts = tell(cli, "cat /etc/hosts")
    assert ip not in hosts
    assert "10.1.2.3 mine" in hosts
    # What the container has written into resolv.conf itself is left to it.
    assert tell(cli, "echo nameserver 10.9.9.9 > /etc/resolv.conf") == ""
    one.connect(cli)
    assert tell(cli, "cat /etc/resolv.conf") == "nameserver 10.9.9.9"


def test_no_link_of_a_container_is_followed_to_another_file(tmp_path: Path) -> None:
    from labkernel.runtime import hostfiles

    (tmp_path / "etc").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "etc" / "hosts").symlink_to("/secret")
    os.mkfifo(tmp_path / "etc" / "resolv.conf")
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            hostfiles._edit(root, "/etc/hosts", lambda _text: "changed")
        hostfiles._edit(root, "/etc/resolv.conf", lambda _text: "changed")  # must not wait for a reader
    finally:
        os.close(root)
    assert (tmp_path / "secret").read_text() == "secret"


def test_containers_that_may_not_talk_to_each_other(engine: Engine, net: Callable[..., Network]) -> None:
    network = net("apart", options={"com.docker.network.bridge.enable_icc": "false"})
    start(engine, HTTPD, name="web", network="apart")
    cli = start(engine, SLEEP, name="cli", network="apart")
    assert tell(cli, f"ping -c 1 -W 5 {network.gateway} >/dev/null") == ""
    assert tell(cli, "timeout 1 wget -qO- http://web/hostname 2>/dev/null") != ""
    assert engine.containers.get("web").short_id not in tell(cli, "timeout 1 wget -qO- http://web/hostname")


def test_special_modes(engine: Engine) -> None:
    web = start(engine, HTTPD, name="web")
    assert engine.containers.run("busybox", ["ls", "/sys/class/net"], network="none", remove=True) == b"lo\n"
    shared = start(engine, SLEEP, network_mode="container:web")
    hears(shared, "wget -qO- http://127.0.0.1/hostname", web.short_id)
    own = os.readlink("/proc/self/ns/net")
    host = engine.containers.run("busybox", ["readlink", "/proc/self/ns/net"], network="host", remove=True)
    assert host.decode().strip() == own
    discarded = engine.containers.create("busybox", "true", network="host", ports={"80/tcp": 8080})
    assert discarded.warnings == ["Published ports are discarded when using host network mode"]


def test_addresses_are_chosen_or_given(engine: Engine, net: Callable[..., Network]) -> None:
    net("lab", ipam={"Config": [{"Subnet": "10.213.7.0/24", "IPRange": "10.213.7.64/28", "Gateway": "10.213.7.254"}]})
    chosen = start(engine, SLEEP, network="lab")
    given = start(
        engine,
        SLEEP,
        network="lab",
        networking_config={"lab": {"ip": "10.213.7.5"}},
        mac_address="02:aa:bb:cc:dd:ee",
    )
    assert chosen.attrs["NetworkSettings"]["Networks"]["lab"]["IPAddress"] == "10.213.7.64"
    shown = tell(given, "ip addr show eth0; ip route")
    assert "inet 10.213.7.5/24" in shown
    assert "02:aa:bb:cc:dd:ee" in shown
    assert "default via 10.213.7.254" in shown
    with pytest.raises(ConflictError, match="Address already in use"):
        start(engine, SLEEP, network="lab", networking_config={"lab": {"ip": "10.213.7.5"}})
    given.remove(force=True)
    again = start(engine, SLEEP, network="lab", networking_config={"lab": {"ip": "10.213.7.5"}})
    again.restart(timeout=0)
    assert "10.213.7.5/24" in tell(again, "ip addr show eth0")


def test_many_containers_at_once_get_addresses_of_their_own(engine: Engine, net: Callable[..., Network]) -> None:
    network = net("lab", ipam={"Config": [{"Subnet": "10.213.8.0/28"}]})

    def create(number: int) -> Container:
        made: Container = engine.containers.create("busybox", SLEEP, network="lab", name=f"many{number}")
        return made

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(create, range(13)))
    rows = engine.networks.members(network)
    assert len({row["address"] for row in rows}) == 13
    with pytest.raises(ConflictError, match="no available IPv4 addresses"):
        create(99)
    found[3].remove()
    create(99)


# -- published ports -------------------------------------------------------------------------------------------------


def test_published_ports(engine: Engine, net: Callable[..., Network]) -> None:
    net("lab")
    web = start(engine, HTTPD, name="web", network="lab", ports={"80/tcp": None, "81/udp": ("127.0.0.1", None)})
    bound = web.ports
    port = int(bound["80/tcp"][0]["HostPort"])
    assert bound["80/tcp"][0]["HostIp"] == "0.0.0.0"
    assert bound["81/udp"][0]["HostIp"] == "127.0.0.1"
    assert fetch("127.0.0.1", port) == web.short_id
    # from inside, too: from its own network, and from another one through the machine's address
    far = start(engine, SLEEP, name="far")
    gateway = far.attrs["NetworkSettings"]["Gateway"]
    if engine.driver.name == "root":
        hears(far, f"wget -qO- http://{gateway}:{port}/hostname", web.short_id)
    with pytest.raises(StartError, match=f"Bind for 0.0.0.0:{port} failed: port is already allocated") as caught:
        start(engine, SLEEP, name="late", ports={"80/tcp": port})
    assert caught.value.exit_code == 125
    web.stop(timeout=0)
    assert web.ports == {}
    assert wait_until(lambda: refused("127.0.0.1", port), "a closed port")
    late = engine.containers.get("late")
    late.start()
    assert late.port_lines("80/tcp") == [f"0.0.0.0:{port}"]


def test_all_exposed_ports_and_ranges(engine: Engine) -> None:
    web = start(engine, SLEEP, publish_all_ports=True, exposed_ports=["90-91", "92/udp"], ports="80-81")
    assert set(web.ports) == {"80/tcp", "81/tcp", "90/tcp", "91/tcp", "92/udp"}
    assert all(binding for binding in web.ports.values())
    assert len({(key[-3:], b[0]["HostPort"]) for key, b in web.ports.items()}) == 5


def test_udp_ports(engine: Engine, net: Callable[..., Network], host_mode: None) -> None:
    net("lab")
    ask = start(engine, SLEEP, name="ask", network="lab", ports={"53/udp": ("127.0.0.1", None)})
    port = int(ask.ports["53/udp"][0]["HostPort"])
    pidfd = os.pidfd_open(ask.pid or 0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # an echo inside, as busybox has none
        syscalls.setns(pidfd, syscalls.CLONE_NEWNET)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((ask.attrs["NetworkSettings"]["Networks"]["lab"]["IPAddress"], 53))
            os.write(write, b"x")
            while True:
                data, peer = sock.recvfrom(100)
                sock.sendto(data * 2, peer)
    try:
        assert os.read(read, 1) == b"x"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(WAIT_S)
            sock.connect(("127.0.0.1", port))
            sock.send(b"ab")
            assert sock.recv(100) == b"abab"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (pidfd, read, write):
            os.close(fd)


def test_the_outside_reaches_published_ports_only(engine: Engine, net: Callable[..., Network], world: World) -> None:
    net("lab")
    web = start(engine, HTTPD, name="web", network="lab", ports={"80/tcp": [None, ("127.0.0.1", None)]})
    bindings = web.ports["80/tcp"]
    port = next(int(each["HostPort"]) for each in bindings if each["HostIp"] == "0.0.0.0")
    local = next(int(each["HostPort"]) for each in bindings if each["HostIp"] == "127.0.0.1")
    assert fetch("127.0.0.1", local) == web.short_id
    assert wait_until(lambda: world.run(sys.executable, "-c", ASK, world.here, str(port)) == web.short_id, "an answer")
    assert "[1]" in world.run(sys.executable, "-c", ASK, world.here, str(local))
    # a neighbour that routes to our subnet gets nothing
    ip = web.attrs["NetworkSettings"]["Networks"]["lab"]["IPAddress"]
    assert "[1]" in world.run(sys.executable, "-c", ASK, ip, "80")


def test_outwards_and_internal_networks(engine: Engine, net: Callable[..., Network], world: World) -> None:
    net("lab")
    inner = net("inner", internal=True)
    process = subprocess.Popen(world.argv(sys.executable, "-c", WHO), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        ask = f"timeout 2 nc {world.there} 7000 </dev/null"
        outside = start(engine, SLEEP, name="outside", network="lab")
        assert tell(outside, ask) == world.here  # behind the machine's address
        inside = start(engine, SLEEP, name="inside", network="inner")
        assert tell(inside, f"{ask} 2>/dev/null") != world.here
        assert "default" not in tell(inside, "ip route")
        inner.connect(outside)
        assert tell(inside, "ping -c 1 -W 5 outside >/dev/null") == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_container_cannot_reach_the_machines_loopback(
    engine: Engine, net: Callable[..., Network], host_mode: None
) -> None:
    """CVE-2020-8558: route_localnet lets a neighbour send to 127.0.0.1; the guard drops it."""
    net("lab")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attacker = start(engine, SLEEP, network="lab", cap_add=["NET_ADMIN"])
        gateway = attacker.attrs["NetworkSettings"]["Networks"]["lab"]["Gateway"]
        done = tell(
            attacker,
            "ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1/32 via "
            f"{gateway} dev eth0; ip route show 127.0.0.1; timeout 1 nc 127.0.0.1 {port} </dev/null && echo reached",
        )
        assert f"127.0.0.1 via {gateway}" in done
        assert "reached" not in done


# -- the collection --------------------------------------------------------------------------------------------------


def test_create_list_inspect_remove(engine: Engine, net: Callable[..., Network]) -> None:
    made = net("lab", labels={"course": "os"}, ipam={"Config": [{"Subnet": "10.213.9.0/24"}]})
    assert [n.name for n in engine.networks.list(filters={"type": "builtin"})] == ["bridge", "host", "none"]
    assert engine.networks.list(filters={"label": "course=os"}) == [made]
    assert engine.networks.list(names=["lab"]) == [made]
    assert engine.networks.get(made.id[:12]) == engine.networks.get("lab") == made
    assert made in engine.networks.list(filters={"dangling": True})
    web = start(engine, SLEEP, name="web", network="lab")
    assert made not in engine.networks.list(filters={"dangling": True})
    assert engine.containers.list(filters={"network": "lab"}) == [web]
    attrs = made.attrs
    assert attrs["IPAM"]["Config"] == [{"Subnet": "10.213.9.0/24", "Gateway": "10.213.9.1"}]
    assert attrs["Containers"][web.id]["IPv4Address"] == "10.213.9.2/24"
    assert made.containers == [web]
    with pytest.raises(ConflictError, match="has active endpoints"):
        made.remove()
    web.stop(timeout=0)
    made.remove()
    with pytest.raises(NoSuchNetwork, match="not found"):
        made.reload()
    with pytest.raises(StartError, match="not found"):
        web.start()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "bad name"}, "invalid network name"),
        ({"name": "bridge"}, "network with name bridge already exists"),
        ({"driver": "host"}, 'only one instance of "host" network is allowed'),
        ({"driver": "macvlan"}, "could not find plugin macvlan"),
        ({"enable_ipv6": True}, "IPv6 networks are not available"),
        ({"ipam": {"Config": [{"Subnet": "10.1.2.3"}]}}, "invalid CIDR address"),
        ({"ipam": {"Config": [{"Subnet": "10.1.2.0/24", "Gateway": "10.9.9.9"}]}}, "no matching subnet for gateway"),
        ({"ipam": {"Config": [{"Gateway": "10.9.9.9"}]}}, "invalid subnet"),
    ],
)
def test_networks_that_cannot_be(engine: Engine, settings: dict[str, Any], words: str) -> None:
    with pytest.raises((UsageError, ConflictError), match=words):
        engine.networks.create(**{"name": "lab", **settings})


def test_subnets_may_not_overlap(net: Callable[..., Network], engine: Engine) -> None:
    net("lab", ipam={"Config": [{"Subnet": "10.213.0.0/16"}]})
    with pytest.raises(ConflictError, match="Pool overlaps with other one on this address space"):
        engine.networks.create("other", ipam={"Config": [{"Subnet": "10.213.4.0/24"}]})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "bridge", "networking_config": {"bridge": {"ip": "172.17.0.9"}}}, "user defined networks only"),
        ({"networking_config": {"default": {"aliases": ["x"]}}}, "only for containers in user defined networks"),
        ({"ports": {"80/sctp": 8080}}, "invalid proto"),
        ({"ports": "8000-8002:80-81"}, "invalid ranges"),
        ({"ports": {"80/tcp": ("300.0.0.1", 8080)}}, "invalid IP address"),
        ({"mac_address": "zz"}, "is not a valid mac address"),
    ],
)
def test_settings_that_cannot_be(engine: Engine, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.containers.create("busybox", "true", **settings)


def test_prune_spares_what_is_used(engine: Engine, net: Callable[..., Network]) -> None:
    net("unused")
    net("kept", labels={"keep": ""})
    net("used")
    engine.containers.create("busybox", SLEEP, network="used")
    assert engine.networks.prune(filters={"label!": "keep"}) == {"NetworksDeleted": ["unused"]}


def test_events(engine: Engine, net: Callable[..., Network]) -> None:
    before = time.time()
    network = net("lab")
    start(engine, SLEEP, network="lab").remove(force=True)
    network.remove()
    found = engine.history.list(since=before, filters={"type": "network"})
    assert [event["Action"] for event in found] == ["create", "connect", "disconnect", "destroy"]
    assert {event["Actor"]["ID"] for event in found} == {network.id}


# -- kills, reboots --------------------------------------------------------------------------------------------------


def test_a_killed_supervisor_keeps_ports_and_names(fresh_engine: Engine) -> None:
    engine = fresh_engine
    network = engine.networks.create("lab")
    web = start(engine, HTTPD, name="web", network="lab", ports={"80/tcp": None})
    cli = start(engine, SLEEP, name="cli", network="lab")
    port = int(web.ports["80/tcp"][0]["HostPort"])
    for who in ("pid", "keeper_pid"):
        os.kill(getattr(engine.runtime.ensure(), who), signal.SIGKILL)
        assert fetch("127.0.0.1", port) == web.short_id
        hears(cli, "wget -qO- http://web/hostname", web.short_id)
    with pytest.raises(StartError, match="already allocated"):
        start(engine, SLEEP, ports={"80/tcp": port})
    web.restart(timeout=0)
    hears(cli, "wget -qO- http://web/hostname", web.short_id)
    assert not [problem for problem in engine.check() if problem.kind == "network"]
    for container in engine.containers.list(all=True):
        container.remove(force=True)
    network.remove()


def test_leaks_are_found_and_removed(fresh_engine: Engine, host_mode: None) -> None:
    engine = fresh_engine
    key = naming.store_key(engine.layout.root)
    bridge = naming.bridge_name(key, "dead" * 16)
    with netlink.Socket() as sock:
        sock.send(netlink.add_bridge(bridge))
    endpoint = {"bridge": bridge, "subnet": "10.213.10.0/24", "internal": False}
    assert nftables.run(firewall.script(naming.table_name(key), [endpoint], [])) == ""
    found = [problem for problem in engine.check() if problem.kind == "network"]
    assert {problem.subject for problem in found} == {bridge, f"table {naming.table_name(key)}"}
    # A supervisor finds them, too, before its first container.
    start(engine, SLEEP, name="web")
    assert bridge not in os.listdir("/sys/class/net")
    engine.containers.get("web").remove(force=True)
    engine.runtime.shutdown(force=True)
    assert naming.table_name(key) not in nftables.tables()
    with netlink.Socket() as sock:
        sock.send(netlink.add_bridge(bridge))
    assert engine.networks.sweep() == [bridge]
    assert engine.check() == []


def test_a_bridge_that_somebody_removed_is_made_anew(
    engine: Engine, net: Callable[..., Network], host_mode: None
) -> None:
    network = net("vanished")
    start(engine, SLEEP, network="vanished").remove(force=True)
    with netlink.Socket() as sock:
        sock.send(netlink.delete_link(network.bridge))
    web = start(engine, HTTPD, network="vanished", name="web")
    client = start(engine, SLEEP, network="vanished")
    hears(client, "wget -q -O - http://web/hostname", web.short_id)


def test_networks_outlive_the_runtime_directory(fresh_engine: Engine) -> None:
    engine = fresh_engine
    network = engine.networks.create("lab")
    web = start(engine, SLEEP, name="web", network="lab")
    address = web.attrs["NetworkSettings"]["Networks"]["lab"]["IPAddress"]
    web.stop(timeout=0)
    engine.runtime.shutdown(force=True)
    shutil.rmtree(engine.layout.runtime_dir)
    engine.layout.runtime_dir.mkdir(mode=0o700)
    if engine.driver.name == "root":
        assert not [name for name in os.listdir("/sys/class/net") if name == network.bridge]
    web.start()
    assert engine.networks.get("lab") == network
    assert f"inet {address}/" in tell(web, "ip addr show eth0")


# -- rootless --------------------------------------------------------------------------------------------------------

ROOTLESS = """
import json, os, signal, sys, time, urllib.request, labkernel
lab = labkernel.connect()
found = {"driver": lab.driver.name}
one, two = lab.networks.create("one"), lab.networks.create("two")
settings = {"network": "one", "ports": {"80/tcp": None}, "detach": True}
web = lab.containers.run("busybox", "httpd -f -p 80 -h /etc", name="web", **settings)
cli = lab.containers.run("busybox", "sleep 1000", name="cli", network="two", detach=True)
say = lambda script: cli.exec_run(["sh", "-c", script]).output.decode().strip()
found["id"] = web.short_id
found["apart"] = say("nslookup web >/dev/null; echo $?")
one.connect(cli)
found["joined"] = say("wget -qO- http://web/hostname")
port = web.ports["80/tcp"][0]["HostPort"]
def fetch():
    deadline = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/hostname", timeout=60).read().decode().strip()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
found["published"] = fetch()
found["warnings"] = web.warnings
found["route"] = say("ip route")
os.kill(lab.runtime.ensure().pid, signal.SIGKILL)
deadline = time.monotonic() + 60
while say("wget -qO- http://web/hostname") != web.short_id and time.monotonic() < deadline:
    time.sleep(0.05)
found["after kill"] = fetch()
for container in lab.containers.list(all=True):
    container.remove(force=True)
print(json.dumps(found))
"""


def test_rootless(plain_user, needs) -> None:  # type: ignore[no-untyped-def]
    needs("user namespace")
    if os.geteuid() == 0:
        needs("overlay rootless")
    done = plain_user.python("-c", ROOTLESS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if found["driver"] != "rootless":
        pytest.skip(f"a plain user gets the driver {found['driver']} here")
    assert found["apart"] == "1"
    assert found["joined"] == found["published"] == found["after kill"] == found["id"]
    assert found["route"].startswith("default via ")
    assert all("nothing outside" in line or "limit" in line or "network" not in line for line in found["warnings"])


# -- the command line ------------------------------------------------------------------------------------------------


def test_commands(
    engine: Engine,
    net: Callable[..., Network],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))

    def labkernel(line: str, code: int = 0) -> str:
        words = line.split()
        found = terminal.run(words, terminal.TerminalHost(words=words))
        out, err = capsys.readouterr()
        assert found == code, err
        return (err if code else out).strip()

    net("spare")
    id = labkernel("network create --subnet 10.213.11.0/24 --internal --label a=b -o com.docker.network.x=y lab")
    assert engine.networks.get(id).internal
    assert labkernel("network ls --filter type=custom --format {{.Name}}/{{.Driver}}/{{.Internal}}").splitlines() == [
        "lab/bridge/true",
        "spare/bridge/false",
    ]
    run = "run -d --name web --network lab --network-alias www --ip 10.213.11.9 -p 127.0.0.1::80 --expose 90 busybox"
    labkernel(f"{run} sleep 1000")
    published = labkernel("port web 80")
    assert published.startswith("127.0.0.1:")
    assert labkernel("ps --format {{.Networks}}|{{.Ports}}") == f"lab|{published}->80/tcp, 90/tcp"
    assert labkernel("inspect web -f {{.NetworkSettings.Networks.lab.IPAddress}}") == "10.213.11.9"
    assert labkernel("port web 81", code=1).startswith("labkernel: No public port '81/tcp' published for web")
    labkernel("network connect --alias other spare web")
    assert labkernel("network inspect spare -f {{.Name}}") == "spare"
    assert set(engine.containers.get("web").attrs["NetworkSettings"]["Networks"]) == {"lab", "spare"}
    assert "has active endpoints" in labkernel("network rm lab", code=1)
    labkernel("network disconnect spare web")
    labkernel("rm -f web")
    assert labkernel("network rm lab") == "lab"
    assert labkernel("network inspect lab", code=1).startswith("labkernel: network lab not found")
    assert labkernel("network prune -f").splitlines() == ["Deleted Networks:", "spare"]
