"""The driver proot: a container without namespaces and mounts, by a program that translates paths (PRoot, ptrace).

What a container is given here: its own root file system (a copy), volumes as binds, a /dev of its own, a user that
looks like root, rlimits. What it is not given is in `prootprogram.warnings`. Where the kernel has Landlock, everything
outside of the container's own directories is closed to it by the kernel; PRoot alone translates paths and protects from
nothing.

System calls that PRoot 5.1 does not know would reach this machine's own paths, so they answer ENOSYS, and programs fall
back to the older ones. Source: proot(1); man 7 landlock. Standard library only: it is forked for every container.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
from functools import partial
from typing import Any

from ..errors import file_of
from ..linux import elf, landlock, pty, seccomp, syscalls
from ..linux.mounts import ensure_in_root, is_directory, open_in_root
from ..linux.syscalls import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, prctl
from . import accounts, init, owners, prootmonitor, protocol
from .rootfs import DEVICES, LINKS, network_files

SHIM_NAME = ".labkernel-init"
DEFAULT_SHM = "shm"

# With -q PRoot shows the whole machine here, to reach its emulator; a directory with nothing else in it goes over that.
_MACHINE = "/host-rootfs"
_DEVICE_NAMES = (*(name for name, _ in DEVICES), "tty")
# statx execveat io_uring_setup clone3 openat2 faccessat2 fchmodat2 and, from 463 on, xattrs and attributes by *at:
# not known to PRoot 5.1, which would let them pass untranslated. Numbers of x86-64.
_UNKNOWN_CALLS = (332, 322, 425, 435, 437, 439, 452, 428, 429, 442, 463, 464, 465, 466, 467, 468, 469)
_WRITABLE = landlock.ALL
_DEVICE = landlock.READ_FILE | landlock.WRITE_FILE | 1 << 15


class Place:
    """A file or directory of this machine that a container sees at `target`."""

    __slots__ = ("own", "rights", "source", "target")

    def __init__(self, source: str, target: str, rights: int, *, own: bool = False) -> None:
        self.source = source
        self.target = target
        self.rights = rights
        self.own = own  # made by us for this container


def places(config: dict[str, Any], directory: str) -> list[Place]:
    """What is bound into the container, parents before what lies in them."""
    found = [
        Place("/proc", "/proc", landlock.READ | landlock.WRITE_FILE),
        Place("/sys", "/sys", landlock.READ),
        Place(f"{directory}/dev", "/dev", landlock.RUN, own=True),
        *(Place(f"/dev/{name}", f"/dev/{name}", _DEVICE) for name in _DEVICE_NAMES if os.path.exists(f"/dev/{name}")),
        Place("/dev/pts", "/dev/pts", landlock.READ_DIR | _DEVICE),
        Place("/dev/ptmx", "/dev/ptmx", _DEVICE),
        Place(f"{directory}/{DEFAULT_SHM}", "/dev/shm", _WRITABLE, own=True),
    ]
    qemu = (config.get("labkernel") or {}).get("proot", {}).get("emulator")
    if qemu:
        found.append(Place(f"{directory}/machine", _MACHINE, landlock.READ, own=True))
        found.append(Place(qemu, f"{_MACHINE}{qemu}", landlock.RUN))
        # PRoot binds this itself, and would leave the place for it in the root file system.
        found.append(Place("/dev/null", "/etc/ld.so.preload", _DEVICE))
    mounts = [entry for entry in config.get("mounts") or () if entry.get("type") in ("bind", "tmpfs", None)]
    taken = {entry["destination"].rstrip("/") for entry in mounts}
    found += [
        Place(f"{directory}/{name}", f"/etc/{name}", _WRITABLE, own=True)
        for name, _ in network_files(config, config.get("labkernel") or {})
        if f"/etc/{name}" not in taken
    ]
    for number, entry in enumerate(mounts):
        target = "/" + entry["destination"].strip("/")
        if target in ("/dev", "/dev/shm"):
            continue
        rights = landlock.RUN if "ro" in (entry.get("options") or ()) else _WRITABLE
        if entry.get("type") == "tmpfs":
            found.append(Place(f"{directory}/tmpfs{number}", target, rights, own=True))
        else:
            found.append(Place(os.path.realpath(entry["source"]), target, rights))
    return found


def mount_points(config: dict[str, Any], directory: str) -> list[tuple[str, bool]]:
    """(path in the root file system, whether a directory) for everything that is bound directly into it."""
    bound = places(config, directory)
    inner = [place for place in bound if _below(place, bound) is None]
    return [(place.target, place.own or os.path.isdir(place.source)) for place in inner if not _is_etc(place)] + [
        (place.target, False) for place in inner if _is_etc(place)
    ]


def _is_etc(place: Place) -> bool:
    return place.own and place.target in ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")


def _below(place: Place, others: list[Place]) -> Place | None:
    """The innermost other place that `place` lies in."""
    around = [other for other in others if place.target.startswith(other.target.rstrip("/") + "/")]
    return max(around, key=lambda other: len(other.target), default=None)


def make_points(root_fd: int, points: list[tuple[str, bool]], created: list[str] | None = None) -> None:
    """Make missing mount points in an open root directory."""
    for path, directory in points:
        os.close(ensure_in_root(root_fd, path, directory=directory, created=created))


# -- the container's first process -----------------------------------------------------------------------------------


def main(sock: socket.socket, _settings: dict[str, Any]) -> None:
    """Body of a child of the pool, as `init.main`. Never returns."""
    try:
        sock = init.isolate_descriptors(sock)
        init.reset_signals()
        prctl(PR_SET_DUMPABLE, 0)
        os.setsid()
        os.umask(0o022)
        data, fds = protocol.receive(sock)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if request.get("quit"):
            os._exit(0)
        with open(request["config"], "rb") as file:
            config = json.loads(file.read())
        _become_container(sock, config, request["dir"], fds)
    except BaseException as err:
        _report(sock, err)
    finally:
        os._exit(125)


def begin_session(
    sock: socket.socket, inst: Any, process: dict[str, Any], theirs: list[int], *, terminal: bool
) -> None:
    """exec: a second PRoot over the same root. `sock` is told {"pid"} of the monitor. Never returns."""
    try:
        prctl(PR_SET_DUMPABLE, 0)
        init.reset_signals()
        for number, fd in enumerate(theirs):
            os.dup2(fd, number)
        sock = init.isolate_descriptors(sock)
        os.setsid()
        pid, _ = syscalls.clone(syscalls.CLONE_PARENT, want_pidfd=False)
        if pid:
            sock.send(protocol.dumps({"pid": pid}))
            os._exit(0)
        os.umask(0o022)
        config, own = session_config(inst, process, terminal=terminal)
        config["labkernel"] = own
        master = _attach_terminal(config["process"]) if terminal else None
        if master is not None:
            protocol.send_with_fds(sock, b"{}", [master])
            os.close(master)
        init.set_rlimits(config["process"].get("rlimits") or [])
        _launch(sock, config, inst.directory, cwd_create=False)
    except BaseException as err:
        _report(sock, err, otherwise=126)
    finally:
        os._exit(1)


def session_config(inst: Any, process: dict[str, Any], *, terminal: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The container's config with an exec's process in it."""
    base: dict[str, Any] = inst.config["process"]
    own = dict(inst.own)
    if process.get("user"):
        own["user_unresolved"] = process["user"]
    merged = {
        **base,
        "args": process["args"],
        "env": init.merge_environment(base, process, terminal=terminal),
        "cwd": process.get("cwd") or base.get("cwd") or "/",
        "consoleSize": process.get("consoleSize") or {},
    }
    return {**inst.config, "process": merged}, own


def _report(sock: socket.socket, err: BaseException, otherwise: int = 125) -> None:
    if isinstance(err, init.SetupError):
        init.report(sock, err.brief, err.exit_code)
    elif isinstance(err, OSError):
        where = f": {file_of(err)}" if file_of(err) else ""
        init.report(sock, f"cannot set up the container{where}: {err.strerror or err}", otherwise)
    else:
        init.report(sock, f"cannot set up the container: {type(err).__name__}: {err}", otherwise)


def _become_container(sock: socket.socket, config: dict[str, Any], directory: str, fds: list[int]) -> None:
    own = config["labkernel"]
    process = config["process"]
    created: list[str] = []
    _provide(config, directory)
    root_fd = os.open(own["rootfs"]["path"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    make_points(root_fd, mount_points(config, directory), created)
    os.close(root_fd)
    warnings = init.set_oom_score(process.get("oomScoreAdj"), init.open_oom_score())
    master = None
    if process.get("terminal"):
        master = _attach_terminal(process)
    else:
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        for fd in fds:
            os.close(fd)
    notes: dict[str, Any] = {"created": created, "warnings": warnings + init.set_rlimits(process.get("rlimits") or [])}
    protocol.send_with_fds(sock, protocol.dumps({"notes": notes}), [] if master is None else [master])
    if master is not None:
        os.close(master)
    _launch(sock, config, directory, cwd_create=bool(own.get("cwd_create", True)))


def _attach_terminal(process: dict[str, Any]) -> int:
    """Make 0 to 2 a new terminal of this machine's devpts; returns its master. Controlling it comes with the exec."""
    master, slave = pty.open_pair("/dev/ptmx")
    size = process.get("consoleSize") or {}
    pty.resize(master, int(size.get("height") or 24), int(size.get("width") or 80))
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    return master


def _provide(config: dict[str, Any], directory: str) -> None:
    """The container's own files outside its root: /dev with the shim, tmpfs directories, /etc/hosts and its like."""
    own = config["labkernel"]
    dev = f"{directory}/dev"
    if not os.path.isdir(dev):
        os.mkdir(dev, 0o755)
        for name, points_to in LINKS:
            if name != "ptmx":
                os.symlink(points_to, f"{dev}/{name}")
        for name in (*_DEVICE_NAMES, "ptmx"):
            os.close(os.open(f"{dev}/{name}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        for name in ("pts", "shm"):
            os.mkdir(f"{dev}/{name}", 0o755)
        os.link(own["proot"]["shim"], f"{dev}/{SHIM_NAME}")
    for place in places(config, directory):
        if place.own and place.target != "/dev" and not _is_etc(place) and not os.path.isdir(place.source):
            os.mkdir(place.source, 0o777)
            os.chmod(place.source, 0o755 if place.target == _MACHINE else 0o1777)
        for around, folder in (("/dev/", dev), (f"{_MACHINE}/", f"{directory}/machine")):
            if place.target.startswith(around) and not place.own:
                fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                inside = place.target.removeprefix(around)
                os.close(ensure_in_root(fd, inside, directory=os.path.isdir(place.source)))
                os.close(fd)
    for name, text in network_files(config, own):
        try:
            fd = os.open(f"{directory}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        os.write(fd, text.encode())
        os.close(fd)


# -- PRoot ------------------------------------------------------------------------------------------------------------


def _launch(sock: socket.socket, config: dict[str, Any], directory: str, *, cwd_create: bool) -> None:
    """Find user, directory and command inside the root, then PRoot in a child. Raises SetupError; never returns."""
    process, own = config["process"], config["labkernel"]
    view = _View(own["rootfs"]["path"], places(config, directory), emulated=own["proot"].get("emulated", ""))
    user = accounts.resolve(own.get("user_unresolved"), process.get("user") or {}, opener=view.open)
    env = list(process.get("env") or [])
    if not any(word.startswith("HOME=") for word in env):
        env.append(f"HOME={user.home}")
    cwd = view.enter(process.get("cwd") or "/", create=cwd_create)
    pairs = dict(word.split("=", 1) for word in env if "=" in word)
    program = view.locate((process["args"] or [""])[0], pairs.get("PATH", init.DEFAULT_PATH), cwd)
    given = own["proot"]
    # As many as the shim drops: they are PRoot's, not the container's.
    hidden = {
        "PROOT_LOADER": given["loader"],
        "PROOT_LOADER_32": given["loader32"],
        "LD_LIBRARY_PATH": given.get("libraries") or "",
        # With its own filter it would not be asked first, and what the recorder hears were the container's paths.
        "PROOT_NO_SECCOMP" if own.get("owners") else "PROOT_UNUSED": "1",
    }
    ids = ["-0"] if user.uid == 0 and user.gid == 0 else ["-i", f"{user.uid}:{user.gid}"]
    emulation = ["-q", given["emulator"]] if given.get("emulator") else []
    argv = [given["program"], "-v", "-1", *emulation, "-r", view.root, *view.binds(), "-w", cwd, *ids]
    argv += [f"/dev/{SHIM_NAME}", program, *process["args"]]
    rules = _rules(view, given, readonly=bool((config.get("root") or {}).get("readonly")))
    terminal = os.isatty(0)

    channel, recorder = None, None
    if own.get("owners") and user.uid:
        owners.note_user(directory, user.uid, user.gid)
    elif own.get("owners"):
        channel = socket.socketpair()
        recorder = partial(owners.Recorder, notes=f"{directory}/{owners.NOTES}", tree=view.root)

    def launch(status_fd: int) -> None:
        nonlocal sock
        sock = socket.socket(fileno=os.dup(sock.detach()))  # 3 is needed for the status
        told = channel and socket.socket(fileno=os.dup(channel[1].detach()))
        if status_fd == prootmonitor.STATUS_FD:
            os.set_inheritable(status_fd, True)  # noqa: FBT003
        else:
            os.dup2(status_fd, prootmonitor.STATUS_FD)
        os.set_inheritable(sock.fileno(), False)  # noqa: FBT003
        os.setsid()
        if terminal:
            pty.make_controlling(0)
        os.chdir(view.root)
        limit = given.get("data_bytes")
        if limit:
            # RLIMIT_DATA and not AS: it counts what can be written, not what runtimes only reserve.
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if landlock.version() >= landlock.LEAST_VERSION:
            landlock.restrict(rules)
        if told is None or not _record_owners(sock, told):
            seccomp.install(owners.program(unknown=_UNKNOWN_CALLS, asked=False))
        os.execve(given["program"], argv, {**hidden, **pairs})

    prootmonitor.watch(launch, lambda err: _report(sock, err), channel and channel[0], recorder)


def _record_owners(sock: socket.socket, channel: socket.socket) -> bool:
    """Put the filter on that asks about chown; its listener goes over `channel` to the monitor. False where it cannot
    be had (a pod whose own runtime listens already), which the step's warnings say."""
    try:
        listener = seccomp.install_asking(owners.program(unknown=_UNKNOWN_CALLS))
    except OSError as err:
        sock.send(protocol.dumps({"listener": False, "of": "owners", "why": err.strerror}))
        return False
    socket.send_fds(channel, [b"\0"], [listener])
    return True


def _rules(view: _View, given: dict[str, Any], *, readonly: bool) -> list[tuple[str, int]]:
    rules = [(view.root, landlock.RUN if readonly else _WRITABLE)]
    rules += [(place.source, place.rights) for place in view.places]
    rules += [(path, landlock.RUN) for path in (given["program"], given["loader"], given["loader32"]) if path]
    rules += [(path, landlock.RUN) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")]
    rules += [(path, landlock.RUN) for path in (given.get("libraries") or "").split(":") if path]
    return rules


class _View:
    """The container's file system as its processes will see it: the root, and what is bound into it."""

    def __init__(self, root: str, found: list[Place], *, emulated: str = "") -> None:
        self.root = root
        self.emulated = emulated  # the other architecture whose programs are executed
        self.places = found
        self._ordered = sorted(found, key=lambda place: -len(place.target))

    def binds(self) -> list[str]:
        words: list[str] = []
        for place in self.places:
            if os.path.exists(place.source):
                words += ["-b", f"{place.source}:{place.target}"]
        return words

    def open(self, path: str, flags: int = os.O_PATH | os.O_CLOEXEC) -> int:
        """Open a path of the container; links are followed inside the root, or inside the place, it lies in."""
        path = os.path.normpath("/" + path.strip("/"))
        base, rest = self.root, path
        for place in self._ordered:
            if path == place.target or path.startswith(place.target + "/"):
                base, rest = place.source, path[len(place.target) :]
                break
        if not rest.strip("/") or not os.path.isdir(base):
            return os.open(base, flags)
        base_fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_in_root(base_fd, rest.lstrip("/"), flags)
        finally:
            os.close(base_fd)

    def enter(self, path: str, *, create: bool) -> str:
        """The working directory, made when it is missing and may be. Raises SetupError in docker's words."""
        wrong = f'chdir to cwd ("{path}") set in config.json failed'
        try:
            fd = self.open(path)
        except FileNotFoundError:
            if not create:
                raise init.SetupError(f"{wrong}: no such file or directory") from None
            root_fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            fd = ensure_in_root(root_fd, path, directory=True)
            os.close(root_fd)
        except PermissionError:
            return path  # closed to its owner: PRoot, whose root enters everything, sees whether it is there
        except OSError as err:
            raise init.SetupError(f"{wrong}: {os.strerror(err.errno or 0).lower()}", 126) from err
        try:
            if not is_directory(fd):
                raise init.SetupError(f"{wrong}: not a directory", 126)
        finally:
            os.close(fd)
        return path

    def locate(self, name: str, search: str, cwd: str) -> str:
        """Path of the command in the container. Raises SetupError (126, 127) in docker's words."""
        if "/" in name:
            try:
                mode = self._mode(os.path.join(cwd, name))
            except (FileNotFoundError, NotADirectoryError) as err:
                what = "no such file or directory" if isinstance(err, FileNotFoundError) else "not a directory"
                code = 127 if isinstance(err, FileNotFoundError) else 126
                raise init.SetupError(f'exec: "{name}": stat {name}: {what}', code) from None
            if stat.S_ISDIR(mode):
                raise init.SetupError(f'exec: "{name}": is a directory', 126)
            if not mode & 0o111:
                raise init.SetupError(f'exec: "{name}": permission denied', 126)
            self._check_format(os.path.join(cwd, name))
            return name
        denied = False
        for folder in search.split(":") if name else ():
            candidate = os.path.join(cwd, folder, name)
            try:
                mode = self._mode(candidate)
            except OSError:
                continue
            if stat.S_ISREG(mode) and mode & 0o111:
                self._check_format(candidate)
                return candidate
            denied = denied or stat.S_ISREG(mode)
        if denied:
            raise init.SetupError(f'exec: "{name}": permission denied', 126)
        raise init.SetupError(f'exec: "{name}": executable file not found in $PATH', 127)

    def _mode(self, path: str) -> int:
        fd = self.open(path)
        try:
            return os.fstat(fd).st_mode
        finally:
            os.close(fd)

    def _check_format(self, path: str) -> None:
        """PRoot would say it in words of its own, after the start has been reported as a success."""
        try:
            fd = self.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError:
            raise init.SetupError(f'exec: "{path}": permission denied', 126) from None
        try:
            head = os.read(fd, 256)
        finally:
            os.close(fd)
        if head.startswith(b"#!"):
            words = head[2:].split(b"\n", 1)[0].split()
            try:
                if words:
                    self._mode(os.fsdecode(words[0]))
            except OSError:
                raise init.SetupError(f"exec {path}: no such file or directory", 127) from None
            return
        if not head.startswith(b"\x7fELF"):
            raise init.SetupError(f"exec {path}: exec format error", 126)
        # PRoot loads programs itself and asks no binfmt_misc: it would jump right into foreign code.
        machine = elf.architecture_of(head)
        if machine is not None and not elf.native(machine) and machine != self.emulated:
            why = f"{init.foreign_words(machine)}, for which the driver proot needs {elf.emulator_names(machine)[0]}"
            raise init.SetupError(f"exec {path}: exec format error: {why}", 126)


# -- what the supervisor asks -----------------------------------------------------------------------------------------


def kill_all(inst: Any) -> None:
    """SIGKILL to everything in the container, execs too."""
    if inst.pidfd >= 0 and inst.pid:
        prootmonitor.kill_container(inst.pid)
        try:
            signal.pidfd_send_signal(inst.pidfd, signal.SIGKILL)
        except OSError:
            pass
    kill_rest(inst)


def kill_rest(inst: Any) -> None:
    """The same when the first process has gone."""
    rootfs = (inst.own.get("rootfs") or {}).get("path")
    if rootfs:
        prootmonitor.sweep(rootfs)
