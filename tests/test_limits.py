"""Limits that a user sets: in registries.toml, or in LABKERNEL_LIMITS; and images at the edge of them."""

from __future__ import annotations

from typing import Any

import pytest
from registries import MadeImage, scripted

from labkernel.engine import Engine
from labkernel.errors import LabkernelError, LayerError, ManifestError, UsageError
from labkernel.oci.endpoints import Limits, Settings


def test_limits_come_from_the_settings_and_the_environment() -> None:
    text = '[limits]\nlayers = 50\nlayer_bytes = "2g"\nstall_s = 5\n'
    found = Settings.parse(text, "x.toml", {"LABKERNEL_LIMITS": "layers=20, image_bytes=1m"}).limits
    assert (found.layers, found.layer_bytes, found.stall_s, found.image_bytes) == (20, 2 << 30, 5.0, 1 << 20)
    assert found.answer_s == Limits().answer_s
    assert Settings.parse("", "x.toml", {}).limits == Limits()


@pytest.mark.parametrize(
    ("text", "variable", "match"),
    [
        ("[limits]\nlayer = 5\n", "", "no limit is called 'layer'"),
        ("[limits]\nlayers = 0\n", "", "x.toml: layers = 0 is no positive number"),
        ('[limits]\nlayers = "many"\n', "", "no positive number"),
        ("limits = 5\n", "", "limits is a table"),
        ("", "layer_bytes=lots", "LABKERNEL_LIMITS: layer_bytes"),
        ("", "layers", "LABKERNEL_LIMITS: layers = ''"),
    ],
)
def test_limits_that_mean_nothing_are_said(text: str, variable: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Settings.parse(text, "x.toml", {"LABKERNEL_LIMITS": variable})


@pytest.mark.parametrize(
    ("limit", "kind", "match"),
    [
        ("layers=2", ManifestError, "the image has 3 layers: more than 2 are refused"),
        ("image_bytes=100", ManifestError, "more than 100 are refused"),
        ("layer_bytes=50k", LayerError, "unpacks to more than 51200 bytes"),
        ("layer_members=1", LayerError, "more than 1 members"),
    ],
)
def test_an_image_beyond_a_limit_is_refused_with_the_way_to_change_it(
    fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch, limit: str, kind: type[LabkernelError], match: str
) -> None:
    monkeypatch.setenv("LABKERNEL_LIMITS", limit)
    with scripted() as fake:
        fake.hold(MadeImage({"a": bytes(100_000)}, {"b": b"b", "c": b"c"}, {"d": b"d"}))
        with pytest.raises(kind, match=match) as caught:
            fresh_engine.pulls.pull(f"{fake.domain}/web")
    assert limit.partition("=")[0] in (caught.value.resolution or "")
    assert not list(fresh_engine.blobs)
    assert not list(fresh_engine.layout.layers.iterdir())


def test_more_than_a_hundred_layers_are_pulled_and_run(fresh_engine: Engine) -> None:
    base = fresh_engine.images.resolve("lab/busybox").layers[0]

    def describe(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        lowest = {"mediaType": base.media_type, "digest": base.digest, "size": base.size_bytes}
        manifest["layers"].insert(0, lowest)
        config["rootfs"]["diff_ids"].insert(0, base.diff_id)

    made = MadeImage(*({f"n/{number}": b"%d" % number} for number in range(149)), describe=describe)
    with scripted() as fake:
        fake.hold(made)
        fake.blobs[base.digest] = fresh_engine.blobs.read(base.digest, base.size_bytes)
        name = f"{fake.domain}/many"
        fresh_engine.pulls.pull(name)
    said = fresh_engine.containers.run(name, ["sh", "-c", "ls /n | wc -l; cat /n/0 /n/148"], remove=True)
    assert said.split() == [b"149", b"0148"]
