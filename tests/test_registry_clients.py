"""Other people's clients against our registry: docker, podman, buildah, skopeo and oras push and pull for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dockerd import own_docker
from registries import ask, make_bcrypt, serving

from labkernel.engine import Engine
from labkernel.imaging.pulls import Pulls
from labkernel.oci.credentials import Credentials, Login
from labkernel.oci.endpoints import Settings

LIMIT_S = 120


@pytest.fixture(scope="module")
def domain(shared_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Our registry, on the shared engine's store: what clients push is among its blobs."""
    shared_engine.images.resolve("lab/busybox")
    env = {
        "LABKERNEL_ROOT": str(shared_engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(shared_engine.layout.runtime_dir),
    }
    with serving(tmp_path_factory.mktemp("clients"), "--store", env=env) as found:
        yield found


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (apt-get install {name})")
    return found


def call(*words: str, cwd: Path | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr[-2000:]}"
    return done.stdout.strip()


@pytest.fixture
def storage() -> Iterator[list[str]]:
    """Words that give podman or buildah a storage of its own."""
    if os.geteuid() != 0:
        pytest.skip("podman and buildah need root, or id ranges, to unpack an image")
    base = Path(tempfile.mkdtemp(prefix="lk-c-", dir="/tmp"))
    try:
        yield [f"--root={base}/s", f"--runroot={base}/r", "--storage-driver=vfs"]
    finally:
        shutil.rmtree(base, ignore_errors=True)


def said(engine: Engine, name: str, path: str) -> str:
    """What is in a file of an image that our own client pulls."""
    engine.pulls.pull(name)
    try:
        return engine.containers.run(name, ["cat", path], remove=True).decode()
    finally:
        engine.images.remove(name, force=True)


@pytest.mark.slow
def test_docker(shared_engine: Engine, domain: str) -> None:
    tool("docker")
    with own_docker() as docker:
        docker.call("pull", "-q", f"{domain}/lab/busybox:latest")
        docker.call("tag", f"{domain}/lab/busybox:latest", f"{domain}/docker/web:v1")
        pushed = docker.call("push", f"{domain}/docker/web:v1")
        digest = pushed.rpartition("digest: ")[2].split()[0]
        assert ask(domain, "HEAD", "/v2/docker/web/manifests/v1").headers["Docker-Content-Digest"] == digest
        again = docker.call("push", f"{domain}/docker/web:v1")
        assert "Layer already exists" in again
        mounted = docker.call("tag", f"{domain}/docker/web:v1", f"{domain}/docker/other:v1")
        mounted = docker.call("push", f"{domain}/docker/other:v1")
        assert "Mounted from docker/web" in mounted
        docker.call("rmi", "-f", *docker.call("images", "-q").splitlines())
        docker.call("pull", "-q", f"{domain}/docker/web@{digest}")
    assert shared_engine.pulls.pull(f"{domain}/docker/web:v1").digest == digest
    assert "root" in said(shared_engine, f"{domain}/docker/web:v1", "/etc/passwd")


def test_podman(shared_engine: Engine, domain: str, storage: list[str]) -> None:
    podman = [tool("podman"), *storage, "--cgroup-manager=cgroupfs", "--events-backend=file"]
    call(*podman, "pull", "-q", "--tls-verify=false", f"{domain}/lab/busybox:latest")
    call(*podman, "tag", f"{domain}/lab/busybox:latest", f"{domain}/podman/web:v1")
    call(*podman, "push", "-q", "--tls-verify=false", f"{domain}/podman/web:v1")
    call(*podman, "rmi", "-af")
    call(*podman, "pull", "-q", "--tls-verify=false", f"{domain}/podman/web:v1")
    found = json.loads(
        call(*podman, "search", "--tls-verify=false", "--list-tags", "--format=json", f"{domain}/podman/web")
    )
    assert found[0]["Tags"] == ["v1"]
    assert "root" in said(shared_engine, f"{domain}/podman/web:v1", "/etc/passwd")


def test_buildah(shared_engine: Engine, domain: str, storage: list[str], tmp_path: Path) -> None:
    buildah = [tool("buildah"), *storage]
    (tmp_path / "note").write_text("from buildah")
    container = call(*buildah, "from", "-q", "--tls-verify=false", f"{domain}/lab/busybox:latest")
    call(*buildah, "copy", "-q", container, str(tmp_path / "note"), "/note")
    call(*buildah, "commit", "-q", container, "made:v1")
    call(*buildah, "push", "-q", "--tls-verify=false", "made:v1", f"docker://{domain}/buildah/made:v1")
    call(*buildah, "push", "-q", "--tls-verify=false", "--format=v2s2", "made:v1", f"docker://{domain}/buildah/made:v2")
    call(*buildah, "rm", "-a")
    for tag in ("v1", "v2"):
        assert said(shared_engine, f"{domain}/buildah/made:{tag}", "/note") == "from buildah"


def test_skopeo(fresh_engine: Engine, domain: str, tmp_path: Path) -> None:
    skopeo = tool("skopeo")
    for form in ("oci", "v2s2"):
        name, copy = f"{domain}/skopeo/{form}:v1", f"docker://{domain}/skopeo/{form}:v1"
        plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        call(skopeo, "copy", "-q", *plain, "--format", form, f"docker://{domain}/lab/busybox:latest", copy)
        assert "root" in said(fresh_engine, name, "/etc/passwd")
        call(skopeo, "copy", "-q", "--src-tls-verify=false", copy, f"dir:{tmp_path}/{form}")
        listed = json.loads(call(skopeo, "list-tags", "--tls-verify=false", copy.removesuffix(":v1")))
        assert listed["Tags"] == ["v1"]
        call(skopeo, "delete", "--tls-verify=false", copy)
        assert ask(domain, "GET", f"/v2/skopeo/{form}/manifests/v1").status == 404


def test_oras(shared_engine: Engine, domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oras = pytest.importorskip("oras.client", reason="oras is not installed (pip install oras)")
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("from oras")
    client: Any = oras.OrasClient(hostname=domain, insecure=True)
    reply = client.push(target=f"{domain}/oras/notes:v1", files=["note.txt"])
    assert reply.status_code == 201
    assert client.get_tags(f"{domain}/oras/notes") == ["v1"]
    client.pull(target=f"{domain}/oras/notes:v1", outdir="out")
    assert Path("out/note.txt").read_text() == "from oras"
    (path,) = shared_engine.artifacts.fetch(f"{domain}/oras/notes:v1", "ours")
    assert path.read_text() == "from oras"
    digest = shared_engine.artifacts.attach(f"{domain}/lab/busybox", ["note.txt"], artifact_type="text/plain")
    client.pull(target=f"{domain}/lab/busybox@{digest}", outdir="attached")
    assert Path("attached/note.txt").read_text() == "from oras"


# -- users and TLS -----------------------------------------------------------------------------------------------------


class Guarded(NamedTuple):
    """A registry of our own with TLS and one user: its domain, its certificate, and a directory that trusts it."""

    domain: str
    certificate: Path
    trusted: Path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    base = tmp_path_factory.mktemp("guarded")
    key, certificate, users, trusted = base / "key.pem", base / "cert.pem", base / "users", base / "trusted"
    make = [tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key)]
    subject = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    call(*make, "-out", str(certificate), *subject)
    users.write_text(f"ada:{make_bcrypt('secret')}\n")
    trusted.mkdir()
    shutil.copy(certificate, trusted / "ca.crt")
    with serving(base, "--tls-cert", str(certificate), "--tls-key", str(key), "--htpasswd", str(users)) as domain:
        yield Guarded(domain, certificate, trusted)


def ours(engine: Engine, guarded: Guarded, base: Path, *names: str) -> None:
    """Our own client, which trusts the certificate and has the log-in, pulls what others pushed."""
    settings = Settings(ca={guarded.domain: str(guarded.certificate)})
    credentials = Credentials({"XDG_CONFIG_HOME": str(base / "config"), "DOCKER_CONFIG": str(base / "docker")})
    credentials.store(guarded.domain, Login("ada", "secret"))
    pulls = Pulls(engine.images, settings=settings, credentials=credentials)
    for name in names:
        assert pulls.pull(f"{guarded.domain}/{name}").image.layers
        engine.images.remove(f"{guarded.domain}/{name}", force=True)


def test_skopeo_with_a_log_in_over_tls(
    fresh_engine: Engine, shared_engine: Engine, guarded: Guarded, tmp_path: Path
) -> None:
    skopeo = tool("skopeo")
    with (tmp_path / "box.tar").open("wb") as out:
        shared_engine.images.resolve("lab/busybox")
        shared_engine.images.save(["lab/busybox"], out)
    source, name = f"docker-archive:{tmp_path}/box.tar", f"docker://{guarded.domain}/skopeo/web:v1"
    sent = ["copy", "-q", "--dest-cert-dir", str(guarded.trusted)]
    done = subprocess.run([skopeo, *sent, source, name], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode != 0, "authentication required" in done.stderr) == (True, True)
    call(skopeo, *sent, "--dest-creds=ada:secret", source, name)
    login = ["--authfile", str(tmp_path / "auth.json"), "--cert-dir", str(guarded.trusted)]
    call(skopeo, "login", *login, "-u", "ada", "-p", "secret", guarded.domain)
    found = json.loads(call(skopeo, "inspect", *login, name))
    assert found["Name"] == f"{guarded.domain}/skopeo/web"
    ours(fresh_engine, guarded, tmp_path, "skopeo/web:v1")


def test_podman_and_buildah_with_a_log_in_over_tls(
    fresh_engine: Engine, shared_engine: Engine, guarded: Guarded, storage: list[str], tmp_path: Path
) -> None:
    podman = [tool("podman"), *storage, "--cgroup-manager=cgroupfs", "--events-backend=file"]
    buildah = [tool("buildah"), *storage]
    with (tmp_path / "box.tar").open("wb") as out:
        shared_engine.images.resolve("lab/busybox")
        shared_engine.images.save(["lab/busybox"], out)
    call(*podman, "load", "-q", "-i", str(tmp_path / "box.tar"))
    login = ["--authfile", str(tmp_path / "auth.json"), "--cert-dir", str(guarded.trusted)]
    call(*podman, "login", *login, "-u", "ada", "-p", "secret", guarded.domain)
    call(*podman, "tag", "lab/busybox", f"{guarded.domain}/podman/web:v1")
    call(*podman, "push", "-q", *login, f"{guarded.domain}/podman/web:v1")
    call(*buildah, "push", "-q", *login, "lab/busybox", f"docker://{guarded.domain}/buildah/web:v1")
    call(*podman, "rmi", "-af")
    call(*podman, "pull", "-q", *login, f"{guarded.domain}/podman/web:v1")
    call(*buildah, "pull", "-q", *login, f"{guarded.domain}/buildah/web:v1")
    ours(fresh_engine, guarded, tmp_path, "podman/web:v1", "buildah/web:v1")


@pytest.mark.slow
def test_docker_with_a_log_in_over_tls(
    fresh_engine: Engine, shared_engine: Engine, guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker's daemon takes any certificate of a registry on this machine."""
    tool("docker")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker-login"))
    with (tmp_path / "box.tar").open("wb") as out:
        shared_engine.images.resolve("lab/busybox")
        shared_engine.images.save(["lab/busybox"], out)
    with own_docker() as docker:
        name = f"{guarded.domain}/docker/web:v1"
        docker.call("load", "-q", "-i", str(tmp_path / "box.tar"))
        docker.call("tag", "lab/busybox", name)
        with pytest.raises(AssertionError, match=r"no basic auth credentials|unauthorized|authentication required"):
            docker.call("push", name)
        docker.call("login", "-u", "ada", "-p", "secret", guarded.domain)
        docker.call("push", name)
        docker.call("rmi", "-f", *docker.call("images", "-q").splitlines())
        docker.call("pull", "-q", name)
    ours(fresh_engine, guarded, tmp_path, "docker/web:v1")


def test_oras_with_a_log_in_over_tls(
    shared_engine: Engine, guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oras = pytest.importorskip("oras.client", reason="oras is not installed (pip install oras)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(guarded.certificate))
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("note.txt").write_text("from oras")
    client: Any = oras.OrasClient(hostname=guarded.domain, auth_backend="basic")
    client.auth.set_basic_auth("ada", "secret")
    assert client.push(target=f"{guarded.domain}/oras/notes:v1", files=["note.txt"]).status_code == 201
    client.pull(target=f"{guarded.domain}/oras/notes:v1", outdir="out")
    assert Path("out/note.txt").read_text() == "from oras"
