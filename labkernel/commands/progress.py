"""The steps of a build as lines of text: for a terminal, a pipe, and a notebook without widgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..display import human_size
from .values import seconds_text


class LineProgress:
    """Prints each step as it happens, docker's way: `Step 2/5 : RUN …`, its output, ` ---> Using cache`."""

    def __init__(self, line: Callable[[str], None], write: Callable[[bytes], None]) -> None:
        self._line = line
        self._write = write
        self._shown: set[int] = set()
        self._open = False

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_line()

    def __call__(self, step: Any, /) -> None:
        if step.number not in self._shown:
            self._shown.add(step.number)
            self._end_line()
            self._line(f"Step {step.number}/{step.total} : {step.text}")
        output = getattr(step, "output", b"") or b""
        if output and step.status in ("output", "started"):
            self._write(output)
            self._open = not output.endswith(b"\n")
        if step.status == "cached":
            self._line(" ---> Using cache")
        elif step.status == "done":
            self._end_line()
            size = getattr(step, "size_bytes", None)
            parts = [seconds_text(step.duration_s)] if getattr(step, "duration_s", None) is not None else []
            parts += [human_size(size)] if size else []
            self._line(f" ---> {', '.join(parts)}" if parts else " ---> done")

    def _end_line(self) -> None:
        if self._open:
            self._write(b"\n")
            self._open = False
