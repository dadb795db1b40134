"""The supervisor: one event loop that starts containers, reads their output, waits, and answers clients.

One per store, single-threaded, a child of the keeper. What a request may ask is in `requests`; here is the life of a
container: start, exec moment, output, end, removal. Rule of the house: answer first, tidy up in the next idle moment
(`Loop.idle`). Nothing here blocks on a client. Standard library only.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from ..errors import ConflictError, LabkernelError, RuntimeFailure, StartError, file_of
from ..linux import cgroups, namespaces, syscalls
from . import denials, health, instances, keeper, networking, owners, protocol, restarts, takeover
from .entering import Entrance
from .eventlog import EventLog
from .instances import Instance
from .keeper import Context
from .leaving import check_idle
from .logs import Journal
from .loop import IN, OUT, Connection, Loop
from .pool import Pool, Warm, dismiss, profile_of
from .recovery import recover, write_parents
from .removal import remove_tree
from .requests import HANDLERS
from .rootfs import make_skeleton, open_shared
from .streams import Follower, InputPipe
from .succession import descriptors, watch_keeper
from .usage import oom_count, usage_at_end

_POOL_SIZE = 2
_ENDED_EARLY = {"error": "it was ended while it started", "exit_code": 137}


def freeze() -> None:
    """Take everything imported so far out of the garbage collector: forks then share those pages."""
    gc.collect()
    gc.freeze()


def main(context: Context) -> None:
    """Body of a supervisor process; returns when it left in peace."""
    Supervisor(context).run()


class Supervisor:
    """All containers of one store. `instances` holds those that run or are waited for; others live on disk only."""

    refill_after_s = 0.03

    def __init__(self, context: Context) -> None:
        syscalls.set_name(b"labkernel-super")
        self.context = context
        self.settings = context.settings
        self.root: str = context.settings["root"]
        self.runtime_dir: str = context.settings["runtime_dir"]
        self.loop = Loop()
        self.journal = Journal(context.scratch, context.mark)
        self.events = EventLog(self.root)
        self.instances: dict[str, Instance] = {}
        self.sessions: dict[int, Any] = {}
        self.orphans: dict[int, Callable[[int], None]] = {}
        self.exited: dict[str, dict[str, Any]] = {}
        self.chores: list[Callable[[], bool | None]] = []
        self.started_at = time.time()
        self.idle_since = time.monotonic()
        self.uid = os.getuid()
        self.worker: Any = None
        self.switch: Any = None
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.hierarchy = cgroups.detect()
        stage = f"{self.runtime_dir}/stage"
        os.makedirs(stage, 0o700, exist_ok=True)
        single = self.settings["driver"] == "rootless" and namespaces.is_single_id()
        skeleton = make_skeleton(self.root, single_id=single)
        self.pool = Pool(stage, self.hierarchy, size=_POOL_SIZE, single_id=single, skeleton=skeleton)
        self.entrance = Entrance()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def run(self) -> None:
        recover(self)
        self.loop.watch(self.context.listener.fileno(), self._accept)
        watch_keeper(self)
        self.loop.later(5.0, lambda: self.tell_keeper({"steady": True}))
        self.loop.later(min(self.settings["idle_exit_s"], 5.0), lambda: check_idle(self))
        self.loop.run()

    # Clients

    def _accept(self, _events: int) -> None:
        for _ in range(16):
            try:
                sock, _ = self.context.listener.accept()
            except OSError:
                return
            os.set_blocking(sock.fileno(), False)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[1] != self.uid:
                sock.close()
                continue
            Connection(self.loop, sock, self._request).look()

    def _request(self, conn: Connection, message: Any, fds: list[int]) -> None:
        self.idle_since = time.monotonic()
        try:
            handler = HANDLERS.get(message.get("op"))
            if takeover.is_due(self, message):
                for fd in fds:
                    os.close(fd)
                conn.finish(protocol.encode_message({"ok": True, "upgrade": True}))
                return
            if handler is None:
                raise RuntimeFailure(f"the supervisor does not know the request {message.get('op')!r}")
            handler(self, conn, message, fds)
        except LabkernelError as err:
            conn.finish(protocol.encode_message(err.to_dict()))
        except OSError as err:
            failure = RuntimeFailure(f"{message.get('op')}: {file_of(err)} {err.strerror}".replace("  ", " "))
            conn.finish(protocol.encode_message(failure.to_dict()))
        except Exception as err:
            failure = RuntimeFailure(f"{message.get('op')}: {type(err).__name__}: {err}")
            conn.finish(protocol.encode_message(failure.to_dict()))
            raise

    def find(self, container_id: str) -> Instance:
        """The container, from memory or from disk. Raises NoSuchContainer."""
        return self.instances.get(container_id) or instances.load(self.root, container_id)

    def require_running(self, container_id: str) -> Instance:
        inst = self.instances.get(container_id)
        if inst is None or not inst.running:
            self.find(container_id)
            raise ConflictError(f"container {container_id[:12]} is not running")
        return inst

    # Start

    def start(self, inst: Instance) -> None:
        """Begin a start; `starters` are answered at the exec. Raises ConflictError, StartError."""
        if inst.running:
            raise ConflictError(f"container {inst.id[:12]} is already running")
        if inst.leaving:
            raise ConflictError(f"container {inst.id[:12]} is being removed")
        self.instances[inst.id] = inst
        inst.stopping = False
        inst.open_log()
        profile = profile_of(inst.config)
        join = self._shared(inst)
        if join:
            profile["join"] = join
        try:
            self.note_parent(profile["cgroup_parent"])  # before there is a group below it
            warm = self.pool.take(profile)
            inst.cgroup = warm.cgroup
            inst.pidfd = warm.pidfd
            # A container runs when the socket closes at its exec; a monitor says it, else it died before.
            inst.setup, inst.setup_error = warm, _ENDED_EARLY if profile.get("monitor") else None
            self._limit(inst)
            network = networking.attach(self, inst, warm.pid)
            shared = open_shared(inst.config)
            theirs = self._make_streams(inst)
        except (OSError, LabkernelError) as err:
            self._abandon(inst)
            if isinstance(err, LabkernelError):
                raise
            where = f": {file_of(err)}" if file_of(err) else ""
            raise StartError(f"cannot start the container{where}: {err.strerror or err}", exit_code=125) from err
        self._remember(inst, warm)
        config = f"{inst.directory}/config.json"
        request = {"config": config, "dir": inst.directory, "network": network, "shared": list(shared)}
        try:
            protocol.send_with_fds(warm.sock, protocol.dumps(request), [*theirs, *shared.values()])
        except OSError:
            pass  # it has failed already, and its socket says why
        for fd in (*theirs, *shared.values()):
            if fd != self.null:
                os.close(fd)
        self.loop.watch(warm.sock.fileno(), lambda _events: self._hear_setup(inst, warm))

    def _shared(self, inst: Instance) -> dict[str, int]:
        """Namespaces of other containers that it is to be in: name -> pidfd of a process there."""
        found: dict[str, int] = {}
        for space in (inst.config.get("linux") or {}).get("namespaces") or ():
            _, container, other_id = str(space.get("path") or "").partition("container:")
            if not container:
                continue
            other = self.instances.get(other_id)
            if other is None or not other.running or other.pidfd < 0 or other is inst:
                self.forget(inst)
                raise StartError(
                    f"cannot join {space['type']} namespace of a non running container: {other_id[:12]}", exit_code=125
                )
            found[space["type"]] = other.door[1]
        return found

    def _limit(self, inst: Instance) -> None:
        resources = (inst.config.get("linux") or {}).get("resources") or {}
        if inst.cgroup is None or not resources:
            return
        inst.cgroup.limit(resources)
        inst.warnings = [f"{name} is not enforced: {reason}" for name, reason in inst.cgroup.unenforced]

    def _make_streams(self, inst: Instance) -> list[int]:
        """Pipes for stdin, stdout, stderr: ours go to `inst`, the container's ends are returned (none for a pty)."""
        if inst.terminal:
            return []
        theirs = [self.null]
        if inst.own.get("stdin_open"):
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(write, False)
            inst.input = InputPipe(self.loop, write, shared=False)
            theirs = [read]
        for stream in ("stdout", "stderr"):
            read, write = os.pipe2(os.O_CLOEXEC)
            inst.outputs[read] = stream
            theirs.append(write)
        return theirs

    def _remember(self, inst: Instance, warm: Warm) -> None:
        state = inst.state
        started = warm.started or instances.process_start(warm.pid)
        inst.save_starting(warm.pid, started)
        for key in ("usage", "failed_step", "denied"):
            state.pop(key, None)
        state.update(
            status="created",
            pid=warm.pid,
            pid_start=started,
            exit_code=0,
            oom_killed=False,
            error="",
            finished_at=0.0,
        )
        paths = warm.cgroup.paths if warm.cgroup is not None else {}
        state["cgroup"] = {"version": self.hierarchy.version if paths else 0, "paths": paths}
        self.hold(inst)

    def hold(self, inst: Instance) -> None:
        """Give the keeper duplicates of the container's descriptors, and what a new supervisor must know."""
        fds = descriptors(inst)
        self.context.held[inst.id] = {"state": dict(inst.state), "fds": fds}
        self.tell_keeper({"hold": inst.id, "state": inst.state, "names": list(fds)}, list(fds.values()))

    def _hear_setup(self, inst: Instance, warm: Warm) -> None:
        try:
            data, fds = protocol.receive(warm.sock)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if data:
            message = json.loads(data)
            if "notes" in message:
                notes = message["notes"]
                inst.state["mount_points"] = notes.get("created") or []
                inst.warnings += notes.get("warnings") or []
                for fd in fds:
                    self._adopt_master(inst, fd)
            elif "alone" in message:
                inst.state["alone"] = message["alone"]
                if inst.own.get("owners"):
                    owners.note_user(str(inst.directory), *message["alone"])
            elif "resolver" in message:
                networking.take_sockets(self, inst, fds)
            elif "listener" in message:
                (owners if message.get("of") == "owners" else denials).take(self, inst, message, fds)
            else:
                inst.setup_error = None if "runs" in message else message
            return
        moment = time.monotonic()
        self.loop.unwatch(warm.sock.fileno())
        warm.sock.close()
        inst.setup = None
        if inst.setup_error is not None:
            self._start_failed(inst, inst.setup_error)
        else:
            self._started(inst, moment)

    def _adopt_master(self, inst: Instance, fd: int) -> None:
        os.set_blocking(fd, False)
        inst.master = fd
        inst.outputs[fd] = "stdout"
        inst.input = InputPipe(self.loop, fd, shared=True)
        self.hold(inst)

    def _started(self, inst: Instance, moment: float) -> None:
        now = time.time()
        inst.state.update(status="running", started_at=now, exec_at_monotonic=moment)
        answer = {"ok": True, "pid": inst.pid, "exec_at": moment, "started_at": now, "warnings": inst.warnings}
        for conn in inst.starters:
            if any(follower.conn is conn for follower in inst.followers):
                conn.send(protocol.encode_message(answer))
            else:
                conn.finish(protocol.encode_message(answer))
        inst.starters = []
        self.watch_streams(inst)
        health.begin(self, inst)
        inst.try_save()
        self.events.add("start", inst.id)
        # Not at once: making a child takes a millisecond that a short command's end would wait for.
        self.loop.later(self.refill_after_s, self.refill_soon)

    def watch_streams(self, inst: Instance) -> None:
        """Listen to output, stdin room and the end."""
        for fd, stream in inst.outputs.items():
            handler = self._output_handler(inst, fd, stream)
            self.loop.watch(fd, handler)
            if fd == inst.master and inst.input is not None:
                inst.input.read_handler = handler
        if inst.input is not None:
            # The keeper has a duplicate; the container sees the end of its input only when that goes too.
            inst.input.on_close = lambda: self.tell_keeper({"release": inst.id, "name": "stdin"})
            inst.input.ready()
        inst.early.replay()
        self.loop.watch(inst.pidfd, lambda _events: self._ended(inst))

    def _start_failed(self, inst: Instance, why: dict[str, Any]) -> None:
        code = int(why.get("exit_code", 125))
        inst.state["failed_step"] = why.get("step") or ""
        error = StartError(str(why.get("error", "the container's first process died")), exit_code=code)
        starters, inst.starters = inst.starters, []
        self._wait_for(inst.pidfd, inst.pid)
        inst.state.update(status="created" if not inst.state["started_at"] else "exited", pid=0, exit_code=code)
        inst.state.update(error=error.brief, finished_at=time.time())
        inst.try_save()
        for conn in starters:
            conn.finish(protocol.encode_message(error.to_dict()))
        self._conclude(inst)

    def _abandon(self, inst: Instance) -> None:
        """A start that failed before its child was told anything."""
        if inst.setup is not None:
            dismiss(inst.setup)
        inst.setup, inst.pidfd, inst.cgroup = None, -1, None
        networking.detach(self, inst)
        self._close_streams(inst)
        self.forget(inst)

    @staticmethod
    def _wait_for(pidfd: int, pid: int) -> int | None:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        except (ProcessLookupError, ChildProcessError):
            return None

    # Output

    def _output_handler(self, inst: Instance, fd: int, stream: str) -> Callable[[int], None]:
        def handle(events: int) -> None:
            if events & OUT and inst.input is not None:
                inst.input.ready()
            if events & ~OUT:
                self.pump(inst, fd, stream)

        return handle

    def pump(self, inst: Instance, fd: int, stream: str) -> bool:
        """Move one chunk of output to the log and the followers; False when there is nothing now or any more."""
        log = inst.open_log()
        data = self.journal.move(fd, log, inst.id, stream)
        if data is None:
            return False
        if not data:
            self.loop.unwatch(fd)
            if fd != inst.master:
                inst.outputs.pop(fd, None)
                os.close(fd)
            return False
        for follower in inst.followers:
            follower.deliver(stream, data, log.start)
        return True

    # End

    def _ended(self, inst: Instance) -> None:
        """The pidfd became readable: find the exit code, whoever is the parent."""
        try:
            info = os.waitid(os.P_PIDFD, inst.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._ended_elsewhere(inst)
            return
        if info is not None:
            code = info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status
            self.finish(inst, code, own_child=True)

    def _ended_elsewhere(self, inst: Instance) -> None:
        self.loop.unwatch(inst.pidfd)
        pid = inst.pid
        code = self.context.exits.get(pid)
        if code is None:
            code = keeper.exit_code_of_stranger(inst.pidfd)
        if code is not None or inst.orphan_tries >= 20:
            if code is None:
                inst.state["error"] = "the exit status was lost: supervisor and keeper were both killed"
            self.finish(inst, 255 if code is None else code, own_child=False)
            return
        inst.orphan_tries += 1
        self.orphans[pid] = lambda code: self.finish(inst, code, own_child=False)
        self.loop.later(0.1, lambda: self._ended_elsewhere(inst) if inst.pid == pid and inst.pidfd >= 0 else None)

    def finish(self, inst: Instance, code: int, *, own_child: bool) -> None:
        """The first process has ended: drain, record, reap, answer; then put the rest off."""
        if inst.pidfd < 0:
            return
        pid = inst.pid
        self.orphans.pop(pid, None)
        self.loop.unwatch(inst.pidfd)
        health.end(inst)
        denials.end(inst)
        owners.end(inst)
        inst.kill_rest()
        for fd, stream in list(inst.outputs.items()):
            while self.pump(inst, fd, stream):
                pass
        state = inst.state
        if inst.cgroup is not None:
            state["oom_killed"] = oom_count(inst.cgroup) > 0
        state["usage"] = usage_at_end(inst.cgroup, pid, self.context.spent)
        state.update(status="exited", pid=0, exit_code=code, finished_at=time.time())
        if restarts.is_due(inst):
            state["status"] = "restarting"  # at once, lest a kill of this process between two writes forget it
        if not inst.auto_remove:
            # Before anybody is told: a build takes the upper directory as its layer.
            inst.clean_mount_points()
            inst.try_save()
        if state["oom_killed"]:
            self.events.add("oom", inst.id)
        lasted = str(max(0, int(state["finished_at"] - (state["started_at"] or state["finished_at"]))))
        self.events.add("die", inst.id, exitCode=str(code), execDuration=lasted)
        # One that removes itself has no record worth a write: until its answer is out its zombie keeps the exit code.
        if not inst.auto_remove:
            self._let_go(pid, own_child=own_child)
        self._conclude(inst)
        if inst.auto_remove:
            self._let_go(pid, own_child=own_child)

    def _let_go(self, pid: int, *, own_child: bool) -> None:
        if own_child:
            os.waitpid(pid, 0)
        else:
            self.context.exits.pop(pid, None)
            self.tell_keeper({"forget": pid})

    def _conclude(self, inst: Instance) -> None:
        """Answer everybody who waits, then put removal and tidying off."""
        if inst.kill_timer is not None:
            inst.kill_timer.cancel()
        networking.detach(self, inst)
        end = inst.end_state()
        self.exited[inst.id] = end
        while len(self.exited) > 256:
            del self.exited[next(iter(self.exited))]
        for conn in inst.starters + inst.enders:
            conn.finish(protocol.encode_message({"ok": True, **end}))
        if inst.asked_to_stop:
            self.events.add("stop", inst.id)
            inst.asked_to_stop = False
        inst.starters, inst.enders = [], []
        restarting = restarts.plan(self, inst)
        # From here on nobody may load it from disk again and wait at a second object.
        inst.leaving = inst.auto_remove and not restarting
        staying = []
        for conn, condition in list(inst.waiters):  # finishing one takes it out of the list
            if condition == "removed" or (restarting and condition == "not-running"):
                staying.append((conn, condition))
            else:
                conn.finish(protocol.encode_message({"ok": True, **end}))
        inst.waiters = staying
        if not restarting:
            followers, inst.followers = inst.followers, []
            for follower in followers:
                follower.finish(protocol.encode_control({"exited": end}))
        self._close_streams(inst)
        self.tell_keeper({"drop": inst.id})
        self.context.held.pop(inst.id, None)
        cgroup, inst.cgroup = inst.cgroup, None
        inst.close_pidfds()
        if self.pool.waiting:
            # The next start need not wait for the work of a refill, if it comes at once.
            self.loop.later(self.refill_after_s, self.refill_soon)
        else:
            self.refill_soon()
        if cgroup is not None:
            self.put_off(lambda: cgroup.remove(timeout_s=0.0))
        self.put_off(lambda: self._tidy(inst, restarting=restarting))

    def _tidy(self, inst: Instance, *, restarting: bool) -> None:
        self.idle_since = time.monotonic()
        if restarting:
            return
        if inst.auto_remove:
            self.remove(inst)
        elif not inst.running:
            self.forget(inst)

    def _close_streams(self, inst: Instance) -> None:
        for fd in inst.outputs:
            self.loop.unwatch(fd)
            os.close(fd)
        inst.outputs = {}
        inst.master = -1
        if inst.input is not None:
            inst.input.close()
            inst.input = None

    def remove(self, inst: Instance, then: Callable[[str | None], None] | None = None) -> None:
        """Delete a container's directory, in a child when it is large; then answer the waiters for "removed"."""

        def done(error: str | None) -> None:
            for conn, _ in list(inst.waiters):
                conn.finish(protocol.encode_message({"ok": True, **inst.end_state()}))
            inst.waiters = []
            inst.leaving = False
            if error is None:
                self.events.add("destroy", inst.id)
            self.forget(inst)
            if then is not None:
                then(error)

        inst.leaving = True
        remove_tree(self, inst.directory, done)

    def forget(self, inst: Instance) -> None:
        """Drop a container from memory when nobody needs it there."""
        if inst.running or inst.leaving or inst.waiters or inst.followers or inst.restart_timer is not None:
            return
        if self.instances.get(inst.id) is inst:
            del self.instances[inst.id]
        if inst.log is not None:
            inst.log.close()
            inst.log = None

    def detach(self, inst: Instance, follower: Follower) -> None:
        """A client has gone."""
        if follower in inst.followers:
            inst.followers.remove(follower)
        follower.close()
        self.forget(inst)

    # Idle time

    def put_off(self, chore: Callable[[], bool | None]) -> None:
        """Do `chore` when nothing else is to do; one that returns False is tried again a little later."""
        self.chores.append(chore)
        self.loop.idle = self._idle_moment

    def _idle_moment(self) -> None:
        chore = self.chores.pop(0)
        try:
            if chore() is False:
                self.loop.later(0.02, lambda: self.put_off(chore))
        finally:
            if self.chores:
                self.loop.idle = self._idle_moment

    def refill_soon(self) -> None:
        """Make the children that later starts and execs take, in the next idle moment."""
        if self._refill not in self.chores:
            self.put_off(self._refill)

    def _refill(self) -> None:
        try:
            more = self.pool.refill() or self.entrance.refill()
        except OSError:
            return  # no room for spare children; the next start says why if it cannot have one either
        for warm in self.pool.waiting:
            warm.started = warm.started or instances.process_start(warm.pid)
        if more:
            self.refill_soon()

    def note_parent(self, parent: str) -> None:
        """Groups may be below `parent` from now on: for who tidies up, also when the keeper is killed, too."""
        if parent and parent not in self.context.parents:
            self.context.parents.add(parent)
            write_parents(self.runtime_dir, self.context.parents)
            self.tell_keeper({"parent": parent})

    # The keeper

    def tell_keeper(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        assert self.context.link is not None
        try:
            protocol.send_with_fds(self.context.link, protocol.dumps(message), fds or [])
        except OSError:
            pass  # it was killed; `_hear_keeper` sees that next


__all__ = ["IN", "Supervisor", "freeze", "main"]
