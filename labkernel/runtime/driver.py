"""The driver: how containers are made on this machine. Chosen by the probe, or named and then checked by it.

`root` does what Docker does; `rootless` does the same inside a user namespace; `proot` translates paths, where neither
namespaces nor mounts are allowed.
A `Driver` is a value: what it is called, what it can enforce, what it protects from.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import DriverError
from .probe import Capability, Store, probe

NAMES = ("root", "rootless", "proot")

_DESCRIBES = {
    "root": (
        "Containers are made by root, as Docker does it: own namespaces, 14 capabilities, Docker's system call filter, "
        "masked /proc and /sys, cgroup limits. Protects from mistakes, from runaway memory, CPU and processes, and "
        "from programs that do not attack the kernel. Does not protect from an attack on the kernel, which is shared "
        "and sees the container's root as root; and who may use this store is root on this machine."
    ),
    "rootless": (
        "Containers are made inside a user namespace: root in a container is an ordinary user of the machine. A "
        "program that breaks out has this user's rights and files, not root's. Limits hold only where a cgroup is "
        "delegated; elsewhere a container can use up this user's memory and processes. The kernel is shared and can "
        "be attacked."
    ),
    "proot": (
        "Containers are ordinary processes of this user whose paths PRoot translates (ptrace): no namespaces, no "
        "mounts, no privileges. Where the kernel has Landlock 2, it closes all files outside of the container's own "
        "and its volumes, and the memory of processes outside; without it a program that wants to can leave its root. "
        "Not protected: the container sees this machine's processes and can signal this user's, shares its network, "
        "hostname and IPC, and its root is only shown, not real. Memory limits hold per process, limits of CPU and "
        "processes not at all. For learning and for programs that are trusted."
    ),
}

_PROOT_WARNINGS = (
    "no overlay: each container gets a copy of its image (driver proot)",
    "the memory limit is per-process, other limits are not enforced (driver proot)",
    "containers share this machine's processes, network and hostname (driver proot)",
)


@dataclass(frozen=True)
class Driver:
    """What containers are made with.

    `id_mapping`: `full` (the machine's ids), `subuid` (a range of them) or `single` (one id). `overlay`: `overlay`,
    `overlay-userxattr` or `copy`. `cgroups`: controller -> `kernel`, `per-process` or
    `none`. `warnings`: what works less well here.
    """

    name: str
    id_mapping: str
    cgroup_version: int
    cgroups: dict[str, str]
    overlay: str
    seccomp: bool
    warnings: tuple[str, ...] = ()
    capabilities: tuple[Capability, ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def describes(self) -> str:
        """What this driver protects from and what not, for people."""
        return _DESCRIBES[self.name]

    @cached_property
    def probe(self) -> tuple[Capability, ...]:
        """The capabilities the choice was made on."""
        return self.capabilities

    @property
    def enforced(self) -> bool:
        """Whether the kernel enforces memory, CPU and process limits here."""
        return all(self.cgroups.get(name) == "kernel" for name in ("memory", "cpu", "pids"))

    @property
    def userxattr(self) -> bool:
        """Whether overlay keeps its marks in `user.` attributes: always so under rootless, with a copy, too."""
        return self.name != "root"

    @property
    def single_id(self) -> bool:
        """Whether only one user id exists in a container."""
        return self.id_mapping == "single"


def choose_driver(store: Store, name: str | None = None) -> Driver:
    """The driver `name`, else the one LABKERNEL_DRIVER names, else the first this machine allows.

    Raises DriverError for an unknown name, and with reason and remedy when the machine does not allow it."""
    asked = name or os.environ.get("LABKERNEL_DRIVER") or None
    if asked is not None and asked not in NAMES:
        hint = f"the drivers are {', '.join(NAMES)}"
        raise DriverError(f"unknown driver: {asked}", resolution=hint)
    found = probe(store)
    by_name = {capability.name: capability for capability in found}
    refusals: list[str] = []
    for candidate in (asked,) if asked else NAMES:
        missing = _missing(candidate, by_name)
        if missing is None:
            return _driver(candidate, by_name, tuple(found))
        refusals.append(f"{candidate}: {missing.name}: {missing.cause}")
        last = missing
    raise DriverError(
        f"the driver {asked} does not work here" if asked else "no driver works on this machine",
        details="\n".join(refusals),
        resolution=last.remedy or "`labkernel doctor` lists what was tried",
    )


def cgroup_parent(store: Store) -> str:
    """The group below which the store's containers have theirs: `/labkernel/<8 hex>`."""
    return f"/labkernel/{hashlib.sha256(os.fsencode(store.root)).hexdigest()[:8]}"


def _missing(name: str, by_name: dict[str, Capability]) -> Capability | None:
    """The first thing the driver needs and does not have."""
    if name == "proot":
        needed = ["ptrace"]
    elif name == "root":
        needed = ["root privileges", "mount", "proc mount", "pid namespace", "network namespace", "ipc namespace"]
    else:
        needed = ["user namespace"]
        # As root the other answers speak of root's own try; inside the user namespace only overlay's is known apart.
        if not by_name["root privileges"].ok:
            needed += ["mount", "proc mount", "pid namespace", "network namespace", "ipc namespace"]
    return next((by_name[key] for key in needed if not by_name[key].ok), None)


def _driver(name: str, by_name: dict[str, Capability], found: tuple[Capability, ...]) -> Driver:
    if name == "proot":
        controllers = [key.removeprefix("cgroup ") for key in by_name if key.startswith("cgroup ")]
        nothing = dict.fromkeys(controllers, "none") | {"memory": "per-process"}
        return Driver(name, "single", 0, nothing, "copy", seccomp=False, warnings=_PROOT_WARNINGS, capabilities=found)
    cgroups = {
        key.removeprefix("cgroup "): "kernel" if capability.ok else "none"
        for key, capability in by_name.items()
        if key.startswith("cgroup ") and key != "cgroup namespace"
    }
    version = (2 if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else 1) if "kernel" in cgroups.values() else 0
    overlay = by_name.get("overlay rootless", by_name["overlay"]) if name == "rootless" else by_name["overlay"]
    kind = "copy" if not overlay.ok else "overlay" if name == "root" else "overlay-userxattr"
    if not by_name["local store"].ok:
        kind = "copy"
    mapping = "full" if name == "root" else "subuid" if by_name["id ranges"].ok else "single"
    filters = by_name["seccomp"].ok and by_name["libseccomp"].ok
    warnings = [f"limits are not enforced: cgroup {key}: {by_name[f'cgroup {key}'].cause}"
                for key in ("memory", "cpu", "pids") if cgroups.get(key) != "kernel"]  # fmt: skip
    if len(warnings) == 3:
        warnings = [f"no limit is enforced here: {by_name['cgroup memory'].cause}"]
    if kind == "copy":
        warnings.append(
            f"no overlay: each container gets a copy of its image ({overlay.cause or 'shared file system'})"
        )
    if not filters:
        missing = by_name["seccomp"] if not by_name["seccomp"].ok else by_name["libseccomp"]
        warnings.append(f"containers run without a system call filter: {missing.cause}")
    return Driver(name, mapping, version, cgroups, kind, filters, tuple(warnings), found)
