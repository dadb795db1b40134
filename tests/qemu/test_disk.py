"""Disks made from layers: content, owners, sparseness, and what is said when it cannot be done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import VMError
from labkernel.qemu import disk


def debugfs(image: Path, request: str) -> str:
    program = shutil.which("debugfs", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if program is None:
        pytest.skip("no debugfs to look with")
    return subprocess.run([program, "-R", request, str(image)], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    if shutil.which("mke2fs", path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
        pytest.skip("mke2fs is missing")
    root = tmp_path / "layer"
    (root / "a dir").mkdir(parents=True)
    (root / "a dir/file").write_text("content\n")
    return root


def test_files_arrive_and_the_file_is_sparse(layer: Path, tmp_path: Path) -> None:
    out = tmp_path / "disk.img"
    made = disk.make_disk(lowers=[str(layer)], out=str(out))
    assert debugfs(out, 'cat "/a dir/file"') == "content\n"
    assert out.stat().st_size == disk.SIZE_BYTES
    assert made["size_bytes"] < 4 << 20
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "layer"]


def test_a_recorded_owner_becomes_the_owner(layer: Path, tmp_path: Path) -> None:
    try:
        os.setxattr(layer / "a dir/file", "user.labkernel.owner", b"100070:33")
    except OSError as err:
        pytest.skip(f"no user xattrs below {tmp_path}: {err}")
    out = tmp_path / "disk.img"
    made = disk.make_disk(lowers=[str(layer)], out=str(out), owner_xattr="user.labkernel.owner")
    text = debugfs(out, 'stat "/a dir/file"')
    assert made["warnings"] == []
    assert "100070" in text
    assert "33" in text
    assert "labkernel" not in text


WITHOUT_PRIVILEGES = """
import os
from labkernel.qemu import disk
os.makedirs("layer/closed/in")
for name, mode in (("layer/closed/in/file", 0o644), ("layer/shadow", 0), ("layer/odd\\"name", 0)):
    open(name, "w").write("kept")
    os.chmod(name, mode)
os.chmod("layer/closed/in", 0o1300)
os.chmod("layer/closed", 0)
made = disk.make_disk(lowers=["layer"], out="disk.img", owner_xattr="user.labkernel.owner")
print(made["warnings"])
"""


def test_without_privileges_modes_and_owners_are_right(layer: Path, plain_user: Any) -> None:
    """mke2fs reads only what is open to its user, and takes that user for the owner."""
    done = plain_user.python("-c", WITHOUT_PRIVILEGES)
    assert done.stdout == (
        "['1 files with a quote or a line break in their names have other owners in the machine']\n"
    ), done.stderr
    out = plain_user.home / "disk.img"
    for path, mode in (("/closed", "0000"), ("/closed/in", "01300"), ("/closed/in/file", "0644"), ("/shadow", "0000")):
        said = debugfs(out, f"stat {path}")
        assert f"Mode:  {mode} " in said, said
        assert re.search(r"User: +0 +Group: +0 ", said), said
    assert debugfs(out, "cat /shadow") + debugfs(out, "cat /closed/in/file") == "keptkept"


def test_without_mke2fs_the_remedy_is_named(layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SEARCH", str(tmp_path))
    with pytest.raises(VMError, match="mke2fs is missing") as caught:
        disk.make_disk(lowers=[str(layer)], out=str(tmp_path / "disk.img"))
    assert "e2fsprogs" in (caught.value.resolution or "")


def test_what_does_not_fit_leaves_nothing(layer: Path, tmp_path: Path) -> None:
    (layer / "big").write_bytes(os.urandom(4 << 20))
    with pytest.raises(Exception, match="no space left"):
        disk.make_disk(lowers=[str(layer)], out=str(tmp_path / "disk.img"), size_bytes=2 << 20)
    assert os.listdir(tmp_path) == ["layer"]


def test_what_a_killed_task_left_is_used_and_removed(layer: Path, tmp_path: Path) -> None:
    # Killed at its worst moment: a half-written file, and the directory on which the layers were merged.
    (tmp_path / "disk.img.partial").write_bytes(b"half" * 1000)
    (tmp_path / "disk.img.merged").mkdir()
    below = tmp_path / "below"
    below.mkdir()
    (below / "lower").write_text("from below\n")
    out = tmp_path / "disk.img"
    call = f"lowers=[{str(layer)!r}, {str(below)!r}], out={str(out)!r}"
    line = f"from labkernel.qemu import disk; disk.make_disk({call})"
    if os.geteuid() != 0:
        pytest.skip("merging layers needs a mount namespace of root")
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert debugfs(out, "cat /lower") == "from below\n"
    assert sorted(os.listdir(tmp_path)) == ["below", "disk.img", "layer"]
