"""exec: another process in a running container, with its own streams, user, environment and exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from ..errors import ConflictError, StartError
from ..linux import pty, syscalls
from . import entering, instances, keeper, monitors, proot, protocol
from .instances import Instance
from .loop import HIGH_BYTES, Connection
from .streams import PIPE_BYTES, InputPipe, lend, widen

_PATIENCE_S = 0.001


class Session:
    """One exec. Its output goes to its client only; a slow client holds back only this process (no log is kept)."""

    def __init__(self, sup: Any, inst: Instance, conn: Connection | None, message: dict[str, Any]) -> None:
        self.sup = sup
        self.inst = inst
        self.conn: Connection | None = conn
        self.detached = bool(message.get("detach"))
        self.tied = bool(message.get("tied"))
        self.process: dict[str, Any] = message["process"]
        self.terminal = bool(message.get("tty"))
        self.wants_stdin = bool(message.get("stdin"))
        self.outputs: dict[int, int] = {}
        self.master = -1
        self.input: InputPipe | None = None
        self.pid = 0
        self.pidfd = -1
        self.error: dict[str, Any] | None = None
        self.id = str(message.get("exec_id") or os.urandom(32).hex())
        self.sock: socket.socket | None = None
        self.command: syscalls.SharedNumber | None = None
        self.code: int | None = None
        # The answer that it has started: not yet sent, sent with what comes next, or after `_PATIENCE_S`.
        self.answer = b""
        self.is_held = False
        # For who is no client: output, and (exit code, error) at the end.
        self.on_output: Callable[[bytes], None] | None = None
        self.on_end: Callable[[int, str], None] | None = None

    def begin(self) -> None:
        try:
            self._enter()
        finally:
            # Only now: the child is at work meanwhile.
            words = " ".join(map(str, self.process.get("args") or []))
            for action in ("exec_create", "exec_start"):
                self.sup.events.add(f"{action}: {words}", self.inst.id, execID=self.id)

    def _enter(self) -> None:
        theirs = [] if self.terminal else self._pipes()
        if "monitor" in self.inst.own or "proot" in self.inst.own:
            helper, self.sock = self._fork_beside(theirs)
        else:
            request = entering.request_of(self.inst, self.process, terminal=self.terminal)
            helper, self.sock, self.command = self.sup.entrance.enter(request, [self.inst.door[1], *theirs])
        for fd in theirs:
            if fd != self.sup.null:
                os.close(fd)
        self.sup.loop.watch(self.sock.fileno(), lambda _events: self._hear(helper))

    def _fork_beside(self, theirs: list[int]) -> tuple[int, socket.socket]:
        """A helper for a container that is no set of namespaces: a virtual machine, or PRoot's."""
        ours, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid, _ = syscalls.clone(0, want_pidfd=False)
        if pid == 0:
            if "monitor" in self.inst.own:
                how = {"terminal": self.terminal, "stdin": self.wants_stdin}
                monitors.begin_session(child_end, self.inst, self.process, theirs, **how)
            proot.begin_session(child_end, self.inst, self.process, theirs, terminal=self.terminal)
        child_end.close()
        os.set_blocking(ours.fileno(), False)
        return pid, ours

    def _pipes(self) -> list[int]:
        theirs = [self.sup.null]
        if self.wants_stdin:
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(write, False)
            self.input = InputPipe(self.sup.loop, write, shared=False)
            theirs = [read]
        for stream in (protocol.STDOUT, protocol.STDERR):
            if self.detached:
                theirs.append(self.sup.null)
                continue
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read, False)
            widen(read)
            self.outputs[read] = stream
            theirs.append(write)
        return theirs

    def _hear(self, helper: int) -> None:
        assert self.sock is not None
        try:
            data, fds = protocol.receive(self.sock)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if data:
            message = json.loads(data)
            self.pid = int(message.get("pid") or self.pid)
            self.error = message if "error" in message else self.error
            for fd in fds:
                os.set_blocking(fd, False)
                self.master = fd
                self.outputs[fd] = protocol.STDOUT
                self.input = InputPipe(self.sup.loop, fd, shared=True)
            return
        moment = time.monotonic()
        self.sup.loop.unwatch(self.sock.fileno())
        self.sock.close()
        if self.command is not None:
            self.pid = self.command.value  # also when the helper was killed: nobody else would wait for our child
            self.command = None
        # Its memory goes with it, and that takes a while: much longer where its container may use little CPU.
        self.sup.put_off(lambda: _has_ended(helper))
        if self.error is not None or not self.pid:
            self._fail()
        else:
            self._started(moment)

    def _fail(self) -> None:
        why = self.error or {"error": "the exec process died while it was set up", "exit_code": 126}
        if self.pid:
            _reap(self.pid)
        # As docker: an exec that cannot be set up (no such user, no such directory) is 126, 125 is for `run`.
        code = int(why.get("exit_code", 126))
        error = StartError(str(why["error"]), exit_code=code)
        error.exit_code = 126 if code == 125 else code  # after the hint, which is for files that cannot be executed
        if self.conn is not None:
            self.conn.finish(protocol.encode_message(error.to_dict()))
        self._close()
        if self.on_end is not None:
            self.on_end(error.exit_code, error.brief)

    def _started(self, moment: float) -> None:
        self.pidfd = os.pidfd_open(self.pid)
        self.sup.sessions[self.pid] = self
        conn = self.conn
        self.answer = protocol.encode_message({"ok": True, "pid": self.pid, "exec_at": moment})
        if conn is not None and conn.open:
            conn.closed = self._client_left
            conn.frame = self._frame
            conn.drained = self._resume
        self.listen(conn)
        if conn is not None and not conn.open:
            self._client_left()
        if self.detached or conn is None:
            self._announce()
        else:
            # One that ends in this time needs no duplicates, and wakes its client once.
            self.sup.loop.later(_PATIENCE_S, self._announce)
        self.sup.loop.later(self.sup.refill_after_s, self.sup.refill_soon)

    def _announce(self) -> None:
        """Tell that it has started, unless it has been told; from then on it outlives this supervisor."""
        if not self.answer or self.code is not None:
            return
        self._hold()
        if self.detached and self.conn is not None:
            self.conn.finish(self._with_answer())
            self.conn = None
        elif self.conn is not None:
            self.conn.send(self._with_answer())
        self.answer = b""

    def _with_answer(self, data: bytes = b"") -> bytes:
        """`data`, and before it the answer, if that has not been sent."""
        answer, self.answer = self.answer, b""
        return answer + data

    def _hold(self) -> None:
        """The keeper's duplicates keep the process from SIGPIPE and SIGHUP when this supervisor dies."""
        if self.is_held:
            return
        entry = self.held()
        fds = entry["fds"]
        message = {"hold": self.key, "state": entry["state"], "names": list(fds)}
        self.sup.tell_keeper(message, list(fds.values()))

    def held(self) -> dict[str, Any]:
        """What the keeper holds of this session."""
        fds = {str(number): fd for number, fd in enumerate(self.outputs)}
        own = self.on_end is not None
        self.is_held = True
        return {"state": {"id": self.inst.id, "pid": self.pid, "terminal": self.terminal, "own": own}, "fds": fds}

    @property
    def key(self) -> str:
        return f"exec:{self.pid}"

    def listen(self, conn: Connection | None) -> None:
        for fd in self.outputs:
            handler = self._output_handler(fd)
            self.sup.loop.watch(fd, handler)
            if fd == self.master and self.input is not None:
                self.input.read_handler = handler
        if self.input is not None and conn is not None and conn.buffer and conn.open:
            conn._parse()
        self.sup.loop.watch(self.pidfd, lambda _events: self._ended())

    def _output_handler(self, fd: int) -> Any:
        def handle(events: int) -> None:
            if self.input is not None and self.input.shared:
                self.input.ready()
            self._pump(fd)

        return handle

    def _frame(self, stream: int, data: bytes) -> None:
        if stream == protocol.STDIN and self.input is not None:
            self.input.write(data, self.conn)
        elif stream == protocol.CONTROL:
            control = json.loads(data)
            self.tied = self.tied and not control.get("untie")
            if control.get("close_stdin") and self.input is not None:
                self.input.half_close()
            if control.get("lend_stdin") and self.conn is not None:
                lend(self.input, self.conn)
            if control.get("resize") and self.master >= 0:
                pty.resize(self.master, *control["resize"])

    def _pump(self, fd: int) -> bool:
        try:
            data = os.read(fd, PIPE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.sup.loop.unwatch(fd)
            if fd != self.master:
                del self.outputs[fd]
                os.close(fd)
            return False
        if self.on_output is not None:
            self.on_output(data)
        if self.conn is not None:
            if self.code is None:
                self._hold()  # as with every answer
            self.conn.send(self._with_answer(protocol.encode_frame(self.outputs[fd], data)))
            if self.conn is not None and self.conn.pending > HIGH_BYTES and self.code is None:
                self.sup.loop.unwatch(fd)
        return True

    def _resume(self) -> None:
        for fd in self.outputs:
            self.sup.loop.watch(fd, self._output_handler(fd))

    def _client_left(self) -> None:
        # As docker: the process goes on, its output is thrown away; unless its owner, which was to live longer, died.
        self.conn = None
        if self.code is None:
            if self.tied:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self._resume()

    def _ended(self) -> None:
        try:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self.finish(code if code >= 0 else 128 - code)
        except ChildProcessError:
            self.sup.loop.unwatch(self.pidfd)
            known = self.sup.context.exits.get(self.pid)
            if known is None:
                known = keeper.exit_code_of_stranger(self.pidfd)
            if known is not None:
                self.finish(known)
            else:
                self.sup.orphans[self.pid] = self.finish

    def finish(self, code: int) -> None:
        self.code = code
        self.sup.events.add("exec_die", self.inst.id, execID=self.id, exitCode=str(code))
        for fd in list(self.outputs):
            while self._pump(fd):
                pass
        if self.conn is not None:
            end = {"exit_code": code, "oom_killed": False, "error": ""}
            self.conn.finish(self._with_answer(protocol.encode_control({"exited": end})))
        self._close()
        self.sup.refill_soon()
        if self.on_end is not None:
            self.on_end(code, "")

    def _close(self) -> None:
        for fd in self.outputs:
            self.sup.loop.unwatch(fd)
            os.close(fd)
        self.outputs = {}
        if self.input is not None:
            self.input.close()
        if self.pidfd >= 0:
            if self.is_held:
                self.sup.tell_keeper({"drop": self.key})
            self.sup.context.held.pop(self.key, None)
            self.sup.loop.unwatch(self.pidfd)
            os.close(self.pidfd)
        self.sup.sessions.pop(self.pid, None)
        self.sup.context.spent.pop(self.pid, None)
        if self.sup.context.exits.pop(self.pid, None) is not None:
            self.sup.tell_keeper({"forget": self.pid})


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def begin(sup: Any, conn: Connection, message: dict[str, Any], _fds: list[int]) -> None:
    """Handle an exec request; the answer comes at the exec."""
    inst = sup.require_running(message["id"])
    if inst.status == "paused":
        raise ConflictError(f"container {inst.id[:12]} is paused, unpause the container before exec")
    if inst.setup is not None:
        raise ConflictError(f"container {inst.id[:12]} is not running")
    Session(sup, inst, conn, message).begin()


def adopt(sup: Any, entry: dict[str, Any]) -> None:
    """Take over an exec of a killed supervisor: its client has gone, so its output is drained and dropped."""
    state = entry["state"]
    session = Session(sup, instances.stub(state["id"]), None, {"process": {}, "tty": state["terminal"]})
    session.pid = int(state["pid"])
    session.outputs = dict.fromkeys(entry["fds"].values(), protocol.STDOUT)
    for fd in session.outputs:
        os.set_blocking(fd, False)
        session.master = fd if session.terminal else -1
    try:
        session.pidfd = os.pidfd_open(session.pid)
    except OSError:
        session.pidfd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        session.finish(255)
        return
    sup.sessions[session.pid] = session
    session.listen(None)
    if state.get("own"):
        # A health check of the killed supervisor: nobody watches its deadline any more.
        os.kill(session.pid, signal.SIGKILL)


__all__ = ["Session", "begin", "signal"]
