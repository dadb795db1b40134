"""Docker Compose, which nobody here wrote, against the daemon: Debian's first one, and the second (`scripts/setup`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon, wait_until

from labkernel.engine import Engine

PROGRAMS = {"1": shutil.which("docker-compose") or "", "2": str(Path(sys.prefix) / "peers" / "docker-compose")}
FILE = """
services:
  db:
    image: lab/busybox
    command: sh -c "echo db began; sleep 1; touch /data/ready; exec sleep 100000"
    volumes: [data:/data]
    networks: [back]
    stop_grace_period: 0s
    healthcheck: {test: [CMD, test, -f, /data/ready], interval: 1s, timeout: 10s, retries: 100}
  web:
    build: {context: ., args: {V: "${V:-2}"}}
    command: sh -c "echo up $$DEF $$ONE; exec httpd -f -p 80 -h /www"
    depends_on: {db: {condition: service_healthy}}
    environment: {DEF: "${DEF:-fallback}"}
    env_file: [one.env]
    ports: ["127.0.0.1::80"]
    networks: [front, back]
    secrets: [pw]
    labels: {tier: front}
    stop_grace_period: 0s
  client:
    image: lab/busybox
    command: sleep 100000
    networks: [back]
    stop_grace_period: 0s
  debug:
    image: lab/busybox
    profiles: [debug]
volumes: {data: {}}
networks: {front: {}, back: {internal: true}}
secrets: {pw: {file: ./pw}}
"""


class Compose:
    def __init__(self, which: str, folder: Path, daemon: Daemon) -> None:
        self.which = which
        self.name = f"c{os.urandom(4).hex()}"
        self.folder = folder
        self.environment = {
            **os.environ,
            "DOCKER_HOST": daemon.address,
            "DOCKER_CONFIG": str(folder / "config"),
            "COMPOSE_PROJECT_NAME": self.name,
            "HOME": str(folder),
        }

    def __call__(self, *words: str, code: int = 0) -> str:
        """What it says on either stream."""
        done = subprocess.run(
            [PROGRAMS[self.which], *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=170,
        )
        assert done.returncode == code, (words, done.stdout)
        return done.stdout

    def container(self, service: str, number: int = 1) -> str:
        return f"{self.name}{'_' if self.which == '1' else '-'}{service}{'_' if self.which == '1' else '-'}{number}"


@pytest.fixture(params=sorted(PROGRAMS))
def compose(request: pytest.FixtureRequest, daemon: Daemon, engine: Engine, tmp_path: Path) -> Iterator[Compose]:
    if not os.access(PROGRAMS[request.param], os.X_OK):
        pytest.skip(f"no Docker Compose {request.param}: Debian's docker-compose, or `scripts/setup peers .venv`")
    if engine.driver.name != "root":
        pytest.skip("published ports and internal networks of several containers need the root driver")
    (tmp_path / "compose.yaml").write_text(FILE)
    (tmp_path / "docker-compose.yml").write_text('version: "3.8"\n' + FILE)
    (tmp_path / "Dockerfile").write_text(
        "FROM lab/busybox\nARG V\nRUN mkdir /www && echo version $V > /www/index.html\n"
    )
    (tmp_path / "one.env").write_text("ONE=11\n")
    (tmp_path / "pw").write_text("pass-word")
    found = Compose(request.param, tmp_path, daemon)
    if request.param == "2":
        (tmp_path / "docker-compose.yml").unlink()
    else:
        (tmp_path / "compose.yaml").unlink()
    yield found
    found("down", "-v", "-t", "0", "--rmi", "local", "--remove-orphans")
    assert not [each.name for each in engine.containers.list(all=True) if found.name in each.name]
    assert not [each.name for each in engine.networks.list() if found.name in each.name]
    assert not [each.name for each in engine.volumes.list() if found.name in each.name]


def test_a_project_from_up_to_down(compose: Compose, engine: Engine) -> None:
    assert "fallback" in compose("config")
    compose("build")
    compose("up", "-d")
    web, db = engine.containers.get(compose.container("web")), engine.containers.get(compose.container("db"))
    assert db.health == "healthy", "web waited for it"
    assert engine.containers.list(all=True, filters={"name": compose.container("debug")}) == []
    shown = compose("ps")
    assert compose.container("web") in shown
    assert re.search("(?i)up", shown)
    port = compose("port", "web", "80").strip()
    assert re.fullmatch(r"127\.0\.0\.1:\d+", port)
    wait_until(lambda: web.logs())
    wait_until(lambda: fetched(port) == "version 2\n", "the published port")
    assert "up fallback 11" in compose("logs", "web")
    assert "db began" in compose("logs", "--no-color", "db")
    assert compose("exec", "-T", "web", "cat", "/run/secrets/pw") == "pass-word"
    assert compose("exec", "-T", "client", "wget", "-qO-", "http://web") == "version 2\n"
    assert compose("exec", "-T", "web", "sh", "-c", "exit 7", code=7) == ""
    assert "httpd -f -p 80" in compose("top", "web")
    assert f"{compose.name}" in compose("images")
    assert "of one run" in compose("run", "--rm", "-T", "--no-deps", "client", "echo", "of one run")
    assert not engine.containers.list(all=True, filters={"label": "com.docker.compose.oneoff=True"})


def fetched(port: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{port}/", timeout=60) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_services_are_stopped_scaled_and_changed(compose: Compose, engine: Engine) -> None:
    compose("up", "-d", "--scale", "client=3", "client")
    names = {compose.container("client", number) for number in (1, 2, 3)}
    assert names == {each.name for each in engine.containers.list() if compose.name in each.name}
    ids = {name: engine.containers.get(name).id for name in names}
    compose("up", "-d", "--scale", "client=2", "client")
    assert len([each for each in engine.containers.list() if compose.name in each.name]) == 2
    assert engine.containers.get(compose.container("client")).id == ids[compose.container("client")], "not made anew"
    compose("pause", "client")
    assert engine.containers.get(compose.container("client")).status == "paused"
    compose("unpause", "client")
    compose("restart", "-t", "0", "client")
    compose("stop", "-t", "0", "client")
    assert engine.containers.get(compose.container("client")).status == "exited"
    compose("start", "client")
    compose("kill", "client")
    assert engine.containers.get(compose.container("client")).attrs["State"]["ExitCode"] == 137
    compose("rm", "-f", "client")
    assert not [each for each in engine.containers.list(all=True) if compose.name in each.name]
    assert "no such service" in compose("up", "-d", "none", code=1).lower()


def test_changed_settings_make_a_container_anew(compose: Compose, engine: Engine) -> None:
    compose("up", "-d", "--no-deps", "client")
    first = engine.containers.get(compose.container("client")).id
    compose("up", "-d", "--no-deps", "client")
    assert engine.containers.get(compose.container("client")).id == first
    other = compose.folder / "other.yml"
    other.write_text(json.dumps({"version": "3.8", "services": {"client": {"environment": {"NEW": "1"}}}}))
    base = "docker-compose.yml" if compose.which == "1" else "compose.yaml"
    compose("-f", base, "-f", "other.yml", "up", "-d", "--no-deps", "client")
    changed = engine.containers.get(compose.container("client"))
    assert changed.id != first
    assert "NEW=1" in changed.attrs["Config"]["Env"]
