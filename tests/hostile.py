"""Some hundred hostile archives through ways into a store: `python hostile.py ROOT RUN OUTSIDE WAY…` tells what came of
each as JSON lines. Run as whoever is to be attacked, with LABKERNEL_DRIVER set.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "oci")]

from registries import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Scripted, digest_of, scripted  # noqa: E402
from test_archive import tar_of  # noqa: E402
from test_hostile import END, REFUSED, bomb, entry, header, pax  # noqa: E402
from test_layer import CONTAINED, HOSTILE  # noqa: E402
from test_tarheaders import extended, old_sparse  # noqa: E402

from labkernel.consistency import check  # noqa: E402
from labkernel.engine import Engine  # noqa: E402
from labkernel.errors import LabkernelError  # noqa: E402

os.environ.setdefault("LABKERNEL_LIMITS", "layer_bytes=64m,layer_members=20000")


def tars(outside: str) -> Iterator[tuple[str, bytes]]:
    """Name and tar of each case."""
    for name, make in HOSTILE.items():
        yield name, make(outside).bytes()
    for name, (contained, _) in CONTAINED.items():
        yield name, contained(outside).bytes()
    for name, tar in REFUSED.items():
        yield name, tar + END
    link = os.fsencode(outside)
    up = b"../" * 30 + link.lstrip(b"/")
    for name, target in {"absolute": link, "relative": up, "proc": b"/proc/self/root" + link}.items():
        to = entry(b"l", b"", b"2", target)
        yield f"{name} link, file through it", to + entry(b"l/new", b"x") + END
        yield f"{name} link, file over a file through it", to + entry(b"l/victim", b"x") + END
        yield f"{name} link, directory through it", to + entry(b"l/d/", b"", b"5") + END
        yield f"{name} link, whiteout through it", to + entry(b"l/.wh.victim") + END
        yield f"{name} link, opaque through it", to + entry(b"l/.wh..wh..opq") + END
        yield f"{name} link, hard link through it", to + entry(b"h", b"", b"1", b"l/victim") + END
        yield f"{name} link, hard link to it", to + entry(b"h", b"", b"1", b"l") + entry(b"h/new", b"x") + END
        yield f"{name} link, link through it", to + entry(b"l/s", b"", b"2", b"victim") + END
        yield f"{name} link, mode through it", to + header(b"l/", 0, b"5", mode=b"0000000\0") + END
        yield f"{name} link, pipe through it", to + header(b"l/pipe", 0, b"6") + END
        yield f"{name} link, twice", to + entry(b"l", b"", b"2", b"l/victim") + entry(b"l", b"x") + END
        yield f"{name} link of a link", to + entry(b"m", b"", b"2", b"l") + entry(b"m/new", b"x") + END
    yield "whiteout of the root", entry(b".wh..") + END
    yield "whiteout as a directory", entry(b".wh.a/", b"", b"5") + END
    yield "whiteout as a link", entry(b".wh.a", b"", b"2", link) + END
    yield "device 0:0", header(b"a", 0, b"3", device=b"0000000\x000000000\0") + END
    yield "a disk", header(b"disk", 0, b"4", device=b"0000010\x000000000\0") + END
    yield "device beyond", header(b"a", 0, b"3", device=b"\x80" + b"\xff" * 7 + b"0000000\0") + END
    yield "setuid everything", header(b"s", 0, b"0", mode=b"0007777\0") + END
    yield "root without permissions", header(b"./", 0, b"5", mode=b"0000000\0") + entry(b"x", b"x") + END
    other = bytearray(header(b"./", 0, b"5"))
    other[108:124] = b"0000005\0" * 2
    other[148:156] = b"%06o\0 " % (sum(other[:148]) + 256 + sum(other[156:]))
    yield "root of another owner", bytes(other) + entry(b"x", b"x") + END
    yield "directory closed before its files", header(b"d/", 0, b"5", mode=b"0000000\0") + entry(b"d/x", b"x") + END
    yield "deep", pax({b"path": b"a/" * 2040}) + header(b"x", 0, b"5") + END
    yield "deeper by links", (
        pax({b"path": b"a/" * 1900}) + header(b"x", 0, b"5") + pax({b"linkpath": b"a/" * 1900})
        + header(b"l", 0, b"2") + pax({b"path": b"l/" + b"b/" * 1900}) + header(b"x", 0, b"5") + END
    )  # fmt: skip
    yield "extended headers in a row", extended(b"12 comment=\n") * 500 + entry(b"a") + END
    yield "long names in a row", extended(b"n\0", b"L") * 500 + entry(b"a") + END
    yield (
        "global headers",
        b"".join(extended(b"999990 k=" + b"v" * 999_980 + b"\n", b"g") for _ in range(20)) + entry(b"a") + END,
    )
    yield "digits", extended(b"9" * 1_000_000) + entry(b"a") + END
    yield "sparse map without end", old_sparse(20_000) + END
    yield "many members", b"".join(entry(b"%d" % number) for number in range(20_001)) + END
    yield "many links to one file", entry(b"f", b"x") + b"".join(
        entry(b"h%d" % number, b"", b"1", b"f") for number in range(70_000 // 4)
    ) + END  # fmt: skip
    yield "xattr of nonsense", pax({b"SCHILY.xattr.": b"x", b"SCHILY.xattr.nonsense": b"x"}) + entry(b"a") + END
    yield "xattr too long", pax({b"SCHILY.xattr.user.x": b"x" * 100_000}) + entry(b"a") + END
    yield "capability of nonsense", pax({b"SCHILY.xattr.security.capability": b"nonsense"}) + entry(b"a") + END
    yield "no end", entry(b"a", b"x")
    yield "nothing", b""
    yield "zeros", bytes(10240)
    yield "noise", os.urandom(4096)
    yield "a directory's file", entry(b"d/e/f", b"x") + entry(b"d", b"x") + END


def blobs(outside: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, compressed layer and tar of each case, those with bad compression too."""
    for name, tar in tars(outside):
        yield name, gzip.compress(tar, 1), tar
    good = entry(b"a", b"x" * 5000) + END
    packed = gzip.compress(good)
    yield "gzip cut short", packed[:-9], good
    yield "gzip with junk", packed + b"junk", good
    yield "gzip with a wrong checksum", packed[:-8] + bytes(8), good
    yield "gzip header only", packed[:10], good
    yield "gzip of gzip", gzip.compress(packed), good
    yield "gzip members without end", gzip.compress(b"", mtime=0) * 200_000, b""
    yield "gzip bomb", bomb(128 << 20), b""
    yield "gzip bomb of a bomb", zlib.compress(bomb(64 << 20)), b""
    yield "zstd of a huge window", b"\x28\xb5\x2f\xfd\x00\xf8\x01\x00\x00", b""
    yield "bzip2", b"BZh91AY&SY" + bytes(100), b""
    yield "xz of a huge dictionary", b"\xfd7zXZ\0\0\4\xe6\xd6\xb4F\2\0!\1(\0\0\0" + bytes(50), b""
    yield "diff ID of something else", packed, good + b"x"


def described(blob: bytes, tar: bytes) -> tuple[bytes, bytes]:
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(tar)]}}
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": OCI_LAYER, "digest": digest_of(blob), "size": len(blob)}],
    }
    return config, json.dumps(manifest).encode()


def ways(engine: Engine, fake: Scripted, blob: bytes, tar: bytes) -> dict[str, Callable[[], Any]]:
    config, manifest = described(blob, tar)
    listed = json.dumps([{"Config": "c.json", "Layers": ["l.tar"], "RepoTags": ["hostile:load"]}]).encode()

    def load() -> None:
        archive = tar_of({"c.json": config, "l.tar": blob, "manifest.json": listed})
        (image,) = engine.images.load(io.BytesIO(archive))
        engine.images.layer_dirs(image)

    def pull() -> None:
        fake.blobs = {digest_of(blob): blob, digest_of(config): config}
        fake.document("latest", manifest, OCI_MANIFEST)
        engine.pulls.pull(f"{fake.domain}/hostile")

    return {"import": lambda: engine.images.import_tar(io.BytesIO(blob), "hostile"), "load": load, "pull": pull}


def main(root: str, run: str, outside: str, *chosen: str) -> None:
    engine = Engine.open(Path(root), runtime_dir=Path(run))
    with scripted() as fake:
        for number, (name, blob, tar) in enumerate(blobs(outside)):
            # Each is pulled; the other two ways take turns, which halves their time.
            turn = {"pull", ("import", "load")[number % 2]}
            for way, call in ways(engine, fake, blob, tar).items():
                if way not in chosen or way not in turn:
                    continue
                started = time.process_time()
                try:
                    call()
                    said = "taken"
                except LabkernelError as err:
                    said = f"{type(err).__name__}: {err.brief}"
                except Exception as err:
                    said = f"BUG {type(err).__name__}: {err}"
                for image in engine.images.list(all=True):
                    engine.images.remove(image.id, force=True)
                left = [*os.listdir(engine.layout.tmp), *os.listdir(engine.layout.layers), *engine.images.blobs]
                took = time.process_time() - started
                print(json.dumps({"name": name, "way": way, "said": said, "left": left, "cpu_s": took}))
    problems = [str(problem) for problem in check(engine, verify=True)]
    # Not getrusage: that still counts what the parent had when it forked. Of those who unpack see oci/test_hostile.py.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"driver": engine.driver.name, "problems": problems, "peak_kib": peak}))
    engine.runtime.shutdown(force=True)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
