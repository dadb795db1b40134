"""The private registry, as its clients see it: raw HTTP by the specification, skopeo, and our own."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from registries import (
    OCI_MANIFEST,
    Answer,
    MadeImage,
    Reply,
    ask,
    digest_of,
    give,
    give_image,
    make_bcrypt,
    scripted,
    serving,
)
from waiting import wait_until

from labkernel import registries as service
from labkernel.engine import Engine
from labkernel.oci.depot import Depot
from labkernel.oci.registry import Refused
from labkernel.registries import NoSuchRegistry, Options


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def image() -> MadeImage:
    return MadeImage({"x": os.urandom(1000)}, {"y": b"y"})


# -- by the specification --------------------------------------------------------------------------------------------


def test_the_root_says_which_api_this_is(domain: str) -> None:
    reply = ask(domain, "GET", "/v2/")
    assert (reply.status, reply.headers["Docker-Distribution-API-Version"]) == (200, "registry/2.0")


def test_an_upload_in_chunks_goes_on_where_it_stands(domain: str) -> None:
    blob = os.urandom(5000)
    begun = ask(domain, "POST", "/v2/a/chunks/blobs/uploads/")
    assert begun.status == 202
    place = begun.headers["Location"]
    first = ask(domain, "PATCH", place, blob[:2000], Content_Range="0-1999")
    assert (first.status, first.headers["Range"]) == (202, "0-1999")
    wrong = ask(domain, "PATCH", place, blob[3000:], Content_Range="3000-4999")
    assert (wrong.status, wrong.headers["Range"]) == (416, "0-1999")
    assert ask(domain, "GET", place).headers["Range"] == "0-1999"
    assert ask(domain, "PATCH", place, blob[2000:4000], Content_Range="2000-3999").status == 202
    done = ask(domain, "PUT", f"{place}?digest={digest_of(blob)}", blob[4000:], Content_Range="4000-4999")
    assert (done.status, done.headers["Docker-Content-Digest"]) == (201, digest_of(blob))
    assert ask(domain, "GET", done.headers["Location"]).body == blob
    assert ask(domain, "GET", place).code == "BLOB_UPLOAD_UNKNOWN"


def test_an_upload_survives_a_lost_connection(domain: str) -> None:
    blob = os.urandom(400_000)
    place = ask(domain, "POST", "/v2/a/lost/blobs/uploads/").headers["Location"]
    connection = http.client.HTTPConnection(domain, timeout=20)
    connection.putrequest("PATCH", place)
    connection.putheader("Content-Length", str(len(blob)))
    connection.endheaders(blob[:300_000])
    connection.sock.close() if connection.sock else None

    def arrived() -> int:
        return int(ask(domain, "GET", place).headers["Range"].partition("-")[2]) + 1

    wait_until(lambda: arrived() >= 300_000, "what was sent has arrived")
    have = arrived()
    rest = ask(domain, "PATCH", place, blob[have:], Content_Range=f"{have}-{len(blob) - 1}")
    assert rest.status == 202
    assert ask(domain, "PUT", f"{place}?digest={digest_of(blob)}", b"").status == 201


def test_wrong_bytes_are_not_taken(domain: str) -> None:
    reply = ask(domain, "POST", f"/v2/a/b/blobs/uploads/?digest=sha256:{'1' * 64}", b"other")
    assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
    sha512 = f"sha512:{hashlib.sha512(b'long').hexdigest()}"
    assert ask(domain, "POST", f"/v2/a/b/blobs/uploads/?digest={sha512}", b"long").status == 201
    assert ask(domain, "GET", f"/v2/a/b/blobs/{sha512}").body == b"long"


def test_ranges(domain: str) -> None:
    blob = bytes(range(200))
    path = f"/v2/a/ranges/blobs/{give(domain, 'a/ranges', blob)}"
    part = ask(domain, "GET", path, Range="bytes=50-59")
    assert (part.status, part.body, part.headers["Content-Range"]) == (206, blob[50:60], "bytes 50-59/200")
    assert ask(domain, "GET", path, Range="bytes=190-").body == blob[190:]
    assert ask(domain, "GET", path, Range="bytes=-5").body == blob[-5:]
    assert ask(domain, "GET", path, Range="bytes=200-").status == 416
    head = ask(domain, "HEAD", path)
    assert (head.status, head.headers["Content-Length"], head.body) == (200, "200", b"")


def test_a_blob_is_mounted_from_where_it_is_and_shown_nowhere_else(domain: str) -> None:
    digest = give(domain, "source", b"mounted")
    assert ask(domain, "GET", f"/v2/target/blobs/{digest}").status == 404
    assert ask(domain, "POST", f"/v2/target/blobs/uploads/?mount={digest}&from=source").status == 201
    assert ask(domain, "GET", f"/v2/target/blobs/{digest}").body == b"mounted"
    assert ask(domain, "POST", f"/v2/target/blobs/uploads/?mount=sha256:{'2' * 64}&from=source").status == 202


def test_manifests_tags_and_pages(domain: str, image: MadeImage) -> None:
    early = ask(domain, "PUT", "/v2/tags/manifests/v0", image.manifest, Content_Type=OCI_MANIFEST)
    assert early.code == "MANIFEST_BLOB_UNKNOWN"
    for tag in ("v1", "v2", "v3"):
        reply = give_image(domain, "tags", tag, image)
        assert (reply.status, reply.headers["Docker-Content-Digest"]) == (201, image.digest)
    got = ask(domain, "GET", "/v2/tags/manifests/v2")
    assert (got.body, got.headers["Content-Type"]) == (image.manifest, OCI_MANIFEST)
    page = ask(domain, "GET", "/v2/tags/tags/list?n=2")
    assert page.json == {"name": "tags", "tags": ["v1", "v2"]}
    following = page.headers["Link"].partition(">")[0].lstrip("<")
    rest = ask(domain, "GET", following)
    assert (rest.json["tags"], rest.headers["Link"]) == (["v3"], None)
    assert ask(domain, "GET", "/v2/tags/tags/list?n=0").json["tags"] == []
    assert ask(domain, "DELETE", "/v2/tags/manifests/v1").status == 202
    assert ask(domain, "GET", "/v2/tags/tags/list").json["tags"] == ["v2", "v3"]
    assert ask(domain, "DELETE", f"/v2/tags/manifests/{image.digest}").status == 202
    assert ask(domain, "GET", "/v2/tags/manifests/v3").code == "MANIFEST_UNKNOWN"
    assert ask(domain, "GET", "/v2/tags/tags/list").json["tags"] == []
    assert ask(domain, "GET", "/v2/nowhere/tags/list").code == "NAME_UNKNOWN"


def test_referrers(domain: str, image: MadeImage) -> None:
    give_image(domain, "refs", "v1", image)
    empty = give(domain, "refs", b"{}")
    head = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2}
    signature = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.test.signature",
        "config": head,
        "layers": [head],
        "subject": {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": len(image.manifest)},
        "annotations": {"by": "ada"},
    }
    raw = json.dumps(signature).encode()
    put = ask(domain, "PUT", f"/v2/refs/manifests/{digest_of(raw)}", raw, Content_Type=OCI_MANIFEST)
    assert (put.status, put.headers["OCI-Subject"]) == (201, image.digest)
    found = ask(domain, "GET", f"/v2/refs/referrers/{image.digest}")
    (entry,) = found.json["manifests"]
    assert (entry["artifactType"], entry["annotations"]) == ("application/vnd.test.signature", {"by": "ada"})
    other = ask(domain, "GET", f"/v2/refs/referrers/{image.digest}?artifactType=x")
    assert (other.json["manifests"], other.headers["OCI-Filters-Applied"]) == ([], "artifactType")
    assert ask(domain, "DELETE", f"/v2/refs/manifests/{digest_of(raw)}").status == 202
    assert ask(domain, "GET", f"/v2/refs/referrers/{image.digest}").json["manifests"] == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/UPPER/manifests/x", 400, "NAME_INVALID"),
        ("GET", "/v2/a/../../etc/manifests/x", 400, "NAME_INVALID"),
        ("GET", "/v2/_uploads/tags/list", 400, "NAME_INVALID"),
        ("GET", "/v2/a/blobs/sha256:xyz", 400, "DIGEST_INVALID"),
        ("GET", "/v2/a/blobs/uploads/..%2f..%2fx", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("GET", "/v2/a/manifests/..%2f..%2fx", 404, "MANIFEST_UNKNOWN"),
        ("GET", "/elsewhere", 404, "NAME_UNKNOWN"),
        ("PATCH", "/v2/a/manifests/x", 405, "UNSUPPORTED"),
    ],
)
def test_what_cannot_be_meant(domain: str, method: str, path: str, status: int, code: str) -> None:
    reply = ask(domain, method, path)
    assert (reply.status, reply.code) == (status, code)


# -- clients ---------------------------------------------------------------------------------------------------------


def test_skopeo_and_we_understand_each_other(fresh_engine: Engine, domain: str, image: MadeImage) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed (apt-get install skopeo)")
    give_image(domain, "peers/web", "v1", image)
    plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
    copy = [skopeo, "copy", "-q", *plain, f"docker://{domain}/peers/web:v1", f"docker://{domain}/peers/copy:v2"]
    subprocess.run(copy, check=True, timeout=60)
    listing = [skopeo, "list-tags", "--tls-verify=false", f"docker://{domain}/peers/copy"]
    tags = json.loads(subprocess.run(listing, check=True, timeout=60, capture_output=True).stdout)
    assert tags["Tags"] == ["v2"]
    pulled = fresh_engine.pulls.pull(f"{domain}/peers/copy:v2")
    fresh_engine.images.tag(pulled.image.id, f"{domain}/peers/ours:v3")
    pushed = fresh_engine.pushes.push(f"{domain}/peers/ours:v3")
    inspect = [skopeo, "inspect", "--tls-verify=false", f"docker://{domain}/peers/ours:v3"]
    seen = json.loads(subprocess.run(inspect, check=True, timeout=60, capture_output=True).stdout)
    assert seen["Digest"] == pushed.digest


# -- its options -----------------------------------------------------------------------------------------------------


def test_users_tls_and_read_only(fresh_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    key, certificate, users = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path / "users"
    make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subject = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *subject], check=True, capture_output=True)
    users.write_text(f"ada:{make_bcrypt('secret')}\n")
    words = ("--tls-cert", str(certificate), "--tls-key", str(key), "--htpasswd", str(users), "--read-only")
    with serving(tmp_path, *words) as domain:
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(domain, context=context, timeout=10)
        connection.request("GET", "/v2/")
        reply = Reply(connection.getresponse())
        assert (reply.status, reply.headers["WWW-Authenticate"].split()[0]) == (401, "Basic")
        connection.close()
        with pytest.raises(Refused, match="incorrect username or password"):
            fresh_engine.logins.login(domain, "ada", "guess")
        fresh_engine.logins.login(domain, "ada", "secret")
        with pytest.raises(Refused, match="not found"):
            fresh_engine.pulls.pull(f"{domain}/web")
        base = fresh_engine.images.resolve("lab/busybox")
        fresh_engine.images.tag(base.id, f"{domain}/web:v1")
        with pytest.raises(Refused, match="read-only"):
            fresh_engine.pushes.push(f"{domain}/web:v1")


def test_a_cache_fetches_each_thing_once(tmp_path: Path, fresh_engine: Engine, image: MadeImage) -> None:
    with scripted() as upstream, serving(tmp_path, "--cache-of", upstream.domain) as domain:
        upstream.hold(image, "v1")
        first = fresh_engine.pulls.pull(f"{domain}/web:v1")
        assert first.digest == image.digest
        fresh_engine.images.remove(f"{domain}/web:v1")
        assert fresh_engine.pulls.pull(f"{domain}/web:v1").new
        missing = ask(domain, "GET", "/v2/web/manifests/none")
        assert (missing.status, missing.code) == (404, "MANIFEST_UNKNOWN")
        blobs = [line for line in upstream.asked if "/blobs/" in line]
        assert len(blobs) == len(set(blobs)) == len(image.blobs)
        upstream.rules.append(lambda handler: handler.connection.close())
        fresh_engine.images.remove(f"{domain}/web:v1")


def test_a_cache_leaves_an_upstream_that_does_not_answer_alone_for_a_while(
    tmp_path: Path, image: MadeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SILENCE_S", 1e6)
    depot = Depot(tmp_path)
    with scripted() as upstream:
        upstream.hold(image, "v1")
        cache = service.PullThrough(upstream.domain)
        cache.manifest(depot, "web", "v1")
        upstream.rules.append(lambda handler: Answer(b"{}", 503))
        before = len(upstream.asked)
        for _ in range(3):
            cache.manifest(depot, "web", "v1")
        assert len(upstream.asked) == before + 1
        monkeypatch.setattr(service, "SILENCE_S", 0.0)
        cache = service.PullThrough(upstream.domain)
        for _ in range(2):
            cache.manifest(depot, "web", "v1")
        assert len(upstream.asked) == before + 3


def test_a_quota_is_kept(tmp_path: Path, fresh_engine: Engine) -> None:
    with serving(tmp_path, "--quota", "2k") as domain:
        give(domain, "small", b"x" * 1500)
        reply = ask(domain, "POST", f"/v2/small/blobs/uploads/?digest=sha256:{'1' * 64}", b"y" * 1000)
        assert (reply.status, reply.code) == (403, "DENIED")
        base = fresh_engine.images.resolve("lab/busybox")
        fresh_engine.images.tag(base.id, f"{domain}/small:v1")
        with pytest.raises(Refused, match=r"takes no more for .*/small: .*quota of 2000 bytes is used up") as raised:
            fresh_engine.pushes.push(f"{domain}/small:v1")
        assert "login" not in str(raised.value.resolution)


# -- service ---------------------------------------------------------------------------------------------------------


def test_start_list_and_stop(fresh_engine: Engine) -> None:
    running = fresh_engine.registry.start(Options(listen="127.0.0.1:0"))
    assert [each.address for each in fresh_engine.registry.list()] == [running.address]
    assert ask(running.address, "GET", "/v2/").status == 200
    running.stop()
    assert fresh_engine.registry.list() == []
    with pytest.raises(NoSuchRegistry):
        fresh_engine.registry.stop()


def test_collection_spares_what_is_young_and_what_is_named(tmp_path: Path, image: MadeImage) -> None:
    depot = Depot(tmp_path)
    for digest, blob in {**image.blobs, digest_of(b"unneeded"): b"unneeded"}.items():
        upload = depot.start_upload("web")
        upload.write(blob)
        upload.finish(digest)
    depot.put_manifest("web", "v1", image.manifest, OCI_MANIFEST)
    assert depot.collect() == (0, 0)
    assert depot.collect(grace_s=-1) == (1, len(b"unneeded"))
    depot.delete_manifest("web", image.digest)
    assert depot.collect(grace_s=-1)[0] == len(image.blobs) + 1
    assert not list((tmp_path / "blobs").glob("*/*"))


def test_an_upload_of_an_earlier_run_goes_on(tmp_path: Path) -> None:
    upload = Depot(tmp_path).start_upload("web")
    upload.write(b"first ")
    again = Depot(tmp_path).find_upload("web", upload.id)
    again.write(b"second")
    again.finish(digest_of(b"first second"))
    assert Depot(tmp_path).find_blob("web", digest_of(b"first second")).read_bytes() == b"first second"
