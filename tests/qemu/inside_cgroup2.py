"""Runs inside the virtual machine of test_cgroup2.py: what an engine does where there is cgroup version 2 only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.engine import Engine
from labkernel.errors import LabkernelError
from labkernel.linux import netlink, syscalls

GROUPS = Path("/sys/fs/cgroup")
READ = "cd /sys/fs/cgroup; cat /proc/self/cgroup memory.max cpu.max pids.max; touch x 2>/dev/null || echo read-only"
FORK = "i=0; while [ $i -lt 40 ]; do sleep 600 & i=$((i+1)); done; wait"
LIMIT_S = 120.0


def until(check: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not check():
        if time.monotonic() > end:
            sys.exit(f"not within {LIMIT_S:g} s: {what}")
        time.sleep(0.05)


def find(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": engine.driver.cgroups}
    run = engine.containers.run
    plain = {"network": "none"}
    limits = {"mem_limit": "64m", "nano_cpus": 500_000_000, "pids_limit": 50}
    found["limits"] = run("lab/busybox", ["sh", "-c", READ], remove=True, **limits, **plain).decode().split("\n")
    eater = engine.containers.create("lab/busybox", ["tail", "/dev/zero"], mem_limit="32m", **plain)
    eater.start()
    found["oom"] = [eater.wait()["StatusCode"], eater.runtime_state()["oom_killed"]]
    bomb = run("lab/busybox", ["sh", "-c", FORK], pids_limit=10, detach=True, **plain)
    bomb.wait()
    found["fork"] = bomb.logs().decode()
    major, minor = os.major(os.stat("/dev/vda").st_rdev), os.minor(os.stat("/dev/vda").st_rdev)
    script = f"mknod /tmp/d b {major} {minor} && head -c 1 /tmp/d; head -c 1 /dev/zero | wc -c"
    found["device"] = run("lab/busybox", ["sh", "-c", script], remove=True, stderr=True, **plain).decode()

    sleeper = run("lab/busybox", ["sh", "-c", f"({FORK}) & exec sleep 600"], detach=True, name="sleeper", **plain)
    (place,) = set(sleeper.runtime_state()["cgroup"]["paths"].values())
    group = Path(place)
    until(lambda: len((group / "cgroup.procs").read_text().split()) == 42, "the sleepers, their shell, and the command")
    sleeper.pause()
    found["frozen"] = [sleeper.status, "frozen 1" in (group / "cgroup.events").read_text()]
    sleeper.unpause()
    code, output = sleeper.exec_run(["sh", "-c", "cat /proc/self/cgroup; exit 3"])
    found["exec"] = [code, output.decode()]
    sleeper.update(mem_limit="48m")
    found["updated"] = (group / "memory.max").read_text().strip()
    stats = sleeper.stats()
    found["stats"] = [
        stats["memory_stats"]["usage"] > 0,
        stats["memory_stats"]["limit"],
        stats["pids_stats"]["current"],
    ]
    sleeper.kill()
    sleeper.wait()
    until(lambda: not group.exists(), "the group of a killed container is gone")
    for container in engine.containers.list(all=True):
        container.remove(force=True)
    found["problems"] = [str(problem) for problem in engine.check()]
    return found


def main() -> None:
    syscalls.mount("none", str(GROUPS), "cgroup2")
    syscalls.mount("none", "/run", "tmpfs")
    netlink.loopback_up()
    with Engine.open("/var/lab") as engine:
        try:
            found = find(engine)
        except LabkernelError as err:
            sys.exit("\n".join(err.render()))
        finally:
            engine.runtime.shutdown(force=True)
    found["groups"] = sorted(str(path) for path in (GROUPS / "labkernel").rglob("*") if path.is_dir())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
