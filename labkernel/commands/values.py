"""What commands give back: lists that display themselves as docker's tables, and the outcome of a run."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..display import human_duration, table_html, table_text, without_formulas
from .template import render


class Listing(list[Any]):
    """A list of objects (or strings) that displays as a table; `text` is what the terminal prints."""

    def __init__(
        self,
        items: Sequence[Any] = (),
        *,
        header: Sequence[str] | None = None,
        rows: Sequence[Sequence[Any]] = (),
        text: str | None = None,
    ) -> None:
        super().__init__(items)
        self._header = header
        self._rows = rows
        self._text = text

    @property
    def text(self) -> str:
        if self._text is not None:
            return self._text
        if self._header is not None:
            return table_text(self._header, self._rows)
        return "\n".join(map(str, self))

    def __repr__(self) -> str:
        return self.text

    @without_formulas
    def _repr_html_(self) -> str:
        if self._header is not None and self._text is None:
            return table_html(self._header, self._rows)
        return f"<pre>{html.escape(self.text)}</pre>"


class Text(str):
    """Text that displays as it is, without quotes (logs, help, ids); still a string."""

    __slots__ = ()

    @property
    def text(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001  (IPython's signature)
        printer.text(str(self))


class Document(Text):
    """JSON text with the data it was made from: `%container inspect web` displays as docker prints it."""

    __slots__ = ("data",)
    data: Any

    def __new__(cls, data: Any) -> Document:
        self = super().__new__(cls, json.dumps(data, indent=4, ensure_ascii=False, default=str))
        self.data = data
        return self

    def __getitem__(self, key: Any) -> Any:
        return self.data[key]

    def __iter__(self) -> Any:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


class RunResult:
    """The end of a command that ran in the foreground, in a container or in a virtual machine.

    exit_code   the command's own, or 128 + signal
    id, container    the container (gone after --rm; then `container` is its last known state)
    seconds     wall time from the request to the end, as the caller saw it
    timings     name → seconds, where the engine knows more (e.g. `exec_s`: request to first instruction)
    """

    def __init__(
        self,
        exit_code: int,
        *,
        id: str = "",
        container: Any = None,
        seconds: float = 0.0,
        timings: Mapping[str, float] | None = None,
        oom_killed: bool = False,
        note: str = "",
    ) -> None:
        self.exit_code = exit_code
        self.id = id
        self.container = container
        self.seconds = seconds
        self.timings = dict(timings or {})
        self.oom_killed = oom_killed
        self.note = note

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def text(self) -> str:
        return ""  # The terminal ends with the exit status itself; the output is there already.

    def __repr__(self) -> str:
        parts = [f"exit code {self.exit_code}{explain(self.exit_code, oom_killed=self.oom_killed)}"]
        if self.seconds:
            parts.append(f"{self.seconds * 1000:.0f} ms" if self.seconds < 1 else f"{self.seconds:.2f} s")
        if self.note:
            parts.append(self.note)
        return " · ".join(parts)

    @without_formulas
    def _repr_html_(self) -> str:
        mark, colour = ("✓", "#2e7d32") if self.ok else ("✗", "#c62828")
        return f"<span style='color:{colour}'>{mark}</span> {html.escape(repr(self))}"


def explain(exit_code: int, *, oom_killed: bool = False) -> str:
    """What an exit status means, where it has a meaning: ` (SIGKILL, out of memory)`."""
    import signal

    if exit_code in (126, 127):
        return " (not executable)" if exit_code == 126 else " (command not found)"
    if not 128 < exit_code < 128 + 65:
        return ""
    try:
        name = signal.Signals(exit_code - 128).name
    except ValueError:
        return ""
    return f" ({name}, out of memory)" if oom_killed else f" ({name})"


def tabulate(
    items: Sequence[Any],
    view: Callable[[Any], Mapping[str, Any]],
    titles: Mapping[str, str],
    *,
    columns: Sequence[str],
    form: str | None = None,
    quiet: str | None = None,
) -> Listing:
    """A docker listing: `--quiet` (its field), `--format` (table, table TEMPLATE, json, TEMPLATE) or the plain table.

    `view` gives the template fields of one item; `titles` their headings; `columns` the fields of the plain table.
    Callable fields (`.Label "x"`) are for templates only.
    """
    form = form.replace("\\t", "\t").replace("\\n", "\n") if form else form
    views = [view(item) for item in items]
    if quiet and form in (None, "table"):
        ids = [str(fields[quiet]) for fields in views]
        return Listing(ids, text="\n".join(ids))
    if form in (None, "", "table"):
        rows = [[fields[name] for name in columns] for fields in views]
        return Listing(items, header=[titles[name] for name in columns], rows=rows)
    assert form is not None
    if form == "json":
        return Listing(items, text="\n".join(json.dumps(_data(fields), ensure_ascii=False) for fields in views))
    if form.startswith("table "):
        template = form[len("table ") :]
        header = render(template, {**dict.fromkeys(_callables(views), _no_label), **titles}).split("\t")
        rows = [_padded(render(template, fields).split("\t"), len(header)) for fields in views]
        return Listing(items, header=header, rows=rows)
    return Listing(items, text="\n".join(render(form, fields) for fields in views))


def _data(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not callable(value)}


def _callables(views: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name, value in (views[0] if views else {"Label": len}).items() if callable(value)]


def _no_label(name: str) -> str:
    return name


def _padded(cells: list[str], width: int) -> list[str]:
    return (cells + [""] * width)[:width]


def seconds_text(value: float) -> str:
    """A duration for people; below a minute with its fraction."""
    return f"{value:.2f} s" if value < 60 else human_duration(value)
