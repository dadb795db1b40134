"""Reading a container's log as `docker logs` does: the last lines, a span of time, following a running container."""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .logs import decode_record, files

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
    details: bool = False

    @classmethod
    def parse(
        cls, streams: set[str], *, tail: int | str, since: Any, until: Any, timestamps: bool, details: bool = False
    ) -> LogQuery:
        """From docker's words. `tail` that is no number means all, as with docker."""
        text = str(tail)
        count = int(text) if text.isdigit() else None
        return cls(frozenset(streams), count, _moment(since), _moment(until), timestamps, details)


class LogReader:
    """One reading of a log: what is there (`past`), then what has come since (`more`), as (stream, bytes)."""

    def __init__(self, file: Any, query: LogQuery) -> None:
        """`file` is what is open of the log's files; those that come after it are found by its name."""
        self._tape = file if isinstance(file, _Tape) else _Tape(Path(file.name), file)
        self._query = query
        self.over = False
        """Nothing that may still come would fit: `until` has passed."""

    @classmethod
    def open(cls, path: Path, query: LogQuery) -> LogReader | None:
        """From the oldest of the log's files on; None when there is none yet."""
        tape = _Tape(path)
        return None if tape.file is None else cls(tape, query)

    def past(self) -> Iterator[tuple[str, bytes]]:
        query = self._query
        fitting: Iterator[Record] = (record for record in self._tape.records() if _fits(record, query))
        if query.tail is not None:
            # a record without a newline at its end is continued by the next one: lines are counted, not records
            fitting = _last_lines(fitting, query.tail)
        yield from (_shown(record, query) for record in fitting)

    def more(self) -> Iterator[tuple[str, bytes]]:
        for record in self._tape.records():
            if self._query.until is not None and record[2] > self._query.until:
                self.over = True
                return
            if _fits(record, self._query):
                yield _shown(record, self._query)

    @property
    def path(self) -> Path:
        """The log's newest file."""
        return self._tape.path

    def is_behind(self, newest: os.stat_result | None = None) -> bool:
        """Whether the file is not what has been read of it. Costs nothing with `newest`, what stat has just told of
        `path`: a thousand readers of one log ask once."""
        return self._tape.is_behind(newest)

    def close(self) -> None:
        self._tape.close()


def read_log(path: Path, query: LogQuery, *, running: Callable[[], bool] | None = None) -> Iterator[tuple[str, bytes]]:
    """(stream, bytes) of each record that fits; with `running`, what comes until that says no."""
    tape = _Tape(path)
    if tape.file is None and (running is None or not tape.wait(running)):
        return
    with closing(tape):
        reader = LogReader(tape, query)
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
            f'invalid value for "since" or "until": {value}',
            resolution="a time such as 2026-01-31T10:00:00, or 10m",
            exit_code=1,
        ) from None
    return moment.timestamp()


def _moment(value: Any) -> str | None:
    if value is None or value == "" or value == 0:
        return None
    seconds = parse_moment(value)
    whole = datetime.fromtimestamp(int(seconds), UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{int(seconds % 1 * 1e9):09d}Z"


Record = tuple[str, bytes, str, str]


class _Tape:
    """The files of a log (`logs.LogWriter`) one after the other, also while the last one is being rotated away."""

    def __init__(self, path: Path, file: Any = None) -> None:
        self.path = path
        self.file = file
        self._read: tuple[int, int, int] | None = None  # device, inode and position, where all that was there was read
        for name in files(path) if file is None else ():
            try:
                self.file = open(name, "rb")  # noqa: SIM115
                return
            except FileNotFoundError:
                continue

    def close(self) -> None:
        self.file.close()

    def wait(self, running: Callable[[], bool]) -> bool:
        """Until there is a file; False when the container has ended without one."""
        while self.file is None and running():
            try:
                self.file = open(self.path, "rb")  # noqa: SIM115
            except FileNotFoundError:
                time.sleep(_POLL_S)
        return self.file is not None

    def is_behind(self, newest: os.stat_result | None = None) -> bool:
        if newest is not None and self._read is not None:
            return self._read != (newest.st_dev, newest.st_ino, newest.st_size)
        own = os.fstat(self.file.fileno())
        if own.st_size != self.file.tell():
            return True
        try:
            return not os.path.samestat(own, os.stat(self.path))
        except FileNotFoundError:
            return False  # between two files of a rotation, or removed

    def records(self) -> Iterator[Record]:
        """What is there now. Whole lines only: the position stays before a half-written last one."""
        while True:
            # Looked for before the last line is: what was written until the rotation is read first.
            following = self._following()
            yield from self._rest()
            if following is None:
                return
            self.file.close()
            self.file = following

    def _rest(self) -> Iterator[Record]:
        self._read = None
        while True:
            start = self.file.tell()
            line = self.file.readline()
            if not line.endswith(b"\n"):
                self.file.seek(start)
                own = os.fstat(self.file.fileno())
                self._read = own.st_dev, own.st_ino, start
                return
            try:
                yield _decode(line)
            except (ValueError, KeyError):
                continue

    def _following(self) -> Any:
        """The file that comes after this one, opened; None when this is the newest. When it was dropped, the oldest."""
        mine = os.fstat(self.file.fileno())
        found = None
        for name in reversed(files(self.path)):
            try:
                opened = open(name, "rb")  # noqa: SIM115
            except FileNotFoundError:
                continue
            if os.path.samestat(mine, os.fstat(opened.fileno())):
                opened.close()
                return found
            if found is not None:
                found.close()
            found = opened
        return found


def _decode(line: bytes) -> Record:
    stream, data, moment = decode_record(line)
    if b',"attrs":{' not in line:
        return stream, data, moment, ""
    from urllib.parse import quote

    pairs = json.loads(line).get("attrs") or {}
    return stream, data, moment, ",".join(f"{quote(key)}={quote(value)}" for key, value in sorted(pairs.items()))


def _fits(record: Record, query: LogQuery) -> bool:
    stream, _, moment, _ = record
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
    stream, data, moment, details = record
    if query.details:
        data = f"{details} ".encode() + data
    return stream, f"{moment} ".encode() + data if query.timestamps else data
