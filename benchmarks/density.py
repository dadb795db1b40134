"""`make bench-density`: many containers at once, and exec, beside Docker and Podman.

    start     how many `run -d` of a sleeping container a second
    memory    what the engine itself holds for each (PSS of its processes; the container's own is the same everywhere)
    kernel    what the kernel holds for each: slab, per-CPU memory, page tables, stacks (of the whole machine, so a busy
              one makes it wrong)
    ps        listing all of them; one reading of the figures of all of them
    exec      `true` in a running container

Nothing here is a test: read ratios, and quote the machine with them. Run as root; a peer that is missing is named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import Docker, unpacked_busybox

from labkernel.engine import Engine
from labkernel.metrics import reader_for

SLEEP = ["sleep", "100000"]


def pss_of(words: str) -> int:
    """Bytes of the processes whose command line has `words` (man 5 proc_pid_smaps, Pss)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(words) in (process / "cmdline").read_bytes().replace(b"\0", b" "):
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def kernel_bytes() -> int:
    """What the kernel holds for itself (man 5 proc_meminfo); what it can give back at once is not counted."""
    names = ("SUnreclaim:", "PageTables:", "KernelStack:", "Percpu:")
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return sum(int(line[1]) * 1024 for line in lines if line[0] in names)


def medians(call: Callable[[], object], runs: int) -> float:
    """Milliseconds."""
    times = []
    for _ in range(runs):
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1000)
    return statistics.median(times)


def show(name: str, **figures: str) -> None:
    print(f"  {name:<12}" + "".join(f"{key} {value:<18}" for key, value in figures.items()), flush=True)


def ours(engine: Engine, count: int, runs: int) -> None:
    words = f"labkernel supervisor of {engine.layout.root}"
    engine.containers.run("lab/busybox", "true", remove=True)
    empty, kernel = pss_of(words), kernel_bytes()
    before = time.perf_counter()
    made = [engine.containers.run("lab/busybox", SLEEP, detach=True, network_mode="none") for _ in range(count)]
    took = time.perf_counter() - before
    each = (pss_of(words) - empty) / count
    show(
        "labkernel",
        start=f"{count / took:.0f}/s",
        memory=f"{each / 1024:.1f} KiB each",
        kernel=f"{(kernel_bytes() - kernel) / count / 1024:.0f} KiB each",
        base=f"{empty / 2**20:.1f} MiB",
    )
    listed = medians(lambda: engine.containers.list(), runs)
    readers = [reader_for(container) for container in made]
    read = medians(lambda: [reader.read() for reader in readers], runs)
    line = [sys.executable, "-m", "labkernel.cli", "ps"]
    whole = medians(lambda: subprocess.run(line, env=environment(engine), capture_output=True, check=True), 5)
    show("", ps=f"{listed:.1f} ms", stats=f"{read:.1f} ms", **{"`ps` whole": f"{whole:.0f} ms"})
    for reader in readers:
        reader.close()
    show("", exec=f"{medians(lambda: made[0].exec_run('true'), runs):.2f} ms")
    line = [sys.executable, "-m", "labkernel.cli", "exec", made[0].id, "true"]
    whole = medians(lambda: subprocess.run(line, env=environment(engine), capture_output=True, check=True), 5)
    show("", **{"`exec` whole": f"{whole:.0f} ms"})


def environment(engine: Engine) -> dict[str, str]:
    layout = engine.layout
    return {**os.environ, "LABKERNEL_ROOT": str(layout.root), "LABKERNEL_RUNTIME_DIR": str(layout.runtime_dir)}


def dockers(tar: Path, count: int, runs: int) -> None:
    docker = Docker(tar)
    try:
        empty, kernel = pss_of(str(docker.base)), kernel_bytes()
        before = time.perf_counter()
        for number in range(count):
            done = docker._docker("run", "-d", "--network", "none", "--name", f"b{number}", "bench", *SLEEP)
            if done.returncode:
                raise RuntimeError(done.stderr)
        took = time.perf_counter() - before
        each = (pss_of(str(docker.base)) - empty) / count
        show(
            "docker",
            start=f"{count / took:.2f}/s",
            memory=f"{each / 1024:.0f} KiB each",
            kernel=f"{(kernel_bytes() - kernel) / count / 1024:.0f} KiB each",
            base=f"{empty / 2**20:.0f} MiB",
        )
        listed = medians(lambda: docker._docker("ps"), 5)
        show("", ps=f"{listed:.0f} ms", exec=f"{medians(lambda: docker._docker('exec', 'b0', 'true'), runs):.0f} ms")
        docker._docker("rm", "-f", *(f"b{number}" for number in range(count)))
    finally:
        docker.close()


def podmans(rootfs: Path, work: Path, count: int, runs: int) -> None:
    if shutil.which("podman") is None:
        raise RuntimeError("podman is not installed")
    base = ["podman", "--root", f"{work}/podman", "--runroot", f"{work}/podman-run", "--cgroup-manager", "cgroupfs"]
    limits = [
        "--ulimit",
        "nofile=1024:1024",
        "--ulimit",
        "nproc=1024:1024",
        "--cgroups",
        "disabled",
        "--network",
        "none",
    ]

    def podman(*words: str) -> None:
        done = subprocess.run([*base, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:])

    try:
        kernel = kernel_bytes()
        before = time.perf_counter()
        for number in range(count):
            podman("run", "-d", *limits, "--name", f"b{number}", "--rootfs", str(rootfs), *SLEEP)
        took = time.perf_counter() - before
        show(
            "podman",
            start=f"{count / took:.2f}/s",
            memory=f"{pss_of(f'{work}/podman') / count / 1024:.0f} KiB each",
            kernel=f"{(kernel_bytes() - kernel) / count / 1024:.0f} KiB each",
        )
        show(
            "",
            ps=f"{medians(lambda: podman('ps'), 5):.0f} ms",
            exec=f"{medians(lambda: podman('exec', 'b0', 'true'), 5):.0f} ms",
        )
    finally:
        subprocess.run([*base, "rm", "-f", "-t", "0", "-a"], capture_output=True, check=False)
        # podman leaves its storage mounted over itself, and then it cannot be deleted
        subprocess.run(["umount", f"{work}/podman/overlay"], capture_output=True, check=False)


@contextlib.contextmanager
def engine_of(work: Path) -> Iterator[Engine]:
    engine = Engine.open(work / "root", runtime_dir=work / "run")
    try:
        yield engine
    finally:
        for container in engine.containers.list(all=True):
            container.remove(force=True)
        engine.runtime.shutdown(force=True)
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="containers of ours")
    parser.add_argument("--peers", type=int, default=20, help="containers of each peer")
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="lk-b-", dir="/tmp"))
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {given.count} containers")
    try:
        with engine_of(work) as engine:
            engine.images.resolve("lab/busybox")
            rootfs, tar = unpacked_busybox(engine, work)
            ours(engine, given.count, given.runs)
            peers: dict[str, Callable[[], Any]] = {
                "docker": lambda: dockers(tar, given.peers, given.runs),
                "podman": lambda: podmans(rootfs, work, given.peers, given.runs),
            }
            for name, call in peers.items():
                try:
                    call()
                except (OSError, RuntimeError, subprocess.SubprocessError) as err:
                    print(f"  ({name} left out: {err})")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
