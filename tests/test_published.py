"""The registry on the store itself: its images can be pulled, what is pushed is kept, nobody's content is collected."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from registries import OCI_MANIFEST, MadeImage, ask, digest_of, give, give_image, serving

from labkernel.engine import Engine
from labkernel.errors import UsageError
from labkernel.imaging.published import StoreDepot, published_blobs
from labkernel.oci.depot import Problem
from labkernel.registries import Options


@pytest.fixture
def image() -> MadeImage:
    return MadeImage({"x": os.urandom(1000)}, {"y": b"y"})


@pytest.fixture
def domain(fresh_engine: Engine, tmp_path: Path) -> Iterator[str]:
    fresh_engine.images.resolve("lab/busybox")
    env = {
        "LABKERNEL_ROOT": str(fresh_engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(fresh_engine.layout.runtime_dir),
    }
    with serving(tmp_path, "--store", env=env) as found:
        yield found


def test_images_of_the_store_can_be_pulled(fresh_engine: Engine, domain: str, tmp_path: Path) -> None:
    fresh_engine.images.tag("lab/busybox", "web:v1")
    assert ask(domain, "GET", "/v2/_catalog").json == {"repositories": ["lab/busybox", "web"]}
    for path in ("web", "library/web"):
        assert ask(domain, "GET", f"/v2/{path}/tags/list").json["tags"] == ["v1"]
        assert ask(domain, "HEAD", f"/v2/{path}/manifests/v1").status == 200
    reply = ask(domain, "DELETE", "/v2/web/manifests/v1")
    assert (reply.status, reply.code) == (405, "UNSUPPORTED")
    assert ask(domain, "GET", "/v2/other/tags/list").status == 404
    with Engine.open(tmp_path / "second", runtime_dir=tmp_path / "s") as other:
        pulled = other.pulls.pull(f"{domain}/web:v1", unpack=False)
        assert pulled.image == other.images.get(f"{domain}/web:v1")
        assert pulled.image.id == fresh_engine.images.get("web:v1").id


def test_what_is_pushed_is_among_the_stores_blobs_and_stays(
    fresh_engine: Engine, domain: str, image: MadeImage
) -> None:
    assert give_image(domain, "class/web", "v1", image).status == 201
    blobs = fresh_engine.blobs
    assert all(blobs.has(digest) for digest in (*image.blobs, image.digest))
    assert published_blobs(fresh_engine.layout) == {*image.blobs, image.digest}
    fresh_engine.images.prune({"dangling": False})
    assert ask(domain, "GET", f"/v2/class/web/blobs/{image.layers[0]}").body == image.blobs[image.layers[0]]
    name = f"{domain}/class/web:v1"
    assert fresh_engine.pulls.pull(name).new
    fresh_engine.images.remove(name)
    assert all(blobs.has(digest) for digest in (*image.blobs, image.digest))
    assert ask(domain, "DELETE", f"/v2/class/web/manifests/{image.digest}").status == 202
    assert fresh_engine.registry.collect(Options(store=True)) == (1, len(image.manifest))  # all else is young
    assert all(blobs.has(digest) for digest in image.blobs)
    count, _ = fresh_engine.registry.collect(Options(store=True), grace_s=-1)
    assert count == len(image.blobs)
    assert not any(blobs.has(digest) for digest in image.blobs)


def test_a_push_of_the_store_to_itself_sends_nothing(fresh_engine: Engine, domain: str) -> None:
    name = f"{domain}/class/own:v1"
    fresh_engine.images.tag("lab/busybox", name)
    said: set[str] = set()
    fresh_engine.pushes.push(name, watch=lambda states: said.update(state.status for state in states))
    assert "Pushing" not in said
    assert "Layer already exists" in said
    fresh_engine.images.remove(name)
    assert ask(domain, "HEAD", "/v2/class/own/manifests/v1").status == 200


def test_the_quota_counts_what_was_pushed(fresh_engine: Engine, image: MadeImage) -> None:
    fresh_engine.images.resolve("lab/busybox")
    depot = StoreDepot(fresh_engine.images, address="127.0.0.1:1", quota_bytes=1000)
    upload = depot.start_upload("web")
    upload.write(b"x" * 900)
    upload.finish(digest_of(b"x" * 900))
    with pytest.raises(Problem, match="quota"):
        depot.start_upload("web").write(b"y" * 200)
    with pytest.raises(UsageError, match="exclude each other"):
        fresh_engine.registry.depot(Options(store=True, root="/x"))


def test_collections_beside_pushes_take_nothing_that_is_needed(
    fresh_engine: Engine, domain: str, tmp_path: Path
) -> None:
    """Both collections run all the time, one without any grace for what is named; each push must end whole."""
    ended = threading.Event()
    trouble: list[BaseException] = []

    def collect() -> None:
        while not ended.is_set():
            try:
                fresh_engine.images.sweep()
                fresh_engine.registry.collect(Options(store=True))
            except BaseException as err:
                trouble.append(err)
                return

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for number in range(12):
            made = MadeImage({"x": os.urandom(2000)}, {"y": b"shared"})
            assert give_image(domain, f"p/n{number % 3}", "latest", made).status == 201
            for digest in (*made.blobs, made.digest):
                kind = "manifests" if digest == made.digest else "blobs"
                assert ask(domain, "HEAD", f"/v2/p/n{number % 3}/{kind}/{digest}").status == 200
    finally:
        ended.set()
        thread.join(60)
    assert not trouble


def test_an_image_on_this_machine_is_not_served(fresh_engine: Engine) -> None:
    if fresh_engine.driver.name != "root":
        pytest.skip("lab/host needs the root driver")
    fresh_engine.images.resolve("lab/host")
    depot = StoreDepot(fresh_engine.images, address="127.0.0.1:1")
    with pytest.raises(Problem):
        depot.find_manifest("lab/host", "latest")
    fresh_engine.images.resolve("lab/busybox")
    assert depot.find_manifest("lab/busybox", "latest").media_type == OCI_MANIFEST


def test_blobs_of_one_repository_are_not_shown_in_another(domain: str) -> None:
    digest = give(domain, "secret", b"words")
    assert ask(domain, "HEAD", f"/v2/public/blobs/{digest}").status == 404
    assert ask(domain, "HEAD", f"/v2/secret/blobs/{digest}").status == 200
