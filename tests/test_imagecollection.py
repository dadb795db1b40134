"""The Docker SDK's forms of build and pull, and of the error of a failed run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from registries import Answer, MadeImage, scripted

from labkernel.engine import Engine
from labkernel.errors import BuildError, ContainerExit, LabkernelError, UsageError
from labkernel.terminal import TerminalHost, run


def test_build_from_a_folder_gives_image_and_logs(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "Dockerfile.other").write_text('FROM lab/busybox\nARG NAME\nCOPY file /\nRUN echo "for $NAME"\n')
    image, logs = engine.images.build(
        path=tmp_path, dockerfile="Dockerfile.other", tag="sdk:1", buildargs={"NAME": "ada"}, labels={"a": "b"}
    )
    assert image.tags == ["sdk:1"]
    assert image.labels == {"a": "b"}
    text = "".join(record["stream"] for record in logs)
    assert "for ada" in text
    assert f"Successfully built {image.short_id.removeprefix('sha256:')}" in text
    assert engine.containers.run("sdk:1", ["cat", "/file"], remove=True) == b"content"
    engine.images.remove("sdk:1", force=True)


def test_build_from_a_file_object(engine: Engine) -> None:
    image, _logs = engine.images.build(fileobj=io.BytesIO(b"FROM lab/busybox\nENV A=1\n"))
    assert "A=1" in image.config["Env"]
    engine.images.remove(image.id, force=True)


def test_build_says_what_is_wrong(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Either path or fileobj"):
        engine.images.build()
    with pytest.raises(UsageError, match="Cannot locate specified Dockerfile: Dockerfile"):
        engine.images.build(path=tmp_path)
    with pytest.raises(BuildError) as failure:
        engine.images.build(fileobj=io.StringIO("FROM lab/busybox\nRUN exit 3\n"))
    assert failure.value.status == 3


def test_pull_without_a_registry_is_a_clear_error(engine: Engine) -> None:
    with pytest.raises(LabkernelError, match=r"127\.0\.0\.1:9"):
        engine.images.pull("127.0.0.1:9/nothing", "1")


def test_a_failed_run_has_the_sdk_error_attributes(engine: Engine) -> None:
    with pytest.raises(ContainerExit) as failure:
        engine.containers.run("lab/busybox", ["sh", "-c", "echo why >&2; exit 4"], remove=True)
    error = failure.value
    assert (error.exit_status, error.image, error.stderr) == (4, "lab/busybox", "why\n")
    assert error.command == ["sh", "-c", "echo why >&2; exit 4"]


def test_the_engine_answers_as_a_client(engine: Engine) -> None:
    assert engine.ping()
    assert engine.version()["Os"] == "linux"


def test_search_registry_data_and_save_are_the_sdks(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    with scripted() as fake:
        image = MadeImage({"x": b"x"})
        fake.hold(image)
        catalog = Answer(b'{"repositories": ["class/web", "class/db"]}')
        fake.rules.append(lambda handler: catalog if "_catalog" in handler.path else None)
        assert [each["name"] for each in engine.images.search(f"{fake.domain}/web")] == [f"{fake.domain}/class/web"]
        assert run(["search", "--format", "{{.Name}}", f"{fake.domain}/class"], TerminalHost(lambda: engine)) == 0
        assert len(capfd.readouterr().out.splitlines()) == 2
        data = engine.images.get_registry_data(f"{fake.domain}/class/web:latest")
        assert data.id == image.digest
        assert data.has_platform("linux/amd64")
        assert not data.has_platform("windows")
        pulled = data.pull()
    assert pulled.repo_digests == [f"{fake.domain}/class/web@{image.digest}"]
    pulled.tag("lab/saved", "v1")
    archive = b"".join(pulled.save(chunk_size=1000, named=True))
    pulled.remove(force=True)
    (loaded,) = engine.images.load(archive)
    assert loaded.tags == ["lab/saved:v1"]
    with pytest.raises(UsageError, match="no tag of this image"):
        next(loaded.save(named="other:v2"))
    loaded.remove(force=True)
