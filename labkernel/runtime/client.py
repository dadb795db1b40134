"""The services' side of the supervisor's socket: `Runtime` and `Attachment`.

One request per connection (see `protocol`). The first request starts keeper and supervisor when none answers. A
supervisor that is killed is replaced within moments: requests that change nothing when repeated are repeated,
attached streams end with a clear error and can be attached again.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal as signals
import socket as sockets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..errors import DriverError, LabkernelError, RuntimeFailure
from ..linux.waiting import has_ended, readable
from . import protocol
from .waiting import PendingWait

_CODE = "import sys;sys.path.insert(0,{path!r});from labkernel.runtime.{module} import main;main()"
# A task's first answer comes before it begins, so without an answer it can be sent again.
_REPEATABLE = {"wait", "states", "info", "attach", "resize", "stop", "task"}
_GONE_S = 10.0
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR")


class SupervisorInfo(NamedTuple):
    """Who serves the store. `memory_bytes` is the proportional set size; `warm` counts waiting children; `id_map` is
    "root", "ranges" or "single"; `version` is the protocol's, `release` labkernel's."""

    pid: int
    keeper_pid: int
    version: int
    started_at: float
    memory_bytes: int
    running: int
    warm: int
    cgroup_version: int
    id_map: str
    driver: str
    release: str = ""


class ExitStatus(NamedTuple):
    """How a container ended: its exit code (128 + signal for a signal), whether the kernel's OOM killer struck."""

    exit_code: int
    oom_killed: bool = False
    error: str = ""


class SupervisorLost(RuntimeFailure):
    """The supervisor was killed in the middle of a conversation; its successor has the containers."""

    resolution = "the container itself goes on: attach again, or read its logs"


class Attachment:
    """Streams of a container or an exec. Iterate for ("stdout" | "stderr", bytes); then `exit_code` is set.

    A context manager; leaving it detaches and does not end the container. One thread may read while another writes.
    """

    def __init__(self, sock: sockets.socket, answer: dict[str, Any], rest: bytearray) -> None:
        self._sock = sock
        self._buffer = rest
        self._ready: list[tuple[str, bytes]] = []
        self._write_lock = threading.Lock()
        self._ended = False
        self.pid: int = int(answer.get("pid") or 0)
        self.exec_at: float = float(answer.get("exec_at") or 0.0)
        self.started_at: float = float(answer.get("started_at") or 0.0)
        self.warnings: list[str] = list(answer.get("warnings") or [])
        self.exit_code: int | None = None
        self.oom_killed = False
        self.error = ""
        # Of a container that has ended: "cpu_usec", "memory_peak_bytes", "source" (runtime/usage.py); may be empty.
        self.usage: dict[str, Any] = {}
        self.tied = False
        self.on_lent: Callable[[int | None], None] | None = None
        """Called with the descriptor that `{"lend_stdin": true}` asked for, which is then the callee's, or with None.
        Who sets this reads with `read_now`, and sends no input until it has been called."""
        self._lent: list[int] = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        while (chunk := self.read()) is not None:
            yield chunk

    def fileno(self) -> int:
        """For select and poll: readable means `read` will not block for long."""
        return self._sock.fileno()

    def read(self, timeout_s: float | None = None) -> tuple[str, bytes] | None:
        """The next chunk; None at the end. Raises TimeoutError, SupervisorLost."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            self._take_frames()
            if self._ready:
                break
            if self._ended:
                return None
            if deadline is not None and not self._is_readable(deadline):
                raise TimeoutError("no output in time")
            try:
                data = self._sock.recv(262144)
            except ConnectionResetError:
                data = b""
            except OSError:
                if self._sock.fileno() < 0:
                    return None
                raise
            if not data:
                if self._sock.fileno() < 0:
                    return None
                raise SupervisorLost("the connection to the supervisor was lost")
            self._buffer += data
        return self._ready.pop(0)

    def _is_readable(self, deadline: float) -> bool:
        return bool(readable(self._sock.fileno(), timeout_s=deadline - time.monotonic()))

    def read_now(self, most: int = 1 << 18) -> list[tuple[str, bytes]]:
        """For an event loop: what there is, up to about `most` bytes; empty at the end. Raises BlockingIOError when
        there is nothing now, SupervisorLost."""
        self._take_frames()  # what came with the answer to the request
        size = sum(len(data) for _, data in self._ready)
        # Not before there is something: a frame can be longer than `most`, and nothing would be taken for the end.
        while (size < most or not self._ready) and not self._ended:
            try:
                data = self._receive_now()
            except BlockingIOError:
                if self._ready:
                    break
                raise
            except OSError:
                data = b""
            if not data:
                if self._ready or self._sock.fileno() < 0:
                    break
                raise SupervisorLost("the connection to the supervisor was lost")
            self._buffer += data
            size += len(data)
            self._take_frames()
        found, self._ready = self._ready, []
        return found

    def _receive_now(self) -> bytes:
        if self.on_lent is None:
            return self._sock.recv(262144, sockets.MSG_DONTWAIT)
        data, fds = protocol.receive(self._sock, 262144, flags=sockets.MSG_DONTWAIT)
        self._lent += fds
        return data

    def _take_frames(self) -> None:
        for stream, data in protocol.take_frames(self._buffer):
            if stream == protocol.CONTROL:
                control = json.loads(data)
                end = control.get("exited")
                if "stdin" in control and self.on_lent is not None:
                    told, self.on_lent = self.on_lent, None
                    told(self._lent.pop() if self._lent else None)
                if end is not None:
                    self.exit_code = int(end["exit_code"])
                    self.oom_killed = bool(end["oom_killed"])
                    self.error = str(end["error"])
                    self.usage = dict(end.get("usage") or {})
                    self._ended = True
            elif stream in protocol.STREAM_NAMES:
                self._ready.append((protocol.STREAM_NAMES[stream], data))

    def wait(self) -> ExitStatus:
        """Read and drop what is left, then the exit status."""
        for _ in self:
            pass
        if self.exit_code is None:
            raise RuntimeFailure("detached before the end")
        return ExitStatus(self.exit_code, self.oom_killed, self.error)

    def _send(self, data: bytes) -> None:
        with self._write_lock:
            try:
                self._sock.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                # It has ended; the reading side says how.
                pass

    def send(self, data: bytes) -> None:
        """Bytes for stdin; blocks while the container does not read."""
        for start in range(0, len(data), 65536):
            self._send(protocol.encode_frame(protocol.STDIN, data[start : start + 65536]))

    def send_now(self, data: bytes | memoryview) -> int:
        """For an event loop: as much of whole `protocol` frames as the supervisor takes at once, in bytes. Raises
        BlockingIOError when it takes nothing now; what it has ended for is swallowed."""
        try:
            return self._sock.send(data, sockets.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError):
            return len(data)

    def close_stdin(self) -> None:
        """End of stdin; output goes on."""
        self._send(protocol.encode_control({"close_stdin": True}))

    def resize(self, rows: int, cols: int) -> None:
        """New terminal size."""
        self._send(protocol.encode_control({"resize": [rows, cols]}))

    def close(self) -> None:
        """Detach. A thread that is reading gets its end."""
        if self.tied and self.exit_code is None:
            with suppress(OSError):
                self._send(protocol.encode_control({"untie": True}))
        with suppress(OSError):
            self._sock.shutdown(sockets.SHUT_RDWR)
        self._sock.close()


class Runtime:
    """The supervisor of one store. Thread-safe and cheap; no process is started before the first request."""

    def __init__(
        self,
        *,
        socket: Path,
        root: Path,
        runtime_dir: Path,
        driver: str,
        idle_exit_s: float = 300.0,
        subids: bool = True,
        version: str = __version__,
    ) -> None:
        self.socket = Path(socket)
        self.root = Path(root)
        self.runtime_dir = Path(runtime_dir)
        self.driver = driver
        self.idle_exit_s = idle_exit_s
        self.subids = subids
        self.version = version

    # Connections

    def _connect(self) -> sockets.socket:
        sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            sock.connect(str(self.socket))
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        except BaseException:
            sock.close()
            raise
        self._start()
        try:
            sock.connect(str(self.socket))
        except BaseException:
            sock.close()
            raise
        return sock

    def _start(self) -> None:
        """Start keeper and supervisor, unless another process just does (flock on supervisor.lock)."""
        self.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.runtime_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            probe = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
            try:
                probe.connect(str(self.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                self._spawn()
            finally:
                probe.close()
        finally:
            os.close(lock)

    def _spawn(self) -> None:
        from ..linux import mounts

        if self.driver not in ("root", "rootless", "proot"):
            raise DriverError(
                f"the driver {self.driver!r} is not available yet",
                resolution="use a machine that allows user namespaces; `labkernel doctor` says what is missing",
            )
        argv = [*_interpreter("keeper"), json.dumps(self._settings())]
        env = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        env.setdefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        try:
            held = mounts.open_program(sys.executable, self.driver)
        except OSError as err:
            raise DriverError(
                f"containers could write to this Python ({sys.executable}), and no protected copy can be made: "
                f"{err.strerror}",
                resolution="use a Python that belongs to another user, such as /usr/bin/python3",
            ) from err
        read, write = os.pipe2(os.O_CLOEXEC)
        program = sys.executable if held is None else f"/proc/self/fd/{held}"
        try:
            actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, write, 1)]
            pid = os.posix_spawn(program, argv, env, file_actions=actions, setsigmask=(), setsigdef=[signals.SIGCHLD])
        finally:
            os.close(write)
            if held is not None:
                os.close(held)
        with os.fdopen(read, "rb") as answers:
            line = answers.readline()
        os.waitpid(pid, 0)
        answer = json.loads(line) if line else {"error": "it ended without a word"}
        if not answer.get("ok"):
            raise _start_failure(self.driver, answer, self.runtime_dir)

    def _settings(self) -> dict[str, Any]:
        return {
            "socket": str(self.socket),
            "root": str(self.root),
            "runtime_dir": str(self.runtime_dir),
            "driver": self.driver,
            "idle_exit_s": self.idle_exit_s,
            "subids": self.subids,
            "version": self.version,
            "python_path": [str(Path(path).resolve()) for path in sys.path if path],
        }

    def _upgrade(self) -> None:
        """The supervisor is older than this code and nobody would notice a change: see `takeover`."""
        with self._connect() as sock, suppress(EOFError, ConnectionError):
            message = {"op": "upgrade", "settings": self._settings(), "argv": _interpreter("takeover")}
            protocol.send_message(sock, message)
            protocol.receive_message(sock)

    def _ask(
        self, message: dict[str, Any], fds: Sequence[int] = ()
    ) -> tuple[sockets.socket, dict[str, Any], bytearray]:
        """Send one request and take its answer; repeats where that is safe. The caller closes the socket."""
        message = {**message, "version": self.version}
        deadline = time.monotonic() + 30.0
        while True:
            sock = self._connect()
            try:
                protocol.send_message(sock, message, list(fds))
                answer, _, rest = protocol.receive_message(sock)
            except (ConnectionResetError, BrokenPipeError):
                # Never read by the supervisor that has just left or died, so it cannot have been carried out.
                sock.close()
                if time.monotonic() > deadline:
                    raise RuntimeFailure("the supervisor does not answer") from None
                time.sleep(0.005)
                continue
            except EOFError:
                sock.close()
                if message["op"] in _REPEATABLE and time.monotonic() < deadline:
                    time.sleep(0.005)
                    continue
                raise SupervisorLost(f"the supervisor was lost during {message['op']}") from None
            except BaseException:
                sock.close()
                raise
            if "error" in answer and not answer.get("ok"):
                sock.close()
                raise LabkernelError.from_dict(answer)
            if not answer.get("upgrade"):
                return sock, answer, rest
            sock.close()
            self._upgrade()
            if time.monotonic() > deadline:
                del message["version"]  # the new version does not come up: the old one serves

    def _call(self, op: str, **values: Any) -> dict[str, Any]:
        sock, answer, _ = self._ask({"op": op, **values})
        sock.close()
        return answer

    # Requests

    def ensure(self) -> SupervisorInfo:
        """Start keeper and supervisor when none answers. Raises DriverError, RuntimeFailure."""
        answer = self._call("info")
        return SupervisorInfo(**{name: answer[name] for name in SupervisorInfo._fields if name in answer})

    def start(self, id: str) -> int:
        """Start a created or exited container; returns the pid of its first process, after its exec.

        Raises StartError (exit_code 125, 126, 127), ConflictError, NoSuchContainer.
        """
        return int(self.begin(id)["pid"])

    def begin(self, id: str) -> dict[str, Any]:
        """The same, with all that is told: `pid`, `started_at`, `warnings`. Raises StartError."""
        return self._call("start", id=id)

    def run(
        self, id: str, *, stdin: bool = False, logs: bool = True, tied: bool = False, kept: bool = False
    ) -> Attachment:
        """Attach and start in one request; the attachment ends with the container. Raises as `start`.

        `logs=False` takes no output (it is in the log). `tied`: when this process dies, so does the container, and is
        removed unless `kept`; closing the attachment only detaches.
        """
        message = {"op": "run", "id": id, "stdin": stdin, "stdout": logs, "stderr": logs, "tied": tied, "kept": kept}
        attachment = Attachment(*self._ask(message))
        attachment.tied = tied
        return attachment

    def attach(
        self,
        id: str,
        *,
        stdin: bool = False,
        stdout: bool = True,
        stderr: bool = True,
        logs: bool = False,
        next_start: bool = False,
    ) -> Attachment:
        """Follow a running or created container; with `logs`, from its first line on (also of an exited one).

        `next_start`: one that has ended is followed from its next start on. Input sent before a start waits for it.
        """
        message = {"op": "attach", "id": id, "stdin": stdin, "stdout": stdout, "stderr": stderr, "logs": logs}
        message["next_start"] = next_start
        return Attachment(*self._ask(message))

    def exec(
        self,
        id: str,
        process: dict[str, Any],
        *,
        stdin: bool = False,
        tty: bool = False,
        detach: bool = False,
        exec_id: str | None = None,
        tied: bool = False,
    ) -> Attachment:
        """Start another process in a running container.

        `process`: {"args": [...], "env": [...], "cwd": str|None, "user": "name[:group]"|None, "privileged": bool}.
        `tied`: it ends when this process dies; closing the attachment only detaches.
        Raises StartError (126, 127), ConflictError.
        """
        message = {"op": "exec", "id": id, "process": process, "stdin": stdin, "tty": tty, "detach": detach}
        message |= {"exec_id": exec_id, "tied": tied}  # exec_id: what events call it
        attachment = Attachment(*self._ask(message))
        attachment.tied = tied
        return attachment

    def wait(self, id: str, condition: str = "not-running") -> ExitStatus:
        """Wait for "not-running", "next-exit" or "removed"; survives a change of the supervisor."""
        answer = self._call("wait", id=id, condition=condition)
        return ExitStatus(int(answer["exit_code"]), bool(answer["oom_killed"]), str(answer["error"]))

    def begin_wait(self, id: str, condition: str = "not-running") -> PendingWait:
        """The same for who has an event loop: it waits already when this returns."""
        return PendingWait(self, id, condition)

    def kill(self, id: str, signal: int = signals.SIGKILL) -> None:
        """Send a signal to the first process. Raises ConflictError when it is not running."""
        self._call("kill", id=id, signal=int(signal))

    def stop(self, id: str, *, timeout_s: float | None = None, signal: int | None = None) -> None:
        """Stop signal, then SIGKILL after `timeout_s` (negative: never); returns when it has ended."""
        self._call("stop", id=id, timeout_s=timeout_s, signal=signal)

    def pause(self, id: str) -> None:
        """Freeze all its processes (cgroup freezer, or SIGSTOP)."""
        self._call("pause", id=id)

    def unpause(self, id: str) -> None:
        """Let them go on."""
        self._call("unpause", id=id)

    def resize(self, id: str, rows: int, cols: int) -> None:
        """Size of the container's terminal."""
        self._call("resize", id=id, rows=rows, cols=cols)

    def remove(self, id: str, *, force: bool = False) -> None:
        """Delete the container's directory, inside the driver's namespaces; `force` kills first."""
        self._call("remove", id=id, force=force)

    def update(self, id: str, resources: Sequence[dict[str, Any]], restart: dict[str, Any] | None) -> list[str]:
        """Write limits (runtime-spec `linux.resources`, in order) of a running container, and give it another
        restart policy. Returns what is not enforced. Raises RuntimeFailure when the kernel refuses."""
        answer = self._call("update", id=id, resources=list(resources), restart=restart)
        return [str(line) for line in answer["warnings"]]

    def network(self, **message: Any) -> dict[str, Any]:
        """Tell that the network.json of a running container (`id`) has changed, or that a network's bridge (`remove`)
        has to go. Returns {"warnings": [...]}. Raises StartError."""
        return self._call("network", **message)

    def states(self, ids: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """state.json of the given (or all) containers, those that run as they are now; unknown ids are left out."""
        found: dict[str, dict[str, Any]] = self._call("states", ids=None if ids is None else list(ids))["states"]
        return found

    def task(
        self,
        call: str,
        /,
        *,
        fds: Sequence[int] = (),
        report: Callable[[dict[str, Any]], None] | None = None,
        **args: Any,
    ) -> Any:
        """Run "package.module:function" with JSON `args` in a child of the worker and return its JSON result.

        The child has the driver's user namespace and a mount namespace of its own; it may mount and is killed when
        this call is interrupted. The function gets `fds=[…]` when some are passed and `report=callable` when
        `report` is given. Raises what the function raised, if it is a LabkernelError; otherwise TaskError, DiskFull.
        """
        message = {"op": "task", "call": call, "args": args, "fds": len(fds), "report": report is not None}
        sock, _, buffer = self._ask(message, fds)
        with sock:
            while True:
                for _, data in protocol.take_frames(buffer):
                    event = json.loads(data)
                    if "report" in event and report is not None:
                        report(event["report"])
                    elif "result" in event:
                        return event["result"]
                    elif "failure" in event:
                        raise LabkernelError.from_dict(event["failure"])
                data = sock.recv(262144)
                if not data:
                    raise RuntimeFailure(f"the worker died during {call}")
                buffer += data

    def shutdown(self, *, force: bool = False) -> None:
        """Stop supervisor and keeper (for tests and upgrades). Raises ConflictError when containers run and not
        `force`, which kills them. Returns when both have gone."""
        sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            sock.connect(str(self.socket))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return
        with sock:
            protocol.send_message(sock, {"op": "info"})
            info, _, _ = protocol.receive_message(sock)
        with suppress(EOFError, ConnectionResetError):
            self._call("shutdown", force=force)
        for pid in (info["pid"], info["keeper_pid"]):
            has_ended(pid, _GONE_S)


def _interpreter(module: str) -> list[str]:
    """This Python, isolated and without site-packages, running `module`'s main with this package in its path.

    By name: a client that imports what it starts pays 8 ms for what only the supervisor needs.
    """
    package_parent = str(Path(__file__).resolve().parent.parent.parent)
    return [sys.executable, "-I", "-S", "-c", _CODE.format(path=package_parent, module=module)]


def _start_failure(driver: str, answer: dict[str, Any], runtime_dir: Path) -> LabkernelError:
    if driver == "rootless" and answer.get("errno") in (1, 28, 22):
        return DriverError(
            f"this machine does not let {driver} containers start: {answer['error']}",
            resolution="user namespaces are forbidden here; `labkernel doctor` tells why and what would help",
        )
    return RuntimeFailure(
        f"the supervisor did not start: {answer['error']}", details=f"see {runtime_dir}/supervisor.log"
    )
