from __future__ import annotations

import json

import pytest

from labkernel.errors import ManifestError
from labkernel.oci import manifest as oci

DIGEST = "sha256:" + "a" * 64


def document(**changes: object) -> bytes:
    whole = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {"mediaType": oci.OCI_CONFIG, "digest": DIGEST, "size": 7},
        "layers": [{"mediaType": oci.OCI_LAYER_GZIP, "digest": DIGEST, "size": 9, "unknown": 1}],
        "x-unknown": {"kept": True},
    }
    whole.update(changes)
    return json.dumps({key: value for key, value in whole.items() if value != "absent"}).encode()


def test_a_manifest_keeps_its_bytes() -> None:
    raw = document()
    found = oci.parse(raw)
    assert isinstance(found, oci.Manifest)
    assert found.raw == raw
    assert found.digest == oci.digest_of(raw)
    assert found.layers[0].size == 9


def test_a_made_manifest_can_be_read_again() -> None:
    config = oci.Descriptor(media_type=oci.OCI_CONFIG, digest=DIGEST, size=7)
    made = oci.make_manifest(config, [])
    assert oci.parse_manifest(made.raw) == made
    assert list(json.loads(made.raw)) == ["schemaVersion", "mediaType", "config", "layers"]


def test_an_index_is_told_by_its_content_when_nothing_says_what_it_is() -> None:
    raw = document(mediaType="absent", config="absent", layers="absent", manifests=[])
    assert isinstance(oci.parse(raw), oci.Index)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "invalid manifest"),
        (b"[]", "invalid manifest"),
        (b"\xff", "invalid manifest"),
        (b"{}", "invalid manifest"),
        (document(schemaVersion=1), "schema 1 is not supported"),
        (document(schemaVersion=3), "schemaVersion 3"),
        (document(manifests=[]), "ambiguous"),
        (document(mediaType=oci.OCI_INDEX, manifests=[]), "ambiguous"),
        (document(config={"mediaType": "x", "digest": "sha256:../../etc/passwd", "size": 1}), "not a digest"),
        (document(layers=[{"mediaType": "x", "digest": DIGEST, "size": -1}]), "negative size"),
        (document(layers=[{"mediaType": "x", "digest": DIGEST}]), "size"),
        (b" " * (oci.MANIFEST_MAX + 1), "refused"),
    ],
)
def test_what_is_no_manifest_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        oci.parse(raw)


def test_the_transports_type_must_agree() -> None:
    with pytest.raises(ManifestError, match="was sent as"):
        oci.parse(document(), oci.DOCKER_MANIFEST)


def test_compression_is_in_the_media_type() -> None:
    kinds = [oci.OCI_LAYER, oci.OCI_LAYER_GZIP, oci.OCI_LAYER_ZSTD, oci.DOCKER_LAYER_GZIP]
    assert [oci.compression_of(kind) for kind in kinds] == ["none", "gzip", "zstd", "gzip"]
    with pytest.raises(ManifestError, match="unsupported layer media type"):
        oci.compression_of("application/wasm")
