"""Networks beside Docker's: a start with the default bridge and a published port, and bytes through such a port.

dockerd gets a network namespace of its own, with its default bridge, its rules and its proxy: nothing of it touches the
machine's. Both sides are asked through 127.0.0.1, by the same program.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import HIDE_EMPTY_V2, Docker

from labkernel.engine import Engine

PORT = 18931
SERVE = ["nc", "-ll", "-p", "80", "-e", "dd", "if=/dev/zero", "bs=256k", "count=4096"]
READ = """
import json, socket, sys, time
address, port, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
buffer, rates = bytearray(1 << 20), []
for _ in range(rounds):
    with socket.create_connection((address, port), timeout=30) as sock:
        total, first = 0, sock.recv_into(buffer)
        started = time.perf_counter()
        while count := sock.recv_into(buffer):
            total += count
        rates.append(total / (time.perf_counter() - started) / (1 << 20))
print(json.dumps(rates))
"""


class BridgedDocker(Docker):
    """As `Docker`, with its networks, in a network namespace of its own."""

    name = "docker run -p"

    def argv(self) -> list[str]:
        start = "ip link set lo up; " + HIDE_EMPTY_V2 + 'exec "$0" "$@"'
        return [
            *("unshare", "-m", "-n", "sh", "-c", start, "dockerd"),
            *("--data-root", str(self.base / "data"), "--exec-root", str(self.base / "exec")),
            *("--pidfile", str(self.base / "pid"), "-H", self.host, "--bip", "172.31.255.1/24"),
        ]

    def run(self) -> float:
        started = time.perf_counter()
        done = self._docker("run", "--rm", "-p", f"{PORT}:80", "bench", "true")
        took = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return took

    def rates(self, rounds: int) -> list[float]:
        done = self._docker("run", "-d", "--name", "serve", "-p", f"{PORT}:80", "bench", *SERVE)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        pid = (self.base / "pid").read_text().strip()
        try:
            return read(["nsenter", "-t", pid, "-n"], rounds)
        finally:
            self._docker("rm", "-f", "serve")


def read(prefix: list[str], rounds: int) -> list[float]:
    """MiB/s of each round through 127.0.0.1."""
    argv = [*prefix, sys.executable, "-c", READ, "127.0.0.1", str(PORT), str(rounds)]
    for _ in range(100):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found: list[float] = json.loads(done.stdout)
            return found
        time.sleep(0.1)
    raise RuntimeError(done.stderr)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def from_the_pool(engine: Engine) -> None:
    """Wait until the pool is full: three starts in a row would measure how fast it is filled again."""
    deadline = time.monotonic() + 10
    while engine.runtime.ensure().warm < 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def bench_network(engine: Engine, runs: int, tar: Path) -> dict[str, Any]:
    ports = {"80/tcp": PORT}
    everyone: dict[str, Callable[[], float]] = {
        "labkernel, no network": lambda: timed(
            lambda: engine.containers.run("lab/busybox", "true", remove=True, network="none")
        ),
        "labkernel, bridge": lambda: timed(lambda: engine.containers.run("lab/busybox", "true", remove=True)),
        "labkernel, bridge and port": lambda: timed(
            lambda: engine.containers.run("lab/busybox", "true", remove=True, ports=ports)
        ),
    }
    docker = None
    try:
        docker = BridgedDocker(tar)
        everyone["docker, bridge and port"] = docker.run
    except (OSError, RuntimeError, subprocess.CalledProcessError) as err:
        print(f"  (left out: {err})")
    times: dict[str, list[float]] = {name: [] for name in everyone}
    try:
        for turn in range(runs + 1):
            for name, run in everyone.items():
                from_the_pool(engine)
                took = run()
                if turn:
                    times[name].append(took)
        base = statistics.median(times["labkernel, bridge and port"])
        print(f"network: run --rm busybox true, {runs} runs each, interleaved")
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            spread = f"({min(seconds) * 1000:.2f} … {max(seconds) * 1000:.2f})"
            print(f"  {name:<34}{middle * 1000:9.2f} ms   {spread}   {middle / base:7.2f} x")
        rates = {"labkernel": _our_rates(engine, 5)}
        if docker is not None:
            rates["docker"] = docker.rates(5)
    finally:
        if docker is not None:
            docker.close()
    print("network: 1 GiB from a container through a port published on 127.0.0.1")
    for name, found in rates.items():
        print(f"  {name:<34}{statistics.median(found):9.0f} MiB/s   ({min(found):.0f} … {max(found):.0f})")
    return {"start": times, "mib_per_s": rates}


def _our_rates(engine: Engine, rounds: int) -> list[float]:
    container = engine.containers.run("lab/busybox", SERVE, detach=True, ports={"80/tcp": PORT})
    try:
        return read([], rounds)
    finally:
        container.remove(force=True)
