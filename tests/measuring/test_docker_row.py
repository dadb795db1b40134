"""The row `docker` of comparisons, with a real daemon behind one of docker's contexts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from dockerd import own_docker

from labkernel.engine import Engine

pytestmark = pytest.mark.slow
IMAGE = "lab/busybox"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a context that leads to a daemon of our own."""
    with own_docker() as docker, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(tmp_path_factory.mktemp("docker")))
        patch.delenv("DOCKER_HOST", raising=False)
        words = ["docker", "context", "create", "ours", "--docker", f"host=unix://{docker.base}/d.sock"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        yield "ours"
        assert docker.call("ps", "-aq") == "", "the row removes its containers"


def test_docker_is_measured_beside_our_own(engine: Engine, context: str) -> None:
    own = engine.driver.name
    found = engine.comparisons.measure(IMAGE, "start,cpu,disk", runs=1, rows=[own, "docker"], docker_context=context)
    assert found.left_out == {}
    assert [row.name for row in found.rows] == [own, "docker"]
    for row in found.rows:
        assert {"start", "cpu"} <= row.values.keys()
        assert all(value > 0 for values in row.values.values() for value in values)
    assert "Docker (ours)" in found.text()


def test_docker_runs_the_same_files(engine: Engine, context: str) -> None:
    found = engine.comparisons.portability(IMAGE, docker_context=context)
    text = found.text()
    assert "docker: left out" not in text
    assert "Docker (ours)" in text
    assert "the same image and the same files" in text
