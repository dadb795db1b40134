"""One virtual machine: the object that the service, magics and the command line hand around.

It is what a `Container` is, with the same verbs, and a kernel of its own inside. Identity and settings come from the
database, its status from the supervisor's state file, what QEMU did from the monitor's `machine.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..display import without_formulas
from ..errors import ConflictError, NoSuchContainer, NoSuchVM, StartError, UsageError, VMError
from ..measuring.readers import reader_for
from ..measuring.samples import Limits, Sample
from ..qemu import control
from ..qemu.command import CARDS, LATE_CARDS
from ..running.container import Container, ContainerList
from . import plans
from . import snapshots as vmsnapshots
from .results import VMResult, timings_of, usage_of

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from ..vms import VMs

_INSIDE_TIMEOUT_S = 5.0
_REWIRE_S = 20.0
_SNAPSHOT_TIMEOUT_S = 180.0
SNAPSHOT = "latest"


class VM(Container):
    """A virtual machine of this store. What it has in common with a container is there under the container's names."""

    kind = "vm"
    _containers: VMs  # type: ignore[assignment]
    prepare_s = 0.0
    notify: Callable[[str], None] = staticmethod(lambda _line: None)
    _facts: dict[str, Any] | None = None
    _last_state: dict[str, Any] | None = None

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        return self._containers.layout.vm_dir(self.id)

    @property
    def _folder(self) -> str:
        return str(self.directory)

    def runtime_state(self) -> dict[str, Any]:
        """The state the supervisor keeps; the last known one of a machine that is gone. Raises NoSuchVM."""
        try:
            self._last_state = super().runtime_state()
        except NoSuchContainer:
            raise NoSuchVM(self.name) from None
        return self._last_state

    @property
    def status(self) -> str:
        """created (also while it boots), running, paused, exited; `removed` when it is gone."""
        try:
            return str(self.runtime_state()["status"])
        except NoSuchVM:
            return "removed"

    @property
    def facts(self) -> dict[str, Any]:
        """What its monitor has told (qemu/monitor.py): accelerator, kernel, times, figures; empty before a start."""
        if self._facts is not None and self._facts.get("phase") == "ended":
            return self._facts
        try:
            self._facts = json.loads((self.directory / "machine.json").read_bytes())
        except (OSError, ValueError):
            pass
        return self._facts or {}

    @property
    def memory_bytes(self) -> int:
        return int(self.settings["mem_limit"])

    @property
    def limits(self) -> Limits:
        """What QEMU's process may use here."""
        cgroups, cpus = self._containers.driver.cgroups, self.settings["nano_cpus"] / 1e9
        memory = plans.most_memory(self.settings) if cgroups.get("memory") == "kernel" else None
        return Limits(memory, cpus if cpus % 1 and cgroups.get("cpu") == "kernel" else None)

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`; empty before its first start."""
        return str(self.facts.get("accelerator", ""))

    @property
    def accelerator_reason(self) -> str:
        """Why it is this one."""
        return str(self.facts.get("accelerator_reason") or self._plan().get("accelerator_reason", ""))

    @property
    def booted(self) -> str:
        """How it came up: `template`, `cold` or `snapshot`."""
        return str(self.facts.get("start", ""))

    @property
    def kernel(self) -> str:
        """The release of its own kernel."""
        return str(self._plan().get("kernel", ""))

    @property
    def kernel_source(self) -> str:
        """Where that kernel came from."""
        return str(self._plan().get("kernel_source", ""))

    @property
    def warnings(self) -> list[str]:
        return [*super().warnings, *(str(line) for line in self.facts.get("warnings", ()))]

    @property
    def pid(self) -> int | None:
        """The process of QEMU on this machine; None while there is none."""
        facts = self.facts
        pid = int(facts.get("qemu_pid") or 0)
        return pid if pid and facts.get("phase") != "ended" and os.path.exists(f"/proc/{pid}") else None

    @property
    def exit_code(self) -> int | None:
        """Of its command; 137 when the machine was killed; None while it runs."""
        try:
            state = self.runtime_state()
        except NoSuchVM:
            state = self._last_state or {}
            return int(self.facts.get("exit_code", state.get("exit_code") or 137))
        return int(state.get("exit_code") or 0) if state["status"] in ("exited", "dead") else None

    @property
    def ports(self) -> dict[str, Any]:
        """Published ports as docker tells them: {"80/tcp": [{"HostIp", "HostPort"}]}."""
        if self.wired:
            return super().ports
        found: dict[str, Any] = {}
        for protocol, address, outside, inside in self.record["machine"].get("ports") or ():
            place = {"HostIp": address or "0.0.0.0", "HostPort": str(outside)}
            found.setdefault(f"{inside}/{protocol}", []).append(place)
        return found

    @property
    def network_mode(self) -> str:
        if self.wired:
            return str(self.settings["network_mode"])
        return "bridge" if self.record["machine"].get("network") == "open" else "none"

    @property
    def wired(self) -> bool:
        """Whether it is a member of networks as containers are, with cards for them."""
        return bool(self.record["machine"].get("network") == "wired")

    def rewire(self, wires: Mapping[str, Any]) -> list[str]:
        try:
            answer = control.ask(str(self.directory), {"op": "network", "wires": wires}, _REWIRE_S)
        except (OSError, EOFError):
            return [f"{self.name} does not answer: its guest learns of the change when it goes on"]
        return [str(answer["error"])] if "error" in answer else []

    def check_networks(self, more: int) -> None:
        if not self.wired and self.record["machine"]["network"]:
            raise ConflictError(
                f"VM {self.name} has QEMU's user-mode network: it cannot be connected to another one",
                resolution="make it without `-p` and `--network bridge`, or with `--network NAME`",
            )
        most, running = CARDS, self.status in ("running", "paused")
        if running and not self.config()["linux"]["namespaces"]:
            raise ConflictError(
                f"VM {self.name} was started by an older release", resolution=f"`vm stop {self.name}`, then connect it"
            )
        if running and not self._plan().get("cards", CARDS):
            most = LATE_CARDS
        if len(self._containers.networks.endpoints(self.id)) + more > most:
            what = "virtual machine" if most == CARDS else "virtual machine that was started without one"
            raise ConflictError(f"a {what} can be in {most} networks", resolution="`network disconnect` one")

    def connected(self, tx: sqlite3.Connection, network: str) -> None:
        """It is in a network from now on: it starts with cards the next time."""
        if not self.wired:
            self.record["machine"]["network"], self.settings["network_mode"] = "wired", network
            tx.execute("UPDATE vms SET settings = ? WHERE id = ?", (json.dumps(self.record), self.id))

    @property
    def summary(self) -> dict[str, Any]:
        """What a listing needs of `attrs`."""
        from .inspection import summarize_vm

        return summarize_vm(self)

    @property
    def snapshots(self) -> list[str]:
        """Names of its snapshots, oldest first."""
        return vmsnapshots.names(self)

    @property
    def attrs(self) -> dict[str, Any]:
        """As `docker inspect` shows a container, with `Machine` for what only a virtual machine has."""
        from .inspection import inspect_vm

        return inspect_vm(self)

    def _plan(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.config()["labkernel"]["machine"]
        except NoSuchContainer:
            found = self._last_plan
        self._last_plan = found
        return found

    _last_plan: dict[str, Any] = {}

    # -- figures ----------------------------------------------------------------------------------------------------

    def sample(self) -> Sample | None:
        """CPU and memory of the QEMU process, as for a container; None while there is none."""
        pid = self.pid
        reader = reader_for(pid) if pid else None
        if reader is None:
            return None
        try:
            return reader.read()
        finally:
            reader.close()

    def inside(self) -> dict[str, int]:
        """The guest's own view: CPU times in µs, memory in KiB. Raises ConflictError, VMError when it is silent."""
        answer = self._ask({"op": "figures"}, _INSIDE_TIMEOUT_S)
        return {name: int(value) for name, value in answer["figures"].items()}

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self._need_running(self.status)
        try:
            answer = control.ask(str(self.directory), request, timeout_s)
        except TimeoutError:
            raise VMError("the guest did not answer in time") from None
        except (OSError, EOFError):
            raise VMError("the VM has ended") from None
        if "error" in answer:
            raise VMError(str(answer["error"]))
        return answer

    def result(self) -> VMResult:
        """The figures of an ended machine. Raises ConflictError while it runs, StartError when nothing was started."""
        facts = self.facts
        if facts.get("phase") != "ended":
            if self.status in ("running", "paused"):
                raise ConflictError(f"VM {self.name} is running", resolution="wait() for it first")
            if not facts:
                raise VMError(f"VM {self.name} was not started", resolution=f"`vm start {self.name}`")
        self.raise_problem()
        if not facts.get("ended_at"):
            raise VMError("the VM ended before its command did")
        plan = self._plan()
        return VMResult(
            image=self.image_ref,
            command=tuple(self.record["args"]),
            exit_code=int(facts.get("exit_code") or 0),
            stdout=self.logs(stderr=False) if self.log_path.exists() else b"",
            stderr=self.logs(stdout=False) if self.log_path.exists() else b"",
            timings=timings_of(facts, self.prepare_s),
            usage=usage_of(facts),
            accelerator=self.accelerator,
            accelerator_reason=self.accelerator_reason,
            start=self.booted,
            kernel=str(plan.get("kernel", "")),
            memory_bytes=self.memory_bytes,
            disk_bytes=int(self.record["machine"].get("disk_bytes") or 0) + int(facts.get("overlay_bytes") or 0),
            warnings=tuple(self.warnings),
            id=self.id,
        )

    def raise_problem(self) -> None:
        """Raises VMError for what went wrong with the machine itself, as its monitor tells it."""
        facts = self.facts
        if facts.get("problem"):
            hint = facts.get("hint") or _hint(str(facts.get("details") or ""))
            raise VMError(str(facts["problem"]), details=facts.get("details") or None, resolution=hint)

    # -- verbs ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Boot it and start its command; without effect when it runs. Raises StartError, VMError."""
        status = self.runtime_state()["status"]
        if status == "paused":
            raise ConflictError("cannot start a paused VM, try unpause instead")
        if status != "running":
            self._containers.boot(self)

    def exec_run(self, cmd: str | Sequence[str], **options: Any) -> Any:
        """As `Container.exec_run`: one more command in the guest; (exit_code, output)."""
        if options.pop("privileged", False):
            raise UsageError("a command in a virtual machine has its kernel's privileges: leave privileged out")
        return super().exec_run(cmd, **options)

    def snapshot(self, name: str = SNAPSHOT) -> str:
        """Keep memory, devices and disk of the running machine under `name`, which an older one gives up. The machine
        goes on. Takes about 0.3 s and as much disk as its memory. Raises ConflictError, VMError."""
        self._need_running(self.status)
        return vmsnapshots.take(
            self, name, lambda target: self._ask({"op": "snapshot", "target": target}, _SNAPSHOT_TIMEOUT_S)
        )

    def restore(self, name: str = SNAPSHOT) -> None:
        """Go back to a snapshot: what runs now is ended, the machine goes on where it was. Raises VMError."""
        vmsnapshots.restore(self, name)

    def remove_snapshot(self, name: str) -> None:
        """Raises VMError when there is none of this name."""
        vmsnapshots.remove(self, name)

    def kill(self, signal: str | int | None = None) -> None:
        """SIGKILL (the default) is pulling the plug: the machine is gone at once. Other signals go to its command.

        Raises ConflictError when it does not run."""
        super().kill(signal)
        if str(signal or "KILL").upper().removeprefix("SIG") in ("KILL", "9"):
            self.wait(timeout=30)

    def remove(self, *, force: bool = False, v: bool = False, link: bool = False) -> None:
        """Remove it with its disk, log and snapshots; `v` with its anonymous volumes; `force` ends it first."""
        _ = self.facts, self._plan()  # what it was stays known to who holds the object
        super().remove(force=force, v=v, link=link)

    def _need_running(self, status: str) -> None:
        if status not in ("running", "paused"):
            raise ConflictError(f"VM {self.name} is not running", resolution=f"`vm start {self.name}` starts it")

    # -- what a machine has not --------------------------------------------------------------------------------------

    def _absent(self, *_args: Any, **_options: Any) -> NoReturn:
        raise UsageError(
            "a virtual machine's disk is its own business: copy files with a shared directory (-v) or through exec",
            resolution="`vm exec VM tar -c PATH`, or start it with -v DIR:PATH",
        )

    get_archive = put_archive = diff = export = commit = update = _absent

    # -- display ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        how = f", {self.accelerator.upper()}" if self.accelerator else ""
        return f"<VM {self.name} ({self.short_id}) {self.image_ref}: {self.status_line()}{how}>"

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        notes = "".join(f"<div class='labkernel-warning'>{html.escape(line)}</div>" for line in self.warnings)
        return VMList([self])._repr_html_() + notes


class VMList(ContainerList):
    """Machines that display themselves as `docker ps` shows containers."""

    header = ("VM ID", *ContainerList.header[1:])


def started_error(vm: VM, err: StartError) -> StartError | VMError:
    """What to raise for a start that failed: the machine's own trouble is a VMError, the command's a StartError."""
    try:
        vm.raise_problem()
    except VMError as problem:
        return problem
    return err


def _hint(words: str) -> str:
    low = words.lower()
    if "out of memory" in low or "cannot allocate memory" in low:
        return "give the VM more memory (`--memory 512m`)"
    if "could not set up host forwarding" in low:
        return "the port is taken on this machine: publish another one (`-p`)"
    if "seccomp" in low or "sandbox" in low:
        return "this QEMU cannot be sandboxed here; LABKERNEL_VM_SANDBOX=off starts it without"
    return "run again; `--cold` boots without a template, `labkernel doctor` tells what this machine can do"
