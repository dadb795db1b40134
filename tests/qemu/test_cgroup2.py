"""cgroup version 2, whatever this machine has: the engine in a virtual machine with the distribution's kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from labkernel.engine import Engine
from labkernel.errors import LabkernelError
from labkernel.linux import seccomp

REPO = Path(__file__).resolve().parents[2]
# What the engine imports beside the standard library.
PACKAGES = ("msgspec", "typing_extensions", "pyseccomp", "isal")
TIMEOUT_S = 900
DOCKERFILE = """
FROM lab/debian
COPY --from=lab/busybox /bin/busybox /bin/busybox
COPY lib/ /usr/lib/
COPY lab/ /lab/
ENV PYTHONPATH=/lab/packages LABKERNEL_DRIVER=root
"""


@pytest.fixture(scope="module")
def machine(shared_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with Python and this code; skips where there is no virtual machine or nothing to make it of."""
    for capability in shared_engine.vms.probe():
        if not capability.ok and capability.name != "vm kvm":
            pytest.skip(f"{capability.name}: {capability.cause}")
    library = seccomp.library_path()
    if library is None:
        pytest.skip("libseccomp is not installed")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    try:
        had = shared_engine.containers.run("lab/debian", ["ls", "/usr/bin"], remove=True).decode().split()
    except LabkernelError as err:
        pytest.skip(" ".join(err.render()))
    if version not in had:
        pytest.skip(f"lab/debian has no {version}, for which the packages here are compiled")
    context = tmp_path_factory.mktemp("machine")
    folder = context / "lab" / "packages"
    shutil.copytree(REPO / "labkernel", folder / "labkernel", ignore=shutil.ignore_patterns("labextension"))
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        assert found is not None, name
        assert found.origin is not None, name
        origin = Path(found.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, folder / name)
        else:
            shutil.copy(origin, folder)
    (context / "lib").mkdir()
    shutil.copy(os.path.realpath(library), context / "lib" / "libseccomp.so.2")
    shutil.copy(Path(__file__).with_name("inside_cgroup2.py"), context / "lab")
    (context / "Dockerfile").write_text(DOCKERFILE)
    shared_engine.images.resolve("lab/busybox")
    shared_engine.images.build(path=str(context), tag="machine")
    return "machine"


@pytest.fixture(scope="module")
def found(shared_engine: Engine, machine: str) -> dict[str, Any]:
    command = ["python3", "/lab/inside_cgroup2.py"]
    result = shared_engine.vms.run(machine, command, mem_limit="1g", remove=True, cold=True, timeout_s=TIMEOUT_S)
    assert result.exit_code == 0, result.stderr.decode()
    answers: dict[str, Any] = json.loads(result.stdout)
    return answers


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_every_limit_is_the_kernels(found: dict[str, Any]) -> None:
    assert {found["driver"][name] for name in ("memory", "cpu", "pids", "freezer", "devices", "blkio")} == {"kernel"}
    group, memory, cpu, pids, closed, _ = found["limits"]
    assert (group, memory, cpu, pids, closed) == ("0::/", str(64 << 20), "50000 100000", "50", "read-only")
    assert found["updated"] == str(48 << 20)
    assert found["stats"] == [True, 48 << 20, 42]


def test_memory_and_processes_stay_inside(found: dict[str, Any]) -> None:
    assert found["oom"] == [137, True]
    assert "can't fork" in found["fork"]


def test_devices_are_out_of_reach(found: dict[str, Any]) -> None:
    """Without a devices controller it is a BPF program that denies them."""
    denied, allowed = found["device"].strip().splitlines()
    assert "not permitted" in denied
    assert allowed.strip() == "1"


def test_freezing_and_killing_are_the_groups(found: dict[str, Any]) -> None:
    assert found["frozen"] == ["paused", True]
    assert found["exec"] == [3, "0::/\n"]
    assert found["groups"] == []
    assert found["problems"] == []
