"""Comparison as table, figure and JSON on made-up runs; the real thing on the engine where a VM can run."""

# ruff: noqa: RUF001 - tables say how many times with the proper sign

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkernel.comparisons import (
    Comparison,
    Run,
    disk_text,
    memory_bytes,
    memory_text,
    ratio_text,
    seconds_text,
)
from labkernel.engine import Engine
from labkernel.errors import LabkernelError, NoSuchImage, StartError, UsageError, VMError
from labkernel.measuring.bench import spent
from labkernel.measuring.figures import cpu_steps, memory_curve
from labkernel.measuring.measurements import Measurements
from labkernel.measuring.samples import Sample
from labkernel.metrics import Series
from labkernel.qemu import guest

MIB = 1 << 20


def a_run(kind: str, number: int = 1, **given: Any) -> Run:
    vm = kind == "vm"
    parts: dict[str, Any] = {
        "exit_code": 0,
        "first_instruction_s": 0.3 if vm else 0.004,
        "wall_s": 3.0 if vm else 0.2,
        "cpu_s": 2.0 if vm else 0.1,
        "peak_memory_bytes": (140 if vm else 20) * MIB,
        "disk_bytes": 3_000_000,
        "samples": [(i / 20, i * 33_000, 100 * MIB) for i in range(60)] if vm else [],
    }
    return Run(kind=kind, number=number, **{**parts, **given})  # type: ignore[arg-type]


def a_comparison(*runs: Run, **given: Any) -> Comparison:
    parts: dict[str, Any] = {
        "image": "hello",
        "command": ["sh", "-c", "echo $a $b"],
        "accelerator": "tcg",
        "kernels": {"container": "6.18.1", "vm": "6.1.0-cloud"},
        "start": "template",
    }
    return Comparison(runs=list(runs) or [a_run("container"), a_run("vm")], **{**parts, **given})


def test_the_table_has_the_rows_of_the_issue() -> None:
    rows = {row[0]: row[1:] for row in a_comparison().table()}
    assert rows["time to first instruction"] == ("4 ms", "0.30 s", "75×")
    assert rows["wall time"] == ("0.20 s", "3.00 s", "15×")
    assert rows["CPU time"] == ("0.10 s", "2.00 s", "20×")
    assert rows["peak memory"] == ("20 MiB", "140 MiB", "7×")
    assert rows["disk used"] == ("3 MB", "3 MB", "1×")
    assert rows["kernel seen inside"] == ("6.18.1 (the host's)", "6.1.0-cloud (its own)", "")
    assert rows["accelerator"] == ("none needed", "TCG (emulated in software), restored from a template", "")
    assert rows["exit status"] == ("0", "0", "same")


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_every_form_names_the_accelerator(accelerator: str) -> None:
    comparison = a_comparison(accelerator=accelerator)
    name = accelerator.upper()
    assert name in comparison.text()
    assert name in comparison._repr_html_()
    figure = comparison.figure()
    assert any(name in text.get_text() for text in figure.axes[0].get_legend().get_texts())
    assert name in figure.axes[2].get_title(loc="left")
    assert json.loads(comparison.to_json())["accelerator"] == accelerator


def test_several_runs_give_medians_with_their_spread() -> None:
    walls = (0.3, 0.1, 0.2)
    runs = [run for i, wall in enumerate(walls) for run in (a_run("container", i, wall_s=wall), a_run("vm", i))]
    comparison = a_comparison(*runs)
    assert comparison.median("container", "wall_s") == 0.2
    cells = {row[0]: row[1:] for row in comparison.table()}["wall time"]
    assert cells == ("0.20 s (0.10 s to 0.30 s)", "3.00 s", "15×")
    assert "medians of 3 runs each" in comparison.text()
    assert len(comparison.to_dataframe()) == 6
    comparison.to_png()


def test_what_was_not_measured_is_said() -> None:
    nothing = {"first_instruction_s": None, "cpu_s": None, "peak_memory_bytes": None, "disk_bytes": None}
    comparison = a_comparison(a_run("container", **nothing), a_run("vm", samples=[], **nothing))
    assert {row[0]: row[1:] for row in comparison.table()}["CPU time"] == ("not measured", "not measured", "")
    comparison.to_png()


def test_samples_of_a_process_stand_in_for_nothing() -> None:
    seen = Sample(1.0, 0, 8192, memory_peak_bytes=8192)
    series = Series("c", 10)
    series.append(seen)
    state: dict[str, Any] = {"usage": {}, "cgroup": {"version": 2, "paths": {"": "/a/group"}}}
    assert spent(state, series) == (0, 8192)
    state["cgroup"] = {"version": 0, "paths": {}}
    usage = {"cpu_usec": 900, "memory_peak_bytes": 9 * MIB, "source": "rusage"}
    assert spent({**state, "usage": usage}, series) == (900, 9 * MIB)
    cpu_usec, peak = spent(state, series)
    comparison = a_comparison(a_run("container", cpu_s=cpu_usec, peak_memory_bytes=peak), a_run("vm"))
    rows = {row[0]: row[1:] for row in comparison.table()}
    assert rows["CPU time"] == ("not measured", "2.00 s", "")
    assert rows["peak memory"] == ("not measured", "140 MiB", "")


def test_memory_of_the_largest_process_is_called_so() -> None:
    comparison = a_comparison(a_run("container", memory_source="rusage"), a_run("vm"))
    assert {row[0]: row[1:] for row in comparison.table()}["peak memory"] == (
        "20 MiB (largest process, with its set-up)",
        "140 MiB",
        "7×",
    )
    assert "largest process" in comparison.figure().axes[1].get_title(loc="left")


def test_shell_commands_are_no_formulas() -> None:
    title = a_comparison().figure().get_suptitle()
    assert title == r"hello: sh -c 'echo \$a \$b'"


def test_limits_are_lines_in_the_figure() -> None:
    figure = a_comparison(memory_bytes=64 * MIB, cpus=0.5).figure()
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"container's CPU limit: 0.5", "container's memory limit: 64 MiB"} <= words


def test_json_comes_back_and_foreign_json_is_refused() -> None:
    comparison = a_comparison(memory_bytes=64 * MIB, warnings=["a warning"])
    assert Comparison.from_json(comparison.to_json()) == comparison
    for text in ("{}", "[]", "nonsense", '{"format": "other"}'):
        with pytest.raises(UsageError, match="not a saved comparison"):
            Comparison.from_json(text)


def test_two_saved_comparisons_stand_side_by_side(engine: Engine) -> None:
    ours, theirs = a_comparison(machine="this one"), a_comparison(a_run("container"), machine="small", no_vm="no QEMU")
    both = engine.comparisons.saved(ours.to_json(), theirs.to_json())
    assert isinstance(both, Measurements)
    assert [row.name for row in both.rows] == ["container@1", "vm@1", "container@2"]
    assert both.experiments == ["start", "wall", "cpu_time", "peak", "disk"]
    assert both.median("container@2", "wall") == ours.median("container", "wall_s")
    assert "this one" in both.caption()
    assert "small" in both.caption()
    assert both.to_png().startswith(b"\x89PNG")
    # Workloads of one machine beside a command of another have what both measured.
    mixed = engine.comparisons.saved(ours.to_json(), both.to_json())
    assert [row.name for row in mixed.rows][2:] == ["container@1@2", "vm@1@2", "container@2@2"]


def test_a_notebook_shows_picture_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    a_comparison()._ipython_display_()
    assert [sorted(data) for data in shown] == [["image/png", "text/plain"], ["text/html", "text/plain"]]
    assert "data:" not in shown[1]["text/html"]


def test_a_container_alone_says_why() -> None:
    alone = a_comparison(a_run("container"), no_vm="QEMU is not installed (`get it`)", kernels={"container": "6.18.1"})
    assert len(alone.header()) == 2
    assert {len(row) for row in alone.table()} == {2}
    assert "no virtual machine: QEMU is not installed" in alone.text()
    assert "No virtual machine: QEMU is not installed" in alone._repr_html_()
    assert [axes.get_title(loc="left") for axes in alone.figure().axes] == ["CPU", "Memory: the container's cgroup"]
    assert alone.to_png().startswith(b"\x89PNG")
    assert Comparison.from_json(alone.to_json()) == alone


def test_without_qemu_the_container_is_measured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> str:
        raise VMError("QEMU is not installed", resolution="get it")

    monkeypatch.setattr(guest, "find_qemu", nothing)
    found = engine.comparisons.compare("lab/busybox", ["true"], runs=2)
    assert [run.kind for run in found.runs] == ["container"] * 2
    assert found.no_vm == "QEMU is not installed (get it)"
    assert engine.containers.list(all=True) == []


def test_curves_keep_the_cpu_time_whatever_the_sampling() -> None:
    for run in (a_run("vm"), a_run("container"), a_run("vm", samples=[]), a_run("container", wall_s=0.005)):
        edges, percents = cpu_steps(run)
        area = sum(p / 100 * (b - a) for p, a, b in zip(percents, edges, edges[1:], strict=False))
        assert math.isclose(area, run.cpu_s or 0, rel_tol=1e-3)
        times, values = memory_curve(run)
        assert times == sorted(times)
        assert values[-1] == 0


def test_wording() -> None:
    assert [seconds_text(s) for s in (0.00413, 0.0999, 0.29, 12.44)] == ["4.13 ms", "99.9 ms", "0.29 s", "12.4 s"]
    assert [ratio_text(r) for r in (0.207, 1.31, 74.4)] == ["0.21×", "1.3×", "74×"]
    assert [memory_text(m) for m in (1.543 * MIB, 139.6 * MIB, 512)] == ["1.54 MiB", "140 MiB", "512 B"]
    assert disk_text(1_980_000) == "1.98 MB"
    assert [memory_bytes(m) for m in ("64m", "1g", 5, None, "2KiB")] == [64 * MIB, 1 << 30, 5, None, 2048]
    with pytest.raises(UsageError, match="invalid size"):
        memory_bytes("much")


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, labkernel.comparisons, labkernel.measuring.figures; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# -- on the engine


def test_bad_input_is_refused_before_anything_runs(engine: Engine) -> None:
    compare = engine.comparisons.compare
    with pytest.raises(UsageError, match="at least one run"):
        compare("lab/busybox", ["true"], runs=0)
    with pytest.raises(UsageError, match="volumes cannot be compared"):
        compare("lab/busybox", ["true"], volumes=["/tmp:/tmp"])
    with pytest.raises(NoSuchImage):
        compare("no-such-image-here", ["true"])
    assert not engine.containers.list(all=True)


@pytest.fixture
def vm_works(needs: Callable[..., None]) -> None:
    needs("vm qemu", "vm init", "vm mke2fs", "vm kernel")


@pytest.mark.slow
@pytest.mark.usefixtures("vm_works")
def test_the_same_command_both_ways(engine: Engine) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $GREETING; exit 3"
    lines: list[str] = []
    comparison = engine.comparisons.compare(
        "lab/busybox",
        ["sh", "-c", script],
        runs=2,
        memory="64m",
        environment={"GREETING": "hello"},
        notify=lines.append,
    )
    assert [run.kind for run in comparison.runs] == ["container", "vm", "vm", "container"]
    assert {run.exit_code for run in comparison.runs} == {3}
    assert {run.output.strip() for run in comparison.runs} == {"hello"}
    assert comparison.accelerator in ("kvm", "tcg")
    assert comparison.kernels["vm"] != ""
    for run in comparison.runs:
        assert run.first_instruction_s is not None
        assert 0 < run.first_instruction_s < run.wall_s
        assert (run.peak_memory_bytes or 0) > 0
    assert all((run.cpu_s or 0) > 0 and run.samples for run in comparison.of("vm"))
    assert "exit status 3" in comparison.text()
    assert any("run 2 of 2" in line for line in lines)
    assert not engine.containers.list(all=True)
    assert not engine.vms.list(all=True)
    comparison.to_png()


@pytest.mark.slow
@pytest.mark.usefixtures("vm_works")
def test_kernels_are_named_where_the_image_has_no_uname(engine: Engine, tmp_path: Path) -> None:
    source = "FROM lab/busybox AS base\nFROM scratch\nCOPY --from=base /bin/busybox /bin/sh\n"
    engine.builds.build(source, context=tmp_path, tags=["bare"])
    found = engine.comparisons.compare("bare", ["/bin/sh", "-c", "exit 0"])
    assert found.kernels["container"] == platform.release()
    assert found.kernels["vm"]


@pytest.mark.slow
@pytest.mark.usefixtures("vm_works")
def test_a_command_that_is_not_there(engine: Engine) -> None:
    with pytest.raises(StartError) as caught:
        engine.comparisons.compare("lab/busybox", ["no-such-command"])
    assert caught.value.exit_code == 127
    assert not engine.containers.list(all=True)


@pytest.mark.slow
@pytest.mark.usefixtures("vm_works")
def test_too_slow_a_command_is_ended(engine: Engine) -> None:
    with pytest.raises(LabkernelError, match="did not end"):
        engine.comparisons.compare("lab/busybox", ["sleep", "60"], timeout_s=15)
    assert not engine.containers.list(all=True)
