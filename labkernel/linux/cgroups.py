"""Control groups: find the hierarchies, make a group, set its limits, join, freeze, kill, read, remove.

Knows version 1 (one directory tree per controller), version 2 (one tree) and the hybrid of both; the limits come in
the words of the OCI runtime-spec (config-linux.md, "Control groups"), which are version 1's, and are translated for
version 2. The root of the mounts is an argument, so everything here also runs on a temporary directory. Left out:
systemd's D-Bus interface. Standard library only: every container start goes through this module.

Sources: man 7 cgroups; kernel Documentation admin-guide/cgroup-v1 and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from .limits import DEVICE_RULES, V2_NAMES, device_changes, translate

MOUNT_ROOT = "/sys/fs/cgroup"

# What a container gets a directory in. `devices` is asked for where it exists: CAP_MKNOD is one of Docker's default
# capabilities, and only this controller keeps a container from reading the host's disk through a node of its own.
CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer", "blkio", "devices", "cpuset")

_LEAF = "labkernel.leaf"  # where processes go that stand in the way of the no-internal-process rule


class Cgroup:
    """One container's group: `paths` maps controller to directory (v1), or "" to the only directory (v2).

    `unenforced` lists what `limit` could not set, each as (setting, reason).
    """

    __slots__ = ("_cpuset", "paths", "unenforced", "version")

    def __init__(self, version: int, paths: dict[str, str]) -> None:
        self.version = version
        self.paths = paths
        self._cpuset: tuple[str, str] | None = None  # v1: (base, directory), made when a limit asks for it
        self.unenforced: list[tuple[str, str]] = []

    @classmethod
    def reopen(cls, paths: dict[str, str]) -> Cgroup:
        """The group whose paths a state file has kept; nothing is touched, and no paths mean no group."""
        return cls(0 if not paths else 2 if "" in paths else 1, dict(paths))

    @property
    def directories(self) -> list[str]:
        """Each directory once: `cpu` and `cpuacct` are often one hierarchy."""
        return list(dict.fromkeys(self.paths.values()))

    def join(self, pid: int = 0) -> None:
        """Move process `pid` (0: the caller, which has one thread) into the group. Raises OSError: EBUSY, ESRCH,
        ENOSPC (empty cpuset).

        Moving a whole process locks out every fork and exec of the machine, and waits for an RCU grace period to do
        so: 5 to 15 ms. A thread that moves itself needs no such lock, and version 1 has a file for that."""
        name = "tasks" if self.version == 1 and pid == 0 else "cgroup.procs"
        for directory in self.directories:
            _write(f"{directory}/{name}", str(pid))

    def procs(self) -> list[int]:
        """Process ids in the group and the groups below it, as numbered in the caller's pid namespace."""
        first = self.paths.get("") or self.paths.get("pids") or next(iter(self.paths.values()), None)
        if first is None:
            return []
        return sorted({int(line) for path, _, _ in os.walk(first) for line in _lines(f"{path}/cgroup.procs")} - {0})

    def kill(self) -> None:
        """SIGKILL for everything in the group, also when it is frozen. Returns before they are gone."""
        if self.version == 2 and _try_write(f"{self.paths['']}/cgroup.kill", "1"):
            return
        for _ in range(50):  # a fork bomb may outrun one pass; a frozen one cannot, so later passes freeze first
            pids = self.procs()
            if not pids:
                return
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            self.thaw()  # a frozen process of v1 only dies once it runs again
            time.sleep(0.002)

    def freeze(self, *, timeout_s: float = 5.0) -> None:
        """Stop all processes and wait until they are stopped. Raises OSError: ENOTSUP without a freezer, ETIMEDOUT."""
        self._set_frozen(wanted=True, timeout_s=timeout_s)

    def thaw(self) -> None:
        """Let them run again; without effect when they do, or when there is no freezer."""
        try:
            self._set_frozen(wanted=False, timeout_s=1.0)
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ENOTSUP, errno.ENODEV, errno.ETIMEDOUT):
                raise

    def _set_frozen(self, *, wanted: bool, timeout_s: float) -> None:
        if self.version == 2:
            path, value = f"{self.paths['']}/cgroup.freeze", "1" if wanted else "0"
        elif "freezer" in self.paths:
            path, value = f"{self.paths['freezer']}/freezer.state", "FROZEN" if wanted else "THAWED"
        else:
            raise OSError(errno.ENOTSUP, "no freezer cgroup")
        _write(path, value)
        deadline = time.monotonic() + timeout_s
        while self.frozen() != wanted:
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "the processes did not stop in time", path)
            time.sleep(0.001)
            if self.version != 2 and wanted:
                _write(path, value)  # v1 may rest at FREEZING until it is asked again

    def frozen(self) -> bool:
        """Whether all processes are stopped; False without a freezer."""
        if self.version == 2:
            return _keyed(f"{self.paths['']}/cgroup.events").get("frozen") == 1
        if "freezer" not in self.paths:
            return False
        return (_read(f"{self.paths['freezer']}/freezer.state") or "").strip() == "FROZEN"

    def oom_count(self) -> int:
        """How many processes of this group the kernel killed for memory; 0 without a memory controller."""
        if self.version == 2:
            return _keyed(f"{self.paths['']}/memory.events").get("oom_kill", 0)
        if "memory" not in self.paths:
            return 0
        return _keyed(f"{self.paths['memory']}/memory.oom_control").get("oom_kill", 0)

    def figures(self) -> dict[str, int]:
        """What the group has used: cpu_usec, throttled_usec, memory_bytes, memory_peak_bytes, memory_limit_bytes,
        io_read_bytes, io_write_bytes, pids; a figure without its controller is absent. For a fast and repeated
        reading keep descriptors instead (metrics)."""
        return _figures_v2(self.paths[""]) if self.version == 2 else _figures_v1(self.paths)

    def limit(self, resources: dict[str, dict[str, object]]) -> None:
        """Write the limits of a runtime-spec `linux.resources`. What the kernel lacks goes to `unenforced`.

        Raises OSError when the kernel refuses a value it understands (EINVAL, EBUSY)."""
        cpu = resources.get("cpu") or {}
        if self._cpuset is not None and (cpu.get("cpus") or cpu.get("mems")):
            self._add_cpuset(*self._cpuset)
        for controller, name, value, setting in translate(resources, version=self.version or 1):
            directory = self.paths.get("" if self.version == 2 else controller)
            if directory is None:
                self.unenforced.append((setting, f"no {controller} cgroup"))
                continue
            try:
                _write(f"{directory}/{name}", value)
            except OSError as err:
                # memory.memsw.* and io.weight depend on how the kernel was built and started
                if err.errno not in (errno.ENOENT, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                self.unenforced.append((setting, f"{name}: {os.strerror(err.errno)}"))
        self._limit_devices(resources.get("devices") or [])

    def _add_cpuset(self, base: str, directory: str) -> None:
        """Make the cpuset group of v1 and move the processes there that are in the group already."""
        os.makedirs(directory, 0o755, exist_ok=True)
        _inherit_cpuset(directory, base)
        for pid in self.procs():
            _write(f"{directory}/cgroup.procs", str(pid))
        self.paths["cpuset"] = directory
        self._cpuset = None

    def _limit_devices(self, rules: object) -> None:
        if not isinstance(rules, list) or not rules:
            return
        if self.version == 2:
            from .devices import attach_rules  # a BPF program; only here

            try:
                attach_rules(self.paths[""], rules)
            except OSError as err:
                self.unenforced.append(("devices", f"bpf: {err.strerror}"))
            return
        directory = self.paths.get("devices")
        if directory is None:
            self.unenforced.append(("devices", "no devices cgroup"))
            return
        try:
            _write_device_rules(directory, rules)
        except PermissionError:
            self._widen_devices(directory, rules)

    def _widen_devices(self, directory: str, rules: list[dict[str, object]]) -> None:
        """A group allows no more than its parents (v1), so those of ours are asked to let the devices through, too.
        New siblings then write their own rules instead of inheriting the usual ones."""
        above = [os.path.dirname(directory)]
        while os.path.basename(above[0]) != "labkernel" and len(above) < 4:
            above.insert(0, os.path.dirname(above[0]))
        try:
            for parent in above if os.path.basename(above[0]) == "labkernel" else ():
                _write_device_rules(parent, [rule for rule in rules if rule.get("allow")])
            _write_device_rules(directory, rules)
        except PermissionError as err:  # inside another container, whose own rules allow less
            self.unenforced.append(("devices", str(err.strerror)))

    def remove(self, *, timeout_s: float = 1.0) -> bool:
        """Remove the directories; EBUSY (a zombie not yet reaped) is tried again until the time is up.

        Returns whether all are gone."""
        deadline = time.monotonic() + timeout_s
        left = self.directories
        pause_s = 0.0005
        while True:
            left = [directory for directory in left if not _remove_tree(directory)]
            if not left or time.monotonic() > deadline:
                return not left
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)


class Hierarchy:
    """Where groups can be made. `version` is 1, 2 or 0 (nowhere); `bases` maps controller to the directory below which
    this process may make groups (v2: the same directory for all); `missing` maps controller to the reason."""

    __slots__ = ("bases", "hybrid", "missing", "root", "unified", "version")

    def __init__(self, version: int, root: str, bases: dict[str, str], missing: dict[str, str]) -> None:
        self.version = version
        self.root = root
        self.bases = bases
        self.missing = missing
        self.hybrid = False
        self.unified: str | None = None

    def enforcement(self) -> dict[str, str]:
        """For each controller `kernel` or `none`: what a limit on it is worth here."""
        return {name: "kernel" if name in self.bases else "none" for name in CONTROLLERS}

    def create(self, parent: str, name: str, resources: dict[str, dict[str, object]] | None = None) -> Cgroup:
        """Make the group `parent`/`name` with its limits in all hierarchies; `parent` is made when missing.

        A group of that name which is there already is taken over. Raises OSError; then nothing is left behind."""
        group = Cgroup(self.version, self._paths(f"{parent.strip('/')}/{name}"))
        if self.version == 0:
            return group
        if self.version == 1 and "cpuset" in group.paths:
            # An unset cpuset of v1 takes no process at all, and hardly anybody sets one: made by `limit` if ever.
            group._cpuset = (self.bases["cpuset"], group.paths.pop("cpuset"))
        made: list[str] = []
        try:
            for directory in group.directories:
                try:
                    os.mkdir(directory, 0o755)
                except FileNotFoundError:
                    self._make_parent(directory)
                    os.mkdir(directory, 0o755)
                except FileExistsError:
                    continue
                made.append(directory)
                if self.version == 1 and directory == group.paths.get("devices"):
                    _set_usual_rules(directory)
            if resources:
                group.limit(resources)
        except OSError:
            for directory in dict.fromkeys([*made, *([group.paths["cpuset"]] if "cpuset" in group.paths else [])]):
                _remove_tree(directory)
            raise
        return group

    def remove_parent(self, parent: str) -> None:
        """Remove `parent` and the empty directories above it up to the base; others' groups make that a no-op."""
        for base in dict.fromkeys(self.bases.values()):
            path = f"{base}/{parent.strip('/')}"
            while len(path) > len(base):
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    pass
                except OSError:
                    break
                path = os.path.dirname(path)

    def _paths(self, below: str) -> dict[str, str]:
        if self.version == 2:
            return {"": f"{next(iter(self.bases.values()))}/{below}"}
        return {controller: f"{base}/{below}" for controller, base in self.bases.items()}

    def _make_parent(self, directory: str) -> None:
        base = next(base for base in self.bases.values() if directory.startswith(base + "/"))
        path = base
        if self.version == 2:
            _delegate(path, list(self.bases))
        for part in directory[len(base) + 1 :].split("/")[:-1]:
            path = f"{path}/{part}"
            try:
                os.mkdir(path, 0o755)
                made = True
            except FileExistsError:
                made = False
            if made and self.version == 1 and base == self.bases.get("devices"):
                _set_usual_rules(path)
            if self.version == 2:
                _delegate(path, list(self.bases))


def detect(root: str = MOUNT_ROOT, *, proc: str = "/proc/self") -> Hierarchy:
    """Look at the mounts below `root` and at the caller's own groups; changes nothing, needs no privilege.

    Version 1 controllers win over an empty version 2 beside them (hybrid). Below a base that the caller cannot write,
    the caller's own group is taken when that is delegated (writable)."""
    own = _own_groups(proc)
    if os.path.exists(f"{root}/cgroup.controllers"):
        return _detect_v2(root, own.get("", "/"))
    found: dict[str, str] = {}
    unified: str | None = None
    for name in _entries(root):
        path = f"{root}/{name}"
        if os.path.islink(path):
            continue  # cpu -> cpu,cpuacct
        if os.path.exists(f"{path}/cgroup.controllers"):
            unified = path
        elif os.path.exists(f"{path}/cgroup.procs"):
            found.update({part: path for part in name.split(",") if part in CONTROLLERS})
    if not found:
        return _detect_v2(unified, own.get("", "/")) if unified else _nothing(root, "no cgroup file system is mounted")
    bases: dict[str, str] = {}
    missing: dict[str, str] = {}
    for controller in CONTROLLERS:
        if controller not in found:
            missing[controller] = "the kernel offers no such controller, or it is not mounted"
            continue
        base = _writable_v1(found[controller], own.get(controller, "/"))
        if base is None:
            missing[controller] = f"{found[controller]} is not writable for this user"
        else:
            bases[controller] = base
    hierarchy = Hierarchy(1 if bases else 0, root, bases, missing)
    hierarchy.hybrid, hierarchy.unified = unified is not None, unified
    return hierarchy


def _detect_v2(root: str, own: str) -> Hierarchy:
    base = _base_v2(root, own)
    if base is None:
        return _nothing(root, f"no delegated cgroup: {root}{own.rstrip('/')} is not writable for this user")
    offered = (_read(f"{base}/cgroup.controllers") or "").split()
    bases: dict[str, str] = {}
    missing: dict[str, str] = {}
    for controller in CONTROLLERS:
        # freezing, CPU accounting and device filters need no controller of their own in v2
        if controller in ("freezer", "cpuacct", "devices") or V2_NAMES.get(controller, controller) in offered:
            bases[controller] = base
        else:
            missing[controller] = f"{base}/cgroup.controllers does not offer it"
    hierarchy = Hierarchy(2, root, bases, missing)
    hierarchy.unified = root
    return hierarchy


def _base_v2(root: str, own: str) -> str | None:
    """The directory to build below: the nearest writable one of the own groups that already hands its controllers
    down; else the own one, whose processes must then step aside (`_delegate`)."""
    if "/.." in own:
        own = "/"  # mounted from within another cgroup namespace
    path = f"{root}{own}".rstrip("/")
    if os.path.basename(path) == _LEAF:
        path = os.path.dirname(path)
    if not _is_writable(path):
        # root outside of its own group (or in a container with a read-only one): the root of the mount, or nothing
        return root if _is_writable(root) and not os.path.exists(f"{root}/cgroup.type") else None
    if _is_writable(root) and not os.path.exists(f"{root}/cgroup.type"):
        return root  # the real root group: free of the no-internal-process rule
    candidate = path
    while len(candidate) >= len(root) and _is_writable(candidate):
        handed_down = (_read(f"{candidate}/cgroup.subtree_control") or "").split()
        if "memory" in handed_down and "pids" in handed_down:
            return candidate
        candidate = os.path.dirname(candidate)
    return path


def _delegate(path: str, controllers: list[str]) -> None:
    """Hand the controllers of `path` down to its children (cgroup.subtree_control).

    A group that has processes itself may not do that (EBUSY, the no-internal-process rule): they move to a leaf."""
    control = f"{path}/cgroup.subtree_control"
    offered = (_read(f"{path}/cgroup.controllers") or "").split()
    active = (_read(control) or "").split()
    wanted = [V2_NAMES.get(name, name) for name in controllers]
    for name in [name for name in dict.fromkeys(wanted) if name in offered and name not in active]:
        try:
            _write(control, f"+{name}")
        except OSError as err:
            if err.errno != errno.EBUSY:
                continue  # EINVAL (cpu with realtime processes), EACCES: seen later as a limit that cannot be set
            _step_aside(path)
            _try_write(control, f"+{name}")


def _step_aside(path: str) -> None:
    leaf = f"{path}/{_LEAF}"
    os.makedirs(leaf, exist_ok=True)
    for line in _lines(f"{path}/cgroup.procs"):
        _try_write(f"{leaf}/cgroup.procs", line)  # it may have ended meanwhile


def _writable_v1(mount: str, own: str) -> str | None:
    for candidate in (mount, f"{mount}{own}".rstrip("/")):
        if _is_writable(candidate):
            return candidate
    return None


def _is_writable(path: str) -> bool:
    # Only the directory is asked, not cgroup.procs: joining from elsewhere is tried by the probe. Mode 0555 says no
    # to nobody who has CAP_DAC_OVERRIDE, hence access(2) and not the mode.
    return os.access(path, os.W_OK | os.X_OK)


def _own_groups(proc: str) -> dict[str, str]:
    groups: dict[str, str] = {}
    for line in _lines(f"{proc}/cgroup"):
        _, names, path = line.split(":", 2)
        groups.update(dict.fromkeys(names.split(","), path))
    return groups


def _inherit_cpuset(path: str, base: str) -> None:
    """Give each level of a v1 cpuset the CPUs and memory nodes of its parent: empty ones accept no process."""
    current = base
    for part in path[len(base) + 1 :].split("/"):
        parent, current = current, f"{current}/{part}"
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (_read(f"{current}/{name}") or "").strip():
                _try_write(f"{current}/{name}", (_read(f"{parent}/{name}") or "").strip())


def _write_device_rules(directory: str, rules: list[dict[str, object]]) -> None:
    # A child starts with its parent's rules, which are the usual ones: mostly one read instead of a dozen writes.
    for name, line in device_changes(_lines(f"{directory}/devices.list"), rules):
        _write(f"{directory}/{name}", line)


def _set_usual_rules(directory: str) -> None:
    """While nobody is in the group: a process that is there when everything is denied for a moment fails to start."""
    try:
        _write_device_rules(directory, DEVICE_RULES)
    except OSError:
        pass  # `limit` then sets its own, or says that it cannot


def _nothing(root: str, reason: str) -> Hierarchy:
    return Hierarchy(0, root, {}, dict.fromkeys(CONTROLLERS, reason))


def _figures_v1(paths: dict[str, str]) -> dict[str, int]:
    figures: dict[str, int] = {}

    def put(name: str, controller: str, file: str, divide: int = 1) -> None:
        text = _read(f"{paths[controller]}/{file}") if controller in paths else None
        if text is not None:
            figures[name] = int(text) // divide

    put("cpu_usec", "cpuacct", "cpuacct.usage", 1000)
    put("memory_bytes", "memory", "memory.usage_in_bytes")
    put("memory_peak_bytes", "memory", "memory.max_usage_in_bytes")
    put("memory_limit_bytes", "memory", "memory.limit_in_bytes")
    put("pids", "pids", "pids.current")
    if "cpu" in paths:
        figures["throttled_usec"] = _keyed(f"{paths['cpu']}/cpu.stat").get("throttled_time", 0) // 1000
    if "blkio" in paths:
        for line in _lines(f"{paths['blkio']}/blkio.throttle.io_service_bytes"):
            words = line.split()
            if len(words) == 3 and words[1] in ("Read", "Write"):
                name = f"io_{words[1].lower()}_bytes"
                figures[name] = figures.get(name, 0) + int(words[2])
    return figures


def _figures_v2(path: str) -> dict[str, int]:
    figures: dict[str, int] = {}
    cpu = _keyed(f"{path}/cpu.stat")
    if "usage_usec" in cpu:
        figures["cpu_usec"] = cpu["usage_usec"]
        figures["throttled_usec"] = cpu.get("throttled_usec", 0)
    for name, file in (
        ("memory_bytes", "memory.current"),
        ("memory_peak_bytes", "memory.peak"),
        ("memory_limit_bytes", "memory.max"),
        ("pids", "pids.current"),
    ):
        text = (_read(f"{path}/{file}") or "").strip()
        if text.isdigit():
            figures[name] = int(text)
    for line in _lines(f"{path}/io.stat"):
        for word in line.split()[1:]:
            key, _, value = word.partition("=")
            if key in ("rbytes", "wbytes"):
                name = "io_read_bytes" if key == "rbytes" else "io_write_bytes"
                figures[name] = figures.get(name, 0) + int(value)
    return figures


def _remove_tree(path: str) -> bool:
    """rmdir of `path` and of the groups a container made below it; the files of cgroupfs are not entries to delete."""
    try:
        os.rmdir(path)
        return True
    except FileNotFoundError:
        return True
    except OSError as err:
        if err.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    for name in _entries(path):
        child = f"{path}/{name}"
        if os.path.isdir(child) and not os.path.islink(child):
            _remove_tree(child)
    try:
        os.rmdir(path)
        return True
    except OSError as err:
        if err.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT):
            raise
        return err.errno == errno.ENOENT


def _entries(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _write(path: str, value: str) -> None:
    # O_TRUNC and O_CREAT never: a missing file must be an error, not a new file of a tmpfs
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as err:
        raise OSError(err.errno, err.strerror, path) from None
    finally:
        os.close(fd)


def _try_write(path: str, value: str) -> bool:
    try:
        _write(path, value)
    except OSError:
        return False
    return True


def _read(path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
        return b"".join(chunks).decode()
    except OSError:  # ENODEV: the group went away between open and read
        return None
    finally:
        os.close(fd)


def _lines(path: str) -> list[str]:
    return (_read(path) or "").splitlines()


def _keyed(path: str) -> dict[str, int]:
    """A flat keyed file (`name number` a line); other lines are left out."""
    pairs = (line.split() for line in _lines(path))
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].lstrip("-").isdigit()}


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
