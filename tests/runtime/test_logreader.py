"""Reading logs: lines from the end, spans of time, following."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from labkernel.errors import UsageError
from labkernel.runtime.logreader import LogQuery, parse_moment, read_log
from labkernel.runtime.logs import LogWriter

RECORDS = [
    ("stdout", "one\n", "2026-01-01T00:00:01.000000000Z"),
    ("stderr", "two\n", "2026-01-01T00:00:02.000000000Z"),
    ("stdout", "thr", "2026-01-01T00:00:03.000000000Z"),
    ("stdout", "ee\n", "2026-01-01T00:00:04.500000000Z"),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    import json

    path = tmp_path / "log.json"
    lines = [json.dumps({"log": text, "stream": stream, "time": time}) for stream, text, time in RECORDS]
    path.write_text("\n".join(lines) + '\n{"log":"half')
    return path


def read(path: Path, streams: tuple[str, ...] = ("stdout", "stderr"), **query: object) -> bytes:
    options = {"tail": "all", "since": None, "until": None, "timestamps": False, **query}
    parsed = LogQuery.parse(set(streams), **options)  # type: ignore[arg-type]
    return b"".join(data for _, data in read_log(path, parsed))


def test_all_without_the_half_written_line(log: Path) -> None:
    assert read(log) == b"one\ntwo\nthree\n"


def test_one_stream(log: Path) -> None:
    assert read(log, ("stderr",)) == b"two\n"


@pytest.mark.parametrize(
    ("tail", "text"), [(0, b""), (1, b"three\n"), ("2", b"two\nthree\n"), (9, b"one\ntwo\nthree\n")]
)
def test_tail_counts_lines_and_not_records(log: Path, tail: object, text: bytes) -> None:
    assert read(log, tail=tail) == text


def test_span(log: Path) -> None:
    base = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert read(log, since=base + 2, until=base + 3) == b"two\nthr"
    assert read(log, since="2026-01-01T00:00:04.400+00:00") == b"ee\n"


def test_timestamps(log: Path) -> None:
    assert read(log, tail=1, timestamps=True).startswith(b"2026-01-01T00:00:03.000000000Z thr")


def test_no_log_yet(tmp_path: Path) -> None:
    assert read(tmp_path / "none.json") == b""


def test_following_ends_with_the_container(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = LogWriter(str(path))
    writer.write("stdout", b"a\n")
    script = [b"b\n", b"c\n", None]

    def running() -> bool:
        text = script.pop(0)
        if text is not None:
            writer.write("stdout", text)
        return text is not None

    query = LogQuery.parse({"stdout"}, tail="all", since=None, until=None, timestamps=False)
    assert [data for _, data in read_log(path, query, running=running)] == [b"a\n", b"b\n", b"c\n"]
    writer.close()


def test_bytes_that_are_no_text_survive(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = LogWriter(str(path))
    writer.write("stdout", bytes(range(256)))
    writer.close()
    assert read(path) == bytes(range(256))


@pytest.mark.parametrize("word", ["10m", "1h30m", "500ms", "12.5", 5, datetime.now(UTC), "2026-01-31T10:00:00"])
def test_moments(word: object) -> None:
    assert parse_moment(word) > 0


@pytest.mark.parametrize("word", ["yesterday", "10 apples", ""])
def test_no_moments(word: str) -> None:
    with pytest.raises(UsageError, match="invalid value"):
        parse_moment(word)


def test_rotated_files_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = LogWriter(str(path), 400, 3)
    for number in range(12):
        writer.write("stdout", b"%d\n" % number)
    text = read(path)
    assert text.endswith(b"8\n9\n10\n11\n")
    assert len(text.split()) > 5
    assert read(path, tail=8) == text[text.index(b"4\n") :]
    writer.close()


def test_following_over_rotations(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = LogWriter(str(path), 400, 3)
    numbers = iter(range(60))

    def running() -> bool:
        """Each time it is asked some lines come, more than one file of them."""
        lines = [number for _, number in zip(range(7), numbers, strict=False)]
        for number in lines:
            writer.write("stdout", b"%d\n" % number)
        return bool(lines)

    query = LogQuery.parse({"stdout"}, tail="all", since=None, until=None, timestamps=False)
    text = b"".join(data for _, data in read_log(path, query, running=running))
    assert text.split() == [b"%d" % number for number in range(60)]
    writer.close()


def test_details(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = LogWriter(str(path), attributes={"tier": "a b", "x": "1"})
    writer.write("stdout", b"line\n")
    assert read(path) == b"line\n"
    assert read(path, details=True) == b"tier=a%20b,x=1 line\n"
    writer.close()


def test_log_settings() -> None:
    from labkernel.runtime.logsettings import check, plan

    given = {"log_config": check({"Type": "json-file", "Config": {"max-size": "10k", "max-file": 3, "env": "A"}})}
    made = plan(given, path="/p", id="i", labels={}, environment=["A=1", "B=2"])
    assert (made["max_bytes"], made["max_files"], made["attributes"]) == (10_000, 3, {"A": "1"})
    local = plan({"log_config": check({"type": "local"})}, path="/p", id="i", labels={}, environment=[])
    assert (local["max_bytes"], local["max_files"]) == (20_000_000, 5)
    for bad, words in [
        ({"Type": "syslog"}, "no log driver named 'syslog'"),
        ({"Config": {"nope": "1"}}, "unknown log opt 'nope'"),
        ({"Config": {"max-size": "0"}}, "positive"),
        ({"Config": {"max-file": "0", "max-size": "1k"}}, "less than 1"),
    ]:
        with pytest.raises(UsageError, match=words):
            check(bad)
