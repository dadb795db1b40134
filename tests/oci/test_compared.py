"""What `diff` and `commit` say of a copied tree: held against what was done to it, and applied over the image again."""

from __future__ import annotations

import os
import socket
import tarfile
from pathlib import Path

import pytest

from labkernel.oci import compared, layer
from labkernel.runtime.copies import flatten


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    """Of an image, top first."""
    low, top = tmp_path / "low", tmp_path / "top"
    for base, names in ((low, ("etc/kept", "etc/gone", "bin/tool", "var/a", "var/b", "file")), (top, ("etc/top",))):
        for name in names:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text(name)
    (low / "link").symlink_to("etc/kept")
    os.link(low / "bin/tool", low / "bin/again")
    os.mkfifo(low / "fifo")
    return [str(top), str(low)]


@pytest.fixture
def tree(layers: list[str], tmp_path: Path) -> Path:
    flatten(layers, str(tmp_path / "tree"))
    return tmp_path / "tree"


def told(tree: Path, layers: list[str], *hidden: str) -> list[str]:
    return ["CAD"[kind] + path for kind, path in compared.changes(tree=str(tree), lowers=layers, hidden=hidden)]


def test_nothing_changed(tree: Path, layers: list[str]) -> None:
    assert told(tree, layers) == []
    (tree / "var/new").touch()
    (tree / "var/new").unlink()
    assert told(tree, layers) == []  # the directory's time alone says nothing


def test_each_kind_of_change(tree: Path, layers: list[str]) -> None:
    (tree / "etc/kept").write_text("longer than before")
    (tree / "etc/gone").unlink()
    (tree / "etc/new/deep").mkdir(parents=True)
    (tree / "etc/new/deep/x").touch()
    (tree / "var").chmod(0o700)
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    (tree / "bin/tool").chmod(0o700)
    assert told(tree, layers) == [
        *("C/bin", "C/bin/again", "C/bin/tool", "C/etc", "D/etc/gone", "C/etc/kept", "A/etc/new", "A/etc/new/deep"),
        *("A/etc/new/deep/x", "C/link", "C/var"),
    ]


def test_one_kind_in_the_place_of_another(tree: Path, layers: list[str]) -> None:
    (tree / "file").unlink()
    (tree / "file").mkdir()
    (tree / "file/in").touch()
    for name in ("a", "b"):
        (tree / "var" / name).unlink()
    (tree / "var").rmdir()
    (tree / "var").touch()
    assert told(tree, layers) == ["C/file", "A/file/in", "C/var"]


def test_mount_points_count_when_something_is_in_them(tree: Path, layers: list[str]) -> None:
    (tree / "deep/er").mkdir(parents=True)
    (tree / "etc/hosts").touch()
    hidden = ("/deep", "/deep/er", "/etc/hosts")
    assert told(tree, layers, *hidden) == []
    (tree / "deep/er/x").touch()
    (tree / "etc/hosts").write_text("127.0.0.1")
    assert told(tree, layers, *hidden) == ["A/deep", "A/deep/er", "A/deep/er/x", "C/etc", "A/etc/hosts"]


def test_the_layer_makes_the_tree_of_the_image(tree: Path, layers: list[str], tmp_path: Path) -> None:
    (tree / "etc/kept").write_text("longer than before")
    (tree / "etc/gone").unlink()
    (tree / "var").chmod(0o1750)
    (tree / "new").mkdir(0o700)
    (tree / "new/a").write_text("a")
    os.link(tree / "new/a", tree / "new/b")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "new/s"))
        os.utime(tree / "new", ns=(10**18, 10**18))
        done = compared.diff_layer(
            tree=str(tree), lowers=layers, upper=str(tmp_path / "upper"), blob_tmp=str(tmp_path / "blob")
        )
    assert not (tmp_path / "upper").exists()
    with tarfile.open(tmp_path / "blob") as tar:
        members = {member.name.rstrip("/"): member for member in tar}
    assert set(members) == {"etc", "etc/.wh.gone", "etc/kept", "new", "new/a", "new/b", "var"}
    assert (members["var"].mode, members["new"].mode, members["new"].mtime) == (0o1750, 0o700, 10**9)
    assert members["new/b"].islnk()
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    layer.apply_layer(
        blob=str(tmp_path / "blob"), target=str(unpacked / "layer"), diff_id=done["diff_id"], lowers=layers
    )
    again = tmp_path / "again"
    flatten([str(unpacked / "layer"), *layers], str(again))
    (tree / "new/s").unlink()
    assert told(again, [str(tree)]) == []


def test_a_link_that_leads_out_is_a_link(tree: Path, layers: list[str], tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    for name in ("a", "b"):
        (tree / "var" / name).unlink()
    (tree / "var").rmdir()
    (tree / "var").symlink_to(tmp_path / "outside")
    assert told(tree, layers) == ["C/var"]
