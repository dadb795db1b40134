"""Images by docker's own client and SDK: build, pull, push, save, load, import, commit, and the streams of each."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from daemons import Cli, Daemon
from registries import docker_registry
from waiting import wait_until

from labkernel.engine import Engine

docker_sdk = pytest.importorskip("docker")
IMAGE = "lab/busybox"


@pytest.fixture
def sdk(daemon: Daemon) -> Iterator[Any]:
    with closing(docker_sdk.DockerClient(base_url=daemon.address, timeout=120)) as client:
        yield client


@pytest.fixture
def name(engine: Engine) -> Iterator[str]:
    """A repository of a test's own; its images go afterwards."""
    found = f"t{os.urandom(4).hex()}"
    yield found
    for image in engine.images.list():
        for tag in image.tags:
            if found in tag:
                engine.images.remove(tag, force=True)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(
        "FROM lab/busybox AS base\nARG A=1\nRUN echo said $A; echo $A > /a\nCOPY file /file\n"
        "FROM base AS other\nLABEL from=dockerfile\n"
    )
    (folder / "file").write_text("of the context")
    return folder


def build(docker: Cli, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    docker.environment["DOCKER_BUILDKIT"] = "0"
    return subprocess.run(
        [docker.program, "build", *words], env=docker.environment, input=stdin, capture_output=True, timeout=170
    )


def test_limits_hold_for_build_steps(docker: Cli, engine: Engine) -> None:
    text = b"FROM lab/busybox\nRUN echo n=$(ulimit -n) $(df -k /dev/shm | tail -1)\n"
    limits = ("--shm-size", "8m", "--ulimit", "nofile=77:99", "--cpu-shares", "512")
    done = build(docker, "--no-cache", *limits, "-", stdin=text)
    assert done.returncode == 0, done.stderr
    assert b"n=77 " in done.stdout
    assert engine.driver.name == "proot" or b" 8192 " in done.stdout
    assert engine.driver.name != "root" or b"Warning" not in done.stdout


def test_build_shows_steps_cache_and_names(docker: Cli, name: str, context: Path) -> None:
    words = ("-t", f"{name}:1", "-t", f"{name}:2", "--build-arg", f"A={name}", "--label", "l=x", str(context))
    done = build(docker, *words)
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "Step 3/6 : RUN echo said $A" in said
    assert f"said {name}\n" in said
    assert f"Successfully tagged {name}:1\nSuccessfully tagged {name}:2\n" in said
    assert said.count(" ---> Using cache\n") <= 1
    again = build(docker, *words).stdout.decode()
    assert again.count(" ---> Using cache\n") == 5 - 1
    id = docker.ok("image", "inspect", f"{name}:1", "--format", "{{.Id}} {{json .Config.Labels}}").split()
    assert f"Successfully built {id[0][7:19]}" in again
    assert json.loads(id[1]) == {"from": "dockerfile", "l": "x"}
    assert docker.ok("run", "--rm", f"{name}:1", "cat", "/file", "/a") == f"of the context{name}"
    assert build(docker, "-q", *words).stdout.decode().strip() == id[0]
    assert "Using cache" not in build(docker, "--no-cache", "--target", "base", str(context)).stdout.decode()


def test_a_dockerfile_of_stdin_and_one_that_lies_elsewhere(docker: Cli, name: str, context: Path) -> None:
    done = build(docker, "-t", name, "-", stdin=b"FROM lab/busybox\nRUN echo x > /x\n")
    assert done.returncode == 0, done.stderr
    (context / "sub").mkdir()
    (context / "sub" / "Other").write_text("FROM lab/busybox\nCOPY . /all\n")
    (context / ".dockerignore").write_text("file\n")
    assert build(docker, "-t", name, "-f", str(context / "sub" / "Other"), str(context)).returncode == 0
    assert "file" not in docker.ok("run", "--rm", name, "ls", "/all").split()
    done = build(docker, "-t", name, "-f", "-", str(context), stdin=b"FROM lab/busybox\nCOPY sub/Other /o\n")
    assert done.returncode == 0, done.stderr


def test_what_a_build_that_fails_says(docker: Cli, context: Path) -> None:
    done = build(docker, "-", stdin=b"FROM lab/busybox\nRUN echo before; exit 9\n")
    assert done.returncode == 9
    assert b"before\n" in done.stdout
    assert b"The command '/bin/sh -c echo before; exit 9' returned a non-zero code: 9" in done.stderr
    done = build(docker, "-", stdin=b"FROM lab/busybox\nNOPE\n")
    assert done.returncode == 1
    assert b"unknown instruction: NOPE" in done.stderr
    done = build(docker, "-", stdin=b"FROM lab/busybox\nCOPY missing /x\n")
    assert done.returncode == 1
    assert b"missing" in done.stderr
    assert build(docker, "-t", "Not/Valid", str(context)).returncode != 0


def test_the_sdk_builds_and_reads_the_streams(sdk: Any, name: str, context: Path) -> None:
    image, log = sdk.images.build(path=str(context), tag=name, buildargs={"A": "5"}, labels={"x": "y"}, rm=True)
    assert image.tags == [f"{name}:latest"]
    assert any("said 5" in each.get("stream", "") for each in log)
    with pytest.raises(docker_sdk.errors.BuildError, match="returned a non-zero code: 3"):
        sdk.images.build(fileobj=io.BytesIO(b"FROM lab/busybox\nRUN exit 3\n"))
    assert sdk.images.get(name).labels["x"] == "y"
    assert image.tag(f"{name}-other", "2")
    assert {tag for each in sdk.images.list(name=f"{name}*") for tag in each.tags} >= {f"{name}:latest"}
    assert sdk.images.get(f"{name}-other:2").id == image.id
    assert image.history()[0]["Id"] == image.id
    with pytest.raises(docker_sdk.errors.ImageNotFound):
        sdk.images.get("nothing-of-this-name")
    sdk.images.remove(f"{name}-other:2")
    assert sdk.api.prune_builds()["SpaceReclaimed"] >= 0


def test_a_context_has_a_moment_and_a_platform(sdk: Any, name: str, engine: Engine) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("Dockerfile")
        text = b"FROM scratch\nARG TARGETPLATFORM\nENV P=$TARGETPLATFORM\nCOPY Dockerfile /\n"
        member.size, member.mtime = len(text), 1_700_000_000
        tar.addfile(member, io.BytesIO(text))
    image, _ = sdk.images.build(
        fileobj=io.BytesIO(buffer.getvalue()),
        custom_context=True,
        tag=name,
        platform="linux/s390x",
        buildargs={"SOURCE_DATE_EPOCH": "context"},
    )
    assert image.attrs["Created"].startswith("2023-11-14T22:13:20")
    assert (image.attrs["Architecture"], image.attrs["Config"]["Env"][-1]) == ("s390x", "P=linux/s390x")
    # 404 is what makes a client pull: the image is here for another platform only.
    with pytest.raises(docker_sdk.errors.ImageNotFound, match="wanted linux/riscv64, actual: linux/s390x"):
        sdk.api.create_container(name, "x", platform="linux/riscv64")
    made = sdk.api.create_container(name, "x", platform="linux/s390x")
    assert not made["Warnings"]
    sdk.api.remove_container(made["Id"])


def test_save_load_and_import(sdk: Any, docker: Cli, name: str, tmp_path: Path) -> None:
    base = sdk.images.get(IMAGE)
    assert base.tag(name, "kept")
    archive = b"".join(sdk.images.get(f"{name}:kept").save(named=f"{name}:kept"))
    sdk.images.remove(f"{name}:kept")
    loaded = sdk.images.load(archive)
    assert loaded[0].tags.count(f"{name}:kept") == 1
    path = tmp_path / "image.tar"
    path.write_bytes(archive)
    assert docker.ok("load", "-i", str(path)) == f"Loaded image: {name}:kept"
    docker.ok("save", "-o", str(tmp_path / "again.tar"), f"{name}:kept")
    with tarfile.open(tmp_path / "again.tar") as tar:
        assert {"manifest.json", "index.json", "oci-layout"} <= set(tar.getnames())
    assert "No such image" in docker.fails("save", "-o", str(tmp_path / "none.tar"), "nothing-of-this-name")
    container = sdk.containers.create(IMAGE, "true")
    (tmp_path / "root.tar").write_bytes(b"".join(container.export()))
    said = docker.ok("import", "-c", 'CMD ["cat", "/etc/passwd"]', str(tmp_path / "root.tar"), f"{name}:imported")
    assert said.startswith("sha256:")
    assert "root:" in docker.ok("run", "--rm", f"{name}:imported")
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"no archive at all" * 100)
    assert docker.fails("load", "-i", str(bad))


def test_commit(sdk: Any, docker: Cli, name: str) -> None:
    container = sdk.containers.run(IMAGE, ["touch", "/made"], detach=True)
    container.wait()
    image = container.commit(name, "1", message="why", author="me", changes='CMD ["ls", "/made"]')
    assert image.attrs["Author"] == "me"
    assert docker.ok("run", "--rm", f"{name}:1") == "/made"
    assert docker.ok("commit", "-c", "ENV A=b", container.id, f"{name}:2").startswith("sha256:")
    assert "A=b" in docker.ok("run", "--rm", f"{name}:2", "env")


def test_pull_and_push(sdk: Any, docker: Cli, name: str, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    with docker_registry(tmp_path / "registry") as domain:
        there = f"{domain}/{name}"
        assert sdk.images.get(IMAGE).tag(there, "1")
        said = docker.ok("push", f"{there}:1")
        assert f"The push refers to repository [{there}]" in said
        digest = next(line for line in said.splitlines() if line.startswith("1: digest: sha256:")).split()[2]
        docker.ok("rmi", f"{there}:1")
        said = docker.ok("pull", f"{there}:1")
        assert f"Digest: {digest}" in said
        assert f"Status: Downloaded newer image for {there}:1" in said
        assert "Status: Image is up to date" in docker.ok("pull", f"{there}:1")
        assert f"{there}@{digest}" in sdk.images.get(f"{there}:1").attrs["RepoDigests"]
        aux = [each["aux"] for each in sdk.images.push(there, "1", stream=True, decode=True) if "aux" in each]
        assert aux == [{"Tag": "1", "Digest": digest, "Size": aux[0]["Size"]}]
        assert f"{there}:1" in sdk.images.pull(there, tag="1").tags
        data = sdk.images.get_registry_data(f"{there}:1")
        assert data.id == digest
        assert data.has_platform("linux/amd64") == (os.uname().machine == "x86_64")
        with pytest.raises(docker_sdk.errors.NotFound):
            sdk.images.pull(there, tag="none")
        assert "does not exist locally with the tag" in docker.fails("push", f"{domain}/nothing-of-this-name")
        assert [each["name"] for each in sdk.images.search(there)] == [there]
        assert sdk.login("me", "secret", registry=domain)["Status"] == "Login Succeeded"


def test_prune_and_filters(sdk: Any, name: str) -> None:
    sdk.images.build(fileobj=io.BytesIO(f"FROM lab/busybox\nLABEL test={name}\n".encode()), tag=f"{name}:1")
    sdk.images.build(fileobj=io.BytesIO(f"FROM lab/busybox\nLABEL test={name} b=2\n".encode()), tag=f"{name}:1")
    labelled = sdk.images.list(filters={"label": f"test={name}"})
    assert len(labelled) == 2
    dangling = sdk.images.list(filters={"label": f"test={name}", "dangling": True})
    assert [each.tags for each in dangling] == [[]]
    pruned = sdk.images.prune(filters={"dangling": True})
    assert {"Deleted": dangling[0].id} in pruned["ImagesDeleted"]
    assert len(sdk.images.list(filters={"label": f"test={name}"})) == 1


def test_a_builder_whose_client_leaves_ends(daemon: Daemon, engine: Engine, tmp_path: Path) -> None:
    """The client is killed in the middle of a RUN: nothing of the build goes on."""
    import shutil

    program = shutil.which("docker")
    if program is None:
        pytest.skip("no docker client is installed (Debian: docker.io)")
    # Silent after its first line, so that no output tells the builder.
    dockerfile = b"FROM lab/busybox\nRUN echo on; while true; do sleep 0.1; done\n"
    process = subprocess.Popen(
        [program, "build", "-"],
        env={**os.environ, "DOCKER_HOST": daemon.address, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(dockerfile)
    process.stdin.close()
    while process.stdout.readline() != b"on\n":
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()

    def gone() -> bool:
        return not any(path.name for path in engine.layout.containers.iterdir())

    wait_until(gone, "the end of the build's container")


def test_a_listing_names_what_was_asked_for(daemon: Daemon) -> None:
    for name in ("first:1", "second:2"):
        repository, _, tag = name.partition(":")
        daemon.json("POST", f"/images/lab%2Fbusybox/tag?repo={repository}&tag={tag}")
    try:
        found = daemon.json("GET", "/images/json?filters=" + quote(json.dumps({"reference": ["fir*", "second:2"]})))
        assert [each["RepoTags"] for each in found] == [["first:1", "second:2"]]
    finally:
        for name in ("first:1", "second:2"):
            daemon.json("DELETE", f"/images/{name}")
    status, _, answer = daemon.request("GET", "/images/nosuch/json")
    assert (status, json.loads(answer)["message"]) == (404, "No such image: nosuch:latest")


@pytest.mark.parametrize(
    ("query", "said"),
    [("limit=200", "outside the range of [1, 100]"), ("filters=" + quote('{"stars":["many"]}'), "invalid filter")],
)
def test_a_search_is_checked_before_it_goes_anywhere(daemon: Daemon, query: str, said: str) -> None:
    status, _, answer = daemon.request("GET", f"/images/search?term=x&{query}")
    assert (status, said in json.loads(answer)["message"]) == (400, True)


def test_a_build_tells_its_tags(docker: Cli, daemon: Daemon, name: str) -> None:
    since = time.time()
    assert build(docker, "-q", "-t", f"{name}:1", "-", stdin=b"FROM lab/busybox\nLABEL a=b\n").returncode == 0
    lines = daemon.request("GET", f"/events?since={since:.9f}&until={time.time():.9f}")[2].splitlines()
    told = [(each["Action"], each["Actor"]["Attributes"].get("name")) for each in map(json.loads, lines)]
    assert ("tag", f"{name}:1") in told
