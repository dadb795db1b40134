"""What has happened in the store, as `docker events` tells it. Source: Docker Engine API, SystemEvents.

Services write a row in the transaction of the deed. What only the supervisor sees lies in its event log and is taken
over here (`merge`) when somebody asks: neither a start nor an end waits for the database.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import InvalidFilter
from .runtime.eventlog import SUFFIX, numbers

if TYPE_CHECKING:
    import sqlite3

    from .store.database import Database
    from .store.layout import Layout

Event = dict[str, Any]
Found = list[Event]
Lines = list[bytes]  # `list` is a method of Events
Row = tuple[str, str, str, dict[str, Any]]  # type, action, actor, attributes

KEPT = 10_000
"""As many events are kept; docker keeps 256."""
_POLL_S = 0.05
_PLACE = "events merged"
_KIND = "\0type"  # no label is called so
_MOUNTS = "\0mounts"
_NETWORK = "\0network"
_TYPES = ("container", "vm", "image", "volume", "network", "daemon", "builder", "plugin")
_FILTERS = ("container", "daemon", "event", "image", "label", "network", "plugin", "scope", "type", "volume")


class Events:
    """The events of one store, oldest first."""

    def __init__(self, layout: Layout, db: Database) -> None:
        self.db = db
        self._folder = f"{layout.root}/events"
        self._merged: tuple[int, int] | None = None

    def list(
        self, since: float | None = None, until: float | None = None, filters: Mapping[str, Any] | None = None
    ) -> Found:
        """The events between two moments (seconds since the epoch) that fit the filters, in the Engine API's shape."""
        test = _test(filters)
        self.merge()
        return [event for _, event in self._rows(since or 0.0, until, 0) if test(event)]

    def stream(
        self,
        since: float | None = None,
        until: float | None = None,
        filters: Mapping[str, Any] | None = None,
        *,
        ended: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Those from `since` (default: now) on, and each new one as it happens, until `until` (default: for ever) or
        until `ended`, which is asked again and again, says so."""
        test = _test(filters)
        start = time.time() if since is None else since
        number, version = 0, None
        while True:
            last_round = until is not None and time.time() >= until
            self.merge()
            if version != (version := self.db.version()):
                for found, event in self._rows(start, until, number):
                    number = max(number, found)
                    if test(event):
                        yield event
            if last_round or ended():
                return
            time.sleep(_POLL_S if until is None else min(_POLL_S, max(0.0, until - time.time())))

    def merge(self) -> None:
        """Take over what the supervisor has written since the last time; costs one directory listing when nothing."""
        there = numbers(self._folder)
        if not there or (self._merged is not None and self._merged == (there[-1], self._size(there[-1]))):
            return
        with self.db.transaction() as tx:
            row = tx.execute("SELECT value FROM settings WHERE key = ?", (_PLACE,)).fetchone()
            number, offset = json.loads(row["value"]) if row else (0, 0)
            known: dict[str, dict[str, Any] | None] = {}
            count = 0
            for each in there:
                if each < number:
                    continue
                start = offset if each == number else 0
                lines, end = self._read(each, start)
                count += sum(_insert(tx, line, known) for line in lines)
                number, offset = each, end
            tx.execute(
                "INSERT INTO settings VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
                "updated_at = excluded.updated_at",
                (_PLACE, json.dumps([number, offset]), time.time()),
            )
            if count:
                tx.execute("DELETE FROM events WHERE number <= (SELECT MAX(number) FROM events) - ?", (KEPT,))
        self._merged = number, offset
        for each in there:
            if each < number:
                self._remove(each)

    def _read(self, number: int, offset: int) -> tuple[Lines, int]:
        """The whole lines from `offset` on, and where they end."""
        try:
            with open(self._path(number), "rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole, newline, _ = data.rpartition(b"\n")
        return whole.split(b"\n") if newline else [], offset + len(whole) + len(newline)

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:08d}{SUFFIX}"

    def _size(self, number: int) -> int:
        try:
            return os.stat(self._path(number)).st_size
        except FileNotFoundError:
            return -1

    def _remove(self, number: int) -> None:
        try:
            os.unlink(self._path(number))
        except FileNotFoundError:
            pass

    def _rows(self, since: float, until: float | None, after: int) -> Iterator[tuple[int, Event]]:
        rows = self.db.query(
            "SELECT number, time_ns, type, action, actor, attributes FROM events"
            " WHERE time_ns >= ? AND time_ns <= ? AND number > ? ORDER BY time_ns, number",
            (int(since * 1e9), int((9e9 if until is None else until) * 1e9), after),
        )
        for row in rows:
            yield row["number"], _event(row)


def _insert(tx: sqlite3.Connection, line: bytes, known: dict[str, dict[str, Any] | None]) -> bool:
    """One line of the supervisor's as a row, with name, image and labels of its container."""
    try:
        moment, action, id, attributes, *kind = json.loads(line)
    except ValueError:
        return False  # a write that a full disk cut short
    whom = attributes.get("container", "") if kind else id
    if whom not in known:
        known[whom] = _about(tx, whom)
    about = known[whom]
    if about is None:
        return False  # a step of a build: not a container anybody knows of
    if kind:
        rows = [(kind[0], action, id, attributes)]
    else:
        own = (about.get(_KIND, "container"), action, id, {**_shown(about), **attributes})
        rows = _with_belongings(tx, own, about)
    tx.executemany(
        "INSERT INTO events (time_ns, type, action, actor, attributes) VALUES (?, ?, ?, ?, ?)",
        [(moment, type, each, actor, json.dumps(told)) for type, each, actor, told in rows],
    )
    return True


def _with_belongings(tx: sqlite3.Connection, own: Row, about: dict[str, Any]) -> list[Row]:
    """A start comes after what the container is joined to, an end before what it leaves: volumes, and the networks
    `none` and `host`, of which the supervisor has nothing to tell."""
    _, action, id, _ = own
    if action not in ("start", "die"):
        return [own]
    begins = action == "start"
    rows: list[Row] = []
    network = about.get(_NETWORK)
    if network and (row := tx.execute("SELECT id FROM networks WHERE name = ?", (network,)).fetchone()) is not None:
        told = {"container": id, "name": network, "type": "null" if network == "none" else network}
        rows.append(("network", "connect" if begins else "disconnect", row["id"], told))
    for volume, destination, writable in about.get(_MOUNTS) or ():
        told = {"container": id, "driver": "local"}
        if begins:
            told |= {"destination": destination, "propagation": "", "read/write": str(writable).lower()}
        rows.append(("volume", "mount" if begins else "unmount", volume, told))
    return [*rows, own] if begins else [own, *rows]


def _shown(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if not name.startswith("\0")}


def _about(tx: sqlite3.Connection, id: str) -> dict[str, Any] | None:
    row = tx.execute("SELECT name, image_ref, settings FROM containers WHERE id = ?", (id,)).fetchone()
    if row is not None:
        return remembered_attributes(row["name"], row["image_ref"], json.loads(row["settings"]))
    # A virtual machine, or gone already: what was said when it was made, or renamed last.
    row = tx.execute(
        "SELECT type, attributes FROM events WHERE actor = ? AND type IN ('container', 'vm')"
        " AND action IN ('create', 'rename') ORDER BY number DESC LIMIT 1",
        (id,),
    ).fetchone()
    if row is None:
        return None
    found: dict[str, Any] = json.loads(row["attributes"])
    found.pop("oldName", None)
    return {**found, _KIND: row["type"]}


def container_attributes(name: str, image: str, labels: Mapping[str, str] | None) -> dict[str, str]:
    """What docker says of a container in each of its events."""
    return {**(labels or {}), "image": image, "name": name}


def remembered_attributes(name: str, image: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The same, and what nobody is shown: what comes and goes with each run of the container. Kept with the events that
    make and rename it, since one that removes itself has no row any more when its start is taken over."""
    found: dict[str, Any] = container_attributes(name, image, record.get("labels"))
    mounts = [
        (each["name"], each["destination"], bool(each["rw"]))
        for each in record.get("mounts") or ()
        if each["type"] == "volume"
    ]
    if mounts:
        found[_MOUNTS] = mounts
    if (network := (record.get("settings") or {}).get("network_mode")) in ("none", "host"):
        found[_NETWORK] = network
    return found


def insert_event(
    tx: sqlite3.Connection, type: str, action: str, actor: str, attributes: Mapping[str, Any] | None = None
) -> None:
    """`Database.add_event` for who is in a transaction already."""
    tx.execute(
        "INSERT INTO events (time_ns, type, action, actor, attributes) VALUES (?, ?, ?, ?, ?)",
        (time.time_ns(), type, action, actor, json.dumps(dict(attributes or {}))),
    )


def _event(row: Any) -> Event:
    attributes = _shown(json.loads(row["attributes"] or "{}"))
    older: Event = {}
    if row["type"] in ("container", "image"):
        older = {"status": row["action"], **({"id": row["actor"]} if row["actor"] else {})}
    if row["type"] == "container" and "image" in attributes:
        older["from"] = attributes["image"]
    return {
        **older,
        "Type": row["type"],
        "Action": row["action"],
        "Actor": {"ID": row["actor"], "Attributes": attributes},
        "scope": "local",
        "time": row["time_ns"] // 1_000_000_000,
        "timeNano": row["time_ns"],
    }


def _test(filters: Mapping[str, Any] | None) -> Callable[[Event], bool]:
    """Docker's filters: values of one name are alternatives, names must all fit. Raises UsageError."""
    wanted = {name: _words(value) for name, value in (filters or {}).items()}
    for name in wanted:
        if name not in _FILTERS:
            raise InvalidFilter(f"invalid filter '{name}'", resolution=f"the filters are {', '.join(_FILTERS)}")
    return lambda event: all(_fits(event, name, words) for name, words in wanted.items())


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, (list, tuple, set, dict)) else [str(value)]


def _fits(event: Event, name: str, words: list[str]) -> bool:
    attributes = event["Actor"]["Attributes"]
    if name == "type":
        return event["Type"] in words
    if name == "event":
        # `exec_start` means `exec_start: sh -c …`, too
        return event["Action"] in words or event["Action"].partition(":")[0] in words
    if name == "scope":
        return event["scope"] in words
    if name == "label":
        pairs = [word.partition("=") for word in words]
        return all(key in attributes and (not equals or attributes[key] == value) for key, equals, value in pairs)
    if name == "image" and event["Type"] != "image":
        given = str(attributes.get("image", ""))
        return any(word in (given, given.partition(":")[0]) for word in words)
    if event["Type"] != name:
        return False
    own, called = str(event["Actor"]["ID"]), str(attributes.get("name", ""))
    return any(own.startswith(word) or word == called or word == called.partition(":")[0] for word in words)
