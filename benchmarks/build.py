"""`make bench-build`: our builder beside BuildKit in Debian's docker.io, medians and ratios from one interleaved run.

    cold      12 steps on busybox, 7 small RUNs, 2,000 small files; nothing of it remembered
    cached    the same again, nothing changed
    changed   one of the 2,000 files has new content
    --large   50,000 files, 1 GB of context into one layer: seconds, CPU seconds, and the peak memory of all processes
              concerned; `--only-large` leaves the others out

Both have the same Dockerfile, the same busybox as base, the same context on the same disk, no network. Ours is measured
as a cell does it (an engine that is open) and as `labkernel build` in a process of its own; BuildKit as `docker build`,
which is how people use it; buildah's own command is the other peer. Read ratios, and quote the machine with them. Run
as root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import Docker, unpacked_busybox

from labkernel.engine import Engine

DOCKERFILE = """\
FROM bench
ENV MODE=lab
WORKDIR /app
COPY deps.txt /app/
RUN mkdir -p /opt/lab && cat /app/deps.txt > /opt/lab/deps
RUN echo one > /opt/one
RUN for i in 1 2 3 4 5 6 7 8; do echo $i > /opt/f$i; done
COPY files /app/files
RUN ls -R /app/files | wc -l > /app/count
RUN rm /opt/f1 && ln -s f2 /opt/link
RUN echo done > /app/done
CMD ["cat", "/app/count"]
"""
LARGE = "FROM bench\nCOPY . /data\n"


class BuildKit(Docker):
    """`docker build` with BuildKit, in the dockerd of `peers`."""

    name = "BuildKit"

    def build(self, context: Path) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [self.client, "-H", self.host, "build", "--network=none", "--progress=plain", "-t", "out", str(context)],
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-800:])
        return took

    def forget(self) -> None:
        self._docker("rmi", "-f", "out")
        done = self._docker("builder", "prune", "-af")
        if done.returncode != 0:
            raise RuntimeError(done.stderr)

    def pids(self) -> list[int]:
        return [self.daemon.pid]


class Buildah:
    """`buildah build --layers` with a store of its own; RUN in a chroot: crun 1.8 cannot start on hybrid cgroups."""

    name = "buildah"

    def __init__(self, rootfs: Path, base: Path) -> None:
        if shutil.which("buildah") is None:
            raise OSError("buildah is not installed")
        store = base / "buildah"
        self._words = ["buildah", "--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "overlay"]
        container = self._run("from", "scratch").strip()
        self._run("copy", "-q", container, str(rootfs), "/")
        self._run("commit", "-q", "--rm", container, "bench")

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._words, *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"buildah {words[0]}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def build(self, context: Path) -> float:
        started = time.perf_counter()
        self._run(
            *("build", "--isolation=chroot", "--layers", "--pull-never", "-q", "-t", "out"),
            str(context),
        )
        return time.perf_counter() - started

    def forget(self) -> None:
        for line in self._run("images", "-a", "--format", "{{.ID}} {{.Name}}").splitlines():
            id, _, name = line.partition(" ")
            if not name.endswith("/bench"):
                subprocess.run([*self._words, "rmi", "-f", id], capture_output=True, check=False)

    def pids(self) -> list[int]:
        return [os.getpid()]  # it is a child of the benchmark while it builds

    def close(self) -> None:
        subprocess.run([*self._words, "rm", "-a"], capture_output=True, check=False)
        subprocess.run([*self._words, "rmi", "-a", "-f"], capture_output=True, check=False)


class Ours:
    """The builder through an open engine, as a notebook has it."""

    name = "labkernel"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.images.resolve("lab/busybox", notify=lambda text: None)
        engine.images.tag("lab/busybox", "bench")

    def build(self, context: Path) -> float:
        text = (context / "Dockerfile").read_text()
        started = time.perf_counter()
        self.engine.builds.build(text, context=context, tags=["out"], network="none")
        return time.perf_counter() - started

    def forget(self) -> None:
        forget(self.engine)

    def pids(self) -> list[int]:
        info = self.engine.runtime.ensure()
        return [os.getpid(), info.pid, info.keeper_pid]


class OursCommand(Ours):
    """`labkernel build` in a process of its own."""

    name = "labkernel build"

    def build(self, context: Path) -> float:
        layout = self.engine.layout
        environment = {
            **os.environ,
            "LABKERNEL_ROOT": str(layout.root),
            "LABKERNEL_RUNTIME_DIR": str(layout.runtime_dir),
            # As pip leaves a package: with its bytecode, which an editable one in a tree may not be given.
            "PYTHONPYCACHEPREFIX": str(layout.root.parent / "bytecode"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        started = time.perf_counter()
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("labkernel")),
                "build",
                "--progress=plain",
                "--network=none",
                "-t",
                "out",
                str(context),
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(done.stdout[-400:] + done.stderr[-400:])
        return took


def forget(engine: Engine) -> None:
    """Everything a build made goes, and the base stays unpacked."""
    for image in engine.images.list():
        if "out:latest" in image.tags:
            engine.images.remove("out", force=True)
    engine.builds.prune()


def make_context(base: Path, *, files: int, bytes_each: int) -> Path:
    """A context with `files` small files in 20 directories."""
    context = base / "context"
    random.seed(4)
    for number in range(files):
        path = context / "files" / f"d{number % 20:02}" / f"f{number:05}.txt"
        if number < 20:
            path.parent.mkdir(parents=True)
        path.write_bytes(random.randbytes(bytes_each // 2).hex().encode())
    (context / "deps.txt").write_text("one\ntwo\n")
    (context / "Dockerfile").write_text(DOCKERFILE)
    return context


def change_one(context: Path, turn: int) -> None:
    (context / "files" / "d07" / "f00007.txt").write_text(f"turn {turn} of {time.time_ns()}\n")


def settle() -> None:
    """What earlier work left to write must not be paid for by whoever comes next."""
    os.sync()
    time.sleep(0.15)


def bench_steps(builders: list[Any], base: Path, runs: int) -> dict[str, dict[str, list[float]]]:
    context = make_context(base, files=2000, bytes_each=600)
    times: dict[str, dict[str, list[float]]] = {b.name: {"cold": [], "cached": [], "changed": []} for b in builders}
    for turn in range(runs + 1):
        change_one(context, turn)
        settle()
        for builder in builders[turn % len(builders) :] + builders[: turn % len(builders)]:
            builder.forget()
            settle()
            cold = builder.build(context)
            settle()
            cached = builder.build(context)
            if turn:  # the first turn warms caches of the machine
                times[builder.name]["cold"].append(cold)
                times[builder.name]["cached"].append(cached)
            # The next one starts cold whatever this one leaves, so the file may change for each in its own way.
            change_one(context, 1000 * turn)
            settle()
            changed = builder.build(context)
            if turn:
                times[builder.name]["changed"].append(changed)
    return times


def report(times: dict[str, dict[str, list[float]]], runs: int) -> None:
    print(f"12 steps, 2,000 files, {runs} runs each, interleaved; median (best … worst) and part of BuildKit's median")
    peer = times.get(BuildKit.name)
    for case in ("cold", "cached", "changed"):
        for name, found in times.items():
            seconds = found[case]
            middle = statistics.median(seconds)
            part = f"   {middle / statistics.median(peer[case]):6.3f}" if peer else ""
            spread = f"({min(seconds) * 1000:.1f} … {max(seconds) * 1000:.1f})"
            print(f"  {case:<8} {name:<16}{middle * 1000:9.1f} ms   {spread:<22}{part}")


class PeakMemory:
    """Peak of the summed resident memory of processes and their descendants, looked at every 50 ms."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0
        self.cpu_s = 0.0  # of the looking itself

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, _family(self._pids))))
            self.cpu_s = time.thread_time()


def cpu_seconds(pids: list[int]) -> float:
    """What processes, their descendants and their reaped children have used (man 5 proc_pid_stat, 14 to 17), and the
    clients that this process has waited for."""
    ticks = 0
    for pid in _family(pids) | {os.getpid()}:
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, words[11:15] if pid in pids or pid != os.getpid() else words[13:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _family(pids: list[int]) -> set[int]:
    found, waiting = set(pids), list(pids)
    while waiting:
        pid = waiting.pop()
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
            children = {int(w) for t in tasks for w in Path(f"/proc/{pid}/task/{t}/children").read_text().split()}
        except OSError:
            continue
        waiting += children - found
        found |= children
    return found


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def bench_large(builders: list[Any], base: Path, *, files: int, total_mb: int, runs: int) -> dict[str, Any]:
    context = base / "large"
    each = total_mb * 1_000_000 // files
    block = random.randbytes(each // 4)
    for number in range(files):
        path = context / f"d{number % 500:03}" / f"f{number:05}"
        if number < 500:
            path.parent.mkdir(parents=True)
        # A quarter cannot be compressed, the rest can: about what source trees and wheels are like.
        path.write_bytes(b"%012d" % number + block + b"labkernel " * ((each - len(block) - 12) // 10))
    (context / "Dockerfile").write_text(LARGE)
    found: dict[str, Any] = {builder.name: {"seconds": [], "cpu_s": [], "peak_mb": []} for builder in builders}
    for _ in range(runs):
        for builder in builders:
            builder.forget()
            settle()
            pids = builder.pids()
            before = cpu_seconds(pids)
            with PeakMemory(pids) as memory:
                found[builder.name]["seconds"].append(builder.build(context))
            used = cpu_seconds(pids) - before - (memory.cpu_s if os.getpid() in pids else 0)
            found[builder.name]["cpu_s"].append(used)
            found[builder.name]["peak_mb"].append(memory.peak_bytes / 1e6)
            builder.forget()
    print(f"{files} files, {total_mb} MB, {runs} runs each, cold")
    for name, figures in found.items():
        middle = statistics.median(figures["seconds"])
        more = f"CPU {statistics.median(figures['cpu_s']):.1f} s   peak {max(figures['peak_mb']):.0f} MB"
        print(f"  {name:<16}{middle:8.2f} s  {total_mb / middle:7.1f} MB/s   {more}")
    return found


def on_fresh_disk(words: list[str]) -> int:
    """Run again on an ext4 with a journal in a file of its own, mounted in a private mount namespace.

    An ext4 without a journal passes over the inodes of files deleted in the last minute, one by one, at each new file:
    after a few thousand deletions a new file costs a millisecond, and a benchmark that starts cold deletes thousands.
    """
    with tempfile.TemporaryDirectory(prefix="lk-bd-", dir="/tmp") as scratch:
        image, mount = f"{scratch}/disk", f"{scratch}/m"
        os.mkdir(mount)
        with open(image, "wb") as file:
            file.truncate(12 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", "-N", "1000000", image], check=True)
        shell = 'mount -o loop "$0" "$1" && shift && exec "$@"'
        again = [sys.executable, __file__, *words, "--dir", mount]
        return subprocess.run(["unshare", "-m", "sh", "-c", shell, image, mount, *again], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="our builder beside BuildKit")
    parser.add_argument("-n", "--runs", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="only ours")
    parser.add_argument("--no-command", action="store_true", help="without `labkernel build` as a process")
    parser.add_argument("--large", action="store_true", help="the large context too")
    parser.add_argument("--only-large", action="store_true", help="the large context alone")
    parser.add_argument("--files", type=int, default=50_000, help="files of the large context")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the large context")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--dir", type=Path, help="work here instead of on a fresh disk image below /tmp")
    options = parser.parse_args()
    if options.dir is None:
        return on_fresh_disk(sys.argv[1:])
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}")
    base = Path(tempfile.mkdtemp(prefix="lk-b-", dir=options.dir))
    figures: dict[str, Any] = {}
    peers: list[Any] = []
    try:
        with Engine.open(base / "root", runtime_dir=base / "run") as engine:
            print(f"driver: {engine.driver.name}")
            try:
                builders: list[Any] = [Ours(engine)]
                if not options.no_command:
                    builders.append(OursCommand(engine))
                rootfs = None if options.no_peer else unpacked_busybox(engine, base)
                for make in (lambda: BuildKit(rootfs[1]), lambda: Buildah(rootfs[0], base)) if rootfs else ():
                    try:
                        peers.append(make())
                    except (OSError, RuntimeError) as err:
                        print(f"  (a peer is left out: {err})")
                builders += peers
                if not options.only_large:
                    figures["steps"] = bench_steps(builders, base, options.runs)
                    report(figures["steps"], options.runs)
                if options.large or options.only_large:
                    large: list[Any] = [builder for builder in builders if type(builder) is not OursCommand]
                    figures["large"] = bench_large(
                        large, base, files=options.files, total_mb=options.megabytes, runs=min(options.runs, 2)
                    )
            finally:
                engine.runtime.shutdown(force=True)
    finally:
        for peer in peers:
            peer.close()
        shutil.rmtree(base, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
