"""Devices by name (CDI) in containers and in RUN, under every driver, and who may have them in a build."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from buildkit import CONTROL, Client
from conftest import PlainUser
from daemons import Cli, Daemon

import labkernel
from labkernel.api import protobuf
from labkernel.building.result import BuildResult
from labkernel.engine import Engine
from labkernel.errors import BuildError, LabkernelError, UsageError
from labkernel.runtime.cdi import VARIABLE

BASE = "FROM lab/busybox\n"
LOOK = "head -c 3 /dev/answer | od -An -tx1 && cat /opt/driver/library && echo $ANSWER $VENDOR && id -G"


def describe(folder: Path, **more: Any) -> dict[str, Any]:
    """Writes what the tests' vendor says of its devices below `folder`."""
    (folder / "library").write_text("library\n")
    answer = {
        "env": ["ANSWER=42"],
        "deviceNodes": [{"path": "/dev/answer", "hostPath": "/dev/zero"}],
        "mounts": [{"hostPath": str(folder), "containerPath": "/opt/driver", "options": ["ro", "nosuid", "bind"]}],
        "additionalGids": [4242],
    }
    spec: dict[str, Any] = {
        "cdiVersion": "1.0.0",
        "kind": "vendor.test/thing",
        "containerEdits": {"env": ["VENDOR=here"]},
        "devices": [
            {"name": "answer", "containerEdits": answer},
            {
                "name": "a1",
                "containerEdits": {"env": ["A1=1"]},
                "annotations": {"org.mobyproject.buildkit.device.class": "many"},
            },
            {
                "name": "a2",
                "containerEdits": {"env": ["A2=1"]},
                "annotations": {"org.mobyproject.buildkit.device.class": "many"},
            },
            {
                "name": "free",
                "containerEdits": {"env": ["FREE=1"]},
                "annotations": {"org.mobyproject.buildkit.device.autoallow": "true"},
            },
        ],
        **more,
    }
    (folder / "vendor.json").write_text(json.dumps(spec))
    return spec


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    describe(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def build(engine: Engine, line: str, **given: Any) -> tuple[BuildResult, str]:
    """The result of a Dockerfile with that line, and what the line put out."""
    said: list[bytes] = []
    text = f"{BASE}ENV ONCE={os.urandom(8).hex()}\n{line}\n"
    result = engine.builds.build(text, on_step=lambda step: said.append(step.output), **given)
    return result, b"".join(said).decode()


# -- containers --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_ids")
def test_a_container_gets_what_the_description_says(engine: Engine, described: Path) -> None:
    container = engine.containers.run(
        "lab/busybox", ["sh", "-c", LOOK], devices=["vendor.test/thing=answer"], detach=True
    )
    assert container.wait()["StatusCode"] == 0, container.logs()
    words = container.logs().decode().split()
    assert words[:6] == ["00", "00", "00", "library", "42", "here"]
    assert "4242" in words[6:]
    host = container.attrs["HostConfig"]
    request = {"Driver": "cdi", "Count": 0, "DeviceIDs": ["vendor.test/thing=answer"]}
    assert host["DeviceRequests"] == [{**request, "Capabilities": None, "Options": None}]
    assert host["Devices"] == []


def test_the_device_cgroup_lets_through_what_is_described_and_nothing_else(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: Any
) -> None:
    needs("cgroup devices")
    if engine.driver.name != "root":
        pytest.skip("only the driver root has a device cgroup")
    nodes = {"path": "/dev/note", "hostPath": "/dev/kmsg"}
    devices = [
        {"name": word, "containerEdits": {"deviceNodes": [{**nodes, "permissions": word}]}}
        for word in ("r", "rw", "none")
    ]
    describe(tmp_path, devices=devices)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    script = "test -c /dev/note && (: >> /dev/note) 2>&1"
    for name, status in (("rw", 0), ("r", 1), ("none", 1)):
        done = engine.containers.run(
            "lab/busybox", ["sh", "-c", script], devices=[f"vendor.test/thing={name}"], detach=True
        )
        assert done.wait()["StatusCode"] == status, done.logs()
        if status:
            assert b"Operation not permitted" in done.logs()


def test_a_node_is_made_as_it_is_described(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine.driver.name != "root":
        pytest.skip("only the driver root makes nodes")
    nodes: list[dict[str, Any]] = [
        {"path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 0o622, "uid": 5, "gid": 6},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o640},
        {"path": "/dev/open", "hostPath": "/dev/zero"},
    ]
    describe(tmp_path, devices=[{"name": "nodes", "containerEdits": {"deviceNodes": nodes}}])
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    look = "stat -c '%a %F %u:%g' /dev/own /dev/pipe /dev/open"
    seen = engine.containers.run("lab/busybox", ["sh", "-c", look], devices=["vendor.test/thing=nodes"], remove=True)
    assert seen.decode().splitlines() == [
        "622 character special file 5:6",
        "640 fifo 0:0",
        "666 character special file 0:0",
    ]


def test_an_unknown_device_leaves_no_container(engine: Engine, described: Path) -> None:
    with pytest.raises(UsageError, match=r'unresolvable CDI device "vendor\.test/thing=anwser"') as caught:
        engine.containers.run("lab/busybox", ["true"], device_requests=["vendor.test/thing=anwser"])
    assert caught.value.resolution == "did you mean vendor.test/thing=answer?"
    assert engine.containers.list(all=True) == []


def test_hooks_are_refused_by_name(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = {"hookName": "createContainer", "path": "/usr/bin/vendor-hook"}
    describe(tmp_path, containerEdits={"hooks": [hook]})
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(LabkernelError, match="createContainer /usr/bin/vendor-hook"):
        engine.containers.run("lab/busybox", ["true"], devices=["vendor.test/thing=a1"])
    with pytest.raises(BuildError, match="createContainer /usr/bin/vendor-hook") as caught:
        build(engine, "RUN --device=vendor.test/thing=a1 true", allow=["device"])
    assert caught.value.line == 3


# -- builds --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_ids")
@pytest.mark.parametrize("allow", [["device"], ["device=vendor.test/thing=answer"], ["device=vendor.test/thing=*"]])
def test_a_run_gets_a_device_that_is_allowed(engine: Engine, described: Path, allow: list[str]) -> None:
    result, said = build(engine, f"RUN --device=vendor.test/thing=answer {LOOK}", allow=allow)
    words = said.split()
    assert words[:6] == ["00", "00", "00", "library", "42", "here"]
    assert "4242" in words[6:]
    environment = result.image.config["Env"]
    assert not [word for word in environment if word.startswith(("ANSWER", "VENDOR"))]
    assert "answer" not in engine.containers.run(result.image, ["ls", "-A", "/dev"], remove=True).decode()


@pytest.mark.parametrize("flag", ["vendor.test/thing=answer", "name=vendor.test/thing=answer,required"])
@pytest.mark.parametrize("allow", [[], ["network.host"], ["device=vendor.test/thing=a1"]])
def test_a_device_that_is_not_allowed_stops_the_build(
    engine: Engine, described: Path, flag: str, allow: list[str]
) -> None:
    with pytest.raises(BuildError, match=r"device vendor\.test/thing=answer is requested by the build") as caught:
        build(engine, f"RUN --device={flag} true", allow=allow)
    assert "--allow device=vendor.test/thing=answer" in str(caught.value.resolution)
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("flags", "allow", "words"),
    [
        ("--device=vendor.test/thing=free", [], "FREE VENDOR"),
        ("--device=vendor.test/thing=many", ["device=vendor.test/thing=many"], "A1 A2 VENDOR"),
        ("--device=vendor.test/thing", ["device"], "A1 VENDOR"),
        ("--device=vendor.test/thing=a2 --device=vendor.test/thing=a2,required", ["device"], "A2 VENDOR"),
        ("--device=vendor.test/thing=*", ["device=vendor.test/thing=*"], "A1 A2 ANSWER FREE VENDOR"),
        ("--device=vendor.test/mine=x", ["device=vendor.test/thing=a2,alias=vendor.test/mine=x"], "A2 VENDOR"),
        ("--device=vendor.test/thing=nothing", [], ""),
        ("--device=vendor.test/thing=nothing,required=false", [], ""),
    ],
)
def test_which_devices_a_name_means(engine: Engine, described: Path, flags: str, allow: list[str], words: str) -> None:
    script = "env | cut -d= -f1 | grep -E '^(A1|A2|ANSWER|FREE|VENDOR)$' | sort; true"
    result, said = build(engine, f"RUN {flags} {script}", allow=allow)
    assert said.split() == words.split()
    assert bool([w for w in result.warnings if "the step runs without it" in str(w)]) == ("nothing" in flags)


@pytest.mark.parametrize(
    ("flag", "words", "hint"),
    [
        ("vendor.test/thing=anwser,required", "is not registered", "did you mean vendor.test/thing=answer?"),
        ("other.test/x=1,required", "is not registered", "there is: vendor.test/thing=a1,"),
        ("gpu", 'invalid device "gpu"', "VENDOR/CLASS=NAME"),
    ],
)
def test_a_wrong_name(engine: Engine, described: Path, flag: str, words: str, hint: str) -> None:
    with pytest.raises(BuildError, match=words) as caught:
        build(engine, f"RUN --device={flag} true", allow=["device"])
    assert hint in str(caught.value.resolution)
    assert ">>> " in str(caught.value.details)


def test_a_wrong_file_is_named_where_its_device_is_asked_for(engine: Engine, described: Path) -> None:
    (described / "bad.yaml").write_text("kind: [")
    with pytest.raises(BuildError, match="is not registered") as caught:
        build(engine, "RUN --device=bad.test/x=1,required true")
    assert f"{described}/bad.yaml: " in str(caught.value.details)
    result, _ = build(engine, "RUN --device=bad.test/x=1 true")
    assert [warning for warning in result.warnings if f"{described}/bad.yaml cannot be used" in str(warning)]


def test_a_device_that_comes_is_a_new_step(engine: Engine, described: Path) -> None:
    text = f"{BASE}ENV ONCE={os.urandom(8).hex()}\nRUN --device=vendor.test/thing=late env > /seen\n"
    assert not engine.builds.build(text).steps[-1].cached
    assert engine.builds.build(text).steps[-1].cached
    describe(described, devices=[{"name": "late", "containerEdits": {"env": ["LATE=1"]}}])
    with pytest.raises(BuildError, match="not allowed"):
        engine.builds.build(text)
    changed = engine.builds.build(text, allow=["device"])
    assert not changed.steps[-1].cached
    assert "--device" in changed.steps[-1].why
    assert b"LATE=1" in engine.containers.run(changed.image, ["cat", "/seen"], remove=True)


@pytest.mark.parametrize("word", ["device=", "device=x", "device=a.b/c=1,x=y", "devices"])
def test_wrong_entitlements(engine: Engine, word: str) -> None:
    with pytest.raises(UsageError):
        engine.builds.build(BASE, allow=[word])


# -- every driver --------------------------------------------------------------------------------------------------


_SCRIPT = f"""
import labkernel, sys
with labkernel.connect(driver=sys.argv[1]) as lab:
    assert lab.driver.name == sys.argv[1], lab.driver
    given = {{"devices": ["vendor.test/thing=answer"], "remove": True}}
    print(lab.containers.run("lab/busybox", ["sh", "-c", {LOOK!r}], **given).decode())
    text = "FROM lab/busybox\\nRUN --device=vendor.test/thing=answer,required " + {LOOK!r} + "\\n"
    lab.builds.build(text, allow=["device"], on_step=lambda step: print(step.output.decode()))
    try:
        lab.builds.build(text.replace("RUN", "RUN  "))
    except labkernel.errors.BuildError as err:
        print(err.brief)
    lab.runtime.shutdown(force=True)
"""


@pytest.mark.parametrize("driver", ["rootless", "proot"])
def test_the_other_drivers(plain_user: PlainUser, driver: str) -> None:
    folder = plain_user.home / "cdi"
    folder.mkdir(mode=0o755)
    describe(folder)
    plain_user.env[VARIABLE] = str(folder)
    done = plain_user.python("-c", _SCRIPT, driver)
    if done.returncode and "DriverError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[-1] == "device vendor.test/thing=answer is requested by the build but not allowed"
    assert [line.split() for line in lines[:3]] == [["00", "00", "00"], ["library"], ["42", "here"]]
    assert [line.split() for line in lines[4:7]] == [["00", "00", "00"], ["library"], ["42", "here"]]


# -- docker's clients ----------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(engine: Engine, described: Path) -> Iterator[Daemon]:
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "LABKERNEL_DRIVER": engine.driver.name,
    }
    engine.images.resolve("lab/busybox", notify=lambda line: None)
    folder = tempfile.mkdtemp(prefix="lk-d-", dir="/tmp")
    found = Daemon(environment, f"{folder}/docker.sock")
    yield found
    found.stop()
    shutil.rmtree(folder)


def test_the_sdk_asks_by_request(daemon: Daemon) -> None:
    client = docker.DockerClient(base_url=daemon.address)
    try:
        request = docker.types.DeviceRequest(driver="cdi", device_ids=["vendor.test/thing=a1", "vendor.test/thing=a2"])
        said = client.containers.run("lab/busybox", ["env"], device_requests=[request], remove=True).decode()
        assert {"A1=1", "A2=1", "VENDOR=here"} <= set(said.split())
        wrong = docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
        with pytest.raises(docker.errors.APIError, match="could not select device driver"):
            client.containers.run("lab/busybox", ["env"], device_requests=[wrong])
        assert {"Source": "cdi", "ID": "vendor.test/thing=a1"} in client.info()["DiscoveredDevices"]
    finally:
        client.close()


def test_an_engine_elsewhere_is_asked_by_name(daemon: Daemon) -> None:
    with labkernel.connect(daemon.address) as lab:
        said = lab.containers.run("lab/busybox", ["env"], devices=["vendor.test/thing=a1", "/dev/zero"], remove=True)
        assert b"A1=1" in said
        with pytest.raises(LabkernelError, match=r"unresolvable CDI device"):
            lab.containers.run("lab/busybox", ["env"], devices=["vendor.test/thing=b1"], remove=True)


def test_dockers_command_asks_by_name(daemon: Daemon, tmp_path: Path) -> None:
    path = shutil.which("docker")
    if path is None:
        pytest.skip("no docker client is installed (Debian: docker.io)")
    client = Cli(path, daemon.address, tmp_path)
    done = client.run("run", "--rm", "--device", "vendor.test/thing=a1", "lab/busybox", "env")
    if "is not an absolute path" in done.stderr:
        pytest.skip("this docker client is older than CDI")
    assert "A1=1" in done.stdout.split(), done.stderr
    wrong = client.run("run", "--rm", "--device", "vendor.test/thing=b1", "lab/busybox", "env")
    assert wrong.returncode == 125
    assert 'unresolvable CDI device "vendor.test/thing=b1"' in wrong.stderr


def test_buildx_is_told_which_devices_there_are(daemon: Daemon) -> None:
    with contextlib.closing(Client(daemon, Path(daemon.path).parent)) as client:
        (worker,) = map(protobuf.decode, client.call(f"{CONTROL}/ListWorkers")[1])
    devices = {protobuf.text(each, 1): each for each in map(protobuf.decode, worker[6])}
    assert list(devices) == [f"vendor.test/thing={name}" for name in ("a1", "a2", "answer", "free")]
    assert [bool(protobuf.number(each, 2)) for each in devices.values()] == [False, False, False, True]
