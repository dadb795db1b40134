"""What this machine allows, found by trying: one `Capability` for each thing the drivers need.

The tries run in a program of their own (`tries.py`); their verdict is kept in the runtime directory until the machine
boots another kernel, the user or their privileges change, or `fresh=True`. Programs, disk and memory are looked at each
time: that is cheap, and a remedy shall work at once. Left out: whether a guest boots under KVM (the VM service's).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import DriverError
from ..linux import landlock, nftables, seccomp
from . import foreign

TRIES_TIMEOUT_S = 60.0
LOW_DISK_BYTES = 2 << 30
LOW_MEMORY_BYTES = 512 << 20

_TRIES = str(Path(__file__).with_name("tries.py"))
_FORMAT = 1  # of the kept verdict

# Program -> (what it is for, Debian's package)
_PROGRAMS = {
    "newuidmap": ("ranges of user ids in rootless containers", "uidmap"),
    "slirp4netns": ("networks of rootless containers", "slirp4netns"),
    "pasta": ("networks of rootless containers", "passt"),
    "proot": ("driver proot (fetched into the store when it is missing)", "proot"),
}

_USERNS_REMEDY = (
    "ask an administrator for `sysctl -w kernel.unprivileged_userns_clone=1`, `user.max_user_namespaces` above 0 and, "
    "on Ubuntu 24.04, `kernel.apparmor_restrict_unprivileged_userns=0`; in a pod, for a seccomp profile that allows it"
)
_CGROUP_REMEDY = (
    "start the notebook as `systemd-run --user --scope -p Delegate=yes …` on a machine with cgroup v2, or as root"
)
_ROOT_REMEDY = "run as root, or use the rootless driver"
_MOUNT_REMEDY = "containers need a kernel that lets a user namespace mount; in a pod ask for an unconfined profile"


class Store(Protocol):
    """What is needed of a store's layout."""

    @property
    def root(self) -> Path: ...
    @property
    def runtime_dir(self) -> Path: ...


class Capability(NamedTuple):
    """One thing tried: `ok`, and where not, the kernel's `errno` (None: no system call failed), `cause` and `remedy`.

    `cause` also carries a figure where the thing is there (free disk, the version of a library)."""

    name: str
    ok: bool
    errno: int | None = None
    cause: str = ""
    remedy: str = ""
    needed_for: str = ""

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


def probe(store: Store, *, fresh: bool = False) -> list[Capability]:
    """Every capability, sandbox first. Below 5 ms when the verdict is kept, some 200 ms when it is not.

    Effects: short-lived child processes, a directory below the store's tmp/, cgroups below `labkernel/` for a moment.
    Raises DriverError when the program with the tries itself cannot run."""
    answers = tried(store, fresh=fresh)
    return [
        *_sandbox(answers),
        *_cgroups(answers["cgroup"]),
        *_filters(answers),
        *_programs(),
        _foreign(),
        *_networks(),
        *_room(store),
    ]


def tried(store: Store, *, fresh: bool = False) -> dict[str, Any]:
    """The raw answers of the tries, kept or new."""
    kept = store.runtime_dir / "probe.json"
    key = _key(store)
    if not fresh:
        try:
            data = json.loads(kept.read_bytes())
            if data["key"] == key:
                found: dict[str, Any] = data["answers"]
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass
    answers = _run_tries(store)
    temporary = kept.with_name(f"probe.json.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"key": key, "answers": answers}))
        os.replace(temporary, kept)
    except OSError:  # a full or read-only runtime directory costs the next caller a new probe, no more
        temporary.unlink(missing_ok=True)
    return answers


def _key(store: Store) -> list[Any]:
    """What a kept verdict depends on."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    with open("/proc/self/status") as file:
        privileges = [
            line for line in file.read().splitlines() if line.startswith(("CapEff", "NoNewPrivs", "Seccomp:"))
        ]
    ranges = [_mtime(path) for path in ("/etc/subuid", "/etc/subgid")]
    own_group = Path("/proc/self/cgroup").read_text() if os.path.exists("/proc/self/cgroup") else ""
    # Of version 2 only: a v1 group's path says nothing about what may be written, and may be a new one each time.
    delegated = [line for line in own_group.splitlines() if line.startswith("0::")]
    helper = shutil.which("newuidmap") or ""
    release = os.uname().release
    return [_FORMAT, boot, release, os.geteuid(), os.getegid(), privileges, ranges, delegated, helper, str(store.root)]


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _run_tries(store: Store) -> dict[str, Any]:
    scratch_root = store.root / "tmp"
    scratch_root.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="probe-", dir=scratch_root)
    try:
        line = [sys.executable, "-I", "-S", _TRIES, scratch]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=TRIES_TIMEOUT_S)
        found: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        raise DriverError(
            f"this machine could not be probed: {err}", resolution="`labkernel doctor` tries again"
        ) from err
    finally:
        _remove_scratch(scratch)
    return found


def _remove_scratch(path: str) -> None:
    # overlay leaves a work directory of mode 000 behind
    for directory, names, _ in os.walk(path):
        for name in names:
            try:
                os.chmod(os.path.join(directory, name), 0o700)
            except OSError:
                pass
    shutil.rmtree(path, ignore_errors=True)


def _capability(name: str, answer: list[Any] | None, remedy: str, needed_for: str) -> Capability:
    if answer is None:
        return Capability(name, ok=True, needed_for=needed_for)
    number, cause = answer
    return Capability(name, ok=False, errno=number or None, cause=str(cause), remedy=remedy, needed_for=needed_for)


def _sandbox(answers: dict[str, Any]) -> list[Capability]:
    """With root's own words where root's tries worked, otherwise those inside a user namespace."""
    as_root = answers["root"]["mount"] is None
    best = answers["root"] if as_root else answers["user"]
    user = answers["user"]
    found = [
        _capability("root privileges", answers["root"]["mount"], _ROOT_REMEDY, "driver root"),
        _capability("user namespace", user["user namespace"], _USERNS_REMEDY, "driver rootless"),
        _capability(
            "id ranges",
            answers["id ranges"],
            "`apt install uidmap` and `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER`",
            "more than one user inside rootless containers",
        ),
        _capability("mount", best["mount"], _MOUNT_REMEDY, "every container"),
        _capability("overlay", best["overlay"], "Linux 5.11 or newer; the store on ext4, xfs or btrfs", "fast root file"
                    " systems (else a copy for each container)"),
        _capability("proc mount", best["proc mount"], "a /proc that nothing masks; in a pod ask for procMount: "
                    "Unmasked", "/proc inside containers"),
        _capability("mknod", best["mknod"], _ROOT_REMEDY, "device nodes inside containers (else they are bound)"),
    ]  # fmt: skip
    if as_root:
        found.append(
            _capability(
                "overlay rootless",
                user["overlay"] or user["mount"],
                "Linux 5.11 or newer; the store on ext4, xfs or btrfs",
                "driver rootless",
            )
        )
    for name in ("pid", "network", "ipc", "uts", "cgroup"):
        key = f"{name} namespace"
        found.append(_capability(key, best[key], _USERNS_REMEDY, f"{name} namespaces of containers"))
    return found


def _cgroups(answers: dict[str, Any]) -> list[Capability]:
    needs = {
        "memory": "--memory",
        "cpu": "--cpus",
        "cpuacct": "CPU figures",
        "pids": "--pids-limit",
        "freezer": "pause",
        "blkio": "--blkio-weight and disk figures",
        "devices": "device nodes that a container may not make",
        "cpuset": "--cpuset-cpus",
    }
    controllers = answers["controllers"]
    return [_capability(f"cgroup {name}", controllers.get(name), _CGROUP_REMEDY, needs[name]) for name in needs]


def _filters(answers: dict[str, Any]) -> list[Capability]:
    version = seccomp.library_version()
    return [
        _capability("seccomp", answers["seccomp"], "a kernel with CONFIG_SECCOMP_FILTER", "system call filters"),
        Capability(
            "libseccomp",
            ok=version is not None,
            cause=version or "the library is not installed",
            remedy="" if version else seccomp.LIBSECCOMP_HINT,
            needed_for="system call filters",
        ),
        _capability("ptrace", answers["ptrace"], "in a pod ask for a profile that allows ptrace", "driver proot"),
        _landlock(),
        _capability(
            "kvm device", answers["kvm"], "add the user to the group `kvm`, or enable virtualization", "fast guests"
        ),
    ]


def _landlock() -> Capability:
    version = landlock.version()
    ok = version >= landlock.LEAST_VERSION
    remedy = "" if ok else "Linux 5.19 or newer with CONFIG_SECURITY_LANDLOCK, in a pod a profile that allows it"
    cause = f"version {version}" if version else "not in this kernel, or forbidden"
    return Capability("landlock", ok, None, cause, remedy, "files closed to containers of the driver proot")


def _programs() -> list[Capability]:
    found = []
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    for name, (needed_for, package) in _PROGRAMS.items():
        where = shutil.which(name, path=path)
        remedy = "" if where else f"`apt install {package}`"
        found.append(Capability(name, where is not None, None, where or f"no {name} in PATH", remedy, needed_for))
    return found


def _foreign() -> Capability:
    ok, cause, remedy = foreign.report()
    return Capability(
        "foreign architectures",
        ok,
        None,
        cause,
        remedy,
        "images of other machines (--platform); proot needs qemu-user alone",
    )


def _networks() -> list[Capability]:
    rules, tun = nftables.is_there(), os.access("/dev/net/tun", os.R_OK | os.W_OK)
    return [
        Capability(
            "nftables",
            ok=rules,
            cause="" if rules else "neither libnftables nor nft is installed",
            remedy="" if rules else "`apt install nftables`",
            needed_for="the way out of containers' networks, and their isolation",
        ),
        Capability(
            "tun device",
            ok=tun,
            cause="" if tun else "/dev/net/tun is not there, or this user may not open it",
            remedy="" if tun else "ask an administrator for `chmod 0666 /dev/net/tun`, which is Debian's default",
            needed_for="the way out of rootless containers' networks",
        ),
    ]


def _room(store: Store) -> list[Capability]:
    shared = _shared_file_system(store.root)
    disk = shutil.disk_usage(store.root).free
    memory = _available_memory()
    return [
        Capability(
            "local store",
            ok=shared is None,
            cause=f"{store.root} lies on {shared}" if shared else "",
            remedy="set LABKERNEL_ROOT to a directory on a local disk" if shared else "",
            needed_for="overlay, and several processes on one database",
        ),
        Capability(
            "disk space",
            ok=disk >= LOW_DISK_BYTES,
            cause=f"{disk / 1e9:.1f} GB free below {store.root}",
            remedy="" if disk >= LOW_DISK_BYTES else "free some space, or set LABKERNEL_ROOT to another disk",
            needed_for="images",
        ),
        Capability(
            "memory",
            ok=memory >= LOW_MEMORY_BYTES,
            cause=f"{memory / (1 << 20):.0f} MiB available",
            remedy="" if memory >= LOW_MEMORY_BYTES else "end other programs; guests need 256 MiB and more",
            needed_for="containers and guests",
        ),
    ]


def _shared_file_system(path: Path) -> str | None:
    """The type of the mount `path` lies on when that is a network's, by the longest mount point (man 5 proc)."""
    kinds = {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse.sshfs"}
    best, kind = "", ""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            point = left.split(" ")[4].replace("\\040", " ")
            if len(point) >= len(best) and (f"{path}/".startswith(point.rstrip("/") + "/")):
                best, kind = point, right.split(" ")[0]
    return kind if kind in kinds else None


def _available_memory() -> int:
    """What this process may still use: the machine's, or less when a cgroup says so (a pod)."""
    available = 0
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_path).read_text().strip(), Path(used_path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            available = min(available, max(0, int(limit) - int(used)))
    return available
