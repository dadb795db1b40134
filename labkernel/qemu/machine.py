"""Planning a machine: what is needed is made ready once (kernel, initramfs, template); the plan is what starts it.

    store/vm/   kernels/  disks/  templates/  machines/      LABKERNEL_RUNTIME_DIR/  kvm.json  tsc.json

A plan is plain JSON data for the machine's monitor (monitor.py): command lines of QEMU in the order in which they are
tried, since templates and KVM may be broken on a machine where QEMU itself works.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from labkernel.errors import LabkernelError

from . import guest, kernel, kvm, loaded, template, tsc
from .command import Machine

MEMORY_FLOOR_MIB = 96
# Under KVM a guest is up within a second or, where KVM is broken, never; the rest is for a machine that is very busy.
READY_DEADLINE_S = {"tcg": 90.0, "kvm": 20.0}
RESTORE_DEADLINE_S = 30.0
ACCEL_VARIABLE = "LABKERNEL_VM_ACCEL"  # "tcg" or "kvm" overrides the probe
SANDBOX_VARIABLE = "LABKERNEL_VM_SANDBOX"  # "off" where this QEMU has no seccomp

Lock = Callable[[str], AbstractContextManager[None]]
Plan = dict[str, Any]


class Machines:
    """Plans guests from the files of one store. `lock(name)` is an exclusive lock between processes, `task` is
    `Runtime.task`."""

    def __init__(
        self, vm_dir: Path, runtime_dir: Path, lock: Lock, notify: Callable[[str], None], task: Callable[..., Any]
    ) -> None:
        self._vm = vm_dir
        self._verdict_file = runtime_dir / "kvm.json"
        self._lock = lock
        self._task = task
        self.notify = notify
        for name in ("kernels", "disks", "templates", "machines"):
            (vm_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def accelerator(self, *, fresh: bool = False) -> kvm.Verdict:
        """Whether KVM is used, and why (not)."""
        forced = _forced()
        if forced:
            return kvm.Verdict(usable=forced == "kvm", reason=f"{ACCEL_VARIABLE}={forced}")
        return kvm.verdict(self._verdict_file, fresh=fresh)

    def prepare(self, wanted: Machine, given_kernel: str | None = None) -> tuple[Machine, kernel.Kernel, kvm.Verdict]:
        """`wanted` with all that a guest needs but its disk; on first use the kernel is fetched. Raises VMError."""
        qemu = guest.find_qemu()
        init = guest.get_init(self._vm)
        with self._lock("vm-kernel"):
            found = kernel.get_kernel(self._vm / "kernels", notify=self.notify, given=given_kernel)
            initramfs = kernel.get_initramfs(found, init)
        verdict = self.accelerator()
        machine = dataclasses.replace(
            wanted,
            qemu=qemu,
            accelerator="kvm" if verdict.usable else "tcg",
            kernel=found.image,
            initramfs=initramfs,
            tsc_khz=tsc.khz(self._verdict_file.with_name("tsc.json")),
            sandbox=os.environ.get(SANDBOX_VARIABLE) != "off",
        )
        return machine, found, verdict

    def plan(self, wanted: Machine, *, cold: bool = False, given_kernel: str | None = None) -> Plan:
        """How to start `wanted`, of which memory, processors, disk, network and ports are given. Raises VMError."""
        machine, found, verdict = self.prepare(wanted, given_kernel)
        saved = None if cold else self._template(machine, found)
        first = machine if saved is not None else self._mapped(machine)
        attempts = [_attempt(first, saved)]
        if saved is not None and machine.accelerator == "kvm":
            attempts.append(_attempt(machine, None))  # the template may be broken, and not KVM
        attempts.append(_attempt(dataclasses.replace(machine, accelerator="tcg"), None))
        return {
            "attempts": attempts,
            "cards": machine.cards,
            "accelerator_reason": verdict.reason,
            "refuted": None if _forced() else {"cache": str(self._verdict_file), "key": kvm.machine_key()},
            "kernel": found.release,
            "kernel_source": found.source,
        }

    def _mapped(self, machine: Machine) -> Machine:
        """`machine` with the kernel in its memory from the start, where that can be."""
        try:
            with self._lock("vm-kernel"):
                found = loaded.get_loaded(machine.kernel, machine.memory_mib)
        except OSError as err:
            self.notify(f"the kernel is copied into each machine: {err}")
            return machine
        return machine if found is None else dataclasses.replace(machine, kernel=found.entry, memory=found.memory)

    def _template(self, machine: Machine, found: kernel.Kernel) -> Path | None:
        facts = [f"{found.identity} {machine.initramfs.name}"]
        if machine.accelerator == "kvm":
            facts.append(kvm.processor())
        path = template.template_path(self._vm / "templates", machine, *facts)
        memory = template.memory_path(path)
        if path.exists() and memory.exists():
            return path
        with self._lock(f"vm-template-{path.stem}"):
            if not (path.exists() and memory.exists()):
                self.notify("making a template of a booted machine (once for each size of memory)")
                disk, ram = path.with_suffix(".qcow2"), path.with_suffix(f".{os.getpid()}.ram")
                argv = dataclasses.replace(machine.bare(), disk=disk, memory=ram, memory_shared=True).argv()
                deadline_s = READY_DEADLINE_S[machine.accelerator]
                try:
                    self._task(
                        "labkernel.qemu.template:make",
                        path=str(path),
                        argv=argv,
                        disk=str(disk),
                        ram=str(ram),
                        cards=machine.cards,
                        deadline_s=deadline_s,
                    )
                except LabkernelError as err:
                    self.notify(f"no template: {err.brief}; booting cold")
                    return None
        return path


def _forced() -> str:
    named = os.environ.get(ACCEL_VARIABLE, "")
    return named if named in ("kvm", "tcg") else ""


def _attempt(machine: Machine, saved: Path | None) -> dict[str, Any]:
    if saved is not None:
        machine = dataclasses.replace(machine, memory=template.memory_path(saved))
    return {
        "argv": machine.argv(incoming=saved is not None),
        "incoming": str(saved) if saved is not None else None,
        "start": "template" if saved is not None else "cold",
        "accelerator": machine.accelerator,
        "deadline_s": RESTORE_DEADLINE_S if saved is not None else READY_DEADLINE_S[machine.accelerator],
    }
