"""`make bench-daemon`: the same docker client against `labkernel daemon` and against dockerd, side by side in one run.

    run       `docker run --rm --network none IMAGE true`, whole commands, interleaved
    ps        `docker ps -a` with many containers
    attach    1 GB into a container's stdin, and 1 GB out of its stdout (which both also write to the log)
    exec      1 GB out of an exec (no log)
    cp        1 GB as a tar stream into a container and out of one
    context   a build with 1 GB of context, of which it uses one small file
    streams   a thousand `logs -f` and attach at once on labkernel: memory, threads, and the time until all have a line

Nothing here is a test: read ratios, and quote the machine with them. Run as root.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from daemons import Daemon
from peers import Docker, unpacked_busybox

from labkernel.engine import Engine


class Client:
    """One docker client program against one daemon."""

    def __init__(self, name: str, program: str, address: str, image: str) -> None:
        self.name = name
        self.argv = [program, "-H", address]
        self.image = image

    def timed(self, *words: str, stdin: Any = subprocess.DEVNULL) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [*self.argv, *words], stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
        took = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(words)}: {done.stderr.decode()[-400:]}")
        return took

    def fed(self, source: list[str], *words: str) -> float:
        with subprocess.Popen(source, stdout=subprocess.PIPE) as feeder:
            return self.timed(*words, stdin=feeder.stdout)


def report(title: str, times: dict[str, list[float]], *, size: int = 0) -> None:
    print(title)
    base = statistics.median(times["dockerd"]) if times.get("dockerd") else None
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        rate = f"   {size / middle / 1e6:8.0f} MB/s" if size else ""
        ratio = f"   {middle / base:5.2f} x dockerd" if base and name != "dockerd" else ""
        spread = f"({min(seconds) * 1000:.1f} … {max(seconds) * 1000:.1f})"
        print(f"  {name:<12}{middle * 1000:10.1f} ms   {spread}{rate}{ratio}", flush=True)


def interleaved(clients: list[Client], runs: int, once: Any) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {client.name: [] for client in clients}
    for _ in range(runs):
        for client in clients:
            times[client.name].append(once(client))
    return times


def bench_run(clients: list[Client], runs: int) -> Any:
    return interleaved(
        clients, runs, lambda client: client.timed("run", "--rm", "--network", "none", client.image, "true")
    )


def bench_ps(clients: list[Client], runs: int, count: int) -> Any:
    for client in clients:
        for number in range(count):
            client.timed("create", "--name", f"many{number}", "--network", "none", client.image, "true")
    times = interleaved(clients, runs, lambda client: client.timed("ps", "-a"))
    for client in clients:
        client.timed("rm", "-f", *(f"many{number}" for number in range(count)))
    return times


def _archives(work: Path, size: int) -> tuple[Path, Path]:
    """(a tar with one file, the same as a build's context)."""
    data = os.urandom(1 << 20) * (size // (1 << 20) + 1)
    plain, context = work / "big.tar", work / "context.tar"
    for path, members in (
        (plain, {"copied": data[:size]}),
        (context, {"Dockerfile": b"FROM scratch\nCOPY small /\n", "small": b"x", "ignored": data[:size]}),
    ):
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return plain, context


def bench_streams(
    clients: list[Client], runs: int, work: Path, size: int, only: set[str]
) -> dict[str, dict[str, list[float]]]:
    common = ("--network", "none")
    text = f"yes {'labkernel ' * 10} | head -c {size}"  # lines of 100 characters: a log counts in lines
    zeros = ["head", "-c", str(size), "/dev/zero"]
    for client in clients:
        client.timed("run", "-d", "--name", "host", *common, client.image, "sleep", "100000")
        client.timed("exec", "host", "sh", "-c", f"yes 'of no zeros' | head -c {size} > /big")
    big, context = _archives(work, size)

    def copy_in(client: Client) -> float:
        with big.open("rb") as file:
            return client.timed("cp", "-", "host:/", stdin=file)

    def build(client: Client) -> float:
        with context.open("rb") as file:
            return client.timed("build", "--no-cache", "-q", "-", stdin=file)

    ways: dict[str, Any] = {
        "attach in": lambda each: each.fed(
            zeros, "run", "--rm", "-i", *common, each.image, "sh", "-c", "cat > /dev/null"
        ),
        "attach out": lambda each: each.timed("run", "--rm", *common, each.image, "sh", "-c", text),
        "exec in": lambda each: each.fed(zeros, "exec", "-i", "host", "sh", "-c", "cat > /dev/null"),
        "exec out": lambda each: each.timed("exec", "host", "head", "-c", str(size), "/dev/zero"),
        "cp in": copy_in,
        "cp out": lambda each: each.timed("cp", "host:/big", "-"),
        "build context": build,
    }
    found = {}
    for title, way in ways.items():
        if only and title not in only:
            continue
        found[title] = interleaved(clients, runs, way)
        report(f"{size / 1e9:g} GB, {title}", found[title], size=size)
    for client in clients:
        client.timed("rm", "-f", "host")
    return found


def bench_many(daemon: Daemon, count: int) -> dict[str, float]:
    """`count` followers of logs and as many attached clients of one container."""
    body = {"Image": "lab/busybox", "Cmd": ["sh", "-c", "read x; echo told"], "OpenStdin": True}
    id = daemon.json("POST", "/containers/create", body)["Id"]
    daemon.request("POST", f"/containers/{id}/start")
    before = _memory_bytes(daemon.pid)
    streams: list[socket.socket] = []
    started = time.perf_counter()
    for _ in range(count):
        for line, upgrade in (
            (f"GET /containers/{id}/logs?follow=1&stdout=1", ""),
            (f"POST /containers/{id}/attach?stream=1&stdout=1", "Connection: Upgrade\r\nUpgrade: tcp\r\n"),
        ):
            sock = daemon.connect()
            sock.sendall(f"{line} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode())
            streams.append(sock)
    for sock in streams:
        while b"\r\n\r\n" not in sock.recv(65536):
            pass
    opened = time.perf_counter() - started
    figures = {"open_s": opened, "memory_mb": (_memory_bytes(daemon.pid) - before) / 1e6, "threads": daemon.threads()}
    cpu = _cpu_s(daemon.pid)
    time.sleep(2)
    figures["idle_cpu_percent"] = (_cpu_s(daemon.pid) - cpu) * 50
    speaker, _ = daemon.hijack(f"/containers/{id}/attach?stream=1&stdin=1")
    started = time.perf_counter()
    speaker.sendall(b"go\n")
    for sock in streams:
        data = b""
        while b"told\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                raise RuntimeError(f"a stream ended without its line: {data!r}")
            data += piece
        sock.close()
    figures["line_to_all_s"] = time.perf_counter() - started
    speaker.close()
    daemon.request("DELETE", f"/containers/{id}?force=1")
    return figures


def _memory_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmRSS"))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--stream-runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of a stream")
    parser.add_argument("--containers", type=int, default=200)
    parser.add_argument("--streams", type=int, default=1000, help="followers of logs, and as many attached clients")
    parser.add_argument("--only", action="append", choices=["run", "ps", "data", "many"])
    parser.add_argument("--way", action="append", help="of the data: `cp in`, `build context`, …")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = set(options.only or ["run", "ps", "data", "many"])
    work = Path(tempfile.mkdtemp(prefix="bench-daemon-"))
    engine = Engine.open(work / "root", runtime_dir=work / "run")
    engine.images.resolve("lab/busybox", notify=lambda line: None)
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(work / "root"),
        "LABKERNEL_RUNTIME_DIR": str(work / "run"),
    }
    daemon = Daemon(environment, str(work / "docker.sock"))
    program = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"
    os.environ["DOCKER_BUILDKIT"] = "0"  # both daemons are asked the same way, whichever they name first
    clients = [Client("labkernel", program, daemon.address, "lab/busybox")]
    docker = None
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "client": program}
    try:
        try:
            docker = Docker(unpacked_busybox(engine, work)[1])
            clients.append(Client("dockerd", program, docker.host, "bench"))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as err:
            print(f"(left out: {err})")
        if "run" in wanted:
            report("docker run --rm IMAGE true", found := bench_run(clients, options.runs))
            results["run"] = found
        if "ps" in wanted:
            found = bench_ps(clients, options.runs, options.containers)
            report(f"docker ps -a with {options.containers} containers", found)
            results["ps"] = found
        if "data" in wanted:
            results["data"] = bench_streams(
                clients, options.stream_runs, work, options.megabytes * 1_000_000, set(options.way or ())
            )
        if "many" in wanted:
            results["many"] = bench_many(daemon, options.streams)
            print(f"{options.streams} logs -f and {options.streams} attach at once: {results['many']}")
    finally:
        if docker is not None:
            docker.close()
        daemon.stop()
        engine.runtime.shutdown(force=True)
        engine.close()
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
