"""Runs inside the virtual machine of test_nested.py, whose processor has SVM: machines under KVM."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.engine import Engine
from labkernel.errors import LabkernelError
from labkernel.linux import netlink, syscalls
from labkernel.qemu import kvm, machine

IMAGE, MEMORY = "lab/busybox", "256m"
MODULES = Path("/lab/modules")
CACHE = Path("/tmp/kvm.json")
# An emulated processor emulates slowly what makes KVM quick: no limit of a real machine holds here.
PATIENCE_S = 200.0
BEGAN = time.monotonic()
_FINIT_MODULE, _DELETE_MODULE, _PERSONALITY = 313, 176, 135
_UNAME26 = 0x0020000

libc = ctypes.CDLL(None, use_errno=True)


def say(line: str) -> None:
    sys.stderr.write(f"{time.monotonic() - BEGAN:6.1f} s  {line}\n")
    sys.stderr.flush()


def until(check: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > end:
            sys.exit(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(0.05)


def call(number: int, *words: Any) -> None:
    if libc.syscall(number, *words) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def load_kvm() -> None:
    for name in (MODULES / "order").read_text().split():
        with open(MODULES / name, "rb") as file:
            call(_FINIT_MODULE, file.fileno(), b"", 0)


def verdicts() -> dict[str, Any]:
    """What the probe says, and when it is asked anew."""
    found: dict[str, Any] = {"without": kvm.verdict(CACHE).reason}
    load_kvm()
    found["hurried"] = kvm.verdict(CACHE)
    kvm.DEADLINE_S, kvm.MAX_NS_PER_INSTRUCTION = PATIENCE_S, 1e6
    found["kept"] = kvm.verdict(CACHE)
    found["asked"] = kvm.verdict(CACHE, fresh=True)
    found["asked kept"] = kvm.verdict(CACHE)
    release = os.uname().release
    call(_PERSONALITY, _UNAME26)
    changed = os.uname().release
    found["another kernel"] = [changed != release, json.loads(CACHE.read_text())["key"] == kvm.machine_key()]
    found["another"] = kvm.verdict(CACHE)
    found["another kept"] = json.loads(CACHE.read_text())["key"][1] == changed
    call(_PERSONALITY, 0)
    return found


def cold(engine: Engine) -> dict[str, Any]:
    script = "read word; echo $word; uname -r; date +%s; echo err >&2; exit 7"
    before = int(time.time())
    result = engine.vms.run(
        IMAGE, ["sh", "-c", script], stdin=b"typed\n", mem_limit=MEMORY, cold=True, remove=True, timeout_s=PATIENCE_S
    )
    after = time.time()
    word, release, clock = result.stdout.decode().split()
    return {
        "end": [result.exit_code, result.stderr.decode(), word, release == result.kernel, result.start],
        "clock": [before, int(clock), after],
        "accelerator": [result.accelerator, result.accelerator_reason],
        "table": repr(result),
        "warnings": result.warnings,
        "seconds": [result.timings[name] for name in ("ready_s", "exec_s", "wall_s")],
    }


def lasting(engine: Engine) -> dict[str, Any]:
    """One from the template that stays: exec, log, figures, snapshot, restore, stop."""
    vm = engine.vms.run(IMAGE, ["sh", "-c", "echo up; exec sleep 6000"], mem_limit=MEMORY, detach=True, name="lasting")
    say(repr(vm))
    found: dict[str, Any] = {"start": [vm.booted, vm.accelerator, vm.warnings], "repr": repr(vm)}
    code, output = vm.exec_run(["sh", "-c", "echo kept > /file; cat /file; exit 3"])
    found["exec"] = [code, output.decode()]
    found["logs"] = vm.logs().decode()
    sample = vm.sample()
    assert sample is not None
    found["figures"] = [vm.inside()["memory_total_kib"] << 10, sample.cpu_usec, sample.memory_bytes]
    vm.snapshot("then")
    say("snapshot taken")
    vm.exec_run(["rm", "/file"])
    vm.restore("then")
    say(f"restored: {vm!r}")
    before = int(time.time())
    code, output = vm.exec_run(["sh", "-c", "cat /file; date +%s"])
    word, clock = output.decode().split()
    found["restored"] = [vm.booted, vm.accelerator, code, word]
    found["clock"] = [before, int(clock), time.time()]
    vm.stop(timeout=30)
    found["stopped"] = [vm.status, vm.exit_code]
    vm.remove()
    return found


def compared(engine: Engine) -> dict[str, Any]:
    found = engine.comparisons.compare(IMAGE, ["true"], memory=MEMORY)
    return {"accelerator": found.accelerator, "start": found.start, "text": repr(found), "no_vm": found.no_vm}


def too_late(engine: Engine) -> dict[str, Any]:
    """No guest is ready at once: its machine goes on without KVM. How it comes up then is not waited for here: a
    processor emulated by an emulated processor takes two minutes to boot."""
    machine.READY_DEADLINE_S["kvm"] = 1.0
    vm = engine.vms.create(IMAGE, ["true"], mem_limit=MEMORY, cold=True)

    def start() -> None:
        with contextlib.suppress(LabkernelError):  # it is removed before it is up
            vm.start()

    starting = threading.Thread(target=start)
    starting.start()
    until(lambda: vm.facts.get("accelerator") == "tcg", "a second attempt")
    found = {"reason": vm.accelerator_reason, "warnings": vm.warnings}
    vm.remove(force=True)
    starting.join()
    return found


def main() -> None:
    syscalls.mount("none", "/sys/fs/cgroup", "cgroup2")
    syscalls.mount("none", "/run", "tmpfs")
    netlink.loopback_up()
    found: dict[str, Any] = {"verdicts": verdicts()}
    say("the verdicts")
    machine.READY_DEADLINE_S.update(kvm=PATIENCE_S, tcg=PATIENCE_S)
    machine.RESTORE_DEADLINE_S = PATIENCE_S
    with Engine.open("/var/lab") as engine:
        try:
            found["doctor"] = {row.name: [row.ok, row.cause] for row in engine.vms.probe()}
            for step in (cold, lasting, compared, too_late):
                found[step.__name__] = step(engine)
                say(step.__name__)
        except LabkernelError as err:
            sys.exit("\n".join(err.render()))
        finally:
            engine.runtime.shutdown(force=True)
        found["problems"] = [str(problem) for problem in engine.check()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
