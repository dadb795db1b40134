"""Prometheus' text format, its server, and the service that gathers what runs."""

from __future__ import annotations

import csv
import io
import os
import resource
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from labkernel.engine import Engine
from labkernel.errors import NotFoundError, UsageError
from labkernel.measuring.guest import GuestReader
from labkernel.measuring.prometheus import Reading, Server, prometheus_text
from labkernel.measuring.samples import Limits, Sample
from labkernel.metrics import Metrics

SAMPLE = Sample(1.0, 1_500_000, 4096, 30, 7, 3, 250_000, 10, 5, 8192, 9000, 1, 4096, 1_000_000, None, 2)


def test_known_figures_are_told_and_unknown_ones_left_out() -> None:
    text = prometheus_text([Reading({"name": 'a"b', "id": "1"}, SAMPLE, Limits(memory_bytes=64))])
    assert '# TYPE container_cpu_usage_seconds_total counter\ncontainer_cpu_usage_seconds_total{name="a\\"b"' in text
    for line in (
        "cpu_usage_seconds_total 1.5",
        "cpu_cfs_throttled_seconds_total 0.25",
        "memory_working_set_bytes 4096",
        "memory_cache 4096",
        "fs_reads_bytes_total 10",
        "fs_writes_bytes_total 20",
        "network_transmit_bytes_total 2",
        "oom_events_total 1",
        "pressure_cpu_waiting_seconds_total 1",
        "pressure_io_waiting_seconds_total 0.000002",
        "spec_memory_limit_bytes 64",
    ):
        name, value = line.split()
        assert f'container_{name}{{name="a\\"b",id="1"}} {value}\n' in text
    assert "pressure_memory" not in text
    assert "spec_cpus" not in text
    assert text.endswith("labkernel_targets 1\n")


def test_the_server_answers_metrics_and_nothing_else() -> None:
    server = Server("127.0.0.1:0", lambda: "up 1\n").start()
    try:
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=60) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert answer.read() == b"up 1\n"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{server.address}/other", timeout=60)
    finally:
        server.stop()
    with pytest.raises(UsageError, match="not an address"):
        Server("here", str)


def test_a_container_is_followed_from_the_first_question_on(engine: Engine) -> None:
    container = engine.containers.run("busybox", ["sleep", "600"], detach=True, name="followed", mem_limit="64m")
    history = engine.metrics(container, hz=20, seconds=0.3)
    assert engine.metrics(container, hz=20) is history
    frame = history.to_dataframe()
    assert set(frame["target"]) == {"followed"}
    assert len(frame) >= 2
    assert "followed" in repr(history)
    text = io.StringIO()
    history.to_csv(text)
    assert int(next(csv.DictReader(io.StringIO(text.getvalue())))["memory_bytes"]) > 0
    assert 'container_cpu_usage_seconds_total{name="followed"' in engine.metrics.prometheus()
    [reading] = engine.metrics.readings("followed")
    assert reading.labels["kind"] == "container"
    with pytest.raises(NotFoundError):
        engine.metrics.find("nobody")
    engine.metrics.close()
    assert not history.running


def test_nothing_that_runs_is_said() -> None:
    with pytest.raises(UsageError, match="nothing runs"):
        Metrics()()
    with pytest.raises(UsageError, match="has no figures"):
        Metrics()("web")
    with Metrics()(os.getpid(), hz=20) as history:
        assert history.all_series()[0].samples


def test_a_guests_own_view_is_a_sample_too() -> None:
    told = {"user_us": 5, "system_us": 2, "memory_total_kib": 100, "memory_free_kib": 30, "memory_available_kib": 60}
    sample = GuestReader(lambda: told).read()
    assert sample is not None
    assert (sample.cpu_usec, sample.memory_bytes, sample.memory_usage_bytes) == (7, 40 << 10, 70 << 10)
    assert GuestReader(dict).read() is None

    class Machine:
        id, name, status, exit_code, pid = "1", "vm", "running", None, os.getpid()

        def inside(self) -> dict[str, Any]:
            return told

    with Metrics()(Machine(), hz=20, inside=True) as history:
        assert [series.name for series in history.all_series()] == ["vm", "vm (inside)"]
        assert history.all_series()[1].samples[0].cpu_usec == 7


def test_more_containers_than_open_files() -> None:
    code = """
import os, resource, tempfile
from labkernel.measuring.samples import CgroupReader
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
where = tempfile.mkdtemp()
for name in ("cpu.stat", "memory.current", "memory.stat", "pids.current", "io.stat", "memory.events"):
    open(f"{where}/{name}", "w").write("usage_usec 5\\n" if name == "cpu.stat" else "1\\n")
readers = [CgroupReader(2, {"": where}) for _ in range(40)]
print(all(reader.read() for reader in readers))
"""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 1024:
        pytest.skip(f"only {hard} files may be open here")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
