"""Compose files as data: a folder per case in tests/data/compose, and what docker-compose makes of the same files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from labkernel.compose.document import ComposeError
from labkernel.compose.project import Project, load
from labkernel.compose.settings import config_hash, container_settings
from labkernel.runtime.settings import normalize

CASES = Path(__file__).parent.parent / "data" / "compose"
NAMES = sorted(path.name for path in CASES.iterdir() if (path / "compose.yaml").is_file())
ERRORS = sorted((CASES / "errors").glob("*.yaml"))
HOME = {"HOME": "/home/me"}


def read(folder: Path, **options: Any) -> Project:
    files = [folder / "compose.yaml", *([folder / "over.yaml"] if (folder / "over.yaml").is_file() else [])]
    return load(files, environment=HOME, **options)


def relative(value: Any, folder: Path) -> Any:
    """Paths of this machine as `@`."""
    text = json.dumps(value).replace(str(folder), "@").replace(os.path.expanduser("~"), "~")
    return json.loads(text)


@pytest.mark.parametrize("name", NAMES)
def test_files_mean_what_the_golden_result_says(name: str) -> None:
    folder = CASES / name
    project = read(folder)
    found = relative({**project.document(), "warnings": project.warnings}, folder)
    golden = folder / "result.json"
    if os.environ.get("LABKERNEL_WRITE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(golden.read_text())


def test_limits_of_devices_are_those_of_run() -> None:
    given = container_settings(read(CASES / "limits"), "web", lambda service: service)
    words = {
        "blkio_weight_device": "/dev/vda:400",
        "device_read_bps": "/dev/vda:12m",
        "device_write_iops": "/dev/vda:30",
    }
    same = {"blkio_weight": 300, "oom_kill_disable": True, "device_cgroup_rules": ["c 10:229 rw"]}
    expected = normalize({**words, **same})
    assert {key: normalize(given)[key] for key in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_config_prints_means_the_same_again(name: str, tmp_path: Path) -> None:
    from labkernel.commands.composeviews import render

    project = read(CASES / name)
    again = tmp_path / "compose.yaml"
    again.write_text(render(project, "yaml", {"no_interpolate": False}))
    second = load([again], environment={})
    assert second.document() == project.document()
    assert {each: config_hash(second, each) for each in second.services if "secrets" not in second.services[each]} == {
        each: config_hash(project, each) for each in project.services if "secrets" not in project.services[each]
    }


@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem)
def test_an_error_names_file_and_line(path: Path) -> None:
    line, _, brief = path.read_text().splitlines()[-1].removeprefix("# ").partition(": ")
    with pytest.raises(ComposeError) as caught:
        load([path], environment={})
    assert brief in caught.value.brief
    assert (caught.value.file, caught.value.line) == (str(path), int(line))


def test_profiles_and_named_services() -> None:
    folder = CASES / "profiles"
    assert list(read(folder).services) == ["web"]
    assert set(read(folder, profiles=["debug"]).services) == {"web", "debug"}
    assert set(read(folder, profiles=["*"]).services) == {"web", "debug", "tests"}
    project = read(folder)
    assert project.select(["debug"]) == ["web", "debug"]
    with pytest.raises(ComposeError, match="no such service: nope"):
        project.select(["nope"])


@pytest.mark.parametrize(
    ("folder", "given", "inside", "expected"),
    [
        ("My Project", None, None, "myproject"),
        ("_x-y_1", None, None, "x-y_1"),
        ("dir", "given", "inside", "given"),
        ("dir", None, "inside", "inside"),
    ],
)
def test_the_projects_name(tmp_path: Path, folder: str, given: str | None, inside: str | None, expected: str) -> None:
    home = tmp_path / folder
    home.mkdir()
    head = f"name: {inside}\n" if inside else ""
    (home / "compose.yml").write_text(f"{head}services: {{web: {{image: x}}}}\n")
    assert load(working_dir=home, name=given, environment={}).name == expected


def test_a_wrong_project_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compose.yml").write_text("services: {web: {image: x}}\n")
    with pytest.raises(ComposeError, match="invalid project name"):
        load(working_dir=tmp_path, name="Not/Valid", environment={})


def test_files_are_found_here_above_and_by_variable(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    with pytest.raises(ComposeError, match="no configuration file provided"):
        load(working_dir=below, environment={})
    (tmp_path / "compose.yaml").write_text("services: {web: {image: x}}\n")
    (tmp_path / "compose.override.yaml").write_text("services: {web: {user: me}}\n")
    assert load(working_dir=below, environment={}).services["web"]["user"] == "me"
    (tmp_path / "other.yaml").write_text("services: {other: {image: y}}\n")
    variables = {"COMPOSE_FILE": "compose.yaml:other.yaml", "COMPOSE_PROJECT_NAME": "named"}
    project = load(working_dir=tmp_path, environment=variables)
    assert (set(project.services), project.name) == ({"web", "other"}, "named")


def _same(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key, how in (("environment", dict), ("command", lambda value: value), ("labels", dict)):
        if key in theirs and not isinstance(theirs[key], str):
            assert how(ours[key]) == how(theirs[key]), f"{name}.{key}"
    for key in ("image", "restart", "init", "user", "stop_signal", "container_name"):
        assert ours.get(key) == theirs.get(key), f"{name}.{key}"


@pytest.mark.parametrize("name", ["minimal", "merge", "extends"])
def test_docker_compose_makes_the_same_of_it(name: str, tmp_path: Path) -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed (Debian: docker-compose)")
    folder = tmp_path / name
    shutil.copytree(CASES / name, folder)
    for path in folder.rglob("*.yaml"):
        # Debian's 1.29 is older than name:, !reset and !override.
        words = path.read_text().splitlines(keepends=True)
        kept = [line for line in words if "!" not in line and not line.startswith("name:")]
        # What it does not know either: a file without a version is the first of all formats to it.
        path.write_text("version: '3.9'\n" + "".join(kept))
    files = [each for each in ("compose.yaml", "over.yaml") if (folder / each).is_file()]
    argv = [program, *(word for each in files for word in ("-f", each)), "config"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env={**os.environ, **HOME}, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = yaml.safe_load(done.stdout)
    ours = load([folder / each for each in files], environment=HOME).document()
    assert set(ours["services"]) == set(theirs["services"])
    for service, found in theirs["services"].items():
        _same(service, ours["services"][service], found)
