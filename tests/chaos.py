"""kill -9 at random: clients, supervisor, keeper and containers, in the middle of create, start, stop, rm and build.

    .venv/bin/python tests/chaos.py --rounds 200 --seed 7

A round starts one to three commands of the terminal or of a "notebook kernel" (a Python process with an engine) and
kills somebody a random moment later. After each round the supervisor answers and no container that is still there has
lost its exit status; at the end the store is consistent, and nothing is left mounted, running or in a control group.
With --both supervisor and keeper are killed in one instant, too: the next supervisor takes over what runs, but an exit
status that came in between may be lost (255) then, as after a machine that was switched off.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from waiting import last_of

from labkernel import consistency, containers
from labkernel.engine import Engine
from labkernel.errors import NoSuchContainer

CODES = (0, 3, 7)
KERNEL = """
import labkernel
lab = labkernel.connect()
c = lab.containers.run("busybox", ["sh", "-c", "sleep 0.1; exit 3"], detach=True, name="k{number}")
c.wait(); c.logs()
if {number} % 2: c.remove()
"""


class Chaos:
    """One store under attack. `log` tells what was done, for a failure to be repeated."""

    def __init__(self, base: Path, seed: int) -> None:
        self.base = base
        self.random = random.Random(seed)
        self.engine = Engine.open(base / "root", runtime_dir=base / "run")
        self.engine.images.resolve("busybox")
        self.log: list[str] = []
        self.number = 0
        self.expected: dict[str, int] = {}
        self.shot: set[str] = set()
        self.unwatched: set[str] = set()
        self.both = False
        repo = str(Path(__file__).resolve().parent.parent)
        self.env = {
            **os.environ,
            "LABKERNEL_ROOT": str(base / "root"),
            "LABKERNEL_RUNTIME_DIR": str(base / "run"),
            "PYTHONPATH": repo,
        }

    # -- what is done --------------------------------------------------------------------------------------------------

    def start_client(self) -> subprocess.Popen[bytes]:
        self.number += 1
        stdin = b""
        words = self._words()
        if words[0] == "build":
            stdin = (
                f"FROM busybox\nRUN echo {self.random.random()} > /f && sleep 0.1\nRUN echo {self.number}\n".encode()
            )
        argv = [sys.executable, "-m", "labkernel.cli", *words]
        if words[0] == "kernel":
            argv = [sys.executable, "-c", KERNEL.format(number=self.number)]
        self.log.append(" ".join(words))
        client = subprocess.Popen(
            argv, env=self.env, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert client.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            client.stdin.write(stdin)
            client.stdin.close()
        client.stdin = None
        return client

    def _words(self) -> list[str]:
        known = [container.name for container in self.engine.containers.list(all=True)]
        new, code = f"c{self.number}", self.random.choice(CODES)
        command = ["busybox", "sh", "-c", f"echo {self.number}; sleep 0.2; exit {code}"]
        kinds = ["run", "create", "foreground", "kernel", "build", "restarting"]
        kind = self.random.choice([*kinds, *(["start", "stop", "rm", "restart", "exec"] if known else [])])
        if kind in ("run", "create"):
            self.expected[new] = code
            return [kind, *(["-d"] if kind == "run" else []), "--name", new, *command]
        if kind == "foreground":
            return ["run", "--rm", "--name", new, *command]
        if kind == "restarting":
            return ["run", "-d", "--name", new, "--restart", "on-failure:2", "busybox", "sh", "-c", "sleep 0.1; exit 1"]
        if kind == "build":
            return ["build", "-t", f"made{self.number % 3}", "-"]
        if kind == "kernel":
            self.expected[f"k{self.number}"] = 3
            return ["kernel"]
        victim = self.random.choice(known)
        self.shot.add(victim)  # its status may be that of a signal from now on
        flags = {"stop": ["-t", "0"], "rm": ["-f"], "restart": ["-t", "0"]}.get(kind, [])
        return [kind, *flags, victim, *(["true"] if kind == "exec" else [])]

    def kill_somebody(self, clients: list[subprocess.Popen[bytes]]) -> None:
        roles = ["client", "supervisor", "keeper", "container", "container"]
        role = self.random.choice([*roles, *(["both"] if self.both else [])])
        pid = 0
        if role == "client":
            pid = self.random.choice(clients).pid
        elif role == "container":
            running = [container for container in self.engine.containers.list() if container.pid]
            if running:
                chosen = self.random.choice(running)
                self.shot.add(chosen.name)
                pid = chosen.pid or 0
        elif role == "both":
            info = self.engine.runtime.ensure()
            # whatever is there or is being made may end while nobody looks
            self.unwatched |= {container.name for container in self.engine.containers.list(all=True)}
            self.unwatched |= {f"{letter}{self.number - back}" for letter in "ck" for back in range(len(clients))}
            os.kill(info.keeper_pid, signal.SIGSTOP)  # else it would notice the other's end
            os.kill(info.pid, signal.SIGKILL)
            pid = info.keeper_pid
        else:
            info = self.engine.runtime.ensure()
            pid = info.pid if role == "supervisor" else info.keeper_pid
        self.log.append(f"kill -9 {role}")
        if pid > 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def round(self) -> None:
        clients = [self.start_client() for _ in range(self.random.randint(1, 3))]
        time.sleep(self.random.random() * 0.9)  # the random moment, not a wait for something
        self.kill_somebody(clients)
        for client in clients:
            client.wait(120)
        self.engine.runtime.ensure()

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check_statuses(self) -> list[str]:
        """What is wrong with containers that are there. Waits for those that are on their way."""
        wrong = []
        for container in self.engine.containers.list(all=True):
            try:
                state = settled(container)
            except NoSuchContainer:
                continue  # one that removes itself, whose client was killed
            code, name = int(state.get("exit_code") or 0), container.name
            if name in self.unwatched and code in (255, self.expected.get(name), 137):
                continue
            if "lost" in str(state.get("error") or "") or code == 255:
                wrong.append(f"{name}: lost its exit status: {state}")
            elif state["status"] == "exited" and name in self.expected:
                allowed = {self.expected[name], *((137,) if name in self.shot else ())}
                if code not in allowed:
                    wrong.append(f"{name}: exit code {code}, not one of {sorted(allowed)}: {state.get('error')}")
        return wrong

    def finish(self) -> list[str]:
        """Tidy up as a user would; what is then still wrong, or left."""
        wrong = self.check_statuses()
        consistency.SETTLING_S = containers.LEFTOVER_AGE_S = 0.0
        found: list[Any] = []

        def is_consistent() -> bool:
            self.engine.containers.reconcile()
            self.engine.images.sweep()  # what `system prune` does with left-overs
            found[:] = self.engine.check(verify=True)
            return not found

        last_of(is_consistent)
        wrong += [str(problem) for problem in found]
        for container in self.engine.containers.list(all=True):
            container.remove(force=True)
        self.engine.runtime.shutdown(force=True)
        self.engine.close()
        return [*wrong, *left_of(self.base)]


def settled(container: Any) -> dict[str, Any]:
    """Its state once it does not run any more (those that are made here end by themselves)."""
    state: dict[str, Any] = {}

    def has_ended() -> bool:
        state.clear()
        state.update(container.runtime_state())
        return state["status"] not in ("running", "restarting")

    last_of(has_ended)
    return state


def left_of(base: Path) -> list[str]:
    """Mounts, processes and control groups of this store that are still there; waits a moment for the kernel."""
    import hashlib

    group = hashlib.sha256(os.fsencode(base / "root")).hexdigest()[:8]
    found: list[str] = []

    def is_gone() -> bool:
        found[:] = traces(base, group)
        return not found

    last_of(is_gone)
    return found


def traces(base: Path, group: str) -> list[str]:
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(base) in line]
    found += [folder for folder, _names, _files in os.walk("/sys/fs/cgroup") if f"/labkernel/{group}" in folder]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes() if words else b""
            zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not zombie and (os.fsencode(base) in words or os.fsencode(base) in environment):
                found.append(f"process {process.name} {words[:200]!r}")
    return found


def attack(rounds: int, seed: int, *, show: bool = False, both: bool = False) -> list[str]:
    """Rounds on a store of its own; what went wrong, with what was done before it."""
    base = Path(tempfile.mkdtemp(prefix="lk-x-", dir="/tmp"))
    chaos = Chaos(base, seed)
    chaos.both = both
    try:
        for number in range(rounds):
            chaos.round()
            if show and number % 10 == 9:
                print(f"{number + 1} rounds, {len(chaos.engine.containers.list(all=True))} containers", flush=True)
            if number % 10 == 9:
                wrong = chaos.check_statuses()
                if wrong:
                    return [*wrong, "after:", *chaos.log]
        wrong = chaos.finish()
        return [*wrong, "after:", *chaos.log] if wrong else []
    finally:
        chaos.engine.runtime.shutdown(force=True)
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--both", action="store_true", help="supervisor and keeper in one instant, too")
    given = parser.parse_args()
    before = time.monotonic()
    wrong = attack(given.rounds, given.seed, show=True, both=given.both)
    print("\n".join(wrong) or f"{given.rounds} rounds, seed {given.seed}: nothing lost, nothing left")
    print(f"{time.monotonic() - before:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
