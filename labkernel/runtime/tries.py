"""What the probe tries, as a program of its own: `python -I -S tries.py SCRATCH` prints one JSON object.

Each try runs in a forked child that then ends, so nothing it made outlives it. A program, because a Jupyter kernel has
threads, and with threads there is no `unshare(CLONE_NEWUSER)`. Standard library and `labkernel.linux` only.
Shape: {"root": {try: answer}, "user": {try: answer}, "cgroup": {…}} with answer = null (worked) or [errno, cause].
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000

_NAMESPACES = {
    "pid namespace": CLONE_NEWPID,
    "network namespace": CLONE_NEWNET,
    "ipc namespace": CLONE_NEWIPC,
    "uts namespace": CLONE_NEWUTS,
    "cgroup namespace": CLONE_NEWCGROUP,
}

_libc = ctypes.CDLL(None, use_errno=True)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

Answer = "list[object] | None"


def attempt(call: Callable[[], object]) -> list[object] | None:
    """Run `call` in a child; None when it returned, else [errno, words]. The child leaves no trace but its files."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: list[object] | None = None
        try:
            os.close(reading)
            call()
        except OSError as err:
            answer = [err.errno or 0, f"{err.filename}: {err.strerror}" if err.filename else str(err.strerror or err)]
        except BaseException as err:  # the parent must hear of it, whatever it is
            answer = [0, f"{type(err).__name__}: {err}"]
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        return [0, f"the child ended with status {status}"]
    found: list[object] | None = json.loads(text)
    return found


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()), f"mount {kind}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def enter_user_namespace(flags: int = 0) -> None:
    """A user namespace in which the caller is uid 0, the only id mapped (man 7 user_namespaces)."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | flags)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def try_namespace(flag: int, *, inside_user: bool) -> None:
    if inside_user:
        enter_user_namespace()
    unshare(flag)
    if flag == CLONE_NEWPID:
        pid = os.fork()  # the first child is pid 1 of the new namespace
        if pid == 0:
            os._exit(0 if os.getpid() == 1 else 1)
        if os.waitpid(pid, 0)[1] != 0:
            raise OSError(errno.EPERM, "no process could be made in it")


def private_mounts(*, inside_user: bool) -> None:
    if inside_user:
        enter_user_namespace(CLONE_NEWNS)
    else:
        unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)


def try_mount(*, inside_user: bool, scratch: str) -> None:
    private_mounts(inside_user=inside_user)
    mount("tmpfs", scratch, "tmpfs")


def try_overlay(*, inside_user: bool, scratch: str) -> None:
    """Mount, and use it as a container does: rename and remove what lies in a lower directory."""
    private_mounts(inside_user=inside_user)
    base = f"{scratch}/overlay-{'user' if inside_user else 'root'}"
    for name in ("lower/dir/sub", "upper", "work", "merged"):
        os.makedirs(f"{base}/{name}")
    _write(f"{base}/lower/dir/file", "x")
    extra = ",userxattr" if inside_user else ""
    mount(
        "overlay",
        f"{base}/merged",
        "overlay",
        0,
        f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work{extra}",
    )
    _write(f"{base}/merged/dir/file", "y")
    shutil.rmtree(f"{base}/merged/dir")
    os.mkdir(f"{base}/merged/dir")
    if os.listdir(f"{base}/merged/dir"):
        raise OSError(errno.EIO, "what was removed from a lower directory is still there")


def try_proc(*, inside_user: bool, scratch: str) -> None:
    private_mounts(inside_user=inside_user)
    unshare(CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        try:
            mount("proc", scratch, "proc")
        except OSError as err:
            os._exit(err.errno or 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, os.strerror(status), "mount proc")


def try_mknod(*, inside_user: bool, scratch: str) -> None:
    if inside_user:
        enter_user_namespace(CLONE_NEWNS)
    path = f"{scratch}/null-{inside_user}"
    os.mknod(path, 0o20600, os.makedev(1, 3))
    os.close(os.open(path, os.O_RDONLY))


def try_ptrace() -> None:
    pid = os.fork()
    if pid == 0:
        traceme = 0
        os._exit(0 if _libc.ptrace(traceme, 0, None, None) == 0 else ctypes.get_errno())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, os.strerror(status), "ptrace")


def try_seccomp() -> None:
    from labkernel.linux import seccomp

    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    seccomp.install(b"\x06\x00\x00\x00\x00\x00\xff\x7f")  # one instruction: return SECCOMP_RET_ALLOW


def try_id_ranges() -> None:
    """newuidmap and newgidmap with the first range of this user, from outside as they ask for."""
    ranges = [first_range(f"/etc/{name}", os.geteuid()) for name in ("subuid", "subgid")]
    ready, ask = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready[0])
            os.close(ask[1])  # its own copy would keep the read below from ever ending
            unshare(CLONE_NEWUSER)
            os.write(ready[1], b"1")
            os.read(ask[0], 1)
        finally:
            os._exit(0)
    try:
        os.close(ready[1])
        if not os.read(ready[0], 1):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), "unshare")
        for tool, own, (start, count) in zip(
            ("newuidmap", "newgidmap"), (os.geteuid(), os.getegid()), ranges, strict=True
        ):
            line = [tool, str(pid), "0", str(own), "1", "1", str(start), str(count)]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(errno.EPERM, (done.stderr.strip() or f"ended with {done.returncode}"), tool)
    finally:
        os.close(ask[1])
        os.waitpid(pid, 0)


def first_range(path: str, uid: int) -> tuple[int, int]:
    """The first range of the user in /etc/subuid or /etc/subgid (man 5 subuid), which know names and numbers."""
    import pwd

    names = {str(uid)}
    try:
        names.add(pwd.getpwuid(uid).pw_name)
    except KeyError:
        pass
    try:
        with open(path) as file:
            for line in file:
                name, _, numbers = line.strip().partition(":")
                if name in names:
                    start, _, count = numbers.partition(":")
                    return int(start), int(count)
    except OSError:
        pass
    raise OSError(errno.ENOENT, "no range for this user", path)


def try_cgroups() -> dict[str, object]:
    """Per controller: a group with a limit, joined by a child. Leaves no group behind."""
    from labkernel.linux import cgroups

    hierarchy = cgroups.detect()
    answers: dict[str, object] = {name: [errno.ENODEV, reason] for name, reason in hierarchy.missing.items()}
    limits: dict[str, dict[str, object]] = {
        "memory": {"limit": 64 << 20},
        "cpu": {"quota": 50000, "period": 100000, "cpus": "0"},
        "pids": {"limit": 64},
    }
    wanted = {
        "memory": "memory",
        "cpu": "cpus",
        "pids": "pids-limit",
        "cpuset": "cpuset-cpus",
    }
    version = hierarchy.version
    if version:
        parent = f"labkernel/probe-{os.getpid()}"
        try:
            group = hierarchy.create(parent, "try", limits)
        except OSError as err:
            trouble = [err.errno, f"{err.filename}: {err.strerror}"]
            answers.update(dict.fromkeys(hierarchy.bases, trouble))
            version = 0
        else:
            try:
                unset = dict(group.unenforced)
                joined = attempt(group.join)
                for name in hierarchy.bases:
                    reason = unset.get(wanted.get(name, ""))
                    answers[name] = joined or ([errno.EACCES, reason] if reason else None)
                if joined:
                    version = 0
            finally:
                group.remove()
        hierarchy.remove_parent(parent)
    return {"version": version, "hybrid": hierarchy.hybrid, "controllers": answers}


def main(scratch: str) -> dict[str, object]:
    """All tries; `scratch` is an empty directory in the store, on the disk that overlay would use."""
    answers: dict[str, object] = {}
    for key, inside in (("root", False), ("user", True)):
        found: dict[str, object] = {}
        found["user namespace"] = attempt(enter_user_namespace) if inside else None
        found["mount"] = attempt(lambda inside=inside: try_mount(inside_user=inside, scratch=scratch))  # type: ignore[misc]
        found["overlay"] = attempt(lambda inside=inside: try_overlay(inside_user=inside, scratch=scratch))  # type: ignore[misc]
        found["proc mount"] = attempt(lambda inside=inside: try_proc(inside_user=inside, scratch=scratch))  # type: ignore[misc]
        found["mknod"] = attempt(lambda inside=inside: try_mknod(inside_user=inside, scratch=scratch))  # type: ignore[misc]
        for name, flag in _NAMESPACES.items():
            found[name] = attempt(lambda flag=flag, inside=inside: try_namespace(flag, inside_user=inside))  # type: ignore[misc]
        answers[key] = found
    answers["id ranges"] = attempt(try_id_ranges)
    answers["ptrace"] = attempt(try_ptrace)
    answers["seccomp"] = attempt(try_seccomp)
    answers["kvm"] = attempt(lambda: os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)))
    answers["cgroup"] = try_cgroups()
    return answers


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    sys.stdout.write(json.dumps(main(sys.argv[1])))
