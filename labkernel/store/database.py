"""The one SQLite file with the store's metadata: names, tags, settings, cache keys, events. Never bytes of content.

Write-ahead log on local disks; on network file systems the rollback journal, since the log's index is shared memory
(sqlite.org/wal.html, "must be on the same host computer"). Several processes and threads use it at once: writing
transactions are short and take the write lock at their start, so they wait for each other rather than fail half-way.
The schema grows by numbered migrations (`PRAGMA user_version`); an older labkernel refuses a newer database.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkernel.errors import DISK_FULL_HINT, DiskFull, LabkernelError, StoreError

from .layout import find_shared_file_system
from .locks import Locks

BUSY_TIMEOUT_S = 30.0
_RESERVE = "reserve"
_RESERVE_BYTES = 1 << 19

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE images (
        id TEXT PRIMARY KEY,                -- digest of the config blob
        manifest TEXT NOT NULL,             -- digest of the manifest blob
        created_at REAL NOT NULL,           -- seconds since the epoch, from the config
        stored_at REAL NOT NULL,
        provenance TEXT NOT NULL,           -- JSON: where the image comes from
        deleted_at REAL                     -- removed by force while a container still needs its layers
    ) STRICT;
    CREATE TABLE image_layers (
        image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE,
        position INTEGER NOT NULL,          -- 0 is the bottom
        diff_id TEXT NOT NULL,
        digest TEXT NOT NULL,
        media_type TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,        -- of the blob
        PRIMARY KEY (image_id, position)
    ) STRICT;
    CREATE INDEX image_layers_by_diff_id ON image_layers(diff_id);
    CREATE TABLE tags (
        name TEXT PRIMARY KEY,              -- docker.io/library/busybox:latest
        image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE,
        updated_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX tags_by_image ON tags(image_id);
    CREATE TABLE repo_digests (
        name TEXT PRIMARY KEY,              -- docker.io/library/busybox@sha256:...
        image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE
    ) STRICT;
    CREATE TABLE layers (                   -- layers that are unpacked
        diff_id TEXT PRIMARY KEY,
        size_bytes INTEGER NOT NULL,        -- of the files in it
        unpacked_at REAL NOT NULL,
        warnings TEXT NOT NULL DEFAULT '[]'
    ) STRICT;
    CREATE TABLE containers (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        image_id TEXT NOT NULL,
        image_ref TEXT NOT NULL,
        created_at REAL NOT NULL,
        settings TEXT NOT NULL
    ) STRICT;
    CREATE INDEX containers_by_image ON containers(image_id);
    CREATE TABLE build_cache (
        key TEXT PRIMARY KEY,
        image_id TEXT,                      -- an image made from this step, where there is one
        diff_id TEXT,                       -- the layer the step made, NULL for a step that changed the config only
        digest TEXT,
        media_type TEXT,
        layer_bytes INTEGER NOT NULL DEFAULT 0,
        config TEXT NOT NULL,               -- JSON: the image config after the step
        created_at REAL NOT NULL,
        used_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE volumes (
        name TEXT PRIMARY KEY,
        created_at REAL NOT NULL,
        labels TEXT NOT NULL DEFAULT '{}',
        options TEXT NOT NULL DEFAULT '{}'
    ) STRICT;
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        time_ns INTEGER NOT NULL,
        type TEXT NOT NULL,
        action TEXT NOT NULL,
        actor TEXT NOT NULL,
        attributes TEXT NOT NULL DEFAULT '{}'
    ) STRICT;
    CREATE TABLE settings (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL,                -- JSON
        updated_at REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE networks (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        driver TEXT NOT NULL,               -- bridge, host or null
        bridge TEXT UNIQUE,                 -- the interface of the machine, NULL until there is one
        subnet TEXT,                        -- 10.5.0.0/24, NULL until a container needs one
        gateway TEXT,
        ip_range TEXT,
        asked INTEGER NOT NULL DEFAULT 0,   -- the subnet was given, not chosen
        internal INTEGER NOT NULL DEFAULT 0,
        options TEXT NOT NULL DEFAULT '{}',
        labels TEXT NOT NULL DEFAULT '{}'
    ) STRICT;
    CREATE TABLE endpoints (                -- a network may go before a stopped container of it does
        network_id TEXT NOT NULL,
        container_id TEXT NOT NULL REFERENCES containers(id) ON DELETE CASCADE,
        endpoint_id TEXT NOT NULL,
        address TEXT NOT NULL,
        mac TEXT NOT NULL,
        aliases TEXT NOT NULL DEFAULT '[]',
        position INTEGER NOT NULL,          -- 0 is eth0
        PRIMARY KEY (network_id, container_id),
        UNIQUE (network_id, address)
    ) STRICT;
    CREATE INDEX endpoints_by_container ON endpoints(container_id);
    INSERT INTO networks (id, name, created_at, driver) VALUES
        (lower(hex(randomblob(32))), 'bridge', unixepoch(), 'bridge'),
        (lower(hex(randomblob(32))), 'host', unixepoch(), 'host'),
        (lower(hex(randomblob(32))), 'none', unixepoch(), 'null');
    """,
    """
    CREATE TABLE vms (                      -- virtual machines: as containers
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        image_id TEXT NOT NULL,
        image_ref TEXT NOT NULL,
        created_at REAL NOT NULL,
        settings TEXT NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE members (                  -- endpoints of containers and of machines; `container_id` is either's
        network_id TEXT NOT NULL,
        container_id TEXT NOT NULL,
        endpoint_id TEXT NOT NULL,
        address TEXT NOT NULL,
        mac TEXT NOT NULL,
        aliases TEXT NOT NULL DEFAULT '[]',
        position INTEGER NOT NULL,          -- 0 is eth0
        PRIMARY KEY (network_id, container_id),
        UNIQUE (network_id, address)
    ) STRICT;
    INSERT INTO members SELECT * FROM endpoints;
    DROP TABLE endpoints;
    ALTER TABLE members RENAME TO endpoints;
    CREATE INDEX endpoints_by_container ON endpoints(container_id);
    CREATE TRIGGER container_leaves AFTER DELETE ON containers
        BEGIN DELETE FROM endpoints WHERE container_id = old.id; END;
    CREATE TRIGGER machine_leaves AFTER DELETE ON vms
        BEGIN DELETE FROM endpoints WHERE container_id = old.id; END;
    """,
    """
    CREATE INDEX build_cache_by_place ON build_cache(json_extract(config, '$.place'));
    """,
    """
    ALTER TABLE endpoints ADD COLUMN links TEXT NOT NULL DEFAULT '[]';      -- ["CONTAINER:NAME" …]
    """,
)
"""Migration N brings `user_version` from N to N + 1. Only ever append."""

Parameters = Sequence[Any] | Mapping[str, Any]


class Database:
    """One store's database. One connection per object, guarded by a lock, reopened after a fork.

        with db.transaction() as tx:
            tx.execute("INSERT INTO tags VALUES (?, ?, ?)", …)
        rows = db.query("SELECT name FROM tags WHERE image_id = ?", (id,))

    Rows are `sqlite3.Row`: by index and by column name. SQLite's errors arrive as StoreError (DiskFull, busy, damaged,
    read-only) except IntegrityError, which callers turn into their own words.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._writes = 0
        self._pid = os.getpid()
        self._forked: list[sqlite3.Connection] = []
        with translated(path):
            self._connection: sqlite3.Connection | None = self._open()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction: committed when the block ends well, else rolled back. They do not nest."""
        with self._lock, translated(self.path):
            connection = self._current()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as err:
                # SQLite has rolled back by itself after some errors (a full disk, for one).
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(err, sqlite3.Error) and _says_full(self.path, err):
                    self._release()  # for the next one, which may be what makes room
                raise
            self._writes += 1

    def query(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        """All rows of a reading statement."""
        with self._lock, translated(self.path):
            return self._current().execute(sql, parameters).fetchall()

    def find(self, sql: str, parameters: Parameters = ()) -> sqlite3.Row | None:
        """The first row of a reading statement, None when there is none."""
        with self._lock, translated(self.path):
            row: sqlite3.Row | None = self._current().execute(sql, parameters).fetchone()
            return row

    def version(self) -> tuple[int, int]:
        """Changes whenever the database may have: by another connection (`PRAGMA data_version`) or by this one.

        Costs a few microseconds; what was read at one version is still true while it stays the same.
        """
        with self._lock, translated(self.path):
            return self._current().execute("PRAGMA data_version").fetchone()[0], self._writes

    def setting(self, key: str, default: Any = None, *, max_age_s: float | None = None) -> Any:
        """A remembered value (anything JSON), or `default` when there is none or it is older than `max_age_s`."""
        row = self.find("SELECT value, updated_at FROM settings WHERE key = ?", (key,))
        if row is None or (max_age_s is not None and not 0 <= time.time() - row["updated_at"] <= max_age_s):
            return default
        return json.loads(row["value"])

    def remember(self, key: str, value: Any) -> None:
        """Keep `value` (anything JSON) as setting `key`."""
        with self.transaction() as tx:
            tx.execute(
                "INSERT INTO settings VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
                "updated_at = excluded.updated_at",
                (key, json.dumps(value), time.time()),
            )

    def add_event(self, type: str, action: str, actor: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Record that `action` happened to the object `actor` of a `type` (docker's words: image, container, …)."""
        with self.transaction() as tx:
            tx.execute(
                "INSERT INTO events (time_ns, type, action, actor, attributes) VALUES (?, ?, ?, ?, ?)",
                (time.time_ns(), type, action, actor, json.dumps(dict(attributes or {}))),
            )

    def check(self) -> list[str]:
        """What SQLite's own integrity checks find wrong; empty when the file is sound."""
        problems = [str(row[0]) for row in self.query("PRAGMA integrity_check") if row[0] != "ok"]
        problems += [f"dangling reference in {row[0]}" for row in self.query("PRAGMA foreign_key_check")]
        return problems

    def close(self) -> None:
        """Close the connection; the object can't be used afterwards."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _current(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError("the store's database is closed", resolution="connect again: labkernel.connect()")
        if self._pid != os.getpid():
            # SQLite connections must not cross a fork (sqlite.org/howtocorrupt.html). The old one is kept unused:
            # closing it here could checkpoint a log that the parent is writing.
            self._forked.append(self._connection)
            self._pid = os.getpid()
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = self._connect()
        except sqlite3.OperationalError as err:
            if not _says_full(self.path, err) or not self._release():
                raise
            return self._connect()
        if find_shared_file_system(self.path.parent) is None:
            self._put_aside()
        return connection

    def _put_aside(self) -> None:
        """Have a file whose only use is its space: the log's index is made by who opens the database, and on a full
        disk nothing could be stopped, listed or removed."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            fd = os.open(self.path.parent / _RESERVE, flags, 0o600)
        except OSError:
            return  # there already, or a store this user only reads
        try:
            os.posix_fallocate(fd, 0, _RESERVE_BYTES)
        except OSError:
            self._release()  # as good as full: what is left is for the next command
        finally:
            os.close(fd)

    def _release(self) -> bool:
        """Give the space put aside back; whether there was any."""
        try:
            os.unlink(self.path.parent / _RESERVE)
        except OSError:
            return False
        return True

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()  # else the log and its index stay as long as somebody holds the error
            raise
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self.path} was made by a newer labkernel (schema {version}, this one knows {len(MIGRATIONS)})",
                resolution="upgrade labkernel, or set LABKERNEL_ROOT to another directory",
            )
        shared = find_shared_file_system(self.path.parent)
        if version < len(MIGRATIONS):
            self._prepare(connection, shared=shared is not None)
        # In WAL mode NORMAL can lose the last transactions at a power cut but never the database.
        connection.execute(f"PRAGMA synchronous = {'FULL' if shared else 'NORMAL'}")

    def _prepare(self, connection: sqlite3.Connection, *, shared: bool) -> None:
        # The change of journal mode ignores the busy time-out, so openers of a new store take turns by a file lock.
        locks = Locks(self.path.parent / "locks")
        locks.directory.mkdir(exist_ok=True)
        with locks.exclusive("database"):
            os.chmod(self.path, 0o600)
            connection.execute(f"PRAGMA journal_mode = {'DELETE' if shared else 'WAL'}")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            for number in range(version, len(MIGRATIONS)):
                connection.executescript(
                    f"BEGIN IMMEDIATE;\n{MIGRATIONS[number]}\nPRAGMA user_version = {number + 1};\nCOMMIT;"
                )


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as the house's own, at the border of this room. Our errors and IntegrityError pass unchanged."""
    try:
        yield
    except (LabkernelError, sqlite3.IntegrityError):
        raise
    except sqlite3.Error as err:
        raise _store_error(path, err) from err


def _says_full(path: Path, err: sqlite3.Error) -> bool:
    """Whether there is no space left. For the log's index SQLite calls that an I/O error."""
    name = getattr(err, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_IOERR"):
        try:
            found = os.statvfs(path.parent)
        except OSError:
            return False
        return found.f_bavail * found.f_frsize < 1 << 16
    return name.startswith("SQLITE_FULL")


def _store_error(path: Path, err: sqlite3.Error) -> StoreError:
    name = getattr(err, "sqlite_errorname", "") or ""
    if _says_full(path, err):
        return DiskFull(f"{path}: no space left on device", resolution=DISK_FULL_HINT)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(
            f"{path} has been locked by another process for {BUSY_TIMEOUT_S:g} s", resolution="try again a little later"
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StoreError(
            f"{path} is damaged: {err}",
            resolution="set LABKERNEL_ROOT to a new directory, or move this one away; images can be built again",
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return StoreError(
            f"{path} cannot be written: {err}", resolution="check who owns it, or set LABKERNEL_ROOT to another place"
        )
    return StoreError(f"{path}: {err}")
