from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from labkernel.errors import StoreError
from labkernel.store import database as module
from labkernel.store.database import MIGRATIONS, Database

spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "labkernel.db")


def test_a_new_database_is_private_sound_and_in_wal_mode(db: Database) -> None:
    assert db.check() == []
    assert db.query("PRAGMA journal_mode")[0][0] == "wal"
    assert db.query("PRAGMA user_version")[0][0] == len(MIGRATIONS)
    assert db.path.stat().st_mode & 0o077 == 0


def test_on_a_network_file_system_it_keeps_a_rollback_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_shared_file_system", lambda path: "nfs")
    found = Database(tmp_path / "labkernel.db")
    assert found.query("PRAGMA journal_mode")[0][0] == "delete"
    assert found.query("PRAGMA synchronous")[0][0] == 2


def test_settings_are_remembered_for_a_while(db: Database) -> None:
    assert db.setting("k", "default") == "default"
    db.remember("k", {"a": [1, None]})
    assert db.setting("k") == {"a": [1, None]}
    with db.transaction() as tx:
        tx.execute("UPDATE settings SET updated_at = updated_at - 100")
    assert db.setting("k", "old", max_age_s=99) == "old"
    assert db.setting("k", "old", max_age_s=101) != "old"


def test_a_failed_block_changes_nothing(db: Database) -> None:
    def fail_half_way() -> None:
        with db.transaction() as tx:
            tx.execute("INSERT INTO settings VALUES ('k', '1', 0)")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert db.setting("k") is None
    db.remember("k", 2)


def test_the_version_tells_of_every_change(db: Database) -> None:
    other = Database(db.path)
    seen = [db.version()]
    assert db.version() == seen[0]
    db.remember("k", 1)
    seen.append(db.version())
    other.remember("k", 2)
    seen.append(db.version())
    assert len(set(seen)) == 3


def test_a_newer_schema_is_refused(db: Database) -> None:
    with db.transaction() as tx:
        tx.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreError, match="newer labkernel"):
        Database(db.path)


def test_an_older_schema_is_brought_forward(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.remember("k", 1)
    monkeypatch.setattr(module, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE extra (x TEXT) STRICT;"))
    forward = Database(db.path)
    assert forward.query("SELECT * FROM extra") == []
    assert forward.setting("k") == 1


def test_rubbish_is_a_store_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "labkernel.db").write_bytes(b"rubbish" * 1000)
    with pytest.raises(StoreError, match="damaged") as caught:
        Database(tmp_path / "labkernel.db")
    assert "LABKERNEL_ROOT" in (caught.value.resolution or "")


def test_a_broken_constraint_is_left_to_the_caller(db: Database) -> None:
    with pytest.raises(sqlite3.IntegrityError), db.transaction() as tx:
        tx.execute("INSERT INTO tags VALUES ('n', 'no such image', 0)")


def test_a_closed_database_says_so(db: Database) -> None:
    db.close()
    with pytest.raises(StoreError, match="closed"):
        db.query("SELECT 1")


def add_rows(path: str, seed: int) -> None:
    found = Database(Path(path))
    for number in range(50):
        found.remember(f"{seed}/{number}", number)
        found.query("SELECT count(*) FROM settings")


def test_many_processes_create_and_write_one_database(tmp_path: Path) -> None:
    path = tmp_path / "labkernel.db"
    work = [spawn.Process(target=add_rows, args=(str(path), seed)) for seed in range(6)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert [process.exitcode for process in work] == [0] * 6
    assert Database(path).query("SELECT count(*) FROM settings")[0][0] == 300


def test_threads_share_one_connection(db: Database) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(50):
                db.remember(f"{seed}/{number}", number)
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert db.query("SELECT count(*) FROM settings")[0][0] == 200


def test_a_fork_gets_a_connection_of_its_own(db: Database) -> None:
    db.remember("parent", 1)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            db.remember("child", db.setting("parent") + 1)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    db.remember("parent", 3)
    assert (db.setting("child"), db.check()) == (2, [])


FILL = """
import os, sys
from pathlib import Path
from labkernel.errors import DiskFull
from labkernel.store.database import Database
folder = Path(sys.argv[1])
def fill():
    with open(folder / "fill", "ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            pass
Database(folder / "labkernel.db").close()
fill()
db = Database(folder / "labkernel.db")
db.remember("key", "written")
db.close()
fill()
try:
    Database(folder / "labkernel.db")
except DiskFull as err:
    print(err.brief.rpartition(": ")[2])
os.unlink(folder / "fill")
db = Database(folder / "labkernel.db")
print(db.setting("key"), db.check(), (folder / "reserve").stat().st_blocks * 512)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root to mount a small tmpfs")
def test_a_full_disk_leaves_room_for_what_makes_room(tmp_path: Path) -> None:
    """The log's index is made by who opens the database; without space put aside nothing could be listed or removed."""
    script = f'mount -t tmpfs -o size=4m t "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, FILL], capture_output=True, text=True, check=False)
    if "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == f"no space left on device\nwritten [] {1 << 19}\n", done.stderr
