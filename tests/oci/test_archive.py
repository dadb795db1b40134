"""Archives written here are read here and by skopeo; hostile ones are refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import CorruptBlob, ImageError, LayerError, ManifestError, UsageError
from labkernel.oci.archive import Bounds, SavedImage, StoredLayer, load_archive, save_archive
from labkernel.oci.config import encode, new_document
from labkernel.oci.manifest import OCI_CONFIG, OCI_INDEX, Descriptor, digest_of, make_index, make_manifest
from labkernel.store.blobs import Blobs
from labkernel.store.layout import Layout


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(Layout.find(tmp_path / "root", tmp_path / "run"))


@pytest.fixture
def others(tmp_path: Path) -> Blobs:
    return Blobs(Layout.find(tmp_path / "other", tmp_path / "run2"))


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


LAYER = tar_of({"hello": b"world"})
DIFF_ID = "sha256:" + hashlib.sha256(LAYER).hexdigest()


def save(blobs: Blobs, path: Path, *tags: str) -> SavedImage:
    packed = gzip.compress(LAYER, mtime=0)
    layer = StoredLayer(DIFF_ID, blobs.put(packed).digest, "application/vnd.oci.image.layer.v1.tar+gzip", len(packed))
    config = blobs.put(encode(new_document([DIFF_ID], created="2026-01-01T00:00:00Z", Cmd=["sh"])))
    head = Descriptor(media_type=OCI_CONFIG, digest=config.digest, size=config.size_bytes)
    body = Descriptor(media_type=layer.media_type, digest=layer.digest, size=layer.size_bytes)
    manifest = blobs.put(make_manifest(head, [body]).raw)
    image = SavedImage(config.digest, manifest.digest, [layer], list(tags))
    with path.open("wb") as out:
        save_archive(blobs, [image], out)
    return image


def test_what_is_saved_can_be_loaded_with_every_digest_kept(blobs: Blobs, others: Blobs, tmp_path: Path) -> None:
    saved = save(blobs, tmp_path / "a.tar", "docker.io/library/web:1", "example.org/web:2")
    for data in ((tmp_path / "a.tar").read_bytes(), gzip.compress((tmp_path / "a.tar").read_bytes())):
        (found,) = load_archive(others, io.BytesIO(data))
        assert digest_of(found.config) == saved.config
        assert found.manifest is not None
        assert digest_of(found.manifest) == saved.manifest
        assert found.layers == saved.layers
        assert found.tags == ["web:1", "example.org/web:2"]
    save(others, tmp_path / "b.tar", "docker.io/library/web:1", "example.org/web:2")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_an_image_layout_needs_no_manifest_json(blobs: Blobs, others: Blobs, tmp_path: Path) -> None:
    saved = save(blobs, tmp_path / "a.tar", "docker.io/library/web:1")
    with tarfile.open(tmp_path / "a.tar") as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}  # type: ignore[union-attr]
    del files["manifest.json"], files["repositories"]
    (found,) = load_archive(others, io.BytesIO(tar_of(files)))
    assert (digest_of(found.config), found.tags) == (saved.config, ["docker.io/library/web:1"])


def test_an_old_docker_archive_with_links_is_read(others: Blobs) -> None:
    config = encode(new_document([DIFF_ID, DIFF_ID]))
    entry = {"Config": "c.json", "RepoTags": ["old:1"], "Layers": ["a/layer.tar", "b/layer.tar"]}
    files = {"c.json": config, "a/layer.tar": LAYER, "manifest.json": json.dumps([entry]).encode()}
    (found,) = load_archive(others, io.BytesIO(tar_of(files, {"b/layer.tar": "../a/layer.tar"})))
    assert [layer.diff_id for layer in found.layers] == [DIFF_ID, DIFF_ID]
    assert found.manifest is None


def docker_archive(**changes: Any) -> bytes:
    entry = {"Config": "c.json", "RepoTags": None, "Layers": ["layer.tar"], **changes.pop("entry", {})}
    files = {
        "c.json": encode(new_document([DIFF_ID])),
        "layer.tar": LAYER,
        "manifest.json": json.dumps([entry]).encode(),
    }
    files.update(changes.pop("files", {}))
    return tar_of(files)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "neither manifest.json nor"),
        (b"x" * 4096, "damaged"),
        (tar_of({"hello": b"x"}), "neither manifest.json nor"),
        (docker_archive()[:1500], "damaged"),
        (docker_archive(files={"manifest.json": b"{"}), "not as it should be"),
        (docker_archive(files={"manifest.json": b"[{}]"}), "not as it should be"),
        (docker_archive(files={"manifest.json": b"[]"}), "no image for this machine"),
        (docker_archive(entry={"Layers": ["../../etc/passwd"]}), "does not hold it"),
        (docker_archive(entry={"Layers": []}), "must be as many"),
        (docker_archive(files={"c.json": b"[]"}), "invalid image config"),
        (docker_archive(files={"layer.tar": tar_of({"other": b"x"})}), "its config says"),
        (tar_of({"index.json": make_index([]).raw}), "no image for this machine"),
        (tar_of({"index.json": b"{}"}), "schemaVersion|schema_version|missing"),
    ],
)
def test_a_wrong_archive_is_refused(others: Blobs, data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_archive(others, io.BytesIO(data))
    assert os.listdir(others.layout.tmp) == []


def test_a_blob_with_another_name_than_its_digest_is_refused(others: Blobs) -> None:
    name = "blobs/sha256/" + "0" * 64
    with pytest.raises(CorruptBlob):
        load_archive(others, io.BytesIO(docker_archive(files={name: b"hello"})))
    assert not others.has("sha256:" + "0" * 64)


def test_a_missing_file_is_said(others: Blobs) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_archive(others, "/nowhere/a.tar")


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
@pytest.mark.parametrize("transport", ["docker-archive:{}", "oci-archive:{}:1"])
def test_skopeo_reads_what_is_saved(blobs: Blobs, tmp_path: Path, transport: str) -> None:
    saved = save(blobs, tmp_path / "a.tar", "docker.io/library/web:1")
    command = ["skopeo", "inspect", "--config", "--raw", transport.format(tmp_path / "a.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest_of(done.stdout.encode()) == saved.config


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
@pytest.mark.parametrize("transport", ["docker-archive:{}:docker.io/library/web:1", "oci-archive:{}:web:1"])
def test_what_skopeo_writes_is_loaded(blobs: Blobs, others: Blobs, tmp_path: Path, transport: str) -> None:
    saved = save(blobs, tmp_path / "a.tar", "docker.io/library/web:1")
    source, target = f"oci-archive:{tmp_path / 'a.tar'}:1", transport.format(tmp_path / "b.tar")
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", source, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = load_archive(others, tmp_path / "b.tar")
    assert digest_of(found.config) == saved.config
    assert [tag.removeprefix("docker.io/library/") for tag in found.tags] == ["web:1"]


def layout_of(documents: list[bytes], top: bytes, **more: bytes) -> bytes:
    files = {f"blobs/{digest_of(raw).replace(':', '/')}": raw for raw in documents}
    return tar_of({**files, **more, "index.json": top, "oci-layout": b'{"imageLayoutVersion":"1.0.0"}'})


def index_of(inner: bytes, times: int) -> bytes:
    return make_index([Descriptor(media_type=OCI_INDEX, digest=digest_of(inner), size=len(inner))] * times).raw


def test_indexes_that_name_each_other_many_times_are_refused(others: Blobs) -> None:
    """Four of a hundred entries each are a hundred million."""
    documents = [make_index([]).raw]
    for _ in range(3):
        documents.append(index_of(documents[-1], 100))
    with pytest.raises(ManifestError, match="name more than"):
        load_archive(others, io.BytesIO(layout_of(documents, index_of(documents[-1], 100))))


def test_bounds_are_kept_and_one_layer_is_read_once(others: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 400
    packed = gzip.compress(LAYER, mtime=0)
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [DIFF_ID] * count}}).encode()
    listed = json.dumps([{"Config": "c.json", "Layers": ["l.tar"] * count, "RepoTags": ["web:1"]}]).encode()
    data = tar_of({"c.json": config, "l.tar": packed, "manifest.json": listed})
    opened: list[str] = []
    real = others.open
    monkeypatch.setattr(others, "open", lambda digest: (opened.append(digest), real(digest))[1])
    (found,) = load_archive(others, io.BytesIO(data))
    assert len(found.layers) == count
    assert opened.count(digest_of(packed)) == 1
    with pytest.raises(ManifestError, match="400 layers"):
        load_archive(others, io.BytesIO(data), bounds=Bounds(layers=100))
    for bounds in (Bounds(layer_bytes=1000), Bounds(image_bytes=1000)):
        with pytest.raises(ImageError, match="limits"):
            load_archive(others, io.BytesIO(tar_of({"l.tar": LAYER})), bounds=bounds)
    packed = gzip.compress(bytes(1 << 20), mtime=0)
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [DIFF_ID]}}).encode()
    listed = json.dumps([{"Config": "c.json", "Layers": ["l.tar"]}]).encode()
    data = tar_of({"c.json": config, "l.tar": packed, "manifest.json": listed})
    with pytest.raises(LayerError, match="more than"):
        load_archive(others, io.BytesIO(data), bounds=Bounds(layer_bytes=1 << 19))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"[" * 200_000, "not as it should be"),
        (b"[1]", "not as it should be"),
        (b'[{"Config":5,"Layers":[],"RepoTags":"x"}]', "names 5"),
        (b'[{"Config":"../../etc/passwd","Layers":[]}]', "does not hold"),
        (b'{"a":1}', "not as it should be"),
        (b'[{"Config":"c","Layers":5}]', "not as it should be"),
    ],
)
def test_a_manifest_json_of_nonsense(others: Blobs, document: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        load_archive(others, io.BytesIO(tar_of({"manifest.json": document})))


def test_a_layout_on_the_disk(blobs: Blobs, others: Blobs, tmp_path: Path) -> None:
    path = tmp_path / "saved.tar"
    save(blobs, path, "docker.io/library/web:1")
    layout = tmp_path / "layout"
    subprocess.run(["tar", "-xf", str(path), "--one-top-level=layout"], cwd=tmp_path, check=True, timeout=60)
    (found,) = load_archive(others, layout)
    assert (found.tags, found.layers[0].diff_id) == (["docker.io/library/web:1"], DIFF_ID)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (layout / "blobs/sha256" / digest_of(b"secret")[7:]).symlink_to(secret)
    with pytest.raises(ImageError, match="cannot read blobs/sha256"):
        load_archive(others, layout)
    assert not others.has(digest_of(b"secret"))


def test_what_a_failed_load_stored_is_told(others: Blobs) -> None:
    there = others.put(b"there before").digest
    stored: list[str] = []
    with pytest.raises(ImageError):
        load_archive(others, io.BytesIO(tar_of({"a": b"there before", "b": b"new"})), stored=stored)
    assert stored == [digest_of(b"new")]
    assert others.has(there)
