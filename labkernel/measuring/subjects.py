"""The rows of a comparison: ways to run the same program, each measured from outside in the same words.

`bare` is a process of this machine, without any fence; `root`, `rootless` and `proot` are containers under that driver;
`vm` is a virtual machine restored from a template, `vm-cold` one that boots; `docker` is a container of a real Docker,
through its command line. A row that cannot run here says why and is left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LabkernelError, UsageError
from ..metrics import reader_for
from .bench import Bench
from .comparison import Run
from .program import told
from .sweeper import swept

if TYPE_CHECKING:
    from ..imaging.image import Image
    from .laboratory import Laboratory

DRIVERS = ("root", "rootless", "proot")
ROWS = ("bare", *DRIVERS, "vm", "vm-cold", "docker")
IDLE_MS = 700  # how long the idle program lives; it is read in the middle of that
_SETTLED_S = 0.3


class Measured(NamedTuple):
    """One run: seconds, bytes; None where this way cannot tell."""

    output: str
    start_s: float | None
    wall_s: float
    cpu_s: float | None
    peak_bytes: int | None
    exit_code: int = 0


class Subject(ABC):
    """One row. `family` is `bare`, `container` or `vm` and chooses its colour."""

    family = "container"

    def __init__(self, name: str, label: str) -> None:
        self.name, self.label = name, label
        self.notes: list[str] = []

    @abstractmethod
    def run(self, command: list[str], settings: Mapping[str, Any]) -> Measured:
        """Run the command to its end."""

    @abstractmethod
    def idle(self, command: list[str]) -> int | None:
        """Bytes in use while the program `command` (`bench idle`) waits."""

    def disk_bytes(self) -> int | None:
        return None

    def close(self) -> None:  # noqa: B027 - most rows make nothing
        """Remove what was made for this row."""


class Bare(Subject):
    """The measuring program as a plain process of this machine."""

    family = "bare"

    def __init__(self, program: Path, scratch: Path) -> None:
        super().__init__("bare", "bare process")
        self._program, self._scratch = program, scratch

    def _argv(self, command: list[str]) -> list[str]:
        return [str(self._program), *command[1:]]

    def run(self, command: list[str], settings: Mapping[str, Any]) -> Measured:
        env = {"PATH": os.environ.get("PATH", ""), "LABKERNEL_BENCH_DIR": str(self._scratch)}
        asked_at = time.monotonic()
        with subprocess.Popen(self._argv(command), stdout=subprocess.PIPE, env=env, cwd=self._scratch) as child:
            assert child.stdout is not None
            output = child.stdout.read().decode(errors="replace")
            _, status, usage = os.wait4(child.pid, 0)
            ended_at = time.monotonic()
            child.returncode = os.waitstatus_to_exitcode(status)
        words = told(output)
        start = float(words["began"]) - asked_at if "began" in words else None
        peak = int(words["peak_kib"]) * 1024 if words.get("peak_kib", "-") != "-" else None
        return Measured(output, start, ended_at - asked_at, usage.ru_utime + usage.ru_stime, peak, child.returncode)

    def idle(self, command: list[str]) -> int | None:
        with subprocess.Popen(self._argv(command), stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            _until_ready(iter(child.stdout.readline, b""))
            reader = reader_for(child.pid)
            sample = reader.read() if reader else None
            if reader:
                reader.close()
            child.kill()
        return sample.memory_bytes if sample else None


def _until_ready(pieces: Iterator[bytes]) -> None:
    seen = b""
    for piece in pieces:
        seen += piece
        if b"ready" in seen:
            time.sleep(_SETTLED_S)
            return


_WITH_SET_UP = "without a cgroup the peak of memory is that of the largest process, its set-up by the engine included"


class Container(Subject):
    """A container of an engine. `other` engines (another driver) have a store of their own, removed at the end."""

    def __init__(
        self, lab: Laboratory, image: Image, driver: str, *, other: contextlib.ExitStack | None = None
    ) -> None:
        super().__init__(driver, f"container ({driver})")
        self._lab, self._image, self._other = lab, image, other
        self._bench = Bench(lab.containers, lab.vms, image, [], {})

    def run(self, command: list[str], settings: Mapping[str, Any]) -> Measured:
        run = self._bench.run_container(command, 0, {"network_mode": "none", **settings})
        measured = _measured(run)
        if run.memory_source != "rusage":
            return measured
        # The kernel's figure has the moments before the exec in it, when the process still was a copy of the engine's.
        peak = told(run.output).get("peak_kib", "-")
        if peak == "-":
            self.notes = [_WITH_SET_UP]
            return measured
        return measured._replace(peak_bytes=int(peak) * 1024)

    def idle(self, command: list[str]) -> int | None:
        settings: dict[str, Any] = {"network_mode": "none", "entrypoint": command[:1], "user": "0"}
        settings |= {"tied": True, "kept": False}
        container, attachment = self._lab.containers.run_attached(self._image.id, command[1:], **settings)
        try:
            with attachment:
                _until_ready(piece[1] for piece in attachment)
                reader = reader_for(container)
                sample = reader.read() if reader else None
                if reader:
                    reader.close()
            # All that is charged to it, page cache too: what the machine has less while the container is there.
            return (sample.memory_usage_bytes or sample.memory_bytes) if sample else None
        finally:
            container.remove(force=True)

    def disk_bytes(self) -> int | None:
        return self._image.size_bytes

    def close(self) -> None:
        if self._other is not None:
            self._other.close()


def _measured(run: Run) -> Measured:
    return Measured(run.output, run.first_instruction_s, run.wall_s, run.cpu_s, run.peak_memory_bytes, run.exit_code)


class Machine(Subject):
    """A virtual machine of the engine, cold or from a template."""

    family = "vm"

    def __init__(self, lab: Laboratory, image: Image, *, cold: bool, say: Callable[[str], None]) -> None:
        super().__init__("vm-cold" if cold else "vm", "")
        self._lab, self._image = lab, image
        self._bench = Bench(lab.containers, lab.vms, image, [], {})
        self._bench.cold, self._bench.say = cold, say
        self._disk: int | None = None
        self._how = "cold boot" if cold else "template"
        self.label = f"VM ({self._how})"

    def run(self, command: list[str], settings: Mapping[str, Any]) -> Measured:
        run = self._bench.run_vm(command, 0, settings)
        self._disk = run.disk_bytes
        self.label = f"VM, {self._bench.accelerator.upper()} ({self._how})"
        self.notes = list(self._bench.found)
        return _measured(run)

    def idle(self, command: list[str]) -> int | None:
        machines: list[Any] = []
        found: list[int] = []

        def output(_stream: str, data: bytes) -> None:
            if b"ready" in data:
                time.sleep(_SETTLED_S)
                sample = machines[-1].sample()
                if sample is not None:
                    found.append(sample.memory_bytes)

        self._lab.vms.run(
            self._image,
            command[1:],
            entrypoint=command[:1],
            user="0",
            cold=self._bench.cold,
            on_start=machines.append,
            on_output=output,
            timeout_s=120.0,
        )
        return found[-1] if found else None

    def disk_bytes(self) -> int | None:
        return self._disk


class Docker(Subject):
    """A container of a real Docker engine, through the docker command line and one of its contexts."""

    def __init__(self, lab: Laboratory, name: str, context: str) -> None:
        super().__init__("docker", f"Docker ({context or 'default'})")
        self._name = name
        self._docker = ["docker", *(["--context", context] if context else [])]
        if shutil.which("docker") is None:
            raise LabkernelError("there is no docker command on this machine")
        self._call("version", "--format", "{{.Server.Version}}")
        with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
            lab.images.save([name], archive)  # type: ignore[arg-type]
            archive.flush()
            self._call("load", "-i", archive.name)

    def _call(self, *words: str) -> str:
        done = subprocess.run([*self._docker, *words], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise LabkernelError(f"docker {words[0]}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def image_digest(self) -> str:
        """What Docker calls the image it loaded: the digest of its config."""
        return self._call("image", "inspect", "--format", "{{.Id}}", self._name).strip()

    def run(self, command: list[str], settings: Mapping[str, Any]) -> Measured:
        entrypoint = settings.get("entrypoint")
        words = ["--entrypoint", entrypoint[0], self._name, *entrypoint[1:]] if entrypoint else [self._name]
        asked_at = time.monotonic()
        output = self._call("run", "--rm", "--network", "none", *words, *command)
        ended_at = time.monotonic()
        began = told(output).get("began")
        # The engine is on this machine or it is not: another machine's clock says nothing about this one's.
        start = float(began) - asked_at if began is not None and asked_at < float(began) < ended_at else None
        return Measured(output, start, ended_at - asked_at, None, None)

    def idle(self, command: list[str]) -> int | None:
        return None

    def close(self) -> None:
        with contextlib.suppress(LabkernelError, subprocess.TimeoutExpired):
            self._call("rmi", self._name)


def make_subject(lab: Laboratory, row: str, image: Image, name: str, *, context: str = "") -> Subject:
    """The row called `row`. Raises LabkernelError when it cannot run here, UsageError for no such row."""
    if row == "bare":
        return Bare(lab.program(), lab.scratch)
    if row in ("vm", "vm-cold"):
        return Machine(lab, image, cold=row == "vm-cold", say=lab.say)
    if row == "docker":
        return Docker(lab, name, context)
    if row not in DRIVERS:
        raise UsageError(f"no such row: {row}", resolution=f"rows are {', '.join(ROWS)}")
    if row == lab.containers.driver_name:
        return Container(lab, image, row)
    return _container_of_another_driver(lab, row, name)


def _container_of_another_driver(lab: Laboratory, driver: str, name: str) -> Subject:
    """A store of its own in a short place (socket paths), filled with the image, removed with the row."""
    with contextlib.ExitStack() as undo:
        home = Path(tempfile.mkdtemp(prefix="lk-row-", dir="/tmp"))
        undo.enter_context(swept(home, driver))
        undo.callback(shutil.rmtree, home, ignore_errors=True)
        engine = lab.open_engine(root=home / "root", runtime_dir=home / "run", driver=driver)
        undo.callback(engine.close)
        undo.callback(engine.runtime.shutdown, force=True)
        with tempfile.TemporaryFile() as archive:
            lab.images.save([name], archive)
            archive.seek(0)
            engine.images.load(archive)
        image = engine.images.get(name)
        undo.callback(_emptied, engine, name)
        return Container(lab.beside(engine), image, driver, other=undo.pop_all())


def _emptied(engine: Any, name: str) -> None:
    # Files of subordinate ids can be removed only by the engine that made them.
    with contextlib.suppress(LabkernelError):
        engine.images.remove(name, force=True)
