"""BuildKit's control protocol, by a client on somebody else's gRPC: what buildx's own never asks, and what is wrong."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import socket
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buildkit import BRIDGE, CONTROL, Client, pairs, sleeping, upgraded
from daemons import Daemon, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkernel.api import protobuf
from labkernel.engine import Engine


@pytest.fixture
def app(tmp_path: Path) -> Path:
    found = tmp_path / "app"
    found.mkdir()
    (found / "Dockerfile").write_text(
        f"FROM lab/busybox\nLABEL n={os.urandom(4).hex()}\nRUN echo made > /made\nCMD echo no list\n"
    )
    return found


@pytest.fixture
def client(daemon: Daemon, app: Path) -> Iterator[Client]:
    folder = Path(tempfile.mkdtemp(prefix="lk-g-"))
    found = Client(daemon, folder, {"context": app, "dockerfile": app})
    yield found
    found.close()
    shutil.rmtree(folder)


def refused(client: Client, *args: Any, **more: Any) -> tuple[str, str]:
    """(name of the code, message) of a build that is refused."""
    with pytest.raises(client.grpc.RpcError) as caught:
        client.solve(*args, **more)
    return caught.value.code().name, caught.value.details()


def said(answer: dict[int, list[Any]], field: int = 1) -> dict[str, str]:
    entries = map(protobuf.decode, answer.get(field, []))
    return {protobuf.text(each, 1): protobuf.text(each, 2) for each in entries}


def test_results_go_where_they_are_asked_to(client: Client, engine: Engine) -> None:
    name = f"g{os.urandom(4).hex()}"
    exports = [
        ("moby", {"name": f"{name},{name}:2"}),
        ("docker", {"name": f"{name}:archived"}),
        ("oci", {}),
        ("tar", {}),
    ]
    try:
        answer = said(client.solve({}, *exports))
        image = engine.images.get(name)
        assert image.id == engine.images.get(f"{name}:2").id == answer["containerimage.config.digest"]
        assert answer["image.name"] == f"{name},{name}:2"
        assert engine.images.find(f"{name}:archived") is None
        with tarfile.open(fileobj=io.BytesIO(client.results["1"])) as tar:
            manifest = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert [each.rpartition("/")[2] for each in manifest[0]["RepoTags"]] == [f"{name}:archived"]
        with tarfile.open(fileobj=io.BytesIO(client.results["2"])) as tar:
            assert {"oci-layout", "index.json"} <= set(tar.getnames())
        with tarfile.open(fileobj=io.BytesIO(client.results["3"])) as tar:
            assert tar.extractfile("made").read() == b"made\n"  # type: ignore[union-attr]
        loaded = engine.images.load(client.results["1"])
        assert loaded[0].tags[-1] == f"{name}:archived" or f"{name}:archived" in loaded[0].tags
    finally:
        for each in engine.images.list(name):
            each.remove(force=True)


def test_a_context_that_is_uploaded(client: Client, engine: Engine) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in (("Dockerfile", b"FROM scratch\nCOPY x /x\n"), ("x", os.urandom(300_000))):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    client.uploads["/given"] = buffer.getvalue()
    client.solve({"context": "http://buildkit-session/given"}, ("tar", {}))
    with tarfile.open(fileobj=io.BytesIO(client.results["0"])) as tar:
        assert tar.extractfile("x").read() == data  # type: ignore[union-attr]


def test_limits_of_steps(client: Client, app: Path, engine: Engine) -> None:
    (app / "Dockerfile").write_text(
        f"FROM lab/busybox\nENV N={os.urandom(4).hex()}\nRUN df -k /dev/shm | tail -1 > /shm; ulimit -n > /n\n"
    )
    client.solve({"shm-size": str(8 << 20), "ulimit": "nofile=77:99,nproc=500:500"}, ("tar", {}))
    with tarfile.open(fileobj=io.BytesIO(client.results["0"])) as tar:
        assert tar.extractfile("n").read() == b"77\n"  # type: ignore[union-attr]
        shm = tar.extractfile("shm").read().split()  # type: ignore[union-attr]
    assert engine.driver.name == "proot" or shm[1] == b"8192"
    assert "invalid ulimit type" in refused(client, {"ulimit": "nothing=1"})[1]


def test_a_build_led_by_its_client(client: Client, engine: Engine) -> None:
    """As buildx does it: opened, built, told which result it is to be; and followed from the side."""
    ref, name = os.urandom(8).hex(), f"g{os.urandom(4).hex()}"
    opening = [(1, ref), (5, client.id), (13, [(1, "moby"), *pairs(2, {"name": name})])]
    opened: list[Any] = []
    thread = threading.Thread(target=lambda: opened.append(client.call(f"{CONTROL}/Solve", opening)))
    thread.start()
    try:
        ping = client.call(f"{BRIDGE}/Ping", build=ref)
        caps = {protobuf.text(protobuf.decode(each), 1) for each in ping[1]}
        assert {"return", "solve.base"} <= caps
        built = client.call(f"{BRIDGE}/Solve", [(2, "dockerfile.v0"), (5, True)], build=ref)
        result = protobuf.decode(built[3][0])
        assert engine.images.find(name) is None, "nothing is named before the client has chosen"
        client.call(f"{BRIDGE}/Evaluate", [(1, protobuf.text(protobuf.decode(result[3][0]), 1))], build=ref)
        with pytest.raises(client.grpc.RpcError, match="no such result"):
            client.call(f"{BRIDGE}/Return", [(1, [(3, [(1, "other")])])], build=ref)
        client.call(f"{BRIDGE}/Return", [(1, [(3, result[3][0])])], build=ref)
        thread.join(60)
        assert said(opened[0])["containerimage.digest"] == engine.images.get(name).id
        told = list(client.stream(f"{CONTROL}/Status", [(1, ref)]))
        vertices = [protobuf.decode(each) for message in told for each in message.get(1, [])]
        assert "exporting to image" in {protobuf.text(each, 3) for each in vertices}
        warnings = [protobuf.decode(each) for message in told for each in message.get(4, [])]
        assert any(protobuf.data(each, 3).startswith(b"JSONArgsRecommended") for each in warnings)
    finally:
        thread.join(60)
        for image in engine.images.list(name):
            image.remove(force=True)


def test_requests_that_build_nothing(client: Client, engine: Engine) -> None:
    before = {image.id for image in engine.images.list(all=True)}
    ref = os.urandom(8).hex()
    thread = threading.Thread(target=lambda: client.call(f"{CONTROL}/Solve", [(1, ref), (5, client.id)]))
    thread.start()
    try:
        asked = [(2, "dockerfile.v0"), *pairs(3, {"requestid": "frontend.lint"})]
        result = protobuf.decode(client.call(f"{BRIDGE}/Solve", asked, build=ref)[3][0])
        document = json.loads(said(result, 10)["result.json"])
        assert [each["ruleName"] for each in document["warnings"]] == ["JSONArgsRecommended"]
        assert document["warnings"][0]["location"]["ranges"][0]["start"] == {"line": 4}
        assert said(result, 10)["result.statuscode"] == "1"
        asked = [(2, "dockerfile.v0"), *pairs(3, {"requestid": "frontend.none"})]
        with pytest.raises(client.grpc.RpcError, match="unsupported request"):
            client.call(f"{BRIDGE}/Solve", asked, build=ref)
    finally:
        client.call(f"{BRIDGE}/Return", [(1, [])], build=ref)
        thread.join(60)
    assert {image.id for image in engine.images.list(all=True)} == before


def test_what_cannot_be_had_is_refused_by_name(client: Client, app: Path) -> None:
    graph = [(2, [(1, b"an operation")])]
    code, message = refused(client, frontend="", fields=graph)
    assert (code, "LLB" in message) == ("UNIMPLEMENTED", True)
    assert refused(client, frontend="gateway.v0")[0] == "UNIMPLEMENTED"
    assert refused(client, {}, ("registry", {}))[0] == "UNIMPLEMENTED"
    assert refused(client, {}, ("oci", {"tar": "false"}))[0] == "UNIMPLEMENTED"
    assert refused(client, {"attest:sbom": ""})[0] == "UNIMPLEMENTED"
    assert "none for linux/s390x" in refused(client, {"platform": "linux/s390x"})[1]
    assert refused(client, {"platform": "a/b/c/d"})[0] == "INVALID_ARGUMENT"
    code, message = refused(client, {"platform": "linux/amd64,linux/arm64"})
    assert (code, "one platform" in message) == ("INVALID_ARGUMENT", True)
    assert refused(client, {"context:lab/busybox": "oci-layout://x@sha256:0"})[0] == "UNIMPLEMENTED"
    assert refused(client, {"cache-imports": "[1"})[0] == "INVALID_ARGUMENT"
    (app / "Dockerfile").write_text("FROM lab/busybox\nNOPE\n")
    with pytest.raises(client.grpc.RpcError) as caught:
        client.solve()
    assert "unknown instruction: NOPE" in caught.value.details()
    status = protobuf.decode(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    detail = protobuf.decode(status[3][0])
    assert protobuf.text(detail, 1) == "github.com/moby/buildkit/errdefs.Source+json"
    assert json.loads(protobuf.data(detail, 2))["ranges"][0]["start"] == {"line": 2}


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_the_builder_tells_of_itself(client: Client, app: Path) -> None:
    workers = client.call(f"{CONTROL}/ListWorkers")[1]
    worker = protobuf.decode(workers[0])
    assert protobuf.text(protobuf.decode(worker[3][0]), 2) == "linux"
    version = protobuf.decode(client.call(f"{CONTROL}/Info")[1][0])
    assert protobuf.text(version, 1) == "labkernel"
    config = client.call(f"{BRIDGE}/ResolveImageConfig", [(1, "lab/busybox")])
    assert json.loads(protobuf.data(config, 2))["os"] == "linux"
    (app / "x").write_text("x")
    with served(app) as url:
        (app / "Dockerfile").write_text(
            f"FROM lab/busybox\nADD {url}/x /x\nRUN --mount=type=cache,target=/c touch /c/y\n"
        )
        client.solve()
    usage = [protobuf.decode(each) for each in client.call(f"{CONTROL}/DiskUsage")[1]]
    assert {protobuf.text(each, 9) for each in usage} >= {"cache mount /c"}
    assert all(protobuf.text(each, 1) for each in usage)
    assert [protobuf.text(each, 9) for each in client.stream(f"{CONTROL}/Prune")]
    with pytest.raises(client.grpc.RpcError, match="unknown method"):
        client.call(f"{CONTROL}/Nothing")
    with pytest.raises(client.grpc.RpcError, match="no such job"):
        list(client.stream(f"{CONTROL}/Status", [(1, "nothing")]))


def test_a_call_that_is_broken_off_ends_its_build(client: Client, app: Path, engine: Engine, tmp_path: Path) -> None:
    seconds = str(10_000_000 + int.from_bytes(os.urandom(4), "big"))
    (app / "Dockerfile").write_text(f"FROM lab/busybox\nRUN echo begun; exec sleep {seconds}\n")
    ref = os.urandom(8).hex()
    fields = protobuf.encode([(1, ref), (5, client.id), (6, "dockerfile.v0")])
    call = client.channel.unary_unary(f"{CONTROL}/Solve").future(fields)
    status = client.channel.unary_stream(f"{CONTROL}/Status")(protobuf.encode([(1, ref)]), timeout=120)
    for message in status:
        if 3 in protobuf.decode(message):  # the command has written something
            break
    wait_until(lambda: sleeping(seconds), "the command")
    call.cancel()
    rest = [protobuf.decode(message) for message in status]  # it ends
    assert not any(
        protobuf.text(protobuf.decode(each), 3).startswith("exporting") for m in rest for each in m.get(1, [])
    )
    wait_until(lambda: not sleeping(seconds), "the end of the command")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\4\x08\0\0\0\0\0\0\0\0\0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(200),
    ],
    ids=range(5),
)
def test_bytes_that_are_not_the_protocol(daemon: Daemon, data: bytes) -> None:
    before = descriptors(daemon)
    sock = upgraded(daemon, "/grpc")
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(60)
    while sock.recv(65536):
        pass
    sock.close()
    wait_until(lambda: descriptors(daemon) <= before, "the end of the connection")
    assert "Traceback" not in daemon.said()


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


METHODS = [
    *(f"{CONTROL}/{name}" for name in ("Solve", "Info", "ListWorkers", "DiskUsage")),
    *(f"{BRIDGE}/{name}" for name in ("Ping", "Solve", "Return", "Evaluate", "Inputs", "Warn")),
]
FIELDS: Any = st.recursive(
    st.one_of(st.integers(0, 1 << 64), st.binary(max_size=20), st.text(max_size=10)),
    lambda inner: st.lists(st.tuples(st.integers(1, 16), inner), max_size=4),
    max_leaves=12,
)


def opened(client: Client) -> tuple[str, Any]:
    """A build that its client leads: its name, and the call that opened it."""
    ref = os.urandom(8).hex()
    return ref, client.channel.unary_unary(f"{CONTROL}/Solve").future(protobuf.encode([(1, ref), (5, client.id)]))


@given(method=st.sampled_from(METHODS), fields=st.lists(st.tuples(st.integers(1, 16), FIELDS), max_size=6))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_whatever_is_sent_is_no_bug(client: Client, daemon: Daemon, method: str, fields: Any) -> None:
    if method == f"{CONTROL}/Solve":  # with a name of its own, and nothing that waits for a session
        fields = [(1, os.urandom(8).hex()), *(each for each in fields if each[0] not in (1, 5, 6)), (6, "gateway.v0")]
    ref, call = opened(client)
    with contextlib.suppress(client.grpc.RpcError):
        metadata = [("buildkit-controlapi-buildid", ref)]
        client.channel.unary_unary(method)(protobuf.encode(fields), metadata=metadata, timeout=60)
    call.cancel()
    assert "Traceback" not in daemon.said()


def test_messages_that_are_none(client: Client, daemon: Daemon) -> None:
    for method in ("Solve", "Status"):
        call = client.channel.unary_unary(f"{CONTROL}/{method}")
        with pytest.raises(client.grpc.RpcError):
            call(b"\xff\xff\xff", timeout=60)
    odd = refused(client, frontend=b"\xff\xfe")  # which is no text
    assert odd[0] == "UNIMPLEMENTED"
    with pytest.raises(client.grpc.RpcError, match="needs a ref"):
        client.call(f"{CONTROL}/Solve", [(6, "dockerfile.v0")])
    assert client.call(f"{CONTROL}/Info")
    assert "Traceback" not in daemon.said()
