"""Experiments: their values and wording without an engine, and each of them once on the real one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import LabkernelError, UsageError, VMError
from labkernel.measuring import density, subjects
from labkernel.measuring.comparison import Run
from labkernel.measuring.density import Curve, Density
from labkernel.measuring.experiments import experiments_of, nanoseconds_text
from labkernel.measuring.isolation import Isolation
from labkernel.measuring.measurements import Measurements, Row, outliers
from labkernel.measuring.portability import Portability


def some(**given: object) -> Measurements:
    rows = [
        Row("bare", "bare process", "bare", {"syscall": [300.0, 310.0, 290.0]}),
        Row("root", "container (root)", "container", {"syscall": [400.0] * 5 + [9000.0], "start": [0.004, 0.005]}),
        Row("vm", "VM, TCG (template)", "vm", {"syscall": [2000.0, 2100.0], "start": [0.4, 0.5], "idle": [1.3e8]}),
    ]
    parts = {"image": "hello", "command": [], "experiments": ["start", "idle", "syscall"], "rows": rows, "runs": 2}
    return Measurements(**{**parts, **given})  # type: ignore[arg-type]


def test_outliers_are_far_from_the_median_in_robust_terms() -> None:
    assert outliers([1.0, 1.1, 0.9, 1.0, 50.0]) == [False, False, False, False, True]
    assert outliers([1.0, 50.0]) == [False, False]
    assert outliers([2.0] * 6) == [False] * 6


def test_the_table_names_medians_spread_and_what_is_not_told() -> None:
    found = some(left_out={"proot": "no proot"})
    assert found.header() == ("", "bare process", "container (root)", "VM, TCG (template)")
    start, idle, syscall = found.table()
    assert start == ("start: first instruction", "-", "4.5 ms (4 ms to 5 ms)", "0.45 s (0.40 s to 0.50 s)")
    assert idle[1:] == ("-", "-", "124 MiB")
    assert syscall[1] == "300 ns (290 ns to 310 ns)"
    assert "proot: left out: no proot" in found.text()
    assert "2 runs in interleaved order" in found.caption()
    assert "<table" in found._repr_html_()
    assert found.ratio("syscall", "vm", "root") == "5.1×"  # noqa: RUF001
    with pytest.raises(UsageError, match="no such row"):
        found.row("moon")


BROKEN = """
from labkernel.measuring.measurements import Measurements, Row
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance()
rows = [Row("bare", "bare process", "bare", {"syscall": [300.0, 310.0]})]
found = Measurements("hello", [], ["syscall"], rows, 2, machine="here", measured_at="now", left_out={}, warnings=[])
found._ipython_display_()
try:
    found.figure()
except Exception as err:
    print(type(err).__name__, err)
"""


def test_without_a_usable_matplotlib_the_table_stays() -> None:
    env = {**os.environ, "MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", BROKEN], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "one system call" in done.stdout
    assert "no figure: a picture needs matplotlib" in done.stdout
    assert "UsageError a picture needs matplotlib" in done.stdout


def measured(engine: Engine, monkeypatch: pytest.MonkeyPatch, fails_at: int, rows: list[str]) -> Measurements:
    """Measured with a bare process that cannot be run any more at one of its runs."""
    runs: list[int] = []
    real = subjects.Bare.run

    def run(self: subjects.Bare, *given: object) -> object:
        runs.append(1)
        if len(runs) == fails_at:
            raise LabkernelError("the process was lost")
        return real(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(subjects.Bare, "run", run)
    return engine.comparisons.measure("busybox", "start,syscall", runs=2, rows=rows)


def test_a_row_that_fails_on_the_way_costs_only_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(engine, monkeypatch, 3, ["bare", "container"])
    assert found.left_out == {"bare": "run 2: the process was lost"}
    assert [len(row.values["start"]) for row in found.rows] == [2]
    assert "left out: run 2" in found.text()


def test_saved_figures_come_back_and_stand_beside_others() -> None:
    found = some()
    again = Measurements.from_json(found.to_json())
    assert again == found
    both = again.beside(some(machine="another machine"))
    assert [row.name for row in both.rows] == ["bare@1", "root@1", "vm@1", "bare@2", "root@2", "vm@2"]
    assert "another machine" in both.caption()
    assert len(found.to_dataframe()) == len(found.records()) == 16
    for text in ("{}", "no", json.dumps({"format": "other/1"})):
        with pytest.raises(UsageError, match="not saved measurements"):
            Measurements.from_json(text)


@pytest.mark.parametrize(
    ("source", "output", "peak", "noted"),
    [
        ("cgroup", "peak_kib=900\n", 14 << 20, False),
        ("rusage", "peak_kib=900\n", 900 << 10, False),
        ("rusage", "hello\n", 14 << 20, True),
    ],
)
def test_a_peak_without_a_cgroup_is_the_programs_own(source: str, output: str, peak: int, noted: bool) -> None:
    """The kernel's figure of a process begins before its exec: as a copy of the engine's it had 14 MiB."""
    ran = Run("container", 0, 0, 0.01, 0.1, 0.01, 14 << 20, output=output, memory_source=source)
    row = subjects.Container.__new__(subjects.Container)
    row.notes = []
    row._bench = SimpleNamespace(run_container=lambda *_: ran)  # type: ignore[assignment]
    assert row.run(["true"], {}).peak_bytes == peak
    assert bool(row.notes) == noted


def test_density_says_why_a_machine_does_not_start() -> None:
    """It has a number before it is known that it cannot start; killing that would have hidden why."""

    def run(_image: Any, _args: Any, *, on_start: Any, **_options: Any) -> None:
        on_start(SimpleNamespace(kill=lambda: pytest.fail("there is nothing to kill")))
        raise VMError("no kernel for it")

    lab: Any = SimpleNamespace(vms=SimpleNamespace(run=run))
    with pytest.raises(VMError, match="no kernel for it"):
        density._machines(lab, None, (1, 2))  # type: ignore[arg-type]


def test_the_figure_has_a_panel_for_each_experiment() -> None:
    figure = some().figure()
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == [
        "start: first instruction",
        "memory, idle",
        "one system call",
    ]
    assert some().to_png()[:4] == b"\x89PNG"


def test_workloads_are_chosen_by_name() -> None:
    assert [one.name for one in experiments_of("syscall, exec")] == ["syscall", "exec"]
    assert len(experiments_of("all")) == len(experiments_of(["all", "cpu"])) > 10
    for wrong in ("sleep", ""):
        with pytest.raises(UsageError):
            experiments_of(wrong)
    assert [nanoseconds_text(value) for value in (305.2, 1157.0, 4.2e6, 2e9)] == ["305 ns", "1.16 µs", "4.2 ms", "2 s"]


def test_density_is_a_line_through_what_was_measured() -> None:
    ours = Curve("container", "container", "containers", [(1, 300), (4, 900), (8, 1700)])
    assert ours.line == pytest.approx((100.0, 200.0))
    assert ours.fitting(10_100) == 50
    assert Curve("vm", "VM", "VMs", [(2, 1000)]).fitting(5000) == 10
    assert Curve("vm", "VM", "VMs", [(1, 1000), (2, 900)]).line[1] > 0, "noise is not less than nothing"
    found = Density("hello", 1 << 30, [ours, Curve("vm", "VM (TCG)", "VMs", [(1, 1 << 27), (2, 1 << 28)])], "here", [])
    assert "extrapolated" in found.text()
    assert found.rows()[1]["fitting"] == 8
    assert found.to_png()[:4] == b"\x89PNG"


def test_whose_kernel_it_is_the_boot_id_tells() -> None:
    seen = {"host": {"boot_id": "a"}, "container": {"boot_id": "a"}, "vm": {"boot_id": "b", "memory": "1024"}}
    found = Isolation("hello", "root", seen, "here", [])
    assert found.shares_kernel == {"container": True, "vm": False}
    assert found.table()[-1][2] == "this machine and everything on it"
    assert "1 KiB" in found.text()


def test_other_files_are_not_the_same() -> None:
    side = {"side": "container", "image": "sha256:1", "kernel": "6", "files": "3", "tree": "ab"}
    found = Portability("hello", "sha256:1", "sha256:1", 100, [side, {**side, "side": "VM"}], {}, "here")
    assert found.same
    other = Portability("hello", "sha256:1", "sha256:1", 100, [side, {**side, "tree": "cd"}], {"docker": "no"}, "here")
    assert not other.same
    assert "docker: left out: no" in other.text()


def test_each_driver_measures_itself(engine: Engine, tmp_path: Path) -> None:
    found = engine.comparisons.measure(
        "busybox",
        "start,idle,disk,syscall,exec,file,network",
        runs=1,
        rows=["bare", "container"],
    )
    own = found.row(engine.driver.name)
    assert own.family == "container"
    for name in ("start", "wall", "idle", "disk", "syscall", "exec", "file", "network_rtt", "network_throughput"):
        assert own.values[name][0] > 0, name
    assert found.row("bare").median("syscall")
    assert not [image for image in engine.images.list() if "labkernel-bench" in str(image.tags)]
    with pytest.raises(UsageError, match="no such row"):
        engine.comparisons.measure("busybox", rows=["moon"])


def test_a_command_is_measured_in_the_rows_asked_for(engine: Engine) -> None:
    found = engine.comparisons.measure("busybox", command=["sh", "-c", "exit 3"], runs=2, rows=["bare", "container"])
    assert [row.name for row in found.rows] == [engine.driver.name]
    assert len(found.rows[0].values["start"]) == 2
    assert "bare" in found.left_out
    assert any("exit status 3" in warning for warning in found.warnings)


def test_rows_of_other_drivers_have_a_store_of_their_own(engine: Engine) -> None:
    others = [name for name in ("rootless", "proot") if name != engine.driver.name]
    before = set(Path("/tmp").glob("lk-row-*"))
    found = engine.comparisons.measure("busybox", "syscall", runs=1, rows=["container", *others])
    assert set(Path("/tmp").glob("lk-row-*")) <= before
    for name in others:
        assert name in found.left_out or found.row(name).values["syscall"][0] > 0


@pytest.mark.slow
def test_machines_are_measured_too(engine: Engine) -> None:
    try:
        found = engine.comparisons.measure("busybox", "start,idle,syscall", runs=1, rows=["container", "vm"])
    except LabkernelError as err:
        pytest.skip(f"no virtual machine here: {err}")
    if "vm" in found.left_out:
        pytest.skip(f"no virtual machine here: {found.left_out['vm']}")
    machine = found.row("vm")
    assert machine.values["syscall"][0] > 0
    assert machine.values["idle"][0] > 50e6
    seen = engine.comparisons.isolation()
    assert seen.shares_kernel == {"container": True, "vm": False}
    dense = engine.comparisons.density(containers=(1, 2), machines=(1,), memory="1g")
    assert dense.curve("container").fitting(1 << 30) > dense.curve("vm").fitting(1 << 30) > 0


@pytest.mark.parametrize("row", ["container", "rootless"])
def test_nothing_goes_on_when_who_measures_is_killed(engine: Engine, tmp_path: Path, row: str) -> None:
    """Neither the container nor, of a row with a store of its own, its supervisor and files."""
    if row == "rootless" and engine.driver.name != "root":
        pytest.skip("the engine's own driver needs no store beside it")
    code = "import sys\nfrom labkernel.engine import Engine\n"
    code += "lab = Engine.open(sys.argv[1], runtime_dir=sys.argv[2])\n"
    code += "command = ['sh', '-c', 'while true; do sleep 0.0789; done']\n"
    code += f"lab.comparisons.measure('busybox', command=command, runs=9, rows=[{row!r}])"
    argv = [sys.executable, "-c", code, str(engine.layout.root), str(engine.layout.runtime_dir)]

    def stores() -> set[Path]:
        return set(Path("/tmp").glob("lk-row-*"))

    def running() -> list[str]:
        found = []
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [words] if "sleep 0.0789; done" in words and "Engine.open" not in words else []
        return found

    before = stores()
    with subprocess.Popen(argv) as client:
        wait_until(lambda: running(), "the container runs")
        mine = stores() - before
        client.kill()
    wait_until(lambda: not running(), "the container has ended")
    wait_until(lambda: not mine & stores(), "its store is gone")
    assert bool(mine) == (row == "rootless")


def test_the_same_files_in_each_driver_and_the_archive(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkernel.measuring.portability.ROWS", (engine.driver.name, "rootless"))
    found = engine.comparisons.portability("busybox")
    assert found.same, found
    assert found.archive_bytes > 1_000_000
