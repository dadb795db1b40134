"""One QEMU process: started so that it dies with its owner, read by one thread, measured from outside.

It knows frames but not what they mean; `session.py` does. The owner is the Python process: PR_SET_PDEATHSIG, which the
launcher (guest/init.c) asks for, watches the *thread* that forked, so all QEMUs are forked by one thread that lives as
long as the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.errors import VMError

from .channel import Decoder, Frame
from .command import Machine
from .qmp import Qmp

CONSOLE_KEPT_BYTES = 16384
_SOCKET_BUFFER = 1 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Outside:
    """What a QEMU process has used, seen from the host (proc(5)). `cpu_s` counts all its threads."""

    cpu_s: float
    rss_bytes: int
    peak_rss_bytes: int
    overlay_bytes: int = 0


class _Spawner:
    """A thread that starts processes and outlives whoever asked it to."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def call(self, job: Callable[[], Any]) -> Any:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # also after a fork of this interpreter
                self._thread = threading.Thread(target=self._run, name="labkernel-qemu-spawner", daemon=True)
                self._thread.start()
        self._jobs.put((job, answer))
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self) -> None:
        while True:
            job, answer = self._jobs.get()
            try:
                answer.put(job())
            except BaseException as err:
                answer.put(err)


_spawner = _Spawner()


class QemuProcess:
    """A running QEMU. `on_frame` is called in the reader thread; `on_end` once, when the process is gone."""

    def __init__(
        self,
        machine: Machine,
        launcher: Path,
        *,
        scratch: Path,
        incoming: int | None = None,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[], None],
    ) -> None:
        self._on_frame, self._on_end = on_frame, on_end
        self.ended = threading.Event()
        self.exit_status: int | None = None
        self._console, self._stderr = bytearray(), bytearray()
        self._send_lock = threading.Lock()
        self._last: Outside | None = None
        ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
        self._channel, self._console_socket, qmp = ours
        for end in (self._channel, theirs[0]):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self.qmp = Qmp(qmp)
        self.argv = dataclasses.replace(
            machine,
            channel_fd=theirs[0].fileno(),
            console_fd=theirs[1].fileno(),
            qmp_fd=theirs[2].fileno(),
            incoming_fd=incoming,
        ).argv()
        descriptors = [end.fileno() for end in theirs] + ([] if incoming is None else [incoming])
        command = [str(launcher), "--launch", str(os.getpid()), *self.argv]
        # TMPDIR is where QEMU puts the throw-away overlay of its disk; it unlinks the file at once.
        env = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": str(scratch), "LC_ALL": "C"}

        def spawn() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=descriptors,
                env=env,
                start_new_session=True,  # the interrupt of a terminal is the owner's to handle
            )

        self.started_at = time.monotonic()
        try:
            self._popen: subprocess.Popen[bytes] = _spawner.call(spawn)
        except OSError as err:
            for end in ours:
                end.close()
            raise VMError(f"QEMU could not be started: {err}") from err
        finally:
            for end in theirs:
                end.close()
        self.pid = self._popen.pid
        self._thread = threading.Thread(target=self._read_all, name=f"labkernel-qemu-{self.pid}", daemon=True)
        self._thread.start()

    # -- talking

    def send(self, data: bytes) -> None:
        """Send frames to the guest. Blocks while the guest does not read; silent once QEMU is gone."""
        with self._send_lock, contextlib.suppress(OSError):
            self._channel.sendall(data)

    def _read_all(self) -> None:
        assert self._popen.stderr is not None
        decoder = Decoder()
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ, "channel")
            selector.register(self._console_socket, selectors.EVENT_READ, "console")
            selector.register(self._popen.stderr, selectors.EVENT_READ, "stderr")
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        data = os.read(key.fd, 262144)
                    except OSError:
                        data = b""
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "channel":
                        for frame in decoder.feed(data):
                            self._on_frame(frame)
                    else:
                        kept = self._console if key.data == "console" else self._stderr
                        kept += data
                        del kept[:-CONSOLE_KEPT_BYTES]
        self._reap()

    def _reap(self) -> None:
        _, status, usage = os.wait4(self.pid, 0)
        self._popen.returncode = self.exit_status = os.waitstatus_to_exitcode(status)
        last = self._last
        # ru_maxrss is of no use: it starts with what the forking Python had.
        self._last = Outside(
            cpu_s=usage.ru_utime + usage.ru_stime,
            rss_bytes=0,
            peak_rss_bytes=last.peak_rss_bytes if last else 0,
            overlay_bytes=last.overlay_bytes if last else 0,
        )
        assert self._popen.stderr is not None
        self._popen.stderr.close()
        self._channel.close()
        self._console_socket.close()
        self.qmp.close()
        self.ended.set()
        self._on_end()

    # -- measuring

    def sample(self) -> Outside | None:
        """The figures now; the final ones once it has ended; None when there never were any."""
        if not self.ended.is_set():
            try:
                self._last = self._look()
            except (OSError, ValueError, IndexError):
                pass  # it ended between two reads
        return self._last

    def _look(self) -> Outside:
        base = f"/proc/{self.pid}"
        stat = Path(f"{base}/stat").read_text().rpartition(")")[2].split()
        memory = {}
        for line in Path(f"{base}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS"):
                memory[name] = int(value.split()[0]) * 1024
        return Outside(
            cpu_s=(int(stat[11]) + int(stat[12])) / _TICKS_PER_S,
            rss_bytes=memory.get("VmRSS", 0),
            peak_rss_bytes=memory.get("VmHWM", 0),
            overlay_bytes=self._overlay_bytes(base),
        )

    def _overlay_bytes(self, base: str) -> int:
        for name in os.listdir(f"{base}/fd"):
            # QEMU names its temporary overlays vl.XXXXXX; the file has no name any more, its descriptor has.
            with contextlib.suppress(OSError):
                link = os.readlink(f"{base}/fd/{name}")
                if "/vl." in link and link.endswith(" (deleted)"):
                    return os.stat(f"{base}/fd/{name}").st_blocks * 512
        return 0

    # -- ending

    def kill(self) -> None:
        """End it now (SIGKILL: its disk is thrown away anyway) and wait until it is reaped. Idempotent."""
        if not self.ended.is_set():
            self.sample()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the number can't be somebody else's
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def terminate(self) -> None:
        """As `kill`, without waiting: what the reader thread may call."""
        self.sample()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The end of the guest's console and of QEMU's own messages, for error messages."""
        parts = [bytes(part).decode("utf-8", "replace").strip() for part in (self._stderr, self._console)]
        return "\n".join("\n".join(part.splitlines()[-12:]) for part in parts if part)
