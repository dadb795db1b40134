"""System calls Python 3.11 lacks, one thin function each, named and spelled as in the manual pages.

Each raises OSError with the path it was given. Policy, fallbacks and conveniences are out of scope; they live in
`namespaces`, `mounts`, `capabilities` and above. Standard library only: every container is a fork of this module.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_libc = ctypes.CDLL(None, use_errno=True)
# PyDLL keeps the GIL: the child of a raw clone must return into Python still holding it.
_held = ctypes.PyDLL(None, use_errno=True)

CLONE_NEWTIME = 0x00000080
CLONE_VM = 0x00000100
CLONE_PIDFD = 0x00001000
CLONE_VFORK = 0x00004000
CLONE_PARENT = 0x00008000
CLONE_PARENT_SETTID = 0x00100000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

O_PATH = os.O_PATH
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
STATX_BTIME = 0x800
SPLICE_F_MOVE = 1
SPLICE_F_NONBLOCK = 2
KEYCTL_JOIN_SESSION_KEYRING = 1

# Numbers below 424 differ between architectures; from 424 on they are the same everywhere (asm-generic/unistd.h).
_GENERIC = {"clone": 220, "pivot_root": 41, "keyctl": 219, "capset": 91, "capget": 90, "waitid": 95, "statx": 291}
_X86_64 = {"clone": 56, "pivot_root": 155, "keyctl": 250, "capset": 126, "capget": 125, "waitid": 247, "statx": 332}
_NR = _X86_64 if os.uname().machine == "x86_64" else _GENERIC  # aarch64, riscv64
_NR_PIDFD_GETFD = 438
_NR_CLOSE_RANGE = 436
_NR_OPENAT2 = 437
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_MOUNT_SETATTR = 442

_long = ctypes.c_long
_ulong = ctypes.c_ulong
_libc.syscall.restype = ctypes.c_long
_held.syscall.restype = ctypes.c_long
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.tee.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]
_libc.tee.restype = ctypes.c_ssize_t


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_Entry = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _FilterProgram(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _fail(path: str | bytes | None = None, path2: str | bytes | None = None) -> OSError:
    err = ctypes.get_errno()
    if path2 is not None:
        return OSError(err, os.strerror(err), path, None, path2)
    return OSError(err, os.strerror(err), path) if path is not None else OSError(err, os.strerror(err))


def _bytes(value: str | bytes | None) -> bytes | None:
    return os.fsencode(value) if value is not None else None


def clone(flags: int, *, want_pidfd: bool = True) -> tuple[int, int]:
    """man 2 clone, used like fork with namespace flags: returns (pid, pidfd) in the parent and (0, -1) in the child.

    Only for single-threaded processes: Python's own after-fork hooks do not run. Namespace flags need CAP_SYS_ADMIN
    in the user namespace.
    """
    pidfd = ctypes.c_int(-1)
    word = flags | 17 | (CLONE_PIDFD if want_pidfd else 0)
    # The order of the last two arguments differs between architectures; both are 0.
    pid = int(_held.syscall(_long(_NR["clone"]), _ulong(word), None, ctypes.byref(pidfd), None, None))
    if pid < 0:
        raise _fail()
    return (pid, pidfd.value) if pid else (0, -1)


def lowest_stack_address() -> int:
    """Where the stack of the first thread ends so far (man 5 proc_pid_maps). Raises OSError."""
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            if line.rstrip().endswith(b"[stack]"):
                return int(line.split(b"-", 1)[0], 16)
    raise OSError(errno.ENOENT, "no stack is listed", "/proc/self/maps")


LINGER_S = 0.004  # longer than a short command


class SharedNumber:
    """A number in memory that a fork does not copy: what one side writes the other one reads, also after its end."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ctypes.sizeof(ctypes.c_int))  # man 2 mmap, MAP_SHARED | MAP_ANONYMOUS
        self._number = ctypes.c_int.from_buffer(self._memory)

    @property
    def value(self) -> int:
        """0 until somebody has written."""
        return self._number.value

    @property
    def address(self) -> int:
        """For the kernel to write to, in this process and in its forks."""
        return ctypes.addressof(self._number)


def rehearse_callback() -> None:
    """Have libffi get ready for the first callback: it then reads /proc/mounts, which is better not a container's."""
    _Entry(lambda _: 0)


def vfork_and_leave(flags: int, body: Callable[[], None], stack: int, told: SharedNumber) -> NoReturn:
    """Run `body` in a child that borrows this process's memory until its exec or end; then end this process, too.

    The kernel writes the child's number, as this process sees it, to `told` before the child begins: whatever is killed
    after that, the child is known. As man 2 vfork: nothing is copied, which is most of what a fork of this interpreter
    costs. The child changes the memory of a process that sleeps meanwhile, so that one does nothing with it but end; if
    the child is killed in the middle of a change, it does not matter. `body` has to end in an exec or `os._exit`.
    `stack` is where the child's stack begins (`lowest_stack_address`): in the same area as this thread's, because newer
    Pythons watch the bounds of that. Raises OSError when there is no child.
    """

    def run(_: object) -> int:
        try:
            body()
        finally:
            os._exit(1)

    entry = _Entry(run)
    word = ctypes.c_int(flags | CLONE_VM | CLONE_VFORK | CLONE_PARENT_SETTID | 17)
    if _held.clone(entry, ctypes.c_void_p(stack), word, None, ctypes.c_void_p(told.address)) < 0:
        raise _fail()
    try:
        os.closerange(0, 64)  # who waits for the ends of pipes need not wait for the end of the memory, too
        # Giving that back takes a CPU most of a millisecond, which the command and who waits for it can use now.
        time.sleep(LINGER_S)
    finally:
        os._exit(0)


def unshare(flags: int) -> None:
    """man 2 unshare."""
    if _libc.unshare(ctypes.c_int(flags)) != 0:
        raise _fail()


def setns(fd: int, nstype: int) -> None:
    """man 2 setns; `fd` may be a pidfd and `nstype` several flags (Linux 5.8)."""
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(nstype)) != 0:
        raise _fail()


def exchange(one: str, other: str) -> None:
    """man 2 renameat2, RENAME_EXCHANGE: each name gets what the other one had, in one step."""
    if _libc.renameat2(-100, _bytes(one), -100, _bytes(other), ctypes.c_uint(2)) != 0:
        raise _fail(one, other)


def setdomainname(name: str) -> None:
    """man 2 setdomainname: the NIS domain name of this UTS namespace."""
    data = name.encode()
    if _libc.setdomainname(data, ctypes.c_size_t(len(data))) != 0:
        raise _fail()


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """man 2 prctl for options with integer arguments."""
    result = int(_libc.prctl(option, arg2, arg3, arg4, arg5))
    if result < 0:
        raise _fail()
    return result


def set_name(name: bytes) -> None:
    """PR_SET_NAME: the name `ps` and `/proc/PID/comm` show, at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name[:15])
    _libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0)


def set_title(title: bytes) -> None:
    """Overwrite this process's arguments, which everybody can read in /proc/PID/cmdline (also inside a container, for
    a first process that stays ours). Uses arg_start and arg_end of man 5 proc_pid_stat; without them, does nothing."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
        start, end = int(fields[45]), int(fields[46])
    except (OSError, ValueError, IndexError):
        return
    if 0 < start < end:
        ctypes.memmove(start, title[: end - start - 1].ljust(end - start, b"\0"), end - start)


def mount(
    source: str | bytes | None,
    target: str | bytes,
    fstype: str | bytes | None,
    flags: int = 0,
    data: str | bytes | None = None,
) -> None:
    """man 2 mount."""
    if _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), flags, _bytes(data)) != 0:
        raise _fail(target)


def umount2(target: str | bytes, flags: int = 0) -> None:
    """man 2 umount2."""
    if _libc.umount2(_bytes(target), flags) != 0:
        raise _fail(target)


def pivot_root(new_root: str, put_old: str) -> None:
    """man 2 pivot_root."""
    if _libc.syscall(_long(_NR["pivot_root"]), _bytes(new_root), _bytes(put_old)) != 0:
        raise _fail(new_root, put_old)


def openat2(dir_fd: int, path: str, flags: int, *, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """man 2 openat2. With RESOLVE_IN_ROOT, `dir_fd` is the root for absolute links and `..` too (Linux 5.6)."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    fd = int(_libc.syscall(_long(_NR_OPENAT2), ctypes.c_int(dir_fd), _bytes(path), ctypes.byref(how), _ulong(24)))
    if fd < 0:
        raise _fail(path)
    return fd


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """man 2 close_range (Linux 5.9); where it is missing, the descriptors are closed one by one."""
    if last < first:
        return
    if _libc.syscall(_long(_NR_CLOSE_RANGE), _ulong(first), _ulong(last), _ulong(0)) != 0:
        os.closerange(first, min(last + 1, 65536))


def birth_time_ns(path: str | bytes) -> int:
    """When the file itself (a link is not followed) was made, man 2 statx; 0 where the file system does not tell."""
    found = (ctypes.c_ubyte * 256)()
    flags, mask = AT_SYMLINK_NOFOLLOW, STATX_BTIME
    words = (_long(AT_FDCWD), _bytes(path), _long(flags), _ulong(mask), ctypes.byref(found))
    if _libc.syscall(_long(_NR["statx"]), *words) != 0:
        raise _fail(path)
    answered, seconds, nanoseconds = struct.unpack_from("=I76xqI", found)
    return seconds * 1_000_000_000 + nanoseconds if answered & STATX_BTIME else 0


def tee(source: int, target: int, count: int, flags: int = SPLICE_F_NONBLOCK) -> int:
    """man 2 tee: copy what pipe `source` holds to pipe `target` without consuming it; returns bytes."""
    done = int(_libc.tee(source, target, count, flags))
    if done < 0:
        raise _fail()
    return done


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """man 2 capset for this process, with 64-bit masks."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low, high = 0xFFFFFFFF, 32
    words = (effective, permitted, inheritable)
    data = (ctypes.c_uint32 * 6)(*(w & low for w in words), *(w >> high for w in words))
    if _libc.syscall(_long(_NR["capset"]), ctypes.byref(header), ctypes.byref(data)) != 0:
        raise _fail()


def capget() -> tuple[int, int, int]:
    """man 2 capget of this process: (effective, permitted, inheritable) as 64-bit masks."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if _libc.syscall(_long(_NR["capget"]), ctypes.byref(header), ctypes.byref(data)) != 0:
        raise _fail()
    return data[0] | data[3] << 32, data[1] | data[4] << 32, data[2] | data[5] << 32


def zombie_rusage(pid: int) -> tuple[int, int]:
    """(CPU time in microseconds, ru_maxrss in KiB) of a child that has ended, which stays to be reaped; with those of
    its own waited-for children. Zeros while it runs. Source: man 2 waitid (the raw call's fifth argument), man 2
    getrusage. Raises ChildProcessError when it is not our child."""
    figures = (ctypes.c_long * 18)()
    # P_PID; WEXITED | WNOHANG | WNOWAIT. wait4 could not leave the zombie, which keeps the exit code.
    words = (_long(_NR["waitid"]), _long(1), _long(pid), None, _long(os.WEXITED | os.WNOHANG | os.WNOWAIT))
    if _libc.syscall(*words, ctypes.byref(figures)) != 0:
        raise _fail()
    return (figures[0] + figures[2]) * 1_000_000 + figures[1] + figures[3], figures[4]


def join_session_keyring() -> None:
    """man 2 keyctl, KEYCTL_JOIN_SESSION_KEYRING: a new anonymous session keyring."""
    if _libc.syscall(_long(_NR["keyctl"]), _long(KEYCTL_JOIN_SESSION_KEYRING), None) < 0:
        raise _fail()


def set_seccomp_filter(program: bytes) -> None:
    """man 2 seccomp: install an array of struct sock_filter. Needs no_new_privs or CAP_SYS_ADMIN."""
    fprog = _FilterProgram(len(program) // 8, program)
    if _libc.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(fprog), 0, 0) != 0:
        raise _fail()


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


AT_RECURSIVE = 0x8000
AT_EMPTY_PATH = 0x1000
MOUNT_ATTR_RDONLY = 0x01


def open_tree(path: str, *, recursive: bool = False) -> int:
    """A detached copy of the mount that `path` (also a file) lies on, as a descriptor (Linux 5.2); `recursive`, of what
    is mounted below, too. It goes away with its last user. Source: man 2 open_tree, OPEN_TREE_CLONE; needs
    CAP_SYS_ADMIN."""
    flags = os.O_CLOEXEC | 1 | (AT_RECURSIVE if recursive else 0)
    result: int = _libc.syscall(_long(_NR_OPEN_TREE), ctypes.c_int(-100), _bytes(path), ctypes.c_uint(flags))
    if result < 0:
        raise _fail(path)
    return result


def move_mount(fd: int, target: str | int) -> None:
    """Attach a mount that `open_tree` has made, here and at `target` (a path, or a descriptor of the place). Source:
    man 2 move_mount."""
    flags = 0x4 | (0x40 if isinstance(target, int) else 0)  # MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH
    place, path = (target, b"") if isinstance(target, int) else (-100, _bytes(target))
    if _libc.syscall(_long(_NR_MOVE_MOUNT), ctypes.c_int(fd), b"", ctypes.c_int(place), path, ctypes.c_uint(flags)) < 0:
        raise _fail(str(target))


def mount_setattr(dir_fd: int, path: str, flags: int, *, attr_set: int = 0, attr_clr: int = 0) -> None:
    """man 2 mount_setattr (Linux 5.12)."""
    attr = _MountAttr(attr_set, attr_clr, 0, 0)
    result = _libc.syscall(
        _long(_NR_MOUNT_SETATTR), ctypes.c_int(dir_fd), _bytes(path), _ulong(flags), ctypes.byref(attr), _ulong(32)
    )
    if result != 0:
        raise _fail(path)
