"""The output of several containers as one stream, each line with its container's name in front."""

from __future__ import annotations

import heapq
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import LabkernelError
from .host import Host

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
Line = tuple[str, str, bytes]
"""(moment as text, stream, bytes with their newline)"""


def short_name(container: Any) -> str:
    """`web-1`, or the container's own name where the file gives it one."""
    labels = container.labels
    own = f"{labels.get('com.docker.compose.service')}-{labels.get('com.docker.compose.container-number')}"
    return own if container.name.endswith(own) else str(container.name)


class Printer:
    """Writes lines with aligned names to the host."""

    def __init__(self, host: Host, names: Sequence[str], *, prefix: bool, colour: bool, timestamps: bool) -> None:
        self._host = host
        self._width = max(map(len, names), default=0)
        self._colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
        self._prefix = prefix
        self._colour = colour and host.terminal_size() is not None
        self._timestamps = timestamps

    def __call__(self, name: str, line: Line) -> None:
        moment, stream, data = line
        text = (moment.encode() + b" " if self._timestamps else b"") + data
        if not text.endswith(b"\n"):
            text += b"\n"
        if self._prefix:
            head = f"{name:<{self._width}}  | "
            if self._colour:
                head = f"\x1b[{self._colours.get(name, 36)}m{head}\x1b[0m"
            text = b"".join(head.encode() + part for part in text.splitlines(keepends=True))
        self._host.write(stream, text)

    def said(self, text: str) -> None:
        """A line about a container, in docker compose's words."""
        self._host.write("stdout", f"{text}\n".encode())


def lines(container: Any, **settings: Any) -> Iterator[Line]:
    """What a container wrote, line by line with its moment."""
    for stream, data in container.log_records(timestamps=True, **settings):
        moment, _, text = data.partition(b" ")
        yield moment.decode(errors="replace"), stream, text


def past(printer: Printer, containers: Sequence[Any], **settings: Any) -> None:
    """What was written until now, in the order in which it was written."""
    named = [((line[0], short_name(each)), line) for each in containers for line in lines(each, **settings)]
    for (_, name), line in heapq.merge(sorted(named, key=lambda item: item[0][0])):
        printer(name, line)


def follow(
    printer: Printer,
    containers: Sequence[Any],
    *,
    ended: Callable[[Any, int], None] = lambda container, code: None,
    settings: Callable[[Any], dict[str, Any]] = lambda container: {},
) -> None:
    """Everything from now on, until the last of them has ended. `ended` (container, exit code) is told of each end,
    from this thread. Interruptible."""
    todo: queue.Queue[tuple[Any, Line | None]] = queue.Queue(maxsize=1000)
    left = threading.Event()

    def put(item: tuple[Any, Line | None]) -> None:
        while not left.is_set():
            try:
                todo.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def pump(container: Any) -> None:
        try:
            for line in lines(container, follow=True, **settings(container)):
                put((container, line))
                if left.is_set():
                    return
        except (LabkernelError, OSError):
            pass  # removed meanwhile
        finally:
            put((container, None))

    for each in containers:
        threading.Thread(target=pump, args=(each,), name="labkernel-compose-logs", daemon=True).start()
    count = len(containers)
    try:
        while count:
            try:
                container, line = todo.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is not None:
                printer(short_name(container), line)
                continue
            count -= 1
            ended(container, _exit_code(container))
    finally:
        left.set()


def _exit_code(container: Any) -> int:
    try:
        return int(container.runtime_state().get("exit_code") or 0)
    except LabkernelError:
        return 0
