"""`lab.dashboard()`: containers, virtual machines, images, volumes and networks, live, with docker's verbs as buttons.

A thread of the kernel looks once a second and sends what has changed; the browser (`dashboard.js`) draws it and asks
before it stops, kills or removes. `End` (or `close()`) leaves a plain table that a saved notebook shows anywhere; one
that is saved before has it too, and where no browser shows the board, it is what is left after each cell.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..display import human_age, human_memory, human_size, no_formulas, table_html, table_text
from ..errors import LabkernelError
from .monitor import _SHOWN_BY as SHOWN_BY

if TYPE_CHECKING:
    from ..measuring.samples import Reader

_LOG_LINES = 200
_ERRORS = (LabkernelError, OSError)
# What may be done with which kind of thing, in which state; the browser asks first where it cannot be undone.
VERBS = {
    "containers": ("start", "stop", "kill", "remove", "logs"),
    "vms": ("start", "stop", "kill", "remove", "logs"),
    "images": ("remove",),
    "volumes": ("remove",),
    "networks": ("remove",),
}
TITLES = {
    "containers": ("NAME", "IMAGE", "STATUS", "CPU", "MEMORY", "PORTS"),
    "vms": ("NAME", "IMAGE", "STATUS", "CPU", "MEMORY", "PORTS"),
    "images": ("NAME", "ID", "CREATED", "SIZE"),
    "volumes": ("NAME", "CREATED"),
    "networks": ("NAME", "DRIVER", "SUBNET", "MEMBERS"),
}
_NAMES = {
    "containers": "Containers",
    "vms": "Virtual machines",
    "images": "Images",
    "volumes": "Volumes",
    "networks": "Networks",
}
_PREDEFINED = ("bridge", "host", "none")


class Dashboard:
    """A board of one engine. `snapshot()` is what it shows; `close()` ends it."""

    def __init__(self, engine: Any, *, every_s: float = 1.0) -> None:
        self._engine = engine
        self._every_s = every_s
        self._last: dict[str, tuple[float, int]] = {}
        self._view: Any = None
        self._handles: list[str] = []
        self._stop = threading.Event()
        self._wanted = threading.Event()
        self._seen_by_browser = False
        self._readers: dict[str, Reader] = {}
        self._thread: threading.Thread | None = None
        self._sent: dict[str, Any] | None = None
        self.ended = False

    # -- what it shows

    def snapshot(self) -> dict[str, list[dict[str, Any]]]:
        """Lists of dictionaries by kind: `id`, `cells` (words, as TITLES names them), `can` (verbs), `state`."""
        looks: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "containers": lambda: self._running(self._engine.containers.list(all=True)),
            "vms": lambda: self._running(self._engine.vms.list(all=True)),
            "images": self._images,
            "volumes": self._volumes,
            "networks": self._networks,
        }
        found = {}
        for kind, look in looks.items():
            try:
                found[kind] = look()
            except (*_ERRORS, AttributeError):  # removed while it was looked at: the next look is a second away
                found[kind] = []
        return found

    def _running(self, things: list[Any]) -> list[dict[str, Any]]:
        rows = []
        for thing in things:
            try:
                status = thing.status
                said = thing.status_line() if callable(getattr(thing, "status_line", None)) else status
                ports = getattr(thing, "ports", None)
            except _ERRORS:
                continue
            cpu, memory = self._figures(thing) if status in ("running", "paused") else ("", "")
            can = ("stop", "kill", "logs") if status in ("running", "paused") else ("start", "remove", "logs")
            cells = [thing.name, _image_of(thing), said, cpu, memory, _ports(ports)]
            able = [verb for verb in can if verb == "remove" or callable(getattr(thing, verb, None))]
            rows.append({"id": thing.id, "cells": cells, "can": able, "state": status})
        return rows

    def _figures(self, thing: Any) -> tuple[str, str]:
        # Readers are kept: opening the files of two hundred containers takes longer than reading them a hundred times.
        sample = None
        try:
            if thing.id not in self._readers and (reader := self._engine.metrics.reader(thing)) is not None:
                self._readers[thing.id] = reader
            if thing.id in self._readers:
                sample = self._readers[thing.id].read()
        except _ERRORS:
            pass
        if sample is None:
            self._forget(thing.id)
            return "", ""
        before = self._last.get(thing.id)
        self._last[thing.id] = sample.time_s, sample.cpu_usec
        memory = human_memory(sample.memory_bytes)
        if before is None or sample.time_s <= before[0]:
            return "", memory
        return f"{max(0, sample.cpu_usec - before[1]) / (sample.time_s - before[0]) / 1e4:.0f} %", memory

    def __del__(self) -> None:
        self._forget(*list(self._readers))

    def _forget(self, *ids: str) -> None:
        for id in ids:
            self._last.pop(id, None)
            reader = self._readers.pop(id, None)
            if reader is not None:
                reader.close()

    def _images(self) -> list[dict[str, Any]]:
        rows = []
        for image in self._engine.images.list():
            size, created = human_size(image.size_bytes), _age(image.created)
            for tag in image.tags or ["<none>"]:
                ref = image.id if tag == "<none>" else tag
                cells = [tag, image.id.removeprefix("sha256:")[:12], created, size]
                rows.append({"id": ref, "cells": cells, "can": ["remove"], "state": ""})
        return rows

    def _volumes(self) -> list[dict[str, Any]]:
        return [
            {"id": v.name, "cells": [v.name[:20], _age(v.created_at)], "can": ["remove"], "state": ""}
            for v in self._engine.volumes.list()
        ]

    def _networks(self) -> list[dict[str, Any]]:
        rows = []
        for network in self._engine.networks.list():
            attrs = network.attrs
            subnets = [entry.get("Subnet", "") for entry in (attrs.get("IPAM") or {}).get("Config") or ()]
            members = [str(one.get("Name", "")) for one in (attrs.get("Containers") or {}).values()]
            can = [] if network.name in _PREDEFINED else ["remove"]
            cells = [network.name, str(attrs.get("Driver", "")), ", ".join(subnets), ", ".join(members)]
            rows.append({"id": network.id, "cells": cells, "can": can, "state": ""})
        return rows

    # -- acting

    def act(self, kind: str, id: str, verb: str) -> str:
        """Do what a button says; returns the text to show (of logs). Raises what the service raises."""
        if verb not in VERBS.get(kind, ()):
            raise LabkernelError(f"no such action: {kind} {verb}")
        engine = self._engine
        if kind == "images":
            engine.images.remove(id)
            return ""
        thing = getattr(engine, kind).get(id)
        if verb == "logs":
            options = {"tail": _LOG_LINES} if kind == "containers" else {}
            return str(thing.logs(**options).decode(errors="replace"))
        if verb == "remove" and not callable(getattr(thing, "remove", None)):
            engine.vms.remove(thing)
        else:
            getattr(thing, verb)()
        return ""

    def _message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == "hello":
            self._seen_by_browser = True
            self._sent = None
            self._wanted.set()
        elif kind == "end":
            self._stop.set()
            self._wanted.set()
        elif kind == "act":
            arguments = str(content.get("of")), str(content.get("id")), str(content.get("verb"))
            threading.Thread(target=self._answer, args=arguments, name="labkernel-act", daemon=True).start()

    def _answer(self, kind: str, id: str, verb: str) -> None:
        try:
            text = self.act(kind, id, verb)
        except Exception as err:  # whatever it is, the user who pressed the button should read it
            self._send({"kind": "note", "text": f"{verb}: {getattr(err, 'brief', None) or err}", "of": id})
        else:
            if verb == "logs":
                self._send({"kind": "logs", "of": id, "text": text or "(nothing was written)"})
        self._wanted.set()

    def _send(self, message: dict[str, Any]) -> None:
        if self._view is not None:
            with contextlib.suppress(Exception):  # the page is gone, or the kernel is ending
                self._view.send(message)

    # -- life

    def start(self) -> Dashboard:
        """Begin to look; showing the board does this."""
        if self._thread is None and not self.ended:
            context = contextvars.copy_context()  # what a thread displays goes to the cell of this context
            thread = threading.Thread(target=context.run, args=(self._run,), name="labkernel-dashboard", daemon=True)
            self._thread = thread
            thread.start()
        return self

    def close(self) -> None:
        """End it and leave the plain table."""
        self._stop.set()
        self._wanted.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.look()
            self._wanted.wait(self._every_s)
            self._wanted.clear()
        self.ended = True
        self._send({"kind": "board", "board": self.snapshot(), "state": "ended"})
        self._forget(*list(self._readers))
        self._leave_table()

    def look(self) -> None:
        """One look; sends the browser what is not as it was."""
        board: dict[str, Any] = self.snapshot()
        changed = board if self._sent is None else {k: rows for k, rows in board.items() if rows != self._sent.get(k)}
        self._sent = board
        running = {row["id"] for kind in ("containers", "vms") for row in board[kind] if row["cells"][4]}
        self._forget(*(self._readers.keys() - running))
        self._send({"kind": "board", "board": changed, "state": "live"})

    # -- showing

    def _bundle(self) -> dict[str, Any]:
        if self._view is None:
            from .view import DashboardView, answer_while_busy

            titles = {kind: list(titles) for kind, titles in TITLES.items()}
            self._view = DashboardView(titles=titles, key=secrets.token_hex(8))
            self._view.on_msg(self._message)
            answer_while_busy(self._view)
        bundle = self._view._repr_mimebundle_()
        return dict(bundle[0] if isinstance(bundle, tuple) else bundle)

    def _plain(self) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": no_formulas(self.html())}

    def _ipython_display_(self) -> None:
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        shell = get_ipython()
        if shell is None or not hasattr(shell, "kernel") or self.ended:
            display(self._plain(), raw=True)  # type: ignore[no-untyped-call]
            return
        from .view import live

        handle = f"labkernel-dashboard-{id(self):x}-{len(self._handles)}"
        self._handles.append(handle)
        data = {**self._bundle(), "text/plain": repr(self)}
        display(data, metadata=live(self._view.key), raw=True, display_id=handle)  # type: ignore[no-untyped-call]
        self.start()
        if not any(name in os.environ for name in SHOWN_BY):
            shell.events.register("post_run_cell", self._after_cell)

    def _after_cell(self, _result: Any = None) -> None:
        if not self.ended and not self._seen_by_browser:
            self._leave_table()

    def _leave_table(self) -> None:
        from IPython.display import update_display

        data = self._plain()
        for handle in self._handles:
            with contextlib.suppress(Exception):  # the kernel is shutting down
                update_display(data, raw=True, display_id=handle)  # type: ignore[no-untyped-call]

    def html(self) -> str:
        """The board as plain tables."""
        return _tables(self.snapshot(), lambda title, header, rows: table_html(header, rows, caption=title))

    def __repr__(self) -> str:
        return _tables(self.snapshot(), lambda title, header, rows: f"{title}\n{table_text(header, rows)}\n")


def _tables(board: dict[str, list[dict[str, Any]]], word: Callable[[str, Any, Any], str]) -> str:
    parts = []
    for kind, rows in board.items():
        if rows:
            parts.append(word(f"{_NAMES[kind]} ({len(rows)})", TITLES[kind], [row["cells"] for row in rows]))
    return "\n".join(parts) or "nothing here yet"


def _image_of(thing: Any) -> str:
    found = getattr(thing, "image_ref", None) or getattr(thing, "image", "")
    return str(found)


def _age(created: Any) -> str:
    if isinstance(created, int | float):
        return human_age(float(created))
    import datetime

    try:
        return human_age(datetime.datetime.fromisoformat(str(created)[:19] + "+00:00").timestamp())
    except ValueError:
        return ""


def _ports(ports: Any) -> str:
    if not isinstance(ports, dict):
        return ""
    return ", ".join(f"{place.get('HostPort')}→{inside}" for inside, places in ports.items() for place in places or ())


def dashboard(engine: Any, *, every_s: float = 1.0) -> Dashboard:
    """The board of an engine; shows itself as the value of a cell."""
    return Dashboard(engine, every_s=every_s)
