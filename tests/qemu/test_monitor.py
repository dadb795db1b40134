"""A machine's monitor between its clients and a guest that answers late: what a snapshot and a restore must not tear
apart. The guest is a program in QEMU's place, so that each message comes exactly when it is worst."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel.qemu import control, kvm

DEADLINE_S = 90.0

MONITOR = """
import json, sys
from labkernel.qemu import monitor
class Told:
    def started(self): pass
    def failed(self, brief, code): print(brief, file=sys.stderr)
directory = sys.argv[1]
monitor.main(json.load(open(directory + "/config.json")), directory, Told())
"""

# Descriptors 100, 101 and 103 are the channel, the channel of shared directories and QMP (spawn.py).
GUEST = """
import json, os, select, socket, struct, sys, time
from labkernel.qemu.channel import Decoder, Kind, encode
channel, share, qmp = (socket.socket(fileno=number) for number in (100, 101, 103))
log = open(sys.argv[1], "a", buffering=1)
def say(sock, kind, payload=b"", process=0):
    sock.sendall(encode(kind, payload, process=process))
def frames(sock, decoder):
    data = sock.recv(65536)
    if not data: sys.exit(0)
    return list(decoder.feed(data))
hears, shared = Decoder(), Decoder()
"""

# Command 1 of its former life ends only when the next command has been asked for.
RESTORED = """
ended = False
while True:
    for frame in frames(channel, hears):
        if frame.kind == Kind.START:
            if not ended: say(channel, Kind.EXITED, b"status=137", 1)
            ended = True
            say(channel, Kind.STARTED, b"pid=9", frame.process)
            say(channel, Kind.EXITED, b"status=0", frame.process)
"""

# Asks something of a share just before it says that it is still, and is slow to read the answer. Keeps still only when
# a file tells that another command has been asked for.
FROZEN = """
say(channel, Kind.HELLO, b"kernel=none")
qmp.sendall(b'{"QMP": {}}\\n')
asked, commands = False, b""
while True:
    ready = select.select([channel, share, qmp], [], [])[0]
    if share in ready and asked:  # whoever does not wait for this has time to go on
        ready = select.select([channel, qmp], [], [], 0.5)[0] or [share]
    if channel in ready:
        for frame in frames(channel, hears):
            log.write(Kind(frame.kind).name + "\\n")
            if frame.kind == Kind.SETUP: say(channel, Kind.READY)
            if frame.kind == Kind.START: say(channel, Kind.STARTED, b"pid=9", frame.process)
            if frame.kind == Kind.START and frame.process: say(channel, Kind.EXITED, b"status=0", frame.process)
            if frame.kind == Kind.FREEZE:
                while not os.path.exists(sys.argv[2]): time.sleep(0.01)
                say(channel, Kind.FROZEN)
    if share in ready:
        for frame in frames(share, shared):
            log.write(Kind(frame.kind).name + " of a share\\n")
            if frame.kind == Kind.FREEZE:
                if not asked: say(share, Kind.SHARE, struct.pack("<IIQQIII4x", 40, 9999, 1, 1, 0, 0, 0))
                asked = True
                say(share, Kind.FROZEN)
    if qmp in ready:
        commands += qmp.recv(65536)
        while b"\\n" in commands:
            line, _, commands = commands.partition(b"\\n")
            name = json.loads(line)["execute"]
            log.write(name + "\\n")
            qmp.sendall(b'{"return": {"status": "completed"}}\\n')
"""


class Machine:
    """A monitor in a process of its own, with `guest` as its QEMU."""

    def __init__(
        self, directory: Path, guest: str, *, failing: Sequence[Any] = (), how: str = "tcg", **plan: Any
    ) -> None:
        self.directory, self.log, self.go = directory, directory / "log", directory / "go"
        argv = [sys.executable, "-c", GUEST + guest, str(self.log), str(self.go)]
        attempt = {"argv": argv, "incoming": None, "start": "cold", "accelerator": how, "deadline_s": DEADLINE_S}
        (directory / "overlay").write_bytes(b"disk")
        machine = {
            "attempts": [*failing, attempt],
            "cards": 0,
            "overlay": str(directory / "overlay"),
            "ephemeral": True,
            **plan,
        }
        config = {"process": {"args": ["main"]}, "labkernel": {"machine": machine}}
        (directory / "config.json").write_text(json.dumps(config))
        words = [sys.executable, "-c", MONITOR, str(directory)]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def ask(self, request: dict[str, Any], *fds: int) -> socket.socket:
        """Send a request as soon as the machine runs."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                if self.facts()["phase"] == "running":
                    break
            except (OSError, ValueError):
                pass
            assert time.monotonic() < deadline, "the machine does not run"
            time.sleep(0.02)
        connection = control.connect(str(self.directory), DEADLINE_S)
        socket.send_fds(connection, [json.dumps(request).encode()], fds)
        return connection

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "machine.json").read_text())
        return found

    def execute(self) -> socket.socket:
        with open("/dev/null", "r+b") as null:
            fd = null.fileno()
            return self.ask({"op": "exec", "process": {"args": ["true"]}}, fd, fd, fd)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Any]:
    made: list[Machine] = []

    def make(guest: str, **plan: Any) -> Machine:
        made.append(Machine(tmp_path, guest, **plan))
        return made[-1]

    yield make
    for machine in made:
        machine.process.kill()
        machine.process.wait()


def answers(connection: socket.socket) -> list[dict[str, Any]]:
    """All answers up to the last one of a command."""
    found: list[dict[str, Any]] = []
    while not found or not {"exit", "error", "done"} & found[-1].keys():
        data = connection.recv(65536)
        assert data, found
        found.append(json.loads(data))
    connection.close()
    return found


def test_a_command_after_a_restore_is_not_taken_for_one_that_the_restore_ended(machines: Any) -> None:
    machine = machines(RESTORED, resume={"shares": [], "unconsumed": 0, "processes": [1]})
    for _ in range(3):
        assert answers(machine.execute()) == [{"started": True}, {"exit": 0}]


def test_nothing_is_on_its_way_while_a_snapshot_is_taken(machines: Any, tmp_path: Path) -> None:
    share = {"source": str(tmp_path), "target": "/data", "writable": False}
    machine = machines(FROZEN, shares=[share])
    target = tmp_path / "snapshot"
    target.mkdir()
    snapshot = machine.ask({"op": "snapshot", "target": str(target)})
    wait_until(lambda: "FREEZE\n" in machine.log.read_text())
    command = machine.execute()
    machine.go.touch()
    assert answers(snapshot) == [{"done": True}]
    assert answers(command) == [{"started": True}, {"exit": 0}]
    log = machine.log.read_text().splitlines()
    assert log.index("SHARED of a share") < log.index("migrate"), "an answer on its way would be lost"
    assert log.index("CLOCK") < len(log) - 1 - log[::-1].index("START"), "half a command would be in the snapshot"
    assert json.loads((target / "snapshot.json").read_text())["processes"] == []


HANGS = "import time; time.sleep(600)"
ENDS = "import sys; sys.exit('failed to initialize kvm')"


def attempt(code: str, accelerator: str, start: str = "cold") -> dict[str, Any]:
    argv = [sys.executable, "-c", code]
    deadline_s = 0.5 if code == HANGS else DEADLINE_S
    return {"argv": argv, "incoming": None, "start": start, "accelerator": accelerator, "deadline_s": deadline_s}


@pytest.mark.parametrize(("code", "brief"), [(HANGS, "did not answer in time"), (ENDS, "failed to initialize kvm")])
def test_kvm_is_given_up_where_a_guest_comes_up_without(machines: Any, tmp_path: Path, code: str, brief: str) -> None:
    cache = tmp_path / "kvm.json"
    failing = [attempt(code, "kvm"), attempt(ENDS, "kvm")]
    machine = machines(FROZEN, failing=failing, refuted={"cache": str(cache), "key": kvm.machine_key()})
    assert answers(machine.execute()) == [{"started": True}, {"exit": 0}]
    facts = machine.facts()
    assert (facts["accelerator"], facts["start"]) == ("tcg", "cold")
    assert "under KVM failed" in facts["accelerator_reason"]
    assert [("cold start under KVM" in line) for line in facts["warnings"]] == [True, True]
    assert brief in facts["warnings"][0]
    assert "cold start under TCG" in facts["warnings"][1]
    verdict = kvm.verdict(cache)
    assert not verdict.usable
    assert "did not come up under KVM" in verdict.reason


@pytest.mark.parametrize("how", ["kvm", "tcg"])
def test_a_broken_template_is_not_held_against_kvm(machines: Any, tmp_path: Path, how: str) -> None:
    cache = tmp_path / "kvm.json"
    refuted = {"cache": str(cache), "key": kvm.machine_key()}
    machine = machines(FROZEN, failing=[attempt(ENDS, how, start="snapshot")], how=how, refuted=refuted)
    assert answers(machine.execute()) == [{"started": True}, {"exit": 0}]
    assert machine.facts()["accelerator"] == how
    assert not cache.exists()
