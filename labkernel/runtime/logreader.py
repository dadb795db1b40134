"""Reading a container's log as `docker logs` does: the last lines, a span of time, following a running container."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .logs import decode_record

_POLL_S = 0.05
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


@dataclass(frozen=True)
class LogQuery:
    """What to show. `since` and `until` are RFC 3339 texts in UTC with nanoseconds, which compare as texts."""

    streams: frozenset[str]
    tail: int | None = None
    since: str | None = None
    until: str | None = None
    timestamps: bool = False

    @classmethod
    def parse(cls, streams: set[str], *, tail: int | str, since: Any, until: Any, timestamps: bool) -> LogQuery:
        """From docker's words. `tail` that is no number means all, as with docker."""
        text = str(tail)
        count = int(text) if text.isdigit() else None
        return cls(frozenset(streams), count, _moment(since), _moment(until), timestamps)


class LogReader:
    """One reading of a log: what is there (`past`), then what has come since (`more`), as (stream, bytes)."""

    def __init__(self, file: Any, query: LogQuery) -> None:
        self._file = file
        self._query = query
        self.over = False
        """Nothing that may still come would fit: `until` has passed."""

    def past(self) -> Iterator[tuple[str, bytes]]:
        query = self._query
        fitting: Iterator[Record] = (record for record in _records(self._file) if _fits(record, query))
        if query.tail is not None:
            # a record without a newline at its end is continued by the next one: lines are counted, not records
            fitting = _last_lines(fitting, query.tail)
        yield from (_shown(record, query) for record in fitting)

    def more(self) -> Iterator[tuple[str, bytes]]:
        for record in _records(self._file):
            if self._query.until is not None and record[2] > self._query.until:
                self.over = True
                return
            if _fits(record, self._query):
                yield _shown(record, self._query)

    def is_behind(self) -> bool:
        """Whether the file is not what has been read of it; costs one system call."""
        return bool(os.fstat(self._file.fileno()).st_size != self._file.tell())

    def close(self) -> None:
        self._file.close()


def read_log(path: Path, query: LogQuery, *, running: Callable[[], bool] | None = None) -> Iterator[tuple[str, bytes]]:
    """(stream, bytes) of each record that fits; with `running`, what comes until that says no."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        if running is None or not running():
            return
        file = _open_when_there(path, running)
        if file is None:
            return
    with file:
        reader = LogReader(file, query)
        yield from reader.past()
        while running is not None:
            alive = running()  # asked first, so that what was written just before the end is still read
            yield from reader.more()
            if reader.over or not alive:
                return
            time.sleep(_POLL_S)


def parse_moment(value: Any) -> float:
    """Seconds since the epoch from a number, a datetime, RFC 3339 or a duration before now (`10m`). UsageError else."""
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, (int, float)):
        return float(value)
    text = str(value).strip()
    try:
        return float(text)
    except ValueError:
        pass
    found = _DURATION.fullmatch(text)
    if text and found:
        hours, minutes, seconds, milliseconds = (float(part or 0) for part in found.groups())
        return time.time() - (hours * 3600 + minutes * 60 + seconds + milliseconds / 1000)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f'invalid value for "since" or "until": {value}', resolution="a time such as 2026-01-31T10:00:00, or 10m"
        ) from None
    return moment.timestamp()


def _moment(value: Any) -> str | None:
    if value is None or value == "" or value == 0:
        return None
    seconds = parse_moment(value)
    whole = datetime.fromtimestamp(int(seconds), UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{int(seconds % 1 * 1e9):09d}Z"


Record = tuple[str, bytes, str]


def _records(file: Any) -> Iterator[Record]:
    """Whole lines only: the position stays before a half-written last one."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(start)
            if line == b"" and start > os.fstat(file.fileno()).st_size:
                file.seek(0)  # the log started anew (log.max_bytes)
                continue
            return
        try:
            yield decode_record(line)
        except (ValueError, KeyError):
            continue


def _fits(record: Record, query: LogQuery) -> bool:
    stream, _, moment = record
    if stream not in query.streams or (query.since is not None and moment < query.since):
        return False
    return query.until is None or moment <= query.until


def _last_lines(records: Iterator[Record], count: int) -> Iterator[Record]:
    kept: deque[list[Record]] = deque(maxlen=count)
    unfinished: dict[str, list[Record]] = {}
    for record in records:
        line = unfinished.pop(record[0], None)
        if line is None:
            line = []
            kept.append(line)
        line.append(record)
        if not record[1].endswith(b"\n"):
            unfinished[record[0]] = line
    for line in kept:
        yield from line


def _shown(record: Record, query: LogQuery) -> tuple[str, bytes]:
    stream, data, moment = record
    return stream, f"{moment} ".encode() + data if query.timestamps else data


def _open_when_there(path: Path, running: Callable[[], bool]) -> Any:
    while running():
        try:
            return open(path, "rb")
        except FileNotFoundError:
            time.sleep(_POLL_S)
    return None
