"""The world before and after a mistake, and a command line to make it with: shared by the tests of bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkernel.engine import Engine
from labkernel.linux import cgroups
from labkernel.runtime.driver import cgroup_parent

REPO = Path(__file__).resolve().parents[2]
BUSYBOX = "lab/busybox"
USED = "lk-test/used"
RUN = ("run", "--rm", "--network", "none")
IS_ROOT = os.geteuid() == 0
SETTLE_S = 60.0

World = dict[str, Any]


def list_world(engine: Engine) -> World:
    """All the engine has: rows, files, mounts on the host, groups and processes beyond the warm pool's."""
    layout = engine.layout
    engine.containers.reconcile()  # rows of containers that have removed themselves go when they are met
    tables = {
        "images": "SELECT id FROM images",
        "tags": "SELECT name FROM tags",
        "containers": "SELECT name FROM containers",
        "volumes": "SELECT name FROM volumes",
        "unpacked": "SELECT diff_id FROM layers",
    }
    world: World = {name: sorted(row[0] for row in engine.db.query(query)) for name, query in tables.items()}
    for path in (layout.containers, layout.layers, layout.tmp, layout.volumes, layout.blobs / "sha256"):
        world[str(path)] = sorted(os.listdir(path))
    world["mounts"] = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4].startswith((f"{layout.root}/", f"{layout.runtime_dir}/"))
    ]
    return {**world, **_list_groups(engine)}


def _list_groups(engine: Engine) -> World:
    """Most groups and processes in any hierarchy: each warm child waits in a group of its own and does not count."""
    warm = engine.runtime.ensure().warm
    groups = processes = 0
    parent = cgroup_parent(engine.layout).strip("/")
    for base in set(cgroups.detect().bases.values()):
        folders = [path for path in Path(base, parent).glob("*") if path.is_dir()]
        members = [line for path in folders for line in _lines(path / "cgroup.procs")]
        groups, processes = max(groups, len(folders) - warm), max(processes, len(members) - warm)
    return {"groups": max(groups, 0), "processes": max(processes, 0)}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def differences(engine: Engine, before: World) -> dict[str, tuple[Any, Any]]:
    """What is not as it was. Teardown follows the answer, so it is waited for, with an end."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = list_world(engine)
        changed = {key: (before[key], after[key]) for key in before if after[key] != before[key]}
        if not changed or time.monotonic() > deadline:
            return changed
        time.sleep(0.05)


def settle(engine: Engine) -> World:
    """The world once the containers that removed themselves are gone, with their groups; none may run."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        world = list_world(engine)
        ids = sorted(row[0] for row in engine.db.query("SELECT id FROM containers"))
        if world[str(engine.layout.containers)] == ids and world["groups"] == world["processes"] == 0:
            return world
        assert time.monotonic() < deadline, world
        time.sleep(0.02)


class Unchanged:
    """`with Unchanged(engine):` the block leaves the world as it was, and the store without a fault."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        self.before = settle(self.engine)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert differences(self.engine, self.before) == {}
            assert self.engine.check() == []


def environment(engine: Engine, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(REPO),
        **more,
    }


def labkernel(env: Mapping[str, str], *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 90}
    return subprocess.run([sys.executable, "-m", "labkernel.cli", *words], **{**settings, "env": env, **more})


def expect_error(done: subprocess.CompletedProcess[str], code: int, brief: str, hint: str | None = "") -> None:
    """`brief` in the one line that begins with `labkernel: `; `hint`: its beginning, None for an error without one."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    briefs = [line for line in lines if line.startswith("labkernel: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(briefs) == 1, done.stderr
    assert brief in briefs[0]
    assert done.returncode == code, done.stderr
    assert len(hints) == (hint is not None), done.stderr
    assert hint is None or hint in hints[0]


def stores(root: Path, runtime_dir: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "LABKERNEL_ROOT": str(root),
        "LABKERNEL_RUNTIME_DIR": str(runtime_dir),
    }


class Disk:
    """A small file system of its own; unmounted at the end, lazily, since a supervisor may still be leaving."""

    def __init__(self, path: Path, size: str = "16m") -> None:
        self.path = path
        self.size = size

    def __enter__(self) -> Disk:
        self.path.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "labkernel-test", str(self.path)], check=True
        )
        return self

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)


class open_engine:
    """An engine whose supervisor ends with the block."""

    def __init__(self, root: Path, runtime_dir: Path) -> None:
        self.engine = Engine.open(root, runtime_dir=runtime_dir)

    def __enter__(self) -> Engine:
        return self.engine

    def __exit__(self, *_: object) -> None:
        self.engine.runtime.shutdown(force=True)
        self.engine.close()
