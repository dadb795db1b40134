from __future__ import annotations

import json

import pytest

from labkernel.errors import ManifestError, UsageError
from labkernel.oci import config, imageconfig


def test_equal_documents_have_equal_bytes_and_ids() -> None:
    first = config.encode({"os": "linux", "architecture": "amd64", "config": {"Labels": {"b": "1", "a": "ü"}}})
    second = config.encode({"config": {"Labels": {"a": "ü", "b": "1"}}, "architecture": "amd64", "os": "linux"})
    assert first == second
    assert imageconfig.parse(first).digest == imageconfig.parse(second).digest


def test_unknown_properties_survive() -> None:
    raw = b'{"architecture":"amd64","os":"linux","x":{"y":[1]},"rootfs":{"type":"layers","diff_ids":[]}}'
    assert imageconfig.parse(raw).document()["x"] == {"y": [1]}
    assert imageconfig.parse(raw).raw == raw


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b'{"rootfs":{"type":"layers","diff_ids":["x"]}}'])
def test_what_is_no_config_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        imageconfig.parse(raw)


def test_nulls_of_older_writers_are_taken() -> None:
    found = imageconfig.parse(b'{"architecture":"amd64","os":"linux","config":null,"history":null,"rootfs":null}')
    assert found.diff_ids == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:10Z", 10.0),
        ("1970-01-01T00:00:10.123456789Z", 10.123456),
        ("1970-01-01T01:00:10.5+01:00", 10.5),
        ("0001-01-01T00:00:00Z", 0.0),
        ("soon", 0.0),
        (None, 0.0),
    ],
)
def test_moments(text: str | None, seconds: float) -> None:
    assert config.parse_timestamp(text) == pytest.approx(seconds)


def test_a_moment_survives_a_round_trip() -> None:
    assert config.parse_timestamp(config.timestamp(1234567890.25)) == 1234567890.25


def test_changes_are_dockerfile_instructions() -> None:
    before = config.new_document(Env=["A=1"], WorkingDir="/srv")
    frozen = json.dumps(before)
    changed = config.apply_changes(
        before,
        [
            'CMD ["a", "b"]',
            "entrypoint run it",
            "ENV A=2 B='x y'",
            "EXPOSE 80 53/udp",
            "LABEL k=v",
            "WORKDIR sub",
            "USER www",
            "STOPSIGNAL INT",
            'VOLUME ["/data"]',
            "ENV OLD form here",
        ],
    )
    assert json.dumps(before) == frozen
    assert changed["config"] == {
        "Cmd": ["a", "b"],
        "Entrypoint": ["/bin/sh", "-c", "run it"],
        "Env": ["A=2", "B=x y", "OLD=form here"],
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Labels": {"k": "v"},
        "WorkingDir": "/srv/sub",
        "User": "www",
        "StopSignal": "INT",
        "Volumes": {"/data": {}},
    }


@pytest.mark.parametrize("change", ["RUN ls", "FROM x", "CMD", "ENV A", "LABEL 'x", "nonsense"])
def test_other_changes_are_refused(change: str) -> None:
    with pytest.raises(UsageError):
        config.apply_changes(config.new_document(), [change])
