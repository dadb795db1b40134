from __future__ import annotations

from collections.abc import Iterator

import pytest

from labkernel.engine import Engine
from labkernel.errors import ConflictError, NoSuchVolume, UsageError


@pytest.fixture
def volumes(engine: Engine) -> Iterator[Engine]:
    yield engine
    for container in engine.containers.list(all=True):
        container.remove(force=True)
    for volume in engine.volumes.list():
        volume.remove(force=True)


def test_life_of_a_volume(volumes: Engine) -> None:
    volume = volumes.volumes.create("data", labels={"course": "os"})
    assert volumes.volumes.create("data") == volume
    assert volume.attrs["Mountpoint"] == str(volume.mountpoint)
    assert volume.attrs["Labels"] == {"course": "os"}
    assert volumes.volumes.list(filters={"label": "course=os"}) == [volume]
    assert volumes.volumes.list(filters={"name": "other"}) == []
    assert "data" in repr(volumes.volumes.list())
    assert "<table" in volume._repr_html_()
    volume.remove()
    assert not volume.mountpoint.exists()
    with pytest.raises(NoSuchVolume):
        volumes.volumes.get("data")
    with pytest.raises(NoSuchVolume):
        volumes.volumes.remove("data")
    volumes.volumes.remove("data", force=True)


@pytest.mark.parametrize(("name", "words"), [("a/b", "invalid characters"), ("x", "too short")])
def test_bad_names(volumes: Engine, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        volumes.volumes.create(name)


def test_bad_filter(volumes: Engine) -> None:
    with pytest.raises(UsageError, match="invalid filter 'colour'"):
        volumes.volumes.list(filters={"colour": "red"})


def test_data_outlives_containers(volumes: Engine) -> None:
    run = volumes.containers.run
    run("busybox", ["sh", "-c", "echo kept > /data/file"], remove=True, volumes=["keep:/data"])
    assert run("busybox", "cat /data/file", remove=True, volumes={"keep": {"bind": "/data", "mode": "ro"}}) == b"kept\n"


def test_read_only(volumes: Engine) -> None:
    out = volumes.containers.run(
        "busybox", ["sh", "-c", "touch /data/x 2>&1; true"], remove=True, volumes=["keep:/data:ro"]
    )
    assert b"Read-only file system" in out


def test_first_use_copies_from_the_image(volumes: Engine) -> None:
    run = volumes.containers.run
    inside = run("busybox", "ls /bin", remove=True)
    assert run("busybox", "/bin/ls /copy", remove=True, volumes=["bins:/bin", "bins:/copy"]) == inside
    assert run("busybox", "ls /x", remove=True, volumes=["empty:/bin2:nocopy", "empty:/x"]) == b""


def test_a_used_volume_stays(volumes: Engine) -> None:
    container = volumes.containers.create("busybox", "true", volumes=["used:/data"])
    with pytest.raises(ConflictError, match="volume is in use"):
        volumes.volumes.remove("used")
    assert volumes.volumes.list(filters={"dangling": "false"}) == [volumes.volumes.get("used")]
    container.remove()
    volumes.volumes.remove("used")


def test_anonymous_volumes_go_with_their_container(volumes: Engine) -> None:
    kept = volumes.containers.create("busybox", "true", volumes=["/anon"])
    assert len(volumes.volumes.list()) == 1
    kept.remove()
    assert volumes.volumes.prune()["VolumesDeleted"]
    volumes.containers.create("busybox", "true", volumes=["/anon"]).remove(v=True)
    volumes.containers.run("busybox", "true", volumes=["/anon"], remove=True)
    assert volumes.volumes.list() == []


def test_prune_spares_named_volumes(volumes: Engine) -> None:
    volumes.volumes.create("named")
    assert volumes.volumes.prune()["VolumesDeleted"] == []
    assert volumes.volumes.prune({"all": "true"})["VolumesDeleted"] == ["named"]


def test_nothing_is_left_when_creation_fails(volumes: Engine) -> None:
    volumes.containers.create("busybox", "true", name="taken")
    before = {path.name for path in volumes.layout.containers.iterdir()}
    with pytest.raises(ConflictError):
        volumes.containers.create("busybox", "true", name="taken", volumes=["/anon"])
    assert volumes.volumes.list() == []
    # fewer is fine: what an earlier test ran may only now be tidied away
    assert {path.name for path in volumes.layout.containers.iterdir()} <= before
