"""Subordinate ranges, and entering a user namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.linux import namespaces


def test_subordinate_ranges(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("# a comment\nann:100000:65536\n1000:300000:10\nbob:1:1\nbroken:x:1\n")
    assert namespaces.subordinate_ranges(str(file), "ann", "1000") == [(100000, 65536), (300000, 10)]
    assert namespaces.subordinate_ranges(str(tmp_path / "none"), "ann") == []


def test_enter_as_plain_user() -> None:
    command = [sys.executable, "-c"]
    if os.getuid() == 0:
        command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *command]
    code = (
        "import os; from labkernel.linux import namespaces, mounts, capabilities\n"
        "try: kind = namespaces.enter_user_namespace()\n"
        "except PermissionError: raise SystemExit(77)\n"
        "mounts.make_private('/'); mounts.mount('t', '/tmp', 'tmpfs')\n"
        "print(kind, os.getuid(), os.getgid(), len(capabilities.effective()) > 30)\n"
    )
    done = subprocess.run([*command, code], check=False, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this machine forbids user namespaces")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("single", "ranges")
    assert done.stdout.split()[1:] == ["0", "0", "True"]
