"""Networks after kills and reboots, and without root."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable

import pytest
from neighbours import HTTPD, SLEEP, fetch, hears, start, tell

from labkernel.engine import Engine
from labkernel.errors import StartError
from labkernel.linux import netlink, nftables
from labkernel.net import firewall, naming
from labkernel.networking.network import Network

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
