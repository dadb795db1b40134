"""One Dockerfile, every driver: the same file tree, to the last attribute, and the same config."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.engine import Engine
from labkernel.errors import LabkernelError

# man 7 capabilities: VFS_CAP_REVISION_2 | effective, CAP_NET_RAW permitted
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
PLAIN_UID = 23456  # of the fixture plain_user: under the driver proot its number stands for root's
TEXT = f"""FROM lab/busybox
ENV A=1
WORKDIR /w
COPY --chown=33:44 --chmod=4750 file one
COPY --chown=7 tree /w/tree/
ADD archive.tar /a/
RUN ln one hard && ln -s one soft && mkfifo pipe && mkdir -m 2711 setgid && mkdir -m 1777 sticky \
 && dd if=/dev/zero of=sparse bs=1 count=1 seek=1048575 2>/dev/null && touch -d @1234567890 sparse
RUN rm tree/gone && rm -r /home && rm -r tree/replaced && mkdir tree/replaced && echo new > tree/replaced/new
RUN echo more >> /w/tree/kept && mv /a/moved /a/elsewhere
RUN chown 5:6 tree/kept && chown -h 7:8 soft && chown 9:9 pipe && chown -R 11:12 tree/replaced \\
 && chown 13 /a/elsewhere && cd sticky && chgrp 14 . && echo me > mine && chown {PLAIN_UID}:{PLAIN_UID} mine \\
 && echo root > roots && chown 0:0 roots && mv roots ../moved && ln -s x new && chown -h 17 new \\
 && echo closed > ../closed && chmod 0 ../closed && chown 15:16 ../closed
RUN chmod 4755 tree/kept && chown 18 tree/kept && chown 19 tree/kept && chown :20 /w/tree/replaced/new \\
 && cd sticky && rm mine && echo > mine
USER 33:44
CMD ["true"]
"""
SCRIPT = f"""
import labkernel, json, sys
with labkernel.connect(driver=sys.argv[1]) as lab:
    built = lab.builds.build({TEXT!r}, context="ctx", build_args={{"SOURCE_DATE_EPOCH": "1700000000"}})
    with open("out.tar", "wb") as out:
        lab.images.save([built.id], out)
    print(json.dumps(built.image.raw_config))
    lab.runtime.shutdown(force=True)
"""


@pytest.fixture(scope="module")
def context() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lk-x-", dir="/tmp"))
    (path / "tree/replaced").mkdir(parents=True)
    for name in ("file", "tree/gone", "tree/kept", "tree/replaced/old"):
        (path / name).write_text(name)
    (path / "tree/pair").write_text("two names")
    (path / "tree/twin").hardlink_to(path / "tree/pair")
    (path / "tree/link").symlink_to("kept")
    with tarfile.open(path / "archive.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, mode in (("plain", 0o640), ("capable", 0o755), ("moved", 0o604)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.uid, entry.gid, entry.mtime = 4, mode, 1001, 1002, 1_600_000_000
            xattrs = {"SCHILY.xattr.user.note": "kept"} if name == "plain" else {}
            if name == "capable":
                xattrs["SCHILY.xattr.security.capability"] = CAPABILITY.decode("utf-8", "surrogateescape")
            entry.pax_headers = xattrs
            tar.addfile(entry, io.BytesIO(b"data"))
        for name, target in (("plain-link", "plain"), ("second", "plain")):
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.SYMTYPE if name == "plain-link" else tarfile.LNKTYPE
            entry.linkname, entry.mtime = target, 1_600_000_000
            tar.addfile(entry)
        for name, kind in (("owned-link", tarfile.SYMTYPE), ("owned-pipe", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mtime = kind, "plain" if "link" in name else "", 1_600_000_000
            entry.uid, entry.gid = 1003, 1004
            tar.addfile(entry)
    for made in [path, *path.rglob("*")]:
        made.chmod(0o755 if made.is_dir() else 0o644)
    yield path
    shutil.rmtree(path)


def layers_of(path: Path) -> list[dict[str, Any]]:
    """Everything the layers of a saved image say of their members: type, mode, owner, time, link, content, xattrs."""
    with tarfile.open(path) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(name)
            assert member is not None
            return member.read()

        (image,) = json.loads(read("manifest.json"))
        return [_members(read(name)) for name in image["Layers"]]


def _members(layer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        for member in tar:
            data = tar.extractfile(member) if member.isreg() else None
            xattrs = {key: text for key, text in member.pax_headers.items() if key.startswith("SCHILY.xattr.")}
            digest = hashlib.sha256(data.read()).hexdigest() if data is not None else ""
            own = (oct(member.mode), member.uid, member.gid, member.mtime)
            found[member.name] = (member.type, *own, member.linkname, digest, xattrs)
    return found


def merged(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The file system the layers make (image-spec layer.md)."""
    found: dict[str, Any] = {}
    for layer in layers:
        for name in layer:
            folder, _, last = name.rpartition("/")
            hidden = f"{folder}/" if last == ".wh..wh..opq" else f"{folder}/{last[4:]}".lstrip("/")
            if last.startswith(".wh."):
                found = {
                    other: facts
                    for other, facts in found.items()
                    if other != hidden and not other.startswith(f"{hidden.rstrip('/')}/")
                }
        found |= {name: facts for name, facts in layer.items() if "/.wh." not in f"/{name}"}
    return found


def built(engine: Engine, context: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    result = engine.builds.build(TEXT, context=context, build_args={"SOURCE_DATE_EPOCH": "1700000000"})
    with out.open("wb") as file:
        engine.images.save([result.id], file)
    return result.image.raw_config, layers_of(out)


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The layers above the base are equal, one by one."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert {*mine} ^ {*other} == set()
        assert {name: facts for name, facts in mine.items() if facts != other[name]} == {}


@pytest.fixture(scope="module")
def expected(shared_engine: Engine, context: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        return built(shared_engine, context, Path(folder) / "out.tar")


def test_the_tree_is_what_the_dockerfile_says(expected: tuple[Any, list[dict[str, Any]]]) -> None:
    found = merged(expected[1])
    assert found["w/hard"][:4] == (tarfile.REGTYPE, "0o4750", 33, 44)
    assert found["w/tree/kept"][1:4] == ("0o755", 19, 6)  # an owner's change takes the set-user-ID bit away
    assert found["w/one"][0] == tarfile.LNKTYPE
    assert found["w/one"][5] == "w/hard"
    assert found["w/soft"][5] == "one"
    assert found["w/pipe"][0] == tarfile.FIFOTYPE
    assert found["w/tree"][:4] == (tarfile.DIRTYPE, "0o755", 7, 7)
    assert found["w/setgid"][1] == "0o2711"
    assert found["w/sticky"][1] == "0o1777"
    assert found["w/sparse"][4] == 1_234_567_890
    assert found["a/plain"][:5] == (tarfile.REGTYPE, "0o640", 1001, 1002, 1_600_000_000)
    assert found["a/plain"][7] == {"SCHILY.xattr.user.note": "kept"}
    assert found["a/second"][5] == "a/plain"
    # Links and fifos cannot carry a record of their owner on disk.
    assert found["w/tree/link"][2:4] == (7, 7)
    assert found["a/owned-link"][2:4] == found["a/owned-pipe"][2:4] == (1003, 1004)
    raw = found["a/capable"][7]["SCHILY.xattr.security.capability"].encode("utf-8", "surrogateescape")
    assert raw == CAPABILITY
    assert "a/elsewhere" in found
    owners = {"w/soft": (7, 8), "w/pipe": (9, 9), "w/tree/replaced": (11, 12), "a/elsewhere": (13, 1002)}
    owners |= {"w/tree/replaced/new": (11, 20), "w/sticky": (0, 14), "w/sticky/mine": (0, 0), "w/moved": (0, 0)}
    owners |= {"w/closed": (15, 16), "w/sticky/new": (17, 0)}
    assert {name: found[name][2:4] for name in owners} == owners
    for name in ("a/moved", "w/tree/gone", "w/tree/replaced/old", "home"):
        assert name not in found


_CLOSED = """
import labkernel, sys
text = '''FROM lab/busybox
COPY --chmod=600 tree /b
COPY --chmod=640 file /n/m/
RUN cat /b/kept /n/m/file
COPY file /n/m/second
RUN mkdir -p /r/s && echo 1 > /r/s/t && chmod 0 /r/s && chmod 300 /r
COPY file /r/s/u
WORKDIR /r/s/w
RUN stat -c "%n %a" /b /b/replaced /n /n/m /n/m/file /n/m/second /r /r/s /r/s/u > /seen
FROM lab/busybox
COPY --from=0 /seen /seen
COPY --from=0 /b /n /c/
COPY --from=0 --parents /r/s/u /p/
RUN stat -c "%n %a" /c /c/replaced /c/m /c/m/second /p/r /p/r/s /p/r/s/u >> /seen
'''
with labkernel.connect(driver=sys.argv[1]) as lab:
    built = lab.builds.build(text, context="ctx")
    print(lab.containers.run(built.image, ["cat", "/seen"], remove=True).decode())
    lab.runtime.shutdown(force=True)
"""


@pytest.mark.parametrize("driver", ["rootless", "proot"])
def test_directories_that_are_closed_to_their_owner(plain_user: Any, context: Path, driver: str) -> None:
    shutil.copytree(context, plain_user.home / "ctx", symlinks=True)
    done = plain_user.python("-c", _CLOSED, driver)
    if "DriverError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:16] == [
        *("/b 600", "/b/replaced 600", "/n 640", "/n/m 640", "/n/m/file 640", "/n/m/second 644"),
        *("/r 300", "/r/s 0", "/r/s/u 644"),
        *("/c 755", "/c/replaced 600", "/c/m 640", "/c/m/second 644", "/p/r 300", "/p/r/s 0", "/p/r/s/u 644"),
    ]


@pytest.mark.parametrize("driver", ["rootless", "proot"])
def test_another_driver_builds_the_same(
    driver: str, plain_user: Any, context: Path, expected: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    """As a system user without root and without subordinate ids: a single id is mapped, or none at all."""
    tree = shutil.copytree(context, plain_user.home / "ctx", symlinks=True) / "tree"
    (tree / "twin").unlink()  # copytree makes two files of it
    (tree / "twin").hardlink_to(tree / "pair")
    done = plain_user.python("-c", SCRIPT, driver)
    if "DriverError" in done.stderr or "not available" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    found = layers_of(plain_user.home / "out.tar")
    same(found, expected[1])
    config, theirs = json.loads(done.stdout), json.loads(json.dumps(expected[0]))
    for document in (config, theirs):
        # of the base image: when each store made it
        document["history"][0].pop("created", None)
        del document["rootfs"]  # the layers are compared above
    assert config == theirs


@pytest.mark.usefixtures("many_ids")
def test_sparse_files_stay_sparse(shared_engine: Engine, context: Path) -> None:
    result = shared_engine.builds.build(TEXT, context=context, build_args={"SOURCE_DATE_EPOCH": "1700000000"})
    blocks = shared_engine.containers.run(result.id, ["stat", "-c", "%b", "/w/sparse"], remove=True)
    assert int(blocks) < 100


def test_root_in_a_user_namespace_builds_the_same(
    context: Path, tmp_path: Path, expected: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    base = Path(tempfile.mkdtemp(prefix="lk-n-", dir="/tmp"))
    try:
        with Engine.open(base / "root", runtime_dir=base / "run", driver="rootless") as engine:
            try:
                _, found = built(engine, context, tmp_path / "out.tar")
            finally:
                engine.runtime.shutdown(force=True)
    except LabkernelError as err:
        if type(err).__name__ != "DriverError":
            raise
        pytest.skip(err.brief)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    same(found, expected[1])
