"""Virtual machines in networks that users made, beside containers."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import ConflictError, NoSuchNetwork, UsageError
from labkernel.widgets.trees import network_map

IMAGE = "lab/busybox"
MEMORY = "128m"
DEADLINE_S = 120.0
SERVE = ["httpd", "-f", "-p", "80", "-h", "/etc"]


@pytest.fixture(scope="module")
def lab(vm_lab: Engine) -> Engine:
    return vm_lab


def output(one: Any, *words: str) -> str:
    code, data = one.exec_run(list(words))
    assert code == 0, data
    return str(data.decode())


def fetch(one: Any, host: str, *, patience_s: int = 20) -> str:
    """The host name that a server tells `one` (a machine or a container); empty when it does not answer."""
    code, data = one.exec_run(["timeout", str(patience_s), "wget", "-qO-", f"http://{host}/hostname"])
    return str(data.decode().strip()) if code == 0 else ""


@pytest.fixture
def nets(lab: Engine) -> Iterator[list[Any]]:
    made = [lab.networks.create("one"), lab.networks.create("two", internal=True)]
    yield made
    for each in [*lab.vms.list(all=True), *lab.containers.list(all=True)]:
        each.remove(force=True, v=True)
    for network in made:
        network.remove()


def test_a_machine_is_in_a_network_as_a_container_is(lab: Engine, nets: list[Any]) -> None:
    first, second = nets
    web = lab.containers.run(IMAGE, SERVE, detach=True, name="web", network="one")
    far = lab.containers.run(IMAGE, SERVE, detach=True, name="far", network="two")
    ports = {"80/tcp": ("127.0.0.1", None)}
    settings: dict[str, Any] = {"networking_config": {"one": {"Aliases": ["box"]}}, "ports": ports}
    vm = lab.vms.run(IMAGE, SERVE, detach=True, name="wired", network_mode="one", mem_limit=MEMORY, **settings)
    own = output(vm, "hostname").strip()

    # both ways, by name and alias, and through a published port
    assert fetch(vm, "web") == output(web, "hostname").strip()
    wait_until(lambda: fetch(web, "wired") == own, "its server")
    assert fetch(web, "box") == own
    place = vm.ports["80/tcp"][0]
    with urllib.request.urlopen(f"http://127.0.0.1:{place['HostPort']}/hostname", timeout=DEADLINE_S) as answer:
        assert answer.read().decode().strip() == own
    # shown as a container's
    address = first.attrs["Containers"][vm.id]["IPv4Address"].partition("/")[0]
    assert vm.attrs["NetworkSettings"]["Networks"]["one"]["IPAddress"] == address
    assert f"{address}\t{own}" in output(vm, "cat", "/etc/hosts")
    assert vm in first.containers
    assert "wired (VM)" in repr(network_map(lab))
    # not beyond it
    assert fetch(vm, far.attrs["NetworkSettings"]["Networks"]["two"]["IPAddress"], patience_s=2) == ""

    second.connect(vm, aliases=["late"])
    assert fetch(vm, "far") == output(far, "hostname").strip()
    assert fetch(far, "late") == own
    first.disconnect(vm)
    assert fetch(vm, "web", patience_s=2) == ""
    assert "default" not in output(vm, "ip", "route")  # the other one is internal
    assert vm.id not in first.attrs["Containers"]
    assert lab.check() == []


def test_a_machine_stays_in_its_networks(lab: Engine, nets: list[Any]) -> None:
    web = lab.containers.run(IMAGE, SERVE, detach=True, name="web", network="one")
    vm = lab.vms.run(IMAGE, SERVE, detach=True, name="wired", network_mode="one", mem_limit=MEMORY)
    own = output(vm, "hostname").strip()
    vm.snapshot("then")
    nets[1].connect(vm)
    vm.restore("then")
    assert fetch(vm, "web")
    assert len(output(vm, "ip", "-4", "-o", "addr").splitlines()) == 3  # lo, and both networks: as it is now
    vm.rename("renamed")
    assert fetch(web, "renamed") == own
    os.kill(lab.runtime.ensure().pid, signal.SIGKILL)
    wait_until(lambda: fetch(web, "renamed") == own and fetch(vm, "web"), "names, by another supervisor")
    vm.restart()
    wait_until(lambda: fetch(web, "renamed") == own, "its server after a restart")
    vm.remove(force=True)
    assert nets[0].attrs["Containers"].keys() == {web.id}


def test_a_machine_without_a_network_is_connected_later(lab: Engine, nets: list[Any]) -> None:
    """It has no card until then: one is plugged in while it runs."""
    web = lab.containers.run(IMAGE, SERVE, detach=True, name="web", network="one")
    far = lab.containers.run(IMAGE, SERVE, detach=True, name="far", network="two")
    vm = lab.vms.run(IMAGE, SERVE, detach=True, name="alone", mem_limit=MEMORY)
    own = output(vm, "hostname").strip()
    interfaces = ["ls", "/sys/class/net"]
    assert output(vm, *interfaces).split() == ["lo"]
    vm.snapshot("before")
    nets[1].connect(vm)
    assert vm.warnings == []
    assert fetch(vm, "far") == output(far, "hostname").strip()
    nets[0].connect(vm, aliases=["late"])
    assert fetch(vm, "web") == output(web, "hostname").strip()
    assert fetch(web, "late") == own
    assert "cut here" not in output(vm, "dmesg"), "its kernel had to warn of something"
    assert output(vm, *interfaces).split() == ["eth0", "eth1", "lo"]
    # with its cards, and without: its networks are those of now
    vm.snapshot("after")
    for name in ("after", "before"):
        vm.restore(name)
        assert vm.warnings == []
        assert output(vm, *interfaces).split() == ["eth0", "eth1", "lo"]
        assert fetch(vm, "web")
        wait_until(lambda: fetch(far, "alone") == own, "its server")
    nets[0].disconnect(vm)
    vm.restart()
    wait_until(lambda: fetch(far, "alone") == own, "its server after a restart")
    assert fetch(vm, "web", patience_s=2) == ""
    assert lab.vms.get("alone").wired


def test_a_card_comes_to_two_processors_too(lab: Engine, nets: list[Any]) -> None:
    """Their kernel has ACPI, and hears of it by itself."""
    web = lab.containers.run(IMAGE, SERVE, detach=True, name="web", network="one")
    vm = lab.vms.run(IMAGE, SERVE, detach=True, name="alone", mem_limit=MEMORY, cpus=2, cold=True)
    nets[0].connect(vm)
    assert vm.warnings == []
    assert fetch(vm, "web") == output(web, "hostname").strip()


def test_a_machine_that_does_not_run_is_connected(lab: Engine, nets: list[Any]) -> None:
    vm = lab.vms.create(IMAGE, SERVE, name="made", mem_limit=MEMORY)
    nets[0].connect(vm)
    web = lab.containers.run(IMAGE, SERVE, detach=True, name="web", network="one")
    vm.start()
    assert fetch(vm, "web") == output(web, "hostname").strip()
    assert vm.attrs["NetworkSettings"]["Networks"].keys() == {"one"}


def test_networks_that_a_machine_cannot_have(lab: Engine, nets: list[Any]) -> None:
    for settings, words in (
        ({"network_mode": "host"}, "not available to a virtual machine"),
        ({"network_mode": "container:web"}, "not available to a virtual machine"),
        ({"network_mode": "bridge", "mac_address": "02:42:0a:00:00:02"}, "need a network of your own"),
        ({"network_mode": "one", "networking_config": {f"n{n}": {} for n in range(4)}}, "can be in 4 networks"),
    ):
        with pytest.raises(UsageError, match=words):
            lab.vms.create(IMAGE, "true", **settings)  # type: ignore[arg-type]
    with pytest.raises(NoSuchNetwork):
        lab.vms.create(IMAGE, "true", network_mode="nosuch")
    settings: dict[str, Any]
    for settings, words in (
        ({"network_mode": "bridge"}, "user-mode network"),
        ({"ports": {"80/tcp": None}}, "user-mode network"),
        ({"network_mode": "none"}, "private .none. mode"),
    ):
        made = lab.vms.create(IMAGE, "true", **settings, mem_limit=MEMORY)
        with pytest.raises(ConflictError, match=words):
            nets[0].connect(made)
        made.remove()
    made = lab.vms.create(IMAGE, "true", network_mode="one", mem_limit=MEMORY, name="made")
    with pytest.raises(ConflictError, match="already exists"):
        nets[0].connect("made")
    made.remove()
