"""Networks with real bridges, rules and name servers; under the driver root with an outside machine (a namespace)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from neighbours import World

from labkernel.engine import Engine
from labkernel.errors import NoSuchNetwork
from labkernel.networking.network import Network


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


@pytest.fixture
def world(host_mode: None) -> Iterator[World]:
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} in PATH")
    found = World()
    yield found
    found.close()
