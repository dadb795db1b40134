"""Options as text, and real mounts in a private mount namespace where this user may have one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.linux import mounts


def in_namespace(code: str, *args: str) -> str:
    """Run Python in a new mount namespace (and user namespace, for a plain user)."""
    command = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-Urm"]
    probe = subprocess.run([*command, "true"], check=False, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no mount namespace: {probe.stderr.strip()}")
    done = subprocess.run([*command, sys.executable, "-c", code, *args], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parse_options() -> None:
    flags, propagation, data = mounts.parse_options(["rbind", "ro", "nosuid", "rslave", "size=1m", "mode=700"])
    assert flags == mounts.MS_BIND | mounts.MS_REC | mounts.MS_RDONLY | mounts.MS_NOSUID
    assert propagation == mounts.MS_SLAVE | mounts.MS_REC
    assert data == "size=1m,mode=700"
    assert mounts.parse_options(["ro", "rw", "defaults"]) == (0, 0, "")


def test_overlay_options_escape() -> None:
    text = mounts.overlay_options(["/a:b", "/c,d"], "/u", "/w", userxattr=True, volatile=True)
    assert text == "lowerdir=/a\\:b:/c\\,d,upperdir=/u,workdir=/w,userxattr,volatile"


def test_read_mountinfo(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_text("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n")
    assert mounts.read_mountinfo(str(file)) == [
        {
            "id": "36",
            "parent": "35",
            "device": "98:0",
            "root": "/mnt1",
            "target": "/mnt 2",
            "options": "rw,noatime",
            "fstype": "ext3",
            "source": "/dev/root",
            "super_options": "rw,errors=continue",
        }
    ]


def test_many_long_lower_directories(tmp_path: Path) -> None:
    """More names than fit into the page mount(2) takes."""
    lower = []
    for number in range(60):
        folder = tmp_path / ("x" * 120 + str(number))
        folder.mkdir()
        (folder / f"file{number}").write_text(str(number))
        lower.append(str(folder))
    for name in ("u", "w", "m"):
        (tmp_path / name).mkdir()
    code = (
        "import os, sys; from labkernel.linux import mounts\n"
        "base, *lower = sys.argv[1:]\n"
        "mounts.make_private('/')\n"
        "mounts.mount_overlay(base + '/m', lower, base + '/u', base + '/w', userxattr=os.getuid() != 0 or True)\n"
        "print(len(os.listdir(base + '/m')))\n"
    )
    assert in_namespace(code, str(tmp_path), *lower) == "60\n"


def test_read_only_bind_keeps_locked_flags(tmp_path: Path) -> None:
    code = (
        "import os, sys; from labkernel.linux import mounts\n"
        "base = sys.argv[1]; mounts.make_private('/')\n"
        "mounts.mount('t', base, 'tmpfs', mounts.MS_NOSUID | mounts.MS_NODEV)\n"
        "mounts.bind(base, base); mounts.remount_readonly(base, recursive=True)\n"
        "print([m['options'] for m in mounts.read_mountinfo() if m['target'] == base][-1])\n"
    )
    options = in_namespace(code, str(tmp_path)).strip().split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)


def test_ensure_in_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("/real")
    root_fd = os.open(tmp_path, os.O_PATH)
    created: list[str] = []
    os.close(mounts.ensure_in_root(root_fd, "/link/a/b", directory=False, created=created))
    assert created == ["/link/a", "/link/a/b"]
    assert (tmp_path / "real/a/b").read_bytes() == b""
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    with pytest.raises(OSError, match="No such file"):
        mounts.ensure_in_root(root_fd, "/dangling", directory=True)
    os.close(root_fd)
