"""The network of a RUN: the default one, as BuildKit's, none, and nothing of it in the layer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from labkernel.engine import Engine
from labkernel.errors import BuildError


@pytest.fixture
def server(engine: Engine) -> Iterator[str]:
    """The address of a web server in the default network."""
    if engine.driver.name == "proot":
        pytest.skip("the driver proot has no networks")
    container = engine.containers.run(
        "busybox",
        ["sh", "-c", "mkdir /www; echo served > /www/index.html; exec httpd -f -h /www -p 80"],
        detach=True,
    )
    ready = engine.containers.run(
        "busybox",
        ["sh", "-c", "until wget -qO- localhost > /dev/null 2>&1; do sleep 0.1; done"],
        network_mode=f"container:{container.id}",
        remove=True,
    )
    assert ready == b""
    container.reload()
    yield str(container.attrs["NetworkSettings"]["IPAddress"])
    container.remove(force=True)


def test_a_run_reaches_the_default_network(engine: Engine, server: str) -> None:
    text = f"FROM busybox\nRUN wget -qO /got http://{server}/\nRUN --network=none ls /sys/class/net > /interfaces\n"
    image = engine.builds.build(text, tags=["lk-test/network"], no_cache=True).image
    try:
        seen = engine.containers.run("lk-test/network", ["cat", "/got", "/interfaces"], remove=True)
        assert seen == b"served\nlo\n"
        tree = engine.containers.run(image.id, ["ls", "/etc"], network_mode="none", remove=True).split()
        base = engine.containers.run("busybox", ["ls", "/etc"], network_mode="none", remove=True).split()
        assert tree == base, "name servers and hosts are the sandbox's, not the image's"
    finally:
        engine.images.remove("lk-test/network", force=True)
    with pytest.raises(BuildError):
        engine.builds.build(f"FROM busybox\nRUN --network=none wget -T 5 -qO- http://{server}/\n", no_cache=True)


def test_stages_at_once_take_no_containers_address(engine: Engine, server: str) -> None:
    ask = f"until wget -qO- http://{server}/ | grep -q served; do sleep 0.1; done"
    text = (
        f"FROM busybox AS one\nRUN ip -o -4 addr show eth0 > /address; {ask}\n"
        f"FROM busybox AS two\nRUN ip -o -4 addr show eth0 > /address; {ask}\n"
        "FROM busybox\nCOPY --from=one /address /one\nCOPY --from=two /address /two\n"
    )
    engine.builds.build(text, tags=["lk-test/network"], no_cache=True)
    try:
        seen = engine.containers.run("lk-test/network", ["cat", "/one", "/two"], remove=True).decode()
    finally:
        engine.images.remove("lk-test/network", force=True)
    addresses = re.findall(r"inet ([0-9.]+)/", seen)
    assert len(addresses) == 2
    assert server not in addresses
