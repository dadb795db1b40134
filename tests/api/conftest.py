"""A daemon of the shared engine, and docker's client for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemons import Cli, Daemon

from labkernel.engine import Engine


@contextmanager
def _daemon_of(shared_engine: Engine) -> Iterator[Daemon]:
    folder = tempfile.mkdtemp(prefix="lk-d-", dir="/tmp")
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(shared_engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(shared_engine.layout.runtime_dir),
        "LABKERNEL_DRIVER": shared_engine.driver.name,
    }
    shared_engine.images.resolve("lab/busybox", notify=lambda line: None)
    found = Daemon(environment, f"{folder}/docker.sock")
    yield found
    found.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared_daemon(shared_engine: Engine) -> Iterator[Daemon]:
    with _daemon_of(shared_engine) as found:
        yield found


@pytest.fixture(scope="module")
def lone_daemon(shared_engine: Engine) -> Iterator[Daemon]:
    """A daemon that nobody outside this module has talked to: libraries keep connections open as long as they like."""
    with _daemon_of(shared_engine) as found:
        yield found


@pytest.fixture
def daemon(shared_daemon: Daemon, engine: Engine) -> Daemon:
    """The daemon; containers a test leaves are removed after it."""
    if shared_daemon.process is None or shared_daemon.process.poll() is not None:
        shared_daemon.start()
    return shared_daemon


def clients() -> list[str]:
    """Every docker client of this machine: Debian's, and another one that somebody put beside it."""
    found = [shutil.which("docker"), "/usr/bin/docker", "/usr/local/bin/docker"]
    return list({os.path.realpath(path): path for path in found if path and os.path.exists(path)})


@pytest.fixture(params=clients() or [None], ids=lambda path: str(path).strip("/").replace("/", "-"))
def docker(request: pytest.FixtureRequest, daemon: Daemon, tmp_path: Path) -> Cli:
    if request.param is None:
        pytest.skip("no docker client is installed (Debian: docker.io)")
    return Cli(request.param, daemon.address, tmp_path)
