"""Namespaces: names and flags, and entering a user namespace with one id or with subordinate ranges.

Source: man 7 namespaces, man 7 user_namespaces, man 5 subuid, man 1 newuidmap.
"""

from __future__ import annotations

import fcntl
import os

from .syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    CLONE_PARENT,
    PR_SET_DUMPABLE,
    clone,
    prctl,
    setns,
    unshare,
)

# runtime-spec config-linux.md "namespaces": type -> clone flag.
FLAGS = {
    "pid": CLONE_NEWPID,
    "mount": CLONE_NEWNS,
    "uts": CLONE_NEWUTS,
    "ipc": CLONE_NEWIPC,
    "network": CLONE_NEWNET,
    "cgroup": CLONE_NEWCGROUP,
    "user": CLONE_NEWUSER,
}

_NS_GET_PARENT = 0xB702  # man 2 ioctl_ns


def clone_into_pid_namespace(target: int, flags: int) -> tuple[int, int]:
    """As `syscalls.clone` with `flags`, and the child is in the pid namespace of the process of the pidfd `target`.

    No process changes its own pid namespace, only that of its next children (man 2 setns), and without privileges over
    the first one it could not go back to that; so a helper, gone at the return, makes the child. Raises OSError.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    helper, _ = clone(0, want_pidfd=False)
    if helper == 0:
        try:
            setns(target, CLONE_NEWPID)
            pid, _ = clone(flags | CLONE_PARENT, want_pidfd=False)
            if pid == 0:
                return 0, -1
            os.write(write, b"%d" % pid)
        except OSError as err:
            os.write(write, b"-%d" % (err.errno or 1))
        os._exit(0)
    os.close(write)
    answer = int(os.read(read, 32) or b"-5")
    os.close(read)
    os.waitpid(helper, 0)
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))
    return answer, os.pidfd_open(answer)


def subordinate_ranges(path: str, *names: str) -> list[tuple[int, int]]:
    """(first id, count) for the lines of `path` (etc/subuid, etc/subgid) that belong to one of `names`."""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                parts = line.strip().split(":")
                if len(parts) == 3 and parts[0] in names and parts[1].isdigit() and parts[2].isdigit():
                    found.append((int(parts[1]), int(parts[2])))
    except FileNotFoundError:
        pass
    return found


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _map_words(own: int, ranges: list[tuple[int, int]]) -> list[str]:
    """Id 0 is the user; 1, 2, … are the subordinate ids in order."""
    words = ["0", str(own), "1"]
    inside = 1
    for first, count in ranges:
        words += [str(inside), str(first), str(count)]
        inside += count
    return words


def _find(name: str) -> str | None:
    for folder in ("/usr/bin", "/bin", "/usr/local/bin"):
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    return None


def _run(argv: list[str]) -> bool:
    pid = os.posix_spawn(argv[0], argv, {"PATH": "/usr/bin:/bin"})
    return os.waitpid(pid, 0)[1] == 0


def enter_user_namespace(*, ranges: bool = True) -> str:
    """Move this single-threaded process into a new user + mount namespace as its root; returns "ranges" or "single".

    With `ranges`, newuidmap and newgidmap map the user's subordinate ids where the programs and the ranges exist;
    otherwise one id is mapped and setgroups is denied for good. The maps have to be written by a process outside,
    so a child made before the step does it. The user's groups are kept (/dev/kvm is open to one of them, and none
    can be taken up again in here): what runs a container's command drops them (`drop_groups`).
    Raises OSError (EPERM, ENOSPC: the machine forbids user namespaces).
    """
    uid, gid = os.getuid(), os.getgid()
    name = _user_name(uid)
    tools = [_find("newuidmap"), _find("newgidmap")]
    uids = subordinate_ranges("/etc/subuid", name, str(uid)) if ranges and all(tools) else []
    gids = subordinate_ranges("/etc/subgid", name, str(uid)) if uids else []
    ask_r, ask_w = os.pipe()
    answer_r, answer_w = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(ask_w)
        if os.read(ask_r, 1) != b"m":
            os._exit(1)
        done = bool(uids and gids)
        done = done and _run([str(tools[0]), str(parent), *_map_words(uid, uids)])
        done = done and _run([str(tools[1]), str(parent), *_map_words(gid, gids)])
        os.write(answer_w, b"r" if done else b"s")
        os._exit(0)
    os.close(ask_r)
    os.close(answer_w)
    try:
        unshare(CLONE_NEWUSER)
        os.write(ask_w, b"m")
    finally:
        os.close(ask_w)
        answer = os.read(answer_r, 1)
        os.close(answer_r)
        os.waitpid(child, 0)
    if answer != b"r":
        _map_single(uid, gid)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    unshare(CLONE_NEWNS)
    return "ranges" if answer == b"r" else "single"


def drop_groups() -> None:
    """Give up the user's supplementary groups, which name groups outside; before anything of a container is touched."""
    try:
        os.setgroups([])
    except PermissionError:
        pass  # a user namespace with one id denies setgroups


def rejoin_user_namespace(pid: int) -> str | None:
    """Move this single-threaded process into the user namespace that process `pid` is in, and a new mount namespace,
    as `enter_user_namespace` does; None when that namespace is not one this user has made from its own.

    A user has every right in namespaces of its own, also when the process in it has another of its ids (man 7
    user_namespaces); from a second namespace beside it, it would have none.
    """
    try:
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        parent = fcntl.ioctl(fd, _NS_GET_PARENT)
        own = os.stat("/proc/self/ns/user")
        made_here = os.fstat(parent).st_ino == own.st_ino
        os.close(parent)
        if not made_here:
            return None
        setns(fd, CLONE_NEWUSER)
    except OSError:
        return None  # EPERM: the parent is out of reach, or the namespace is another user's
    finally:
        os.close(fd)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    unshare(CLONE_NEWNS)
    return "single" if is_single_id() else "ranges"


def _map_single(uid: int, gid: int) -> None:
    # A half-written map (newuidmap worked, newgidmap did not) cannot be written again: keep what is there.
    for path, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        try:
            fd = os.open(f"/proc/self/{path}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except PermissionError:
            if path == "gid_map" or (path == "uid_map" and not _mapped("uid_map")):
                raise


def become_alone(uid: int, gid: int) -> None:
    """Move this process, root of a user namespace with one id, into a namespace of its own in which that id is called
    `uid`, and `gid` its group; no other is mapped, and all files of the namespace belong to it. Raises OSError.

    Its own entries in /proc are its own only while it is dumpable (man 5 proc). By then it has no right over anything
    but the new namespace, which is nothing's."""
    unshare(CLONE_NEWUSER)
    prctl(PR_SET_DUMPABLE, 1)
    try:
        for path, id in (("uid_map", uid), ("gid_map", gid)):
            fd = os.open(f"/proc/self/{path}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, f"{id} 0 1".encode())
            finally:
                os.close(fd)
    finally:
        prctl(PR_SET_DUMPABLE, 0)


def _mapped(name: str) -> bool:
    with open(f"/proc/self/{name}", encoding="ascii") as file:
        return bool(file.read().strip())


def is_single_id() -> bool:
    """Whether the user namespace of this process maps exactly one group id (then devpts cannot have gid=5)."""
    with open("/proc/self/gid_map", encoding="ascii") as file:
        return sum(int(line.split()[2]) for line in file) <= 1
