"""Images on a real store; the tasks that the worker would run are run in this process, where root lets them."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import socket
import sys
import tarfile
import threading
import types
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labkernel.commands.views import image_rows
from labkernel.engine import Engine
from labkernel.errors import (
    ConflictError,
    CorruptBlob,
    DriverError,
    ImageError,
    InvalidReference,
    LayerError,
    NoSuchImage,
    RegistryError,
    StoreError,
    UsageError,
)
from labkernel.images import Image, Images, LayerInfo
from labkernel.oci.config import add_history, new_document
from labkernel.store.blobs import Blobs
from labkernel.store.database import Database
from labkernel.store.layout import Layout

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking in this process keeps owners, which needs root")


class InlineTasks:
    """Runs tasks where `Runtime` would send them to the worker."""

    calls = 0

    def task(self, call: str, /, *, fds: Any = (), report: Any = None, **args: Any) -> Any:
        self.calls += 1
        module, _, name = call.partition(":")
        return getattr(import_module(module), name)(**args, **({"fds": list(fds)} if fds else {}))


def open_images(base: Path, driver: str = "root") -> Images:
    layout = Layout.find(base / "root", base / "run")
    return Images(
        layout,
        Blobs(layout),
        Database(layout.database),
        InlineTasks(),
        SimpleNamespace(name=driver, id_mapping="full" if driver == "root" else "single", overlay="overlay"),
    )


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return open_images(tmp_path)


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def layer_of(images: Images, files: dict[str, bytes]) -> LayerInfo:
    blob = images.blobs.put(tar_of(files))
    return LayerInfo(blob.digest, blob.digest, "application/vnd.oci.image.layer.v1.tar", blob.size_bytes)


def make(images: Images, *tags: str, text: str = "x", **config: Any) -> Image:
    document = new_document(created="2026-01-01T00:00:00Z", **config)
    add_history(document, f"file {text}")
    add_history(document, "CMD", empty_layer=True)
    return images.commit_layers(document, [layer_of(images, {"file": text.encode()})], tags)


def add_container(images: Images, image: Image, name: str, status: str = "exited", pid: int = 0) -> str:
    id = hashlib.sha256(name.encode()).hexdigest()
    with images.db.transaction() as tx:
        tx.execute("INSERT INTO containers VALUES (?, ?, ?, ?, 0, '{}')", (id, name, image.id, "x"))
    images.layout.container_dir(id).mkdir()
    (images.layout.container_dir(id) / "state.json").write_text(json.dumps({"status": status, "pid": pid}))
    return id


def drop_container(images: Images, id: str) -> None:
    with images.db.transaction() as tx:
        tx.execute("DELETE FROM containers WHERE id = ?", (id,))


# -- names and look-ups ------------------------------------------------------------------------------------------


def test_an_image_is_found_by_every_name_it_has(images: Images) -> None:
    image = make(images, "web", "example.org/course/web:v1")
    full = image.id.removeprefix("sha256:")
    names = ["web", "web:latest", "docker.io/library/web", "example.org/course/web:v1", image.id, full]
    manifest = images.catalog_row(image).manifest
    for name in [*names, full[:12], f"sha256:{full[:7]}", manifest, f"web@{manifest}"]:
        assert images.get(name) == image
    assert image.tags == ["example.org/course/web:v1", "web:latest"]
    assert image.short_id == image.id[:19]


@pytest.mark.parametrize("name", ["web:v2", "nope", "0" * 64, "sha256:" + "0" * 64, "web@sha256:" + "0" * 64, "abc"])
def test_an_unknown_image_is_said_with_a_hint(images: Images, name: str) -> None:
    make(images, "web")
    with pytest.raises(NoSuchImage, match="No such image") as caught:
        images.get(name)
    assert "lab/busybox" in (caught.value.resolution or "")
    assert caught.value.exit_code == 125


def test_a_malformed_name_is_a_reference_error(images: Images) -> None:
    with pytest.raises(InvalidReference, match="must be lowercase"):
        images.resolve("Web")
    with pytest.raises(NoSuchImage):
        images.get("Web")


def test_a_tag_moves_and_the_old_image_stays_without(images: Images) -> None:
    old, new = make(images, "web", text="old"), make(images, "new", text="new")
    images.tag("new", "web")
    assert images.get("web") == new
    assert (old.tags, new.tags) == ([], ["new:latest", "web:latest"])
    assert [image.id for image in images.list(filters={"dangling": True})] == [old.id]


def test_a_bad_tag_commits_nothing(images: Images) -> None:
    with pytest.raises(InvalidReference):
        make(images, "Bad Name")
    assert images.list() == []


def test_lists_are_filtered_as_docker_does(images: Images) -> None:
    make(images, "web:1", text="a", Labels={"tier": "front"})
    make(images, "db:1", "org/db:2", text="b", Labels={"tier": "back"})

    def names(**options: Any) -> list[str]:
        return sorted(tag for image in images.list(**options) for tag in image.tags)

    everything = ["db:1", "org/db:2", "web:1"]
    assert names() == names(all=True) == everything
    assert names(name="web") == names(filters={"reference": "web:*"}) == names(filters={"label": "tier=front"})
    assert names(name="web") == ["web:1"]
    assert names(filters={"label": ["tier"]}) == everything
    assert names(filters={"label": "tier=none"}) == names(filters={"dangling": "true"}) == []
    for filters in ({"colour": "red"}, {"dangling": "perhaps"}):
        with pytest.raises(UsageError, match="invalid filter"):
            images.list(filters=filters)


def test_equal_content_is_one_image(images: Images) -> None:
    assert make(images, "a") == make(images, "b")
    assert len(images.list()) == 1
    assert images.get("a").tags == ["a:latest", "b:latest"]


def test_an_image_shows_itself(images: Images) -> None:
    image = make(images, "web", text="<script>", Cmd=["sh", "-c", "<b>"])
    assert "web:latest" in repr(image)
    assert "<script>" not in image._repr_html_()
    assert "&lt;b&gt;" in image._repr_html_()
    assert repr(images.list()).splitlines()[0].split() == ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    attrs = image.attrs
    assert (attrs["Id"], attrs["RepoTags"], attrs["Config"]["Cmd"]) == (image.id, ["web:latest"], ["sh", "-c", "<b>"])
    assert attrs["RootFS"] == {"Type": "layers", "Layers": [image.layers[0].diff_id]}
    json.dumps(attrs)


def test_history_is_newest_first_with_sizes_of_layers(images: Images) -> None:
    image = make(images, "web")
    newest, oldest = image.history()
    assert (newest["CreatedBy"], newest["Size"], newest["Id"]) == ("CMD", 0, image.id)
    assert (oldest["CreatedBy"], oldest["Size"]) == ("file x", image.layers[0].size_bytes)


def test_a_missing_layer_stops_a_commit(images: Images) -> None:
    ghost = LayerInfo("sha256:" + "1" * 64, "sha256:" + "2" * 64, "application/vnd.oci.image.layer.v1.tar", 9)
    with pytest.raises(StoreError, match="is not in the store"):
        images.commit_layers(new_document(), [ghost], ["web"])
    assert images.list() == []


# -- resolving ---------------------------------------------------------------------------------------------------


def test_a_silent_registry_is_remembered(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def connects(endpoints: list[Any], timeout_s: float) -> bool:
        return bool(asked.append(endpoints[0].domain))

    monkeypatch.setattr("labkernel.oci.reach.connects", connects)
    for _ in range(3):
        with pytest.raises(NoSuchImage) as caught:
            images.resolve("nope")
    assert asked == ["docker.io"]
    assert "docker.io does not answer" in (caught.value.resolution or "")
    assert not images.registry_answers("docker.io")
    images.registry_answers("docker.io", fresh=True)
    assert asked == ["docker.io"] * 2


def test_a_registry_on_this_machine_is_asked_each_time(images: Images) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        domain = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(RegistryError, match="no answer from the registry"):
        images.resolve(f"{domain}/course/web")


# -- removing ----------------------------------------------------------------------------------------------------


def contents(images: Images) -> tuple[list[str], list[str], list[str]]:
    return list(images.blobs), os.listdir(images.layout.layers), os.listdir(images.layout.tmp)


@needs_root
def test_the_last_name_takes_the_image_and_its_content_along(images: Images) -> None:
    image = make(images, "a", "b")
    images.layer_dirs(image)
    assert images.remove("a") == [{"Untagged": "a:latest"}]
    diff_id = image.layers[0].diff_id
    assert images.remove("b") == [{"Untagged": "b:latest"}, {"Deleted": image.id}, {"Deleted": diff_id}]
    assert contents(images) == ([], [], [])
    with pytest.raises(NoSuchImage):
        images.remove("b")


def test_shared_layers_stay(images: Images) -> None:
    one = make(images, "one")
    two = images.commit_layers(new_document(Cmd=["other"]), one.layers, ["two"])
    images.remove("one")
    assert set(images.blobs) == {two.id, two.layers[0].digest, images.catalog_row(two).manifest}


def test_content_the_build_cache_needs_stays(images: Images) -> None:
    image = make(images, "web")
    layer = image.layers[0]
    with images.db.transaction() as tx:
        tx.execute(
            "INSERT INTO build_cache VALUES ('key', NULL, ?, ?, ?, 1, '{}', 0, 0)",
            (layer.diff_id, layer.digest, layer.media_type),
        )
    images.remove("web")
    images.prune()
    assert list(images.blobs) == [layer.digest]


def test_by_id_several_names_need_force(images: Images) -> None:
    image = make(images, "a", "b")
    with pytest.raises(ConflictError, match=r"must be forced\) - image is referenced in multiple repositories"):
        images.remove(image.id)
    records = images.remove(image.short_id[7:], force=True)
    assert records[:3] == [{"Untagged": "a:latest"}, {"Untagged": "b:latest"}, {"Deleted": image.id}]


def test_digests_of_a_repository_go_with_its_last_tag_and_count_as_names(images: Images) -> None:
    """As dockerd does it: `rmi` of a tag, of a digest, of an id, beside names of another repository."""
    image = make(images, "reg.example/web:v1", "reg.example/web:v2", "other:v1")
    digest = f"sha256:{'1' * 64}"
    for repository in ("reg.example/web", "reg.example/mirror"):
        images.catalog.name_digest(f"{repository}@{digest}", image.id)
    assert images.remove("reg.example/web:v1") == [{"Untagged": "reg.example/web:v1"}]
    assert images.remove("reg.example/web:v2") == [
        {"Untagged": "reg.example/web:v2"},
        {"Untagged": f"reg.example/web@{digest}"},
    ]
    with pytest.raises(ConflictError, match="referenced in multiple repositories"):
        images.remove(image.id)
    assert images.remove("other:v1") == [{"Untagged": "other:v1"}]
    assert images.get(image.id).repo_digests == [f"reg.example/mirror@{digest}"]  # a name is left
    assert images.prune()["ImagesDeleted"] == [
        {"Untagged": f"reg.example/mirror@{digest}"},
        {"Deleted": image.id},
    ]
    image = make(images, "reg.example/web:v1")
    images.catalog.name_digest(f"reg.example/web@{digest}", image.id)
    assert images.remove(f"reg.example/web@{digest}") == [{"Untagged": f"reg.example/web@{digest}"}]
    others = [f"sha256:{'2' * 64}", f"sha256:{'3' * 64}"]
    for each in others:
        images.catalog.name_digest(f"reg.example/other@{each}", image.id)
    rows = [row[1:] for row in image_rows(image, digests=True)]
    assert rows == [
        ("reg.example/web", "v1", "<none>"),
        *(("reg.example/other", "<none>", each) for each in others),
    ]
    assert [row[1:3] for row in image_rows(image)] == [("reg.example/web", "v1"), ("reg.example/other", "<none>")]
    images.catalog.untag(f"reg.example/other@{each}" for each in others)
    images.catalog.name_digest(f"reg.example/web@{digest}", image.id)
    assert images.remove(image.short_id[7:])[:3] == [
        {"Untagged": "reg.example/web:v1"},
        {"Untagged": f"reg.example/web@{digest}"},
        {"Deleted": image.id},
    ]


@needs_root
def test_a_stopped_container_needs_force_and_keeps_its_layers(images: Images) -> None:
    image = make(images, "web")
    images.layer_dirs(image)
    id = add_container(images, image, "c")
    with pytest.raises(
        ConflictError, match=rf'repository reference "web" \(must force\) - container {id[:12]} is using'
    ):
        images.remove("web")
    with pytest.raises(ConflictError, match=rf"must be forced\) - image is being used by stopped container {id[:12]}"):
        images.remove(image.id)
    images.remove("web", force=True)
    with pytest.raises(NoSuchImage):
        images.get(image.id)
    assert images.prune()["SpaceReclaimed"] == 0
    assert len(os.listdir(images.layout.layers)) == 1
    drop_container(images, id)
    assert images.prune()["SpaceReclaimed"] > 0
    assert contents(images) == ([], [], [])


def test_a_running_container_cannot_be_forced(images: Images) -> None:
    image = make(images, "web")
    id = add_container(images, image, "c", "running", os.getpid())
    with pytest.raises(
        ConflictError, match=rf"cannot be forced\) - image is being used by running container {id[:12]}"
    ):
        images.remove(image.id, force=True)
    assert images.remove("web", force=True) == [{"Untagged": "web:latest"}]
    assert images.get(image.id).tags == []


def test_a_row_whose_container_is_gone_counts_for_nothing(images: Images) -> None:
    image = make(images, "web")
    id = add_container(images, image, "c", "running", os.getpid())
    (images.layout.container_dir(id) / "state.json").unlink()
    images.layout.container_dir(id).rmdir()
    assert {"Untagged": "web:latest"} in images.remove("web")


def test_prune_takes_what_has_no_name_or_no_user(images: Images) -> None:
    dangling, used, unused = make(images, text="1"), make(images, "used", text="2"), make(images, "unused", text="3")
    add_container(images, used, "c")
    done = images.prune()
    assert done["ImagesDeleted"] == [{"Deleted": dangling.id}]
    assert done["SpaceReclaimed"] > 0
    assert images.prune({"dangling": False})["ImagesDeleted"] == [{"Untagged": "unused:latest"}, {"Deleted": unused.id}]
    assert [image.id for image in images.list()] == [used.id]


def test_prune_takes_dockers_filters(images: Images) -> None:
    make(images, text="1", Labels={"keep": "no"})
    assert images.prune({"until": ["2020-01-01T00:00:00Z"]})["ImagesDeleted"] == []
    assert images.prune({"label": {"keep=yes": True}})["ImagesDeleted"] == []
    with pytest.raises(UsageError, match="invalid filter 'dangling=perhaps'"):
        images.prune({"dangling": ["perhaps"]})
    assert len(images.prune({"until": "1h", "label": ["keep"]})["ImagesDeleted"]) == 1


def test_prune_waits_for_who_is_adding(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkernel.imaging.removal.ADDING_WAIT_S", 0.05)
    with images.adding():
        blob = images.blobs.put(b"nobody names me yet")
        with pytest.raises(StoreError, match="the store is busy"):
            images.prune()
        assert images.blobs.has(blob.digest)
    images.prune()
    assert not images.blobs.has(blob.digest)


# -- unpacking ---------------------------------------------------------------------------------------------------


@needs_root
def test_layers_are_unpacked_once_top_first(images: Images) -> None:
    layers = [layer_of(images, {"a": b"1"}), layer_of(images, {"b": b"2"})]
    image = images.commit_layers(new_document(), layers, ["web"])
    paths = images.layer_dirs(image)
    assert [sorted(os.listdir(path)) for path in paths] == [["b"], ["a"]]
    assert images.layer_dirs(image) == paths
    assert images.runtime.calls == 2  # type: ignore[attr-defined]
    assert images.get("web").size_bytes == 2


@needs_root
def test_several_layers_are_unpacked_at_once(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    run, both = images.runtime.task, threading.Barrier(2)

    def task(call: str, /, **args: Any) -> Any:
        both.wait(timeout=60)
        return run(call, **args)

    monkeypatch.setattr(images.runtime, "task", task)
    layers = [layer_of(images, {"a": b"1"}), layer_of(images, {"b": b"2"})]
    image = images.commit_layers(new_document(), layers, ["web"])
    assert [os.listdir(path) for path in images.layer_dirs(image)] == [["b"], ["a"]]
    assert os.listdir(images.layout.tmp) == []


@needs_root
def test_a_directory_a_layer_leaves_out_is_as_below_also_when_both_are_unpacked_at_once(images: Images) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("d")
        member.type, member.mode, member.uid, member.mtime = tarfile.DIRTYPE, 0o1771, 7, 1000
        archive.addfile(member)
    blob = images.blobs.put(buffer.getvalue())
    lowest = LayerInfo(blob.digest, blob.digest, "application/vnd.oci.image.layer.v1.tar", blob.size_bytes)
    layers = [lowest, layer_of(images, {"d/a": b"1"}), layer_of(images, {"d/b": b"2"})]
    image = images.commit_layers(new_document(), layers, ["web"])
    for path in images.layer_dirs(image):
        status = (path / "d").stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_mtime) == (0o1771, 7, 1000)
    assert os.listdir(images.layout.tmp) == []


@needs_root
def test_a_bad_layer_among_several_leaves_nothing_half_done(images: Images) -> None:
    bad = layer_of(images, {"b": b"2"})._replace(diff_id="sha256:" + "1" * 64)
    image = images.commit_layers(new_document(), [layer_of(images, {"a": b"1"}), bad], ["web"])
    with pytest.raises(LayerError, match="its config says"):
        images.layer_dirs(image)
    assert not images.layer_path(bad).exists()
    assert os.listdir(images.layout.tmp) == []


@needs_root
def test_threads_that_ask_at_once_unpack_once(images: Images) -> None:
    image = make(images, "web")
    threads = [threading.Thread(target=images.layer_dirs, args=(image,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images.runtime.calls == 1  # type: ignore[attr-defined]


def unpack_and_tag(base: str, number: int) -> None:
    images = open_images(Path(base))
    image = images.get("web")
    images.layer_dirs(image)
    make(images, f"mine:{number}", text=str(number))
    images.tag("web", f"web:{number}")
    images.remove(f"mine:{number}")


@needs_root
def test_many_processes_use_one_store(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(images, "web")
    # A test that ran an IPython shell in this process has left one as __main__, which multiprocessing cannot spawn.
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    spawn = multiprocessing.get_context("spawn")
    work = [spawn.Process(target=unpack_and_tag, args=(str(tmp_path), number)) for number in range(4)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert [process.exitcode for process in work] == [0] * 4
    assert image.tags == ["web:0", "web:1", "web:2", "web:3", "web:latest"]
    images.prune()
    assert len(list(images.blobs)) == 3
    assert contents(images)[1:] == ([image.layers[0].diff_id[7:]], [])


@needs_root
def test_a_layer_that_is_not_what_its_config_says_leaves_nothing(images: Images) -> None:
    good = layer_of(images, {"a": b"1"})
    image = images.commit_layers(new_document(), [good._replace(diff_id="sha256:" + "1" * 64)], ["bad"])
    with pytest.raises(LayerError):
        images.layer_dirs(image)
    assert contents(images)[1:] == ([], [])


@needs_root
def test_rot_in_a_layer_is_told_from_a_bad_image(images: Images) -> None:
    image = make(images, "web")
    path = images.blobs.path(image.layers[0].digest)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(515)
        file.write(b"?")
    with pytest.raises(CorruptBlob, match="is corrupt") as caught:
        images.layer_dirs(image)
    assert "system check" in (caught.value.resolution or "")
    assert contents(images)[1:] == ([], [])


def test_a_lost_blob_is_said(images: Images) -> None:
    image = make(images, "web")
    images.blobs.remove(image.layers[0].digest)
    with pytest.raises(StoreError, match="is missing"):
        images.layer_dirs(image)


@needs_root
def test_another_driver_unpacks_anew_unless_containers_are_there(images: Images, tmp_path: Path) -> None:
    image = make(images, "web")
    images.layer_dirs(image)
    other = open_images(tmp_path, "rootless")
    id = add_container(images, image, "c")
    with pytest.raises(DriverError, match=r"made with the driver root \(full\)"):
        other.layer_dirs(image)
    drop_container(images, id)
    other.layer_dirs(other.get("web"))
    assert other.runtime.calls == 1  # type: ignore[attr-defined]


# -- import and export -------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd"])
def test_a_tar_becomes_an_image(images: Images, tmp_path: Path, kind: str) -> None:
    data = tar_of({"etc/x": b"hello"})
    if kind == "gzip":
        import gzip

        data = gzip.compress(data)
    elif kind == "zstd":
        zstd = import_module("backports.zstd")
        data = zstd.compress(data)
    image = images.import_tar(io.BytesIO(data), "own", "1", ['CMD ["sh"]', "ENV A=b"], message="mine")
    assert (image.tags, image.config) == (["own:1"], {"Cmd": ["sh"], "Env": ["A=b"]})
    assert image.layers[0].diff_id == "sha256:" + hashlib.sha256(tar_of({"etc/x": b"hello"})).hexdigest()
    assert (images.layer_dirs(image)[0] / "etc/x").read_bytes() == b"hello"
    assert image.history()[0]["Comment"] == "mine"
    (tmp_path / "file.tar").write_bytes(data)
    assert images.import_tar(tmp_path / "file.tar", "again").layers == image.layers


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty or cut off"),
        (b"hello" * 1000, "not a tar archive"),
        (b"\x1f\x8b" + b"rubbish" * 100, "decompress"),
        (b"BZh91AY", "bzip2 archives are not taken"),
        (b"\xfd7zXZ\0", "xz archives are not taken"),
        (tar_of({"a": b"x" * 5000})[:2000], "ends inside"),
        (tar_of({"../../escape": b"x"}), "escape"),
    ],
)
def test_a_bad_archive_is_refused_and_leaves_nothing(images: Images, data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        images.import_tar(io.BytesIO(data), "bad")
    assert images.list() == []
    assert contents(images) == ([], [], [])


def test_bad_words_are_refused_before_anything_is_read(images: Images) -> None:
    with pytest.raises(InvalidReference):
        images.import_tar(io.BytesIO(), "Bad")
    with pytest.raises(UsageError, match="not a valid change command"):
        images.import_tar(io.BytesIO(), "ok", changes=["RUN ls"])
    with pytest.raises(UsageError, match="No such file"):
        images.import_tar("/nowhere/x.tar", "ok")


@needs_root
def test_export_flattens(images: Images, tmp_path: Path) -> None:
    layers = [layer_of(images, {"a": b"1", "gone": b"x"}), layer_of(images, {"b": b"2", ".wh.gone": b""})]
    images.commit_layers(new_document(), layers, ["web"])
    with (tmp_path / "out.tar").open("wb") as out:
        images.export_rootfs("web", out)
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert sorted(name.strip("./") for name in archive.getnames() if name.strip("./")) == ["a", "b"]


def test_the_engine_looks_up_and_unpacks_through_the_worker(engine: Engine) -> None:
    image = engine.images.resolve("lab/busybox")
    directory = engine.images.layer_dirs(image)[0]
    assert (directory / "bin/busybox").is_file()
    assert engine.images.get("lab/busybox") == image


def test_platforms_are_set_by_import_and_asked_for_by_save(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    image = images.import_tar(path, "lab/other", platform="linux/arm/v7")
    assert (image.architecture, image.raw_config["variant"]) == ("arm", "v7")
    with (tmp_path / "out.tar").open("wb") as out:
        images.save(["lab/other"], out, platform="linux/arm/v7")
        with pytest.raises(ImageError, match="does not provide the platform linux/amd64"):
            images.save(["lab/other"], out, platform="linux/amd64")
