"""What the build cache holds, and what a prune with filters takes of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel.building.usage import CacheRecord, selected, taken_bytes
from labkernel.engine import Engine
from labkernel.errors import InvalidFilter, LabkernelError, UsageError

FILE = "RUN head -c 300000 /dev/zero > /zero\n"
MOUNT = "RUN --mount=type=cache,id=mine,target=/cache head -c 1000 /dev/zero > /cache/file\n"


def record(id: str, size: int = 10, *, used: float = 0.0, **more: Any) -> CacheRecord:
    return CacheRecord(id, more.pop("kind", "regular"), more.pop("description", ""), size, 0.0, used, **more)


def ids(found: list[CacheRecord]) -> list[str]:
    return [each.id for each in found]


def test_each_kind_is_told(fresh_engine: Engine, tmp_path: Path) -> None:
    engine = fresh_engine
    assert engine.builds.usage() == []
    began = time.time()
    result = engine.builds.build("FROM lab/busybox\n" + FILE + MOUNT + "LABEL a=b\n", tags=["usage"])
    found = {each.description: each for each in engine.builds.usage()}
    zero = next(each for text, each in found.items() if "300000" in text)
    assert (zero.kind, zero.shared, zero.in_use) == ("regular", True, False)
    assert zero.size_bytes >= 300000
    assert began <= zero.created_at <= zero.used_at <= time.time()
    mount = found["cache mount mine at /cache"]
    assert (mount.kind, mount.shared) == ("exec.cachemount", False)
    assert mount.size_bytes >= 1000
    assert found["LABEL a=b"].size_bytes == 0
    # what an image has too is not the cache's to free
    assert taken_bytes(engine.builds.usage()) == mount.size_bytes
    engine.images.remove(result.image.id, force=True)
    assert taken_bytes(engine.builds.usage()) >= 301000


def test_filters_choose_what_goes(fresh_engine: Engine) -> None:
    engine = fresh_engine
    text = "FROM lab/busybox\n" + FILE + MOUNT
    engine.builds.build(text, tags=["kept"])
    with pytest.raises(InvalidFilter, match="colour"):
        engine.builds.prune({"colour": ["red"]})
    with pytest.raises(UsageError):
        engine.builds.prune({"until": ["yesterday"]})
    assert engine.builds.prune({"until": ["24h"]})["CachesDeleted"] == []
    assert engine.builds.prune({"label": ["a=b"]})["CachesDeleted"] == []
    assert all(step.cached for step in engine.builds.build(text).steps)
    done = engine.builds.prune({"type": ["exec.cachemount"]})
    assert done["CachesDeleted"] == ["cache mount mine"]
    assert done["SpaceReclaimed"] >= 1000
    assert all(step.cached for step in engine.builds.build(text).steps)
    (zero,) = engine.builds.usage({"description": ["300000"]})
    assert engine.builds.prune({"id": [zero.id[:12]]})["CachesDeleted"] == ["1 step"]
    assert [step.cached for step in engine.builds.build(text).steps][1] is False
    engine.builds.prune()
    assert engine.builds.usage() == []


def test_what_a_build_holds_is_in_use_and_stays(fresh_engine: Engine) -> None:
    engine = fresh_engine
    wait = "touch /c/on; while [ -e /c/on ]; do sleep 0.1; done"
    text = f"FROM lab/busybox\nRUN --mount=type=cache,id=held,target=/c {wait}\n"
    failures: list[LabkernelError] = []

    def build() -> None:
        try:
            engine.builds.build(text)
        except LabkernelError as err:
            failures.append(err)

    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    try:
        wait_until(lambda: any(Path(each["path"], "data", "on").exists() for each in engine.builds.cache_mounts()))
        (held,) = engine.builds.usage({"inuse": ["true"]})
        assert held.description == "cache mount held at /c"
        assert "cache mount held" not in engine.builds.prune()["CachesDeleted"]
    finally:
        for each in engine.builds.cache_mounts():
            Path(each["path"], "data", "on").unlink(missing_ok=True)
        thread.join(60)
    assert failures == []
    assert engine.builds.usage({"inuse": ["true"]}) == []


def test_the_last_used_stay_within_the_storage_to_keep() -> None:
    # as `records` gives them: last used first
    found = [
        record("new", 40, used=4, diff_id="a"),
        record("shared", 90, used=3, diff_id="b", shared=True),
        record("middle", 30, used=2, diff_id="c"),
        record("old", 20, used=1, kind="exec.cachemount", path="/p"),
    ]
    assert taken_bytes(found) == 90
    assert ids(selected(found, keep_bytes=90)) == []
    assert ids(selected(found, keep_bytes=70)) == ["old"]
    assert ids(selected(found, keep_bytes=69)) == ["old", "middle"]
    assert ids(selected(found, keep_bytes=1)) == ["old", "middle", "shared", "new"]
    assert ids(selected(found, {"shared": ["true"]})) == ["shared"]
    assert ids(selected(found, {"private": [], "type": ["regular"]})) == ["new", "middle"]
    assert ids(selected(found, {"until": ["3"]})) == ["middle", "old"]
    assert ids(selected([record("x", in_use=True)], {"id": ["x"]})) == []


def test_a_layer_of_several_steps_counts_once() -> None:
    assert taken_bytes([record("one", 50, diff_id="same"), record("two", 50, diff_id="same")]) == 50
