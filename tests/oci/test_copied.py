"""Layers from comparing trees, held against what they say: applied over the old tree they give the new one."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from labkernel.oci import copied, layer, ownership
from labkernel.oci.pack import is_whiteout
from labkernel.runtime.copies import flatten


def listing(tree: Path) -> dict[str, tuple[int, str]]:
    """path -> (mode, content or target) of everything in a tree."""
    found = {}
    for path in sorted(tree.rglob("*")):
        info = path.lstat()
        text = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(tree))] = (info.st_mode, text)
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    (base / "etc/deep/er").mkdir(parents=True)
    (base / "var/cache").mkdir(parents=True)
    for name in ("etc/kept", "etc/changed", "etc/gone", "etc/deep/er/x", "var/cache/a", "var/cache/b", "becomes-dir"):
        (base / name).write_text(name)
    (base / "link").symlink_to("etc/kept")
    return base


@pytest.fixture
def tree(image: Path, tmp_path: Path) -> Path:
    target = tmp_path / "tree"
    flatten([str(image)], str(target))
    return target


def changed(tree: Path, tmp_path: Path) -> Path:
    upper = tmp_path / "upper"
    copied.collect(tree=str(tree), before=str(tmp_path / "before"), upper=str(upper))
    return upper


def merged(tmp_path: Path, *lowers: Path) -> Path:
    flatten([str(path) for path in lowers], str(tmp_path / "merged"))
    return tmp_path / "merged"


def test_layer_makes_the_new_tree_of_the_old(image: Path, tree: Path, tmp_path: Path) -> None:
    copied.snapshot(tree=str(tree), out=str(tmp_path / "before"))
    (tree / "etc/changed").write_text("other")
    (tree / "etc/gone").unlink()
    (tree / "etc/deep/er/x").chmod(0o4711)
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    for name in ("a", "b"):
        (tree / "var/cache" / name).unlink()
    (tree / "var/cache").rmdir()
    (tree / "var/cache").mkdir()
    (tree / "var/cache/new").write_text("new")
    (tree / "becomes-dir").unlink()
    (tree / "becomes-dir/in").mkdir(parents=True)
    (tree / "closed").mkdir()
    (tree / "closed/file").write_text("x")
    (tree / "closed").chmod(0o555)
    after = listing(tree)
    upper = changed(tree, tmp_path)
    names = {str(path.relative_to(upper)) for path in upper.rglob("*")}
    assert "etc/kept" not in names
    assert is_whiteout((upper / "etc/gone").lstat())
    assert listing(merged(tmp_path, upper, image)) == after
    (tmp_path / "merged/closed").chmod(0o755)
    (upper / "closed").chmod(0o755)


def test_nothing_changed_is_an_empty_layer(tree: Path, tmp_path: Path) -> None:
    copied.snapshot(tree=str(tree), out=str(tmp_path / "before"), points=[["/proc", True], ["/etc/hosts", False]])
    assert listing(changed(tree, tmp_path)) == {}


def test_same_size_and_time_is_still_seen(tree: Path, tmp_path: Path) -> None:
    copied.snapshot(tree=str(tree), out=str(tmp_path / "before"))
    path = tree / "etc/changed"
    info = path.stat()
    path.write_text("CHANGED----")
    os.truncate(path, info.st_size)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert "etc/changed" in listing(changed(tree, tmp_path))


def test_placing_over_hard_links_leaves_the_image_alone(image: Path, tmp_path: Path) -> None:
    base = tmp_path / "work"
    (tmp_path / "layers").mkdir()
    flatten([str(image)], str(base / "tree"), link=True)
    assert (base / "tree/etc/kept").stat().st_ino == (image / "etc/kept").stat().st_ino
    plan = base / "plan"
    operation: dict[str, Any] = {"do": "write", "name": "changed", "data": "new", "dest": "/etc/", "owner": ""}
    plan.write_text(json.dumps([operation, {"do": "mkdir", "path": "/srv/a", "owner": ""}]))
    before = listing(image)
    done = copied.make_layer(
        base=str(base), lowers=[str(image)], plan=str(plan), layers=str(tmp_path / "layers"), userxattr=True
    )
    assert listing(image) == before
    made = tmp_path / "layers" / done["diff_id"].partition(":")[2]
    assert {name for name in listing(made) if not (made / name).is_dir()} == {"etc/changed"}
    assert (made / "srv/a").is_dir()


def test_whiteout_without_privileges_survives_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mknod

    def refuse(path: Any, mode: int = 0o600, device: int = 0, *, dir_fd: int | None = None) -> None:
        if stat.S_ISCHR(mode):
            raise PermissionError(1, "Operation not permitted")
        real(path, mode, device, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mknod", refuse)
    upper, target = tmp_path / "upper", tmp_path / "target"
    upper.mkdir()
    fd = os.open(upper, os.O_RDONLY)
    ownership.make_whiteout(fd, b"gone")
    os.close(fd)
    done = layer.diff_layer(upper=str(upper), blob_tmp=str(tmp_path / "blob"))
    assert done["members"] == 1
    layer.apply_layer(blob=str(tmp_path / "blob"), target=str(target), diff_id=done["diff_id"], userxattr=True)
    assert is_whiteout((target / "gone").lstat())
    (tmp_path / "low").mkdir()
    (tmp_path / "low/gone").write_text("x")
    assert listing(merged(tmp_path, target, tmp_path / "low")) == {}


def test_modes_that_close_a_file_to_its_owner(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "shut").mkdir(parents=True)
    (upper / "shut/file").write_text("x")
    (upper / "none").write_text("secret")
    (upper / "none").chmod(0)
    (upper / "shut").chmod(0o500)
    done = layer.diff_layer(upper=str(upper), blob_tmp=str(tmp_path / "blob"))
    target = tmp_path / "target"
    layer.apply_layer(blob=str(tmp_path / "blob"), target=str(target), diff_id=done["diff_id"], userxattr=True)
    assert stat.S_IMODE((target / "none").stat().st_mode) == 0
    assert stat.S_IMODE((target / "shut").stat().st_mode) == 0o500
    flatten([str(target)], str(tmp_path / "copy"))
    assert stat.S_IMODE((tmp_path / "copy/none").stat().st_mode) == 0
    layer.discard(paths=[str(upper), str(target), str(tmp_path / "copy")])
    assert not target.exists()
