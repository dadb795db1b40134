"""What the driver proot needs before its first container, and how a container's config is made for it.

PRoot comes from PATH, or from the store where `prootsetup` has put Debian's package. Beside it lie what PRoot carries
inside itself (its loaders, which it would else write to /tmp at each start) and the shim. Source: proot(1).
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DriverError
from ..linux import elf, landlock
from .devicelimits import RATES

REMEDY = "`apt install proot` (in binder/apt.txt: proot), or put a `proot` on PATH"

# The first program inside: forks; the child closes descriptor 3 and execs argv[1] with argv[2:] and the environment
# without its first four variables; the parent blocks all signals, waits, writes the wait status to descriptor 3, ends.
# x86-64, position-independent, no data; from 60 lines of assembly (docs/proot.md).
_SHIM_CODE = bytes.fromhex(
    "4c8b24244c8d6c24104e8d74e430b8390000000f0585c07452787c89c34883ec1048c70424ffffffffb80e00000031ff4889e631d241ba0800"
    "00000f05b83d00000089df4889e631d24531d20f0583f8fc74eab801000000bf030000004889e6ba040000000f0531ffeb31b803000000bf03"
    "0000000f05b83b000000498b7d00498d75084c89f20f05bf7e00000083f8fe7509ffc7eb05bf7d000000b8e70000000f05"
)
_BASE = 0x400000


# Settings that are accepted and do nothing, and what they are called on the command line.
_IGNORED = (
    ("sysctls", "--sysctl"),
    ("domainname", "--domainname"),
    ("group_add", "--group-add"),
    ("device_cgroup_rules", "--device-cgroup-rule"),
    ("shm_size", "--shm-size"),
    ("oom_kill_disable", "--oom-kill-disable"),
    ("count_denials", "--count-denials"),
    ("cgroup_parent", "--cgroup-parent"),
)


def find(root: Path) -> str | None:
    """PRoot on PATH, or the store's own."""
    own = root / "proot" / "usr" / "bin" / "proot"
    return shutil.which("proot") or (str(own) if os.access(own, os.X_OK) else None)


def prepare(root: Path) -> dict[str, str]:
    """Paths of program, loaders, shim and (of the store's own PRoot) libraries; writes what is missing below
    `root`/proot. Raises DriverError."""
    program = find(root)
    if program is None:
        raise DriverError("the driver proot needs the program proot", resolution=REMEDY)
    if os.uname().machine != "x86_64":
        raise DriverError(
            f"the driver proot does not work on {os.uname().machine} in this release",
            resolution="use a machine that allows user namespaces; `labkernel doctor` says what is missing",
        )
    folder = root / "proot"
    status = os.stat(program)
    mark = f"{status.st_size:x}-{status.st_mtime_ns:x}"
    found = {"program": os.path.realpath(program), "shim": str(folder / f"shim-{zlib.crc32(_SHIM_CODE):08x}")}
    found |= {"loader": str(folder / f"loader-{mark}"), "loader32": str(folder / f"loader32-{mark}"), "libraries": ""}
    if program.startswith(f"{folder}/"):
        found["libraries"] = ":".join(map(str, sorted(folder.glob("usr/lib/*-linux-gnu"))))
    if not all(os.path.exists(found[key]) for key in ("loader", "shim")):
        folder.mkdir(exist_ok=True)
        for elf_class, data in _embedded(Path(program).read_bytes()):
            _write(found["loader" if elf_class == 2 else "loader32"], data)
        _write(found["shim"], shim())
        if not os.path.exists(found["loader"]):
            raise DriverError(f"{program} is not the PRoot this release knows: it has no loader", resolution=REMEDY)
    if not os.path.exists(found["loader32"]):
        found["loader32"] = ""
    return found


def shim() -> bytes:
    """The shim as an ELF program of one segment (man 5 elf)."""
    size = 0x78 + len(_SHIM_CODE)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1" + bytes(9), 2, 62, 1, _BASE + 0x78, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000) + _SHIM_CODE


def _embedded(data: bytes) -> list[tuple[int, bytes]]:
    """(ELF class, bytes) of the programs inside a program."""
    found = []
    at = 0
    while (at := data.find(b"\x7fELF", at + 1)) > 0:
        kind = data[at + 4]
        if kind == 2:
            offset, (size, count) = struct.unpack_from("<Q", data, at + 40)[0], struct.unpack_from("<HH", data, at + 58)
        elif kind == 1:
            offset, (size, count) = struct.unpack_from("<I", data, at + 32)[0], struct.unpack_from("<HH", data, at + 46)
        else:
            continue
        end = at + offset + size * count
        if offset and end <= len(data) and 0 < end - at < 1 << 20:
            found.append((kind, data[at:end]))
    return found


def _write(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o755)
    try:
        os.write(fd, data)
        os.fchmod(fd, 0o755)
    finally:
        os.close(fd)
    os.rename(temporary, path)


def emulator(architecture: str) -> str:
    """The program that executes those of another architecture under PRoot (proot(1), -q); "" where there is none, and
    where none is needed. One with a dynamic loader would need the machine's libraries inside."""
    if not architecture or architecture not in elf.MACHINES or elf.native(architecture):
        return ""
    found = (shutil.which(name) for name in elf.emulator_names(architecture))
    return next((os.path.realpath(path) for path in found if path and elf.is_static(path)), "")


def adapt(config: dict[str, Any], root: Path, architecture: str = "") -> None:
    """Make a runtime-spec config one of this driver: what cannot be had is not asked for. `architecture`: the
    image's."""
    linux = config["linux"]
    linux.update(namespaces=[], maskedPaths=[], readonlyPaths=[])
    # A node cannot be made, but the machine's own be shown; what its user may not open stays closed.
    config["mounts"] += [
        {
            "destination": node["path"],
            "type": "bind",
            "source": node["source"],
            "options": ["bind"] if "w" in node["access"] else ["bind", "ro"],
        }
        for node in linux.pop("devices", ())
    ]
    own = config["labkernel"]
    limit = (linux.get("resources") or {}).get("memory", {}).get("limit")
    own.update(seccomp_program=None, cgroup_parent="", init=False)
    own["proot"] = {**prepare(root), "data_bytes": limit}
    qemu = emulator(architecture)
    if qemu:
        own["proot"].update(emulator=qemu, emulated=architecture)
    config["process"]["capabilities"] = None


def isolation() -> dict[str, str]:
    """What a container of this driver has, by name: `kernel`, `per-process`, `best-effort` or `none`."""
    files = "kernel" if landlock.version() >= landlock.LEAST_VERSION else "best-effort"
    return {
        "files": files,
        "processes": "none",
        "network": "none",
        "ipc": "none",
        "hostname": "none",
        "users": "none",
        "system calls": "none",
    }


def warnings(settings: Mapping[str, Any], *, network: str) -> list[str]:
    """What of a container's isolation and settings is missing or weaker than it sounds."""
    levels = isolation()
    files = (
        "kernel (Landlock)"
        if levels["files"] == "kernel"
        else "best-effort (a program can leave its root: this kernel has no Landlock 2)"
    )
    found = [
        "driver proot: isolation of files: "
        + files
        + "; of "
        + ", ".join(name for name, level in levels.items() if level == "none")
        + ": none"
    ]
    if any(settings.get(key) for key in ("mem_limit", "mem_reservation", "memswap_limit")):
        found.append("the memory limit is per-process here (RLIMIT_DATA): several processes can use more together")
    if any(settings.get(key) for key in ("nano_cpus", "cpu_quota", "cpu_shares", "cpu_period", "cpuset_cpus")):
        found.append("the CPU limit: none (driver proot)")
    if settings.get("pids_limit"):
        found.append("the pids limit: none (driver proot)")
    if any(settings.get(key) for key in ("blkio_weight", "blkio_weight_device", *RATES)):
        found.append("the blkio limit: none (driver proot)")
    if network == "none":
        found.append("--network none: none (driver proot): the container sees this machine's network")
    if settings.get("ports") or settings.get("publish_all_ports"):
        found.append("published ports are not translated: a server is reached at its own port on this machine")
    if settings.get("cap_add") or settings.get("privileged"):
        found.append("capabilities: none (driver proot): root inside is an ordinary user")
    found += [f"{flag}: none (driver proot)" for key, flag in _IGNORED if settings.get(key)]
    if settings.get("tmpfs") or any(mount.get("type") == "tmpfs" for mount in settings.get("mounts") or ()):
        found.append("--tmpfs: a directory on the disk, of no bounded size (driver proot)")
    if files != "kernel (Landlock)" and (settings.get("read_only") or _has_read_only(settings)):
        found.append("read-only mounts and root: none (driver proot without Landlock)")
    return found


def _has_read_only(settings: Mapping[str, Any]) -> bool:
    mounts = [*(settings.get("volumes") or ()), *(settings.get("mounts") or ())]
    return any("ro" in str(mount.get("mode", "")).split(",") for mount in mounts)
