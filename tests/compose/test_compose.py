"""Projects brought up on the embedded engine, by its command line and in a cell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ports import free_port
from waiting import wait_until

from labkernel import terminal
from labkernel.compose.converge import UpOptions
from labkernel.compose.document import ComposeError
from labkernel.engine import Engine
from labkernel.errors import LabkernelError


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]
STOPS = "trap 'exit 0' TERM; while true; do sleep 0.05; done"


@pytest.fixture
def project(tmp_path: Path, engine: Engine) -> Iterator[Path]:
    """A folder with a name of its own; what a test brought up there is taken down after it."""
    folder = tmp_path / f"p{os.urandom(4).hex()}"
    folder.mkdir()
    yield folder
    engine.compose.down(folder.name, volumes=True, timeout_s=0)
    assert not engine.networks.list(filters={"label": f"com.docker.compose.project={folder.name}"})


@pytest.fixture
def compose(project: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process."""
    monkeypatch.chdir(project)

    def run(*words: str, code: int | None = 0, **env: str) -> Done:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        ended = terminal.run(["compose", *words], terminal.TerminalHost(lambda: engine))
        done = Done(ended, *capfd.readouterr())
        assert code is None or done.returncode == code, done.stderr
        return done

    return run


def test_a_web_service_with_its_database(project: Path, compose: Run, engine: Engine) -> None:
    port = free_port()
    (project / "Dockerfile").write_text("FROM lab/busybox\nCOPY --from=site / /www/\nRUN ulimit -n > /n\n")
    (project / "site").mkdir()
    (project / "site" / "index.html").write_text("built\n")
    (project / "compose.yaml").write_text(f"""
services:
  web:
    build: {{context: ., additional_contexts: {{site: ./site}}, ulimits: {{nofile: 77}}, shm_size: 8m}}
    links: ["db:storage"]
    command: ["httpd", "-f", "-p", "80", "-h", "/www"]
    init: true
    depends_on:
      db: {{condition: service_healthy}}
      setup: {{condition: service_completed_successfully}}
    ports: ["127.0.0.1:{port}:80"]
    secrets: [token]
    configs: [{{source: conf, target: /etc/app/conf}}]
    networks: [front, back]
    volumes: [data:/data]
  db:
    image: lab/busybox
    command: ["sh", "-c", "touch /ready; {STOPS}"]
    healthcheck: {{test: "test -f /ready", interval: 50ms, retries: 200}}
    networks: {{back: {{aliases: [database]}}}}
  setup:
    image: lab/busybox
    command: ["sh", "-c", "echo set up > /data/x"]
    volumes: [data:/data]
    network_mode: none
volumes: {{data: }}
networks: {{front: , back: }}
secrets: {{token: {{environment: TOKEN}}}}
configs: {{conf: {{content: "name = ${{NAME:-nobody}}\\n"}}}}
""")
    done = compose("up", "-d", TOKEN="secret", NAME="me")
    said = done.stderr.splitlines()
    name = project.name
    healthy, started = f" Container {name}-db-1  Healthy", f" Container {name}-web-1  Started"
    assert said.index(healthy) < said.index(started)
    read = "cat /run/secrets/token /etc/app/conf /data/x"
    assert compose("exec", "-T", "web", "sh", "-c", read, TOKEN="x").stdout == "secretname = me\nset up\n"
    assert compose("exec", "-T", "web", "wget", "-qO-", "http://web/", TOKEN="x").stdout == "built\n"
    for host in ("database", "storage"):
        assert compose("exec", "-T", "web", "ping", "-c1", "-W9", host, TOKEN="x").returncode == 0
    compose("exec", "-T", "db", "nslookup", "storage", TOKEN="x", code=1)  # it is one service's name alone
    assert compose("exec", "-T", "web", "cat", "/n", TOKEN="x").stdout == "77\n"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        assert answer.read() == b"built\n"
    listed = [json.loads(line) for line in compose("ps", "-a", "--format", "json", TOKEN="x").stdout.splitlines()]
    assert {each["Service"]: each["State"] for each in listed} == {"web": "running", "db": "running", "setup": "exited"}
    assert {each["Service"]: each["Health"] for each in listed}["db"] == "healthy"
    assert compose("up", "-d", TOKEN="secret", NAME="me").stderr.count("Recreate") == 0
    assert f"Container {name}-web-1  Recreated" in compose("up", "-d", TOKEN="secret", NAME="you").stderr
    down = compose("down", "-v", "--rmi", "local", "-t", "0", TOKEN="x").stderr.splitlines()
    assert down.index(f" Container {name}-web-1  Removed") < down.index(f" Container {name}-db-1  Stopping")
    assert not engine.compose.containers(name)
    assert not engine.volumes.list(filters={"label": f"com.docker.compose.project={name}"})
    assert engine.images.find(f"{name}-web") is None


def test_only_what_changed_is_made_anew(project: Path, engine: Engine) -> None:
    text = f'services:\n  a: &a {{image: lab/busybox, command: [sh, -c, "{STOPS}"], volumes: [/kept]}}\n  b: *a\n'
    file = project / "compose.yaml"

    def up(text: str, **options: object) -> dict[str, str]:
        file.write_text(text)
        found = engine.compose.up(engine.compose.load([file]), options=UpOptions(timeout_s=0, **options))  # type: ignore[arg-type]
        return {each.name.removeprefix(f"{project.name}-"): each.id for each in found}

    first = up(text)
    engine.containers.get(first["a-1"]).exec_run(["touch", "/kept/file"])
    assert up(text) == first
    second = up(text + "  c: {image: lab/busybox, command: 'true'}\n")
    assert (second["a-1"], second["b-1"]) == (first["a-1"], first["b-1"])
    third = up(text.replace("b: *a", "b: {<<: *a, environment: [X=1]}"))
    assert third["a-1"] == first["a-1"]
    assert third["b-1"] != first["b-1"]
    forced = up(text, recreate="force")
    assert forced["a-1"] != first["a-1"]
    assert engine.containers.get(forced["a-1"]).exec_run(["ls", "/kept"]).output == b"file\n"
    scaled = up(text, scale={"a": 3})
    assert set(scaled) == {"a-1", "a-2", "a-3", "b-1"}
    assert set(up(text)) == {"a-1", "b-1"}
    project_ = engine.compose.load([file])
    assert [each.name for each in engine.compose.orphans(project_)] == [f"{project.name}-c-1"]
    engine.compose.up(project_, remove_orphans=True)
    assert not engine.compose.orphans(project_)


@pytest.mark.parametrize(
    ("service", "said"),
    [
        (
            "{image: lab/busybox, command: [sh, -c, exit 3], healthcheck: {test: 'true', interval: 60s}}",
            "exited (3)",
        ),
        ("{image: lab/busybox, command: [sleep, '99'], stop_grace_period: 0s}", "has no healthcheck configured"),
        (
            "{image: lab/busybox, command: [sleep, '99'], stop_grace_period: 0s, "
            "healthcheck: {test: exit 1, interval: 50ms, retries: 2}}",
            "is unhealthy",
        ),
    ],
)
def test_a_dependency_that_does_not_become_healthy(project: Path, engine: Engine, service: str, said: str) -> None:
    file = project / "compose.yaml"
    file.write_text(
        f"services:\n  db: {service}\n"
        "  web: {image: lab/busybox, depends_on: {db: {condition: service_healthy}}}\n"
    )
    with pytest.raises(ComposeError, match="dependency failed to start") as caught:
        engine.compose.up(engine.compose.load([file]))
    assert said in caught.value.brief
    assert not engine.compose.containers(project.name, ["web"])


def test_a_service_that_has_to_complete(project: Path, engine: Engine) -> None:
    file = project / "compose.yaml"
    file.write_text(
        "services:\n  job: {image: lab/busybox, command: [sh, -c, exit 4]}\n"
        "  web: {image: lab/busybox, depends_on: {job: {condition: service_completed_successfully}}}\n"
    )
    with pytest.raises(ComposeError, match="didn't complete successfully: exit 4"):
        engine.compose.up(engine.compose.load([file]))


def test_wrong_names_change_nothing(project: Path, compose: Run, engine: Engine) -> None:
    file = project / "compose.yaml"
    file.write_text("services:\n  a: {image: lab/busybox}\n  b: {image: lab/nowhere}\n")
    done = compose("up", "-d", code=None)
    assert done.returncode != 0
    assert "lab/nowhere" in done.stderr
    assert f"service b ({file}:3)" in done.stderr
    assert not engine.compose.containers(project.name)
    assert "no such service: c" in compose("up", "c", code=1).stderr
    file.write_text("services:\n  a: {image: lab/busybox, networks: [x]}\nnetworks: {x: {external: true}}\n")
    assert "network x declared as external, but could not be found" in compose("up", "-d", code=1).stderr
    assert not engine.compose.containers(project.name)


def test_up_in_the_foreground_shows_what_they_say(project: Path, compose: Run) -> None:
    (project / "compose.yaml").write_text(
        # The first end of any of them ends all, so only the last one ends by itself.
        f'services:\n  one: {{image: lab/busybox, command: [sh, -c, "echo first; {STOPS}"]}}\n'
        f'  twotwo: {{image: lab/busybox, command: [sh, -c, "{STOPS}"]}}\n'
        "  three: {image: lab/busybox, depends_on: [one], command: [sh, -c, 'echo last; exit 5']}\n"
    )
    done = compose("up", "--exit-code-from", "three", code=5)
    lines = done.stdout.splitlines()
    assert "one-1     | first" in lines
    assert "three-1   | last" in lines
    assert "three-1 exited with code 5" in lines
    assert compose("logs", "one").stdout == "one-1  | first\n"
    assert compose("logs", "--no-log-prefix", "one").stdout == "first\n"
    assert compose("ps", "-q").stdout == ""


def test_a_terminated_up_stops_its_containers(project: Path, engine: Engine) -> None:
    file = project / "compose.yaml"
    file.write_text(f'services:\n  a: {{image: lab/busybox, command: [sh, -c, "echo up; {STOPS}"]}}\n')
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
    }
    argv = [sys.executable, "-m", "labkernel.cli", "compose", "up"]
    process = subprocess.Popen(argv, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"a-1  | up\n"
    process.terminate()
    process.communicate(timeout=90)
    assert process.returncode == 130
    assert [each.status for each in engine.compose.containers(project.name)] == ["exited"]


def test_run_exec_and_the_other_verbs(project: Path, compose: Run, engine: Engine) -> None:
    (project / "compose.yaml").write_text(
        "services:\n"
        f'  web: {{image: lab/busybox, command: [sh, -c, "echo here; {STOPS}"], environment: {{A: x}}, '
        "ports: ['80'], depends_on: [db]}\n"
        f'  db: {{image: lab/busybox, command: [sh, -c, "{STOPS}"]}}\n'
    )
    done = compose("run", "--rm", "-e", "B=y", "web", "sh", "-c", "echo $A$B; exit 3", code=3)
    assert done.stdout == "xy\n"
    assert [each.status for each in engine.compose.containers(project.name)] == ["running"]  # db
    compose("up", "-d")
    compose("stop", "web", "-t", "9")
    assert [each.status for each in engine.compose.containers(project.name, ["web"])] == ["exited"]
    compose("start", "web")
    before = engine.compose.container(project.name, "web").runtime_state()["started_at"]
    compose("restart", "web")
    assert engine.compose.container(project.name, "web").runtime_state()["started_at"] > before
    compose("pause")
    assert compose("ps", "--status", "paused", "--services").stdout.split() == ["db", "web"]
    compose("unpause")
    compose("kill", "-s", "KILL", "db")
    wait_until(lambda: engine.compose.containers(project.name, ["db"])[0].status != "running")
    assert compose("rm", "-f").stderr.count("Removed") == 1
    assert project.name in compose("ls").stdout
    assert "lab/busybox" in compose("images").stdout
    assert 'service "db" is not running' in compose("exec", "db", "true", code=1).stderr
    # The file is gone, the project is not.
    (project / "compose.yaml").unlink()
    assert compose("-p", project.name, "ps", "--services").stdout == "web\n"
    compose("-p", project.name, "down", "-t", "0")
    assert not engine.compose.containers(project.name)


def test_the_epoch_of_a_git_context(project: Path, compose: Run, engine: Engine) -> None:
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    (project / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    moment = {**os.environ, "GIT_COMMITTER_DATE": "1700000000 +0000"}
    for words in (["init", "-q", "-b", "main"], ["add", "Dockerfile"], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(project), *who, *words], check=True, env=moment)
    name = f"{project.name}/made"
    (project / "compose.yaml").write_text(
        f"services:\n  s:\n    image: {name}\n    build:\n      context: file://{project}/.git#main\n"
        "      platforms: [linux/s390x, linux/riscv64]\n"
    )
    try:
        compose("build", SOURCE_DATE_EPOCH="context")
        created = {
            architecture: engine.images.resolve(name, platform=f"linux/{architecture}").raw_config["created"][:19]
            for architecture in ("s390x", "riscv64")
        }
        assert created == dict.fromkeys(("s390x", "riscv64"), "2023-11-14T22:13:20")
    finally:
        engine.images.remove(name, force=True)


def test_a_service_is_built_for_its_platform(project: Path, compose: Run, engine: Engine) -> None:
    (project / "Dockerfile").write_text(
        'FROM scratch\nARG TARGETARCH\nCMD ["x"]\nENV FOR=$TARGETARCH\nCOPY Dockerfile /\n'
    )
    name = f"{project.name}/made"
    text = "services:\n  s:\n    image: {}\n    platform: linux/{}\n    build:\n      context: .\n"
    file = project / "compose.yaml"
    try:
        file.write_text(text.format(name, "riscv64"))
        compose("build")
        assert engine.images.get(name).architecture == "riscv64"
        # For a container one of the listed platforms is enough: its own.
        file.write_text(text.format(name, "s390x") + "      platforms: [linux/s390x, linux/riscv64]\n")
        compose("create")
        label = f"com.docker.compose.project={project.name}"
        (made,) = engine.containers.list(True, filters={"label": label})
        assert made.image.architecture == "s390x"
        assert engine.images.find(name, platform="linux/riscv64") is None
        file.write_text(text.format(name, "mips64le") + "      platforms: [linux/s390x]\n")
        assert "does not hold the service's platform linux/mips64le" in compose("build", code=None).stderr
    finally:
        compose("rm", "-f")
        engine.images.remove(name, force=True)


def test_a_cell_is_a_compose_file(project: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.testing.globalipapp import start_ipython

    shell = start_ipython() or __import__("IPython").get_ipython()
    monkeypatch.chdir(project)
    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))
    shell.run_line_magic("load_ext", "labkernel")
    try:
        cell = f'services:\n  a: {{image: lab/busybox, command: [sh, -c, "{STOPS}"]}}\n'
        listed = shell.run_cell_magic("compose", "", cell)
        assert [each.name for each in listed] == [f"{project.name}-a-1"]
        assert "a-1" in listed._repr_html_()
        assert [each.status for each in shell.run_line_magic("compose", "ps")] == ["running"]
        assert str(shell.run_cell_magic("compose", "config --services", cell)) == "a"
        with pytest.raises(LabkernelError, match=r"<cell>:3: services\.b additional properties 'imge' not allowed"):
            shell.run_cell_magic("compose", "up -d", "services:\n  b: {imge: x}\n")
        shell.run_cell_magic("compose", "down -t 0", cell)
        assert not engine.compose.containers(project.name)
    finally:
        shell.run_line_magic("unload_ext", "labkernel")
