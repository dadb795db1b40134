"""The kernel's half of lab.dashboard(), the process tree and the network map. The browser's half: tests/ui."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import LabkernelError, NoSuchContainer, NoSuchVM, UsageError
from labkernel.widgets.dashboard import Dashboard
from labkernel.widgets.trees import Member, Net, NetworkMap, Process, ProcessTree, network_map, processes


class View:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def row_of(board: Dashboard, kind: str, name: str) -> dict[str, Any]:
    return next(row for row in board.snapshot()[kind] if row["cells"][0] == name)


def test_it_shows_and_does_what_docker_would(engine: Engine) -> None:
    container = engine.containers.run("busybox", ["sh", "-c", "echo hi; sleep 600"], detach=True, name="shown")
    board = engine.dashboard()
    board.snapshot()
    row = row_of(board, "containers", "shown")
    assert row["state"] == "running"
    assert row["can"] == ["stop", "kill", "logs"]
    assert row["cells"][3].endswith("%")
    wait_until(lambda: board.act("containers", container.id, "logs") == "hi\n", "the log of what it said")
    assert board.act("containers", container.id, "kill") == ""
    container.wait()
    assert row_of(board, "containers", "shown")["can"] == ["start", "remove", "logs"]
    engine.volumes.create("shown-data")
    board.act("volumes", "shown-data", "remove")
    assert all(row["id"] != "shown-data" for row in board.snapshot()["volumes"])
    assert "shown" in repr(board)
    assert "<table" in board.html()
    with pytest.raises(LabkernelError):
        board.act("images", "busybox", "kill")
    with pytest.raises(LabkernelError):
        board.act("containers", "nobody", "stop")


def open_files(of: tuple[str, ...]) -> list[str]:
    """What this process has open below these places. Other tests' files are closed whenever the collector comes."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(place for place in found if place.startswith(of))


def test_files_of_what_runs_are_opened_once_and_closed(engine: Engine) -> None:
    container = engine.containers.run("busybox", ["sleep", "600"], detach=True, name="kept")
    board = Dashboard(engine)
    board._view = View()
    state = container.runtime_state()
    places = (f"/proc/{state['pid']}/", *((state.get("cgroup") or {}).get("paths") or {}).values())
    board.look()
    held = open_files(places)
    for _ in range(3):
        board.look()
    assert row_of(board, "containers", "kept")["cells"][3].endswith("%")
    assert open_files(places) == held != []
    container.kill()
    container.wait()
    board.look()
    assert open_files(places) == []
    assert board._readers == {}


def test_only_what_changed_is_sent_and_errors_are_told(engine: Engine) -> None:
    board = Dashboard(engine)
    view = board._view = View()
    board.look()
    assert set(view.sent[0]["board"]) == {"containers", "vms", "images", "volumes", "networks"}
    board.look()
    assert view.sent[1]["board"] == {}
    board._message(None, {"kind": "hello"}, [])
    board.look()
    assert "containers" in view.sent[2]["board"], "a page that was reloaded is told everything"
    board._answer("containers", "nobody", "stop")
    assert view.sent[-1]["kind"] == "note"
    assert "nobody" in view.sent[-1]["text"]


def test_whose_child_a_process_is(engine: Engine) -> None:
    container = engine.containers.run("busybox", ["sh", "-c", "sleep 600 & sleep 601; true"], detach=True, name="tree")
    deadline = time.monotonic() + 60
    while True:  # a child has its parent's command line until its own exec
        [root] = engine.processes(container).roots
        commands = {child.command for child in root.children}
        if commands == {"sleep 600", "sleep 601"} or engine.driver.name == "proot" or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert root.label == "tree"
    # A supervisor that nobody asked has no worker; a new one takes its name a moment after it was made.
    engine.runtime.task("os:getpid")
    wait_until(lambda: "[worker]" in repr(engine.processes()))
    whole = engine.processes()
    assert "tree" in repr(whole)
    if engine.driver.name != "proot":
        assert root.inside == 1
        assert commands == {"sleep 600", "sleep 601"}
    assert "<details open>" in whole._repr_html_()
    with pytest.raises(UsageError, match="has no processes"):
        processes(engine, object())


def test_the_map_names_addresses_and_ports() -> None:
    def attrs(driver: str, **more: Any) -> dict[str, Any]:
        return {"Driver": driver, **more}

    inside = {"abc": {"Name": "web", "IPv4Address": "10.9.0.2/24"}}
    subnet = {"Config": [{"Subnet": "10.9.0.0/24"}]}
    ports = {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]}
    web = SimpleNamespace(
        id="abc", name="web", attrs={"NetworkSettings": {"Ports": ports}, "HostConfig": {"NetworkMode": "front"}}
    )
    alone = SimpleNamespace(id="def", name="alone", attrs={"HostConfig": {"NetworkMode": "none"}})
    networks = [
        SimpleNamespace(name="front", attrs=attrs("bridge", IPAM=subnet, Containers=inside)),
        SimpleNamespace(name="none", attrs=attrs("null", Containers={})),
    ]
    machines = [
        SimpleNamespace(
            name=name,
            network_mode=mode,
            wired=False,
            attrs={"NetworkSettings": {"IPAddress": address, "Ports": ports if address else {}}},
        )
        for name, mode, address in (("out", "bridge", "10.0.2.15"), ("in", "none", "10.0.2.15"), ("off", "none", ""))
    ]
    engine = SimpleNamespace(
        containers=SimpleNamespace(list=lambda: [web, alone]),
        networks=SimpleNamespace(list=lambda: networks),
        vms=SimpleNamespace(list=lambda: machines),
    )
    found = network_map(engine)
    assert list(found.nets) == [
        Net("front", "bridge", "10.9.0.0/24", (Member("web", "10.9.0.2", "8080→80/tcp"),)),
        Net("none", "null", "", (Member("alone", ""), Member("off (VM)", ""))),
        Net(
            "virtual machines",
            "qemu",
            "",
            (
                Member("out (VM)", "10.0.2.15", "8080→80/tcp"),
                Member("in (VM)", "10.0.2.15, no way out", "8080→80/tcp"),
            ),
        ),
    ]
    assert "each in a network of its own" in found.svg()
    assert "web  10.9.0.2  published: 8080→80/tcp" in repr(found)
    assert found.svg().startswith("<svg")
    assert repr(NetworkMap([])) == "no networks"


def test_a_crowd_in_a_network_is_drawn_in_one_frame() -> None:
    few = NetworkMap([Net("n", "bridge", "", tuple(Member(f"web-{i}", "10.0.0.2") for i in range(8)))])
    many = NetworkMap([Net("n", "bridge", "", tuple(Member(f"web-{i}", "10.0.0.2") for i in range(200)))])
    assert few.svg().count("<rect") == 3 + 8
    assert many.svg().count("<rect") == 3 + 1
    assert "and 140 more" in many.svg()
    height = int(many.svg().partition("height='")[2].partition("'")[0])
    assert height < 900
    assert "web-199" in repr(many)


def test_a_command_with_dollars_is_no_formula() -> None:
    """MathJax sets what stands between two dollars, unless a class forbids it."""
    found = ProcessTree("p", [Process(7, 7, "sh -c echo $A $B", 0, 0.0)])
    shown = found._repr_html_()
    assert "mathjax_ignore" in shown.partition(">")[0]
    assert "$A $B" in shown


def test_a_machine_is_named_in_the_tree_and_found_by_name() -> None:
    class Names:
        def __init__(self, error: type[Exception], **known: Any) -> None:
            self.error, self.known = error, known

        def get(self, name: str) -> Any:
            if name not in self.known:
                raise self.error(name)
            return self.known[name]

        def list(self) -> list[Any]:
            return list(self.known.values())

    vm = SimpleNamespace(kind="vm", name="box", pid=os.getpid())
    engine = SimpleNamespace(containers=Names(NoSuchContainer), vms=Names(NoSuchVM, box=vm))
    engine.runtime = SimpleNamespace(ensure=lambda: SimpleNamespace(keeper_pid=os.getppid(), pid=os.getppid()))
    assert processes(engine, "box").roots[0].label == "box"
    assert "[box (VM)]" in repr(processes(engine))
    with pytest.raises(NoSuchContainer):
        processes(engine, "nobody")
