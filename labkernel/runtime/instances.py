"""One container as the supervisor sees it: its files, its process, its streams and who waits for it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from typing import Any

from ..errors import NoSuchContainer, RuntimeFailure
from ..linux.cgroups import Cgroup
from ..linux.files import read_file
from . import proot, prootmonitor
from .logs import LogWriter
from .loop import Connection, Timer
from .pool import Warm
from .rootfs import forget_volatile
from .streams import EarlyInput, Follower, InputPipe


class Instance:
    """`state` is what state.json holds (see `new_state`); `status` words are docker's."""

    def __init__(self, container_id: str, directory: str, config: dict[str, Any], state: dict[str, Any]) -> None:
        self.id = container_id
        self.directory = directory
        self.config = config
        self.own: dict[str, Any] = config.get("labkernel") or {}
        self.state = state
        self.pidfd = -1
        self._inner: tuple[int, int] | None = None  # with --init, the command's process and its pidfd
        self.outputs: dict[int, str] = {}
        self.master = -1
        self.input: InputPipe | None = None
        self.early = EarlyInput()
        self.log: LogWriter | None = None
        self.cgroup: Cgroup | None = None
        self.setup: Warm | None = None
        self.setup_error: dict[str, Any] | None = None
        self.followers: list[Follower] = []
        self.starters: list[Connection] = []
        self.waiters: list[tuple[Connection, str]] = []
        self.enders: list[Connection] = []
        self.kill_timer: Timer | None = None
        self.restart_timer: Timer | None = None
        self.denials: Any = None  # its denials.Listener, where they are counted
        self.owners: Any = None  # its owners.Listener, where a step's owners are recorded
        self.health: Any = None  # its health.Monitor while it runs and has one
        self.asked_to_stop = False
        self.leaving = False  # its directory is being deleted, or will be in the next idle moment
        self.warnings: list[str] = []
        self.orphan_tries = 0

    @property
    def status(self) -> str:
        return str(self.state["status"])

    @property
    def running(self) -> bool:
        return self.status in ("running", "paused") or self.setup is not None

    @property
    def pid(self) -> int:
        return int(self.state.get("pid") or 0)

    @property
    def door(self) -> tuple[int, int]:
        """A process by which the container can be entered, and its pidfd. With --init the first process is this
        program, which nobody without privileges over the machine may look into, be it its own user: then its child,
        the command. Sources: man 2 setns, man 2 ptrace (access mode checking), PR_SET_DUMPABLE."""
        if self._inner is None and self.own.get("init"):
            for pid in prootmonitor.children(self.pid):
                try:
                    pidfd = os.pidfd_open(pid)
                except OSError:
                    continue
                if pid in prootmonitor.children(self.pid):  # and not somebody else of that number
                    self._inner = pid, pidfd
                    break
                os.close(pidfd)
        return self._inner or (self.pid, self.pidfd)

    def close_pidfds(self) -> None:
        """It has ended, and has been waited for."""
        for pidfd in (self.pidfd, self._inner[1] if self._inner else -1):
            if pidfd >= 0:
                os.close(pidfd)
        self.pidfd, self._inner = -1, None

    @property
    def awaits_input(self) -> bool:
        """Whether it will take input once it has been started (again)."""
        if self.early.frames:
            return True  # nothing may overtake what came before
        # Also where the pipe is there already: its end is told to the keeper only from the start on.
        starts = self.setup is not None or self.status not in ("running", "paused")
        return starts and (self.terminal or bool(self.own.get("stdin_open")))

    @property
    def terminal(self) -> bool:
        return bool(self.config["process"].get("terminal"))

    @property
    def stopping(self) -> bool:
        """Somebody asked for its end, so no policy starts it again. Part of the state: a supervisor that takes over
        in the middle of a stop has to know."""
        return bool(self.state.get("stopping"))

    @stopping.setter
    def stopping(self, value: bool) -> None:
        before = self.stopping
        self.state["stopping"] = value
        if value != before and self.running and (self.own.get("restart") or {}).get("name", "no") != "no":
            self.try_save()

    @property
    def auto_remove(self) -> bool:
        return bool(self.own.get("auto_remove"))

    def open_log(self) -> LogWriter:
        if self.log is None:
            self.log = LogWriter.from_settings(self.own.get("log") or {}, f"{self.directory}/log.json")
        return self.log

    def save(self) -> None:
        """Write state.json atomically; on a full disk in place, where the old one's block is."""
        path = f"{self.directory}/state.json"
        temporary = f"{path}.{os.getpid()}"
        data = json.dumps(self.state).encode()
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except OSError as err:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if err.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Else a container that has ended would still be called running.
            self._save_in_place(path, data)

    def _save_in_place(self, path: str, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data.ljust(os.fstat(fd).st_size), 0)
        finally:
            os.close(fd)

    def try_save(self) -> None:
        """`save`, where a full disk or a removed directory must not stop what comes next."""
        try:
            self.save()
        except OSError as err:
            self.state["error"] = self.state.get("error") or f"state.json: {err.strerror}"

    def save_starting(self, pid: int, pid_start: int) -> None:
        """Write down which process is about to become this container, beside what the container was before: it may
        get to its exec with nobody left who has started it."""
        self.state["starting"] = [pid, pid_start]
        self.try_save()
        del self.state["starting"]

    def signal(self, number: int) -> None:
        """Signal the first process. Raises RuntimeFailure; a process that has just ended is no error."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass
        except OSError as err:
            raise RuntimeFailure(f"cannot send signal {number}: {err.strerror}") from err

    def kill_all(self) -> None:
        """SIGKILL to the first process (its pid namespace dies with it) and, without one, to the whole cgroup."""
        if "proot" in self.own:
            proot.kill_all(self)
            return
        if self.pidfd >= 0:
            self.signal(signal.SIGKILL)
        self.kill_rest()

    def kill_rest(self) -> None:
        """SIGKILL to what the end of the first process does not end: processes of a shared pid namespace, frozen
        ones."""
        if "proot" in self.own:
            proot.kill_rest(self)
            return
        all_spaces = (self.config.get("linux") or {}).get("namespaces") or ()
        spaces = {space["type"] for space in all_spaces if not space.get("path")}
        if self.cgroup is not None and ("pid" not in spaces or self.status == "paused"):
            self.cgroup.kill()
            self.cgroup.thaw()

    def end_state(self) -> dict[str, Any]:
        """What waiters are told."""
        state = self.state
        return {
            "exit_code": state.get("exit_code") or 0,
            "oom_killed": bool(state.get("oom_killed")),
            "error": state.get("error") or "",
            "usage": state.get("usage") or {},
        }

    def clean_mount_points(self) -> None:
        """Remove mount points the start had to make in the image, where they are still empty in the upper directory:
        they are ours and not part of what the container did."""
        rootfs = self.own.get("rootfs") or {}
        upper = rootfs.get("upper")
        if not upper:
            return
        # Made by the kernel with mode 0: a plain user could not delete the store.
        forget_volatile(rootfs.get("work"))
        for path in reversed(self.state.pop("mount_points", None) or []):
            name = upper + path
            try:
                if os.path.isdir(name) and not os.path.islink(name):
                    os.rmdir(name)
                elif os.lstat(name).st_size == 0 and not os.path.islink(name):
                    os.unlink(name)
            except OSError as err:
                if err.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise


def new_state(container_id: str) -> dict[str, Any]:
    """The state of a container that was never started."""
    return {
        "id": container_id,
        "status": "created",
        "pid": 0,
        "pid_start": 0,
        "created_at": time.time(),
        "started_at": 0.0,
        "finished_at": 0.0,
        "exec_at_monotonic": 0.0,
        "exit_code": 0,
        "oom_killed": False,
        "error": "",
        "cgroup": {"version": 0, "paths": {}},
        "restart_count": 0,
    }


def stub(container_id: str) -> Instance:
    """A container of which only the id matters."""
    return Instance(container_id, "", {"process": {}}, new_state(container_id))


# Where containers and virtual machines have their directories, below the root of the store.
PLACES = ("containers", "vm/machines")


def directory_of(root: str, container_id: str) -> str:
    """The directory of a container or a machine; the container's where there is neither."""
    machine = f"{root}/vm/machines/{container_id}"
    return machine if os.path.isdir(machine) else f"{root}/containers/{container_id}"


def load(root: str, container_id: str) -> Instance:
    """Read a container's files. Raises NoSuchContainer."""
    if not container_id or "/" in container_id or container_id.startswith("."):
        raise NoSuchContainer(container_id)
    directory = directory_of(root, container_id)
    try:
        config = json.loads(read_file(f"{directory}/config.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise NoSuchContainer(container_id) from None
    except ValueError as err:
        raise RuntimeFailure(f"config.json of {container_id[:12]} is broken: {err}") from err
    return Instance(container_id, directory, config, read_state(directory) or new_state(container_id))


def read_state(directory: str) -> dict[str, Any] | None:
    """state.json, or None."""
    try:
        state = json.loads(read_file(f"{directory}/state.json"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "status" in state else None


def is_alive(state: dict[str, Any]) -> bool:
    """Whether the process of the state file is still that process (man 5 proc, starttime)."""
    try:
        fields = read_file(f"/proc/{state['pid']}/stat").rpartition(b")")[2].split()
    except (OSError, KeyError):
        return False
    started = state.get("pid_start")
    return not started or int(fields[19]) == int(started)


def left_running(root: str) -> list[int]:
    """First processes of containers that run, or were about to, as the state files say, and their children."""
    found = []
    for place in PLACES:
        try:
            names = os.listdir(f"{root}/{place}")
        except OSError:
            continue
        for name in names:
            state = read_state(f"{root}/{place}/{name}") or {}
            pid, started = state.get("starting") or (state.get("pid"), state.get("pid_start"))
            if pid and started and process_start(pid) == started:
                found += [int(pid), *prootmonitor.children(int(pid))]  # `Instance.door`
    return found


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot (man 5 proc_pid_stat, field 22); 0 when there is none."""
    try:
        return int(read_file(f"/proc/{pid}/stat").rsplit(b")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
