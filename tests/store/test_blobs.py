from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.errors import CorruptBlob, NotFoundError, StoreError
from labkernel.store.blobs import Blobs, sweep_temporary, temporary_directory
from labkernel.store.layout import Layout

HELLO = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.find(tmp_path / "root", tmp_path / "run")


@pytest.fixture
def blobs(layout: Layout) -> Blobs:
    return Blobs(layout)


def test_a_blob_is_named_by_its_digest(blobs: Blobs) -> None:
    assert blobs.put(b"hello") == (HELLO, 5)
    assert blobs.put(io.BytesIO(b"hello"), HELLO) == (HELLO, 5)
    assert blobs.read(HELLO) == b"hello"
    assert (blobs.has(HELLO), blobs.size(HELLO), list(blobs)) == (True, 5, [HELLO])
    assert os.listdir(blobs.layout.tmp) == []


def test_other_bytes_than_promised_leave_nothing(blobs: Blobs) -> None:
    with pytest.raises(CorruptBlob, match="are not those of"):
        blobs.put(b"hallo", HELLO)
    with pytest.raises(CorruptBlob, match="should have 6 bytes"):
        blobs.put(b"hello", size_bytes=6)
    assert (list(blobs), os.listdir(blobs.layout.tmp)) == ([], [])


def test_a_writer_that_fails_leaves_nothing(blobs: Blobs) -> None:
    def write_half() -> None:
        with blobs.writer() as out:
            out.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (list(blobs), os.listdir(blobs.layout.tmp)) == ([], [])


def test_rot_is_found_when_reading_and_verifying(blobs: Blobs) -> None:
    blobs.put(b"hello")
    path = blobs.path(HELLO)
    path.chmod(0o600)
    path.write_bytes(b"hellO")
    with pytest.raises(CorruptBlob, match="is corrupt"):
        blobs.read(HELLO)
    with pytest.raises(CorruptBlob):
        blobs.verify(HELLO)


def test_a_missing_blob_says_so(blobs: Blobs) -> None:
    for act in (blobs.read, blobs.open, blobs.size, blobs.verify):
        with pytest.raises(NotFoundError, match="No such blob"):
            act(HELLO)
    assert blobs.remove(HELLO) == 0


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, "x", ""])
def test_a_digest_is_no_path(blobs: Blobs, digest: str) -> None:
    with pytest.raises(StoreError, match="not a digest"):
        blobs.has(digest)


def test_a_limit_bounds_what_is_read(blobs: Blobs) -> None:
    blobs.put(b"hello")
    with pytest.raises(StoreError, match="larger than the 4 bytes"):
        blobs.read(HELLO, limit=4)


def test_a_finished_file_can_be_adopted(blobs: Blobs) -> None:
    source = blobs.layout.tmp / "made"
    source.write_bytes(b"hello")
    assert blobs.adopt(source, HELLO) == (HELLO, 5)
    source.write_bytes(b"other")
    with pytest.raises(CorruptBlob):
        blobs.adopt(source, "sha256:" + "0" * 64)
    assert os.listdir(blobs.layout.tmp) == []


DIE_WRITING = """
import os, sys
from labkernel.store.layout import Layout
from labkernel.store.blobs import Blobs, temporary_directory
layout = Layout.find(sys.argv[1], sys.argv[2])
with temporary_directory(layout, "tree") as work, Blobs(layout).writer() as out:
    (work / "file").write_text("x")
    out.write(b"half a blob")
    os._exit(9)
"""


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_writes_is_not(blobs: Blobs, layout: Layout) -> None:
    subprocess.run([sys.executable, "-c", DIE_WRITING, layout.root, layout.runtime_dir], check=False)
    assert len(os.listdir(layout.tmp)) == 2
    with blobs.writer() as out, temporary_directory(layout, "mine") as work:
        out.write(b"hello")
        assert sweep_temporary(layout) == []
        assert sorted(os.listdir(layout.tmp)) == sorted([out.path.name, work.name])
    assert out.blob == (HELLO, 5)
    assert os.listdir(layout.tmp) == []


def write_many(root: str, run: str, seed: int) -> None:
    layout = Layout.find(root, run)
    blobs = Blobs(layout)
    for number in range(40):
        # Half of them are the same in all processes.
        blobs.put(f"blob {number} {seed if number % 2 else ''}".encode() * 500)
        if number % 10 == 0:
            sweep_temporary(layout)


def test_many_processes_write_and_sweep_at_once(blobs: Blobs, layout: Layout) -> None:
    spawn = multiprocessing.get_context("spawn")
    work = [spawn.Process(target=write_many, args=(str(layout.root), str(layout.runtime_dir), n)) for n in range(5)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert [process.exitcode for process in work] == [0] * 5
    found = list(blobs)
    assert len(found) == 20 + 5 * 20
    for digest in found:
        assert digest == "sha256:" + hashlib.sha256(blobs.path(digest).read_bytes()).hexdigest()
    assert os.listdir(layout.tmp) == []


FILL = """
import os, sys
from labkernel.errors import DiskFull
from labkernel.store.layout import Layout
from labkernel.store.blobs import Blobs
layout = Layout.find(sys.argv[1] + "/root", sys.argv[1] + "/run")
try:
    Blobs(layout).put(os.urandom(4 << 20))
except DiskFull as err:
    print(err.brief, os.listdir(layout.tmp), list(Blobs(layout)))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=1m t "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, FILL], capture_output=True, text=True, check=False)
    if "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "writing a blob: no space left on device [] []\n", done.stderr
