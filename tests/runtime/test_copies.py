"""Copying layers without overlay: what shows through, what is hidden, what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from labkernel.runtime.copies import copy_up, flatten, remove_tree

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts are device nodes, which only root can make")


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path]:
    bottom, top = tmp_path / "bottom", tmp_path / "top"
    (bottom / "etc").mkdir(parents=True)
    (bottom / "etc" / "a").write_text("bottom")
    (bottom / "etc" / "b").write_text("bottom")
    (bottom / "link").symlink_to("/etc")
    os.link(bottom / "etc" / "a", bottom / "etc" / "hard")
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "a").write_text("top")
    (top / "etc").chmod(0o711)
    return bottom, top


def names(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


def test_upper_layers_win(layers: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    flatten([str(layers[1]), str(layers[0])], str(target))
    assert names(target) == {"etc", "etc/a", "etc/b", "etc/hard", "link"}
    assert (target / "etc" / "a").read_text() == "top"
    assert (target / "etc" / "hard").read_text() == "bottom"
    assert os.readlink(target / "link") == "/etc"
    assert (target / "etc").stat().st_mode & 0o777 == 0o711


@root_only
def test_whiteouts_and_opaque_directories(layers: tuple[Path, Path], tmp_path: Path) -> None:
    bottom, top = layers
    os.mknod(top / "link", 0o20600, os.makedev(0, 0))
    os.setxattr(top / "etc", "trusted.overlay.opaque", b"y")
    target = tmp_path / "target"
    target.mkdir()
    flatten([str(top), str(bottom)], str(target))
    assert names(target) == {"etc", "etc/a"}


@root_only
def test_owners_are_kept(layers: tuple[Path, Path], tmp_path: Path) -> None:
    os.chown(layers[0] / "etc" / "b", 33, 44)
    target = tmp_path / "target"
    target.mkdir()
    flatten([str(layers[0])], str(target))
    found = (target / "etc" / "b").stat()
    assert (found.st_uid, found.st_gid) == (33, 44)


def test_copy_up_takes_one_directory(layers: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    copy_up([str(layers[1]), str(layers[0])], "/etc", str(target))
    assert {path.name for path in target.iterdir()} == {"a", "b", "hard"}
    assert (target / "a").read_text() == "top"
    assert target.stat().st_mode & 0o777 == 0o711


def test_copy_up_leaves_a_used_volume_alone(layers: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").touch()
    assert copy_up([str(layers[0])], "/etc", str(target)) == {"files": 0}
    assert {path.name for path in target.iterdir()} == {"mine"}


@pytest.mark.parametrize("place", ["/link", "/link/a", "/none", "/etc/a"])
def test_copy_up_follows_no_links(layers: tuple[Path, Path], tmp_path: Path, place: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    copy_up([str(layers[0])], place, str(target))
    assert list(target.iterdir()) == []


def test_removal_of_what_nobody_may_enter(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    (path / "closed" / "deep").mkdir(parents=True)
    (path / "closed" / "deep" / "file").touch()
    (path / "closed" / "deep").chmod(0)
    (path / "closed").chmod(0o500)
    remove_tree(str(path))
    assert not path.exists()
    remove_tree(str(path))
