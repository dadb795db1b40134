"""Names and addresses: who knows and reaches whom."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from neighbours import HTTPD, SLEEP, hears, start, tell

from labkernel import terminal
from labkernel.engine import Engine
from labkernel.errors import ConflictError, UsageError
from labkernel.networking.network import Network
from labkernel.running.container import Container

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


def test_links_are_names_for_one_container_alone(engine: Engine, net: Callable[..., Network]) -> None:
    net("lab")
    web, other = (start(engine, HTTPD, name=name, network="lab") for name in ("web", "other"))
    asked = {"lab": {"links": ["web:db", ("other", "cache"), "other:web"]}}
    cli = start(engine, SLEEP, name="cli", network="lab", networking_config=asked)
    hears(cli, "wget -qO- http://db/hostname", web.short_id)
    hears(cli, "wget -qO- http://cache.lab/hostname", other.short_id)
    hears(cli, "wget -qO- http://web/hostname", other.short_id)
    assert tell(other, "nslookup db >/dev/null") == "[1]"
    assert cli.attrs["NetworkSettings"]["Networks"]["lab"]["Links"] == ["web:db", "other:cache", "other:web"]
    second = net("second")
    second.connect(cli, links={"web": "far"})
    second.connect(web)
    hears(cli, "wget -qO- http://far/hostname", web.short_id)
    with pytest.raises(UsageError, match="user defined networks only"):
        engine.networks.get("bridge").connect(cli, links=["web"])
    with pytest.raises(UsageError, match="user defined networks only"):
        start(engine, SLEEP, networking_config={"bridge": {"links": ["web"]}})
    with pytest.raises(UsageError, match="bad format for links"):
        second.connect(other, links=["a:b:c"])


def test_links_by_flag(engine: Engine, net: Callable[..., Network], capfd: pytest.CaptureFixture[str]) -> None:
    net("lab")
    web = start(engine, HTTPD, name="web", network="lab")

    def run(*words: str) -> tuple[int, str]:
        capfd.readouterr()
        code = terminal.run(["run", "--rm", *words], terminal.TerminalHost(lambda: engine))
        return code, "".join(capfd.readouterr())

    fetch = ("lab/busybox", "wget", "-qO-", "http://db/hostname")
    code, said = run("--network", "lab", "--link", "web:db", *fetch)
    assert (code, said.splitlines()[0]) == (0, web.short_id)
    code, said = run("--link", "web:db", *fetch)
    assert (code, "user defined networks only" in said) == (125, True)


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
