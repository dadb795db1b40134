"""The probe on this machine, as the tests' user and as a user without privileges; the choice of the driver."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from labkernel.errors import DriverError
from labkernel.runtime import driver as drivers
from labkernel.runtime import probe as probes
from labkernel.runtime import tries
from labkernel.runtime.probe import Capability


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SimpleNamespace]:
    for name in ("root", "run"):
        (tmp_path / name).mkdir()
    yield SimpleNamespace(root=tmp_path / "root", runtime_dir=tmp_path / "run")
    assert os.listdir(tmp_path / "root" / "tmp") == []


def test_every_capability_tells_what_to_do(store: SimpleNamespace) -> None:
    found = probes.probe(store)
    names = [capability.name for capability in found]
    assert len(set(names)) == len(names)
    assert {"user namespace", "overlay", "cgroup memory", "seccomp", "kvm device", "disk space"} <= set(names)
    for capability in found:
        assert capability.needed_for
        assert capability.ok or (capability.cause and capability.remedy), capability
        json.dumps(capability.to_dict())


def test_verdict_is_kept_and_made_anew_on_demand(store: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probes.tried(store)
    runs: list[int] = []
    real = probes._run_tries
    monkeypatch.setattr(probes, "_run_tries", lambda where: runs.append(1) or real(where))
    assert probes.tried(store) == first
    assert runs == []
    probes.tried(store, fresh=True)
    assert runs == [1]


def test_verdict_of_another_kernel_does_not_count(store: SimpleNamespace) -> None:
    probes.tried(store)
    kept = store.runtime_dir / "probe.json"
    data = json.loads(kept.read_text())
    data["answers"] = {"stale": True}
    data["key"][2] = "2.4.0"
    kept.write_text(json.dumps(data))
    assert "stale" not in probes.tried(store)


def test_damaged_verdict_is_made_anew(store: SimpleNamespace) -> None:
    (store.runtime_dir / "probe.json").write_text("{")
    assert "root" in probes.tried(store)


def test_refused_id_ranges_are_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "first_range", lambda path, uid: (4_000_000_000, 5))
    answer = tries.attempt(tries.try_id_ranges)
    assert answer is not None or os.geteuid() == 0


def fake(*, root: bool = True, user: bool = True, without: tuple[str, ...] = ()) -> list[Capability]:
    names = ["root privileges", "user namespace", "id ranges", "mount", "overlay", "proc mount", "mknod", "seccomp"]
    names += [f"{kind} namespace" for kind in ("pid", "network", "ipc", "uts", "cgroup")]
    names += [f"cgroup {kind}" for kind in ("memory", "cpu", "cpuacct", "pids", "freezer", "devices")]
    names += ["libseccomp", "local store", "ptrace"]
    missing = {*without, *(() if root else ("root privileges",)), *(() if user else ("user namespace",))}
    return [
        Capability(name, ok=name not in missing, errno=1, cause=f"no {name}", remedy=f"get {name}", needed_for="tests")
        for name in names
    ]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.delenv("LABKERNEL_DRIVER", raising=False)
    store = SimpleNamespace(root=tmp_path, runtime_dir=tmp_path)

    def choose(name: str | None = None, **what: object) -> drivers.Driver:
        monkeypatch.setattr(drivers, "probe", lambda _store: fake(**what))  # type: ignore[arg-type]
        return drivers.choose_driver(store, name)

    return choose


def test_root_comes_first(machine) -> None:  # type: ignore[no-untyped-def]
    found = machine()
    assert (found.name, found.id_mapping, found.overlay) == ("root", "full", "overlay")
    assert found.enforced
    assert found.warnings == ()
    assert "kernel" in found.describes


def test_rootless_where_root_is_not(machine) -> None:  # type: ignore[no-untyped-def]
    found = machine(root=False, without=("cgroup memory", "cgroup cpu", "cgroup pids"))
    assert (found.name, found.id_mapping, found.overlay) == ("rootless", "subuid", "overlay-userxattr")
    assert not found.enforced
    assert len(found.warnings) == 1
    assert machine(root=False, without=("id ranges",)).single_id


def test_degrades_with_a_warning(machine) -> None:  # type: ignore[no-untyped-def]
    found = machine(without=("overlay", "libseccomp", "cgroup pids"))
    assert found.overlay == "copy"
    assert not found.seccomp
    assert len(found.warnings) == 3


def test_a_driver_that_cannot_work_says_why(machine) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DriverError) as caught:
        machine("root", root=False)
    assert "no root privileges" in (caught.value.details or "")
    assert caught.value.resolution == "get root privileges"
    with pytest.raises(DriverError, match="no driver works"):
        machine(root=False, user=False, without=("ptrace",))
    with pytest.raises(DriverError, match="proot does not work here"):
        machine("proot", without=("ptrace",))
    assert machine(root=False, user=False).name == "proot"
    with pytest.raises(DriverError, match="unknown driver"):
        machine("docker")


def test_environment_names_the_driver(machine, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("LABKERNEL_DRIVER", "rootless")
    assert machine().name == "rootless"
    assert machine("root").name == "root"


def test_group_of_a_store(tmp_path: Path) -> None:
    first = drivers.cgroup_parent(SimpleNamespace(root=tmp_path, runtime_dir=tmp_path))
    assert first.startswith("/labkernel/")
    assert len(first) == len("/labkernel/") + 8
