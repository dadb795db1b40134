"""`image verify` and `images --tree`: damage of each kind is found, said and mended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registries import MadeImage, Scripted, scripted

from labkernel.cli import TerminalHost, run
from labkernel.engine import Engine
from labkernel.imaging.verification import repair, verify_images


@pytest.fixture
def fake() -> Iterator[Scripted]:
    with scripted() as registry:
        yield registry


@pytest.fixture
def name(fresh_engine: Engine, fake: Scripted) -> str:
    fake.hold(MadeImage({"a": b"lower" * 1000}, {"b": b"upper" * 1000}))
    name = f"{fake.domain}/lab/two:latest"
    fresh_engine.pulls.pull(name)
    return name


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def test_a_good_image_is_said_to_be_good(fresh_engine: Engine, name: str) -> None:
    (verdict,) = verify_images(fresh_engine.images, [name])
    assert verdict.good
    assert verdict.blobs == 4
    assert verdict.to_dict()["repair"] is None


def test_damage_is_found_and_mended(fresh_engine: Engine, name: str) -> None:
    images = fresh_engine.images
    image = images.get(name)
    parts = {"manifest": images.catalog_row(image).manifest, "config": image.id, "layer": image.layers[1].digest}
    for part, digest in parts.items():
        for change in (flipped, lambda data: data[:-1], None):
            if change is None:
                images.blobs.path(digest).unlink()
            else:
                spoil(images.blobs.path(digest), change)
            (verdict,) = verify_images(images)
            assert [(damage.part, damage.digest) for damage in verdict.damages] == [(part, digest)]
            assert f"--repair {name}" in verdict.repair
            assert repair(images, fresh_engine.pulls, verdict) == image
            (verdict,) = verify_images(images)
            assert verdict.good


def test_the_command_tells_and_ends_with_1(fresh_engine: Engine, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    host = TerminalHost(lambda: fresh_engine)
    assert run(["image", "verify"], host) == 0
    assert f"{name}: good (4 blobs" in capfd.readouterr().out
    layer = fresh_engine.images.get(name).layers[0]
    spoil(fresh_engine.images.blobs.path(layer.digest), flipped)
    assert run(["image", "verify", "--json", name], host) == 1
    told = capfd.readouterr()
    (entry,) = json.loads(told.out)
    assert entry["damages"][0]["part"] == "layer"
    assert not entry["good"]
    assert "is damaged" in told.err
    assert "--repair" in told.err
    assert run(["image", "verify", "--repair"], host) == 0
    assert f"{name}: good" in capfd.readouterr().out
    assert run(["image", "verify", "nothing-of-this-name"], host) == 1


def test_an_image_of_this_machine_tells_how_to_make_it_anew(fresh_engine: Engine) -> None:
    image = fresh_engine.images.resolve("lab/busybox")
    os.unlink(fresh_engine.images.blobs.path(image.layers[0].digest))
    (verdict,) = verify_images(fresh_engine.images, ["lab/busybox"])
    assert not verdict.good
    assert "labkernel pull lab/busybox" in verdict.repair


def test_the_tree_shows_names_platform_and_use(
    fresh_engine: Engine, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh_engine.images.tag(name, "other:v1")
    host = TerminalHost(lambda: fresh_engine)
    assert run(["image", "ls", "--tree"], host) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["IMAGE", "ID", "DISK", "USAGE", "CONTENT", "SIZE", "IN", "USE"]
    assert any(line.startswith(("├─ other:v1", "other:v1")) for line in lines)
    assert any(line.startswith("└─ linux/amd64") for line in lines)
    assert run(["images", "--tree", "-q"], host) == 1
