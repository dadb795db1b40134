from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.engine import Engine
from labkernel.errors import ConflictError, NoSuchVolume, NotFoundError, UsageError


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


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_snapshot_and_restore(volumes: Engine) -> None:
    run = volumes.containers.run
    fill = "echo first > /data/file; ln -s file /data/link; mkdir /data/dir; chmod 700 /data/dir; chown 7:8 /data/file"
    if volumes.driver.single_id:
        fill = fill.rpartition(";")[0]
    run("lab/busybox", ["sh", "-c", fill], remove=True, volumes=["keep:/data"], network_mode="none")
    volume = volumes.volumes.get("keep")
    show = "cd /data; find . | sort; stat -c '%a %u:%g' file dir; readlink link; cat file"

    def shown() -> bytes:
        found: bytes = run("lab/busybox", ["sh", "-c", show], remove=True, volumes=["keep:/data"], network_mode="none")
        return found

    before = shown()
    assert volume.snapshot("fresh") == "fresh"
    spoil = "rm -r /data/link /data/dir; echo second > /data/file; touch /data/more"
    run("lab/busybox", ["sh", "-c", spoil], remove=True, volumes=["keep:/data"], network_mode="none")
    second = volume.snapshot()
    assert [each["Name"] for each in volume.attrs["Labkernel"]["Snapshots"]] == ["fresh", second]
    assert volume.restore("fresh") == "fresh"
    assert shown() == before
    assert volume.restore() == second
    assert shown() != before
    assert volume.restore("fresh") == "fresh"  # what was restored once is still there
    assert shown() == before
    folder = volume.mountpoint.parent / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == sorted([second, "fresh"])  # nothing half made
    (folder / ".left").mkdir()  # by a killed worker
    volume.restore("fresh")
    assert not (folder / ".left").exists()
    volume.remove_snapshot(second)
    assert [each["Name"] for each in volume.snapshots()] == ["fresh"]
    volume.remove()
    assert not folder.exists()


def test_snapshots_that_cannot_be(volumes: Engine) -> None:
    volume = volumes.volumes.create("keep")
    with pytest.raises(NotFoundError, match="No such snapshot: keep"):
        volume.restore()
    volume.snapshot("one")
    for name, kind in (("one", ConflictError), ("../x", UsageError), (".x", UsageError)):
        with pytest.raises(kind):
            volume.snapshot(name)
    for act in (volume.restore, volume.remove_snapshot):
        with pytest.raises(NotFoundError, match="No such snapshot: keep:two"):
            act("two")
    container = volumes.containers.run(
        "lab/busybox", "sleep 600", detach=True, volumes=["keep:/data"], network_mode="none"
    )
    with pytest.raises(ConflictError, match="in use by running containers"):
        volume.restore()
    container.remove(force=True)
    assert volume.restore() == "one"


def test_a_volume_that_is_a_directory_elsewhere(volumes: Engine, tmp_path: Path) -> None:
    options = {"type": "none", "o": "bind", "device": str(tmp_path / "data")}
    volume = volumes.volumes.create("there", driver_opts=options)
    assert volume.attrs["Options"] == options
    settings = {"remove": True, "volumes": ["there:/data"], "network_mode": "none"}
    with pytest.raises(UsageError, match="no such directory"):
        volumes.containers.run("lab/busybox", ["touch", "/data/x"], **settings)
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    volumes.containers.run("lab/busybox", ["touch", "/data/x"], **settings)
    assert (tmp_path / "data" / "x").exists()
    volume.snapshot("one")
    (tmp_path / "data" / "x").unlink()
    volume.restore("one")
    assert (tmp_path / "data" / "x").exists()
    volume.remove()
    assert (tmp_path / "data" / "x").exists()  # the directory is not the store's


@pytest.mark.parametrize(
    "options", [{"type": "tmpfs", "device": "tmpfs"}, {"frob": "1"}, {"o": "bind"}, {"o": "bind", "device": "data"}]
)
def test_options_of_drivers_that_are_not_there(volumes: Engine, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        volumes.volumes.create("there", driver_opts=options)
    assert volumes.volumes.list(filters={"name": "there"}) == []
