"""Pulls and pushes against Debian's docker-registry, and against registries that lie, stall and send without end."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from registries import (
    OCI_INDEX,
    OCI_MANIFEST,
    Answer,
    MadeImage,
    Scripted,
    digest_of,
    docker_registry,
    make_bcrypt,
    scripted,
)

from labkernel.engine import Engine
from labkernel.errors import CorruptBlob, DiskFull, LabkernelError, LayerError, ManifestError, RegistryError
from labkernel.imaging.pulls import Pulls
from labkernel.oci import registry as client
from labkernel.oci.connections import Patience
from labkernel.oci.endpoints import Limits
from labkernel.oci.registry import Persistence, Refused, Registry

QUICK = Persistence(retries=2, pause_s=0.01)


class QuickPulls(Pulls):
    """Pulls that lose patience within a test."""

    def open(self, domain: str, *, notify: Any, mirrors: bool = True) -> Registry:
        patience = Patience(connect_s=2, stall_s=1.0, answer_s=1.5)
        return Registry(
            domain, settings=self.settings, mirrors=mirrors, notify=notify, patience=patience, persistence=QUICK
        )


@pytest.fixture
def fake() -> Iterator[Scripted]:
    with scripted() as registry:
        yield registry


@pytest.fixture
def pulls(fresh_engine: Engine) -> QuickPulls:
    return QuickPulls(fresh_engine.images)


@pytest.fixture
def image() -> MadeImage:
    return MadeImage({"etc/one": b"1" * 100_000}, {"etc/two": os.urandom(300_000), "x": b"#!/bin/sh\n"})


def content(engine: Engine) -> set[str]:
    """All that lies in the store: blobs, layers, rubbish."""
    layout = engine.layout
    places = (layout.blobs / "sha256", layout.layers, layout.tmp, layout.locks)
    return {f"{place.name}/{name}" for place in places for name in os.listdir(place) if name != "content.lock"}


def refuses(pulls: Pulls, ref: str, kind: type[LabkernelError], match: str) -> None:
    """The pull fails with this error, and nothing stays behind."""
    engine = pulls.images
    with pytest.raises(kind, match=match):
        pulls.pull(ref)
    assert not engine.list()
    assert not os.listdir(engine.layout.tmp)
    assert not list(engine.blobs) or kind is RegistryError


# -- with a real registry --------------------------------------------------------------------------------------------


def test_pull_push_and_pull_again_with_docker_registry(fresh_engine: Engine, fake: Scripted, tmp_path: Path) -> None:
    engine = fresh_engine
    made = MadeImage({"a/one": b"one"}, {"b/two": os.urandom(3_000_000)})
    fake.hold(made, "v1")
    with docker_registry(tmp_path) as domain:
        first = engine.pulls.pull(f"{fake.domain}/course/web:v1")
        assert (first.digest, first.new) == (made.digest, True)
        engine.images.tag(first.image.id, f"{domain}/course/web:v1")
        pushed = engine.pushes.push(f"{domain}/course/web:v1", chunk_bytes=1_000_000)
        assert pushed.digest == made.digest
        engine.images.tag(first.image.id, f"{domain}/other:v2")
        states: list[str] = []
        engine.pushes.push(f"{domain}/other:v2", watch=lambda layers: states.extend(each.status for each in layers))
        assert "Mounted from course/web" in states
        assert engine.pulls.tags(f"{domain}/other") == ["v2"]
        for tag in first.image.tags:
            engine.images.remove(tag)
        assert not content(engine)
        again = engine.pulls.pull(f"{domain}/course/web@{made.digest}")
        assert again.image.id == first.image.id
        one, two = (engine.images.layer_path(layer) for layer in again.image.layers)
        assert (one / "a/one").read_bytes() == b"one"
        assert (two / "b/two").stat().st_size == 3_000_000
        assert not engine.pulls.pull(f"{domain}/course/web@{made.digest}").new


def test_a_layer_is_unpacked_to_its_end_while_its_blob_becomes_durable_and_is_seen_after(
    fresh_engine: Engine, fake: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeImage({"etc/one": os.urandom(300_000)})
    fake.hold(made, "v1")
    images = fresh_engine.images
    seen: list[bool] = []
    fsync = os.fsync

    def slow_disk(fd: int) -> None:
        if "/tmp/blob-" in os.readlink(f"/proc/self/fd/{fd}") and os.fstat(fd).st_size > 300_000:
            deadline = time.monotonic() + 60
            while not seen:
                assert time.monotonic() < deadline, "the layer waits for its blob"
                time.sleep(0.01)
            assert not os.listdir(images.layout.layers)
        fsync(fd)

    apply, place = images.runtime.task, images.place_layer

    def task(call: str, /, **args: Any) -> Any:
        try:
            return apply(call, **args)
        finally:
            seen.append(True)

    def placed(layer: Any, directory: Path, done: Any) -> None:
        assert images.blobs.has(layer.digest)
        place(layer, directory, done)

    monkeypatch.setattr(os, "fsync", slow_disk)
    monkeypatch.setattr(images.runtime, "task", task)
    monkeypatch.setattr(images, "place_layer", placed)
    pulled = fresh_engine.pulls.pull(f"{fake.domain}/web:v1")
    assert (images.layer_path(pulled.image.layers[0]) / "etc/one").stat().st_size == 300_000


def test_basic_authentication_of_docker_registry(
    fresh_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    users = tmp_path / "users"
    users.write_text(f"ada:{make_bcrypt('secret')}\n")
    extra = f"auth: {{htpasswd: {{realm: test, path: {users}}}}}\n"
    with docker_registry(tmp_path, extra=extra) as domain:
        with pytest.raises(Refused, match=r"denied for .*: authentication required$"):  # told by a HEAD
            fresh_engine.pulls.pull(f"{domain}/web")
        with pytest.raises(Refused, match="incorrect username or password"):
            fresh_engine.logins.login(domain, "ada", "wrong")
        path = fresh_engine.logins.login(domain, "ada", "secret")
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(Refused, match=f"manifest for {domain}/web:latest not found"):
            fresh_engine.pulls.pull(f"{domain}/web")
        assert fresh_engine.logins.logout(domain) == (domain, True)
        assert fresh_engine.logins.logout(domain) == (domain, False)


# -- choosing --------------------------------------------------------------------------------------------------------


def test_an_index_gives_the_image_of_this_machine(pulls: QuickPulls, fake: Scripted) -> None:
    mine = pulls.pull  # the same call for both
    ours = MadeImage({"x": b"amd64"}, architecture=architecture())
    other = MadeImage({"x": b"other"}, architecture="s390x")
    for each in (ours, other):
        fake.blobs.update(each.blobs)
        fake.document(each.digest, each.manifest, OCI_MANIFEST)
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": each.digest, "size": len(each.manifest), "platform": platform}
        for each, platform in (
            (other, {"os": "linux", "architecture": "s390x"}),
            (ours, {"os": "linux", "architecture": architecture()}),
        )
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    fake.document("latest", index, OCI_INDEX)
    done = mine(f"{fake.domain}/web")
    assert done.digest == digest_of(index)
    assert done.image.architecture == architecture()
    assert mine(f"{fake.domain}/web", platform="linux/s390x").image.architecture == "s390x"
    with pytest.raises(ManifestError, match="no matching manifest for linux/riscv64"):
        mine(f"{fake.domain}/web", platform="linux/riscv64")


def architecture() -> str:
    from labkernel.oci.platforms import host_platform

    return host_platform().architecture


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_is_fetched_and_an_expired_one_replaced(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image)
    issued: list[str] = []

    def guard(handler: BaseHTTPRequestHandler) -> Answer | None:
        if handler.path.startswith("/token"):
            assert "service=reg" in handler.path
            assert "repository%3Aweb%3Apull" in handler.path
            issued.append(f"t{len(issued)}")
            return Answer(json.dumps({"token": issued[-1]}).encode())
        # The first token is good for one request only.
        good = issued and handler.headers.get("Authorization") == f"Bearer {issued[-1]}"
        if good and not (issued[-1] == "t0" and "blobs" in handler.path):
            return None
        challenge = f'Bearer realm="http://{fake.domain}/token",service="reg",scope="repository:web:pull"'
        return Answer(b"{}", 401, WWW_Authenticate=challenge)

    fake.rules.append(guard)
    assert pulls.pull(f"{fake.domain}/web").image.id
    assert issued == ["t0", "t1"]


def test_credentials_do_not_follow_a_redirect_to_another_place(
    pulls: QuickPulls, fake: Scripted, image: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"auths": {fake.domain: {"auth": "YWRhOnNlY3JldA=="}}}))
    fake.hold(image)
    with scripted() as elsewhere:
        elsewhere.hold(image)
        seen: list[str | None] = []

        def there(handler: BaseHTTPRequestHandler) -> Answer | None:
            seen.append(handler.headers.get("Authorization"))
            return None

        def here(handler: BaseHTTPRequestHandler) -> Answer | None:
            if handler.headers.get("Authorization") != "Basic YWRhOnNlY3JldA==":
                return Answer(b"{}", 401, WWW_Authenticate='Basic realm="x"')
            if "/blobs/" in handler.path:
                return Answer(b"", 307, Location=f"http://{elsewhere.domain}{handler.path}")
            return None

        elsewhere.rules.append(there)
        fake.rules.append(here)
        pulls.pull(f"{fake.domain}/web")
    assert seen
    assert set(seen) == {None}


# -- trouble on the way ----------------------------------------------------------------------------------------------


def test_a_lost_connection_is_taken_up_where_it_broke(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image)
    big = max(image.layers, key=lambda digest: len(image.blobs[digest]))
    blob = image.blobs[big]

    def breaks(handler: BaseHTTPRequestHandler) -> Answer | None:
        if handler.path.endswith(big) and "Range" not in handler.headers:
            half = len(blob) // 2
            return Answer(send=lambda h: h.wfile.write(blob[:half]) and None, Content_Length=str(len(blob)))
        return None

    fake.rules.append(breaks)
    pulls.pull(f"{fake.domain}/web")
    assert [line for line in fake.asked if big in line and line.endswith(f"bytes={len(blob) // 2}-")]


def test_a_busy_registry_is_asked_again_and_one_that_says_no_is_explained(
    pulls: QuickPulls, fake: Scripted, image: MadeImage
) -> None:
    fake.hold(image)
    answers = [Answer(b"", 503), Answer(b"", 429, Retry_After="0")]
    fake.rules.append(lambda handler: answers.pop() if answers else None)
    assert pulls.pull(f"{fake.domain}/web").new
    limit = Answer(
        b'{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit"}]}',
        429,
        Retry_After="1200",
        RateLimit_Limit="100;w=21600",
    )
    fake.rules.append(lambda handler: limit)
    with pytest.raises(Refused, match="pull rate limit") as caught:
        pulls.pull(f"{fake.domain}/other")
    text = "\n".join(caught.value.render())
    assert "try again in 20 minutes" in text
    assert "100 pulls every 6 hours" in text


@pytest.mark.parametrize(
    ("what", "kind", "match"),
    [
        ("other bytes", CorruptBlob, "not those of"),
        ("fewer bytes", RegistryError, "breaks off|announced"),
        ("more bytes", RegistryError, "where .* were announced"),
        ("endless", RegistryError, "more bytes where"),
        ("stalls", RegistryError, "does not answer"),
        ("drips headers", RegistryError, "too long|does not answer"),
        ("wrong range", RegistryError, "another range"),
        ("redirects in circles", RegistryError, "circles"),
        ("redirects to a file", RegistryError, "not HTTP"),
        ("gone", Refused, "does not have"),
    ],
)
def test_a_registry_that_cheats_with_a_layer(
    pulls: QuickPulls, fake: Scripted, image: MadeImage, what: str, kind: type[LabkernelError], match: str
) -> None:
    fake.hold(image)
    bad = max(image.layers, key=lambda digest: len(image.blobs[digest]))
    blob = image.blobs[bad]
    released = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        while not released.is_set():
            handler.wfile.write(blob)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        for _ in range(200):
            handler.wfile.write(b"x")
            if released.wait(0.1):
                return

    answers = {
        "other bytes": lambda h: Answer(blob[:-9] + bytes(9)),
        "fewer bytes": lambda h: Answer(blob[:-9]),
        "more bytes": lambda h: Answer(blob + b"more"),
        "endless": lambda h: Answer(send=endless),
        "stalls": lambda h: Answer(send=lambda h: released.wait(20) and None, Content_Length=str(len(blob))),
        "drips headers": lambda h: Answer(send=drip, X_Long="1"),
        "wrong range": lambda h: Answer(
            *((blob[:1000],) if "Range" not in h.headers else (blob, 206)),
            **({"Content_Range": f"bytes 0-9/{len(blob)}"} if "Range" in h.headers else {}),
            **({"Content_Length": str(len(blob))} if "Range" not in h.headers else {}),
            send=None if "Range" in h.headers else (lambda h: h.wfile.write(blob[:1000]) and None),
        ),
        "redirects in circles": lambda h: Answer(b"", 302, Location=h.path),
        "redirects to a file": lambda h: Answer(b"", 302, Location="file:///etc/passwd"),
        "gone": lambda h: Answer(b"", 404),
    }
    fake.rules.append(lambda h: answers[what](h) if h.path.endswith(bad) else None)
    try:
        if what == "drips headers":
            match = "bytes a second|does not answer|breaks off"
        refuses(pulls, f"{fake.domain}/web", kind, match)
    finally:
        released.set()


def test_manifests_that_lie(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image)
    domain = fake.domain

    def with_manifest(raw: bytes, media_type: str = OCI_MANIFEST) -> None:
        fake.document("latest", raw, media_type)

    fake.rules.append(
        lambda h: Answer(image.manifest, Docker_Content_Digest="sha256:" + "0" * 64) if "/lie" in h.path else None
    )
    refuses(pulls, f"{domain}/lie", RegistryError, "other bytes")
    fake.rules.append(lambda h: Answer(b"{}" * (3 << 20)) if "/bomb" in h.path else None)
    refuses(pulls, f"{domain}/bomb", RegistryError, "more than")
    with_manifest(json.dumps({"schemaVersion": 1, "fsLayers": []}).encode())
    refuses(pulls, f"{domain}/old", ManifestError, "schema 1")
    with_manifest(b"<html>welcome</html>", "text/html")
    refuses(pulls, f"{domain}/portal", ManifestError, "invalid manifest")
    many = MadeImage(*[{"x": b"x"}] * 3, describe=lambda m, c: m["layers"].extend(m["layers"] * 300))
    with_manifest(many.manifest)
    fake.blobs.update(many.blobs)
    refuses(pulls, f"{domain}/many", ManifestError, "layers")
    huge = MadeImage({"x": b"x"}, describe=lambda m, c: m["layers"][0].update(size=1 << 62))
    with_manifest(huge.manifest)
    fake.blobs.update(huge.blobs)
    refuses(pulls, f"{domain}/huge", ManifestError, "are refused")
    vars(pulls.images)["limits"] = Limits(image_bytes=1 << 63)
    refuses(pulls, f"{domain}/huge", DiskFull, "more than are free")
    artifact = MadeImage({"x": b"x"}, describe=lambda m, c: m.update(artifactType="application/vnd.cat"))
    raw = json.loads(artifact.manifest)
    raw["config"]["mediaType"] = "application/vnd.oci.empty.v1+json"
    with_manifest(json.dumps(raw).encode())
    refuses(pulls, f"{domain}/cat", ManifestError, "artifact of type application/vnd.cat")


def test_indexes_that_never_end(pulls: QuickPulls, fake: Scripted) -> None:
    # No index can name itself by digest; a chain of them can be long.
    inner = b'{"schemaVersion": 2, "manifests": []}'
    for number in range(9):
        entry = {"mediaType": OCI_INDEX, "digest": digest_of(inner), "size": len(inner)}
        inner = json.dumps(
            {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry], "annotations": {"n": str(number)}}
        ).encode()
        fake.document("latest", inner, OCI_INDEX)
    refuses(pulls, f"{fake.domain}/chain", ManifestError, "indexes point at each other")


def test_a_layer_that_is_not_what_its_config_says(pulls: QuickPulls, fake: Scripted) -> None:
    bad = MadeImage({"x": b"x"}, describe=lambda m, c: c["rootfs"].update(diff_ids=["sha256:" + "1" * 64]))
    fake.hold(bad)
    refuses(pulls, f"{fake.domain}/web", LayerError, "its config says")


# -- together --------------------------------------------------------------------------------------------------------


def test_two_pulls_of_one_layer_fetch_it_once(fresh_engine: Engine, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image)
    begun = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> Answer | None:
        if "/blobs/" in handler.path:
            begun.set()
            time.sleep(0.3)
        return None

    fake.rules.append(slow)
    done: list[bool] = []
    other = Engine.open(fresh_engine.layout.root, runtime_dir=fresh_engine.layout.runtime_dir)
    threads = [
        threading.Thread(target=lambda e=each: done.append(bool(QuickPulls(e.images).pull(f"{fake.domain}/web").image)))
        for each in (fresh_engine, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert done == [True, True]
    for digest in image.layers:
        assert sum(digest in line for line in fake.asked) == 1


def test_an_interrupted_pull_leaves_nothing(fresh_engine: Engine, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image)
    released = threading.Event()
    big = max(image.layers, key=lambda digest: len(image.blobs[digest]))
    hang = Answer(send=lambda h: released.wait(30) and None, Content_Length=str(len(image.blobs[big])))
    fake.rules.append(lambda h: hang if h.path.endswith(big) else None)

    def interrupt(layers: Any) -> None:
        if any(big in line for line in fake.asked):
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            fresh_engine.pulls.pull(f"{fake.domain}/web", watch=interrupt)
    finally:
        released.set()
    assert not content(fresh_engine)
    assert not fresh_engine.images.list()


def test_as_a_plain_user(plain_user: Any, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image)
    done = plain_user.labkernel("pull", f"{fake.domain}/course/web")
    if "user namespace" in done.stderr or "no driver" in done.stderr:
        pytest.skip(done.stderr.strip()[:200])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{fake.domain}/course/web:latest"
    assert "Status: Downloaded newer image" in done.stdout
    assert plain_user.labkernel("system", "check").returncode == 0


def test_retry_after_in_both_forms() -> None:
    assert client.retry_after("12") == 12
    assert client.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert client.retry_after("soon") is None
