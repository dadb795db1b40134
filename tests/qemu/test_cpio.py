"""Our archives are read by cpio(1)."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from labkernel.qemu.cpio import Archive


def test_cpio_lists_what_was_put_in() -> None:
    if not shutil.which("cpio"):
        pytest.skip("no cpio program to compare with")
    archive = Archive()
    archive.directory("dev")
    archive.device("dev/console", 5, 1)
    archive.file("init", b"odd", mode=0o755)
    listing = subprocess.run(["cpio", "-itv"], input=archive.finish(), capture_output=True, check=True).stdout.decode()
    kinds = [(line.split()[0], line.split()[-1]) for line in listing.splitlines()]
    assert kinds == [("drwxr-xr-x", "dev"), ("crw-------", "dev/console"), ("-rwxr-xr-x", "init")]
    assert "5,   1" in listing


def test_equal_input_gives_equal_bytes() -> None:
    def build() -> bytes:
        archive = Archive()
        archive.file("a", b"x" * 5)
        return archive.finish()

    assert build() == build()
    assert len(build()) % 4 == 0
