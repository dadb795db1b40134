"""Artifacts: files attached to an image in a registry, listed and fetched, with and without the referrers API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from registries import OCI_MANIFEST, MadeImage, digest_of, docker_registry, scripted, serving

from labkernel.engine import Engine
from labkernel.errors import ManifestError, UsageError
from labkernel.terminal import TerminalHost, run


@pytest.fixture(params=["ours", "without referrers"])
def domain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Our registry; and Debian's docker-registry 2.8, which knows the tag schema only."""
    with serving(tmp_path) if request.param == "ours" else docker_registry(tmp_path) as found:
        yield found


def test_files_are_attached_listed_and_fetched(
    engine: Engine, domain: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"{domain}/class/web:v1"
    engine.images.tag(engine.images.resolve("lab/busybox").id, name)
    engine.pushes.push(name)
    engine.images.remove(name)
    (tmp_path / "bom.json").write_text('{"packages": []}')
    (tmp_path / "big").write_bytes(b"0123456789" * 200_000)
    first = engine.artifacts.attach(name, [tmp_path / "bom.json"], artifact_type="application/spdx+json")
    host = TerminalHost(lambda: engine)
    words = ["--annotation", "by=ada", "--artifact-type", "text/plain", name]
    assert run(["image", "attach", *words, str(tmp_path / "big"), str(tmp_path / "bom.json")], host) == 0
    second = capfd.readouterr().out.strip()
    found = {each.digest: each for each in engine.artifacts.referrers(name)}
    assert set(found) == {first, second}
    assert found[second].annotations == {"by": "ada"}
    assert [each.digest for each in engine.artifacts.referrers(name, artifact_type="text/plain")] == [second]
    assert run(["image", "referrers", "--json", name], host) == 0
    assert {each["digest"] for each in json.loads(capfd.readouterr().out)} == {first, second}
    assert run(["image", "fetch", "-o", str(tmp_path / "out"), f"{domain}/class/web@{second}"], host) == 0
    assert (tmp_path / "out/big").read_bytes() == (tmp_path / "big").read_bytes()
    assert (tmp_path / "out/bom.json").read_bytes() == (tmp_path / "bom.json").read_bytes()
    with pytest.raises(ManifestError, match="not a container image"):
        engine.pulls.pull(f"{domain}/class/web@{first}")
    with pytest.raises(ManifestError, match="is an image"):
        engine.artifacts.fetch(name, tmp_path / "none")
    with pytest.raises(UsageError, match="cannot read"):
        engine.artifacts.attach(name, [tmp_path / "nothing"])


def test_names_that_lead_elsewhere_are_refused(engine: Engine, tmp_path: Path) -> None:
    with scripted() as fake:
        for title in ("../x", "/etc/x", "a/b", "..", ".bashrc", "a\\b"):

            def describe(manifest: dict[str, object], config: dict[str, object], title: str = title) -> None:
                layers: list[dict[str, object]] = manifest["layers"]  # type: ignore[assignment]
                layers[0]["annotations"] = {"org.opencontainers.image.title": title}
                empty = b"{}"
                manifest["config"] = {
                    "mediaType": "application/vnd.oci.empty.v1+json",
                    "digest": digest_of(empty),
                    "size": len(empty),
                }

            made = MadeImage({"x": b"x"}, describe=describe)
            fake.document("v1", made.manifest, OCI_MANIFEST)
            fake.blobs.update(made.blobs)
            with pytest.raises(ManifestError, match="refused"):
                engine.artifacts.fetch(f"{fake.domain}/x:v1", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
