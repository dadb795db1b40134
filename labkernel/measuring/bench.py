"""Runs one image and command as a container or as a virtual machine and measures it from outside."""

from __future__ import annotations

import math
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import StartError, UsageError, VMError
from ..metrics import Sampler, Series
from .comparison import Run
from .words import memory_text

if TYPE_CHECKING:
    from ..containers import Containers
    from ..imaging.image import Image
    from ..runtime.client import Attachment
    from ..vms import VM, VMs

SAMPLES_PER_SECOND = 50.0
VM_MEMORY_BYTES = 256 << 20
_OUTPUT_KEPT = 4096


class Bench:
    """Runs one image and command either way and measures it; remembers what it learnt about the VM."""

    def __init__(
        self, containers: Containers, vms: VMs, image: Image, command: list[str], settings: Mapping[str, Any]
    ) -> None:
        self._containers, self._vms, self._image = containers, vms, image
        self._command, self._settings = command, dict(settings)
        self.memory: int | None = None
        self.cpus: float | None = None
        self.cold = False
        self.timeout_s = 300.0
        self.say: Callable[[str], None] = lambda _line: None
        self.accelerator = self.start = self.guest_kernel = ""
        self.found: list[str] = []
        self.no_vm = ""  # why there is no virtual machine here

    @property
    def vm_memory(self) -> int:
        return max(VM_MEMORY_BYTES, self.memory or 0)

    @property
    def vm_cpus(self) -> int:
        return max(1, math.ceil(self.cpus or 1))

    def vm_words(self) -> str:
        return f"virtual machine ({self.accelerator.upper()})" if self.accelerator else "virtual machine"

    def kernels(self) -> dict[str, str]:
        """`uname -r` from inside either; also the warm-up. Without a virtual machine `no_vm` says why."""
        # Past the image's entrypoint, and with no user or directory of ours: this is not what is measured.
        asking: dict[str, Any] = {"entrypoint": ["uname"]}
        inside = machine = ""
        try:
            inside = self.run_container(["-r"], 0, {**asking, "network_mode": "none"}).output.strip()
        except StartError:
            pass  # an image without uname (FROM scratch) shares the host's kernel all the same
        try:
            machine = self.run_vm(["-r"], 0, asking).output.strip()
        except StartError:
            pass  # the guest's kernel was chosen by us: the first run that is measured names it
        except VMError as err:
            self.leave_out_vm(err)
        found = {"container": inside or platform.release(), "vm": machine or self.guest_kernel}
        return {"container": found["container"]} if self.no_vm else found

    def leave_out_vm(self, err: VMError) -> None:
        """It cannot be had here, or not any more: the container is measured alone."""
        self.no_vm = err.brief + (f" ({err.resolution})" if err.resolution else "")
        self.say(f"no virtual machine: {self.no_vm}")

    def container(self, number: int) -> Run:
        return self.run_container(self._command, number, {**self._settings, **self._limits()})

    def vm(self, number: int) -> Run:
        return self.run_vm(self._command, number, self._settings)

    def _limits(self) -> dict[str, Any]:
        # Neither has a network: the VM has none of its own, and so there is nothing to warn of.
        limits: dict[str, Any] = {"network_mode": "none"}
        if self.memory:
            limits["mem_limit"] = self.memory
        if self.cpus:
            limits["nano_cpus"] = int(self.cpus * 1e9)
        return limits

    def run_container(self, command: list[str], number: int, settings: Mapping[str, Any]) -> Run:
        asked_at = time.monotonic()
        name = f"compare-{secrets.token_hex(6)}"
        try:
            container, attachment = self._containers.run_attached(
                self._image.id, command or None, name=name, tied=True, kept=False, **settings
            )
        except StartError:
            # As with docker, what could not be started stays created; nobody asked for this one.
            self._containers.get(name).remove(force=True)
            raise
        sampler = Sampler(hz=SAMPLES_PER_SECOND, window_s=self.timeout_s, retry_s=0.002, core_share=1.0)
        try:
            series = sampler.add(container, kind="container")
            sampler.start()
            output = _collect(attachment, asked_at + self.timeout_s)
            ended_at = time.monotonic()
            sampler.stop()
            self.found += [warning for warning in container.warnings if warning not in self.found]
            state = container.runtime_state()
            usage = state.get("usage") or {}
            samples = _relative(series, asked_at)
            cpu_usec, peak = spent(state, series)
            return Run(
                kind="container",
                number=number,
                exit_code=-1 if attachment.exit_code is None else attachment.exit_code,
                first_instruction_s=attachment.exec_at - asked_at if attachment.exec_at else None,
                wall_s=ended_at - asked_at,
                cpu_s=None if cpu_usec is None else cpu_usec / 1e6,
                peak_memory_bytes=peak,
                disk_bytes=self._image.size_bytes,
                output=output,
                samples=samples,
                memory_source=str(usage.get("source", "")),
            )
        finally:
            sampler.stop()
            attachment.close()
            container.remove(force=True)

    def run_vm(self, command: list[str], number: int, settings: Mapping[str, Any]) -> Run:
        sampler = Sampler(hz=SAMPLES_PER_SECOND, window_s=self.timeout_s, retry_s=0.01, core_share=1.0)
        followed: list[Series] = []
        asked: list[float] = []

        def started(vm: VM) -> None:
            asked.append(time.monotonic())  # again when QEMU had to be started a second time
            if not followed:
                followed.append(sampler.add(vm, kind="vm"))
                sampler.start()

        try:
            result = self._vms.run(
                self._image,
                command or None,
                mem_limit=self.vm_memory,
                cpus=self.vm_cpus,
                cold=self.cold,
                timeout_s=self.timeout_s,
                notify=self.say,
                on_start=started,
                **settings,
            )
        finally:
            sampler.stop()
        self.accelerator, self.start, self.guest_kernel = result.accelerator, result.start, result.kernel
        self.found += [warning for warning in result.warnings if warning not in self.found]
        samples = [entry for entry in _relative(followed[0], asked[-1]) if entry[0] >= 0] if followed else []
        return Run(
            kind="vm",
            number=number,
            exit_code=result.exit_code,
            first_instruction_s=result.timings["exec_s"],
            wall_s=result.timings["wall_s"],
            cpu_s=result.usage.cpu_s,
            peak_memory_bytes=max([result.usage.peak_rss_bytes, *(memory for _, _, memory in samples)]) or None,
            disk_bytes=result.disk_bytes,
            output=(result.stdout + result.stderr)[-_OUTPUT_KEPT:].decode(errors="replace"),
            samples=samples,
        )


def spent(state: Mapping[str, Any], series: Series) -> tuple[int | None, int | None]:
    """(CPU µs, peak memory in bytes) of a container that has ended. `state["usage"]` is what was read at the very end
    (runtime/usage.py); samples, up to 20 ms older, stand in for figures its cgroup does not tell. Samples of a process
    stand in for nothing: of a short one they saw the moments before its exec, or none."""
    usage = state.get("usage") or {}
    cpu_usec, peak = usage.get("cpu_usec"), usage.get("memory_peak_bytes")
    if usage.get("source") == "rusage" or not (state.get("cgroup") or {}).get("paths"):
        return cpu_usec, peak
    if cpu_usec is None and series.samples:
        cpu_usec = series.samples[-1].cpu_usec
    peaks = [peak, *(sample.memory_peak_bytes for sample in series.samples)]
    known = [value for value in peaks if value] or [sample.memory_bytes for sample in series.samples]
    return cpu_usec, max(known, default=None)


def _relative(series: Series, asked_at: float) -> list[tuple[float, int, int]]:
    return [(round(s.time_s - asked_at, 5), s.cpu_usec, s.memory_bytes) for s in series.samples]


def _collect(attachment: Attachment, deadline: float) -> str:
    """Read what a run writes until it ends, keeping the end of it."""
    kept = b""
    try:
        while (piece := attachment.read(max(0.0, deadline - time.monotonic()))) is not None:
            kept = (kept + piece[1])[-_OUTPUT_KEPT:]
    except TimeoutError:
        raise UsageError("the command did not end in time", resolution="give it more time (`--timeout`)") from None
    return kept.decode(errors="replace")


def warnings_of(runs: list[Run], bench: Bench) -> list[str]:
    found = list(bench.found)
    failed = sorted({run.exit_code for run in runs if run.exit_code})
    if failed:
        found.append(f"the command ended with exit status {', '.join(map(str, failed))}")
    if any(run.memory_source == "rusage" for run in runs):
        found.append(
            "the container had no cgroup: its CPU time is that of processes that were waited for, its peak memory that"
            " of the largest one, counting the engine's own process that became the command"
        )
    if bench.no_vm:
        return found
    if bench.memory and bench.memory < bench.vm_memory:
        need = memory_text(bench.vm_memory)
        found.append(f"the VM got {need}, since its kernel needs memory of its own; the container's limit is smaller")
    if bench.cpus and bench.cpus != bench.vm_cpus:
        found.append(f"the container was limited to {bench.cpus:g} CPU; the VM had {bench.vm_cpus} whole")
    if bench.accelerator == "tcg":
        found.append("under TCG the VM's processor is emulated in software: its CPU figures are not those of KVM")
    return found
