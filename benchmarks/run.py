"""`make bench`: side-by-side figures against real peers, medians and ratios from one run.

    start     one whole `run --rm busybox true`: labkernel on a started engine (root, rootless), crun, runc, docker
    exec      `true` in a running container: labkernel from Python and as a command, `docker exec`
    network   a start with a bridge and a published port, and bytes through such a port: labkernel, docker
    import    CPU of `import labkernel` and of `%load_ext labkernel`
    sample    one reading of a container's figures with kept descriptors
    sampler   200 containers followed at 20 Hz (at rest, 20 busy, all busy): part of a core, rate, and without the bound
    memory    the supervisor alone, and what each idle container adds to it

Nothing here is a test: read ratios, and quote the machine with them. Run as root; a peer that is missing is named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from network import bench_network, from_the_pool
from peers import Docker, LowLevel, Rootless, unpacked_busybox

from labkernel.engine import Engine
from labkernel.metrics import Sampler

_REST_S = 0.1
# Wakes twenty times a second without a new process: busybox's `read` knows parts of a second.
_BUSY = ["sh", "-c", "mkfifo /f; exec 3<>/f; while :; do read -t 0.05 x <&3; done"]
_SETTLE_S, _FOLLOWED_S = 12.0, 15.0
CASES = ("start", "exec", "network", "import", "sample", "sampler", "memory")


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def row(name: str, seconds: list[float], *, base: float | None = None) -> str:
    middle = statistics.median(seconds)
    ratio = f"   {middle / base:7.2f} x" if base else ""
    return f"  {name:<34}{middle * 1000:9.2f} ms   ({min(seconds) * 1000:.2f} … {max(seconds) * 1000:.2f}){ratio}"


def bench_start(engine: Engine, runs: int, work: Path) -> dict[str, Any]:
    rootfs, tar = unpacked_busybox(engine, work)

    def run(**settings: Any) -> float:
        return timed(lambda: engine.containers.run("lab/busybox", "true", remove=True, **settings))

    # crun and runc make no network either; docker's default is a bridge, as ours.
    ours: dict[str, Callable[[], float]] = {"labkernel": run, "labkernel, no network": lambda: run(network_mode="none")}
    peers: list[Any] = []
    for make in (Rootless, lambda: LowLevel("crun", rootfs), lambda: LowLevel("runc", rootfs), lambda: Docker(tar)):
        try:
            peers.append(make())
        except (OSError, RuntimeError, subprocess.CalledProcessError) as err:
            print(f"  (left out: {err})")
    everyone = {**ours, **{peer.name: peer.run for peer in peers}}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    try:
        for turn in range(runs + 1):
            for name, once in everyone.items():
                from_the_pool(engine)
                took = once()
                if turn:  # the first turn warms caches
                    times[name].append(took)
    finally:
        for peer in peers:
            peer.close()
    base = statistics.median(times["labkernel"])
    print(f"start: run --rm busybox true, {runs} runs each, interleaved")
    for name, seconds in times.items():
        print(row(name, seconds, base=base))
    return times


def bench_exec(engine: Engine, runs: int, tar: Path) -> dict[str, Any]:
    """`docker exec` is a command, and so is `labkernel exec`; a notebook's cell calls the engine from Python."""
    container = engine.containers.run("lab/busybox", ["sleep", "600"], detach=True, network_mode="none")
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
    }
    command = [shutil.which("labkernel", path=str(Path(sys.executable).parent)) or "labkernel", "exec", container.id]
    everyone: dict[str, Callable[[], object]] = {
        "labkernel, from Python": lambda: container.exec_run(["true"]),
        "labkernel exec (command)": lambda: subprocess.run([*command, "true"], check=True, env=env),
    }
    docker = None
    try:
        try:
            docker = Docker(tar)
            docker.serve("run", "-d", "--network", "none", "--name", "exec", "bench", "sleep", "600")
            everyone["docker exec (command)"] = lambda: docker.serve("exec", "exec", "true")
        except (OSError, RuntimeError, subprocess.CalledProcessError) as err:
            print(f"  (left out: {err})")
        times = interleaved(everyone, runs)
    finally:
        if docker is not None:
            docker.close()
        container.remove(force=True)
    print(f"exec: true in a running container, {runs} runs each, interleaved")
    base = statistics.median(times["labkernel, from Python"])
    for name, seconds in times.items():
        print(row(name, seconds, base=base))
    return times


def interleaved(everyone: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each, one after the other in turn; a first turn warms caches and is left out. Each begins
    when the one before has tidied up: Docker's daemons are busy for some time after their command's end."""
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for turn in range(runs + 1):
        for name, once in everyone.items():
            time.sleep(_REST_S)
            took = timed(once)
            if turn:
                times[name].append(took)
    return times


CPU_OF = """
import time
started = time.process_time()
{code}
print(time.process_time() - started)
"""
LOAD_EXT = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
started = time.process_time()
shell.run_line_magic("load_ext", "labkernel")
"""


def bench_import(runs: int) -> dict[str, Any]:
    def cpu(code: str) -> list[float]:
        command = [sys.executable, "-c", CPU_OF.format(code=code)]
        return [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            for _ in range(runs)
        ]

    figures = {
        "import labkernel": cpu("import labkernel"),
        "import labkernel; connect()": cpu("import labkernel; labkernel.connect()"),
        "%load_ext labkernel": cpu(LOAD_EXT),
    }
    print("import: CPU time in a fresh interpreter")
    for name, seconds in figures.items():
        print(row(name, seconds))
    return figures


def bench_sample(engine: Engine, runs: int) -> dict[str, Any]:
    container = engine.containers.run("lab/busybox", ["sleep", "600"], detach=True)
    try:
        reader = engine.metrics.reader(container)
        reader.read()
        seconds = [timed(reader.read) for _ in range(runs * 50)]
    finally:
        container.remove(force=True)
    print("sample: one reading of one container")
    print(row("labkernel", seconds))
    return {"sample": seconds}


def bench_sampler(engine: Engine, count: int = 200) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    print(f"sampler: {count} at 20 Hz, {_FOLLOWED_S:g} s each: part of a core, readings a second of the most read")
    for name, busy in (("at rest", 0), (f"{count // 10} busy", count // 10), ("all busy", count)):
        commands = [_BUSY] * busy + [["sleep", "600"]] * (count - busy)
        containers = [
            engine.containers.run("lab/busybox", command, detach=True, network_mode="none") for command in commands
        ]
        try:
            for bound in (True, False):
                share, rate_hz = follow(containers, core_share=0.01 if bound else 1.0)
                label = name if bound else f"{name}, unbounded"
                figures[label] = {"core_share": share, "rate_hz": rate_hz}
                print(f"  {label:<34}{share * 100:9.2f} %   {rate_hz:6.1f} Hz")
        finally:
            for container in containers:
                container.remove(force=True)
    return figures


def follow(containers: list[Any], *, core_share: float) -> tuple[float, float]:
    """CPU time of the sampler's thread as part of a core's, and readings a second of the container it read most."""
    with Sampler(*containers, hz=20, core_share=core_share) as sampler:
        time.sleep(_SETTLE_S)  # opening the files of all, which is paid off slowly
        thread = next(thread for thread in threading.enumerate() if thread.name == "labkernel-sampler")
        counts = [len(series.points) for series in sampler.all_series()]
        started, before = time.monotonic(), thread_cpu_s(thread)
        time.sleep(_FOLLOWED_S)
        took_s, used_s = time.monotonic() - started, thread_cpu_s(thread) - before
        read = max(len(s.points) - count for s, count in zip(sampler.all_series(), counts, strict=True))
        return used_s / took_s, read / took_s


def thread_cpu_s(thread: threading.Thread) -> float:
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise RuntimeError("no Pss")


def bench_memory(engine: Engine, count: int) -> dict[str, Any]:
    info = engine.runtime.ensure()
    both = (info.pid, info.keeper_pid)
    empty = [pss_kib(pid) for pid in both]
    containers = [engine.containers.run("lab/busybox", ["sleep", "600"], detach=True) for _ in range(count)]
    try:
        full = [pss_kib(pid) for pid in both]
    finally:
        for container in containers:
            container.remove(force=True)
    each = (sum(full) - sum(empty)) / count
    print("memory: proportional set size")
    print(
        f"  supervisor {empty[0]} KiB, keeper {empty[1]} KiB; {count} idle containers add {each:.1f} KiB each to both"
    )
    return {"supervisor_kib": empty[0], "keeper_kib": empty[1], "each_kib": each}


def main() -> int:
    parser = argparse.ArgumentParser(description="labkernel beside its peers")
    parser.add_argument("-n", "--runs", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    wanted = set(options.only or CASES)
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}")
    base = Path(tempfile.mkdtemp(prefix="lk-b-", dir="/tmp"))
    figures: dict[str, Any] = {}
    try:
        with Engine.open(base / "root", runtime_dir=base / "run") as engine:
            print(f"driver: {engine.driver.name}")
            try:
                engine.containers.run("lab/busybox", "true", remove=True)
                if "start" in wanted:
                    figures["start"] = bench_start(engine, options.runs, base)
                if "exec" in wanted:
                    figures["exec"] = bench_exec(engine, options.runs, unpacked_busybox(engine, base)[1])
                if "network" in wanted:
                    figures["network"] = bench_network(engine, options.runs, unpacked_busybox(engine, base)[1])
                if "import" in wanted:
                    figures["import"] = bench_import(max(5, options.runs // 2))
                if "sample" in wanted:
                    figures["sample"] = bench_sample(engine, options.runs)
                if "sampler" in wanted:
                    figures["sampler"] = bench_sampler(engine)
                if "memory" in wanted:
                    figures["memory"] = bench_memory(engine, 50)
            finally:
                engine.runtime.shutdown(force=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
