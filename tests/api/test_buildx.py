"""buildx over the control protocol, by itself and inside Docker Compose 2. `scripts/setup peers` fetches both."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from buildkit import sleeping
from daemons import Daemon, wait_until
from registries import docker_registry, make_bcrypt

from labkernel.engine import Engine

COMPOSE = Path(sys.prefix) / "peers" / "docker-compose"
BUILDX = Path(sys.prefix) / "peers" / "docker-buildx"
Done = subprocess.CompletedProcess[str]


class Project:
    """A folder with a compose file, and the program for it."""

    def __init__(self, folder: Path, name: str, daemon: Daemon) -> None:
        self.folder = folder
        self.name = name
        self.environment = {
            **os.environ,
            "DOCKER_HOST": daemon.address,
            "DOCKER_CONFIG": str(folder / "config"),
            "HOME": str(folder),
        }
        (folder / "app").mkdir()

    def write(self, **services: Any) -> None:
        """Services that build `app`: a Dockerfile, or what their `build` has beside one under "text"."""
        document: dict[str, Any] = {"name": self.name, "services": {}, "secrets": {"s": {"file": "./secret"}}}
        for service, given in services.items():
            build = {"text": given} if isinstance(given, str) else dict(given)
            text = build.pop("text").replace("$", "$$")
            document["services"][service] = {
                "build": {"context": "./app", "dockerfile_inline": text, **build},
                "network_mode": "none",
            }
        (self.folder / "compose.yaml").write_text(json.dumps(document))

    def argv(self, *words: str) -> list[str]:
        return [str(COMPOSE), "--progress", "plain", *words]

    def __call__(self, *words: str) -> Done:
        return subprocess.run(
            self.argv(*words), cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )


@pytest.fixture
def project(daemon: Daemon, engine: Engine, tmp_path: Path) -> Iterator[Project]:
    if not os.access(COMPOSE, os.X_OK):
        pytest.skip("no Docker Compose 2: `scripts/setup peers .venv` fetches it")
    if subprocess.run([COMPOSE, "version"], capture_output=True).returncode != 0:
        pytest.skip("Docker Compose 2 does not run on this machine")
    found = Project(tmp_path, f"x{os.urandom(4).hex()}", daemon)
    yield found
    for image in engine.images.list():
        if any(found.name in tag for tag in image.tags):
            image.remove(force=True)


def said(done: Done) -> str:
    return done.stdout + done.stderr


def test_a_build_with_its_attributes(project: Project, engine: Engine) -> None:
    (project.folder / "app" / "file").write_text("content\n")
    (project.folder / "app" / "left-out").write_text("x")
    (project.folder / "app" / ".dockerignore").write_text("left-out\n")
    (project.folder / "secret").write_text("very secret")
    text = (
        "FROM lab/busybox AS one\nARG A\nCOPY . /all\nLABEL one=1\n"
        "RUN --mount=type=secret,id=s md5sum < /run/secrets/s; echo a=$A; cat /etc/hosts; ls /all\n"
        "RUN echo n=$(ulimit -n)\n"
        "FROM one\nLABEL two=2\n"
    )
    build = {"text": text, "target": "one", "args": {"A": "7"}, "labels": {"l": "x"}, "secrets": ["s"]}
    limits = {"ulimits": {"nofile": {"soft": 77, "hard": 99}}}
    project.write(
        web={**build, **limits, "extra_hosts": ["far=192.0.2.7"], "tags": [f"{project.name}:other"], "no_cache": True}
    )
    done = project("build")
    assert done.returncode == 0, said(done)
    out = said(done)
    assert re.search(r"#\d+ \[web internal\] load build definition from Dockerfile\n", out)
    assert re.search(r"#\d+ [\d.]+ a=7\n", out)
    assert re.search(r"#\d+ [\d.]+ 192.0.2.7\s+far\n", out)
    assert re.search(r"#\d+ [\d.]+ 5787fb020f4dc9a8fb3e240ca13cae52  -\n", out), out
    assert re.search(r"#\d+ [\d.]+ n=77\n", out), out
    assert "left-out" not in out
    image = engine.images.get(f"{project.name}-web")
    assert image.id == engine.images.get(f"{project.name}:other").id
    assert {"one": "1", "l": "x"}.items() <= image.labels.items()
    assert "two" not in image.labels
    project.write(web=build)
    assert project("build").returncode == 0
    assert re.search(r"#\d+ \[web \d/\d\] RUN .*\n#\d+ CACHED", said(project("build")))
    project.write(web={**build, "target": "three"})
    assert 'target stage "three" could not be found' in said(project("build"))


def test_what_fails_is_said(project: Project) -> None:
    project.write(
        fails="FROM lab/busybox\nRUN echo before; exit 9\n",
        wrong="FROM lab/busybox\nNOPE x\n",
        far={"text": "FROM lab/busybox\n", "platforms": ["linux/s390x"]},
        cache={"text": "FROM lab/busybox\n", "cache_to": ["type=local,dest=x"]},
    )
    done = project("build", "fails")
    assert done.returncode != 0
    assert re.search(
        r"#\d+ [\d.]+ before\n#\d+ ERROR: process .* did not complete successfully: exit code: 9\n", said(done)
    )
    assert "unknown instruction: NOPE" in said(project("build", "wrong"))
    assert "none for linux/s390x" in said(project("build", "far"))
    assert "--cache-to type=local is not available over the API" in said(project("build", "cache"))


def test_named_contexts(project: Project, engine: Engine) -> None:
    (project.folder / "extra").mkdir()
    (project.folder / "extra" / "file").write_text("of the other context\n")
    (project.folder / "extra" / "hidden").write_text("x")
    (project.folder / "extra" / ".dockerignore").write_text("hidden\n")
    project.write(
        web={
            "text": "FROM base\nCOPY --from=other . /o\n"
            "RUN --mount=from=other,target=/m cat /m/file; ls -a /o; cat /of-base\n",
            "additional_contexts": {"other": "./extra", "base": "service:base"},
        },
        base={
            "text": "FROM img\nRUN echo the base > /of-base\n",
            "additional_contexts": {"img": "docker-image://lab/busybox"},
        },
    )
    before = {image.id for image in engine.images.list(all=True)}
    done = project("build", "--with-dependencies", "web")
    assert done.returncode == 0, said(done)
    assert re.search(r"#\d+ [\d.]+ of the other context\n", said(done))
    assert re.search(r"#\d+ [\d.]+ the base\n", said(done))
    assert "hidden" not in said(done)
    made = {image.id for image in engine.images.list(all=True)} - before
    assert made == {engine.images.get(f"{project.name}-{service}").id for service in ("web", "base")}


def test_checks_and_warnings(project: Project) -> None:
    project.write(web="FROM lab/busybox\nMAINTAINER me\n")
    done = project("build")
    assert done.returncode == 0, said(done)
    assert re.search(r"#\d+ WARN: MaintainerDeprecated: ", said(done)), said(done)


def test_a_client_that_leaves_ends_its_build(project: Project, engine: Engine, daemon: Daemon) -> None:
    seconds = str(10_000_000 + int.from_bytes(os.urandom(4), "big"))
    project.write(web=f"FROM lab/busybox\nRUN echo begun; exec sleep {seconds}\n")
    process = subprocess.Popen(
        project.argv("build"),
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"#\d+ [\d.]+ begun", line):
                break
        wait_until(lambda: sleeping(seconds), "the command")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    wait_until(lambda: not sleeping(seconds), "the end of the command")


def test_a_push_with_the_clients_log_in(project: Project, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "passwords").write_text(f"me:{make_bcrypt('secret')}\n")
    extra = f"auth:\n  htpasswd:\n    realm: lab\n    path: {tmp_path / 'passwords'}\n"
    with docker_registry(tmp_path / "registry", extra=extra) as domain:
        name = f"{domain}/{project.name}:1"
        project.write(web="FROM lab/busybox\nRUN echo pushed > /pushed\n")
        document = json.loads((project.folder / "compose.yaml").read_text())
        document["services"]["web"]["image"] = name
        (project.folder / "compose.yaml").write_text(json.dumps(document))
        assert project("build", "--push").returncode != 0
        login = base64.b64encode(b"me:secret").decode()
        (project.folder / "config").mkdir(exist_ok=True)
        (project.folder / "config" / "config.json").write_text(json.dumps({"auths": {domain: {"auth": login}}}))
        done = project("build", "--push")
        assert done.returncode == 0, said(done)
        assert re.search(rf"#\d+ \[web\] pushing {re.escape(name)}\n", said(done))


def test_builds_side_by_side(project: Project, engine: Engine) -> None:
    project.write(**{f"s{number}": f"FROM lab/busybox\nRUN echo n{number} > /n\n" for number in range(6)})
    done = project("build")
    assert done.returncode == 0, said(done)
    for number in range(6):
        name = f"{project.name}-s{number}"
        assert engine.containers.run(name, ["cat", "/n"], remove=True) == f"n{number}\n".encode()


def test_up_builds_and_down_removes(project: Project, engine: Engine) -> None:
    project.write(web='FROM lab/busybox\nRUN echo served > /who\nCMD ["sleep", "3600"]\n')
    done = project("up", "-d", "--build")
    try:
        assert done.returncode == 0, said(done)
        assert project("exec", "-T", "web", "cat", "/who").stdout == "served\n"
    finally:
        ended = project("down", "-t", "0", "--rmi", "local")
    assert ended.returncode == 0, said(ended)
    assert not [each for each in engine.containers.list(all=True) if project.name in each.name]
    assert engine.images.find(f"{project.name}-web") is None


# -- docker's own buildx ---------------------------------------------------------------------------------------------


@pytest.fixture
def buildx(project: Project) -> Callable[..., Done]:
    """`docker buildx WORDS…`, as the plug-in of whatever docker there is."""
    if not os.access(BUILDX, os.X_OK):
        pytest.skip("no buildx: `scripts/setup peers .venv` fetches it")
    plugins = project.folder / "config" / "cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(BUILDX)

    def run(*words: str) -> Done:
        argv = ["docker", "buildx", *words]
        return subprocess.run(
            argv, cwd=project.folder, env=project.environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_docker_buildx(project: Project, engine: Engine, buildx: Callable[..., Done]) -> None:
    app = project.folder / "app"
    (app / "file").write_text("content\n")
    (project.folder / "secret").write_text("very secret")
    (app / "Dockerfile").write_text(
        "FROM lab/busybox\nARG A\nCOPY file /file\n"
        f"RUN --mount=type=secret,id=s wc -c < /run/secrets/s; echo a=$A > /a; : {project.name}\n"
    )
    words = ["--build-arg", "A=7", "--secret", "id=s,src=secret", "app"]
    done = buildx("build", "--progress", "plain", "-t", f"{project.name}:one", "--iidfile", "id", *words)
    assert done.returncode == 0, said(done)
    assert re.search(r"#\d+ [\d.]+ 11\n", said(done))
    image = engine.images.get(f"{project.name}:one")
    assert (project.folder / "id").read_text() == image.id
    assert engine.containers.run(image, ["cat", "/a", "/file"], remove=True) == b"a=7\ncontent\n"
    assert buildx("build", "--output", "type=local,dest=out", *words).returncode == 0
    assert (project.folder / "out" / "a").read_text() == "a=7\n"
    assert buildx("build", "--output", "type=oci,dest=layout.tar", *words).returncode == 0
    with tarfile.open(project.folder / "layout.tar") as archive:
        assert "oci-layout" in archive.getnames()
    assert "linux/amd64" in said(buildx("ls")) or os.uname().machine != "x86_64"
    (secret,) = engine.builds.usage({"description": [f": {project.name}"]})
    assert secret.id in said(buildx("du"))
    assert "exec.cachemount" not in said(buildx("du", "--verbose", "--filter", "type=regular"))
    assert secret.id in said(buildx("prune", "--force", "--filter", f"id={secret.id}"))
    assert secret.id not in said(buildx("du"))


def test_docker_buildx_shows_the_line_that_failed(project: Project, buildx: Callable[..., Done]) -> None:
    (project.folder / "app" / "Dockerfile").write_text("FROM lab/busybox\nRUN echo before; exit 9\n")
    done = buildx("build", "--progress", "plain", "app")
    assert done.returncode != 0
    assert re.search(r"Dockerfile:2\n-+\n.*\n +2 \| >>> RUN echo before; exit 9\n", said(done))
    assert "did not complete successfully: exit code: 9" in said(done)
    both = said(buildx("build", "--platform", "linux/amd64,linux/arm64", "app"))
    assert "one platform at a time" in both


def test_docker_buildx_bake(project: Project, engine: Engine, buildx: Callable[..., Done]) -> None:
    (project.folder / "app" / "Dockerfile").write_text("FROM lab/busybox\nARG A=0\nRUN echo $A > /a\n")
    targets = {
        name: {"context": "app", "args": {"A": name}, "tags": [f"{project.name}:{name}"]} for name in ("one", "two")
    }
    (project.folder / "docker-bake.json").write_text(
        json.dumps({"target": targets, "group": {"default": {"targets": [*targets]}}})
    )
    done = buildx("bake")
    assert done.returncode == 0, said(done)
    for name in targets:
        assert engine.containers.run(f"{project.name}:{name}", ["cat", "/a"], remove=True) == f"{name}\n".encode()
