"""The QEMU baseline: the same image and command as a container, in a virtual machine with a kernel of its own.

`run` waits for the command and gives a `VMResult`; `start` gives a running `VM`. Machines belong to this process: they
end with it, leave nothing behind, and have no network but `lo`. What a guest writes to its disk is thrown away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from .display import human_memory, human_size, table_html, table_text
from .errors import ConflictError, LabkernelError, NoSuchVM, UsageError, VMError
from .oci.ownership import OWNER_XATTR
from .qemu import disk, guest, kernel
from .qemu.machine import MEMORY_FLOOR_MIB, Boot, Machines
from .qemu.session import Command, GuestCommand, Session
from .runtime.settings import normalize, parse_command, parse_size
from .runtime.spec import finalize_args, finalize_environment
from .samples import Sample, reader_for
from .store.locks import Locks

if TYPE_CHECKING:
    from pathlib import Path

    from .image import Image
    from .images import Images
    from .runtime.client import Runtime
    from .runtime.probe import Capability
    from .store.layout import Layout

DEFAULT_MEMORY = "256m"
_LOG_KEPT_BYTES = 8 << 20
_STOP_TIMEOUT_S = 10.0

Capabilities = list["Capability"]  # in the class below, `list` is a method
OnOutput = Callable[[str, bytes], None]
Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a run cost. `cpu_s` and `peak_rss_bytes` are those of the QEMU process, as the host sees them.

    `inside` is the command's rusage in the guest (`user_us`, `system_us`, `maxrss_kib`, …): its CPU times count the
    guest's clock, which lies when the host is busy.
    """

    cpu_s: float
    peak_rss_bytes: int
    rss_bytes: int
    inside: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class VMResult:
    """How a command in a VM ended.

    `timings`, all in seconds since QEMU was asked for: `ready_s` (the root is mounted), `exec_s` (the command's first
    instruction), `wall_s` (its end); `prepare_s` is what came before and is not in them (disk, kernel, template).
    `start` is `template` or `cold`, `accelerator` `kvm` or `tcg`, with the reason. `disk_bytes` is what the image's
    disk takes on the host, plus what this run wrote.
    """

    image: str
    command: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes
    timings: Mapping[str, float]
    usage: Usage
    accelerator: str
    accelerator_reason: str
    start: str
    kernel: str
    memory_bytes: int
    disk_bytes: int
    warnings: tuple[str, ...] = ()

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("exit code", str(self.exit_code)),
            ("kernel", self.kernel),
            ("accelerator", f"{self.accelerator.upper()} ({self.accelerator_reason})"),
            ("start", self.start),
            ("root ready", f"{self.timings['ready_s']:.2f} s"),
            ("first instruction", f"{self.timings['exec_s']:.2f} s"),
            ("wall", f"{self.timings['wall_s']:.2f} s"),
            ("CPU of QEMU", f"{self.usage.cpu_s:.2f} s"),
            ("peak memory of QEMU", human_memory(self.usage.peak_rss_bytes)),
            ("memory of the machine", human_memory(self.memory_bytes)),
            ("disk", human_size(self.disk_bytes)),
        ]

    def __repr__(self) -> str:
        return table_text(("VM", self.image), self._rows())

    def _repr_html_(self) -> str:
        return table_html(("VM", self.image), self._rows(), caption=shlex.join(self.command))


class VM:
    """A virtual machine of this process, running one command. Ends with that command, `stop()`, or this process."""

    def __init__(
        self, *, name: str, image: str, command: Sequence[str], memory_bytes: int, base_bytes: int, prepare_s: float
    ) -> None:
        self.id = secrets.token_hex(32)
        self.name = name or f"vm-{self.id[:8]}"
        self.image = image
        self.command = tuple(command)
        self.memory_bytes = memory_bytes
        self.warnings: tuple[str, ...] = ()
        self.accelerator = ""
        self.accelerator_reason = ""
        self.start = ""
        self.kernel = ""
        self._base_bytes = base_bytes
        self._prepare_s = prepare_s
        self._session: Session | None = None
        self._boot: Boot | None = None
        self._main: GuestCommand | None = None
        self._log: list[tuple[str, bytes]] = []
        self._log_bytes = 0
        self._done = threading.Event()
        self._finish_lock = threading.Lock()
        self._code: int | None = None
        self._wall_s: float | None = None

    # -- life, called by the service

    def _attach(self, session: Session) -> None:
        self._session = session

    def _run(self, boot: Boot, command: Command) -> None:
        self._boot = boot
        self.accelerator, self.accelerator_reason = boot.accelerator, boot.reason
        self.start, self.kernel, self.warnings = boot.start, boot.kernel, boot.warnings
        self._main = boot.session.start(command)

    def _keep(self, stream: str, data: bytes) -> None:
        self._log.append((stream, data))
        self._log_bytes += len(data)
        while self._log_bytes > _LOG_KEPT_BYTES and len(self._log) > 1:
            self._log_bytes -= len(self._log.pop(0)[1])

    def _finish(self) -> None:
        """Note how it ended and end QEMU. Idempotent; any thread."""
        with self._finish_lock:
            if self._done.is_set():
                return
            main, boot = self._main, self._boot
            if main is not None and boot is not None:
                ended = main.ended_at or time.monotonic()
                self._wall_s = ended - boot.asked_at
                self._code = main.exit_code
            if self._session is not None:
                self._session.close()
            if self._code is None:
                self._code = main.error.exit_code if main is not None and main.error else 137
            self._done.set()

    def _follow(self) -> None:
        assert self._main is not None
        for stream, data in self._main:
            self._keep(stream, data)
        self._finish()

    # -- looking at it

    @property
    def short_id(self) -> str:
        return self.id[:12]

    @property
    def pid(self) -> int | None:
        """The process of QEMU on this machine; None once it has ended."""
        session = self._session
        return None if session is None or session.process.ended.is_set() else session.process.pid

    @property
    def status(self) -> str:
        """`created`, `running` or `exited`."""
        if self._done.is_set() or (self._session is not None and self._session.over):
            return "exited"
        return "running" if self._main is not None else "created"

    @property
    def exit_code(self) -> int | None:
        """Of its command; 137 when the machine was killed; None while it runs."""
        return self._code

    def sample(self) -> Sample | None:
        """CPU and memory of the QEMU process, as for a container; None once it has ended."""
        pid = self.pid
        reader = reader_for(pid) if pid else None
        if reader is None:
            return None
        try:
            return reader.read()
        finally:
            reader.close()

    def inside(self) -> dict[str, int]:
        """The guest's own view: CPU times in µs, memory in KiB. Raises VMError when it does not answer."""
        return self._running().inside()

    def logs(self, *, stdout: bool = True, stderr: bool = True) -> bytes:
        """What the command has written so far (the last 8 MiB)."""
        wanted = {"stdout"} if stdout else set()
        wanted |= {"stderr"} if stderr else set()
        return b"".join(data for stream, data in list(self._log) if stream in wanted)

    def __repr__(self) -> str:
        how = f", {self.accelerator}" if self.accelerator else ""
        return f"<VM {self.name}: {self.image}, {self.status}{how}>"

    def _repr_html_(self) -> str:
        rows = [(self.name, self.image, shlex.join(self.command), self.status, self.accelerator, str(self.pid or ""))]
        return table_html(("name", "image", "command", "status", "accelerator", "pid of QEMU"), rows)

    # -- acting on it

    def _running(self) -> Session:
        if self._session is None or self.status != "running":
            raise ConflictError(f"VM {self.name} is not running")
        return self._session

    def exec_run(self, command: str | Sequence[str], *, user: str = "", workdir: str = "/") -> tuple[int, bytes]:
        """Run one more command in the guest; returns (exit code, stdout and stderr).

        It gets the environment of the machine's command. Raises StartError (126, 127), ConflictError, VMError.
        """
        session = self._running()
        assert self._main is not None
        added = session.start(Command(parse_command(command), env=self._env, cwd=workdir, user=user or self._user))
        output = b"".join(data for _, data in added)
        if added.error is not None:
            raise added.error
        if added.exit_code is None:
            raise VMError("the VM ended while the command ran")
        return added.exit_code, output

    _env: Sequence[str] = ()
    _user: str = ""

    def stop(self, timeout: float = _STOP_TIMEOUT_S) -> None:
        """Ask the command to end (SIGTERM), then end the machine."""
        if self._main is not None and self.status == "running":
            self._main.kill(signal.SIGTERM)
            self._done.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End the machine at once."""
        if self._session is not None:
            self._session.close()
        self._finish()

    def wait(self, timeout: float | None = None) -> dict[str, int]:
        """Wait for the command: `{"StatusCode": …}`. Raises VMError after `timeout` seconds."""
        if not self._done.wait(timeout):
            raise VMError(f"VM {self.name} did not end in {timeout:g} s")
        return {"StatusCode": self._code if self._code is not None else 137}

    def result(self) -> VMResult:
        """The figures of an ended machine. Raises ConflictError while it runs, StartError when nothing was started."""
        if not self._done.is_set():
            raise ConflictError(f"VM {self.name} is running", resolution="wait() for it first")
        boot, main, session = self._boot, self._main, self._session
        if boot is None or main is None or session is None:
            raise VMError(f"VM {self.name} never came up")
        if main.error is not None:
            raise main.error
        if main.exit_code is None:
            raise VMError("the VM ended before its command did", details=session.process.last_words() or None)
        outside = session.outside()
        overlay = outside.overlay_bytes if outside else 0
        return VMResult(
            image=self.image,
            command=self.command,
            exit_code=main.exit_code,
            stdout=self.logs(stderr=False),
            stderr=self.logs(stdout=False),
            timings={
                "ready_s": boot.ready_s,
                "exec_s": (main.started_at or boot.asked_at) - boot.asked_at,
                "wall_s": self._wall_s or 0.0,
                "prepare_s": self._prepare_s,
            },
            usage=Usage(
                cpu_s=outside.cpu_s if outside else 0.0,
                peak_rss_bytes=outside.peak_rss_bytes if outside else 0,
                rss_bytes=outside.rss_bytes if outside else 0,
                inside=dict(main.usage),
            ),
            accelerator=boot.accelerator,
            accelerator_reason=boot.reason,
            start=boot.start,
            kernel=boot.kernel,
            memory_bytes=self.memory_bytes,
            disk_bytes=self._base_bytes + overlay,
            warnings=(*boot.warnings, *_warnings(main)),
        )


def _warnings(command: GuestCommand) -> Iterator[str]:
    if command.dropped_bytes:
        yield f"{human_size(command.dropped_bytes)} of output were dropped: nobody read them"


class VMs:
    """The service `engine.vms`."""

    def __init__(self, layout: Layout, runtime: Runtime, images: Images) -> None:
        self._layout, self._runtime, self._images = layout, runtime, images
        self._locks = Locks(layout.locks)
        self._known: dict[str, VM] = {}

    # -- what clients call

    def run(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        on_output: OnOutput | None = None,
        on_start: Callable[[VM], None] | None = None,
        stdin: bytes | BinaryIO | None = None,
        **settings: Any,
    ) -> VMResult:
        """Run `command` (default: the image's) of `image` in a VM and wait for its end.

        `settings` are those of `start`. `on_output(stream, data)` is called in this thread as output comes; `on_start`
        gets the VM as soon as its QEMU runs, before the guest has booted: a sampler can follow it from there. `stdin`
        is bytes or a binary file, read to its end. An interrupt ends the machine.

        Raises StartError (126, 127), VMError (no QEMU, no kernel, no answer, `timeout_s` is over), NoSuchImage,
        UsageError. A command that ends with a status other than 0 is a result, not an error.
        """
        began = time.monotonic()
        vm, boot_options, guest_command = self._create(image, command, stdin=stdin is not None, **settings)
        try:
            self._boot(vm, boot_options, guest_command, on_start=on_start, keep_all=True)
            main = vm._main
            assert main is not None
            if stdin is not None:
                threading.Thread(target=_feed, args=(main, stdin), daemon=True, name="labkernel-vm-stdin").start()
            deadline = None if timeout_s is None else began + timeout_s
            while True:
                try:
                    piece = main.read(deadline)
                except TimeoutError:
                    raise VMError(
                        f"the command did not end within {timeout_s:g} s; the machine was stopped",
                        resolution="give it more time (`--timeout`)",
                    ) from None
                if piece is None:
                    break
                vm._keep(*piece)
                if on_output is not None:
                    on_output(*piece)
            vm._finish()
            return vm.result()
        finally:
            vm.kill()
            self._known.pop(vm.id, None)

    def start(
        self,
        image: str | Image,
        command: str | Sequence[str] | None = None,
        *,
        on_start: Callable[[VM], None] | None = None,
        **settings: Any,
    ) -> VM:
        """Start `command` of `image` in a VM and return it running.

        settings: `mem_limit` ("256m" or bytes: the guest's RAM), `cpus` (virtual ones, default 1), `cold` (boot from
        nothing instead of restoring a template), `notify(line)`, and those of containers: `name`, `environment`,
        `user`, `working_dir`, `entrypoint`, `hostname`, `read_only`. Raises as `run` does.
        """
        vm, boot_options, guest_command = self._create(image, command, stdin=False, **settings)
        try:
            self._boot(vm, boot_options, guest_command, on_start=on_start, keep_all=False)
        except BaseException:
            vm.kill()
            self._known.pop(vm.id, None)
            raise
        threading.Thread(target=vm._follow, name=f"labkernel-{vm.name}", daemon=True).start()
        return vm

    def get(self, name: str) -> VM:
        """The VM of this process with this name, id, or unique beginning of an id. Raises NoSuchVM."""
        found = [vm for vm in self._known.values() if name and (vm.name == name or vm.id.startswith(name))]
        if len(found) != 1:
            raise NoSuchVM(name)
        return found[0]

    def list(self, all: bool = False) -> list[VM]:  # noqa: FBT001, FBT002 - the Docker SDK's signature
        """VMs of this process: the running ones, or all that were started and not removed."""
        return [vm for vm in self._known.values() if all or vm.status == "running"]

    def remove(self, vm: VM) -> None:
        """End `vm` if it runs, and forget it."""
        vm.kill()
        self._known.pop(vm.id, None)

    def prune(self) -> int:
        """Remove kept disks, templates and kernels; they are made again when needed. Returns the bytes freed."""
        freed = 0
        for path in [*self._layout.vm.glob("disks/*"), *self._layout.vm.glob("templates/*")]:
            with contextlib.suppress(OSError):
                size = path.stat().st_blocks * 512
                path.unlink()
                freed += size
        return freed

    def probe(self, *, fresh: bool = False) -> Capabilities:
        """What virtual machines need, tried, for `doctor`."""
        from .runtime.probe import Capability

        found = []
        for name, what, ask in (
            ("vm qemu", "virtual machines", guest.find_qemu),
            ("vm init", "virtual machines", lambda: guest.get_init(self._layout.vm)),
            ("vm mke2fs", "disks of virtual machines", disk.find_mke2fs),
            ("vm kernel", "virtual machines", lambda: kernel.describe(self._layout.vm / "kernels")),
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

    # -- how it is done

    def _machines(self, notify: Notify) -> Machines:
        return Machines(self._layout.vm, self._layout.runtime_dir, self._locks.exclusive, notify)

    def _create(
        self,
        image: str | Image,
        command: str | Sequence[str] | None,
        *,
        stdin: bool,
        mem_limit: str | int | None = None,
        cpus: int = 1,
        cold: bool = False,
        notify: Notify | None = None,
        **given: Any,
    ) -> tuple[VM, dict[str, Any], Command]:
        began = time.monotonic()
        say = notify or (lambda _line: None)
        memory_bytes = parse_size(mem_limit if mem_limit is not None else DEFAULT_MEMORY, "memory")
        _check_memory(memory_bytes)
        available = len(os.sched_getaffinity(0))
        if not 1 <= cpus <= available or cpus != int(cpus):
            raise UsageError(f"cpus={cpus}: a VM gets whole processors, from 1 to {available}")
        allowed = {"name", "environment", "user", "working_dir", "entrypoint", "hostname", "read_only"}
        for key in given:
            if key not in allowed:
                raise UsageError(f"unknown setting of a virtual machine: {key}")
        settings = normalize(given)
        name = settings.get("name") or ""
        if any(vm.name == name and vm.status == "running" for vm in self._known.values()):
            raise ConflictError(f"The VM name {name} is already in use", resolution="stop it, or choose another name")
        guest.find_qemu()  # before anything is prepared
        found = self._images.resolve(image, notify=say) if isinstance(image, str) else image
        label = image if isinstance(image, str) else (found.tags or [found.short_id])[0]
        args = finalize_args(parse_command(command), found.config, settings)
        path, base_bytes = self._disk(found, say)
        machines = self._machines(say)
        vm = VM(
            name=name,
            image=label,
            command=args,
            memory_bytes=memory_bytes,
            base_bytes=base_bytes,
            prepare_s=time.monotonic() - began,
        )
        hostname = settings.get("hostname") or vm.id[:12]
        vm._env = finalize_environment(found.config, settings, hostname)
        vm._user = settings.get("user") or found.config.get("User") or ""
        cwd = settings.get("working_dir") or found.config.get("WorkingDir") or "/"
        boot_options = {
            "machines": machines,
            "disk": path,
            "memory_mib": memory_bytes >> 20,
            "cpus": int(cpus),
            "cold": cold,
            "hostname": hostname,
            "readonly": bool(settings.get("read_only")),
        }
        self._known[vm.id] = vm
        return vm, boot_options, Command(args, env=vm._env, cwd=cwd, user=vm._user, stdin=stdin)

    def _boot(
        self,
        vm: VM,
        options: dict[str, Any],
        command: Command,
        *,
        on_start: Callable[[VM], None] | None,
        keep_all: bool,
    ) -> None:
        def started(session: Session) -> None:
            vm._attach(session)
            if on_start is not None:
                on_start(vm)

        machines: Machines = options.pop("machines")
        began = time.monotonic()
        boot = machines.boot(options.pop("disk"), keep_all=keep_all, on_start=started, **options)
        vm._prepare_s += boot.asked_at - began
        vm._run(boot, command)

    def _disk(self, image: Image, notify: Notify) -> tuple[Path, int]:
        """The kept disk of the image's layers, made when it is not there, and its bytes on the host."""
        if image.uses_host:
            raise VMError(
                "lab/host cannot run in a virtual machine: its root is this machine's own, not an image's",
                resolution="use lab/busybox or lab/debian",
            )
        options = self._images.layer_options
        facts = [f"{disk.FORMAT}", f"{disk.SIZE_BYTES}", *(layer.diff_id for layer in image.layers)]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
        path = self._layout.vm / "disks" / f"{key}.img"
        with self._locks.exclusive(f"vm-disk-{key}"):
            if not path.exists():
                disk.find_mke2fs()
                notify("making the machine's disk from the image's layers (once for each image)")
                lowers = [str(directory) for directory in self._images.layer_dirs(image)]
                self._layout.vm.joinpath("disks").mkdir(mode=0o700, parents=True, exist_ok=True)
                made = self._runtime.task(
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


def _check_memory(memory_bytes: int) -> None:
    floor = MEMORY_FLOOR_MIB << 20
    if memory_bytes < floor:
        raise UsageError(
            f"a guest kernel needs at least {MEMORY_FLOOR_MIB} MiB; {human_memory(max(0, memory_bytes))} were given",
            resolution=f"`--memory {MEMORY_FLOOR_MIB}m` or more; a container has no kernel of its own to feed",
        )


def _feed(command: GuestCommand, source: bytes | BinaryIO) -> None:
    """Give the guest's command its stdin, then the end of it; runs in a thread and ends with the command."""
    with contextlib.suppress(OSError, ValueError):  # a source that breaks is an early end of stdin
        if isinstance(source, bytes):
            command.send(source)
        else:
            while not command.ended and (data := source.read(65536)):
                command.send(data)
    command.close_stdin()
