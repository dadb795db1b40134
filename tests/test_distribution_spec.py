"""The private registry against OCI distribution-spec 1.1, endpoint by endpoint (the table "Endpoints": end-1 … end-13).

The official conformance program is in Go and needs modules from outside. What it asks is asked here in our words: each
test is named by its endpoint, and tries its good and its listed bad answers. The registry runs on its own directory and
on the store (`--store`).
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from registries import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    MadeImage,
    Reply,
    ask,
    digest_of,
    docker_registry,
    give,
    give_image,
    serving,
)

EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
NOWHERE = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module", params=["own directory", "store"])
def domain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    words = ["--store"] if request.param == "store" else []
    with serving(tmp_path_factory.mktemp("spec"), *words) as found:
        yield found


@pytest.fixture
def name() -> str:
    return f"spec/{os.urandom(4).hex()}"


@pytest.fixture
def image() -> MadeImage:
    return MadeImage({"x": os.urandom(500)}, {"y": os.urandom(500)})


def begin(domain: str, name: str) -> str:
    reply = ask(domain, "POST", f"/v2/{name}/blobs/uploads/", b"")
    assert reply.status == 202
    return str(reply.headers["Location"])


def with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


def put(domain: str, name: str, reference: str, manifest: dict[str, Any], kind: str = OCI_MANIFEST) -> Reply:
    return ask(domain, "PUT", f"/v2/{name}/manifests/{reference}", json.dumps(manifest).encode(), Content_Type=kind)


def artifact(subject: bytes, kind: str, note: str) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": kind,
        "config": {"mediaType": EMPTY_TYPE, "digest": digest_of(EMPTY), "size": len(EMPTY)},
        "layers": [{"mediaType": EMPTY_TYPE, "digest": digest_of(EMPTY), "size": len(EMPTY)}],
        "subject": {"mediaType": OCI_MANIFEST, "digest": digest_of(subject), "size": len(subject)},
        "annotations": {"note": note},
    }


def assert_error(reply: Reply, status: int, code: str) -> None:
    assert (reply.status, reply.code) == (status, code)
    assert set(reply.json["errors"][0]) <= {"code", "message", "detail"}


# -- pull ------------------------------------------------------------------------------------------------------------


def test_end_1_root(domain: str) -> None:
    assert ask(domain, "GET", "/v2/").status == 200
    assert_error(ask(domain, "GET", "/v1/"), 404, "NAME_UNKNOWN")


def test_end_2_blobs(domain: str, name: str) -> None:
    digest = give(domain, name, b"some bytes")
    reply = ask(domain, "GET", f"/v2/{name}/blobs/{digest}")
    assert (reply.status, reply.body, reply.headers["Docker-Content-Digest"]) == (200, b"some bytes", digest)
    reply = ask(domain, "HEAD", f"/v2/{name}/blobs/{digest}")
    assert (reply.status, reply.body, reply.headers["Content-Length"]) == (200, b"", "10")
    for words, part in (
        ("bytes=2-4", b"me "),
        ("bytes=5-", b"bytes"),
        ("bytes=-3", b"tes"),
        ("bytes=0-99", b"some bytes"),
    ):
        reply = ask(domain, "GET", f"/v2/{name}/blobs/{digest}", Range=words)
        assert (reply.status, reply.body) == (206, part)
    assert ask(domain, "GET", f"/v2/{name}/blobs/{digest}", Range="bytes=10-").status == 416
    assert ask(domain, "HEAD", f"/v2/{name}/blobs/{NOWHERE}").status == 404
    assert_error(ask(domain, "GET", f"/v2/{name}/blobs/{NOWHERE}"), 404, "BLOB_UNKNOWN")
    assert_error(ask(domain, "GET", f"/v2/{name}/blobs/sha256:abc"), 400, "DIGEST_INVALID")


def test_end_3_manifests(domain: str, name: str, image: MadeImage) -> None:
    give_image(domain, name, "v1", image)
    for reference in ("v1", image.digest):
        reply = ask(domain, "GET", f"/v2/{name}/manifests/{reference}", Accept=OCI_MANIFEST)
        assert (reply.status, reply.body, reply.headers["Content-Type"]) == (200, image.manifest, OCI_MANIFEST)
        assert reply.headers["Docker-Content-Digest"] == image.digest
        reply = ask(domain, "HEAD", f"/v2/{name}/manifests/{reference}")
        assert (reply.status, reply.headers["Content-Length"]) == (200, str(len(image.manifest)))
    for reference in ("other", NOWHERE):
        assert_error(ask(domain, "GET", f"/v2/{name}/manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
        assert ask(domain, "HEAD", f"/v2/{name}/manifests/{reference}").status == 404


# -- push ------------------------------------------------------------------------------------------------------------


def test_end_4a_5_6_streamed_and_in_chunks(domain: str, name: str) -> None:
    blob = os.urandom(3000)
    location = begin(domain, name)
    reply = ask(domain, "PATCH", location, blob, Content_Type="application/octet-stream")
    assert (reply.status, reply.headers["Range"]) == (202, "0-2999")
    assert ask(domain, "PUT", with_digest(reply.headers["Location"], digest_of(blob)), b"").status == 201
    location, other = begin(domain, name), os.urandom(3000)
    reply = ask(domain, "PATCH", location, other[1000:2000], Content_Range="1000-1999")
    assert reply.status == 416  # out of order
    reply = ask(domain, "PATCH", location, other[:1000], Content_Range="0-999")
    assert (reply.status, reply.headers["Range"]) == (202, "0-999")
    assert ask(domain, "PATCH", reply.headers["Location"], other[:1000], Content_Range="0-999").status == 416
    status = ask(domain, "GET", reply.headers["Location"])
    assert (status.status, status.headers["Range"]) == (204, "0-999")
    reply = ask(domain, "PATCH", status.headers["Location"], other[1000:2000], Content_Range="1000-1999")
    last = with_digest(reply.headers["Location"], digest_of(other))
    reply = ask(domain, "PUT", last, other[2000:], Content_Range="2000-2999")
    assert (reply.status, reply.headers["Docker-Content-Digest"]) == (201, digest_of(other))
    assert ask(domain, "GET", reply.headers["Location"]).body == other


def test_end_4a_6_monolithic(domain: str, name: str) -> None:
    blob = os.urandom(100)
    reply = ask(domain, "PUT", with_digest(begin(domain, name), digest_of(blob)), blob)
    assert (reply.status, ask(domain, "GET", reply.headers["Location"]).body) == (201, blob)
    sha512 = f"sha512:{hashlib.sha512(blob).hexdigest()}"
    assert ask(domain, "PUT", with_digest(begin(domain, name), sha512), blob).status == 201
    assert ask(domain, "GET", f"/v2/{name}/blobs/{sha512}").body == blob
    assert_error(ask(domain, "PUT", with_digest(begin(domain, name), NOWHERE), blob), 400, "DIGEST_INVALID")
    assert_error(ask(domain, "PUT", begin(domain, name), blob), 400, "DIGEST_INVALID")
    gone = begin(domain, name).rpartition("/")[0] + "/" + "0" * 32
    assert_error(ask(domain, "PUT", with_digest(gone, digest_of(blob)), blob), 404, "BLOB_UPLOAD_UNKNOWN")


def test_end_4b_one_request(domain: str, name: str) -> None:
    digest = give(domain, name, b"in one go")
    assert ask(domain, "HEAD", f"/v2/{name}/blobs/{digest}").status == 200
    reply = ask(domain, "POST", f"/v2/{name}/blobs/uploads/?digest={NOWHERE}", b"other")
    assert_error(reply, 400, "DIGEST_INVALID")
    assert ask(domain, "POST", f"/v2/{name}/blobs/uploads/?digest={digest}", b"").status in (201, 202, 400)
    assert_error(ask(domain, "POST", "/v2/Not-A-Name/blobs/uploads/", b""), 400, "NAME_INVALID")


def test_end_7_manifests(domain: str, name: str, image: MadeImage) -> None:
    reply = ask(domain, "PUT", f"/v2/{name}/manifests/v1", image.manifest, Content_Type=OCI_MANIFEST)
    assert_error(reply, 400, "MANIFEST_BLOB_UNKNOWN")
    reply = give_image(domain, name, "v1", image)
    assert (reply.status, reply.headers["Docker-Content-Digest"]) == (201, image.digest)
    assert ask(domain, "GET", reply.headers["Location"]).body == image.manifest
    assert (
        ask(domain, "PUT", f"/v2/{name}/manifests/{image.digest}", image.manifest, Content_Type=OCI_MANIFEST).status
        == 201
    )
    assert_error(put(domain, name, NOWHERE, json.loads(image.manifest)), 400, "DIGEST_INVALID")
    assert_error(put(domain, name, "v2", {"schemaVersion": 2}), 400, "MANIFEST_INVALID")
    give(domain, name, EMPTY)
    no_layers = {**artifact(EMPTY, "application/x", "n"), "layers": []}
    del no_layers["subject"]
    assert put(domain, name, "no-layers", no_layers).status == 201
    entry = {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": len(image.manifest)}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    assert put(domain, name, "several", index, OCI_INDEX).status == 201
    index["manifests"] = [{**entry, "digest": NOWHERE}]
    assert_error(put(domain, name, "several", index, OCI_INDEX), 400, "MANIFEST_BLOB_UNKNOWN")
    large = image.manifest + b" " * (4 << 20)
    assert ask(domain, "PUT", f"/v2/{name}/manifests/large", large, Content_Type=OCI_MANIFEST).status in (400, 413)


def test_end_11_mount(domain: str, name: str) -> None:
    digest = give(domain, f"{name}/source", b"shared")
    reply = ask(domain, "POST", f"/v2/{name}/blobs/uploads/?mount={digest}&from={name}/source", b"")
    assert (reply.status, reply.headers["Location"]) == (201, f"/v2/{name}/blobs/{digest}")
    assert ask(domain, "GET", reply.headers["Location"]).body == b"shared"
    reply = ask(domain, "POST", f"/v2/{name}/second/blobs/uploads/?mount={digest}", b"")  # from wherever it is
    assert (reply.status, reply.headers["Location"]) == (201, f"/v2/{name}/second/blobs/{digest}")
    assert ask(domain, "GET", reply.headers["Location"]).body == b"shared"
    for query in (f"mount={NOWHERE}&from={name}/source", f"mount={digest}&from=no/such"):
        reply = ask(domain, "POST", f"/v2/{name}/other/blobs/uploads/?{query}", b"")
        assert reply.status == 202
        assert ask(domain, "PUT", with_digest(reply.headers["Location"], digest), b"shared").status == 201


def test_end_13_how_far(domain: str, name: str) -> None:
    location = begin(domain, name)
    ask(domain, "PATCH", location, b"12345")
    reply = ask(domain, "GET", location)
    assert (reply.status, reply.headers["Range"], reply.headers["Location"]) == (204, "0-4", location)
    assert ask(domain, "DELETE", location).status == 204
    assert_error(ask(domain, "GET", location), 404, "BLOB_UPLOAD_UNKNOWN")


def test_uploads_are_of_their_repository(domain: str, name: str) -> None:
    location = begin(domain, name)
    stolen = location.replace(name, "other/one")
    assert_error(ask(domain, "PATCH", stolen, b"x"), 404, "BLOB_UPLOAD_UNKNOWN")


def test_a_body_without_a_length_is_taken(domain: str, name: str) -> None:
    """docker streams layers in HTTP/1.1 chunks."""
    location = begin(domain, name)
    connection = http.client.HTTPConnection(domain, timeout=60)
    try:
        connection.request(
            "PATCH", location, iter([b"one ", b"two"]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
        reply = Reply(connection.getresponse())
    finally:
        connection.close()
    assert (reply.status, reply.headers["Range"]) == (202, "0-6")
    assert ask(domain, "PUT", with_digest(location, digest_of(b"one two")), b"").status == 201


# -- discovery -------------------------------------------------------------------------------------------------------


def test_end_8_tags(domain: str, name: str, image: MadeImage) -> None:
    for tag in ("b", "d", "a", "c"):
        give_image(domain, name, tag, image)
    assert ask(domain, "GET", f"/v2/{name}/tags/list").json == {"name": name, "tags": ["a", "b", "c", "d"]}
    reply = ask(domain, "GET", f"/v2/{name}/tags/list?n=2")
    assert reply.json["tags"] == ["a", "b"]
    target = reply.headers["Link"].partition(">")[0].lstrip("<")
    reply = ask(domain, "GET", target)
    assert reply.json["tags"] == ["c", "d"]
    assert "Link" not in reply.headers
    assert ask(domain, "GET", f"/v2/{name}/tags/list?n=3&last=b").json["tags"] == ["c", "d"]
    assert ask(domain, "GET", f"/v2/{name}/tags/list?n=0").json["tags"] == []
    assert ask(domain, "GET", f"/v2/{name}/tags/list?last=x").json["tags"] == []
    assert_error(ask(domain, "GET", "/v2/no/such/tags/list"), 404, "NAME_UNKNOWN")


def test_end_12_referrers(domain: str, name: str, image: MadeImage) -> None:
    give(domain, name, EMPTY)
    early = artifact(image.manifest, "application/a", "before its subject")
    reply = put(domain, name, digest_of(json.dumps(early).encode()), early)
    assert (reply.status, reply.headers["OCI-Subject"]) == (201, image.digest)
    give_image(domain, name, "v1", image)
    late = {**artifact(image.manifest, "application/b", "after it"), "layers": []}
    assert put(domain, name, "named", late).headers["OCI-Subject"] == image.digest
    by_config = artifact(image.manifest, "", "type of the config")
    del by_config["artifactType"]
    assert put(domain, name, "by-config", by_config).status == 201
    index = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "artifactType": "application/b",
        "manifests": [],
        "subject": early["subject"],
        "annotations": {"note": "index"},
    }
    assert put(domain, name, "an-index", index, OCI_INDEX).headers["OCI-Subject"] == image.digest
    reply = ask(domain, "GET", f"/v2/{name}/referrers/{image.digest}")
    assert (reply.status, reply.headers["Content-Type"], reply.json["mediaType"]) == (200, OCI_INDEX, OCI_INDEX)
    found = {each["annotations"]["note"]: each["artifactType"] for each in reply.json["manifests"]}
    assert found == {
        "before its subject": "application/a",
        "after it": "application/b",
        "type of the config": EMPTY_TYPE,
        "index": "application/b",
    }
    reply = ask(domain, "GET", f"/v2/{name}/referrers/{image.digest}?artifactType=application/b")
    assert reply.headers["OCI-Filters-Applied"] == "artifactType"
    assert {each["annotations"]["note"] for each in reply.json["manifests"]} == {"after it", "index"}
    reply = ask(domain, "GET", f"/v2/{name}/referrers/{NOWHERE}")
    assert (reply.status, reply.json["manifests"]) == (200, [])
    assert ask(domain, "DELETE", f"/v2/{name}/manifests/{digest_of(json.dumps(early).encode())}").status == 202
    assert len(ask(domain, "GET", f"/v2/{name}/referrers/{image.digest}").json["manifests"]) == 3
    assert_error(ask(domain, "GET", f"/v2/{name}/referrers/nonsense"), 400, "DIGEST_INVALID")


# -- management ------------------------------------------------------------------------------------------------------


def test_end_9_and_10_deletes(domain: str, name: str, image: MadeImage) -> None:
    for tag in ("one", "two"):
        give_image(domain, name, tag, image)
    assert ask(domain, "DELETE", f"/v2/{name}/manifests/one").status == 202
    assert_error(ask(domain, "GET", f"/v2/{name}/manifests/one"), 404, "MANIFEST_UNKNOWN")
    assert ask(domain, "GET", f"/v2/{name}/manifests/{image.digest}").status == 200
    assert ask(domain, "DELETE", f"/v2/{name}/manifests/{image.digest}").status == 202
    for reference in ("two", image.digest):
        assert_error(ask(domain, "GET", f"/v2/{name}/manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
        assert_error(ask(domain, "DELETE", f"/v2/{name}/manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
    assert ask(domain, "GET", f"/v2/{name}/tags/list").json["tags"] == []
    blob = image.layers[0]
    assert ask(domain, "DELETE", f"/v2/{name}/blobs/{blob}").status == 202
    assert_error(ask(domain, "GET", f"/v2/{name}/blobs/{blob}"), 404, "BLOB_UNKNOWN")
    assert_error(ask(domain, "DELETE", f"/v2/{name}/blobs/{blob}"), 404, "BLOB_UNKNOWN")


def made(*, layers: list[dict[str, Any]], config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers, **more}


def described(blob: bytes, kind: str, *, algorithm: str = "sha256", **more: Any) -> dict[str, Any]:
    digest = f"{algorithm}:{hashlib.new(algorithm, blob).hexdigest()}"
    return {"mediaType": kind, "digest": digest, "size": len(blob), **more}


def contents(algorithm: str) -> Iterator[tuple[str, list[bytes], list[dict[str, Any]]]]:
    """What the official conformance program pushes: a kind, its blobs, its manifests in order of pushing (by digest,
    the last by a tag, too)."""

    def about(blob: bytes, kind: str, **more: Any) -> dict[str, Any]:
        return described(blob, kind, algorithm=algorithm, **more)

    def entry(manifest: dict[str, Any], **more: Any) -> dict[str, Any]:
        return about(json.dumps(manifest).encode(), manifest["mediaType"], **more)

    def index(*manifests: dict[str, Any], **more: Any) -> dict[str, Any]:
        found = [entry(each, **extra) for each, extra in zip(manifests, platforms, strict=False)]
        return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found, **more}

    platforms = [{"platform": {"os": "linux", "architecture": word}} for word in ("amd64", "arm64")]
    config, layer = b'{"os":"linux","architecture":"amd64"}', b"a layer, as far as a registry knows"
    blobs = [config, layer, EMPTY]
    parts: dict[str, Any] = {"config": about(config, OCI_CONFIG), "layers": [about(layer, OCI_LAYER)]}
    image = made(**parts)
    second = made(**parts, annotations={"number": "two"})
    empty = about(EMPTY, EMPTY_TYPE)
    away = {
        "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "digest": NOWHERE,
        "size": 12345,
        "urls": ["https://store.example/layer"],
    }
    yield "index", blobs, [image, second, index(image, second)]
    inner = index(image, second)
    yield "nested index", blobs, [image, second, inner, index(inner, inner)]
    yield "empty index", [], [index()]
    artifact_of = made(config=empty, layers=[about(layer, "application/x")], artifactType="application/x")
    yield "artifact index", blobs, [artifact_of, index(artifact_of, artifactType="application/x")]
    yield "no layers", blobs, [made(config=parts["config"], layers=[])]
    missing = {"mediaType": OCI_MANIFEST, "digest": NOWHERE, "size": 123}
    yield "missing subject", blobs, [{**artifact_of, "subject": missing}]
    inline = about(config, OCI_CONFIG, data=base64.b64encode(config).decode())
    yield "data field", blobs, [made(config=inline, layers=parts["layers"])]
    yield "layers elsewhere", blobs, [made(config=parts["config"], layers=[away, *parts["layers"]])]
    yield "fields of others", blobs, [made(**parts, **{"org.example": {"x": [1, None]}})]
    large = {f"large-{number}": "A" * 10_000 for number in range(390)}
    yield "large", blobs, [made(**parts, annotations=large)]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_content_of_every_kind_comes_and_goes(domain: str, name: str, algorithm: str) -> None:
    """Pushed, found by HEAD and GET, referred to, and deleted at once: tag, manifests from the top, blobs."""
    for kind, blobs, manifests in contents(algorithm):
        place = f"{name}/{kind.replace(' ', '-')}"
        digests = []
        for blob in blobs:
            digest = described(blob, "", algorithm=algorithm)["digest"]
            assert ask(domain, "POST", f"/v2/{place}/blobs/uploads/?digest={digest}", blob).status == 201, kind
        for manifest in manifests:
            raw = json.dumps(manifest).encode()
            digests.append(described(raw, "", algorithm=algorithm)["digest"])
            reply = put(domain, place, digests[-1], manifest, manifest["mediaType"])
            assert (reply.status, reply.headers["Docker-Content-Digest"]) == (201, digests[-1]), kind
            assert reply.headers.get("OCI-Subject") == manifest.get("subject", {}).get("digest")
            for method, body in (("HEAD", b""), ("GET", raw)):
                reply = ask(
                    domain, method, f"/v2/{place}/manifests/{digests[-1]}", Accept=f"{OCI_INDEX}, {OCI_MANIFEST}"
                )
                assert (reply.status, reply.body) == (200, body), kind
                assert reply.headers["Content-Type"] == manifest["mediaType"]
                assert reply.headers["Content-Length"] == str(len(raw))
        assert put(domain, place, "v1", manifests[-1], manifests[-1]["mediaType"]).status == 201
        assert ask(domain, "GET", f"/v2/{place}/tags/list").json["tags"] == ["v1"]
        if "subject" in manifests[-1]:
            found = ask(domain, "GET", f"/v2/{place}/referrers/{NOWHERE}").json["manifests"]
            assert digests[-1] in {each["digest"] for each in found}
        for reference in ["v1", *dict.fromkeys(reversed(digests))]:
            assert ask(domain, "DELETE", f"/v2/{place}/manifests/{reference}").status == 202, kind
            assert ask(domain, "HEAD", f"/v2/{place}/manifests/{reference}").status == 404
        for blob in blobs:
            digest = described(blob, "", algorithm=algorithm)["digest"]
            assert ask(domain, "DELETE", f"/v2/{place}/blobs/{digest}").status == 202
            assert ask(domain, "HEAD", f"/v2/{place}/blobs/{digest}").status == 404


def test_wrong_digests_are_refused_on_every_way(domain: str, name: str) -> None:
    blob, wrong = os.urandom(3000), digest_of(b"other")
    assert_error(ask(domain, "POST", f"/v2/{name}/blobs/uploads/?digest={wrong}", blob), 400, "DIGEST_INVALID")
    for pieces in ((blob, b""), (blob[:1000], blob[1000:])):
        reply = ask(domain, "PATCH", begin(domain, name), pieces[0])
        assert reply.status == 202
        reply = ask(domain, "PUT", with_digest(reply.headers["Location"], wrong), pieces[1])
        assert_error(reply, 400, "DIGEST_INVALID")
    give(domain, name, EMPTY)
    manifest = made(config=described(EMPTY, EMPTY_TYPE), layers=[], artifactType="application/x")
    raw = json.dumps(manifest).encode()
    reply = ask(domain, "PUT", f"/v2/{name}/manifests/{digest_of(raw)}", raw + b"  ", Content_Type=OCI_MANIFEST)
    assert_error(reply, 400, "DIGEST_INVALID")
    reply = ask(domain, "PUT", f"/v2/{name}/manifests/sha256:baddigest", raw, Content_Type=OCI_MANIFEST)
    assert reply.status == 400
    assert ask(domain, "GET", f"/v2/{name}/manifests/sha256:baddigest").status in (400, 404)
    assert ask(domain, "HEAD", f"/v2/{name}/blobs/{wrong}").status == 404


# -- grammar, limits and what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v2/", "GET, HEAD"),
        ("/v2/_catalog", "GET"),
        ("/v2/a/tags/list", "GET"),
        (f"/v2/a/referrers/{NOWHERE}", "GET"),
        ("/v2/a/manifests/x", "GET, HEAD, PUT, DELETE"),
        (f"/v2/a/blobs/{NOWHERE}", "GET, HEAD, DELETE"),
        ("/v2/a/blobs/uploads/", "POST"),
        (f"/v2/a/blobs/uploads/{'0' * 32}", "GET, PATCH, PUT, DELETE"),
    ],
)
def test_other_methods_are_refused_with_those_there_are(domain: str, path: str, allowed: str) -> None:
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - set(allowed.split(", ")):
        reply = ask(domain, method, path, b"" if method in ("POST", "PUT", "PATCH") else None)
        assert (reply.status, reply.headers["Allow"]) == (405, allowed), method
        if method != "HEAD":
            assert_error(reply, 405, "UNSUPPORTED")


@pytest.mark.parametrize("name", ["A", "a//b", "a..b", "-a", "a-", "a/_b", "a___b", "a b", "%2e%2e/a", "a" * 256])
def test_names_that_are_none(domain: str, name: str) -> None:
    place = name.replace(" ", "%20")
    assert_error(ask(domain, "GET", f"/v2/{place}/tags/list"), 400, "NAME_INVALID")
    assert_error(ask(domain, "POST", f"/v2/{place}/blobs/uploads/", b""), 400, "NAME_INVALID")
    assert_error(ask(domain, "GET", f"/v2/{place}/manifests/latest"), 400, "NAME_INVALID")


@pytest.mark.parametrize(
    "name", ["a", "a.b", "a_b", "a__b", "a---b", "0/1/2/3", "a" * 255, "tags/list", "blobs/uploads"]
)
def test_names_that_are_some(domain: str, name: str, image: MadeImage) -> None:
    assert give_image(domain, name, "v1", image).status == 201
    assert ask(domain, "GET", f"/v2/{name}/manifests/v1").body == image.manifest
    assert ask(domain, "GET", f"/v2/{name}/tags/list").json == {"name": name, "tags": ["v1"]}


def test_tags_that_are_some_and_that_are_none(domain: str, name: str, image: MadeImage) -> None:
    for tag in ("a", "_", "A.b-c_d", "t" * 128):
        assert give_image(domain, name, tag, image).status == 201
        assert ask(domain, "HEAD", f"/v2/{name}/manifests/{tag}").status == 200
    for tag in (".a", "-a", "t" * 129, "a%20b", "a%3Ab", "sha256%3Aabc"):
        assert_error(
            ask(domain, "PUT", f"/v2/{name}/manifests/{tag}", image.manifest, Content_Type=OCI_MANIFEST),
            400,
            "MANIFEST_INVALID",
        )
        assert_error(ask(domain, "GET", f"/v2/{name}/manifests/{tag}"), 404, "MANIFEST_UNKNOWN")


def test_manifests_of_four_mebibytes_and_of_more(domain: str, name: str) -> None:
    """distribution-spec, "Pushing Manifests": at least 4 MiB are taken; 413 for what is too much."""
    give(domain, name, EMPTY)
    plain = {**artifact(EMPTY, "application/x", ""), "layers": []}
    del plain["subject"]
    plain["annotations"]["note"] = "n" * ((4 << 20) - len(json.dumps(plain)))
    assert put(domain, name, "most", plain).status == 201
    assert len(ask(domain, "GET", f"/v2/{name}/manifests/most").body) == 4 << 20
    plain["annotations"]["note"] += "n"
    assert_error(put(domain, name, "more", plain), 413, "MANIFEST_INVALID")


def test_media_types_of_manifests(domain: str, name: str, image: MadeImage) -> None:
    give_image(domain, name, "v1", image)
    for kind in ("", "text/html", "application/json", OCI_INDEX):
        reply = ask(domain, "PUT", f"/v2/{name}/manifests/v2", image.manifest, Content_Type=kind)
        assert_error(reply, 400, "MANIFEST_INVALID")
    kind = f"{OCI_MANIFEST}; charset=utf-8"
    assert ask(domain, "PUT", f"/v2/{name}/manifests/v2", image.manifest, Content_Type=kind).status == 201
    reply = ask(domain, "GET", f"/v2/{name}/manifests/v2", Accept="text/html")
    assert (reply.status, reply.headers["Content-Type"]) == (200, OCI_MANIFEST)


def test_sha512(domain: str, name: str, image: MadeImage) -> None:
    blob, empty = os.urandom(100), hashlib.sha512(b"").hexdigest()
    digest = f"sha512:{hashlib.sha512(blob).hexdigest()}"
    reply = ask(domain, "POST", f"/v2/{name}/blobs/uploads/?digest={digest}", blob)
    assert (reply.status, reply.headers["Docker-Content-Digest"]) == (201, digest)
    assert ask(domain, "GET", f"/v2/{name}/blobs/{digest}", Range="bytes=10-19").body == blob[10:20]
    reply = ask(domain, "POST", f"/v2/{name}/other/blobs/uploads/?mount={digest}&from={name}", b"")
    assert reply.status == 201
    assert ask(domain, "DELETE", f"/v2/{name}/blobs/{digest}").status == 202
    assert_error(ask(domain, "GET", f"/v2/{name}/blobs/{digest}"), 404, "BLOB_UNKNOWN")
    wrong = with_digest(begin(domain, name), f"sha512:{empty}")
    assert_error(ask(domain, "PUT", wrong, blob), 400, "DIGEST_INVALID")
    give_image(domain, name, "v1", image)
    by = f"sha512:{hashlib.sha512(image.manifest).hexdigest()}"
    reply = ask(domain, "PUT", f"/v2/{name}/manifests/{by}", image.manifest, Content_Type=OCI_MANIFEST)
    assert (reply.status, reply.headers["Docker-Content-Digest"]) == (201, by)
    assert ask(domain, "GET", f"/v2/{name}/manifests/{by}").body == image.manifest
    for digest in ("md5:" + "0" * 32, "sha256:" + "0" * 63, "sha256:" + "A" * 64, "sha256", "sha256:"):
        assert_error(ask(domain, "GET", f"/v2/{name}/blobs/{digest}"), 400, "DIGEST_INVALID")


def test_an_empty_blob(domain: str, name: str) -> None:
    digest = digest_of(b"")
    assert ask(domain, "PUT", with_digest(begin(domain, name), digest), b"").status == 201
    reply = ask(domain, "GET", f"/v2/{name}/blobs/{digest}")
    assert (reply.status, reply.body, reply.headers["Content-Length"]) == (200, b"", "0")
    assert ask(domain, "GET", f"/v2/{name}/blobs/{digest}", Range="bytes=0-0").status == 416


def test_every_page_once(domain: str, name: str, image: MadeImage) -> None:
    tags = sorted(f"{letter}{number}" for letter in "aZ_" for number in range(4))
    for tag in tags:
        give_image(domain, name, tag, image)
    for count in (1, 5, 12, 100):
        found: list[str] = []
        place = f"/v2/{name}/tags/list?n={count}"
        while place:
            reply = ask(domain, "GET", place)
            assert len(reply.json["tags"]) <= count
            found += reply.json["tags"]
            link = reply.headers.get("Link", "")
            assert not link or link.endswith('>; rel="next"')
            place = link.partition(">")[0].lstrip("<")
        assert found == tags
    for count in ("-1", "x", "1.5"):
        assert_error(ask(domain, "GET", f"/v2/{name}/tags/list?n={count}"), 400, "PAGINATION_NUMBER_INVALID")


# -- beside Debian's docker-registry ---------------------------------------------------------------------------------

Step = tuple[str, str, bytes | None, dict[str, str]]


def conversation(image: MadeImage) -> Iterator[Step]:
    """Requests in order; UPLOAD is where the last answer said to go on. Without what Debian's 2.8 has not: pages of
    tags, referrers, deleted tags."""
    blob, other = b"some bytes", b"0123456789"
    octets = {"Content-Type": "application/octet-stream"}
    kind = {"Content-Type": OCI_MANIFEST}
    uploads = "/v2/or/acle/blobs/uploads/"
    yield "GET", "/v2/", None, {}
    yield "GET", "/v2/or/acle/tags/list", None, {}
    yield "GET", "/v2/or/acle/manifests/v1", None, {}
    yield "HEAD", "/v2/or/acle/manifests/v1", None, {}
    yield "GET", f"/v2/or/acle/blobs/{NOWHERE}", None, {}
    yield "DELETE", f"/v2/or/acle/blobs/{NOWHERE}", None, {}
    yield "POST", uploads, b"", {}
    yield "GET", "UPLOAD", None, {}
    yield "PATCH", "UPLOAD", other[:4], {**octets, "Content-Range": "0-3"}
    yield "GET", "UPLOAD", None, {}
    yield "PATCH", "UPLOAD", other[4:], {**octets, "Content-Range": "4-9"}
    yield "PUT", f"UPLOAD?digest={digest_of(other)}", b"", {}
    yield "GET", f"/v2/or/acle/blobs/{digest_of(other)}", None, {}
    yield "HEAD", f"/v2/or/acle/blobs/{digest_of(other)}", None, {}
    yield "GET", f"/v2/or/acle/blobs/{digest_of(other)}", None, {"Range": "bytes=2-4"}
    yield "GET", f"/v2/or/acle/blobs/{digest_of(other)}", None, {"Range": "bytes=-3"}
    yield "GET", f"/v2/or/acle/blobs/{digest_of(other)}", None, {"Range": "bytes=7-"}
    yield "POST", uploads, b"", {}
    yield "PUT", f"UPLOAD?digest={NOWHERE}", blob, octets
    yield "POST", uploads, b"", {}
    yield "DELETE", "UPLOAD", None, {}
    yield "GET", "UPLOAD", None, {}
    yield "POST", f"/v2/or/two/blobs/uploads/?mount={digest_of(other)}&from=or/acle", b"", {}
    yield "HEAD", f"/v2/or/two/blobs/{digest_of(other)}", None, {}
    yield "POST", f"/v2/or/two/blobs/uploads/?mount={NOWHERE}&from=or/acle", b"", {}
    yield "PUT", "/v2/or/acle/manifests/v1", image.manifest, kind
    yield "PUT", "/v2/or/acle/manifests/v1", b"nonsense", kind
    for digest, each in image.blobs.items():
        yield "POST", uploads, b"", {}
        yield "PUT", f"UPLOAD?digest={digest}", each, octets
    for tag in ("v1", "v2", "v3"):
        yield "PUT", f"/v2/or/acle/manifests/{tag}", image.manifest, kind
    yield "PUT", f"/v2/or/acle/manifests/{NOWHERE}", image.manifest, kind
    yield "GET", "/v2/or/acle/manifests/v1", None, {"Accept": OCI_MANIFEST}
    yield "HEAD", f"/v2/or/acle/manifests/{image.digest}", None, {"Accept": OCI_MANIFEST}
    yield "GET", "/v2/or/acle/tags/list", None, {}
    yield "DELETE", f"/v2/or/acle/manifests/{image.digest}", None, {}
    yield "GET", f"/v2/or/acle/manifests/{image.digest}", None, {"Accept": OCI_MANIFEST}
    yield "GET", "/v2/or/acle/manifests/v2", None, {"Accept": OCI_MANIFEST}
    yield "DELETE", f"/v2/or/acle/blobs/{digest_of(other)}", None, {}
    yield "GET", f"/v2/or/acle/blobs/{digest_of(other)}", None, {}


def hold(domain: str, image: MadeImage) -> list[tuple[str, Any]]:
    """What a registry says, as far as two of them must agree."""
    said: list[tuple[str, Any]] = []
    location = ""
    for method, place, body, headers in conversation(image):
        path = place
        if place.startswith("UPLOAD"):
            path = with_digest(location, place.partition("=")[2]) if "=" in place else location
        reply = ask(domain, method, path, body, **headers)
        if reply.status in (202, 204) and reply.headers.get("Location"):
            location = "/v2/" + reply.headers["Location"].partition("/v2/")[2]
        code = reply.code if reply.status >= 400 and reply.body.startswith(b"{") else ""
        names = ("Docker-Content-Digest", "Content-Range", "Range") if reply.status < 400 else ()
        facts = {name: reply.headers[name] for name in names if name in reply.headers}
        content = reply.body if reply.status in (200, 206) and "/tags/" not in place else b""
        if "/tags/" in place and reply.status == 200:
            facts["tags"] = reply.json["tags"]
        said.append((f"{method} {place} {headers.get('Range', '')}", (reply.status, code, facts, content)))
    return said


def test_debians_docker_registry_says_the_same(domain: str, tmp_path: Path, image: MadeImage) -> None:
    with docker_registry(tmp_path) as oracle:
        theirs = hold(oracle, image)
    ours = hold(domain, image)
    assert len(ours) > 40
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other
