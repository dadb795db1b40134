"""Readers on folders of plain files, on a real cgroup and on real processes; the sampler; docker's words."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from labkernel import metrics
from labkernel.errors import UsageError
from labkernel.measuring import samples
from labkernel.measuring.processes import ProcessReader, ProcessTreeReader
from labkernel.measuring.readers import reader_for
from labkernel.measuring.samples import CgroupReader, field, number
from labkernel.metrics import Limits, Sample, Sampler, Series, stats_json, stats_row

PRESSURE = {
    "cpu.pressure": "some avg10=0.00 avg60=0.10 avg300=0.00 total=41\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
    "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=42\n",
}
V1 = {
    **PRESSURE,
    "cpuacct.usage": "5000000\n",
    "cpuacct.stat": "user 3\nsystem 2\n",
    "cpu.stat": "nr_periods 10\nnr_throttled 4\nthrottled_time 7000000\n",
    "cpu.cfs_quota_us": "50000\n",
    "cpu.cfs_period_us": "100000\n",
    "memory.usage_in_bytes": "3000\n",
    "memory.max_usage_in_bytes": "4000\n",
    "memory.limit_in_bytes": "67108864\n",
    "memory.stat": "cache 1\ninactive_file 1\ntotal_cache 1500\ntotal_inactive_file 1000\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "blkio.throttle.io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\n9:1 Read 1\nTotal 31\n",
    "pids.current": "3\n",
    "pids.max": "max\n",
}
V2 = {
    **PRESSURE,
    "cpu.stat": "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 10\nnr_throttled 4\n"
    "throttled_usec 7000\n",
    "cpu.max": "50000 100000\n",
    "memory.current": "3000\n",
    "memory.peak": "4000\n",
    "memory.max": "67108864\n",
    "memory.stat": "anon 2000\nfile 1500\ninactive_anon 5\ninactive_file 1000\n",
    "memory.events": "low 0\nhigh 0\nmax 1\noom 2\noom_kill 2\noom_group_kill 0\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=1 dbytes=0 dios=0\n9:1 rbytes=1 wbytes=0\n",
    "pids.current": "3\n",
    "pids.max": "max\n",
}


def folder(where: Path, files: dict[str, str]) -> Path:
    where.mkdir(exist_ok=True)
    for name, text in files.items():
        (where / name).write_text(text)
    return where


@pytest.mark.parametrize(("version", "files"), [(1, V1), (2, V2)])
def test_both_versions_give_the_same_sample(tmp_path: Path, version: int, files: dict[str, str]) -> None:
    reader = CgroupReader(version, {"any": str(folder(tmp_path, files))})
    sample = reader.read()
    assert sample is not None
    assert sample[1:] == (5000, 2000, 31, None, 3, 7000, 11, None, 3000, 4000, 2, 1500, 41, None, 42)
    assert reader.limits() == Limits(67108864, 0.5, None)
    reader.close()


@pytest.mark.parametrize("version", [1, 2])
def test_an_empty_directory_reads_as_gone(tmp_path: Path, version: int) -> None:
    assert CgroupReader(version, {"": str(tmp_path)}).read() is None


def test_controllers_in_separate_hierarchies_are_found_by_file_name(tmp_path: Path) -> None:
    paths = {}
    for prefix, controller in (("cpuacct", "cpu,cpuacct"), ("memory", "memory"), ("pids", "pids")):
        files = {name: text for name, text in V1.items() if name.startswith(prefix)}
        paths[controller] = str(folder(tmp_path / prefix, files))
    sample = CgroupReader(1, paths).read()
    assert sample is not None
    assert (sample.cpu_usec, sample.memory_bytes, sample.pids) == (5000, 2000, 3)
    assert sample.io_bytes is None
    assert sample.throttled_usec is None


@pytest.mark.parametrize(("version", "files"), [(1, V1), (2, V2)])
def test_of_hundreds_only_what_moves_is_read_each_time(tmp_path: Path, version: int, files: dict[str, str]) -> None:
    reader = CgroupReader(version, {"any": str(folder(tmp_path, files))})
    reader.detail_s = 3600.0
    assert reader.read() is not None
    held = {name: text.replace("throttled_time 7000000", "throttled_time 9000000") for name, text in files.items()}
    held = {name: text.replace("throttled_usec 7000", "throttled_usec 9000") for name, text in held.items()}
    folder(tmp_path, {**held, "pids.current": "50\n", "memory.events": "oom_kill 9\n"})
    for name in ("memory.usage_in_bytes", "memory.current"):
        if name in files:
            (tmp_path / name).write_text("5000\n")
    sample = reader.read()
    assert sample is not None
    assert (sample.memory_bytes, sample.throttled_usec) == (4000, 9000), "fresh: there is a CPU limit"
    assert (sample.pids, sample.oom_kills) == (3, 2), "read again after detail_s"
    reader.detail_s = 0.0
    sample = reader.read()
    assert sample is not None
    assert sample.pids == 50
    reader.close()


def test_what_uses_no_cpu_time_is_read_in_detail_much_less_often(tmp_path: Path) -> None:
    reader = CgroupReader(1, {"any": str(folder(tmp_path, V1))})
    reader.detail_s = 3600.0
    assert reader.read() is not None
    folder(tmp_path, {**V1, "pids.current": "50\n"})
    for hours, cpu, pids in ((2, "", 3), (2, "9000000", 50)):
        reader._detail_at -= hours * 3600.0
        if cpu:
            (tmp_path / "cpuacct.usage").write_text(cpu)
        sample = reader.read()
        assert sample is not None
        assert sample.pids == pids
    (tmp_path / "pids.current").write_text("51\n")
    reader._detail_at -= 16 * 3600.0
    sample = reader.read()
    assert sample is not None
    assert sample.pids == 51, "in the end all the same"
    reader.close()


def test_parsers() -> None:
    assert field(b"a 1\nab 2\nb 3", b"a") == 1
    assert field(b"a 1\nab 2\nb 3", b"b") == 3
    assert field(b"a 1\n", b"c") is None
    assert field(b"c x\n", b"c") is None
    assert number(b"max\n") is None
    assert number(b"9223372036854771712\n") is None
    assert number(b"-1\n") == -1


def cgroup_parents() -> dict[str, str]:
    """A fresh cgroup in every v1 hierarchy that can be written, or a skip."""
    name, made = f"labkernel-test-{uuid.uuid4().hex[:8]}", {}
    for controller in ("cpu", "cpuacct", "memory", "pids", "blkio"):
        path = Path("/sys/fs/cgroup") / controller / name
        try:
            path.mkdir()
        except OSError as err:
            for other in made.values():
                os.rmdir(other)
            pytest.skip(f"no cgroup v1 to write: {err}")
        made[controller] = str(path)
    return made


def test_a_real_cgroup_is_read_fast_and_its_end_is_a_gap() -> None:
    paths = cgroup_parents()
    child = subprocess.Popen(["sleep", "60"])
    try:
        for path in paths.values():
            Path(path, "cgroup.procs").write_text(str(child.pid))
        reader = CgroupReader(1, paths)
        sample = reader.read()
        assert sample is not None
        assert sample.pids == 1
        costs = []
        for _ in range(200):
            began = time.thread_time()
            reader.read()
            costs.append(time.thread_time() - began)
        print(f"a sample: {sorted(costs)[100] * 1e6:.0f} µs of CPU")
    finally:
        child.kill()
        child.wait()
        for path in paths.values():
            os.rmdir(path)
    assert reader.read() is None
    reader.close()


def burn(seconds: float) -> subprocess.Popen[bytes]:
    code = (
        f"import time\nt=time.process_time()\nwhile time.process_time()-t<{seconds}: pass\nprint(flush=True)\ninput()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def test_a_process_is_read_and_its_end_is_a_gap() -> None:
    child = burn(0.1)
    reader = ProcessReader(child.pid)
    sample = reader.read()
    assert sample is not None
    assert sample.cpu_usec >= 70_000, "two counters in whole ticks of 10 ms"
    assert sample.memory_bytes > 1_000_000
    assert sample.pids == 1
    assert (sample.memory_peak_bytes or 0) >= sample.memory_bytes * 0.9
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert reader.read() is None, "a zombie uses nothing any more"
    end(child)
    assert reader.read() is None
    reader.close()
    assert ProcessReader(child.pid).read() is None


def test_a_process_tree_counts_children_and_those_that_ended() -> None:
    code = (
        "import os,subprocess,sys\n"
        "subprocess.run([sys.executable,'-c','t=__import__(\"time\");e=t.process_time\\nwhile e()<.1: pass'])\n"
        "p=subprocess.Popen(['sleep','60']); print(sum(os.times()[2:4]), flush=True)\n"
        "input(); p.kill(); p.wait()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    # The kernel counts in whole ticks, so the 0.1 s may read as 0.08 s: what it says of itself is the measure.
    ended_s = float(child.stdout.readline())
    reader = ProcessTreeReader(child.pid)
    sample = reader.read()
    assert sample is not None
    assert sample.pids == 2
    assert sample.cpu_usec >= round(ended_s * 1e6) > 0
    child.communicate(b"\n")
    assert reader.read() is None
    reader.close()


def test_a_pid_namespace_is_read_through_its_own_proc() -> None:
    script = "mount -t proc proc /proc && { sleep 60 & echo ready; wait; }"
    command = ["unshare", "--fork", "--pid", "--mount", "--kill-child", "sh", "-c", script]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    try:
        if child.stdout.readline() != b"ready\n":
            pytest.skip("no pid namespace here")
        inside = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])
        reader = ProcessTreeReader(inside)
        if reader._proc is None:
            pytest.skip("/proc of another pid namespace can't be opened here")
        wait_until(lambda: (sample := reader.read()) is not None and sample.pids == 2)
        reader.close()
    finally:
        end(child)
        assert child.stderr is not None
        child.stderr.close()


def test_reader_for_takes_states_pids_and_machines() -> None:
    pid = os.getpid()
    assert reader_for({"status": "exited", "pid": 0}) is None
    assert reader_for({"status": "created"}) is None
    tree = reader_for({"status": "running", "pid": pid, "cgroup": {"version": 0, "paths": {}}})
    assert tree is not None
    assert tree.source == "process tree"
    machine = type("VM", (), {"pid": pid, "name": "vm"})()
    reader = reader_for(machine)
    assert reader is not None
    assert reader.source == "process"
    for each in (tree, reader):
        each.close()


class FakeContainer:
    name = "web"

    def __init__(self, where: Path) -> None:
        self.where = where
        self.state: dict[str, object] = {"status": "created"}

    def runtime_state(self) -> dict[str, object]:
        return self.state

    def start(self) -> None:
        folder(self.where, V1)
        self.state = {"status": "running", "pid": os.getpid(), "cgroup": {"version": 1, "paths": {"": str(self.where)}}}

    def end(self) -> None:
        (self.where / "cpuacct.usage").write_text("")
        self.state = {"status": "exited", "exit_code": 137, "oom_killed": True}


def test_a_target_starts_late_ends_and_starts_again(tmp_path: Path) -> None:
    container = FakeContainer(tmp_path / "cg")
    sampler = Sampler(container)
    series = sampler.series(container)
    assert series is sampler.series("web")
    sampler.tick()
    assert not series.points
    assert not series.ended
    target = sampler._targets[0]
    container.start()
    target.retry_at = 0
    sampler.tick()
    sampler.tick()
    assert len(series.samples) == 2
    assert series.limits.cpus == 0.5
    container.end()
    sampler.tick()
    sampler.tick()
    assert series.ended
    assert [event.kind for event in series.events] == ["start", "oom", "stop"]
    assert series.events[-1].text == "137"
    container.start()
    target.retry_at = 0
    sampler.tick()
    assert not series.ended
    assert [point is None for point in series.points] == [False, False, True, False]
    assert math.isnan(series.cpu_percent()[1][1])
    target.close()


def test_of_hundreds_those_at_rest_are_left_alone_for_a_while(tmp_path: Path) -> None:
    """Not by hand, though: tick() reads all."""
    containers = [FakeContainer(tmp_path / f"cg{number}") for number in range(21)]
    sampler = Sampler(*containers)
    for container in containers:
        container.start()
    busy = tmp_path / "cg3/cpuacct.usage"
    for turn in range(10):
        busy.write_text(f"{turn + 1}000000\n")
        sampler._round()
    seen = [len(series.points) for series in sampler.all_series()]
    assert seen[3] == 10
    assert {*seen[:3], *seen[4:]} == {4}, "one reading, and three that were the same"
    sampler.tick()
    assert [len(series.points) for series in sampler.all_series()] == [count + 1 for count in seen]
    few = Sampler(containers[0])
    for _ in range(10):
        few._round()
    assert len(few.all_series()[0].points) == 10, "of a few, each reading counts"
    sampler.stop()
    few.stop()


def test_a_sampler_keeps_to_its_share_of_a_core_and_says_so(tmp_path: Path) -> None:
    containers = [FakeContainer(tmp_path / f"cg{number}") for number in range(3)]
    sampler = Sampler(*containers, hz=20, core_share=1e-6)
    assert (sampler.rate_hz, sampler.note()) == (20.0, "")
    for container in containers:
        container.start()
    sampler._round()
    assert sampler.rate_hz < 1
    assert "instead of 20" in sampler.note()
    assert sampler.note() in repr(sampler)
    assert sampler.note() in sampler._repr_html_()
    sampler.stop()
    with pytest.raises(UsageError, match="core_share"):
        Sampler(core_share=0)


def rounds(monkeypatch: pytest.MonkeyPatch, costs_s: list[float]) -> tuple[Sampler, list[float]]:
    """A sampler at 20 Hz and 1 % whose rounds take so much CPU time, and how long it waited after each."""
    spent = now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, thread_time=lambda: spent)
    monkeypatch.setattr(metrics, "time", clock)
    sampler, waits = Sampler(hz=20, core_share=0.01), []
    for cost in costs_s:
        spent += cost
        waits.append(sampler._round())
        now += waits[-1]
    return sampler, waits


def test_what_is_spent_once_does_not_slow_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, waits = rounds(monkeypatch, [0.1] + [0.0002] * 200)
    assert max(waits) == pytest.approx(0.05)
    assert (round(sampler.rate_hz, 3), sampler.note()) == (20.0, "")


def test_one_long_wait_is_not_taken_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, waits = rounds(monkeypatch, [0.0004] * 400 + [0.11] + [0.0004] * 10)
    assert max(waits) > 0.5, "what was dear is waited for"
    told_s = sum(waits[-80:])
    assert sampler.rate_hz == pytest.approx(80 / told_s, rel=0.25)
    assert sampler.rate_hz > 10


def test_rounds_of_unlike_cost_keep_the_share_together(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [0.001, 0.001, 0.010, 0.0] * 200  # 3 ms in the mean: of 1 % a round each 0.3 s
    sampler, waits = rounds(monkeypatch, costs)
    assert sum(costs) / sum(waits) == pytest.approx(0.01, rel=0.1)
    assert sampler.rate_hz == pytest.approx(1 / 0.3, rel=0.4)
    assert "instead of 20" in sampler.note()


def test_a_machine_has_its_memory_as_limit_and_may_start_later() -> None:
    class Machine:
        name, status, pid, memory_bytes, exit_code = "vm", "created", None, 256 << 20, None

    machine = Machine()
    sampler = Sampler(machine, retry_s=0)
    series = sampler.series(machine)
    sampler.tick()
    assert not series.ended
    machine.pid, machine.status = os.getpid(), "running"  # type: ignore[assignment]
    sampler.tick()
    assert series.kind == "vm"
    assert series.limits.memory_bytes == 256 << 20
    machine.pid, machine.status, machine.exit_code = None, "exited", 3  # type: ignore[assignment]
    sampler._targets[0].close()
    sampler.tick()
    assert series.ended
    assert series.events[-1].text == "3"


def test_a_stop_is_marked_when_its_status_is_known() -> None:
    child = burn(0.05)
    state = {"status": "running", "pid": child.pid, "cgroup": {"version": 0, "paths": {}}}
    sampler = Sampler(state, retry_s=0)
    series = sampler.series(state)
    sampler.tick()
    assert len(series.samples) == 1
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: gone, and not yet waited for
    sampler.tick()
    sampler.tick()
    assert [event.kind for event in series.events] == ["start"]
    child.wait()
    state.update(status="exited", exit_code=137)
    sampler.tick()
    assert [(event.kind, event.text) for event in series.events] == [("start", ""), ("stop", "137")]


def test_the_thread_samples_and_stops() -> None:
    child = burn(0.05)
    with Sampler(child.pid, hz=100) as sampler:
        series = sampler.series(child.pid)
        wait_until(lambda: len(series.points) >= 3)
        end(child)
        wait_until(lambda: series.ended)
    assert not sampler.running
    frame = sampler.to_dataframe()
    assert set(frame.columns) == {"target", "cpu_percent", *Sample._fields}
    text = io.StringIO()
    sampler.to_csv(text)
    assert len(list(csv.DictReader(io.StringIO(text.getvalue())))) == len(series.samples)


def test_wrong_rates_are_refused() -> None:
    with pytest.raises(UsageError, match="not between"):
        Sampler(hz=1000)


def test_missing_pandas_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="needs pandas"):
        metrics.dataframe([])


def test_rates_come_from_differences() -> None:
    series = Series("x", 10)
    series.append(None)
    series.append(Sample(1.0, 0, 1, throttled_usec=0))
    series.append(Sample(2.0, 500_000, 1, throttled_usec=250_000))
    assert series.cpu_percent() == [(2.0, 50.0)]
    assert series.throttled_percent() == [(2.0, 25.0)]


@pytest.mark.parametrize(("version", "files"), [(1, V1), (2, V2)])
def test_stats_are_dockers(tmp_path: Path, version: int, files: dict[str, str]) -> None:
    reader = CgroupReader(version, {"": str(folder(tmp_path, files))})
    first = reader.read()
    assert first is not None
    before = stats_json(reader, first, id="a" * 64, name="web")
    second = first._replace(cpu_usec=first.cpu_usec + 1000, net_bytes=3000, net_rx_bytes=1000)
    stats = stats_json(reader, second, before, id="a" * 64, name="web")
    stats["cpu_stats"]["system_cpu_usage"] = before["cpu_stats"]["system_cpu_usage"] + 10_000_000
    stats["cpu_stats"]["online_cpus"] = 2
    json.dumps(stats)
    assert stats["cpu_stats"]["throttling_data"] == {
        "periods": 10,
        "throttled_periods": 4,
        "throttled_time": 7_000_000,
    }
    assert stats["memory_stats"]["stats"]["total_inactive_file" if version == 1 else "inactive_file"] == 1000
    assert stats_row(stats) == (
        "a" * 12,
        "web",
        "20.00%",
        "1.953KiB / 64MiB",
        "0.00%",
        "1kB / 2kB",
        "11B / 20B",
        "3",
    )
    reader.close()


def test_stats_of_a_process_have_all_parts() -> None:
    reader = ProcessReader(os.getpid())
    sample = reader.read()
    assert sample is not None
    stats = stats_json(reader, sample)
    assert stats["memory_stats"]["limit"] > 0
    assert len(stats_row(stats)) == len(metrics.STATS_HEADER)
    reader.close()


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, labkernel.metrics;"
        "print([m for m in ('matplotlib', 'pandas', 'numpy', 'psutil') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_vanished_directory_opens_as_a_reader_of_nothing() -> None:
    reader = samples.CgroupReader(2, {"": "/nonexistent"})
    assert reader.read() is None
    assert reader.limits() == Limits()
