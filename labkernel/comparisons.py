"""The same image and command as a container and as a virtual machine, measured side by side from outside.

`compare()` runs both, alternating when there are several runs, and gives a `Comparison`: a table, a figure, a
DataFrame, JSON. Nothing is inferred: kernel release and exit status are asked from inside, CPU and memory are read from
the container's cgroup (without one: the rusage of its first process) and from the process of QEMU. Every table and
figure names the accelerator, since what a VM costs under TCG (emulation) says little about KVM. Drawing is in
`measuring/figures.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UsageError, VMError
from .measuring import density, isolation, portability
from .measuring.bench import Bench, warnings_of
from .measuring.comparison import FIGURES, FORMAT, KINDS, Comparison, Kind, Run
from .measuring.experiments import experiments_of
from .measuring.laboratory import Laboratory
from .measuring.measurements import Measurements
from .measuring.procedure import DEFAULT_ROWS, measure
from .measuring.words import disk_text, machine_text, memory_bytes, memory_text, ratio_text, seconds_text

if TYPE_CHECKING:
    from .builds import Builds
    from .containers import Containers
    from .images import Images
    from .store.layout import Layout
    from .vms import VMs

__all__ = [
    "FIGURES", "FORMAT", "KINDS", "Comparison", "Comparisons", "Kind", "Measurements", "Run",
    "disk_text", "machine_text", "memory_bytes", "memory_text", "ratio_text", "seconds_text",
]  # fmt: skip

_SHARED_SETTINGS = {"environment", "user", "working_dir", "entrypoint", "hostname", "read_only"}


class Comparisons:
    """The service `engine.comparisons`."""

    def __init__(
        self,
        containers: Containers,
        vms: VMs,
        images: Images,
        *,
        builds: Callable[[], Builds],
        layout: Layout,
        open_engine: Callable[..., Any],
    ) -> None:
        self._containers = containers
        self._vms = vms
        self._images = images
        self._builds = builds
        self._layout = layout
        self._open_engine = open_engine

    def _laboratory(self, notify: Callable[[str], None] | None) -> Laboratory:
        parts = self._containers, self._vms, self._images, self._builds, self._open_engine
        say = notify or (lambda _line: None)
        return Laboratory(*parts, cache=self._layout.root / "bench", scratch=self._layout.tmp, say=say)

    def measure(
        self,
        image: str = "busybox",
        workload: str | Sequence[str] = "all",
        *,
        command: Sequence[str] = (),
        runs: int = 3,
        rows: Sequence[str] | str = DEFAULT_ROWS,
        docker_context: str = "",
        notify: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Measurements:
        """Measure named experiments side by side in every way to run that works here.

        `workload`: `all`, or of `start idle disk cpu syscall exec memory file fsync network`. With a `command`, that
        command is measured instead. `rows`: of `bare root rootless proot vm vm-cold docker`; one that cannot run here
        is left out with its reason. Drivers other than the engine's get a store of their own, removed in the end.

        Raises UsageError, NoSuchImage, and what the row of this engine's driver raises.
        """
        if runs < 1:
            raise UsageError(f"runs={runs}: at least one run is needed")
        chosen = rows.split(",") if isinstance(rows, str) else list(rows)
        return measure(
            self._laboratory(notify),
            image,
            experiments_of(workload),
            runs=runs,
            rows=chosen,
            command=list(command),
            context=docker_context,
            settings=settings,
        )

    def saved(self, *texts: str) -> Comparison | Measurements:
        """What `to_json` wrote; two texts are put side by side. Raises UsageError."""
        found = [(Comparison if FORMAT in text[:60] else Measurements).from_json(text) for text in texts]
        if len(found) == 1:
            return found[0]
        ours, theirs = (one.measurements() if isinstance(one, Comparison) else one for one in found)
        return ours.beside(theirs)

    def density(
        self,
        image: str = "busybox",
        *,
        memory: str | int | None = None,
        containers: Sequence[int] = density.CONTAINERS,
        machines: Sequence[int] = density.MACHINES,
        notify: Callable[[str], None] | None = None,
    ) -> density.Density:
        """How many idle containers and machines of `image` fit into `memory` (default: this machine's): some are run
        and measured, in the counts given, the rest is extrapolated and marked so. Raises UsageError, NoSuchImage."""
        lab = self._laboratory(notify)
        return density.density(lab, image, memory_bytes=memory_bytes(memory), containers=containers, machines=machines)

    def isolation(self, image: str = "busybox", *, notify: Callable[[str], None] | None = None) -> isolation.Isolation:
        """What a program sees from inside a container and a virtual machine of `image`, beside this machine."""
        return isolation.isolation(self._laboratory(notify), image)

    def portability(
        self, image: str = "busybox", *, docker_context: str = "", notify: Callable[[str], None] | None = None
    ) -> portability.Portability:
        """The same image digest run in each way that works here, with a digest of the files each of them saw."""
        return portability.portability(self._laboratory(notify), image, context=docker_context)

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

        Where a machine cannot be had (no QEMU, no kernel, no answer) the container is measured alone, and `no_vm` says
        why. Raises UsageError, NoSuchImage, StartError (126, 127). A command that ends with a status other than 0 is a
        result, with a warning.
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
                if kind == "vm" and bench.no_vm:
                    continue
                say(f"run {number} of {runs}: {'container' if kind == 'container' else bench.vm_words()}")
                try:
                    done.append(bench.container(number) if kind == "container" else bench.vm(number))
                except VMError as err:
                    bench.leave_out_vm(err)
                    done, kernels = [run for run in done if run.kind != "vm"], {"container": kernels["container"]}
        if not bench.no_vm:
            kernels["vm"] = kernels["vm"] or bench.guest_kernel  # where the image has no uname
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
            no_vm=bench.no_vm,
        )
