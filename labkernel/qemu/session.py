"""The conversation with one guest: from hello over the root's mount to the end of its commands.

The reader thread of the process files what arrives; the caller's thread waits for it, so that output reaches the caller
(a notebook cell) in the caller's own thread. All waiting has an end: a deadline, an interrupt, or QEMU's death.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from labkernel.errors import StartError, VMError

from . import channel
from .channel import Frame, Kind
from .command import Machine
from .process import Outside, QemuProcess

DEVICE = "/dev/vda"
_PENDING_MAX_BYTES = 4 << 20
_MAX_PROCESSES = 32

Stream = Literal["stdout", "stderr"]
_STREAMS: dict[int, Stream] = {Kind.STDOUT: "stdout", Kind.STDERR: "stderr"}


@dataclasses.dataclass(frozen=True)
class Command:
    """What to run in the guest: a full argument list and environment; `user` as `name[:group]`, `cwd` absolute."""

    args: Sequence[str]
    env: Sequence[str] = ()
    cwd: str = "/"
    user: str = ""
    stdin: bool = False

    def payload(self) -> bytes:
        return channel.start_payload(self.args, env=self.env, cwd=self.cwd, user=self.user, stdin=self.stdin)


class RootError(VMError):
    """The guest answered, and could not mount its root: another try would end the same way."""


class GuestCommand:
    """One command in the guest. Iterating gives (stream, bytes) until it ends; then `exit_code` and `usage` stand."""

    def __init__(self, session: Session, number: int) -> None:
        self._session = session
        self.number = number
        self.started_at: float | None = None
        """Host's CLOCK_MONOTONIC when word of its successful execve came."""
        self.ended_at: float | None = None
        self.exit_code: int | None = None
        self.usage: dict[str, int] = {}
        self.error: StartError | None = None
        self._output: deque[tuple[Stream, bytes]] = deque()
        self._pending = 0
        self._unconsumed = 0
        self.dropped_bytes = 0

    # -- the caller's side

    def read(self, deadline: float | None = None) -> tuple[Stream, bytes] | None:
        """The next piece of output; None at the end. Raises TimeoutError at `deadline` (CLOCK_MONOTONIC)."""
        with self._session.changed:
            while not self._output:
                if self.ended:
                    return None
                self._session.wait(deadline)
            piece = self._output.popleft()
            self._pending -= len(piece[1])
            self._session.changed.notify_all()
            return piece

    def __iter__(self) -> Iterator[tuple[Stream, bytes]]:
        while (piece := self.read()) is not None:
            yield piece

    def send(self, data: bytes) -> None:
        """Give it `data` on stdin. Blocks while the guest holds 256 KiB that it did not read; b"" is nothing."""
        view = memoryview(data)
        while view and not self.ended:
            with self._session.changed:
                while self._unconsumed >= channel.STDIN_WINDOW and not self.ended:
                    self._session.wait(None)
                room = channel.STDIN_WINDOW - self._unconsumed
                piece, view = view[: min(room, 65536)], view[min(room, 65536) :]
                self._unconsumed += len(piece)
            self._session.process.send(channel.encode(Kind.STDIN, bytes(piece), process=self.number))

    def close_stdin(self) -> None:
        """The end of its stdin."""
        self._session.process.send(channel.encode(Kind.STDIN, process=self.number))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to its process group in the guest."""
        self._session.process.send(channel.encode(Kind.SIGNAL, str(int(number)).encode(), process=self.number))

    @property
    def ended(self) -> bool:
        return self.exit_code is not None or self.error is not None or self._session.over

    # -- the reader thread's side; the session's lock is held

    def file(self, frame: Frame, *, keep_all: bool) -> None:
        if frame.kind in _STREAMS:
            self._output.append((_STREAMS[frame.kind], frame.payload))
            self._pending += len(frame.payload)
            while self._pending > _PENDING_MAX_BYTES and not keep_all:
                _, lost = self._output.popleft()
                self._pending -= len(lost)
                self.dropped_bytes += len(lost)
        elif frame.kind == Kind.STARTED:
            self.started_at = time.monotonic()
        elif frame.kind == Kind.CONSUMED:
            self._unconsumed -= frame.numbers().get("bytes", 0)
        elif frame.kind == Kind.FAILED:
            code, _, text = frame.payload.decode("utf-8", "replace").partition(" ")
            self.error = StartError(text, exit_code=int(code) if code.isdigit() else 125)
        elif frame.kind == Kind.EXITED and self.error is None:
            self.usage = frame.numbers()
            self.exit_code = self.usage.pop("status", -1)
            self.ended_at = time.monotonic()

    @property
    def full(self) -> bool:
        return self._pending > _PENDING_MAX_BYTES


class Session:
    """A guest from its start on. `wait_hello` and `mount_root` bring it up; `start` runs commands.

    `keep_all`: output waits for its reader, and the guest with it; otherwise the oldest is dropped beyond 4 MiB.
    """

    def __init__(
        self,
        machine: Machine,
        launcher: Path,
        *,
        scratch: Path,
        incoming: int | None = None,
        keep_all: bool = True,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.over = False
        self.hello: dict[str, str] | None = None
        self.restored = incoming is not None
        self.ready_at: float | None = None
        self.figures: dict[str, int] = {}
        self._figures_count = 0
        self._keep_all = keep_all
        self._on_exit = on_exit
        self._setup_error: str | None = None
        self._commands: dict[int, GuestCommand] = {}
        self.machine = machine
        # The reader thread may deliver before the constructor has returned.
        self._made = threading.Event()
        self.process = QemuProcess(
            machine,
            launcher,
            scratch=scratch,
            incoming=incoming,
            on_frame=self._file,
            on_end=self._ended,
        )
        self._made.set()

    @property
    def kernel_release(self) -> str:
        return (self.hello or {}).get("kernel", "")

    # -- bringing it up

    def wait_hello(self, deadline: float) -> None:
        """Wait for the guest's first sign of life. Raises VMError when it does not come in time.

        A restored guest has said hello in its former life: there is nothing to wait for.
        """
        with self.changed:
            while self.hello is None and not self.restored:
                if self.over:
                    raise self._dead("the guest ended before it was ready")
                try:
                    self.wait(deadline)
                except TimeoutError:
                    raise self._dead("the guest did not answer in time") from None

    def mount_root(self, deadline: float, *, hostname: str | None = None, readonly: bool = False) -> None:
        """Set the guest's clock, stir its entropy and mount its root disk. Raises VMError."""
        payload = channel.setup_payload(
            time_s=time.time(), entropy=os.urandom(64), device=DEVICE, hostname=hostname, readonly=readonly
        )
        self.process.send(channel.encode(Kind.SETUP, payload))
        with self.changed:
            while self.ready_at is None:
                if self._setup_error:
                    raise RootError(
                        f"the guest could not mount its root: {self._setup_error}",
                        resolution="`labkernel system prune` removes kept disks; the next run makes the disk again",
                    )
                if self.over:
                    raise self._dead("the guest ended before it was ready")
                try:
                    self.wait(deadline)
                except TimeoutError:
                    raise self._dead("the guest did not answer in time") from None

    def _dead(self, brief: str) -> VMError:
        return VMError(brief, details=self.process.last_words() or None, resolution=_hint(self.process.last_words()))

    # -- commands and figures

    def start(self, command: Command) -> GuestCommand:
        """Run `command`; returns at once. Raises VMError when 32 commands run already, ValueError for NUL bytes."""
        try:
            payload = command.payload()
            with self.changed:
                free = [n for n in range(_MAX_PROCESSES) if n not in self._commands or self._commands[n].ended]
                if not free:
                    raise VMError("too many commands run in this VM")
                found = self._commands[free[0]] = GuestCommand(self, free[0])
            self.process.send(channel.encode(Kind.START, payload, process=found.number))
        except ValueError as err:
            raise VMError(f"the command cannot be sent to the guest: {err}") from err
        return found

    def inside(self, timeout_s: float = 2.0) -> dict[str, int]:
        """The guest's own figures: CPU times in µs, memory in KiB. Its CPU times lie while the host is busy.

        Raises VMError when it does not answer.
        """
        with self.changed:
            seen = self._figures_count
            self.process.send(channel.encode(Kind.STATS))
            deadline = time.monotonic() + timeout_s
            while self._figures_count == seen:
                if self.over:
                    raise VMError("the VM has ended")
                try:
                    self.wait(deadline)
                except TimeoutError:
                    raise VMError("the guest did not answer in time") from None
            return dict(self.figures)

    def outside(self) -> Outside | None:
        """What the QEMU process has used so far; the final figures once it has ended."""
        return self.process.sample()

    def wait(self, deadline: float | None) -> None:
        """Wait for any change; `changed` must be held. Raises TimeoutError at `deadline`."""
        # Short turns: a lock's wait is not cut short by a signal that came to the main thread just before it.
        left = 1.0 if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.changed.wait(min(left, 1.0))

    def close(self) -> None:
        """End the VM at once. Idempotent."""
        with self.changed:
            self._keep_all = False
            self.changed.notify_all()
        self.process.kill()

    # -- the reader thread

    def _file(self, frame: Frame) -> None:
        self._made.wait()
        exited = None
        with self.changed:
            command = self._commands.get(frame.process)
            if frame.kind == Kind.HELLO:
                self.hello = frame.words()
            elif frame.kind == Kind.READY:
                self.ready_at = time.monotonic()
            elif frame.kind == Kind.FIGURES:
                self.figures = frame.numbers()
                self._figures_count += 1
            elif frame.kind == Kind.FAILED and command is None:
                self._setup_error = frame.payload.decode("utf-8", "replace").partition(" ")[2]
            elif command is not None:
                # A reader that is slow makes the guest wait, as a pipe would.
                while command.full and self._keep_all and frame.kind in _STREAMS:
                    self.changed.wait()
                command.file(frame, keep_all=self._keep_all)
                if frame.kind in (Kind.EXITED, Kind.FAILED):
                    exited = frame.process
            self.changed.notify_all()
        if exited is not None and self._on_exit is not None:
            with contextlib.suppress(Exception):  # nobody's mistake may stop the reading
                self._on_exit(exited)

    def _ended(self) -> None:
        self._made.wait()
        with self.changed:
            self.over = True
            self.changed.notify_all()


def _hint(console: str) -> str:
    if "Out of memory" in console or "Cannot allocate memory" in console or "out of memory" in console:
        return "give the VM more memory (`--memory 512m`)"
    if "seccomp" in console or "sandbox" in console:
        return "this QEMU cannot be sandboxed here; LABKERNEL_VM_SANDBOX=off starts it without"
    return "run again; `--cold` boots without a template, `labkernel doctor` tells what this machine can do"
