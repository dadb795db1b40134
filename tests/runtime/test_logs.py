"""Log records, and the repair of a chunk a killed supervisor left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from labkernel.runtime import logs, protocol


def test_records_are_docker_json_lines() -> None:
    lines = logs.encode_records("stderr", "a\nü\npart".encode()).splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["log"], r["stream"]) for r in records] == [("a\n", "stderr"), ("ü\n", "stderr"), ("part", "stderr")]
    assert logs.timestamp(1_700_000_000_000_000_007) == "2023-11-14T22:13:20.000000007Z"


@pytest.mark.parametrize("data", [b"", b"\n\n", bytes(range(256)), b"\xc3", "\u2028x\r\n".encode()])
def test_bytes_come_back_exactly(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(logs.encode_records("stdout", data) + b'{"log":"half')
    assert b"".join(chunk for _, chunk, _ in logs.read_records(path)) == data


def test_no_log_is_no_records(tmp_path: Path) -> None:
    assert list(logs.read_records(tmp_path / "none")) == []


@pytest.mark.parametrize("logged", [True, False])
def test_repair_neither_loses_nor_repeats(tmp_path: Path, logged: bool) -> None:
    path = str(tmp_path / "log.json")
    writer = logs.LogWriter(path)
    journal = logs.Journal(os.pipe2(os.O_CLOEXEC), logs.Journal.shared_memory())
    source = os.pipe()
    os.write(source[1], b"first\n")
    assert journal.move(source[0], writer, "id", "stdout") == b"first\n"
    # Killed between taking the chunk and emptying the scratch pipe, before or after it was logged.
    os.write(journal.scratch_w, b"second\n")
    logs._MARK.pack_into(journal.mark, 0, writer.size, 1, b"id", 0)
    if logged:
        writer.write("stdout", b"second\n")
    journal.repair({"id": logs.LogWriter(path)})
    journal.repair({"id": logs.LogWriter(path)})
    assert b"".join(data for _, data, _ in logs.read_records(path)) == b"first\nsecond\n"


def test_full_log_starts_anew(tmp_path: Path) -> None:
    writer = logs.LogWriter(str(tmp_path / "log.json"), max_bytes=500)
    for number in range(100):
        writer.write("stdout", b"line %d\n" % number)
    records = list(logs.read_records(writer.path))
    assert os.path.getsize(writer.path) < 700
    assert records[-1][1] == b"line 99\n"
    writer.close()


@pytest.mark.parametrize("files", [1, 3])
def test_rotation(tmp_path: Path, files: int) -> None:
    writer = logs.LogWriter(str(tmp_path / "log.json"), 500, files)
    for number in range(100):
        writer.write("stdout", b"line %d\n" % number)
    names = logs.files(writer.path)
    assert [Path(name).name for name in names] == ["log.json.2", "log.json.1", "log.json"][-files:]
    kept = [data for name in names for _, data, _ in logs.read_records(name)]
    assert kept == [b"line %d\n" % number for number in range(100 - len(kept), 100)]
    assert all(os.path.getsize(name) <= 500 for name in names)
    writer.close()


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("killed", ["before the rotation", "after it", "after writing"])
def test_repair_of_a_rotation(tmp_path: Path, killed: str, files: int) -> None:
    writer = logs.LogWriter(str(tmp_path / "log.json"), 300, files)
    journal = logs.Journal(os.pipe2(os.O_CLOEXEC), logs.Journal.shared_memory())
    writer.write("stdout", b"first\n" * 4)
    os.write(journal.scratch_w, b"second\n")
    logs._MARK.pack_into(journal.mark, 0, 0, 1, b"id", os.fstat(writer.fd).st_ino)
    if killed != "before the rotation":
        writer.rotate()
    if killed == "after writing":
        writer.write("stdout", b"second\n")
    journal.repair({"id": logs.LogWriter(writer.path, 300, files)})
    text = b"".join(data for name in logs.files(writer.path) for _, data, _ in logs.read_records(name))
    assert text == (b"first\n" * 4 if files == 2 else b"") + b"second\n"


def test_no_log_at_all() -> None:
    log = logs.LogWriter.from_settings({"driver": "none"}, "/nowhere/log.json")
    log.write("stdout", b"a\n")
    assert [data for _, data, _ in logs.read_records(log.path)] == [b"a\n"]
    log.max_bytes = 100
    log.write("stdout", b"b\n")
    assert [data for _, data, _ in logs.read_records(log.path)] == [b"b\n"]
    log.close()


def test_frames_and_messages() -> None:
    buffer = bytearray(protocol.encode_frame(1, b"one") + protocol.encode_frame(2, b"") + b"\1\0\0\0\0")
    assert protocol.take_frames(buffer) == [(1, b"one"), (2, b"")]
    assert buffer == b"\1\0\0\0\0"
    buffer = bytearray(protocol.encode_message({"a": 1}))
    assert protocol.take_message(bytearray(buffer[:-1])) is None
    assert protocol.take_message(buffer) == {"a": 1}
    assert not buffer
    with pytest.raises(ValueError, match="too long"):
        protocol.take_message(bytearray(b"\xff\xff\xff\xff"))
