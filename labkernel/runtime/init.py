"""What runs in the child that becomes a container's first process, from the clone to the exec.

The child is made before its container is known (see `pool`): it prepares what it can, then waits on its socket for
one message. The socket is close-on-exec, so its end is the moment of the exec; before that the child sends a
description of what failed, or the pty's master. Standard library only: it is forked from the supervisor.

Safety. The child is not dumpable, so nobody in the container can open its /proc entries (CVE-2019-5736); every
descriptor but 0 to 2 is closed and the working directory is checked to lie inside (CVE-2024-21626).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import FOREIGN, file_of
from ..linux import capabilities, elf, mounts, namespaces, netlink, pty, seccomp, syscalls
from ..linux.files import read_file
from ..linux.syscalls import PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, prctl
from . import accounts, protocol, rootfs

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_RLIMITS = {
    name: getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_") and isinstance(getattr(resource, name), int)
}
_files_soft: int | None = None
_step = ""


class SetupError(Exception):
    """A start that failed, in words for the user; `exit_code` is docker's 125, 126 or 127."""

    def __init__(self, brief: str, exit_code: int = 125) -> None:
        super().__init__(brief)
        self.brief = brief
        self.exit_code = exit_code


def isolate_descriptors(sock: socket.socket) -> socket.socket:
    """Keep only 0 to 2 and `sock`, which becomes descriptor 3: warm children must not hold each other's sockets."""
    fd = sock.detach()
    if fd != 3:
        os.dup2(fd, 3, inheritable=False)
    syscalls.close_range(4)
    return socket.socket(fileno=3)


def raise_descriptor_limit(before: int | None = None) -> None:
    """The supervisor holds a few descriptors for each container: soft limit up to the hard one. `reset_signals` gives
    containers back what was there before (`before`, where it was raised already)."""
    global _files_soft
    _files_soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _files_soft = _files_soft if before is None else before
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def soft_limit_before() -> int | None:
    """What `raise_descriptor_limit` found; None when it was not called."""
    return _files_soft


def reset_signals() -> None:
    """Default actions and an empty mask; Python ignores SIGPIPE and SIGXFSZ, and ignored signals survive an exec."""
    signal.set_wakeup_fd(-1)
    if _files_soft is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_files_soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    enders = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, *enders):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def main(sock: socket.socket, settings: dict[str, Any]) -> None:
    """Body of a pool child. `settings`: stage, cgroup (a Cgroup or None), profile, single_id. Never returns.

    Without an exec the exit code is docker's for the failure: a supervisor that takes over in the middle sees that.
    """
    code = 125
    try:
        sock = isolate_descriptors(sock)
        reset_signals()
        # Afterwards this file is the machine's root's, and a plain user could not even raise the value.
        settings["oom_score"] = open_oom_score()
        prctl(PR_SET_DUMPABLE, 0)
        namespaces.drop_groups()
        os.setsid()
        os.umask(0)
        _prepare(settings)
        rehearse()
        data, fds = protocol.receive(sock)
        if not data:
            os._exit(0)  # the supervisor has gone, or does not need this child any more
        request = json.loads(data)
        if request.get("quit"):
            os._exit(0)
        _become_container(sock, request, fds, settings)
    except SetupError as err:
        code = err.exit_code
        report(sock, err.brief, code)
    except OSError as err:
        where = f": {file_of(err)}" if file_of(err) else ""
        report(sock, f"cannot set up the container{where}: {err.strerror or err}", 125)
    except BaseException as err:
        report(sock, f"cannot set up the container: {type(err).__name__}: {err}", 125)
    finally:
        os._exit(code)


def reach(step: str) -> None:
    """What is done next, for who asks why a start failed (`container explain` lists the steps)."""
    global _step
    _step = step


def report(sock: socket.socket, brief: str, exit_code: int) -> None:
    """Tell the supervisor why there will be no exec."""
    try:
        sock.send(protocol.dumps({"error": brief[:8000], "exit_code": exit_code, "step": _step}))
    except OSError:
        pass


def rehearse() -> None:
    """For a child that waits: go through the motions of what comes, without effect. After a fork the first touch of
    each of the interpreter's pages costs a fault, and now nobody waits for it."""
    config = {
        "process": {
            "args": ["true"],
            "env": [f"PATH={DEFAULT_PATH}"],
            "capabilities": {"bounding": capabilities.NAMES},
        },
        "mounts": [{"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64k"]}],
        "linux": {"namespaces": [{"type": "network"}], "resources": {}},
        "hostname": "rehearsal",
    }
    config = json.loads(protocol.dumps(config))
    rootfs.network_files(config, {})
    mounts.parse_options(["nosuid", "size=64k"])
    mounts.overlay_options(["/lower"], "/upper", "/work", volatile=True)
    capabilities.mask(capabilities.NAMES)
    syscalls.capget()
    accounts.resolve("0", {})
    read_program(os.devnull)
    try:
        locate("true", "/nowhere")
    except SetupError:
        pass


def _prepare(settings: dict[str, Any]) -> None:
    cgroup = settings["cgroup"]
    profile = settings["profile"]
    reach("cgroup")
    if cgroup is not None:
        cgroup.join(0)
        if "cgroup" in profile["namespaces"]:
            # Only now: the namespace's root is the group the process is in at this moment (man 7 cgroup_namespaces).
            syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    if "network" in profile["namespaces"]:
        reach("network")
        netlink.loopback_up()
        leave_out_ipv6()
    if profile.get("bounding") is not None:
        # What it may do now it may do until the exec: the bounding set only limits what an exec can give.
        capabilities.drop_bounding(capabilities.mask(profile["bounding"]))
    reach("kernel file systems")
    paths = cgroup.paths if cgroup is not None else {}
    rootfs.prepare(settings["stage"], cgroup_paths=paths, profile=profile, single_id=settings["single_id"])


def leave_out_ipv6() -> None:
    """Networks are IPv4: without this every interface to come would have an address its bridge's rules do not know."""
    try:
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w", encoding="ascii") as file:
            file.write("1")
    except OSError:
        pass  # no IPv6 in this kernel, or a /proc that is read-only (a pod)


def _become_container(sock: socket.socket, request: dict[str, Any], fds: list[int], settings: dict[str, Any]) -> None:
    config = json.loads(read_file(request["config"]))
    own = config.setdefault("labkernel", {})
    own["single_id"] = settings["single_id"]
    process = config["process"]
    program = read_program(own.get("seccomp_program"))
    if request.get("network"):
        reach("network")
        own["network"] = _join_network(sock, request["network"])
    reach("mounts")
    places = request.get("shared") or []
    stdio, shared = fds[: len(fds) - len(places)], dict(zip(places, fds[len(fds) - len(places) :], strict=True))
    skeleton = settings.get("skeleton")
    created = rootfs.assemble(settings["stage"], config, request["dir"], settings["profile"], skeleton, shared)
    notes: dict[str, Any] = {"created": created}
    if config.get("hostname") and "uts" in settings["profile"]["namespaces"]:
        socket.sethostname(config["hostname"])
        if config.get("domainname"):
            syscalls.setdomainname(config["domainname"])
    reach("sysctls")
    _write_sysctls((config.get("linux") or {}).get("sysctl") or {})
    warnings = set_oom_score(process.get("oomScoreAdj"), settings["oom_score"])
    reach("pivot_root")
    rootfs.enter(settings["stage"], readonly=bool((config.get("root") or {}).get("readonly")))
    master = _attach_stdio(process, stdio)
    reach("rlimits")
    notes["warnings"] = warnings + set_rlimits(process.get("rlimits") or [])
    _send_notes(sock, notes, master)
    execute(sock, process, own, program, cwd_create=bool(own.get("cwd_create", True)), bounded=True)


def _join_network(sock: socket.socket, network: dict[str, Any]) -> dict[str, Any]:
    """Give the interfaces that have come into this namespace their addresses, and the resolver its sockets."""
    if network["interfaces"]:
        netlink.configure(network["interfaces"])
    if network["resolver"]:
        sockets = netlink.resolver_sockets()
        protocol.send_with_fds(sock, protocol.dumps({"resolver": True}), [each.fileno() for each in sockets])
        for each in sockets:
            each.close()
    return network


def _send_notes(sock: socket.socket, notes: dict[str, Any], master: int | None) -> None:
    if notes.get("created") or notes.get("warnings") or master is not None:
        protocol.send_with_fds(sock, protocol.dumps({"notes": notes}), [] if master is None else [master])
    if master is not None:
        os.close(master)


def read_program(path: str | None) -> bytes | None:
    """The compiled system call filter; it lies outside the container, so it is read before the root changes."""
    return read_file(path) if path else None


def _write_sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        path = "/proc/sys/" + name.replace(".", "/")
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(str(value))
        except OSError as err:
            raise SetupError(f"sysctl {name}: {err.strerror}") from err


def open_oom_score() -> int:
    """/proc/self/oom_score_adj, opened for writing; -1 where there is none."""
    try:
        return os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def set_oom_score(value: int | None, fd: int) -> list[str]:
    """Write to what `open_oom_score` returned, and close it. Lowering needs CAP_SYS_RESOURCE and is left out, with a
    warning, without."""
    try:
        if value:
            os.write(fd, b"%d" % value)
    except OSError as err:
        return [f"oom-score-adj {value} is not possible: {err.strerror}"]
    finally:
        if fd >= 0:
            os.close(fd)
    return []


def _attach_stdio(process: dict[str, Any], fds: list[int]) -> int | None:
    """Make 0 to 2 the pipes in `fds`, or a new pty of the container's own devpts, whose master is returned."""
    if not process.get("terminal"):
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        for fd in fds:
            os.close(fd)
        return None
    master, slave = pty.open_pair("/dev/ptmx")
    size = process.get("consoleSize") or {}
    if size.get("height") and size.get("width"):
        pty.resize(master, int(size["height"]), int(size["width"]))
    bind_console(slave)
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    pty.make_controlling(0)
    return master


def bind_console(slave: int) -> None:
    """Bind the pty to /dev/console (runtime-spec config.md, `terminal`)."""
    try:
        os.close(os.open("/dev/console", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o620))
        mounts.mount(f"/dev/pts/{os.minor(os.fstat(slave).st_rdev)}", "/dev/console", None, mounts.MS_BIND)
    except OSError:
        pass  # only a comfort: a program that wants it sees its absence


def set_rlimits(limits: list[dict[str, Any]]) -> list[str]:
    """setrlimit for each; returns warnings for those that would need CAP_SYS_RESOURCE and were lowered instead."""
    warnings = []
    for limit in limits:
        number = _RLIMITS.get(limit["type"])
        if number is None:
            continue
        soft, hard = (_limit_value(limit[name]) for name in ("soft", "hard"))
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, PermissionError):
            ceiling = resource.getrlimit(number)[1]
            hard = ceiling if hard == -1 or (ceiling != -1 and hard > ceiling) else hard
            soft = hard if soft == -1 or (hard != -1 and soft > hard) else soft
            resource.setrlimit(number, (soft, hard))
            name = limit["type"].removeprefix("RLIMIT_").lower()
            warnings.append(f"ulimit {name}: only up to {hard} without CAP_SYS_RESOURCE")
    return warnings


def _limit_value(value: int) -> int:
    return -1 if value < 0 or value >= 1 << 63 else int(value)


def execute(
    sock: socket.socket,
    process: dict[str, Any],
    own: dict[str, Any],
    program: bytes | None,
    *,
    cwd_create: bool,
    bounded: bool = False,
) -> None:
    """From inside the root: identity, working directory, privileges, exec. Reports failure on `sock`, never returns."""
    reach("user")
    env = list(process.get("env") or [])
    user = accounts.resolve(own.get("user_unresolved"), process.get("user") or {})
    if not any(word.startswith("HOME=") for word in env):
        env.append(f"HOME={user.home}")
    _give_stdio(user.uid)
    reach("working directory")
    _change_directory(process.get("cwd") or "/", create=cwd_create)
    try:
        syscalls.join_session_keyring()
    except OSError:
        pass  # no keys in this kernel, or forbidden by an outer filter
    alone = bool(user.uid and own.get("single_id") and _become_alone(sock, user))
    reach("privileges")
    install = seccomp.install
    if own.get("count_denials"):
        install = partial(_install_counted, sock)
    elif own.get("owners") and not user.uid:
        install, program = partial(_install_recorded, sock), program or seccomp.ALLOW_ALL
    # A user namespace begins with a full bounding set (man 7 user_namespaces).
    set_privileges(process, user, program, bounded=bounded and not alone, install=install)
    # Identity changes make a process dumpable again (man 2 prctl).
    prctl(PR_SET_DUMPABLE, 0)
    os.umask(0o022)
    reach("exec")
    if own.get("init"):
        _run_as_init(sock)
    replace_program(process["args"], env)


def _become_alone(sock: socket.socket, user: accounts.User) -> bool:
    """With one mapped id a user other than root is that id by another name."""
    reach("user namespace")
    try:
        namespaces.become_alone(user.uid, user.gid)
    except OSError:
        return False  # its ids cannot be taken on, which is told
    sock.send(protocol.dumps({"alone": [user.uid, user.gid]}))
    return True


def _give_stdio(uid: int) -> None:
    # As docker does: /dev/stdout can then be opened by a user other than root. /dev/null is not handed over.
    for number in range(3):
        info = os.fstat(number)
        if not (os.major(info.st_rdev) == 1 and os.minor(info.st_rdev) == 3) and info.st_uid != uid:
            try:
                os.fchown(number, uid, -1)
            except OSError:
                pass


def _change_directory(path: str, *, create: bool) -> None:
    try:
        os.chdir(path)
    except FileNotFoundError:
        if not create:
            raise SetupError(f'chdir to cwd ("{path}") set in config.json failed: no such file or directory') from None
        try:
            os.umask(0o022)  # parents of the last directory get 0777 less this
            os.makedirs(path, 0o755, exist_ok=True)
            os.chdir(path)
        except OSError as err:
            raise SetupError(f'cannot make the working directory "{path}": {err.strerror}') from err
    except OSError as err:
        text = os.strerror(err.errno or 0).lower()
        raise SetupError(f'chdir to cwd ("{path}") set in config.json failed: {text}', 126) from err
    if not os.getcwd().startswith("/"):
        raise SetupError("the working directory lies outside of the container")


def _install_counted(sock: socket.socket, program: bytes) -> None:
    try:
        fd = seccomp.install_counted(program)
    except OSError as err:
        sock.send(protocol.dumps({"listener": False, "why": err.strerror}))
        seccomp.install(program)
        return
    protocol.send_with_fds(sock, protocol.dumps({"listener": True}), [fd])
    os.close(fd)


def _install_recorded(sock: socket.socket, program: bytes) -> None:
    """The filter, and another one that asks what becomes of an owner the disk cannot keep (owners.py)."""
    from . import owners

    try:
        fd = seccomp.install_asking(owners.program())
    except OSError as err:
        sock.send(protocol.dumps({"listener": False, "of": "owners", "why": err.strerror}))
    else:
        protocol.send_with_fds(sock, protocol.dumps({"listener": True, "of": "owners"}), [fd])
        os.close(fd)
    seccomp.install(program)


def merge_environment(base: dict[str, Any], process: dict[str, Any], *, terminal: bool) -> list[str]:
    """The container's variables and the command's: a name without `=` unsets one. As docker, HOME is the container's
    where that was given one, also for another user."""
    env = {word.partition("=")[0]: word for word in (*(base.get("env") or ()), *(process.get("env") or ()))}
    if terminal:
        env.setdefault("TERM", "TERM=xterm")
    return [word for word in env.values() if "=" in word]


def set_privileges(
    process: dict[str, Any],
    user: accounts.User,
    program: bytes | None,
    *,
    bounded: bool = False,
    install: Callable[[bytes], None] = seccomp.install,
) -> None:
    """Bounding set (unless `bounded` already), filter, ids, capabilities, in the order runc uses.

    Without no_new_privs a filter needs CAP_SYS_ADMIN, so it comes before the ids change; with it, last.
    """
    sets = process.get("capabilities")
    if sets is not None and not bounded:
        capabilities.drop_bounding(capabilities.mask(sets.get("bounding") or []))
    locked = bool(process.get("noNewPrivileges"))
    if locked:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    elif program:
        install(program)
    prctl(PR_SET_KEEPCAPS, 1)
    try:
        try:
            os.setgroups(user.groups)
        except PermissionError:
            pass  # a user namespace with one id denies setgroups
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        raise SetupError(f"user {user.uid}:{user.gid} is not mapped in this user namespace") from None
    prctl(PR_SET_KEEPCAPS, 0)
    if sets is not None:
        capabilities.apply(sets)
    if locked and program:
        install(program)


def replace_program(args: list[str], env: list[str]) -> None:
    """execve with a PATH search; raises SetupError in docker's words."""
    pairs = dict(word.split("=", 1) for word in env if "=" in word)
    name = args[0] if args else ""
    path = locate(name, pairs.get("PATH", DEFAULT_PATH))
    try:
        os.execve(path, args, pairs)
    except FileNotFoundError:
        foreign = elf.foreign_program(path)
        if foreign is not None:
            raise SetupError(f"exec {path}: {foreign_words(foreign)}, whose interpreter is not in here", 126) from None
        raise SetupError(f"exec {path}: no such file or directory", 127) from None
    except PermissionError:
        raise SetupError(f'exec: "{name}": permission denied', 126) from None
    except OSError as err:
        if err.errno == errno.ENOEXEC:
            raise SetupError(f"exec {path}: exec format error{_why_format(path)}", 126) from None
        raise SetupError(f"exec {path}: {os.strerror(err.errno or 0).lower()}", 126) from None


def foreign_words(architecture: str) -> str:
    """What to say of a program for another architecture than this machine's linux/amd64."""
    return f"it is {FOREIGN}{architecture} on linux/{elf.host()}"


def _why_format(path: str) -> str:
    foreign = elf.foreign_program(path)
    return f": {foreign_words(foreign)}, and the kernel has no interpreter for it (binfmt_misc)" if foreign else ""


def locate(name: str, search: str) -> str:
    """The program `name` in the directories of `search`; raises SetupError in docker's words."""
    if "/" in name:
        try:
            mode = os.stat(name).st_mode
        except FileNotFoundError:
            raise SetupError(f'exec: "{name}": stat {name}: no such file or directory', 127) from None
        except NotADirectoryError:
            raise SetupError(f'exec: "{name}": stat {name}: not a directory', 126) from None
        except OSError:
            raise SetupError(f'exec: "{name}": permission denied', 126) from None
        if stat.S_ISDIR(mode):
            raise SetupError(f'exec: "{name}": is a directory', 126)
        if not os.access(name, os.X_OK):
            raise SetupError(f'exec: "{name}": permission denied', 126)
        return name
    denied = False
    for folder in search.split(":") if name else ():
        candidate = f"{folder or '.'}/{name}"
        try:
            regular = stat.S_ISREG(os.stat(candidate).st_mode)
        except OSError:
            continue
        if regular and os.access(candidate, os.X_OK):
            return candidate
        denied = denied or regular
    if denied:
        raise SetupError(f'exec: "{name}": permission denied', 126)
    raise SetupError(f'exec: "{name}": executable file not found in $PATH', 127)


def _run_as_init(sock: socket.socket) -> None:
    """`--init`: fork; the child goes on to the exec, this process reaps orphans and forwards signals as pid 1."""
    syscalls.set_title(b"labkernel-init")
    syscalls.set_name(b"labkernel-init")
    forwarded = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)]
    waited = [*forwarded, signal.SIGCHLD]
    # Before the fork: a child that ends at once would send its SIGCHLD to nobody, and the wait below never ended.
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if os.isatty(0):
            os.setsid()
            try:
                _steal_terminal()
            except OSError:
                pass
        return
    sock.close()
    while True:
        number = signal.sigwait(waited)
        if number != signal.SIGCHLD:
            try:
                os.kill(child, number)
            except OSError:
                pass
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                os._exit(0)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)


def _steal_terminal() -> None:
    import fcntl
    import termios

    # Argument 1 takes the terminal over from the session of pid 1; needs CAP_SYS_ADMIN, otherwise there is no job
    # control, as with any init that does not hand it on.
    fcntl.ioctl(0, termios.TIOCSCTTY, 1)
