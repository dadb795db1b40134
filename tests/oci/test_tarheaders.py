"""Tar headers: read as the standard library reads them where both can, and never at a price beyond their bytes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import LayerError
from labkernel.oci.tarheaders import MAX_EXTENDED, MAX_PIECES, Member, headers

FIELDS = ("name", "size", "mode", "uid", "gid", "linkname", "devmajor", "devminor")


class Forward(io.BytesIO):
    """Goes no further than its end."""

    def seek(self, position: int, whence: int = 0) -> int:
        return super().seek(min(position, len(self.getvalue())), whence)


def read(data: bytes) -> list[tuple[Member, bytes]]:
    """The members with what is stored of their data."""
    stream = Forward(data)
    return [(member, stream.read(member.stored)) for member in headers(stream)]


def facts(member: Any) -> dict[str, Any]:
    found = {name: getattr(member, name) for name in FIELDS}
    return {**found, "mtime": int(member.mtime), "type": b"0" if member.isreg() else member.type}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_the_standard_library_reads_them(form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, kind in enumerate((b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"\0")):
            # tarfile takes the cut name of an old regular file for a directory's when it ends in a slash.
            for depth in (1,) if kind == b"\0" else (1, 60) if form == tarfile.USTAR_FORMAT else (1, 60, 400):
                member = tarfile.TarInfo(f"{'d/' * depth}nämé{number}")
                member.type, member.linkname = kind, "target" * (1 if form == tarfile.USTAR_FORMAT else 30)
                member.mode, member.uid, member.gid = 0o4755, number * 7, 99
                member.mtime = 1_700_000_000 + number
                member.devmajor = member.devminor = number if kind in b"34" else 0
                member.size = 700 if kind in (b"0", b"7", b"\0") else 0
                tar.addfile(member, io.BytesIO(os.urandom(700)))
        member = tarfile.TarInfo("big")
        member.uid = 5 if form == tarfile.USTAR_FORMAT else 1 << 24
        member.pax_headers = {"SCHILY.xattr.user.x": "ünï", "comment": "a=b\nc"} if form == tarfile.PAX_FORMAT else {}
        tar.addfile(member)
    ours = read(buffer.getvalue())
    buffer.seek(0)
    with tarfile.open(fileobj=buffer, encoding="utf-8", errors="surrogateescape") as tar:
        theirs = tar.getmembers()
        assert [facts(member) for member, _ in ours] == [facts(member) for member in theirs]
        for (member, data), there in zip(ours, theirs, strict=True):
            assert {**there.pax_headers, **member.pax_headers} == there.pax_headers
            if there.isreg():
                file = tar.extractfile(there)
                assert file is not None
                assert file.read() == data


@pytest.mark.parametrize("form", ["gnu", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_sparse_files_of_gnu_tar(tmp_path: Path, form: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("GNU tar is not installed")
    with (tmp_path / "f").open("wb") as file:
        for place in range(1, 40):
            file.seek(place * 100_000)
            file.write(b"%d" % place * 1000)
        file.truncate(5_000_000)
    kind, _, version = form.partition(" ")
    words = ["tar", "-cSf", "x.tar", f"--format={kind}", *([f"--sparse-version={version}"] if version else []), "f"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=60)
    ((member, data),) = read((tmp_path / "x.tar").read_bytes())
    if member.sparse is None:
        pytest.skip("this file system shows no holes")
    whole = bytearray(member.size)
    at = 0
    for offset, count in member.sparse:
        whole[offset : offset + count] = data[at : at + count]
        at += count
    assert member.name == "f"
    assert bytes(whole) == (tmp_path / "f").read_bytes()


def block(name: bytes, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(os.fsdecode(name))
    member.size, member.type = size, kind
    return member.tobuf(tarfile.USTAR_FORMAT)


def extended(body: bytes, kind: bytes = b"x") -> bytes:
    return block(b"x", len(body), kind) + body + bytes(-len(body) % 512)


END = bytes(1024)
FILE = block(b"f", 0, b"0")


def old_sparse(count: int) -> bytes:
    """A file of `count` extension blocks, each with 21 pieces of one byte."""
    head = bytearray(block(b"f", 0, b"S"))
    head[257:265], head[482:483], head[483:495] = b"ustar  \0", b"\1", b"77777777777\0"
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    pieces = b"".join(b"%011o\0%011o\0" % (place * 4096, 1) for place in range(1, 22))
    return bytes(head) + (pieces + b"\1" + bytes(7)) * count + bytes(512)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (extended(b"9" * 1_000_000) + FILE, "invalid PAX"),
        (extended(b"1 " * 500_000) + FILE, "invalid PAX"),
        (extended(b"11 comment=" * 90_000) + FILE, "invalid PAX"),
        (extended(b"5 =x\n") + FILE, "invalid PAX"),
        (extended(b"-9 path=x\n") + FILE, "invalid PAX"),
        (extended(b"12 size=x12\n") + FILE, "no number"),
        (extended(b"11 path=x\n") * (MAX_EXTENDED + 1) + FILE, "invalid PAX|in a row"),
        (extended(b"name\0", b"L") * (MAX_EXTENDED + 1) + FILE, "in a row"),
        (extended(b"", b"g") * 5000 + FILE, "in a row"),
        (extended(b"name\0", b"L") + END, "before nothing"),
        (old_sparse(MAX_PIECES // 21 + 2), "more than"),
        (FILE[:300], "truncated"),
        (FILE[:100] + b"x" + FILE[101:], "checksum|no number"),
        (block(b"f", 5000, b"0") + bytes(600), "unexpected end"),
    ],
)
def test_what_would_be_dear_or_is_wrong_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(LayerError, match=words):
        list(headers(Forward(data)))


def test_global_headers_say_nothing_and_are_not_kept() -> None:
    record = b"999990 k=" + b"v" * (999_990 - 10) + b"\n"
    data = b"".join(extended(record, b"g") + FILE for _ in range(20))
    assert [(member.name, member.pax_headers) for member, _ in read(data + END)] == [("f", {})] * 20


def test_an_empty_value_takes_back_and_the_last_record_wins() -> None:
    ((member, _),) = read(extended(b"10 path=a\n10 path=b\n7 uid=\n9 gid=12\n") + FILE + END)
    assert (member.name, member.uid, member.gid) == ("b", 0, 12)
