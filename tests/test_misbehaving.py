"""Registries that break, lie, stall and never end, request by request: a pull gets its image, or one clear error.

Whatever happens, nothing unverified is visible, nothing but verified blobs stays, and the store is consistent.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from registries import OCI_INDEX, OCI_MANIFEST, Answer, MadeImage, Scripted, scripted

from labkernel.consistency import check
from labkernel.engine import Engine
from labkernel.errors import LabkernelError, ManifestError, RegistryError
from labkernel.imaging.pulls import Pulls
from labkernel.imaging.pushes import Pushes
from labkernel.oci.connections import Patience, check_place
from labkernel.oci.endpoints import Endpoint
from labkernel.oci.registry import Persistence, Registry

QUICK = Persistence(retries=2, pause_s=0.01)
KINDS = ("manifest", "config", "layer", "token")
CUTS = {
    "before a byte": lambda wire: 0,
    "in the status line": lambda wire: 7,
    "after the status line": lambda wire: wire.index(b"\r\n") + 2,
    "in a header": lambda wire: wire.index(b"\r\n\r\n") - 3,
    "before the body": lambda wire: wire.index(b"\r\n\r\n") + 4,
    "after a byte of the body": lambda wire: wire.index(b"\r\n\r\n") + 5,
    "in the body": lambda wire: (wire.index(b"\r\n\r\n") + len(wire)) // 2,
    "before the last byte": lambda wire: len(wire) - 1,
}


class QuickPulls(Pulls):
    """Pulls that lose patience within a test, but not because the machine is busy."""

    stall_s = 10.0
    answer_s = 20.0

    def open(self, domain: str, *, notify: Any, mirrors: bool = True) -> Registry:
        patience = Patience(connect_s=10, stall_s=self.stall_s, answer_s=self.answer_s)
        return Registry(
            domain, settings=self.settings, mirrors=mirrors, notify=notify, patience=patience, persistence=QUICK
        )


@pytest.fixture
def fake() -> Iterator[Scripted]:
    with scripted() as registry:
        yield registry


@pytest.fixture(scope="module")
def kept() -> Iterator[Engine]:
    base = Path(tempfile.mkdtemp(prefix="lk-m-", dir="/tmp"))
    engine = Engine.open(base / "root", runtime_dir=base / "run")
    yield engine
    engine.runtime.shutdown(force=True)
    engine.close()
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def pulls(kept: Engine) -> Iterator[QuickPulls]:
    yield QuickPulls(kept.images)
    for image in kept.images.list():
        kept.images.remove(image.id, force=True)
    kept.images.prune()
    assert not list(kept.images.blobs)


@pytest.fixture
def image() -> MadeImage:
    return MadeImage({"etc/one": os.urandom(90_000)})


def fails(pulls: QuickPulls, ref: str, kind: type[LabkernelError], match: str) -> LabkernelError:
    """The pull ends with this error, in words, and leaves a consistent store without the image."""
    images = pulls.images
    with pytest.raises(kind, match=match) as caught:
        pulls.pull(ref)
    assert "\n" not in caught.value.brief
    assert not images.list()
    assert not os.listdir(images.layout.tmp)
    for digest in images.blobs:
        images.blobs.verify(digest)
    return caught.value


def kind_of(handler: BaseHTTPRequestHandler, image: MadeImage) -> str:
    if handler.path.startswith("/token"):
        return "token"
    if "/manifests/" in handler.path:
        return "manifest"
    return "layer" if handler.path.endswith(image.layers[0]) else "config"


def guarded(fake: Scripted) -> None:
    """From now on the registry wants a token."""

    def rule(handler: BaseHTTPRequestHandler) -> Answer | None:
        if handler.path.startswith("/token"):
            return Answer(b'{"token":"good"}')
        if handler.headers.get("Authorization") == "Bearer good":
            return None
        return Answer(b"{}", 401, WWW_Authenticate=f'Bearer realm="http://{fake.domain}/token",service="x"')

    fake.rules.append(rule)


def cut(fake: Scripted, image: MadeImage, kind: str, place: str, times: int, *, reset: bool = False) -> None:
    """Answers to requests of this kind end there, so many times."""
    left = [times]
    inner = list(fake.rules)

    def rule(handler: BaseHTTPRequestHandler) -> Answer | None:
        if kind_of(handler, image) != kind or left[0] <= 0:
            return None
        answer = next((found for each in inner if (found := each(handler)) is not None), fake.honest(handler))
        if answer.status == 401:
            return answer
        left[0] -= 1
        wire = answer.wire()
        part = wire[: CUTS[place](wire)]

        def send(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(part)
            if reset:
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        return Answer(raw=send)

    fake.rules.insert(0, rule)


@pytest.mark.parametrize("place", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_lost_once_costs_nothing(
    pulls: QuickPulls, fake: Scripted, image: MadeImage, kind: str, place: str
) -> None:
    fake.hold(image)
    guarded(fake)
    cut(fake, image, kind, place, 1, reset=place == "in the body")
    done = pulls.pull(f"{fake.domain}/web")
    (layer,) = done.image.layers
    assert (pulls.images.layer_path(layer) / "etc/one").stat().st_size == 90_000


@pytest.mark.parametrize("place", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_lost_each_time_is_said(
    pulls: QuickPulls, fake: Scripted, image: MadeImage, kind: str, place: str
) -> None:
    fake.hold(image)
    guarded(fake)
    cut(fake, image, kind, place, 1_000)
    fails(pulls, f"{fake.domain}/web", RegistryError, "no answer|lost|breaks off|not HTTP|not complete")


# -- whole answers that are wrong --------------------------------------------------------------------------------------

Lie = Callable[[BaseHTTPRequestHandler, bytes], Answer]


def endless(piece: bytes, head: bytes = b"") -> Callable[[BaseHTTPRequestHandler], None]:
    """Sends until the client goes."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        while True:
            handler.wfile.write(piece)

    return send


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(body: bytes, tail: bytes = b"0\r\n\r\n") -> bytes:
    return CHUNKED + b"%x\r\n%s\r\n" % (len(body), body) + tail


# What is said to a request, and the error; None where the client copes.
LIES: dict[str, tuple[Lie, str | None]] = {
    "other bytes": (lambda h, b: Answer(b[:-9] + bytes(9)), "not those of|other bytes|digest is|invalid manifest"),
    "no bytes": (lambda h, b: Answer(b""), "announced|breaks off|other bytes|digest is|invalid|has 0 bytes"),
    "more bytes": (lambda h, b: Answer(b + b"more"), "announced|more than|other bytes|digest is|invalid manifest"),
    "a shorter length": (lambda h, b: Answer(raw=Answer(b).wire().replace(b"Length: ", b"Length: 0")), None),
    "a negative length": (lambda h, b: Answer(raw=b"HTTP/1.1 200 X\r\nContent-Length: -5\r\n\r\n" + b), None),
    "a length of no number": (lambda h, b: Answer(raw=b"HTTP/1.1 200 X\r\nContent-Length: x\r\n\r\n" + b), None),
    "two lengths": (
        lambda h, b: Answer(b, Content_Length="7"),
        "lost|announced|breaks off|other bytes|digest is|invalid manifest",
    ),
    "chunks": (lambda h, b: Answer(raw=chunked(b)), None),
    "chunks without their end": (lambda h, b: Answer(raw=chunked(b, b"")), "lost|no answer|breaks off"),
    "a chunk of no number": (lambda h, b: Answer(raw=CHUNKED + b"zz\r\n" + b), "no answer|breaks off"),
    "a negative chunk": (lambda h, b: Answer(raw=CHUNKED + b"-5\r\n" + b), "no answer|breaks off"),
    "a chunk line without end": (lambda h, b: Answer(raw=endless(b"f" * 4096, CHUNKED)), "no answer|breaks off"),
    "chunk extensions without end": (
        lambda h, b: Answer(raw=endless(b"x" * 4096, CHUNKED + b"1;")),
        "no answer|breaks off",
    ),
    "trailers without end": (
        lambda h, b: Answer(raw=endless(b"A: b\r\n" * 500, chunked(b, b"0\r\n"))),
        "no end|no answer|breaks off",
    ),
    "headers without end": (lambda h, b: Answer(raw=endless(b"A: b\r\n" * 500, b"HTTP/1.1 200 X\r\n")), "no answer"),
    "a header line without end": (lambda h, b: Answer(raw=endless(b"a" * 4096, b"HTTP/1.1 200 X\r\nA:")), "no answer"),
    "a status line without end": (lambda h, b: Answer(raw=endless(b"a" * 4096, b"HTTP/1.1 200 ")), "no answer"),
    "no HTTP": (lambda h, b: Answer(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), "no answer"),
    "HTTP/1.0": (lambda h, b: Answer(raw=b"HTTP/1.0 200 OK\r\n\r\n" + b), None),
    "an answer without content": (lambda h, b: Answer(raw=b"HTTP/1.1 204 X\r\n\r\n"), "refuses|status 204"),
    "continue without end": (lambda h, b: Answer(raw=endless(b"HTTP/1.1 100 X\r\n\r\n" * 99)), "no answer"),
    "a bomb in Content-Encoding": (
        lambda h, b: Answer(gzip.compress(bytes(1 << 24)), Content_Encoding="gzip"),
        "announced|other bytes|digest is|more than|invalid manifest",
    ),
    "401 without a challenge": (lambda h, b: Answer(b"{}", 401), "denied"),
    "401 for every token": (
        lambda h, b: Answer(b"{}", 401, WWW_Authenticate=f'Bearer realm="http://{h.headers["Host"]}/token"'),
        "denied|log-in",
    ),
    "a token service of no URL": (
        lambda h, b: Answer(b"{}", 401, WWW_Authenticate='Bearer realm="file:///etc/passwd"'),
        "no URL",
    ),
    "403": (lambda h, b: Answer(b"{}", 403), "denied"),
    "404 with a page": (lambda h, b: Answer(b"<html>" * 9, 404, Content_Type="text/html"), "not found|does not have"),
    "404 with a bomb of brackets": (lambda h, b: Answer(b"[" * 60_000, 404), "not found|does not have"),
    "an error with control characters": (
        lambda h, b: Answer(b'{"errors":[{"code":"DENIED","message":"\\u001b[2J\\nred\\u0007"}]}', 403),
        "denied",
    ),
    "429": (lambda h, b: Answer(b"", 429), "no more requests"),
    "429 for an hour": (lambda h, b: Answer(b"", 429, Retry_After="3600"), "no more requests"),
    "429 for ever": (lambda h, b: Answer(b"", 429, Retry_After="9" * 400), "no more requests"),
    "429 until no date": (lambda h, b: Answer(b"", 429, Retry_After="Thu, 99 Foo"), "no more requests"),
    "500": (lambda h, b: Answer(b"", 500), "status 500"),
    "503 with Retry-After": (lambda h, b: Answer(b"", 503, Retry_After="0"), "status 503"),
    "999": (lambda h, b: Answer(b"", 999), "status 999"),
    "a redirect without a place": (lambda h, b: Answer(b"", 302), "status 302"),
    "a redirect to itself": (lambda h, b: Answer(b"", 307, Location=h.path), "circles"),
    "a redirect to a file": (lambda h, b: Answer(b"", 302, Location="file:///etc/passwd"), "not HTTP"),
    "a redirect to nowhere": (lambda h, b: Answer(b"", 302, Location="http://127.0.0.1:1/x"), "no answer|refused"),
    "a redirect to no port": (lambda h, b: Answer(b"", 302, Location="http://127.0.0.1:x/x"), "not a URL"),
    "a redirect with a line break": (lambda h, b: Answer(raw=b"HTTP/1.1 302 X\r\nLocation: /a\rb c\r\n\r\n"), "."),
    "a range nobody asked for": (
        lambda h, b: Answer(b, 206, Content_Range=f"bytes 5-{len(b)}/{len(b)}"),
        "status 206|another range|refuses",
    ),
}


@pytest.mark.parametrize("kind", ["manifest", "config", "layer"])
@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_wrong(pulls: QuickPulls, fake: Scripted, image: MadeImage, lie: str, kind: str) -> None:
    fake.hold(image)
    say, words = LIES[lie]

    def rule(handler: BaseHTTPRequestHandler) -> Answer | None:
        if handler.path.startswith("/token"):
            return Answer(b'{"token":"useless"}')
        return say(handler, fake.honest(handler).body) if kind_of(handler, image) == kind else None

    fake.rules.append(rule)
    if words is None:
        assert pulls.pull(f"{fake.domain}/web").image.id
    else:
        error = fails(pulls, f"{fake.domain}/web", LabkernelError, words)
        assert error.brief.isprintable()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (Answer(b""), "no usable token"),
        (Answer(b"[]"), "no usable token"),
        (Answer(b'{"token":5}'), "no usable token"),
        (Answer(b'{"token":"a\\r\\nX-Evil: 1"}'), "no usable token"),
        (Answer(b'{"token":"' + b"a" * (1 << 19) + b'"}'), "more than"),
        (Answer(b"[" * 100_000), "no usable token"),
        (Answer(b"{}", 401), "log-in is needed"),
        (Answer(b"{}", 500), "status 500"),
        (Answer(raw=endless(b" " * 4096, b"HTTP/1.1 200 X\r\n\r\n")), "more than"),
    ],
)
def test_a_token_service_that_is_wrong(
    pulls: QuickPulls, fake: Scripted, image: MadeImage, token: Answer, words: str
) -> None:
    fake.hold(image)
    fake.rules.append(lambda h: token if h.path.startswith("/token") else None)
    guarded(fake)
    fails(pulls, f"{fake.domain}/web", RegistryError, words)


def test_a_token_that_expires_in_the_middle_of_a_layer(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    """The line breaks, and when the rest is asked for the token is no longer good."""
    fake.hold(image)
    blob = image.blobs[image.layers[0]]
    issued: list[str] = []

    def rule(handler: BaseHTTPRequestHandler) -> Answer | None:
        if handler.path.startswith("/token"):
            issued.append(f"t{len(issued)}")
            return Answer(json.dumps({"token": issued[-1], "expires_in": 3600}).encode())
        if not issued or handler.headers.get("Authorization") != f"Bearer {issued[-1]}":
            return Answer(b"{}", 401, WWW_Authenticate=f'Bearer realm="http://{fake.domain}/token"')
        if kind_of(handler, image) != "layer":
            return None
        if handler.headers.get("Range") is None:
            issued.append("expired")
            return Answer(raw=Answer(blob).wire()[:-4000])
        return None

    fake.rules.append(rule)
    assert pulls.pull(f"{fake.domain}/web").new
    assert issued == ["t0", "expired", "t2"]


def test_slow_answers_end(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    """A byte now and then is no answer, whatever the request was for."""
    fake.hold(image)
    pulls.stall_s, pulls.answer_s = 0.5, 1.0

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not threading.Event().wait(0.05):
            handler.wfile.write(b"x")

    for kind in ("manifest", "config", "layer"):
        fake.rules[:] = [
            lambda h, kind=kind: Answer(raw=drip) if kind_of(h, image) == kind else None  # type: ignore[misc]
        ]
        fails(pulls, f"{fake.domain}/web", RegistryError, "no answer|breaks off|other bytes|announced|more than")


# -- documents that lie ------------------------------------------------------------------------------------------------


def test_an_index_that_lies_about_a_manifest(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    fake.hold(image, "inner")
    entry = {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": len(image.manifest) + 1}
    fake.document(
        "latest", json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode(), OCI_INDEX
    )
    fails(pulls, f"{fake.domain}/web", ManifestError, "where its index says")


def test_a_manifest_sent_as_something_else(pulls: QuickPulls, fake: Scripted, image: MadeImage) -> None:
    fake.document("latest", image.manifest, OCI_INDEX)
    fails(pulls, f"{fake.domain}/web", ManifestError, "was sent as")
    both = json.loads(image.manifest)
    both["manifests"] = []
    fake.document("both", json.dumps(both).encode(), OCI_MANIFEST)
    fails(pulls, f"{fake.domain}/web:both", ManifestError, "ambiguous")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, c: m["layers"][0].update(mediaType="text/html"), "layer media type"),
        (lambda m, c: m["layers"][0].update(digest="sha256:../../../etc/passwd"), "not a digest"),
        (lambda m, c: m["layers"][0].update(digest="md5:" + "0" * 32), "not a digest"),
        (lambda m, c: m["layers"][0].update(size=-1), "negative"),
        (lambda m, c: m["layers"][0].update(size=1.5), "invalid manifest"),
        (lambda m, c: m["layers"][0].update(size=5), "announced"),
        (lambda m, c: m["layers"].append(m["layers"][0]), "2 layers"),
        (lambda m, c: m["layers"].clear(), "0 layers"),
        (lambda m, c: m["layers"][0].update(mediaType="application/vnd.labkernel.layer.host"), "layer media type"),
        (lambda m, c: c["rootfs"].update(diff_ids=["sha256:xyz"]), "not a diff ID"),
        (lambda m, c: c["rootfs"].update(diff_ids=None), "invalid image config"),
        (lambda m, c: c.update(rootfs=None), "1 layers"),
        (lambda m, c: c.update(config=[]), "invalid image config"),
        (lambda m, c: m.update(schemaVersion=1), "schema 1"),
        (lambda m, c: m.update(schemaVersion=3), "schemaVersion"),
        (lambda m, c: m.update(config={"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1 << 40}), "artifact"),
    ],
)
def test_a_document_that_cannot_be_meant(pulls: QuickPulls, fake: Scripted, change: Any, words: str) -> None:
    fake.hold(MadeImage({"x": b"x"}, describe=change))
    fails(pulls, f"{fake.domain}/web", LabkernelError, words)


# -- the other way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before a byte", "in the status line", "in a header", "before the body"])
@pytest.mark.parametrize("step", ["HEAD", "POST", "PUT blob", "PUT manifest"])
def test_a_push_whose_answers_are_lost(
    pulls: QuickPulls, fake: Scripted, image: MadeImage, step: str, place: str
) -> None:
    """Each blob arrives, the manifest last, whichever answer does not come."""
    fake.hold(image)
    done = pulls.pull(f"{fake.domain}/web")
    with scripted() as target:
        arrived: dict[str, bytes] = {}
        left = [1]

        def take(handler: BaseHTTPRequestHandler) -> Answer | None:
            path, _, query = handler.path.partition("?")
            method = handler.command
            if method == "HEAD":
                answer = Answer(b"", 200 if path.rpartition("/")[2] in arrived else 404)
            elif method == "POST":
                answer = Answer(b"", 202, Location=f"/v2/web/blobs/uploads/{len(target.asked)}")
            elif method == "GET":
                answer = Answer(b"", 204, Location=path, Range="0-0")
            else:
                digest = query.removeprefix("digest=").replace("%3A", ":") or "manifest"
                arrived[digest] = handler.body  # type: ignore[attr-defined]
                answer = Answer(b"an answer", 201)
            name = "PUT manifest" if "/manifests/" in path else f"{method} blob" if method == "PUT" else method
            if name == step and left[0]:
                left[0] -= 1
                wire = answer.wire()
                return Answer(raw=wire[: CUTS[place](wire)])
            return answer

        target.rules.append(take)
        pulls.images.tag(done.image.id, f"{target.domain}/web:v1")
        Pushes(pulls.images, pulls).push(f"{target.domain}/web:v1")
        assert arrived == {**image.blobs, "manifest": image.manifest}


class Taking:
    """A scripted registry that takes pushes; `meet` is asked before each PUT of a blob is taken."""

    def __init__(self, target: Scripted, meet: Callable[[str], Answer | None]) -> None:
        self.arrived: dict[str, bytes] = {}
        self.begun: list[str] = []
        self._meet = meet
        target.rules.append(self._answer)

    def _answer(self, handler: BaseHTTPRequestHandler) -> Answer:
        path, _, query = handler.path.partition("?")
        if handler.command == "HEAD":
            return Answer(b"", 200 if path.rpartition("/")[2] in self.arrived else 404)
        if handler.command == "POST":
            self.begun.append(path)
            return Answer(b"", 202, Location=f"/v2/web/blobs/uploads/{len(self.begun)}")
        digest = query.removeprefix("digest=").replace("%3A", ":") or "manifest"
        refusal = self._meet(digest) if query else None
        if refusal is None:
            self.arrived[digest] = handler.body  # type: ignore[attr-defined]
        return refusal or Answer(b"", 201)


def test_an_upload_that_its_registry_has_forgotten_begins_anew_once(
    pulls: QuickPulls, fake: Scripted, image: MadeImage
) -> None:
    fake.hold(image)
    done = pulls.pull(f"{fake.domain}/web")
    unknown = Answer(b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN","message":"upload unknown"}]}', 404)
    for times in (1, 2):
        with scripted() as target:
            asked: list[str] = []

            def forget(digest: str, times: int = times, asked: list[str] = asked) -> Answer | None:
                asked.append(digest)
                return unknown if digest == image.layers[0] and asked.count(digest) <= times else None

            taking = Taking(target, forget)
            pulls.images.tag(done.image.id, f"{target.domain}/web:v1")
            push = Pushes(pulls.images, pulls).push
            if times == 1:
                push(f"{target.domain}/web:v1")
                assert taking.arrived == {**image.blobs, "manifest": image.manifest}
                assert len(taking.begun) == len(image.blobs) + 1
            else:
                with pytest.raises(RegistryError, match="upload unknown"):
                    push(f"{target.domain}/web:v1")
                assert "manifest" not in taking.arrived


def test_more_uploads_are_begun_than_are_sent_at_once(pulls: QuickPulls, fake: Scripted) -> None:
    """A registry takes its time to begin one: no PUT is taken here before eight have begun, and three come at once, the
    largest first."""
    pulls.answer_s = pulls.stall_s = 90.0
    image = MadeImage(*({"file": os.urandom(1000 * number)} for number in range(1, 10)))
    fake.hold(image)
    done = pulls.pull(f"{fake.domain}/web")
    with scripted() as target:
        lock, count, most, came = threading.Lock(), [0], [0], list[str]()

        def wait(digest: str) -> Answer | None:
            with lock:
                came.append(digest)
                count[0] += 1
                most[0] = max(most[0], count[0])
            deadline = time.monotonic() + 60
            while not (met := len(taking.begun) >= 8 and most[0] >= 3) and time.monotonic() < deadline:
                time.sleep(0.01)
            with lock:
                count[0] -= 1
            return None if met else Answer(b"", 400)

        taking = Taking(target, wait)
        pulls.images.tag(done.image.id, f"{target.domain}/web:v1")
        Pushes(pulls.images, pulls).push(f"{target.domain}/web:v1")
        assert taking.arrived == {**image.blobs, "manifest": image.manifest}
        assert most == [3]
        assert set(came[:3]) == set(sorted(image.blobs, key=lambda each: -len(image.blobs[each]))[:3])


def test_an_upload_that_is_sent_to_this_machine_or_nowhere() -> None:
    outside = Endpoint("registry.example.org", "registry.example.org", 443)
    for url in ("http://127.0.0.1:2375/", "https://localhost/", "http://169.254.169.254/", "http://[::1]/"):
        with pytest.raises(RegistryError, match="address of this machine"):
            check_place(url, outside)
    check_place("https://cdn.example.org/x", outside)


def test_pages_that_never_end(pulls: QuickPulls, fake: Scripted) -> None:
    page = json.dumps({"name": "web", "tags": [f"t{number}" for number in range(50_000)]}).encode()
    fake.rules.append(lambda h: Answer(page, Link='</v2/web/tags/list?last=x>; rel="next"'))
    with pytest.raises(RegistryError, match="of more than"):
        pulls.tags(f"{fake.domain}/web")
    few = [
        Answer(b'{"tags":["b"]}', Link="<" * 60_000),
        Answer(b'{"tags":["a"]}', Link='</v2/web/tags/list?n=1>; rel="next"'),
    ]
    fake.rules[:] = [lambda h: few.pop()]
    assert pulls.tags(f"{fake.domain}/web") == ["a", "b"]


def test_the_store_is_consistent_after_all_that(kept: Engine) -> None:
    kept.images.prune()
    assert check(kept, verify=True) == []
