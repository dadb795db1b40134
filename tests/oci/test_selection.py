"""What a COPY takes: order, kinds, digests, and what leaves files out."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from labkernel.dockerfile.ignorefile import IgnoreMatcher
from labkernel.oci import selection
from labkernel.oci.rootfd import Root


def chosen(base: Path, *patterns: str, **more: Any) -> list[dict[str, Any]]:
    with Root.open(str(base)) as root:
        return selection.select(root, patterns, **more)


def test_names_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """Of text alone it would be another one where a name is no UTF-8, and the digest depends on it."""
    names = [b"a", b"B", "\u00e9".encode(), b"\xff\xfe", "\ue000".encode(), "\U0001f433".encode(), b"z", b"a.b"]
    for name in names:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).touch()
    (source,) = chosen(tmp_path, ".")
    assert [os.fsencode(entry[0]) for entry in source["entries"]] == [b"", *sorted(names)]


def test_what_an_entry_says(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/file").write_bytes(b"content")
    (tmp_path / "d/e/link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d/pipe", 0o600)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "d/socket"))
    (source,) = chosen(tmp_path, "d")
    assert (source["path"], source["name"], source["pattern"]) == ("d", "d", "d")
    digest = hashlib.sha256(b"content").hexdigest()
    kinds = [(name, kind, digest) for name, kind, _, _, _, digest in source["entries"]]
    assert kinds == [
        ("", "d", ""),
        ("e", "d", ""),
        ("e/link", "l", "nowhere"),
        ("file", "f", digest),
        ("pipe", "p", "0"),
    ]
    size, mtime_ns = source["entries"][3][3:5]
    assert (size, mtime_ns) == (7, (tmp_path / "d/file").stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("ignored", "excluded", "left"),
    [
        (["**/*.tmp"], [], ["", "keep", "keep/a", "x"]),
        (["d/keep"], [], ["", "b.tmp", "x"]),
        (["d", "!d/keep/a"], [], ["", "keep", "keep/a"]),
        ([], ["keep"], ["", "b.tmp", "x"]),
        (["d/x"], ["*.tmp"], ["", "keep", "keep/a"]),
    ],
)
def test_what_is_left_out(tmp_path: Path, ignored: list[str], excluded: list[str], left: list[str]) -> None:
    (tmp_path / "d/keep").mkdir(parents=True)
    for name in ("d/keep/a", "d/keep/c.tmp", "d/b.tmp", "d/x"):
        (tmp_path / name).touch()
    if excluded:
        (tmp_path / "d/keep/c.tmp").unlink()
    leave_out = IgnoreMatcher(ignored) if ignored else None
    exclude = IgnoreMatcher(excluded) if excluded else None
    (source,) = chosen(tmp_path, "d", leave_out=leave_out, exclude=exclude)
    assert [entry[0] for entry in source["entries"]] == left


def test_the_digest_is_of_names_kinds_modes_and_content(tmp_path: Path) -> None:
    seen = set()
    (tmp_path / "d").mkdir()
    file = tmp_path / "d/file"

    def digest() -> str:
        return selection.selection_digest(chosen(tmp_path, "d"))

    file.write_text("one")
    before = digest()
    os.utime(file, (0, 0))
    assert digest() == before
    seen.add(before)
    file.write_text("two")
    seen.add(digest())
    file.chmod(0o700)
    seen.add(digest())
    file.rename(tmp_path / "d/other")
    seen.add(digest())
    (tmp_path / "d/other").unlink()
    (tmp_path / "d/other").symlink_to("two")
    seen.add(digest())
    assert len(seen) == 5
