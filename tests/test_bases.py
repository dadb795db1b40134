from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from labkernel.engine import Engine
from labkernel.errors import DriverError, ImageError
from labkernel.imaging import basefiles, bases, packages
from labkernel.oci.reference import parse_tag

BUSYBOX = basefiles.find_busybox()
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="no static busybox on this machine")


@needs_busybox
def test_the_same_busybox_gives_the_same_bytes() -> None:
    assert BUSYBOX is not None
    data, version, moment = basefiles.busybox_tar(BUSYBOX)
    assert basefiles.busybox_tar(BUSYBOX) == (data, version, moment)
    assert version.startswith("BusyBox v")


@needs_busybox
def test_the_root_file_system_has_what_programs_expect(tmp_path: Path) -> None:
    assert BUSYBOX is not None
    path = tmp_path / "b.tar"
    path.write_bytes(basefiles.busybox_tar(BUSYBOX)[0])
    with tarfile.open(path) as archive:
        found = {member.name: member for member in archive}
    assert found["bin/sh"].linkname == "bin/busybox"
    assert found["tmp"].mode == 0o1777
    assert found["root"].mode == 0o700
    for name in (
        "etc/passwd",
        "etc/group",
        "etc/hosts",
        "etc/resolv.conf",
        "usr/bin/env",
        "dev",
        "proc",
        "sys",
        "home",
    ):
        assert name in found
    assert {member.uid for member in found.values()} == {0, 8}


def test_only_a_static_program_will_do(tmp_path: Path) -> None:
    script = tmp_path / "busybox"
    script.write_text("#!/bin/sh\n")
    assert not basefiles.is_static_program(script)
    assert not basefiles.is_static_program(tmp_path / "missing")
    assert (
        not basefiles.is_static_program(Path(sys.executable).resolve())
        or b"statically" in subprocess.run(["file", "-L", sys.executable], capture_output=True, check=False).stdout
    )


def test_without_busybox_and_packages_the_remedy_is_named(
    fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basefiles, "find_busybox", lambda: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(ImageError, match="no static busybox") as caught:
        fresh_engine.images.resolve("lab/busybox")
    assert "apt-get install busybox-static" in (caught.value.resolution or "")
    assert fresh_engine.images.list() == []


@pytest.mark.skipif(not shutil.which("apt-get"), reason="no apt on this machine")
def test_without_busybox_its_package_is_fetched(fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basefiles, "find_busybox", lambda: None)
    lines: list[str] = []
    try:
        image = fresh_engine.images.resolve("lab/busybox", notify=lines.append)
    except ImageError as err:
        pytest.skip(f"the package cannot be downloaded here: {err.details}")
    assert "busybox-static" in lines[0]
    assert image.tags == ["lab/busybox:latest"]
    assert os.listdir(fresh_engine.layout.tmp) == []


@needs_busybox
def test_busybox_stands_in_at_once_and_says_so(fresh_engine: Engine) -> None:
    lines: list[str] = []
    image = fresh_engine.images.resolve("busybox", notify=lines.append)
    assert len(lines) == 1
    assert "lab/busybox stands in" in lines[0]
    assert image.provenance["stands_in_for"] == ["busybox:latest"]
    assert image.attrs["Labkernel"]["Provenance"]["builtin"] == "lab/busybox"
    assert image.tags == ["busybox:latest", "lab/busybox:latest"]
    assert fresh_engine.images.resolve("busybox", notify=lines.append) == image
    assert len(lines) == 1


def test_what_stands_in_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bases, "os_release", lambda: {"ID": "debian", "VERSION_ID": "12", "VERSION_CODENAME": "bookworm"}
    )

    def stand_in(name: str) -> str | None:
        found = bases.find_stand_in(parse_tag(name))
        return found.familiar_name if found else None

    assert {stand_in(name) for name in ("busybox", "busybox:1.36", "docker.io/library/busybox:musl")} == {"lab/busybox"}
    good = ("debian", "debian:stable-slim", "debian:bookworm", "debian:12", "debian:12.5-slim", "debian:bookworm-slim")
    assert {stand_in(name) for name in good} == {"lab/debian"}
    others = ("debian:11", "debian:sid", "alpine", "lab/busybox", "example.org/library/busybox", "me/busybox")
    assert {stand_in(name) for name in others} == {None}


@pytest.fixture(scope="module")
def debian(shared_engine: Engine) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("no apt and dpkg-deb on this machine")
    try:
        image = shared_engine.images.resolve("lab/debian")
    except ImageError as err:
        pytest.skip(f"packages cannot be had here: {err.details or err.brief}")
    return shared_engine.images.layer_dirs(image)[0]


@pytest.mark.slow
def test_debian_has_accounts_links_and_no_documentation(debian: Path) -> None:
    assert (debian / "etc/passwd").read_text().startswith("root:x:0:0:")
    assert os.readlink(debian / "bin") == "usr/bin"
    assert os.readlink(debian / "usr/bin/awk") == "mawk"
    assert not (debian / "usr/share/man").exists()
    assert (debian / "tmp").stat().st_mode & 0o7777 == 0o1777


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for chroot")
def test_debians_programs_run(debian: Path) -> None:
    script = "bash -c 'echo $((6 * 7))' && python3 -c 'import json, ssl, sqlite3; print(json.dumps([1]))' && id -un"
    done = subprocess.run(["chroot", debian, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "42\n[1]\nroot\n", done.stderr


def test_the_host_is_a_lower_layer_whose_secrets_are_hidden(engine: Engine) -> None:
    if engine.driver.name != "root":
        with pytest.raises(DriverError, match="needs the root driver"):
            engine.images.resolve("lab/host")
        return
    image = engine.images.resolve("lab/host")
    assert engine.images.layer_dirs(image) == [Path("/")]
    assert image.uses_host
    files, mounts = image.host_masks
    hidden = [mount["destination"] for mount in mounts]
    assert "/etc/shadow" in files
    assert {path for path in ("/root", "/home", "/tmp", "/run") if os.path.isdir(path)} <= set(hidden)
    assert any(engine.layout.root.is_relative_to(place) for place in hidden)
    assert engine.images.resolve("lab/busybox").host_masks == ([], [])
    with pytest.raises(ImageError, match="cannot be exported"), open(os.devnull, "wb") as out:
        engine.images.export_rootfs("lab/host", out)
    image.remove(force=True)


@pytest.mark.skipif(not os.access("/etc/shadow", os.R_OK), reason="needs root and a shadow file to be hidden")
def test_a_container_on_the_host_sees_no_secrets_and_changes_nothing(engine: Engine) -> None:
    if engine.driver.name != "root":
        pytest.skip("lab/host needs the root driver")
    mark = f"/etc/labkernel-test-{os.getpid()}"
    script = f"cat /etc/shadow; ls -A /root /tmp | grep -v : ; touch {mark} && echo written; ls {engine.layout.root}"
    found = engine.containers.run("lab/host", ["sh", "-c", script + " 2>/dev/null || true"], remove=True)
    assert found.split() == [b"written"]
    assert not os.path.exists(mark)


def test_many_ask_for_a_base_at_once_and_it_is_made_once(fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = basefiles.busybox_tar

    def counted(program: Path) -> tuple[bytes, str, float]:
        made.append(program.name)
        return real(program)

    monkeypatch.setattr(basefiles, "busybox_tar", counted)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda name: fresh_engine.images.resolve(name).id, ["busybox", "lab/busybox"] * 2))
    assert (len(found), len(made)) == (1, 1)
