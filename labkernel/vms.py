"""The QEMU baseline: the same image and command as a container, in a virtual machine with a kernel of its own.

A machine is to the store what a container is: a row, a directory, and a first process of the supervisor, here QEMU's
monitor (qemu/monitor.py). So any process may list it, run commands in it, follow its log and stop it; one that was
started in the foreground ends with who started it.

    vm/disks/<layers>.img      the disk of an image's layers, shared and never written to
    vm/machines/<id>/          config.json state.json log.json as for containers; machine.json; disk.qcow2 (its own
                               writes); snapshots/<name>/
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ConflictError, LabkernelError, NoSuchContainer, NoSuchVM, StartError, TaskError, UsageError, VMError
from .events import container_attributes, insert_event
from .imaging.provision import make_mounts
from .linux.ownfiles import OWNER_XATTR
from .machines import plans as vmplans
from .machines.disks import one_tree
from .machines.results import Usage, VMResult
from .machines.vm import VM, VMList, started_error
from .qemu import disk, guest, kernel
from .qemu.command import Machine
from .qemu.machine import Machines
from .qemu.qcow2 import make_overlay
from .runtime import instances
from .runtime.copies import remove_tree
from .runtime.driver import cgroup_parent
from .runtime.names import random_name
from .runtime.settings import parse_command
from .runtime.spec import finalize_args
from .store.locks import Locks

if TYPE_CHECKING:
    from .images import Images
    from .imaging.image import Image
    from .networks import Networks
    from .runtime.client import Attachment, Runtime
    from .runtime.driver import Driver
    from .runtime.probe import Capability
    from .store.database import Database
    from .store.layout import Layout
    from .volumes import Volumes

DEFAULT_MEMORY = vmplans.DEFAULT_MEMORY
LEFTOVER_AGE_S = 60.0
_REATTACH_ATTEMPTS = 4

Capabilities = list["Capability"]  # in the class below, `list` is a method
Words = list[str]
Found = list[VM]
OnOutput = Callable[[str, bytes], None]
Notify = Callable[[str], None]


class VMs:
    """The virtual machines of one store. Safe to use from several threads and processes at once."""

    def __init__(
        self,
        layout: Layout,
        db: Database,
        runtime: Runtime,
        driver: Driver,
        images: Images,
        volumes: Volumes,
        *,
        networks: Networks,
    ) -> None:
        self.networks = networks
        self.layout, self.db, self.runtime, self.driver = layout, db, runtime, driver
        self.images, self.volumes = images, volumes
        self._locks = Locks(layout.locks)
        self._parent = cgroup_parent(layout)

    @property
    def driver_name(self) -> str:
        return self.driver.name

    # -- making -----------------------------------------------------------------------------------------------------

    def run(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        detach: bool = False,
        remove: bool | None = None,
        on_output: OnOutput | None = None,
        on_start: Callable[[VM], None] | None = None,
        stdin: bytes | BinaryIO | None = None,
        **settings: Any,
    ) -> Any:
        """Run `command` (default: the image's) of `image` in a VM: the `VMResult` after its end, or with `detach` the
        running `VM`, which then lives until it ends or is stopped.

        `settings` are those of `create`. Not detached, the machine ends with this process and is removed at its end
        (unless `remove` is off); `on_output(stream, data)` is called in this thread as output comes, and `on_start`
        gets the VM before its QEMU runs, so that a sampler sees it from its first moment. `stdin` is bytes or a binary
        file, read to its end. An interrupt ends the machine.

        Raises StartError (126, 127), VMError (no QEMU, no kernel, no answer, `timeout_s` is over), NoSuchImage,
        UsageError. A command that ends with a status other than 0 is a result, not an error.
        """
        if detach:
            vm = self.create(image, command, auto_remove=bool(remove), **settings)
            with self._taken_back(vm, always=True):
                vm.start()
            return vm
        vm = self.create(image, command, stdin_open=stdin is not None, **settings)
        output: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        try:
            if on_start is not None:
                on_start(vm)
            attachment = self.attach_start(vm, ephemeral=remove is not False)
            if stdin is not None:
                threading.Thread(target=_feed, args=(attachment, stdin), daemon=True, name="labkernel-vm-stdin").start()
            self._follow(vm, attachment, output, on_output)
            out, err = (b"".join(output[name]) for name in ("stdout", "stderr"))
            return dataclasses.replace(vm.result(), stdout=out, stderr=err)
        except BaseException:
            remove = True
            raise
        finally:
            if remove is not False:
                with contextlib.suppress(NoSuchVM):
                    vm.remove(force=True, v=True)

    def create(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        cpus: float | None = None,
        cold: bool = False,
        kernel: str | os.PathLike[str] | None = None,
        timeout_s: float | None = None,
        notify: Notify | None = None,
        **given: Any,
    ) -> VM:
        """A new machine that was not started; the disk of the image is made when there is none yet.

        settings: `mem_limit` ("256m" or bytes: the guest's RAM), `cpus` (virtual processors; a fraction is a limit on
        QEMU's process), `cold` (boot from nothing instead of restoring a template), `kernel` (a vmlinuz or vmlinux),
        `timeout_s` (it is ended after so many seconds), `notify(line)`, and those of containers: `name`, `environment`,
        `user`, `working_dir`, `entrypoint`, `hostname`, `read_only`, `labels`, `volumes`, `mounts`, `ports`,
        `network_mode` ("none", the default; "bridge", which is QEMU's user-mode network; or the name of a network),
        `networking_config`, `mac_address`, `tty`, `stdin_open`, `auto_remove`, `stop_signal`.

        Raises UsageError, VMError (no QEMU, no mke2fs), NoSuchImage, ConflictError for a name that is taken.
        """
        began = time.monotonic()
        say = notify or (lambda _line: None)
        settings, wanted = vmplans.check_settings(given, cpus=cpus)
        name = settings.pop("name", None)
        if timeout_s is not None and timeout_s <= 0:
            raise UsageError(f"a time limit of {timeout_s:g} s: it must be positive")
        network = vmplans.network_of(settings)
        if network == "wired":
            self.networks.check_driver()
            self.networks.check(settings)
        guest.find_qemu()  # before anything is prepared
        found = self.images.resolve(image, notify=say) if isinstance(image, str) else image
        words = parse_command(command)
        record: dict[str, Any] = {
            "command": words,
            "args": finalize_args(words, found.config, settings),
            "settings": settings,
            "labels": {**(found.config.get("Labels") or {}), **settings.get("labels", {})},
            "warnings": self._warnings(wanted),
            "machine": {
                "cold": cold,
                "kernel": os.path.abspath(kernel) if kernel else None,
                "timeout_s": timeout_s,
                "network": network,
                "cpus": vmplans.processors(wanted),
                "config": {key: found.config.get(key) for key in ("Env", "User", "WorkingDir", "StopSignal")},
            },
        }
        path, disk_bytes = self._disk(found, say)
        record["machine"].update(disk=str(path), disk_bytes=disk_bytes, ports=vmplans.choose_ports(settings))
        ref = image if isinstance(image, str) else (found.tags or [found.short_id])[0]
        vm = self._make(name, found, ref, record)
        vm.prepare_s = time.monotonic() - began
        vm.notify = say
        return vm

    def _make(self, name: str | None, image: Image, ref: str, record: dict[str, Any]) -> VM:
        """Directory, volumes and row of a new machine; nothing is left behind when one of them fails."""
        id = secrets.token_hex(32)
        directory = self.layout.vm_dir(id)
        directory.mkdir(mode=0o700, parents=True)
        made: Words = []
        try:
            record["mounts"] = make_mounts(self.volumes, {}, record["settings"], [], made)
            return self._insert(id, name, image, ref, record)
        except BaseException as err:
            remove_tree(str(directory))
            for volume in made:
                self.volumes.remove(volume, force=True)
            if isinstance(err, OSError):
                raise TaskError.from_oserror("create virtual machine", err) from err
            raise

    def _warnings(self, wanted: float) -> Words:
        if wanted % 1 and self.driver.cgroups.get("cpu") != "kernel":
            return [f"the limit of {wanted:g} processors is not enforced here: no cpu cgroup"]
        return []

    def _insert(self, id: str, name: str | None, image: Image, ref: str, record: dict[str, Any]) -> VM:
        for attempt in range(20):
            chosen, created_at = name or random_name(attempt), time.time()
            try:
                with self.db.transaction() as tx:
                    tx.execute(
                        "INSERT INTO vms (id, name, image_id, image_ref, created_at, settings) "
                        "VALUES (?, ?, ?, ?, ?, ?)",
                        (id, chosen, image.id, ref, created_at, json.dumps(record)),
                    )
                    if record["machine"]["network"] == "wired":
                        self.networks.join(tx, id, record["settings"])
                    insert_event(tx, "vm", "create", id, container_attributes(chosen, ref, record["labels"]))
            except sqlite3.IntegrityError:
                row = self.db.find("SELECT * FROM vms WHERE name = ?", (chosen,))
                if row is not None and not self._is_there(row["id"]):
                    self._forget(self._vm(row))
                elif name is not None:
                    raise self._name_taken(name) from None
                continue
            vm = VM(self, id, chosen, image.id, ref, created_at, record)  # type: ignore[arg-type]
            self.networks.write(vm)
            return vm
        raise ConflictError("no free name was found for the machine", resolution="give it one: --name NAME")

    def _name_taken(self, name: str) -> ConflictError:
        return ConflictError(
            f'Conflict. The VM name "/{name}" is already in use',
            resolution=f"`vm rm -f {name}`, or choose another --name",
            exit_code=125,
        )

    # -- starting ---------------------------------------------------------------------------------------------------

    def boot(self, vm: VM) -> None:
        """See `VM.start`."""
        self.prepare(vm, ephemeral=bool(vm.settings.get("auto_remove")))
        self.begin(vm, lambda: self.runtime.start(vm.id))

    def attach_start(self, vm: VM, *, ephemeral: bool = False, tied: bool = True) -> Attachment:
        """Start it and return its live streams. `tied`: it ends with this process; `ephemeral`: nobody will look at its
        disk again. Raises as `VM.start`."""
        self.prepare(vm, ephemeral=ephemeral or bool(vm.settings.get("auto_remove")))
        stdin = bool(vm.settings.get("stdin_open"))
        found: Attachment = self.begin(vm, lambda: self.runtime.run(vm.id, stdin=stdin, tied=tied))
        return found

    def begin(self, vm: VM, act: Callable[[], Any]) -> Any:
        """Let the supervisor start what config.json says. Raises StartError, VMError."""
        vm._facts = None
        try:
            found = act()
        except StartError as err:
            raise started_error(vm, err) from err
        # The supervisor answers before it writes the state file, and takes one request after the other: once it has
        # answered this, other processes see the machine run, too.
        self.runtime.states([vm.id])
        return found

    def prepare(self, vm: VM, *, ephemeral: bool = False) -> None:
        """Make all ready that a start needs (kernel, template, disk) and write config.json. Raises VMError."""
        began = time.monotonic()
        machine, settings = vm.record["machine"], vm.settings
        self.networks.before_start(vm)
        notes = self._own_disk(vm)
        wanted = Machine(
            qemu="",
            accelerator="",
            memory_mib=settings["mem_limit"] >> 20,
            kernel=Path(),
            initramfs=Path(),
            disk=vm.directory / "disk.qcow2",
            cpus=machine["cpus"],
            network=machine["network"],
            ports=vmplans.ports_of(machine),
        )
        machines = self._machines(vm.notify)
        plan = machines.plan(wanted, cold=machine["cold"], given_kernel=machine["kernel"])
        plan.update(
            overlay=str(wanted.disk),
            ephemeral=ephemeral,
            timeout_s=machine["timeout_s"],
            network=machine["network"],
            shares=vmplans.shares_of(vm.record["mounts"]),
            warnings=notes,
        )
        self._write_config(vm, plan)
        vm.prepare_s += time.monotonic() - began

    def _write_config(self, vm: VM, plan: dict[str, Any]) -> None:
        config = vmplans.finalize_config(vm, plan, vm.record["machine"]["config"], self.driver, self._parent)
        partial = vm.directory / "config.json.new"
        partial.write_text(json.dumps(config, separators=(",", ":")))
        partial.replace(vm.directory / "config.json")

    def _own_disk(self, vm: VM) -> Words:
        """The overlay with the machine's own writes; a new one where a power cut may have left it half written."""
        path, base = vm.directory / "disk.qcow2", Path(vm.record["machine"]["disk"])
        facts, notes = vm.facts, []
        if path.exists() and facts.get("phase") == "ended" and facts.get("clean"):
            return []
        if path.exists() and facts.get("exec_at"):
            notes = ["the machine was killed when it ran last: its disk starts anew from the image"]
        if not base.exists():
            try:
                self._disk(self.images.get(vm.image_id), vm.notify)
            except LabkernelError as err:
                raise VMError(f"the disk of {vm.name} is gone: {err.brief}", resolution=f"`vm rm {vm.name}`") from err
        make_overlay(path, base, disk.SIZE_BYTES)
        return notes

    def _follow(
        self, vm: VM, attachment: Attachment, output: dict[str, list[bytes]], on_output: OnOutput | None
    ) -> None:
        """Read until the end. When the supervisor is lost on the way, its successor tells everything from the start."""
        from .runtime.client import SupervisorLost

        for attempt in range(_REATTACH_ATTEMPTS):
            told = {name: sum(map(len, pieces)) for name, pieces in output.items()}
            for pieces in output.values():
                pieces.clear()
            try:
                with attachment:
                    for stream, data in attachment:
                        output[stream].append(data)
                        fresh = data[min(told[stream], len(data)) :]
                        told[stream] -= len(data) - len(fresh)
                        if fresh and on_output is not None:
                            on_output(stream, fresh)
                return
            except SupervisorLost:
                if attempt == _REATTACH_ATTEMPTS - 1:
                    raise
                attachment = self.runtime.attach(vm.id, logs=True)

    @contextlib.contextmanager
    def _taken_back(self, vm: VM, *, always: bool = False) -> Any:
        try:
            yield
        except BaseException:
            if always or vm.settings.get("auto_remove"):
                with contextlib.suppress(LabkernelError):
                    vm.remove(force=True, v=True)
            raise

    # -- finding ----------------------------------------------------------------------------------------------------

    def get(self, vm_id: str) -> VM:
        """The VM with this name, id, or unique beginning of an id. Raises NoSuchVM, UsageError."""
        wanted = str(vm_id).removeprefix("/")
        rows = self.db.query("SELECT * FROM vms WHERE id = ? OR name = ?", (wanted, wanted))
        if not rows and wanted and all(letter in "0123456789abcdef" for letter in wanted):
            rows = self.db.query("SELECT * FROM vms WHERE id >= ? AND id < ?", (wanted, wanted + "g"))
            rows = [row for row in rows if self._is_there(row["id"])]
            if len(rows) > 1:
                raise UsageError(f"multiple IDs found with provided prefix: {wanted}", resolution="give more digits")
        for row in rows:
            if self._is_there(row["id"]):
                return self._vm(row)
            self._forget(self._vm(row))
        raise NoSuchVM(vm_id)

    def list(
        self,
        all: bool = False,  # noqa: FBT001, FBT002 - the Docker SDK's signature
        *,
        filters: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> VMList:
        """Running machines, newest first; all of them with `all`, or the `limit` newest. Filters as for containers."""
        from .running.filters import select_containers

        found = select_containers(self, self._all(), dict(filters or {}), everything=all, limit=limit)  # type: ignore[arg-type]
        return VMList(found)

    def _all(self) -> Found:
        found = []
        for row in self.db.query("SELECT * FROM vms ORDER BY created_at DESC, rowid DESC"):
            vm = self._vm(row)
            if self._is_there(vm.id):
                found.append(vm)
            else:
                self._forget(vm)
        return found

    def _vm(self, row: Any) -> VM:
        row_of = (row["id"], row["name"], row["image_id"], row["image_ref"], row["created_at"], row["settings"])
        return VM(self, *row_of)  # type: ignore[arg-type]

    def _is_there(self, id: str) -> bool:
        return self.layout.vm_dir(id).is_dir()

    def state(self, id: str) -> dict[str, Any]:
        """What the supervisor keeps of it (contract: state.json). Raises NoSuchVM."""
        directory = str(self.layout.vm_dir(id))
        state = instances.read_state(directory)
        if state is None:
            if not os.path.isdir(directory):
                raise NoSuchVM(id[:12])
            return {"id": id, "status": "created"}
        if state["status"] in ("running", "paused"):
            started = instances.process_start(int(state["pid"]))
            if not started or started != int(state["pid_start"] or started):
                # It ended a moment ago, or the machine was switched off: the supervisor knows or finds out.
                fresh = self.runtime.states([id]).get(id)
                if fresh is None and not os.path.isdir(directory):
                    raise NoSuchVM(id[:12])
                return fresh or {**state, "status": "exited", "exit_code": 255, "pid": 0}
        return state

    # -- what VM calls ----------------------------------------------------------------------------------------------

    def remove(self, vm: VM, *, force: bool = False, volumes: bool = False) -> None:
        """See `VM.remove`."""
        with contextlib.suppress(NoSuchVM, NoSuchContainer):
            status = self.state(vm.id)["status"]
            if status in ("running", "paused") and not force:
                raise ConflictError(
                    f'cannot remove VM "{vm.name}": it is {status}: stop it before removing or force remove',
                    resolution=f"`vm stop {vm.name}`, or `vm rm -f`",
                )
            if (vm.directory / "config.json").exists():
                self.runtime.remove(vm.id, force=force)
        remove_tree(str(vm.directory))
        self._forget(vm, volumes=volumes or bool(vm.settings.get("auto_remove")))

    def _forget(self, vm: VM, *, volumes: bool = False) -> None:
        with self.db.transaction() as tx:
            tx.execute("DELETE FROM vms WHERE id = ?", (vm.id,))
        if volumes or vm.settings.get("auto_remove"):
            for mount in vm.record.get("mounts", ()):
                if mount.get("anonymous"):
                    with contextlib.suppress(LabkernelError):
                        self.volumes.remove(mount["name"], force=True)

    def rename(self, vm: VM, name: str) -> None:
        """See `Container.rename`."""
        try:
            with self.db.transaction() as tx:
                tx.execute("UPDATE vms SET name = ? WHERE id = ?", (name, vm.id))
        except sqlite3.IntegrityError:
            raise self._name_taken(name) from None
        vm.name = name
        self.networks.refresh(vm)

    def tell(self, vm: VM, action: str, **attributes: Any) -> None:
        """Record an event of a machine which the supervisor does not see."""
        about = container_attributes(vm.name, vm.image_ref, vm.labels)
        self.db.add_event("vm", action, vm.id, {**about, **attributes})

    # -- the store --------------------------------------------------------------------------------------------------

    def prune(self, filters: Mapping[str, Any] | None = None, *, all: bool = False) -> dict[str, Any]:
        """Remove machines that do not run, and kept disks and templates that no machine needs: with `all` every one of
        these, else disks of images that are gone. Returns {"VMsDeleted": ids, "SpaceReclaimed": bytes}."""
        from .running.container import disk_bytes
        from .running.filters import select_stopped

        deleted, freed = [], 0
        for vm in select_stopped(self._all(), dict(filters or {})):
            size = disk_bytes(vm.directory)
            with contextlib.suppress(NoSuchVM, ConflictError):
                vm.remove()
                deleted.append(vm.id)
                freed += size
        for path in self.leftovers():
            freed += disk_bytes(path)
            remove_tree(str(path))
        for path in self._unneeded(all=all):
            with contextlib.suppress(OSError):
                freed += path.stat().st_blocks * 512
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
        return {"VMsDeleted": deleted, "SpaceReclaimed": freed}

    def leftovers(self) -> Sequence[Path]:
        """Directories that no machine owns: a crash left them."""
        known = {row["id"] for row in self.db.query("SELECT id FROM vms")}
        found = []
        for path in (self.layout.vm / "machines").glob("*"):
            with contextlib.suppress(OSError):
                if path.name not in known and time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                    found.append(path)
        return found

    def _unneeded(self, *, all: bool) -> Sequence[Path]:
        used = {vm.record["machine"]["disk"] for vm in self._all()}
        kept = set() if all else {str(self._disk_path(image)) for image in self.images.list(all=True)}
        found = [path for path in self.layout.vm.glob("disks/*") if str(path) not in used | kept and not _is_new(path)]
        return [*found, *(self.layout.vm.glob("templates/*") if all else ())]

    def usage(self) -> dict[str, int]:
        """Bytes on disk: {"machines", "disks", "templates", "kernels"}, for `system df`."""
        from .running.container import disk_bytes

        return {name: disk_bytes(self.layout.vm / name) for name in ("machines", "disks", "templates", "kernels")}

    def probe(self, *, fresh: bool = False) -> Capabilities:
        """What virtual machines need, tried, for `doctor`."""
        from .runtime.probe import Capability

        found = []
        for name, what, ask in (
            ("vm qemu", "virtual machines", guest.find_qemu),
            ("vm init", "virtual machines", lambda: guest.get_init(self.layout.vm)),
            ("vm mke2fs", "disks of virtual machines", disk.find_mke2fs),
            ("vm kernel", "virtual machines", lambda: kernel.describe(self.layout.vm / "kernels")),
        ):
            try:
                found.append(Capability(name, ok=True, cause=str(ask()), needed_for=what))
            except LabkernelError as err:
                cause = err.brief if not err.details else f"{err.brief}: {err.details}"
                found.append(Capability(name, ok=False, cause=cause, remedy=err.resolution or "", needed_for=what))
        verdict = self._machines(lambda _line: None).accelerator(fresh=fresh)
        remedy = (
            "" if verdict.usable else "none is needed: guests run under TCG, slower; KVM wants bare metal or nesting"
        )
        found.append(
            Capability("vm kvm", ok=verdict.usable, cause=verdict.reason, remedy=remedy, needed_for="fast machines")
        )
        return found

    def _machines(self, notify: Notify) -> Machines:
        return Machines(self.layout.vm, self.layout.runtime_dir, self._locks.exclusive, notify, self.runtime.task)

    def _disk_path(self, image: Image) -> Path:
        facts = [f"{disk.FORMAT}", f"{disk.SIZE_BYTES}", *(layer.diff_id for layer in image.layers)]
        return self.layout.vm / "disks" / f"{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:32]}.img"

    def _disk(self, image: Image, notify: Notify) -> tuple[Path, int]:
        """The kept disk of the image's layers, made when it is not there, and its bytes on the host."""
        if image.uses_host:
            raise VMError(
                "lab/host cannot run in a virtual machine: its root is this machine's own, not an image's",
                resolution="use lab/busybox or lab/debian",
            )
        options = self.images.layer_options
        path = self._disk_path(image)
        with self._locks.exclusive(f"vm-disk-{path.stem}"):
            if not path.exists():
                disk.find_mke2fs()
                notify("making the machine's disk from the image's layers (once for each image)")
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with one_tree(self.runtime, self.driver, self.images.layer_dirs(image), f"{path}.merged") as lowers:
                    made = self.runtime.task(
                        "labkernel.qemu.disk:make_disk",
                        lowers=lowers,
                        out=str(path),
                        size_bytes=disk.SIZE_BYTES,
                        userxattr=bool(options.get("userxattr")),
                        owner_xattr=OWNER_XATTR if options.get("single_id") else None,
                    )
                for warning in made.get("warnings") or ():
                    notify(warning)
        return path, path.stat().st_blocks * 512


def _is_new(path: Path) -> bool:
    """A disk that is being made: its names during that are known to nobody else."""
    with contextlib.suppress(OSError):
        return path.suffix in (".partial", ".merged") and time.time() - path.stat().st_mtime < LEFTOVER_AGE_S
    return False


def _feed(attachment: Attachment, source: bytes | BinaryIO) -> None:
    """Give the guest's command its stdin, then the end of it; runs in a thread and ends with the command."""
    with contextlib.suppress(OSError, ValueError):  # a source that breaks is an early end of stdin
        if isinstance(source, bytes):
            attachment.send(source)
        else:
            while attachment.exit_code is None and (data := source.read(65536)):
                attachment.send(data)
    attachment.close_stdin()


__all__ = ["VM", "Usage", "VMList", "VMResult", "VMs"]
