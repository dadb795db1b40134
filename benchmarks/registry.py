"""Pulls, pushes and loads beside skopeo, docker and podman on a loopback registry: medians, ratios, our peak memory.

    python benchmarks/registry.py [--runs N] [--work DIR] [--disk] [--json FILE]

The registry is Debian's docker-registry on a free port of 127.0.0.1. The image is of directories of this machine: a
Debian with Python in six layers (some 200 MB compressed; `--small` about half). Rounds are interleaved, so that what
else the machine does falls on all. Whole commands are timed, process start included, for the peers and for us; `in
process` is what a notebook sees. Stores lie below --work: on a file system where making a file is slow, that is all one
measures. `--disk` makes one for the purpose, an ext4 with a journal in a file (root only). An ext4 without a journal
passes over each inode number that was freed within the last minutes (find_inode_bit in the kernel's fs/ext4/ialloc.c),
and images are removed between rounds: making a file then costs ten times as much, for all alike.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from labkernel.engine import Engine

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
SOURCES = (
    ("/usr/bin", "/usr/sbin"),
    ("/usr/lib/python3.11", "/usr/lib/python3"),
    ("/usr/lib/x86_64-linux-gnu/perl", "/usr/share/perl"),
    ("/usr/share/doc", "/usr/share/zoneinfo"),
    ("/usr/include",),
    ("/usr/lib/git-core", "/usr/share/vim", "/usr/lib/ssl"),
)


def make_image(layout: Path, limit: int) -> int:
    """Write the image as an OCI layout; returns its compressed bytes."""
    (layout / "blobs/sha256").mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        encoded = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / encoded).write_bytes(data)
        return {"digest": f"sha256:{encoded}", "size": len(data)}

    layers, diff_ids = [], []
    for places in SOURCES:
        path = layout / "layer.tar"
        pack(path, places, limit)
        raw = path.read_bytes()
        path.unlink()
        diff_ids.append(f"sha256:{hashlib.sha256(raw).hexdigest()}")
        layers.append({"mediaType": LAYER, **put(gzip.compress(raw, 6, mtime=0))})
    document = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["bash"]}}
    document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    config = {"mediaType": CONFIG, **put(json.dumps(document).encode())}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
    entry = {"mediaType": MANIFEST, **put(json.dumps(manifest).encode())}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return sum(int(layer["size"]) for layer in layers)


def in_a_child(layout: Path, limit: int) -> int:
    """`make_image` elsewhere: a command's peak memory counts what its parent had when it forked."""
    pid = os.fork()
    if pid == 0:
        try:
            make_image(layout, limit)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit("the image could not be made")
    return sum(path.stat().st_size for path in (layout / "blobs/sha256").iterdir())


def pack(path: Path, places: tuple[str, ...], limit: int) -> None:
    taken = 0

    def choose(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal taken
        if member.islnk() or not (member.isreg() or member.isdir() or member.issym()):
            return None
        taken += member.size
        return member if taken <= limit else None

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("usr", "usr/lib", "usr/share"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for place in places:
            if os.path.isdir(place):
                tar.add(place, filter=choose)


@contextmanager
def registry(work: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        domain = f"127.0.0.1:{probe.getsockname()[1]}"
    config = work / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {work}/registry}}}}\nhttp: {{addr: '{domain}'}}\n"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(config)],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", int(domain.rpartition(":")[2]))).close()
                break
            except OSError:
                time.sleep(0.05)
        yield domain
    finally:
        process.terminate()
        process.wait()


def command(*argv: str, env: dict[str, str] | None = None) -> tuple[float, int]:
    """(seconds, peak KiB of the process alone) of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - started
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed: {said[-500:]}")
    return took, usage.ru_maxrss


class Bench:
    """The image in a registry, our store beside it, and the peers that are here."""

    def __init__(self, work: Path, runroot: Path, layout: Path, domain: str, stack: ExitStack) -> None:
        self.work, self.layout, self.domain = work, layout, domain
        self.name = f"{domain}/bench/python:latest"
        self.env = {
            **os.environ,
            "LABKERNEL_ROOT": str(work / "root"),
            "LABKERNEL_RUNTIME_DIR": str(work / "run"),
        }
        self.podman = ["podman", f"--root={work}/podman", f"--runroot={runroot}"]
        self.cli = [sys.executable, "-m", "labkernel.cli"]
        self.peak_kib = 0
        self.count = 0
        self.engine = Engine.open(work / "root", runtime_dir=work / "run")
        stack.callback(self.engine.close)
        stack.callback(self.engine.runtime.shutdown, force=True)
        self.engine.runtime.ensure()
        self.docker = self._docker(stack)

    def _docker(self, stack: ExitStack) -> Any:
        from peers import Docker, unpacked_busybox

        try:
            self.engine.images.resolve("lab/busybox")
            target = self.work / "busybox"
            target.mkdir()
            _, tar = unpacked_busybox(self.engine, target)
            docker = Docker(tar)
        except (OSError, RuntimeError) as err:
            print(f"  (docker left out: {err})")
            return None
        stack.callback(docker.close)
        return docker

    def _ours(self, *words: str) -> float:
        took, peak = command(*self.cli, *words, env=self.env)
        self.peak_kib = max(self.peak_kib, peak)
        return took

    def forget(self) -> None:
        for image in self.engine.images.list():
            for tag in image.tags:
                if tag.startswith(self.domain):
                    self.engine.images.remove(tag)

    def fetch(self) -> dict[str, Callable[[], float]]:
        def skopeo() -> float:
            target = self.work / "fetched"
            shutil.rmtree(target, ignore_errors=True)
            return command("skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{self.name}", f"dir:{target}")[
                0
            ]

        def ours() -> float:
            self.forget()
            return self._ours("pull", "-q", "--no-unpack", self.name)

        return {"skopeo": skopeo, "labkernel": ours, "labkernel in process": lambda: self.inside(unpack=False)}

    def inside(self, *, unpack: bool) -> float:
        self.forget()
        started = time.perf_counter()
        self.engine.pulls.pull(self.name, unpack=unpack)
        return time.perf_counter() - started

    def pull(self) -> dict[str, Callable[[], float]]:
        def ours() -> float:
            self.forget()
            return self._ours("pull", "-q", self.name)

        def docker() -> float:
            self.docker._docker("rmi", "-f", self.name)
            return command(self.docker.client, "-H", self.docker.host, "pull", "-q", self.name)[0]

        def podman() -> float:
            subprocess.run([*self.podman, "rmi", "-af"], capture_output=True, check=False)
            return command(*self.podman, "pull", "-q", "--tls-verify=false", self.name)[0]

        rows = {"labkernel": ours, "labkernel in process": lambda: self.inside(unpack=True)}
        if shutil.which("podman"):
            rows = {"podman": podman, **rows}
        return {"docker": docker, **rows} if self.docker else rows

    def again(self) -> dict[str, Callable[[], float]]:
        def inside() -> float:
            started = time.perf_counter()
            self.engine.pulls.pull(self.name)
            return time.perf_counter() - started

        rows: dict[str, Callable[[], float]] = {"labkernel": lambda: self._ours("pull", "-q", self.name)}
        if self.docker:
            rows["docker"] = lambda: command(self.docker.client, "-H", self.docker.host, "pull", "-q", self.name)[0]
        return {**rows, "labkernel in process": inside}

    def push(self) -> dict[str, Callable[[], float]]:
        def fresh() -> str:
            # A registry that has the blobs is sent none: each push is to an empty one.
            self.count += 1
            for path in (self.work / "registry").glob("docker/registry/v2/*"):
                shutil.rmtree(path)
            return f"{self.domain}/pushed/n{self.count}:latest"

        def skopeo() -> float:
            name = fresh()
            return command(
                "skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{self.layout}:latest", f"docker://{name}"
            )[0]

        def ours() -> float:
            name = fresh()
            self.engine.images.tag(self.name, name)
            return self._ours("push", "-q", name)

        return {"skopeo": skopeo, "labkernel": ours}

    def load(self) -> dict[str, Callable[[], float]]:
        """A docker-archive of the image, as skopeo writes it (uncompressed layers)."""
        archive = self.work / "archive.tar"
        command("skopeo", "copy", "-q", f"oci:{self.layout}:latest", f"docker-archive:{archive}:{self.name}")

        def ours() -> float:
            self.forget()
            return self._ours("load", "-q", "-i", str(archive))

        def unpacked() -> float:
            # docker and podman unpack while they load; so this is what their loads compare to.
            self.forget()
            started = time.perf_counter()
            (image,) = self.engine.images.load(archive)
            self.engine.images.layer_dirs(image)
            return time.perf_counter() - started

        def docker() -> float:
            self.docker._docker("rmi", "-f", self.name)
            return command(self.docker.client, "-H", self.docker.host, "load", "-q", "-i", str(archive))[0]

        def podman() -> float:
            subprocess.run([*self.podman, "rmi", "-af"], capture_output=True, check=False)
            return command(*self.podman, "load", "-q", "-i", str(archive))[0]

        rows = {"labkernel": ours, "labkernel, unpacked": unpacked}
        if shutil.which("podman"):
            rows = {"podman": podman, **rows}
        return {"docker": docker, **rows} if self.docker else rows

    def measure(self, title: str, rows: dict[str, Callable[[], float]], runs: int) -> dict[str, Any]:
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(runs):
            for name, run in rows.items():
                times[name].append(run())
        medians = {name: statistics.median(each) for name, each in times.items()}
        print(title)
        peers = [medians[name] for name in medians if not name.startswith("labkernel")]
        for name, each in times.items():
            ratio = f"{medians[name] / min(peers):7.2f} x" if peers and name.startswith("labkernel") else ""
            print(f"  {name:<24}{medians[name]:8.3f} s   ({min(each):.3f} … {max(each):.3f}){ratio}")
        return medians


@contextmanager
def own_disk(work: Path) -> Iterator[Path]:
    """A new ext4 with a journal, in a file below `work`."""
    image, place = work / "disk.img", work / "disk"
    with image.open("wb") as file:
        file.truncate(40 << 30)  # a hole: it takes what is written
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        # podman leaves its storage mounted on itself.
        subprocess.run(["umount", place / "podman/overlay"], capture_output=True, check=False)
        subprocess.run(["umount", place], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="directory for image, registry and stores (default: a new one)")
    parser.add_argument("--small", action="store_true", help="about half the bytes")
    parser.add_argument(
        "--disk", action="store_true", help="stores on a new ext4 with a journal, in a file (root only)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for needed in ("docker-registry", "skopeo"):
        if shutil.which(needed) is None:
            sys.exit(f"{needed} is not installed: apt-get install docker-registry skopeo")
    # podman's must be short, wherever the rest is.
    runroot = Path(tempfile.mkdtemp(prefix="lk-"))
    top = work = Path(tempfile.mkdtemp(prefix="bench-registry-", dir=args.work))
    try:
        with ExitStack() as stack:
            if args.disk:
                work = stack.enter_context(own_disk(top))
            # Docker's directory too: stores on different file systems cannot be compared.
            tempfile.tempdir = str(work)
            layout = work / "layout"
            size = in_a_child(layout, 60_000_000 if args.small else 130_000_000)
            print(f"image: {size / 1e6:.0f} MB compressed, {len(SOURCES)} layers; stores in {work}")
            domain = stack.enter_context(registry(work))
            bench = Bench(work, runroot, layout, domain, stack)
            command("skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{bench.name}")
            found = {
                "fetch": bench.measure("fetch without unpacking", bench.fetch(), args.runs),
                "pull": bench.measure("pull to a runnable root file system", bench.pull(), args.runs),
                "again": bench.measure("pull of what is there", bench.again(), args.runs),
                "push": bench.measure("push of stored blobs to an empty registry", bench.push(), args.runs),
                "load": bench.measure("load of a docker-archive", bench.load(), args.runs),
            }
            load = " ".join(f"{each:.1f}" for each in os.getloadavg())
            print(f"peak memory of our commands: {bench.peak_kib / 1024:.0f} MiB (the process alone); load {load}")
            if args.json:
                args.json.write_text(json.dumps({**found, "peak_kib": bench.peak_kib, "bytes": size}, indent=1))
    finally:
        # podman leaves its storage mounted on itself.
        subprocess.run(["umount", f"{work}/podman/overlay"], capture_output=True, check=False)
        shutil.rmtree(top, ignore_errors=True)
        shutil.rmtree(runroot, ignore_errors=True)


if __name__ == "__main__":
    main()
