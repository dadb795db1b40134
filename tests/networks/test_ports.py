"""Published ports, and what else of the machine and the outside is reached."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from neighbours import ASK, HTTPD, SLEEP, WAIT_S, WHO, World, fetch, hears, refused, start, tell
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import StartError
from labkernel.linux import syscalls
from labkernel.networking.network import Network

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
