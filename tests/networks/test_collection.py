"""Making, listing and removing networks, from Python and as commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from neighbours import SLEEP, start

from labkernel import terminal
from labkernel.engine import Engine
from labkernel.errors import ConflictError, NoSuchNetwork, StartError, UsageError
from labkernel.networking.network import Network

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
