from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from labkernel.errors import StoreError
from labkernel.store import layout as module
from labkernel.store import places
from labkernel.store.layout import Layout, find_shared_file_system


def test_a_new_store_is_private_and_an_image_layout(tmp_path: Path) -> None:
    found = Layout.find(tmp_path / "root", tmp_path / "run")
    assert (found.root / "oci-layout").read_text() == '{"imageLayoutVersion":"1.0.0"}'
    assert stat.S_IMODE(found.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(found.runtime_dir.stat().st_mode) == 0o700
    for path in (
        found.blobs / "sha256",
        found.layers,
        found.containers,
        found.volumes,
        found.vm / "kernels",
        found.tmp,
    ):
        assert path.is_dir()
    assert Layout.find(tmp_path / "root", tmp_path / "run") == found


def test_argument_then_environment_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_ROOT", str(tmp_path / "env"))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(tmp_path / "r"))
    assert Layout.find().root == tmp_path / "env"
    assert Layout.find(tmp_path / "argument").root == tmp_path / "argument"
    monkeypatch.delenv("LABKERNEL_ROOT")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert Layout.find().root == tmp_path / "xdg" / "labkernel"


def test_a_link_leads_to_the_same_store(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert Layout.find(tmp_path / "link", tmp_path / "r").root == tmp_path / "root"


def test_two_stores_have_two_runtime_directories() -> None:
    one, two = (places.default_runtime_dir(f"/x/{name}") for name in "ab")
    assert one != two
    assert len(os.fsencode(one)) < 60


def test_a_socket_path_too_long_for_the_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="too long for a unix socket"):
        Layout.find(tmp_path / "root", tmp_path / ("x" * 120))


def test_a_place_that_cannot_be_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the store"):
        Layout.find(tmp_path / "file" / "root", tmp_path / "r")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own a directory as somebody else")
def test_somebody_elses_runtime_directory_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(StoreError, match="belongs to user 12345"):
        Layout.find(tmp_path / "root", theirs)


def test_the_file_system_is_known_by_its_magic_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.file_system_type(Path("/proc")) == 0x9FA0
    assert find_shared_file_system(Path("/proc")) is None
    monkeypatch.setattr(module, "file_system_type", lambda path: 0x6969)
    assert find_shared_file_system(Path("/proc")) == "nfs"
