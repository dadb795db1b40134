"""Bringing up a guest: what is needed is made ready once (kernel, initramfs, template), then a session is started.

    store/vm/   kernels/  disks/  templates/      LABKERNEL_RUNTIME_DIR/kvm.json: what the KVM probe found

The first sign of life has a deadline. Where it passes, one more try is made, without template and without KVM: those
are the two things that may be broken on a machine where QEMU itself works.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from labkernel.errors import VMError

from . import guest, kernel, kvm, template
from .command import Machine
from .session import RootError, Session

MEMORY_FLOOR_MIB = 96
READY_DEADLINE_S = {"tcg": 40.0, "kvm": 10.0}
_RESTORE_DEADLINE_S = 15.0
ACCEL_VARIABLE = "LABKERNEL_VM_ACCEL"  # "tcg" or "kvm" overrides the probe
SANDBOX_VARIABLE = "LABKERNEL_VM_SANDBOX"  # "off" where this QEMU has no seccomp

Lock = Callable[[str], AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Boot:
    """A guest whose root is mounted, and how that went. Times are seconds; `asked_at` is CLOCK_MONOTONIC."""

    session: Session
    accelerator: str
    reason: str
    kernel: str
    start: str  # "template" or "cold"
    asked_at: float
    ready_s: float
    warnings: tuple[str, ...] = ()


class Machines:
    """Starts guests from the files of one store. `lock(name)` is an exclusive lock between processes."""

    def __init__(self, vm_dir: Path, runtime_dir: Path, lock: Lock, notify: Callable[[str], None]) -> None:
        self._vm = vm_dir
        self._verdict_file = runtime_dir / "kvm.json"
        self._lock = lock
        self.notify = notify
        for name in ("kernels", "disks", "templates"):
            (vm_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def accelerator(self, *, fresh: bool = False) -> kvm.Verdict:
        """Whether KVM is used, and why (not)."""
        forced = os.environ.get(ACCEL_VARIABLE)
        if forced in ("kvm", "tcg"):
            return kvm.Verdict(usable=forced == "kvm", reason=f"{ACCEL_VARIABLE}={forced}")
        return kvm.verdict(self._verdict_file, fresh=fresh)

    def prepare(self, *, memory_mib: int, cpus: int = 1) -> tuple[Machine, Path, kernel.Kernel, kvm.Verdict]:
        """All that a guest needs but its disk; on first use the kernel is fetched. Raises VMError, UsageError."""
        qemu = guest.find_qemu()
        launcher = guest.get_init(self._vm)
        with self._lock("vm-kernel"):
            found = kernel.get_kernel(self._vm / "kernels", notify=self.notify)
            initramfs = kernel.get_initramfs(found, launcher)
        verdict = self.accelerator()
        machine = Machine(
            qemu=qemu,
            accelerator="kvm" if verdict.usable else "tcg",
            memory_mib=memory_mib,
            cpus=cpus,
            kernel=found.image,
            initramfs=initramfs,
            disk=Path(os.devnull),
            sandbox=os.environ.get(SANDBOX_VARIABLE) != "off",
        )
        return machine, launcher, found, verdict

    def boot(
        self,
        disk: Path,
        *,
        memory_mib: int,
        cpus: int = 1,
        cold: bool = False,
        hostname: str | None = None,
        readonly: bool = False,
        keep_all: bool = True,
        on_start: Callable[[Session], None] | None = None,
    ) -> Boot:
        """Start a guest with `disk` as its root and wait until that is mounted.

        `on_start` gets each session as soon as its QEMU runs (again when a second try is made). Raises VMError.
        """
        machine, launcher, found, verdict = self.prepare(memory_mib=memory_mib, cpus=cpus)
        machine = dataclasses.replace(machine, disk=disk)
        saved = None if cold else self._template(machine, launcher, found)
        warnings: list[str] = []
        tries: list[tuple[Machine, Path | None]] = [(machine, saved)]
        tries.append((dataclasses.replace(machine, accelerator="tcg"), None))
        for number, (attempt, path) in enumerate(tries):
            asked_at = time.monotonic()
            try:
                session = self._bring_up(
                    attempt, launcher, path, hostname=hostname, readonly=readonly, keep_all=keep_all, on_start=on_start
                )
            except VMError as err:
                if number == len(tries) - 1 or isinstance(err, RootError):
                    raise
                if path is not None:
                    path.unlink(missing_ok=True)
                warnings.append(f"the first try failed ({err.brief}); the machine was started anew")
                continue
            assert session.ready_at is not None
            return Boot(
                session=session,
                accelerator=attempt.accelerator,
                reason=verdict.reason,
                kernel=found.release,
                start="template" if path else "cold",
                asked_at=asked_at,
                ready_s=session.ready_at - asked_at,
                warnings=tuple(warnings),
            )
        raise AssertionError("unreachable")

    def _template(self, machine: Machine, launcher: Path, found: kernel.Kernel) -> Path | None:
        path = template.template_path(
            self._vm / "templates", machine, kernel=f"{found.identity} {machine.initramfs.name}"
        )
        if path.exists():
            return path
        with self._lock(f"vm-template-{path.stem}"):
            if not path.exists():
                self.notify("making a template of a booted machine (once for each size of memory)")
                try:
                    deadline_s = READY_DEADLINE_S[machine.accelerator]
                    template.make_template(path, machine, launcher, scratch=self._vm / "disks", deadline_s=deadline_s)
                except VMError as err:
                    self.notify(f"no template: {err.brief}; booting cold")
                    return None
        return path

    def _bring_up(
        self,
        machine: Machine,
        launcher: Path,
        saved: Path | None,
        *,
        hostname: str | None,
        readonly: bool,
        keep_all: bool,
        on_start: Callable[[Session], None] | None,
    ) -> Session:
        file = open(saved, "rb") if saved else None  # noqa: SIM115
        try:
            session = Session(
                machine,
                launcher,
                scratch=self._vm / "disks",
                incoming=file.fileno() if file else None,
                keep_all=keep_all,
            )
        finally:
            if file:
                file.close()
        try:
            if on_start is not None:
                on_start(session)
            limit_s = _RESTORE_DEADLINE_S if saved else READY_DEADLINE_S[machine.accelerator]
            deadline = time.monotonic() + limit_s
            session.wait_hello(deadline)
            session.mount_root(deadline, hostname=hostname, readonly=readonly)
        except BaseException:
            session.close()
            raise
        return session
