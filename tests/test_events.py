"""Events: what services write, what the supervisor saw, merged in order; filters, streams, and what kill -9 leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import UsageError


def actions(engine: Engine, since: float, **filters: Any) -> list[str]:
    return [event["Action"] for event in engine.history.list(since=since, filters=filters or None)]


def test_the_life_of_a_container(engine: Engine) -> None:
    since = time.time()
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True, name="alive", labels={"a": "b"})
    container.exec_run(["true"])
    container.pause()
    container.unpause()
    container.rename("renamed")
    container.stop(timeout=0)
    container.remove()
    wanted = ["create", "start", "exec_create: true", "exec_start: true", "exec_die", "pause", "unpause", "rename"]
    found = engine.history.list(since=since, filters={"container": container.id})
    assert [event["Action"] for event in found] == [*wanted, "kill", "die", "stop", "destroy"]
    die = next(event for event in found if event["Action"] == "die")
    assert die["Actor"]["Attributes"].items() >= {"exitCode": "137", "image": "busybox", "a": "b"}.items()
    assert (die["Type"], die["status"], die["id"], die["from"]) == ("container", "die", container.id, "busybox")
    assert found[0]["Actor"]["Attributes"]["name"] == "alive"
    rename = next(event for event in found if event["Action"] == "rename")
    assert rename["Actor"]["Attributes"].items() >= {"name": "renamed", "oldName": "/alive"}.items()
    assert [event["timeNano"] for event in found] == sorted(event["timeNano"] for event in found)


def test_a_container_that_removes_itself(engine: Engine) -> None:
    since = time.time()
    engine.containers.run("busybox", ["true"], remove=True, name="short")
    wait_until(lambda: "destroy" in actions(engine, since, container="short"))
    assert actions(engine, since, container="short") == ["create", "attach", "start", "die", "destroy"]


def test_out_of_memory(engine: Engine, needs: Any) -> None:
    needs("cgroup memory")
    since = time.time()
    with pytest.raises(Exception, match="non-zero"):
        engine.containers.run("busybox", ["sh", "-c", "x=$(yes)"], mem_limit="8m", name="greedy")
    assert actions(engine, since, container="greedy", event=["oom", "die"]) == ["oom", "die"]


def test_filters(engine: Engine) -> None:
    since = time.time()
    engine.volumes.create("watched")
    engine.volumes.get("watched").remove()
    first = engine.containers.create("busybox", ["true"], labels={"group": "one"})
    engine.containers.create("busybox", ["true"], labels={"group": "two"})
    assert actions(engine, since, type="volume") == ["create", "destroy"]
    assert actions(engine, since, volume="watched", event="destroy") == ["destroy"]
    assert actions(engine, since, label="group=one") == ["create"]
    assert actions(engine, since, label="group") == ["create", "create"]
    assert actions(engine, since, container=first.id[:12]) == ["create"]
    assert actions(engine, since, image="busybox", event=["create", "start"]) == ["create", "create"]
    assert actions(engine, since, type="network") == []
    with pytest.raises(UsageError, match="invalid filter 'colour'"):
        engine.history.list(filters={"colour": "red"})


def test_a_stream_tells_as_it_happens(engine: Engine) -> None:
    seen: list[str] = []
    done = threading.Event()
    begun = threading.Event()

    def listen() -> None:
        begun.set()
        for event in engine.events(since=time.time() - 0.001, filters={"container": "watched"}):
            seen.append(event["Action"])
            if event["Action"] == "destroy":
                done.set()
                return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    begun.wait()
    engine.containers.run("busybox", ["true"], remove=True, name="watched")
    assert done.wait(20)
    thread.join(5)
    assert seen == ["create", "attach", "start", "die", "destroy"]


def test_no_event_is_lost_with_the_supervisor(fresh_engine: Engine) -> None:
    engine, since = fresh_engine, time.time()
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True)
    os.kill(engine.runtime.ensure().pid, signal.SIGKILL)
    container.kill()
    os.kill(engine.runtime.ensure().pid, signal.SIGKILL)
    container.remove()
    assert actions(engine, since, container=container.id) == ["create", "start", "kill", "die", "destroy"]
    # A second reader finds the same, and the files of the supervisors that are gone were taken over.
    other = Engine.open(engine.layout.root, runtime_dir=engine.layout.runtime_dir)
    assert actions(other, since, container=container.id) == ["create", "start", "kill", "die", "destroy"]
    other.close()
    assert len(os.listdir(engine.layout.root / "events")) == 1


def test_steps_of_a_build_are_no_containers(engine: Engine) -> None:
    since = time.time()
    engine.builds.build("FROM busybox\nRUN echo once > /once\n", no_cache=True)
    assert actions(engine, since, type="container") == []


def test_a_line_cut_short_is_left_out(fresh_engine: Engine) -> None:
    engine, since = fresh_engine, time.time()
    container = engine.containers.create("busybox", ["true"])
    folder = engine.layout.root / "events"
    folder.mkdir()
    (folder / "00000001.jsonl").write_text(f'[{time.time_ns()},"start","{container.id}",{{}}]\n[17,"di')
    assert actions(engine, since, container=container.id) == ["create", "start"]
    container.start()
    container.wait()
    assert actions(engine, since, container=container.id) == ["create", "start", "start", "die"]
