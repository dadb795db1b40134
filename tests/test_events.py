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
from labkernel.errors import LabkernelError, UsageError


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


def told(engine: Engine, since: float, **filters: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (event["Type"], event["Action"], event["Actor"]["Attributes"])
        for event in engine.history.list(since=since, filters=filters or None)
    ]


@pytest.mark.parametrize("remove", [False, True])
def test_volumes_and_networks_come_and_go_with_a_run(engine: Engine, remove: bool) -> None:
    """As dockerd tells it, also of a container that has no row any more when the supervisor's lines are read."""
    engine.volumes.create("events-v")
    since = time.time()
    volumes = {"events-v": {"bind": "/data", "mode": "ro"}, "/tmp": {"bind": "/host", "mode": "rw"}}
    container = engine.containers.create(
        "busybox", ["true"], name="joined", volumes=volumes, network_mode="none", auto_remove=remove
    )
    container.start()
    wait_until(lambda: "unmount" in actions(engine, since))
    wait_until(lambda: not remove or "destroy" in actions(engine, since))
    found = told(engine, since)
    assert [(kind, action) for kind, action, _ in found if kind != "container"] == [
        ("network", "connect"),
        ("volume", "mount"),
        ("network", "disconnect"),
        ("volume", "unmount"),
    ]
    order = [action for _, action, _ in found]
    assert order[:6] == ["create", "connect", "mount", "start", "die", "disconnect"]
    given = {action: attributes for _, action, attributes in found}
    assert given["connect"] == {"container": container.id, "name": "none", "type": "null"} == given["disconnect"]
    mounted = {"destination": "/data", "propagation": "", "read/write": "false"}
    assert given["mount"] == {"container": container.id, "driver": "local", **mounted}
    assert given["unmount"] == {"container": container.id, "driver": "local"}
    assert set(given["create"]) == {"image", "name"}, "what is kept for later is not shown"
    assert told(engine, since, volume="events-v") == [row for row in found if row[0] == "volume"]
    if not remove:
        container.remove()
    engine.volumes.get("events-v").remove()


def test_a_start_that_fails_ends_nothing(engine: Engine) -> None:
    since = time.time()
    container = engine.containers.create("busybox", ["/nosuch"])
    with pytest.raises(LabkernelError):
        container.start()
    assert actions(engine, since, container=container.id) == ["create"]


def test_pruning_is_told(engine: Engine) -> None:
    since = time.time()
    engine.containers.prune()
    engine.volumes.prune({"label": "events=none"})
    engine.networks.prune({"label": "events=none"})
    engine.images.prune({"label": "events=none"})
    found = [event for event in engine.history.list(since=since) if event["Action"] == "prune"]
    assert [event["Type"] for event in found] == ["container", "volume", "network", "image"]
    for event in found:
        assert event["Actor"]["ID"] == ""
        assert "id" not in event
        assert int(event["Actor"]["Attributes"]["reclaimed"]) >= 0


def test_images_are_told_with_their_labels(engine: Engine, tmp_path: Any) -> None:
    since = time.time()
    image = engine.builds.build("FROM busybox\nLABEL course=os\n", tags=["events-i"]).image
    with open(tmp_path / "tar", "wb") as out:
        engine.images.save(["events-i"], out)
    engine.images.tag("events-i", "events-j:2")
    container = engine.containers.create("events-j:2", ["true"], name="told-of")
    container.commit("events-k", "3", message="why")
    container.remove()
    for name in ("events-k:3", "events-j:2", "events-i"):
        engine.images.remove(name)
    names = [(action, attributes["name"]) for _, action, attributes in told(engine, since, type="image")]
    assert names[:5] == [
        ("tag", "events-i:latest"),
        ("save", "events-i:latest"),
        ("tag", "events-j:2"),
        ("tag", "events-k:3"),
        ("untag", "events-k:3"),
    ]
    assert [attributes.get("course") for _, action, attributes in told(engine, since, event="tag")] == ["os"] * 3
    (commit,) = told(engine, since, event="commit")
    assert (commit[2]["imageRef"], commit[2]["comment"]) == ("events-k:3", "why")
    assert image.id in [event["Actor"]["ID"] for event in engine.history.list(since=since, filters={"event": "delete"})]


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
    assert actions(engine, since, type="network") == []


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
