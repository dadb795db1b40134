"""Layers there and back on a real file system: what a tar says becomes an overlay directory, and the same tar again."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import LayerError
from labkernel.oci import layer
from labkernel.oci.ownership import OWNER_XATTR

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="devices, owners and whiteouts need root (or a namespace)")

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep, revision 2


class Tar:
    """A tar made member by member, with the things tarfile would not write by itself."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.tar = tarfile.TarFile(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> Tar:
        member = tarfile.TarInfo(name)
        member.type = kind
        member.size = len(data)
        member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        for key, value in fields.items():
            setattr(member, key, value)
        self.tar.addfile(member, io.BytesIO(data))
        return self

    def dir(self, name: str, **fields: Any) -> Tar:
        return self.add(name, kind=tarfile.DIRTYPE, **fields)

    def link(self, name: str, to: str, **fields: Any) -> Tar:
        return self.add(name, kind=tarfile.SYMTYPE, linkname=to, **fields)

    def hard(self, name: str, to: str) -> Tar:
        return self.add(name, kind=tarfile.LNKTYPE, linkname=to)

    def bytes(self) -> bytes:
        self.tar.close()
        return self.buffer.getvalue()


def apply(tmp_path: Path, tar: bytes, *, name: str = "layer", blob: bytes | None = None, **more: Any) -> Path:
    path = tmp_path / f"{name}.blob"
    path.write_bytes(gzip.compress(tar, 1) if blob is None else blob)
    target = tmp_path / name
    layer.apply_layer(blob=str(path), target=str(target), diff_id=f"sha256:{hashlib.sha256(tar).hexdigest()}", **more)
    return target


def diff(tmp_path: Path, upper: Path, **more: Any) -> tuple[dict[str, Any], dict[str, tarfile.TarInfo], bytes]:
    blob = tmp_path / "out.blob"
    result = layer.diff_layer(upper=str(upper), blob_tmp=str(blob), **more)
    data = blob.read_bytes()
    assert result["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert result["blob_bytes"] == len(data)
    plain = gzip.decompress(data)
    assert result["diff_id"] == f"sha256:{hashlib.sha256(plain).hexdigest()}"
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return result, {member.name: member for member in tar.getmembers()}, plain


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(name for name in os.listdir(tmp_path) if ".new-" in name)


@needs_root
def test_attributes_are_kept_exactly_and_come_back(tmp_path: Path) -> None:
    xattrs = {"SCHILY.xattr.user.colour": "blue", "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8")}
    tar = (
        Tar()
        .dir("bin", mode=0o2775, uid=3, gid=4, mtime=1_000_000)
        .add(
            "bin/su",
            b"x" * 1000,
            mode=0o4755,
            uid=5,
            gid=70000,
            mtime=12,
            pax_headers={"mtime": "12.000000345"} | xattrs,
        )
        .link("bin/sh", "/bin/su", uid=7, mtime=99)
        .hard("bin/su2", "bin/su")
        .add("pipe", kind=tarfile.FIFOTYPE, mode=0o600)
        .add("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        .add("caf\udce9", b"latin")
        .add("long/" * 30 + "name", b"deep")
        .bytes()
    )
    target = apply(tmp_path, tar)
    su = os.stat(target / "bin/su")
    assert stat.S_IMODE(su.st_mode) == 0o4755
    assert (su.st_uid, su.st_gid, su.st_mtime_ns, su.st_nlink) == (5, 70000, 12_000_000_345, 2)
    assert os.getxattr(target / "bin/su", "security.capability") == CAPABILITY
    assert os.stat(target / "bin").st_mtime_ns == 1_000_000 * 10**9
    assert os.lstat(target / "bin/sh").st_uid == 7
    assert os.stat(target / "null").st_rdev == os.makedev(1, 3)
    assert (target / "caf\udce9").read_bytes() == b"latin"

    first, members, _ = diff(tmp_path, target)
    assert members["bin/su"].mtime == pytest.approx(12.000000345)
    assert members["bin/su"].pax_headers["SCHILY.xattr.user.colour"] == "blue"
    assert (members["bin/su2"].type, members["bin/su2"].linkname) == (tarfile.LNKTYPE, "bin/su")
    assert members["bin"].mode == 0o2775
    assert (members["null"].devmajor, members["null"].devminor) == (1, 3)
    again = tmp_path / "again"
    layer.apply_layer(blob=str(tmp_path / "out.blob"), target=str(again), diff_id=first["diff_id"])
    # parents the first tar did not describe got the time of unpacking; the second describes all
    assert layer.diff_layer(upper=str(again), blob_tmp=str(tmp_path / "b2"))["diff_id"] == first["diff_id"]


@needs_root
def test_whiteouts_take_overlays_form_and_never_hide_the_layers_own_files(tmp_path: Path) -> None:
    tar = (
        Tar()
        .add("etc/.wh.gone")
        .add("kept", b"new")
        .add(".wh.kept")
        .add(".wh.dir")
        .add("dir/inside", b"x")
        .add("all/.wh..wh..opq")
        .add("all/new", b"x")
        .add(".wh..wh.plnk")
        .bytes()
    )
    target = apply(tmp_path, tar)
    gone = os.lstat(target / "etc/gone")
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert (target / "kept").read_bytes() == b"new"
    assert os.getxattr(target / "dir", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(target / "all", "trusted.overlay.opaque") == b"y"
    assert sorted(os.listdir(target)) == ["all", "dir", "etc", "kept"]
    _, members, _ = diff(tmp_path, target)
    assert list(members) == [
        "all",
        "all/.wh..wh..opq",
        "all/new",
        "dir",
        "dir/.wh..wh..opq",
        "dir/inside",
        "etc",
        "etc/.wh.gone",
        "kept",
    ]


def test_holes_stay_holes(tmp_path: Path) -> None:
    tar = Tar().add("disk", b"a" + bytes((8 << 20) - 2) + b"z").bytes()
    target = apply(tmp_path, tar)
    assert os.stat(target / "disk").st_blocks * 512 < 1 << 20
    result, members, plain = diff(tmp_path, target)
    assert len(plain) < 1 << 20
    assert members["disk"].size == 8 << 20
    again = tmp_path / "again"
    layer.apply_layer(blob=str(tmp_path / "out.blob"), target=str(again), diff_id=result["diff_id"])
    assert (again / "disk").read_bytes() == (target / "disk").read_bytes()
    assert os.stat(again / "disk").st_blocks * 512 < 1 << 20


def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir(exist_ok=True)
    (path / "victim").write_text("untouched")
    return path


HOSTILE: dict[str, Callable[[str], Tar]] = {
    "dot-dot": lambda out: Tar().add("../outside/victim", b"x"),
    "dot-dot inside": lambda out: Tar().add("a/../../outside/victim", b"x"),
    "hard link out": lambda out: Tar().hard("mine", "../outside/victim"),
    "hard link by absolute name": lambda out: Tar().hard("mine", f"{out}/victim"),
    "hard link through symlink": lambda out: Tar().link("s", out).hard("mine", "s/victim"),
    "hard link to directory": lambda out: Tar().dir("d").hard("mine", "d"),
    "hard link to missing": lambda out: Tar().hard("mine", "nothing"),
    "hard link to itself": lambda out: Tar().hard("mine", "mine"),
    "whiteout of dot-dot": lambda out: Tar().add(".wh..."),
    "whiteout of dot": lambda out: Tar().add("d/.wh.."),
    "whiteout of nothing": lambda out: Tar().add(".wh."),
    "below a whiteout": lambda out: Tar().add(".wh.a/b", b"x"),
    "below a file": lambda out: Tar().add("a", b"x").add("a/b", b"x"),
    "link loop as parent": lambda out: Tar().link("a", "b").link("b", "a").add("a/x", b"x"),
    "root as a file": lambda out: Tar().add("./", b"x"),
    "name too long": lambda out: Tar().add("n" * 300, b"x"),
    "path too long": lambda out: Tar().add("dir/" * 2000 + "x", b"x"),
    "huge pax header": lambda out: Tar().add("a", b"x", pax_headers={"comment": "c" * (2 << 20)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused_and_leave_nothing(tmp_path: Path, name: str) -> None:
    out = outside(tmp_path)
    with pytest.raises(LayerError):
        apply(tmp_path, HOSTILE[name](str(out)).bytes())
    assert (out / "victim").read_text() == "untouched"
    assert os.listdir(out) == ["victim"]
    assert not (tmp_path / "layer").exists()
    assert leftovers(tmp_path) == []


CONTAINED: dict[str, tuple[Callable[[str], Tar], str]] = {
    "absolute name": (lambda out: Tar().add(f"{out}/new", b"x"), "{out}/new"),
    "through absolute symlink": (lambda out: Tar().link("s", out).add("s/new", b"x"), "{out}/new"),
    "through relative symlink": (lambda out: Tar().link("s", "../../../../t").add("s/new", b"x"), "t/new"),
    "over a symlink": (lambda out: Tar().link("s", f"{out}/victim").add("s", b"x"), "s"),
    "directory over a symlink": (lambda out: Tar().link("s", out).dir("s").add("s/new", b"x"), "s/new"),
    "file over a directory": (lambda out: Tar().add("d/e/f", b"1").add("d", b"x"), "d"),
}


@pytest.mark.parametrize("name", CONTAINED)
def test_tricks_with_links_stay_inside(tmp_path: Path, name: str) -> None:
    out = outside(tmp_path)
    make, where = CONTAINED[name]
    target = apply(tmp_path, make(str(out)).bytes())
    assert (target / where.format(out=str(out).lstrip("/"))).read_bytes() == b"x"
    assert os.listdir(out) == ["victim"]
    assert (out / "victim").read_text() == "untouched"


def test_xattrs_with_a_meaning_for_overlay_are_left_out(tmp_path: Path) -> None:
    headers = {
        "SCHILY.xattr.user.overlay.redirect": "/etc",
        f"SCHILY.xattr.{OWNER_XATTR}": "0:0",
        "SCHILY.xattr.user.x": "1",
    }
    tar = (
        Tar()
        .add("f", b"x", pax_headers=headers, uid=os.geteuid(), gid=os.getegid())
        .add("zero", kind=tarfile.CHRTYPE, devmajor=0, devminor=0)
    )
    target = apply(tmp_path, tar.bytes())
    assert os.listxattr(target / "f") == ["user.x"]
    assert os.listdir(target) == ["f"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda tar: gzip.compress(tar)[:-20], "ends too early"),
        (lambda tar: gzip.compress(tar) + b"junk", "follows the end"),
        (lambda tar: b"\x1f\x8b" + tar, "decompress"),
        (lambda tar: tar[:700], "broken|ends inside|unexpected end"),
        (lambda tar: tar[:1024] + b"garbage!" * 64 + tar[1536:], "broken"),
        (lambda tar: gzip.compress(Tar().add("other").bytes()), "its config says"),
    ],
)
def test_damaged_blobs_are_refused(tmp_path: Path, make: Callable[[bytes], bytes], why: str) -> None:
    tar = Tar().add("a", b"x" * 300).add("b", b"y" * 300).bytes()
    with pytest.raises(LayerError, match=why):
        apply(tmp_path, tar, blob=make(tar))
    assert leftovers(tmp_path) == []


def test_limits_stop_a_bomb(tmp_path: Path) -> None:
    tar = Tar().add("zeros", bytes(5 << 20)).add("b").bytes()
    with pytest.raises(LayerError, match="more than"):
        apply(tmp_path, tar, max_bytes=1 << 20)
    with pytest.raises(LayerError, match="more than 1 members"):
        apply(tmp_path, tar, max_members=1)


def test_every_compression_and_several_gzip_members(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd")
    tar = Tar().add("a", os.urandom(3 << 20)).bytes()
    half = len(tar) // 2
    for name, blob in {
        "plain": tar,
        "gzip": gzip.compress(tar),
        "two": gzip.compress(tar[:half]) + gzip.compress(tar[half:]) + bytes(100),
        "zstd": zstd.compress(tar),
    }.items():
        assert (apply(tmp_path, tar, name=name, blob=blob) / "a").stat().st_size == 3 << 20
    assert os.listdir(apply(tmp_path, b"", name="empty", blob=b"")) == []


def test_an_empty_upper_is_an_empty_layer_and_becomes_the_layer(tmp_path: Path) -> None:
    upper, layers = tmp_path / "upper", tmp_path / "layers"
    upper.mkdir()
    layers.mkdir()
    result, members, plain = diff(tmp_path, upper, layers=str(layers))
    assert members == {}
    assert plain == bytes(1024)
    assert os.listdir(layers) == [result["diff_id"].partition(":")[2]]
    assert not upper.exists()
    upper.mkdir()  # the same once more: the layer is there, the upper directory goes
    diff(tmp_path, upper, layers=str(layers))
    assert not upper.exists()


def test_mount_points_nobody_used_leave_no_trace(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "dev").mkdir(parents=True)
    (upper / "etc").mkdir()
    (upper / "etc/resolv.conf").touch()
    (upper / "etc/hosts").write_text("mine")
    _, members, _ = diff(tmp_path, upper, stubs=["/dev", "/etc/resolv.conf", "/etc/hosts", "/proc"])
    assert list(members) == ["etc", "etc/hosts"]


@needs_root
def test_export_merges_as_overlay_does(tmp_path: Path) -> None:
    bottom = apply(
        tmp_path,
        Tar().add("a", b"1").add("d/x", b"1").add("d/y", b"1").add("e/z", b"1").add("f/g", b"1").bytes(),
        name="bottom",
    )
    top = apply(
        tmp_path,
        Tar().add(".wh.a").add("d/.wh.x").add("e/.wh..wh..opq").add("e/n", b"2").add("f", b"2").bytes(),
        name="top",
    )
    out = tmp_path / "out.tar"
    with out.open("wb") as stream:
        layer.export_tree(lowers=[str(top), str(bottom)], fds=[stream.fileno()])
    with tarfile.open(out) as tar:
        assert tar.getnames() == ["d", "d/y", "e", "e/n", "f"]


def test_recorded_owners_are_given_back(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    (upper / "f").touch()
    (upper / "dev").touch()
    os.setxattr(upper / "f", OWNER_XATTR, b"33:44")
    os.setxattr(upper / "dev", OWNER_XATTR, b"0:5:c:4:1")
    _, members, _ = diff(tmp_path, upper)
    assert (members["f"].uid, members["f"].gid, members["f"].pax_headers) == (33, 44, members["f"].pax_headers)
    assert not any("labkernel" in key for key in members["f"].pax_headers)
    assert (members["dev"].type, members["dev"].devmajor, members["dev"].devminor) == (tarfile.CHRTYPE, 4, 1)
