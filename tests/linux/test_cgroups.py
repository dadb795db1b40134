"""Control groups on temporary directories for every layout, and on the machine's own where they can be written."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.linux import cgroups, limits

V1 = ("memory", "cpu", "cpuacct", "pids", "freezer", "blkio", "devices", "cpuset")
FILES_V1 = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes"),
    "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares"),
    "pids": ("pids.max",),
    "cpuset": ("cpuset.cpus", "cpuset.mems"),
    "blkio": ("blkio.weight",),
}
LIMITS = {
    "memory": {"limit": 64 << 20, "swap": 128 << 20, "reservation": 32 << 20},
    "cpu": {"quota": 50000, "period": 100000, "shares": 512},
    "pids": {"limit": 20},
}


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    for name in V1:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified" / "cgroup.controllers").touch()
    (tmp_path / "unified" / "cgroup.procs").touch()
    return tmp_path


@pytest.fixture
def proc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proc")
    (path / "cgroup").write_text("4:memory:/\n3:cpu,cpuacct:/\n0::/user.slice/me.scope\n")
    return path


def make_v2(root: Path, own: str, *, handed_down: str = "", controllers: str = "cpuset cpu io memory pids") -> Path:
    path = root
    for part in ["", *own.strip("/").split("/")]:
        path = path / part
        path.mkdir(exist_ok=True)
        (path / "cgroup.controllers").write_text(controllers)
        (path / "cgroup.procs").touch()
        (path / "cgroup.subtree_control").write_text(handed_down)
        if path != root:
            (path / "cgroup.type").write_text("domain\n")
    return path


def written(group: cgroups.Cgroup, files: dict[str, tuple[str, ...]]) -> None:
    """On a temporary directory the kernel does not make a group's files."""
    for controller, names in files.items():
        for name in names:
            (Path(group.paths[controller]) / name).touch()


def test_hybrid_takes_the_controllers_of_v1(v1: Path) -> None:
    found = cgroups.detect(str(v1))
    assert (found.version, found.hybrid) == (1, True)
    assert found.bases["memory"] == str(v1 / "memory")
    assert found.missing == {}
    assert set(found.enforcement().values()) == {"kernel"}


def test_a_missing_controller_is_named(v1: Path) -> None:
    (v1 / "pids" / "cgroup.procs").unlink()
    (v1 / "pids").rmdir()
    found = cgroups.detect(str(v1))
    assert "pids" in found.missing
    assert found.enforcement()["pids"] == "none"
    group = found.create("/labkernel/x", "one")
    group.limit({"pids": {"limit": 5}})
    assert group.unenforced == [("pids-limit", "no pids cgroup")]


def test_comounted_controllers_share_a_directory(tmp_path: Path) -> None:
    (tmp_path / "cpu,cpuacct").mkdir()
    (tmp_path / "cpu,cpuacct" / "cgroup.procs").touch()
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    found = cgroups.detect(str(tmp_path))
    assert found.bases["cpu"] == found.bases["cpuacct"] == str(tmp_path / "cpu,cpuacct")
    assert found.create("labkernel", "one").directories == [str(tmp_path / "cpu,cpuacct" / "labkernel" / "one")]


def test_nothing_mounted(tmp_path: Path) -> None:
    found = cgroups.detect(str(tmp_path))
    assert found.version == 0
    group = found.create("labkernel", "one", {"memory": {"limit": 1 << 26}})
    assert (group.paths, group.procs(), group.oom_count(), group.figures()) == ({}, [], 0, {})
    assert group.remove()


def test_v1_limits_land_in_their_files(v1: Path) -> None:
    group = cgroups.detect(str(v1)).create("/labkernel/abcd", "one")
    written(group, {name: FILES_V1[name] for name in ("memory", "cpu", "pids")})
    group.limit(LIMITS)
    assert group.unenforced == []
    memory = Path(group.paths["memory"])
    assert (memory / "memory.limit_in_bytes").read_text() == str(64 << 20)
    assert (memory / "memory.memsw.limit_in_bytes").read_text() == str(128 << 20)
    assert (Path(group.paths["cpu"]) / "cpu.cfs_quota_us").read_text() == "50000"
    assert (Path(group.paths["pids"]) / "pids.max").read_text() == "20"


def test_a_file_the_kernel_lacks_is_not_enforced_and_not_made(v1: Path) -> None:
    group = cgroups.detect(str(v1)).create("labkernel", "one")
    (Path(group.paths["memory"]) / "memory.limit_in_bytes").touch()
    group.limit({"memory": {"limit": 64 << 20, "swap": 128 << 20}})
    assert [setting for setting, _ in group.unenforced] == ["memory-swap"]
    assert not (Path(group.paths["memory"]) / "memory.memsw.limit_in_bytes").exists()


@pytest.mark.parametrize(
    ("resources", "writes"),
    [
        ({"memory": {"limit": 100, "swap": 250}}, [("memory.max", "100"), ("memory.swap.max", "150")]),
        ({"memory": {"limit": -1, "swap": -1}}, [("memory.max", "max"), ("memory.swap.max", "max")]),
        ({"memory": {"reservation": 50}}, [("memory.low", "50")]),
        ({"cpu": {"quota": 50000, "period": 100000}}, [("cpu.max", "50000 100000")]),
        ({"cpu": {"quota": -1}}, [("cpu.max", "max 100000")]),
        ({"cpu": {"shares": 1024}}, [("cpu.weight", "39")]),
        ({"cpu": {"shares": 2}}, [("cpu.weight", "1")]),
        ({"cpu": {"shares": 262144}}, [("cpu.weight", "10000")]),
        ({"cpu": {"cpus": "0-1", "mems": "0"}}, [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]),
        ({"pids": {"limit": 0}}, [("pids.max", "max")]),
        ({"blockIO": {"weight": 1000}}, [("io.weight", "10000")]),
        ({"unified": {"memory.high": "1000"}}, [("memory.high", "1000")]),
    ],
)
def test_v2_translation(resources: dict, writes: list[tuple[str, str]]) -> None:
    assert [(name, value) for _, name, value, _ in limits.translate(resources, version=2)] == writes


def test_v2_root_is_used_by_who_may_write_it(tmp_path: Path, proc: Path) -> None:
    make_v2(tmp_path, "user.slice/me.scope")
    found = cgroups.detect(str(tmp_path), proc=str(proc))
    assert (found.version, set(found.bases.values())) == (2, {str(tmp_path)})


@pytest.mark.parametrize(
    ("handed_down", "where"), [("", "user.slice/me.scope"), ("memory pids", "user.slice/me.scope")]
)
def test_v2_below_a_delegated_group(tmp_path: Path, proc: Path, handed_down: str, where: str) -> None:
    make_v2(tmp_path, where, handed_down=handed_down)
    (tmp_path / "cgroup.type").write_text("domain\n")  # a container: the root of the mount is a group like others
    found = cgroups.detect(str(tmp_path), proc=str(proc))
    assert set(found.bases.values()) == {str(tmp_path / where)}


def test_v2_hands_controllers_down_to_the_group(tmp_path: Path, proc: Path) -> None:
    own = make_v2(tmp_path, "user.slice/me.scope")
    (tmp_path / "cgroup.type").write_text("domain\n")
    cgroups.detect(str(tmp_path), proc=str(proc)).create("labkernel/abcd", "one")
    # a file keeps the last write only; the kernel adds each
    assert (own / "cgroup.subtree_control").read_text().startswith("+")


def test_v2_without_a_writable_group(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    make_v2(tmp_path, "a")
    (tmp_path / "a").chmod(0o555)
    tmp_path.chmod(0o555)
    found = cgroups.detect(str(tmp_path), proc="/nonexistent")
    tmp_path.chmod(0o755)
    assert found.version == 0
    assert "delegated" in found.missing["memory"]


def test_reopen_knows_the_version() -> None:
    assert cgroups.Cgroup.reopen({}).version == 0
    assert cgroups.Cgroup.reopen({"": "/x"}).version == 2
    assert cgroups.Cgroup.reopen({"memory": "/x"}).version == 1


def test_device_rules_read_as_the_kernel_writes_them() -> None:
    rules = [limits.device_rule(rule) for rule in limits.DEVICE_RULES]
    assert rules[:4] == ["a *:* rwm", "c *:* m", "b *:* m", "c 1:3 rwm"]
    assert rules[-1] == "c 136:* rwm"


# -- for real ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[cgroups.Cgroup]:
    hierarchy = cgroups.detect()
    if not {"memory", "pids", "cpu"} <= hierarchy.bases.keys():
        pytest.skip(f"no cgroups to write: {hierarchy.missing.get('memory', 'incomplete')}")
    parent = f"/labkernel/test-{secrets.token_hex(4)}"
    made = hierarchy.create(parent, "one", {**LIMITS, "devices": limits.DEVICE_RULES})
    yield made
    made.kill()
    assert made.remove(timeout_s=5)
    hierarchy.remove_parent(parent)


@pytest.fixture
def sleeper() -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_join_read_freeze_kill(group: cgroups.Cgroup, sleeper: int) -> None:
    group.join(sleeper)
    assert group.procs() == [sleeper]
    figures = group.figures()
    assert figures["pids"] == 1
    assert figures["memory_limit_bytes"] == 64 << 20
    group.freeze()
    assert group.frozen()
    group.thaw()
    assert not group.frozen()
    group.freeze()
    group.kill()
    assert os.waitpid(sleeper, 0)[1] == signal.SIGKILL
    assert group.oom_count() == 0


def test_who_joins_by_itself_locks_nobody_out(tmp_path: Path) -> None:
    for name in ("tasks", "cgroup.procs"):
        (tmp_path / name).touch()
    first = cgroups.Cgroup(1, {"memory": str(tmp_path)})
    first.join()
    assert ((tmp_path / "tasks").read_text(), (tmp_path / "cgroup.procs").read_text()) == ("0", "")
    first.join(17)  # all threads of another process
    assert (tmp_path / "cgroup.procs").read_text() == "17"
    cgroups.Cgroup(2, {"": str(tmp_path)}).join()
    assert (tmp_path / "cgroup.procs").read_text() == "07"  # written over, as cgroupfs takes it


def test_reopened_group_is_the_same(group: cgroups.Cgroup, sleeper: int) -> None:
    group.join(sleeper)
    assert cgroups.Cgroup.reopen(group.paths).procs() == [sleeper]


def test_removal_waits_for_the_last_process(group: cgroups.Cgroup, sleeper: int) -> None:
    group.join(sleeper)
    assert not group.remove(timeout_s=0.01)


def test_a_cpuset_is_made_when_asked_for(group: cgroups.Cgroup, sleeper: int) -> None:
    if not cgroups.detect().bases.get("cpuset"):
        pytest.skip("no cpuset controller here")
    group.join(sleeper)
    group.limit({"cpu": {"cpus": "0"}})
    assert os.sched_getaffinity(sleeper) == {0}
    assert group.unenforced == []


def test_devices_are_out_of_reach(group: cgroups.Cgroup, tmp_path: Path) -> None:
    if "devices" not in group.paths or os.geteuid() != 0:
        pytest.skip("no devices cgroup here")
    node = tmp_path / "mem"
    os.mknod(node, 0o20600, os.makedev(1, 1))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        group.join()
        words = []
        for path in ("/dev/null", str(node)):
            try:
                os.close(os.open(path, os.O_RDONLY))
                words.append("yes")
            except OSError as err:
                words.append(str(err.errno))
        os.write(writing, " ".join(words).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "yes 1"
    os.waitpid(pid, 0)


def test_other_rules_take_nothing_that_both_have_in_between(
    group: cgroups.Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "devices" not in group.paths or os.geteuid() != 0:
        pytest.skip("no devices cgroup here")
    more = [*limits.DEVICE_RULES, {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rwm"}]
    every = [limits.DEVICE_RULES[0], *({"allow": True, "type": kind, "access": "rwm"} for kind in "cb")]
    written: list[str] = []
    write = cgroups._write

    def write_and_note(path: str, text: str) -> None:
        written.append(text)
        write(path, text)

    for wanted in (more, limits.DEVICE_RULES, every, limits.DEVICE_RULES):
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(cgroups, "_write", write_and_note)
            group.limit({"devices": wanted})
        listed = Path(group.paths["devices"], "devices.list").read_text().splitlines()
        assert sorted(listed) == sorted(limits.device_rule(rule) for rule in wanted if rule["allow"])
        assert not any(text.startswith("a ") for text in written), written
        # What is made now below the wider parent has the usual rules before anybody is in it.
        cgroup = cgroups.detect().create(os.path.relpath(os.path.dirname(group.paths["memory"]), _base()), "two")
        try:
            listed = Path(cgroup.paths["devices"], "devices.list").read_text().splitlines()
            assert sorted(listed) == sorted(limits.device_rule(rule) for rule in limits.DEVICE_RULES[1:])
        finally:
            assert cgroup.remove()


def _base() -> str:
    return cgroups.detect().bases["memory"]


def test_only_what_differs_is_written_to_the_rules_of_devices() -> None:
    usual = [limits.device_rule(rule) for rule in limits.DEVICE_RULES]
    everything = [("devices.deny", usual[0]), *(("devices.allow", line) for line in usual[1:])]
    assert limits.device_changes(usual[1:], limits.DEVICE_RULES) == []
    assert limits.device_changes(["a *:* rwm"], limits.DEVICE_RULES) == everything
    assert limits.device_changes([], limits.DEVICE_RULES) == everything[1:]
    all_c = [limits.DEVICE_RULES[0], {"allow": True, "type": "c", "access": "rwm"}]
    assert limits.device_changes(["c *:* m", "b *:* m", "c 1:3 rw"], all_c) == [
        ("devices.allow", "c *:* rw"),
        ("devices.deny", "b *:* m"),
        ("devices.deny", "c 1:3 rw"),
    ]
    denied = [*limits.DEVICE_RULES, {"allow": False, "type": "c", "major": 1, "minor": 3, "access": "w"}]
    assert limits.device_changes(usual[1:], denied) == [*everything, ("devices.deny", "c 1:3 w")]
