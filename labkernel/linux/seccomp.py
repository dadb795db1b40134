"""System call filters: a profile (rules as data), compiled to a BPF program by libseccomp, and its installation.

`compile` belongs into a service process (tens of milliseconds, needs libseccomp) and its result is kept by
`cached_program`; `install` belongs into the container's first process and only needs the bytes. A profile has the
form of Docker's JSON files (runtime-spec config-linux.md, "Seccomp", plus Docker's `includes` and `excludes`).
Source: man 2 seccomp, man 3 seccomp_rule_add.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DriverError, UsageError
from . import bpf, syscalls
from . import seccomp_default as default

TYPE_CHECKING = False  # as typing's, without importing it: the container's first process imports this module
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LIBSECCOMP_HINT = "install libseccomp (Debian, Ubuntu: `apt install libseccomp2`); until then no filter is set"

_ALLOW = "SCMP_ACT_ALLOW"
_ERRNO = "SCMP_ACT_ERRNO"
_OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")

# Machine -> names of pyseccomp.Arch: its own calling convention first, then those of its 32-bit programs.
_ARCHES: dict[str, tuple[str, ...]] = {
    "x86_64": ("X86_64", "X86", "X32"),
    "aarch64": ("AARCH64", "ARM"),
    "i686": ("X86",),
    "armv7l": ("ARM",),
    "ppc64le": ("PPC64LE",),
    "s390x": ("S390X", "S390"),
    "riscv64": ("RISCV64",),
}
_GO_ARCH = {"x86_64": "amd64", "aarch64": "arm64", "i686": "x86", "armv7l": "arm"}  # the words in Docker's files

# Machine -> number of seccomp(2).
_SECCOMP_NUMBERS = {
    "x86_64": 317,
    "aarch64": 277,
    "i686": 354,
    "armv7l": 383,
    "ppc64le": 358,
    "s390x": 348,
    "riscv64": 277,
}
_FIRST_COMMON_NUMBER = 424  # from here on every machine gives a new call the same number
_X32_BIT = 0x40000000


def docker_profile(capabilities: list[str] | tuple[str, ...] = (), machine: str | None = None) -> dict[str, object]:
    """Docker's default profile for a container with these capabilities (`CAP_…`) on this machine, already resolved:
    no `includes` are left. Shape: {"defaultAction", "defaultErrnoRet", "syscalls": [{"names", "action", "args"?}]}."""
    machine = machine or os.uname().machine
    names = set(default.ALWAYS.split())
    for words, machines in default.BY_MACHINE.items():
        if machine in machines:
            names.update(words.split())
    for capability, words in default.BY_CAPABILITY.items():
        if capability in capabilities:
            names.update(words.split())
    rules: list[dict[str, object]] = [{"names": sorted(names), "action": _ALLOW}]
    rules += [
        {"names": ["personality"], "action": _ALLOW, "args": [_argument(0, "EQ", value)]}
        for value in default.PERSONALITIES
    ]
    rules.append({"names": ["socket"], "action": _ALLOW, "args": [_argument(0, "NE", default.AF_VSOCK)]})
    if "CAP_SYS_ADMIN" not in capabilities:
        # the flags are clone's second argument on s390 (man 2 clone, "C library/kernel differences")
        flags = _argument(1 if machine == "s390x" else 0, "MASKED_EQ", default.NAMESPACE_FLAGS, 0)
        rules.append({"names": ["clone"], "action": _ALLOW, "args": [flags]})
        # clone3's flags lie in memory, where no filter can look: with ENOSYS the C library falls back to clone
        rules.append({"names": ["clone3"], "action": _ERRNO, "errnoRet": errno.ENOSYS})
    return {"defaultAction": _ERRNO, "defaultErrnoRet": errno.EPERM, "syscalls": rules}


def load_profile(path: str, capabilities: list[str] | tuple[str, ...] = ()) -> dict[str, object]:
    """A profile from a JSON file in Docker's format, with `includes` and `excludes` resolved for this machine and these
    capabilities. Raises UsageError when it cannot be read or is not a profile."""
    import json

    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as err:
        raise UsageError(f"opening seccomp profile ({path}) failed: {err.strerror}") from err
    except ValueError as err:
        raise UsageError(f"Decoding seccomp profile failed: {err}") from err
    if not isinstance(data, dict) or not isinstance(data.get("defaultAction"), str):
        raise UsageError(f"Decoding seccomp profile failed: {path} has no defaultAction")
    machine = os.uname().machine
    rules = [rule for rule in data.get("syscalls") or [] if _applies(rule, capabilities, machine)]
    for rule in rules:
        rule["names"] = rule.get("names") or [rule["name"]]
    return {
        "defaultAction": data["defaultAction"],
        "defaultErrnoRet": data.get("defaultErrnoRet", errno.EPERM),
        "syscalls": rules,
    }


def compile(profile: dict[str, object], machine: str | None = None) -> bytes:
    """The profile as a BPF program: an array of struct sock_filter (8 bytes each) for this machine.

    Takes some 70 ms for Docker's. Names that libseccomp does not know are left out, except recent ones, which are
    added by number; numbers newer than all known ones answer ENOSYS, so that programs fall back instead of failing.
    Raises DriverError when libseccomp is missing, UsageError for a profile it does not accept."""
    library = _library()
    machine = machine or os.uname().machine
    fallback = _action(library, str(profile["defaultAction"]), profile.get("defaultErrnoRet"))
    program = library.SyscallFilter(fallback)
    for name in _ARCHES.get(machine, ())[1:]:
        program.add_arch(getattr(library.Arch, name))
    # a binary tree over the numbers instead of a list: fewer instructions run per system call (libseccomp >= 2.5)
    _ignore_missing(lambda: program.set_attr(library.Attr.CTL_OPTIMIZE, 2))
    recent: dict[int, int] = {}
    rules = profile.get("syscalls")
    for rule in rules if isinstance(rules, list) else []:
        action = _action(library, str(rule["action"]), rule.get("errnoRet"))
        if action == fallback:
            continue  # libseccomp refuses a rule that says what the default says
        args = [_compile_argument(library, arg) for arg in rule.get("args") or []]
        for name in rule["names"]:
            if not _add_rule(program, action, name, args) and name in default.RECENT and not args:
                recent[default.RECENT[name]] = action
    fd = os.memfd_create("seccomp")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            program.export_bpf(file)
        os.lseek(fd, 0, os.SEEK_SET)
        exported = b""
        while chunk := os.read(fd, 1 << 16):
            exported += chunk
    finally:
        os.close(fd)
    return bpf.compact(_prologue(recent) + exported)


def cached_program(profile: dict[str, object], directory: str) -> str:
    """Path of the compiled profile in `directory`, compiled when it is not there yet. The key covers the profile (which
    holds the capabilities' effect), the machine and the version of libseccomp, so an upgrade compiles afresh."""
    import hashlib
    import json

    text = json.dumps(profile, sort_keys=True, separators=(",", ":"))
    key = f"2 {os.uname().machine} {library_version()} {text}"  # "2": change it with `compile`
    path = os.path.join(directory, hashlib.sha256(key.encode()).hexdigest()[:32] + ".bpf")
    if not os.path.exists(path):
        program = compile(profile)
        os.makedirs(directory, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(program)
        os.replace(temporary, path)
    return path


def install(program: bytes) -> None:
    """Put the filter on the calling thread and its future children; it cannot be taken off again.

    The caller has set no_new_privs before, or has CAP_SYS_ADMIN in its user namespace (else EACCES)."""
    if not program or len(program) % 8:
        raise OSError(errno.EINVAL, "not a BPF program")
    try:
        syscalls.set_seccomp_filter(program)
    except OSError as err:
        raise OSError(err.errno, err.strerror, "seccomp") from None


ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
"""A filter that lets everything through."""


def install_counted(program: bytes) -> int:
    """`install` of the same filter, which asks where it would have refused with EPERM; see `install_asking`."""
    return install_asking(_asking(program))


def install_asking(program: bytes) -> int:
    """`install` of a filter with SECCOMP_RET_USER_NOTIF in it; returns the descriptor at which it asks
    (man 2 seccomp_unotify). Raises OSError EBUSY when an outer filter has such a listener already."""
    import ctypes

    if not program:
        raise OSError(errno.ENOSYS, "not for this kind of processor", "seccomp")
    code = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SECCOMP_NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "seccomp")
    set_mode_filter, new_listener = 1, 8
    fd = libc.syscall(ctypes.c_long(number), set_mode_filter, new_listener, ctypes.c_void_p(ctypes.addressof(fprog)))
    if fd < 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed), "seccomp")
    return int(fd)


def _asking(program: bytes) -> bytes:
    """The program with SECCOMP_RET_USER_NOTIF in the place of each SECCOMP_RET_ERRNO|EPERM."""
    found = bytearray(program)
    for start in range(0, len(found), 8):
        code, _, _, value = struct.unpack_from("=HBBI", found, start)
        if code == 0x06 and value == 0x00050000 | errno.EPERM:  # BPF_RET | BPF_K
            struct.pack_into("=I", found, start + 4, 0x7FC00000)
    return bytes(found)


def call_name(key: str) -> str:
    """The name of a system call by its number on this machine (`165` -> `mount`); of a foreign one as it is."""
    if not key.isdigit():
        return f"system call {key}"
    try:
        library = _library()
        name = library.resolve_syscall(library.system_arch(), int(key))
    except (DriverError, ValueError, TypeError, AttributeError):
        return f"system call {key}"
    return name.decode() if isinstance(name, bytes) else str(name)


def library_version() -> str | None:
    """The version of libseccomp by its file name (`2.5.4`), None when it is missing. Nothing is loaded."""
    path = library_path()
    if path is not None:
        return os.path.basename(os.path.realpath(path)).removeprefix("libseccomp.so.")
    try:
        library = _library()
    except DriverError:
        return None
    return str(getattr(library, "__version__", "unknown"))


def library_path() -> str | None:
    """Where the library lies; None when it is in none of the usual places."""
    for directory in _library_directories():
        for name in _listing(directory):
            if name.startswith("libseccomp.so.2"):
                return f"{directory}/{name}"
    return None


def _library_directories() -> list[str]:
    machine = os.uname().machine
    triplets = (f"{machine}-linux-gnu", f"{machine}-linux-musl")
    return [*(f"/usr/lib/{triplet}" for triplet in triplets), "/usr/lib64", "/usr/lib", "/lib"]


def _listing(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.startswith("libseccomp")]
    except OSError:
        return []


def _library() -> Any:
    """The pyseccomp module. It needs the C library at import: RuntimeError or OSError then."""
    try:
        with _findable():
            import pyseccomp  # type: ignore[import-untyped]
    except (ImportError, RuntimeError, OSError) as err:
        raise DriverError(f"no system call filter can be compiled: {err}", resolution=LIBSECCOMP_HINT) from err
    return pyseccomp


@contextmanager
def _findable() -> Iterator[None]:
    """pyseccomp asks ldconfig's cache, then a compiler, for the library. Neither need be there: a small image has no
    cache, and no filter would be set although the library lies where `library_version` sees it."""
    import ctypes.util  # which loads subprocess

    find = ctypes.util.find_library
    ctypes.util.find_library = lambda name: find(name) or (library_path() if name == "seccomp" else None)
    try:
        yield
    finally:
        ctypes.util.find_library = find


def _argument(index: int, operator: str, value: int, value_two: int = 0) -> dict[str, object]:
    return {"index": index, "op": f"SCMP_CMP_{operator}", "value": value, "valueTwo": value_two}


def _compile_argument(library: Any, arg: dict[str, object]) -> Any:
    operator = str(arg.get("op", "")).removeprefix("SCMP_CMP_")
    if operator not in _OPERATORS:
        raise UsageError(f"seccomp profile: unknown operator {arg.get('op')!r}")
    return library.Arg(
        int(str(arg["index"])), getattr(library, operator), int(str(arg["value"])), int(str(arg.get("valueTwo") or 0))
    )


def _action(library: Any, name: str, number: object) -> int:
    word = name.removeprefix("SCMP_ACT_")
    if word == "ERRNO":
        return int(library.ERRNO(int(str(number)) if number is not None else errno.EPERM))
    if word == "TRACE":
        return int(library.TRACE(int(str(number or 0))))
    if word in ("ALLOW", "LOG", "KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP"):
        return int(getattr(library, word))
    raise UsageError(f"seccomp profile: unknown or unsupported action {name!r}")


def _add_rule(program: Any, action: int, name: str, args: list[object]) -> bool:
    """Whether libseccomp knew the name. On machines without the call it says so with EDOM, which is no fault."""
    try:
        program.add_rule(action, name, *args)
    except OSError as err:
        if err.errno == errno.EEXIST:
            return True
        if err.errno in (errno.EDOM, errno.EFAULT, errno.EINVAL):
            return False
        raise
    except ValueError:  # pyseccomp's word for a name it cannot resolve
        return False
    return True


def _ignore_missing(call: Callable[[], object]) -> None:
    try:
        call()
    except OSError:
        pass


def _applies(rule: dict[str, object], capabilities: list[str] | tuple[str, ...], machine: str) -> bool:
    """Docker's conditions: all of `includes` must hold, none of `excludes`."""
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    arch = _GO_ARCH.get(machine, machine)

    def words(condition: object, key: str) -> list[str]:
        return list(condition.get(key) or []) if isinstance(condition, dict) else []

    if words(includes, "arches") and arch not in words(includes, "arches"):
        return False
    if not all(name in capabilities for name in words(includes, "caps")):
        return False
    if arch in words(excludes, "arches"):
        return False
    return not any(name in capabilities for name in words(excludes, "caps"))


def _prologue(recent: dict[int, int]) -> bytes:
    """Instructions before libseccomp's: answers for recent numbers, then ENOSYS for numbers nobody knows yet.

    struct sock_filter {u16 code; u8 jt, jf; u32 k} (linux/filter.h). The number is at offset 0 of seccomp_data."""
    load_number = struct.pack("=HBBI", 0x20, 0, 0, 0)  # BPF_LD | BPF_W | BPF_ABS
    body = b""
    for number, action in sorted(recent.items()):
        body += struct.pack("=HBBI", 0x15, 0, 1, number) + struct.pack("=HBBI", 0x06, 0, 0, action)
    newest = max(default.RECENT.values())
    # x32 calls carry a high bit and are left to libseccomp's part
    body += struct.pack("=HBBI", 0x35, 2, 0, _X32_BIT)  # nr >= the bit: past the next two
    body += struct.pack("=HBBI", 0x25, 0, 1, newest)  # nr > newest known: ENOSYS
    body += struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | errno.ENOSYS)
    return load_number + body
