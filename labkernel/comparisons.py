"""The same image and command as a container and as a virtual machine, measured side by side from outside.

`compare()` runs both, alternating when there are several runs, and gives a `Comparison`: a table, a figure, a
DataFrame, JSON. Nothing is inferred: kernel release and exit status are asked from inside, CPU and memory are read from
the container's cgroup (without one: the rusage of its first process) and from the process of QEMU. Every table and
figure names the accelerator, since what a VM costs under TCG (emulation) says little about KVM. Drawing is in
`figures.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .measuring.bench import Bench, warnings_of
from .measuring.comparison import FIGURES, FORMAT, KINDS, Comparison, Kind, Run
from .measuring.words import disk_text, machine_text, memory_bytes, memory_text, ratio_text, seconds_text

if TYPE_CHECKING:
    from .containers import Containers
    from .images import Images
    from .vms import VMs

__all__ = [
    "FIGURES", "FORMAT", "KINDS", "Comparison", "Comparisons", "Kind", "Run",
    "disk_text", "machine_text", "memory_bytes", "memory_text", "ratio_text", "seconds_text",
]  # fmt: skip

_SHARED_SETTINGS = {"environment", "user", "working_dir", "entrypoint", "hostname", "read_only"}


class Comparisons:
    """The service `engine.comparisons`."""

    def __init__(self, containers: Containers, vms: VMs, images: Images) -> None:
        self._containers = containers
        self._vms = vms
        self._images = images

    def compare(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        runs: int = 1,
        memory: str | int | None = None,
        cpus: float | None = None,
        cold: bool = False,
        notify: Callable[[str], None] | None = None,
        timeout_s: float = 300.0,
        **settings: Any,
    ) -> Comparison:
        """Run `command` in `image` as a container and as a VM, `runs` times each in alternation.

        `memory` (`"64m"` or bytes) and `cpus` limit the container; the VM gets at least the memory its kernel needs.
        `cold` boots the VM from nothing each time instead of restoring a template. `settings` (`environment`, `user`,
        `working_dir`) go to both. `notify` is told what happens. Before the first measured run each side runs
        `uname -r` once: that asks for the kernel and makes everything ready, so that no run pays for unpacking.

        Raises UsageError, NoSuchImage, VMError (no QEMU, no kernel), StartError (126, 127). A command that ends with
        a status other than 0 is a result, with a warning.
        """
        if runs < 1:
            raise UsageError(f"runs={runs}: at least one run is needed")
        for key in settings.keys() - _SHARED_SETTINGS:
            raise UsageError(
                f"{key} cannot be compared: a container and a VM do not both have it",
                resolution=f"what both have: {', '.join(sorted(_SHARED_SETTINGS))}",
            )
        words = [command] if isinstance(command, str) else list(command or [])
        if isinstance(command, str):
            import shlex

            words = shlex.split(command)
        say = notify or (lambda _line: None)
        found = self._images.resolve(image, notify=say)
        bench = Bench(self._containers, self._vms, found, words, settings)
        bench.memory, bench.cpus, bench.cold, bench.timeout_s = memory_bytes(memory), cpus, cold, timeout_s
        bench.say = say
        say("making both ready: uname -r in a container and in a virtual machine")
        kernels = bench.kernels()
        done: list[Run] = []
        for number in range(1, runs + 1):
            # Alternating and not one kind after the other: what else the machine does then hits both alike.
            for kind in KINDS if number % 2 else KINDS[::-1]:
                say(f"run {number} of {runs}: {'container' if kind == 'container' else bench.vm_words()}")
                done.append(bench.container(number) if kind == "container" else bench.vm(number))
        return Comparison(
            image=image,
            command=words,
            runs=done,
            accelerator=bench.accelerator,
            kernels=kernels,
            memory_bytes=bench.memory,
            cpus=cpus,
            vm_memory_bytes=bench.vm_memory,
            start=bench.start,
            driver=self._containers.driver_name,
            machine=machine_text(),
            measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            warnings=warnings_of(done, bench),
        )
