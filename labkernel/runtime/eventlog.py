"""What the supervisor alone sees happen (start, die, oom, …), as lines of JSON that the events service takes over.

A line is one write(2) of some ten microseconds, and what is written survives a kill -9 of everybody. A supervisor never
goes on in another one's file: it begins the next one, so a file with a successor is complete. The supervisor does not
open the database: SQLite would have to wait for others' locks, and its memory would count for every container.
Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

MAX_BYTES = 1 << 20
SUFFIX = ".jsonl"


class EventLog:
    """Writes ROOT/events/NUMBER.jsonl. An event that cannot be written (a full disk) is lost, and nothing else."""

    def __init__(self, root: str) -> None:
        self.folder = f"{root}/events"
        self.fd = -1
        self.size = 0

    def add(self, action: str, id: str, /, **attributes: Any) -> None:
        """`action` (docker's word) happened to container `id`."""
        self._write([time.time_ns(), action, id, attributes])

    def add_other(self, type: str, action: str, id: str, attributes: dict[str, Any]) -> None:
        """The same of an object that is no container, such as a network."""
        self._write([time.time_ns(), action, id, attributes, type])

    def _write(self, event: list[Any]) -> None:
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        try:
            if self.fd < 0 or self.size > MAX_BYTES:
                self._next()
            self.size += os.write(self.fd, line)
        except OSError:
            pass

    def _next(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        os.makedirs(self.folder, 0o700, exist_ok=True)
        number = max(numbers(self.folder), default=0) + 1
        path = f"{self.folder}/{number:08d}{SUFFIX}"
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0


def numbers(folder: str) -> list[int]:
    """The numbers of the files there, in order."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
    return sorted(int(number) for number in found if number.isdigit())
