"""Removing trees: of any depth, whatever the modes, never through a link."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.linux.trees import remove_tree


def dig(base: Path, depth: int) -> None:
    """Directories within each other, with a file in each."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("a", 0o500, dir_fd=fd)
        deeper = os.open("a", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
        fd = deeper
    os.close(fd)


def test_deeper_than_a_path_is_long_and_than_python_calls_itself(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".moved-1").mkdir()
    if os.geteuid() == 0:
        dig(tree, 6000)
    else:
        os.makedirs(tree / "/".join("a" * 900))
    remove_tree(str(tree))
    assert os.listdir(tmp_path) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "dangling").symlink_to("nowhere")
    os.mkfifo(tree / "pipe")
    remove_tree(str(tree))
    remove_tree(str(tree))
    (tmp_path / "only").symlink_to(outside)
    remove_tree(str(tmp_path / "only"))
    assert os.listdir(tmp_path) == ["outside"]
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root to be made")
def test_what_cannot_go_is_said_and_the_rest_goes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("closed", "others", "open"):
        (tree / name).mkdir(parents=True)
        (tree / name / "f").write_text("x")
    for path in (tree, tree / "open", tree / "closed"):
        os.chown(path, 23456, 23456)
    (tree / "closed").chmod(0)
    tmp_path.chmod(0o711)
    for above in tmp_path.parents[:2]:
        above.chmod(above.stat().st_mode | 0o011)
    code = (
        "import os, sys\n"
        "from labkernel.linux.trees import remove_tree\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setgroups([]); os.setgid(23456); os.setuid(23456)\n"
        "try:\n"
        "    remove_tree('tree', dir_fd=fd)\n"
        "except PermissionError as err:\n"
        "    print(os.fsdecode(err.filename))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "f\n"), done.stderr
    assert os.listdir(tree) == ["others"]


def test_a_wide_directory(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5000):
        (tree / f"{number}").write_text("")
        if number % 50 == 0:
            (tree / f"d{number}" / "e").mkdir(parents=True)
    remove_tree(str(tree))
    assert not tree.exists()
