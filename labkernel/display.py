"""How values are worded for people: sizes, ages and tables, as text and as HTML. Pure; imports nothing of ours.

Services give their objects a `__repr__` and a `_repr_html_` with these; the faces print the same tables.
"""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# Classes of HTML whose text is not ours: without them JupyterLab and nbconvert set `$A … $B` as a formula.
_NO_MATH = "tex2jax_ignore mathjax_ignore"

_Shown = TypeVar("_Shown")


def no_formulas(text: str) -> str:
    """HTML in which dollars are dollars. All that is shown goes through here, or through `without_formulas`."""
    return f"<div class='{_NO_MATH}'>{text}</div>"


def without_formulas(method: Callable[[_Shown], str]) -> Callable[[_Shown], str]:
    """Decorates a `_repr_html_`."""

    @functools.wraps(method)
    def shown(self: _Shown) -> str:
        return no_formulas(method(self))

    return shown


_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human_size(size_bytes: float) -> str:
    """As `docker images` words sizes: decimal units, three significant digits (`4.26MB`)."""
    return _scaled(size_bytes, 1000.0, _DECIMAL, digits=3)


def human_memory(size_bytes: float) -> str:
    """As `docker stats` words memory: binary units, four significant digits (`63.5MiB`)."""
    return _scaled(size_bytes, 1024.0, _BINARY, digits=4)


def _scaled(value: float, base: float, units: Sequence[str], *, digits: int) -> str:
    index = 0
    while value >= base and index < len(units) - 1:
        value /= base
        index += 1
    return f"{value:.{digits}g}{units[index]}" if value < 1000 else f"{value:.0f}{units[index]}"


def human_duration(seconds: float) -> str:
    """As docker words ages: `Less than a second`, `5 seconds`, `About a minute`, `3 hours`, `2 weeks`."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole < 120:
        return "1 second" if whole == 1 else f"{whole} seconds" if whole < 60 else "About a minute"
    for limit, unit, word in ((3600, 60, "minutes"), (7200, 0, "About an hour"), (172800, 3600, "hours")):
        if whole < limit:
            return word if unit == 0 else f"{whole // unit} {word}"
    for limit, unit, word in ((1209600, 86400, "days"), (5184000, 604800, "weeks"), (63072000, 2592000, "months")):
        if whole < limit:
            return f"{whole // unit} {word}"
    return f"{whole // 31536000} years"


def human_age(timestamp_s: float) -> str:
    """The age of a moment given in seconds since the epoch: `5 seconds ago`."""
    return f"{human_duration(max(0.0, time.time() - timestamp_s))} ago"


def table_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns with three spaces between and ten characters at least, as the docker CLI prints them (Go's tabwriter);
    ends without a newline."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(10, 3 + max(len(line[i]) for line in lines)) for i in range(len(header))]
    return "\n".join("".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def table_html(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str | None = None) -> str:
    """The same as an HTML table that fits a light and a dark theme; every cell is escaped."""
    head = "".join(f"<th style='text-align:left'>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    title = f"<caption style='text-align:left'>{html.escape(caption)}</caption>" if caption else ""
    return f"<table class='labkernel-table'>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def status_words(state: Mapping[str, Any]) -> str:
    """A state as `docker ps` words it."""
    status, now = state["status"], time.time()
    if status in ("running", "paused"):
        up = f"Up {human_duration(now - (state.get('started_at') or now))}"
        health = (state.get("health") or {}).get("Status")
        if health and status == "running":
            return f"{up} ({'health: starting' if health == 'starting' else health})"
        return f"{up} (Paused)" if status == "paused" else up
    if status == "created":
        return "Created"
    if status == "dead":
        return "Dead"
    age = human_age(state.get("finished_at") or now)
    word = "Restarting" if status == "restarting" else "Exited"
    return f"{word} ({state.get('exit_code') or 0}) {age}"


def command_words(args: Sequence[str]) -> str:
    """A command as `docker ps` shows it: in quotes, cut to 20 characters."""
    text = joined_command(args).replace("\n", " ")
    return f'"{text if len(text) <= 20 else text[:19] + "…"}"'


def joined_command(args: Sequence[str]) -> str:
    """A command in one line as docker words it: arguments with blanks in single quotes."""
    return " ".join([*args[:1], *(f"'{word}'" if " " in word else word for word in args[1:])])
