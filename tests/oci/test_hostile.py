"""Layers made to do harm, header by header: each is refused with a LayerError, or contained; nothing else happens."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import LayerError
from labkernel.oci import layer
from labkernel.oci.layerscan import scan_layers
from labkernel.oci.tarstream import MAX_FRAMES


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", link: bytes = b"", **fields: bytes) -> bytes:
    """A ustar header as it is written on the disk; `size` may be its 12 bytes."""
    length = size if isinstance(size, bytes) else b"%011o\0" % size
    raw = bytearray(512)
    raw[0:100] = name[:100].ljust(100, b"\0")
    raw[100:124] = fields.get("mode", b"0000644\0") + b"0000000\0" + b"0000000\0"
    raw[124:136] = length
    raw[136:148] = fields.get("mtime", b"00000000000\0")
    raw[156:157] = kind
    raw[157:257] = link[:100].ljust(100, b"\0")
    raw[257:265] = b"ustar\x0000"
    raw[329:345] = fields.get("device", b"0000000\x000000000\0")
    raw[345:500] = fields.get("prefix", b"").ljust(155, b"\0")
    total = sum(raw[:148]) + 8 * 32 + sum(raw[156:])
    raw[148:156] = b"%06o\0 " % total
    return bytes(raw)


# For others the engine unpacks in a user namespace (tests/test_hostile_images.py, as a plain user).
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking in this process keeps owners, which needs root")


def entry(name: bytes, data: bytes = b"", kind: bytes = b"0", link: bytes = b"") -> bytes:
    return header(name, len(data), kind, link) + data + bytes(-len(data) % 512)


def pax(records: dict[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        line = b" " + key + b"=" + value + b"\n"
        length = len(line) + 1
        while len(b"%d" % length) + len(line) != length:
            length += 1
        body += b"%d" % length + line
    return entry(b"pax", body, kind)


def huge(value: int) -> bytes:
    """GNU's base-256 form of a number that octal has no room for; may be negative."""
    return (b"\x80" if value >= 0 else b"\xff") + value.to_bytes(11, "big", signed=True)


END = bytes(1024)
OLD_SPARSE = b"S"
SPARSE = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": b"a"}


def old_sparse(name: bytes, pieces: list[tuple[int, int]], real: int, data: bytes) -> bytes:
    raw = bytearray(header(name, len(data), OLD_SPARSE))
    raw[257:265] = b"ustar  \0"
    raw[345:500] = bytes(155)
    for number, (offset, count) in enumerate(pieces[:4]):
        place = 386 + 24 * number
        raw[place : place + 24] = huge(offset)[:12] + huge(count)[:12]
    raw[483:495] = huge(real)
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:]))
    return bytes(raw) + data + bytes(-len(data) % 512)


def apply(base: Path, tar: bytes, blob: bytes | None = None, **more: Any) -> Path:
    path, target = base / "blob", base / "layer"
    path.write_bytes(gzip.compress(tar, 1) if blob is None else blob)
    layer.apply_layer(blob=str(path), target=str(target), diff_id=f"sha256:{hashlib.sha256(tar).hexdigest()}", **more)
    return target


REFUSED: dict[str, bytes] = {
    "negative size": header(b"a", huge(-512)),
    "size beyond any disk": header(b"a", huge(1 << 80)) + b"x" * 512,
    "size of no number": header(b"a", b"99999999999\0"),
    "pax size negative": pax({b"size": b"-1"}) + entry(b"a", b"x"),
    "pax size of no number": pax({b"size": b"many"}) + entry(b"a", b"x"),
    "pax size beyond the end": pax({b"size": b"999999"}) + entry(b"a", b"x"),
    "pax path outside": pax({b"path": b"../../outside"}) + entry(b"a", b"x"),
    "pax link outside": pax({b"linkpath": b"../../../etc/passwd"}) + entry(b"a", b"", b"1", b"b"),
    "pax path of a NUL": pax({b"path": b"a\0b/../../c"}) + entry(b"a", b"x"),
    "pax record that lies about its length": entry(b"pax", b"99 path=x\n", b"x") + entry(b"a", b"x"),
    "pax record of no number": entry(b"pax", b"ten path=x\n", b"x") + entry(b"a", b"x"),
    "pax for nothing": pax({b"path": b"x"}),
    "long name of 4 GiB": header(b"././@LongLink", 1 << 32, b"L"),
    "prefix outside": header(b"a", 0, prefix=b"../.."),
    "owner beyond": pax({b"uid": b"99999999999999999999"}) + entry(b"a", b"x"),
    "owner negative": pax({b"gid": b"-5"}) + entry(b"a", b"x"),
    "sparse file beyond any disk": old_sparse(b"a", [(1 << 60, 1)], 1 << 61, b"x"),
    "sparse pieces that overlap backwards": old_sparse(b"a", [(4096, 512), (0, 512)], 8192, b"x" * 1024),
    "sparse piece of negative size": old_sparse(b"a", [(0, -512)], 8192, b"x" * 512),
    "sparse pieces of more than there is": old_sparse(b"a", [(0, 1 << 40)], 1 << 41, b"x" * 512),
    "pax sparse beyond any disk": pax(
        {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": b"a",
            b"GNU.sparse.realsize": b"1" * 19,
        }
    )
    + entry(b"a", b"1\n1\n0\n".ljust(512, b"\0")),
    "pax sparse with a map without end": pax({**SPARSE, b"GNU.sparse.realsize": b"10"})
    + entry(b"a", b"99999999\n".ljust(512, b"1")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    base = tmp_path / "in/side"
    base.mkdir(parents=True)
    with pytest.raises(LayerError):
        apply(base, REFUSED[name] + END)
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["side"]
    assert not [each for each in os.listdir(base) if each != "blob"]


def test_names_that_are_not_utf_8_stay_what_they_are(tmp_path: Path) -> None:
    names = [b"caf\xe9", b"\xff\xfe", b"new\nline", b"tab\t", b"\xf0\x9f\x90\xb3", b" ", b"-rf"]
    target = apply(tmp_path, b"".join(entry(name, name) for name in names) + END)
    assert sorted(os.listdir(os.fsencode(target))) == sorted(names)
    for name in names:
        with open(os.fsencode(target) + b"/" + name, "rb") as file:
            assert file.read() == name


@needs_root
def test_what_comes_twice_is_what_came_last(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("untouched")
    link = os.fsencode(outside)
    tar = entry(b"f", b"first") + entry(b"f", b"second")
    tar += entry(b"l", b"", b"2", link) + entry(b"l/", b"", b"5") + entry(b"l/f", b"inside")
    tar += entry(b"d/", b"", b"5") + entry(b"d/x", b"x") + entry(b"d", b"", b"2", link) + entry(b"d/f", b"inside")
    tar += entry(b"h", b"h") + entry(b"hard", b"", b"1", b"h") + entry(b"h", b"other") + entry(b"hard", b"own")
    target = apply(tmp_path, tar + END)
    assert (target / "f").read_bytes() == b"second"
    assert (target / "l/f").read_bytes() == b"inside"
    assert (target / "h").read_bytes() == b"other"
    assert (target / "hard").read_bytes() == b"own"
    assert (outside / "f").read_text() == "untouched"
    assert os.listdir(outside) == ["f"]


def test_times_and_modes_of_nonsense_are_bounded(tmp_path: Path) -> None:
    tar = b"".join(
        pax({b"mtime": value}) + entry(name, b"x")
        for name, value in {b"a": b"-1.5", b"b": b"99999999999999999999", b"c": b"1e400", b"d": b"nan"}.items()
    )
    try:
        target = apply(tmp_path, tar + END)
    except LayerError:
        return
    assert sorted(os.listdir(target)) == ["a", "b", "c", "d"]


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes need root")
def test_devices_are_nodes_of_the_layer_only(tmp_path: Path) -> None:
    tar = header(b"null", 0, b"3", device=b"0000001\x000000003\0") + header(
        b"disk", 0, b"4", device=b"0000010\x000000000\0"
    )
    tar += header(b"pipe", 0, b"6")
    target = apply(tmp_path, tar + END)
    kinds = {name: stat.S_IFMT(os.lstat(target / name).st_mode) for name in os.listdir(target)}
    assert kinds == {"null": stat.S_IFCHR, "disk": stat.S_IFBLK, "pipe": stat.S_IFIFO}


@needs_root
def test_many_whiteouts_of_one_name_and_of_what_the_layer_brings(tmp_path: Path) -> None:
    tar = entry(b"a", b"new") + entry(b".wh.a") * 3 + entry(b"d/.wh..wh..opq") * 2 + entry(b"d/x", b"x")
    target = apply(tmp_path, tar + END)
    assert (target / "a").read_bytes() == b"new"
    assert (target / "d/x").read_bytes() == b"x"


def bomb(size: int) -> bytes:
    """A gzip of one tar member of `size` zeros, made without having them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(header(b"bomb", size))]
    block = bytes(1 << 20)
    parts += [packer.compress(block) for _ in range(size >> 20)]
    return b"".join([*parts, packer.compress(END), packer.flush()])


@pytest.mark.parametrize("limited", [True, False])
def test_a_bomb_takes_neither_memory_nor_disk(tmp_path: Path, limited: bool) -> None:
    size = 128 << 20
    (tmp_path / "blob").write_bytes(bomb(size))
    code = (
        "import sys\n"
        "from labkernel.oci import layer\n"
        "from labkernel.errors import LayerError\n"
        "base, limit = sys.argv[1], int(sys.argv[2])\n"
        "try:\n"
        "    where = {'blob': base + '/blob', 'target': base + '/layer'}\n"
        "    layer.apply_layer(**where, diff_id='sha256:' + '0' * 64, max_bytes=limit)\n"
        "except LayerError as err:\n"
        "    print(err.brief)\n"
        # Not getrusage: that still counts what the parent had when it forked.
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path), str(size // 8 if limited else 1 << 40)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    told, peak_kib = done.stdout.splitlines()
    assert ("more than" if limited else "its config says") in told
    assert int(peak_kib) < 100 << 10
    assert os.listdir(tmp_path) == ["blob"]


def test_a_zstd_window_of_gigabytes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    # RFC 8878, 3.1.1.1.2: magic, a frame header with a window of 2^41 bytes, one raw block that never comes.
    frame = struct.pack("<I", 0xFD2FB528) + bytes([0b0000_0000, 31 << 3]) + b"\x01\x00\x00"
    with pytest.raises(LayerError):
        apply(tmp_path, b"", blob=frame)


def test_noise_is_never_more_than_an_error(tmp_path: Path) -> None:
    """Every byte of the headers of a small tar, flipped: a LayerError, or a tree inside the target."""
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("dir/äfile")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    raw = good.getvalue()[:3072]
    for place in range(0, 2048, 23):
        base = tmp_path / str(place)
        base.mkdir()
        changed = bytearray(raw)
        changed[place] ^= 0x55
        try:
            apply(base, bytes(changed) + END, blob=bytes(changed) + END)
        except LayerError:
            assert os.listdir(base) == ["blob"]
        assert sorted(os.listdir(base)) in (["blob"], ["blob", "layer"])


def test_pieces_without_end_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    """A blob of nothing but empty gzip members: each was a copy of all that follows."""
    member = gzip.compress(b"", mtime=0)
    tar = entry(b"a", b"x") + END
    target = apply(tmp_path, tar, blob=member * 100_000 + gzip.compress(tar) + member * 1000)
    assert (target / "a").read_bytes() == b"x"
    with pytest.raises(LayerError, match="pieces"):
        apply(tmp_path / "layer", tar, blob=member * (MAX_FRAMES + 2))


def test_a_sparse_file_counts_with_its_holes(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="more than 1048576 bytes"):
        apply(tmp_path, old_sparse(b"a", [(0, 512)], 1 << 40, b"x" * 512) + END, max_bytes=1 << 20)


def test_directories_by_the_thousand_within_each_other(tmp_path: Path) -> None:
    tar = pax({b"path": b"a/" * 2040}) + header(b"a", 0, b"5") + END
    target = apply(tmp_path, tar)
    with (tmp_path / "out").open("wb") as out:
        assert layer.export_tree(lowers=[str(target)], fds=[out.fileno()])["members"] == 2040
    assert len(scan_layers(directories=[str(target)])["layers"][0]["entries"]) == 2000
    layer.discard(paths=[str(target)])
    assert not target.exists()


@needs_root
def test_a_file_over_a_directory_that_the_layer_made_itself(tmp_path: Path) -> None:
    lower = apply(tmp_path, entry(b"d/", b"", b"5") + entry(b"d/e/", b"", b"5") + END)
    lower.rename(tmp_path / "lower")
    target = apply(tmp_path, entry(b"d/e/f", b"x") + entry(b"d", b"file") + END, lowers=[str(tmp_path / "lower")])
    assert (target / "d").read_bytes() == b"file"
