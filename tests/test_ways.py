"""The ways to a registry, end to end: proxies, mirrors, certificates, insecure registries, lines that break.

Real servers throughout: our registry as a process, a proxy and a relay of a few lines (relays.py), TLS by openssl.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from registries import (
    Answer,
    MadeImage,
    Scripted,
    ask,
    give_image,
    layer_tar,
    make_bcrypt,
    scripted,
    serving,
)
from relays import Proxy, Relay, closing
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import RegistryError
from labkernel.imaging.pulls import Pulls
from labkernel.imaging.pushes import Pushes
from labkernel.oci import endpoints
from labkernel.oci import manifest as oci
from labkernel.oci.registry import Persistence, Refused, Registry

NAME = "registry.example:5443"
"""A name that only the proxy knows."""


@pytest.fixture
def image() -> MadeImage:
    return MadeImage({"a": os.urandom(700_000)}, {"b": b"b" * 1000})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration: nothing of this machine's."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "LABKERNEL_REGISTRIES"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "config/labkernel").mkdir(parents=True)
    (tmp_path / "docker").mkdir()
    return tmp_path


@pytest.fixture
def ready(engine: Engine) -> Iterator[Engine]:
    """The shared engine, its images of registries removed afterwards."""
    kept = {image.id for image in engine.images.list()}
    yield engine
    for image in engine.images.list():
        if image.id not in kept:
            image.remove(force=True)


def settings(home: Path, text: str) -> None:
    (home / "config/labkernel/registries.toml").write_text(text)


class QuickPulls(Pulls):
    """Pulls that lose patience within a test."""

    def open(self, domain: str, *, notify: Any, mirrors: bool = True) -> Registry:
        persistence = Persistence(retries=3, pause_s=0.01)
        return Registry(domain, settings=self.settings, mirrors=mirrors, notify=notify, persistence=persistence)


def pulls(engine: Engine) -> Pulls:
    """With the settings of now: the engine reads them once."""
    return QuickPulls(engine.images)


def push(engine: Engine, image: str, name: str, **more: Any) -> Any:
    engine.images.tag(image, name)
    return Pushes(engine.images, pulls(engine)).push(name, **more)


class Authority:
    """A CA of our own, with certificates for servers and clients."""

    def __init__(self, base: Path) -> None:
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl is not installed")
        self.openssl, self.base = openssl, base
        self.ca, self.key = base / "ca.pem", base / "ca.key"
        self._call("req", "-x509", *self._new(self.key), "-out", str(self.ca), "-days", "2", "-subj", "/CN=our CA")

    def issue(self, name: str, *, alternative: str = "") -> tuple[Path, Path]:
        certificate, key, request = (self.base / f"{name}.{end}" for end in ("pem", "key", "csr"))
        self._call("req", *self._new(key), "-out", str(request), "-subj", f"/CN={name}")
        extra = self.base / f"{name}.ext"
        extra.write_text(f"subjectAltName={alternative or f'DNS:{name}'}\n")
        signing = ["-CA", str(self.ca), "-CAkey", str(self.key), "-CAcreateserial", "-days", "2"]
        self._call("x509", "-req", "-in", str(request), *signing, "-extfile", str(extra), "-out", str(certificate))
        return certificate, key

    def _new(self, key: Path) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]

    def _call(self, *words: str) -> None:
        subprocess.run([self.openssl, *words], check=True, capture_output=True)


# -- proxies and certificates ----------------------------------------------------------------------------------------


def test_an_insecure_registry_behind_a_proxy(
    ready: Engine, home: Path, image: MadeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(home) as domain, closing(Proxy({NAME: domain}, "ada:secret")) as proxy:
        assert isinstance(proxy, Proxy)
        give_image(domain, "web", "v1", image)
        for variable in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, f"http://ada:secret@{proxy.address}")
        settings(home, f'insecure = ["{NAME}"]\n')
        pulled = pulls(ready).pull(f"{NAME}/web:v1")
        assert pulled.digest == image.digest
        assert any(line.startswith(f"GET http://{NAME}/v2/web/manifests/") for line in proxy.asked)
        push(ready, pulled.image.id, f"{NAME}/copy:v2")
        assert ask(domain, "GET", "/v2/copy/tags/list").json["tags"] == ["v2"]
        settings(home, "")
        with pytest.raises(RegistryError, match=r"does not speak TLS|no answer"):
            pulls(ready).pull(f"{NAME}/web:v1")
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        with pytest.raises(RegistryError, match=r"the proxy refuses: .* 407"):
            pulls(ready).pull(f"{NAME}/web:v1")


def test_an_own_authority_behind_a_proxy(
    ready: Engine, home: Path, image: MadeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(home)
    certificate, key = authority.issue("registry.example")
    users = home / "users"
    users.write_text(f"ada:{make_bcrypt('secret')}\n")
    words = ("--tls-cert", str(certificate), "--tls-key", str(key), "--htpasswd", str(users))
    with serving(home, *words) as domain, closing(Proxy({NAME: domain})) as proxy:
        assert isinstance(proxy, Proxy)
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        with pytest.raises(RegistryError, match=r"certificate of registry.example does not verify"):
            pulls(ready).pull(f"{NAME}/web:v1")
        settings(home, f'[ca]\n"{NAME}" = "{authority.ca}"\n')
        with pytest.raises(Refused, match="authentication required"):
            pulls(ready).pull(f"{NAME}/web:v1")
        _helper(home, monkeypatch, {NAME: ("ada", "secret")})
        base = ready.images.resolve("lab/busybox")
        pushed = push(ready, base.id, f"{NAME}/web:v1")
        assert pulls(ready).pull(f"{NAME}/web:v1").digest == pushed.digest
        assert {line.split(" ")[0] for line in proxy.asked} == {"CONNECT"}
        _helper(home, monkeypatch, {NAME: ("ada", "wrong")})
        with pytest.raises(Refused, match=r"access denied|authentication required"):
            pulls(ready).pull(f"{NAME}/web:v1")


def _helper(home: Path, monkeypatch: pytest.MonkeyPatch, logins: dict[str, tuple[str, str]]) -> None:
    """A credential helper on PATH, as Docker's configuration names it."""
    known = {name: json.dumps({"Username": user, "Secret": secret}) for name, (user, secret) in logins.items()}
    lines = [f"  '{name}') echo '{answer}' ;;" for name, answer in known.items()]
    body = ["#!/bin/sh", "read server", 'case "$server" in', *lines]
    body += ["  *) echo credentials not found in native keychain; exit 1 ;;", "esac", ""]
    program = home / "bin/docker-credential-testing"
    program.parent.mkdir(exist_ok=True)
    program.write_text("\n".join(body))
    program.chmod(0o755)
    if str(program.parent) not in os.environ["PATH"].split(":"):
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (home / "docker/config.json").write_text(json.dumps({"credHelpers": dict.fromkeys(logins, "testing")}))


def test_a_registry_that_wants_a_client_certificate(
    ready: Engine, home: Path, image: MadeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(home)
    server, client = authority.issue("server", alternative="IP:127.0.0.1"), authority.issue("client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*server)
    context.load_verify_locations(authority.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    with scripted() as fake:
        fake.hold(image)
        fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True, do_handshake_on_connect=False)
        with pytest.raises(RegistryError):
            pulls(ready).pull(f"{fake.domain}/web")
        directory = home / "config/docker/certs.d" / fake.domain
        directory.mkdir(parents=True)
        shutil.copy(authority.ca, directory / "ca.crt")
        shutil.copy(client[0], directory / "client.cert")
        shutil.copy(client[1], directory / "client.key")
        assert pulls(ready).pull(f"{fake.domain}/web").digest == image.digest


def test_mirrors_are_asked_first_and_stand_aside(ready: Engine, home: Path, image: MadeImage) -> None:
    with scripted() as mirror, scripted() as origin:
        origin.hold(image)
        mirror.hold(image)
        settings(home, f'[mirrors]\n"{origin.domain}" = ["http://{mirror.domain}"]\n')
        assert pulls(ready).pull(f"{origin.domain}/web").digest == image.digest
        assert not origin.asked
        ready.images.remove(f"{origin.domain}/web")
        mirror.rules.append(lambda handler: Answer(b"{}", 503))
        assert pulls(ready).pull(f"{origin.domain}/web").digest == image.digest
        assert any("/manifests/latest" in line for line in origin.asked)
        ready.images.remove(f"{origin.domain}/web")
        origin.asked.clear()
        mirror.rules.clear()
        wrong = image.layers[0]
        mirror.blobs[wrong] = b"x" * len(image.blobs[wrong])  # a mirror that lies is not believed
        with pytest.raises(RegistryError):
            _refused_quietly(ready, f"{origin.domain}/web")
        assert not ready.images.list(f"{origin.domain}/web")


def _refused_quietly(engine: Engine, name: str) -> None:
    from labkernel.errors import CorruptBlob

    try:
        pulls(engine).pull(name)
    except CorruptBlob as err:
        raise RegistryError(err.brief) from err


def test_a_class_pulls_through_its_cache_and_lives_without_the_origin(
    ready: Engine, home: Path, image: MadeImage
) -> None:
    with scripted() as origin:
        origin.hold(image, "v1")
        with serving(home, "--cache-of", origin.domain) as cache:
            settings(home, f'[mirrors]\n"{origin.domain}" = ["http://{cache}"]\n')
            assert pulls(ready).pull(f"{origin.domain}/web:v1").digest == image.digest
            ready.images.remove(f"{origin.domain}/web:v1")
            asked = len(origin.asked)
            origin.rules.append(lambda handler: Answer(b"{}", 500))
            assert pulls(ready).pull(f"{origin.domain}/web:v1").digest == image.digest
            assert not any("/blobs/" in line for line in origin.asked[asked:])


# -- lines that break ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [{}, {"chunk_bytes": 200_000}], ids=["in one piece", "in chunks"])
def test_an_upload_goes_on_where_it_broke_off(
    ready: Engine, home: Path, image: MadeImage, words: dict[str, int]
) -> None:
    with scripted() as source:
        source.hold(image)
        made = pulls(ready).pull(f"{source.domain}/web").image
    size = sum(len(blob) for blob in image.blobs.values())
    with serving(home) as domain, closing(Relay(domain, after=250_000, cuts=2, up=True)) as relay:
        assert isinstance(relay, Relay)
        pushed = push(ready, made.id, f"{relay.address}/broken:v1", **words)
        assert relay.cuts == 0
        assert relay.passed < size + 400_000  # what had arrived was not sent again
        assert ask(domain, "HEAD", "/v2/broken/manifests/v1").headers["Docker-Content-Digest"] == pushed.digest
        for digest, blob in image.blobs.items():
            assert ask(domain, "GET", f"/v2/broken/blobs/{digest}").body == blob


def test_a_download_goes_on_where_it_broke_off(ready: Engine, home: Path, image: MadeImage) -> None:
    size = sum(len(blob) for blob in image.blobs.values())
    with serving(home) as domain, closing(Relay(domain, after=250_000, cuts=2, up=False)) as relay:
        assert isinstance(relay, Relay)
        give_image(domain, "web", "v1", image)
        assert pulls(ready).pull(f"{relay.address}/web:v1").digest == image.digest
        assert relay.cuts == 0
        assert relay.passed < size + 300_000


def test_a_push_of_what_came_from_here_mounts_it(ready: Engine, home: Path, image: MadeImage) -> None:
    with serving(home) as domain:
        give_image(domain, "origin/web", "v1", image)
        made = pulls(ready).pull(f"{domain}/origin/web:v1").image
        said: set[str] = set()
        push(ready, made.id, f"{domain}/copy/web:v1", watch=lambda states: said.update(s.status for s in states))
        assert "Mounted from origin/web" in said
        assert "Pushed" not in said


# -- what is in the layers, who pulls them ---------------------------------------------------------------------------


def test_layers_of_every_compression_are_pulled_and_run(ready: Engine) -> None:
    zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    tar = layer_tar({"note": b"from zstd"})

    def describe(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        layers = manifest["layers"]
        layers[1] |= {"mediaType": oci.OCI_LAYER_ZSTD, "digest": oci.digest_of(packed), "size": len(packed)}
        layers[2] |= {"mediaType": oci.OCI_LAYER, "digest": oci.digest_of(plain), "size": len(plain)}

    packed, plain = zstd.compress(tar), layer_tar({"plain": b"as it is"})
    made = MadeImage({"gzip": b"1"}, {"note": b"from zstd"}, {"plain": b"as it is"}, describe=describe)
    made.blobs.update({oci.digest_of(packed): packed, oci.digest_of(plain): plain})
    with scripted() as fake:
        fake.hold(made)
        image = pulls(ready).pull(f"{fake.domain}/web").image
        top, middle, _ = ready.images.layer_dirs(image)
        assert (middle / "note").read_bytes() == b"from zstd"
        assert (top / "plain").read_bytes() == b"as it is"


def _pull_process(engine: Engine, name: str) -> subprocess.Popen[str]:
    return _process(engine, "pull", name)


def _process(engine: Engine, *words: str) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
    }
    argv = [sys.executable, "-m", "labkernel.cli", *words]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _slow(fake: Scripted) -> None:
    """The first bytes of each layer come at once, the rest only when somebody else has asked for something, too."""

    def rule(handler: BaseHTTPRequestHandler) -> Answer | None:
        if "/blobs/" in handler.path and len(fake.blobs.get(handler.path.rpartition("/")[2], b"")) > 10_000:
            wait_until(lambda: sum("manifests/latest" in line for line in fake.asked) >= 2)
        return None

    fake.rules.append(rule)


def test_two_processes_that_pull_one_image_download_it_once(ready: Engine, home: Path, image: MadeImage) -> None:
    with scripted() as fake:
        fake.hold(image)
        _slow(fake)
        both = [_pull_process(ready, f"{fake.domain}/web") for _ in range(2)]
        for process in both:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
        for digest in image.layers:
            assert sum(digest in line for line in fake.asked) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_pull_that_is_ended_leaves_nothing_half_done(
    fresh_engine: Engine, home: Path, image: MadeImage, number: signal.Signals
) -> None:
    big = max(image.layers, key=lambda digest: len(image.blobs[digest]))
    with scripted() as fake:
        fake.hold(image)

        def half(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(image.blobs[big][:300_000])
            handler.wfile.flush()
            handler.rfile.read(1)  # until the client goes

        hang = Answer(send=half, Content_Length=str(len(image.blobs[big])))
        fake.rules.append(lambda handler: hang if handler.path.endswith(big) else None)
        process = _pull_process(fresh_engine, f"{fake.domain}/web")
        wait_until(lambda: any(big in line for line in fake.asked))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert not fresh_engine.images.list()
        if number == signal.SIGKILL:  # what it leaves is found by the next sweep
            fresh_engine.images.sweep()
        layout = fresh_engine.layout
        assert not os.listdir(layout.tmp)
        assert not os.listdir(layout.layers)
        assert not list(fresh_engine.blobs)
        fake.rules.clear()
        assert pulls(fresh_engine).pull(f"{fake.domain}/web").digest == image.digest
        assert not fresh_engine.check(verify=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_unpacking_of_several_layers_that_is_ended_leaves_nothing_half_done(
    fresh_engine: Engine, home: Path, number: signal.Signals
) -> None:
    """The layers of an image that was only fetched are unpacked at once, in the first `create` that needs them."""
    busybox = fresh_engine.images.resolve("lab/busybox")
    large = MadeImage(*({f"{layer}-{number}": b"" for number in range(40_000)} for layer in "ab"))
    at_once = min(2, len(os.sched_getaffinity(0)))
    layout = fresh_engine.layout
    before = set(os.listdir(layout.layers))
    with scripted() as fake:
        fake.hold(large)
        name = f"{fake.domain}/web"
        image = pulls(fresh_engine).pull(name, unpack=False).image
    process = _process(fresh_engine, "create", name, "/x")
    wait_until(lambda: len(list(layout.tmp.glob("*/root/[ab]-0"))) >= at_once)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert not fresh_engine.containers.list(all=True)
    if number == signal.SIGKILL:  # what it leaves is found by the next sweep
        fresh_engine.images.sweep()
    assert not os.listdir(layout.tmp)
    assert {image.id, busybox.id} == {each.id for each in fresh_engine.images.list()}
    assert [each for each in os.listdir(layout.layers) if each not in before] == []
    assert not fresh_engine.check(verify=True)
    assert [len(os.listdir(path)) for path in fresh_engine.images.layer_dirs(image)] == [40_000, 40_000]


def test_proxies_that_are_no_http_proxies_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoints.find_proxy("https", "registry.example", 443, {"ALL_PROXY": "socks5://x:1"}) == "socks5://x:1"
    from labkernel.errors import UsageError

    with pytest.raises(UsageError, match="only HTTP proxies"):
        endpoints.proxy_address("socks5://x:1")
