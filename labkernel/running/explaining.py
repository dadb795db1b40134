"""`container explain`: each step the sandbox takes for a container, in the order taken, with the pages to read.

Read from the container's own config.json, so it is what will be done or was done and not what ought to be. After a
start that failed, the step that was denied is marked. The names in `Step.key` are those `runtime.init.reach` reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..display import without_formulas
from ..linux.limits import device_rule, translate
from ..linux.seccomp import call_name
from ..runtime.spec import DEFAULT_CAPABILITIES

if TYPE_CHECKING:
    from ..runtime.driver import Driver
    from .container import Container

_NAMESPACES = {
    "pid": ("CLONE_NEWPID", "its command is process 1 and sees no other", "pid_namespaces(7)"),
    "mount": ("CLONE_NEWNS", "what is mounted here is seen by nobody else and ends with it", "mount_namespaces(7)"),
    "uts": ("CLONE_NEWUTS", "a host name of its own", "uts_namespaces(7)"),
    "ipc": ("CLONE_NEWIPC", "System V IPC and message queues of its own", "ipc_namespaces(7)"),
    "network": ("CLONE_NEWNET", "interfaces, addresses, ports and rules of its own", "network_namespaces(7)"),
    "cgroup": ("CLONE_NEWCGROUP", "its control group looks like the root", "cgroup_namespaces(7)"),
}


@dataclass(frozen=True)
class Step:
    """One step: `key` as the runtime calls it, what is done, the details, the man pages. `outcome` is `done`,
    `denied` or `not reached` after a start, and empty before one."""

    key: str
    title: str
    details: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()
    outcome: str = ""


class Explanation(list[Step]):
    """The steps, displayed as a list; `denied` counts the system calls the filter refused, by name (None: unknown)."""

    def __init__(self, steps: Sequence[Step], *, error: str = "", denied: Mapping[str, int] | None = None) -> None:
        super().__init__(steps)
        self.error = error
        self.denied = dict(denied) if denied is not None else None

    @property
    def text(self) -> str:
        lines = []
        for number, step in enumerate(self, 1):
            mark = {"done": "✓ ", "denied": "✗ ", "not reached": "· "}.get(step.outcome, "")
            pages = f"   [{', '.join(step.pages)}]" if step.pages else ""
            lines.append(f"{number:2}. {mark}{step.title}{pages}")
            lines += [f"      {line}" for line in step.details]
            if step.outcome == "denied":
                lines.append(f"      DENIED: {self.error}")
        if self.denied:
            lines.append("System calls its filter denied:")
            lines += [f"      {count:6} {name}" for name, count in self.denied.items()]
        elif self.denied is not None:
            lines.append("Its filter denied no system call.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.text

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(self.text)}</pre>"


def explain(container: Container) -> Explanation:
    """The steps of this container's start, marked with how the last one went where there was one."""
    config, driver = container.config(), container._containers.driver
    state = container.runtime_state()
    steps = (
        _proot_steps(config) if driver.name == "proot" else [step for make in _STEPS for step in make(config, driver)]
    )
    failed = str(state.get("failed_step") or "")
    if failed:
        keys = [step.key for step in steps]
        last = keys.index(failed) if failed in keys else 0
        words = [*["done"] * last, "denied", *["not reached"] * len(steps)]
        steps = [replace(step, outcome=word) for step, word in zip(steps, words, strict=False)]
    elif state.get("started_at"):
        steps = [replace(step, outcome="done") for step in steps]
    denied = None
    if "denied" in state:
        named = {call_name(key): count for key, count in state["denied"].items()}
        denied = dict(sorted(named.items(), key=lambda item: -item[1]))
    return Explanation(steps, error=str(state.get("error") or ""), denied=denied)


def _namespaces(config: Mapping[str, Any], driver: Driver) -> list[Step]:
    own = [space["type"] for space in config["linux"]["namespaces"] if not space.get("path")]
    shared = [space for space in config["linux"]["namespaces"] if space.get("path")]
    details = [f"{_NAMESPACES[name][0]:16} {_NAMESPACES[name][1]}" for name in own if name != "cgroup"]
    details += [
        f"setns            {space['type']} of {space['path'].replace('container:', '')[:12]}" for space in shared
    ]
    missing = [name for name in _NAMESPACES if name not in own and name not in {s["type"] for s in shared}]
    if missing:
        details.append(f"not its own: {', '.join(missing)}: the machine's are used")
    steps = []
    if driver.name == "rootless":
        ids = {"single": "one user id is mapped: root inside is this user"}.get(driver.id_mapping)
        steps.append(
            Step(
                "user namespace",
                "enter a user namespace (once, for all containers of the store)",
                (ids or "a range of subordinate ids is mapped (newuidmap)",),
                ("user_namespaces(7)", "newuidmap(1)"),
            )
        )
    pages = tuple(_NAMESPACES[name][2] for name in own if name != "cgroup")
    return [
        *steps,
        Step("namespaces", "make its first process in namespaces of its own", tuple(details), ("clone(2)", *pages)),
    ]


def _cgroup(config: Mapping[str, Any], driver: Driver) -> list[Step]:
    if driver.cgroup_version == 0 or not config["labkernel"].get("cgroup_parent"):
        return [Step("cgroup", "no control group: limits do not hold here", (), ("cgroups(7)",))]
    resources = config["linux"].get("resources") or {}
    details = [f"{name} = {value}" for _, name, value, _ in translate(resources, version=driver.cgroup_version)]
    rules = resources.get("devices") or []
    if rules and driver.name == "root":
        where = "devices.allow" if driver.cgroup_version == 1 else "a BPF program"
        details.append(f"{where}: nothing but {len(rules) - 1} rules, such as `{device_rule(rules[-1])}`")
    made = f"make and join the control group {config['labkernel']['cgroup_parent']}/…"
    found = [Step("cgroup", made, tuple(details), ("cgroups(7)",))]
    if any(space["type"] == "cgroup" for space in config["linux"]["namespaces"]):
        found.append(
            Step("cgroup namespace", "unshare(CLONE_NEWCGROUP)", (_NAMESPACES["cgroup"][1],), ("cgroup_namespaces(7)",))
        )
    return found


def _network(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    if not any(space["type"] == "network" and not space.get("path") for space in config["linux"]["namespaces"]):
        return []
    return [
        Step("network", "bring its interfaces up: loopback, and those of its networks", (), ("netlink(7)", "veth(4)"))
    ]


def _file_systems(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    linux = config["linux"]
    masked, frozen = linux.get("maskedPaths") or [], linux.get("readonlyPaths") or []
    details = [
        "proc on /proc, sysfs on /sys (read-only), tmpfs on /dev with null zero full random urandom tty",
        "devpts on /dev/pts, tmpfs on /dev/shm, mqueue on /dev/mqueue",
        *([f"hidden: {' '.join(masked)}"] if masked else []),
        *([f"read-only: {' '.join(frozen)}"] if frozen else []),
    ]
    return [
        Step(
            "kernel file systems",
            "mount the kernel's file systems",
            tuple(details),
            ("mount(2)", "proc(5)", "sysfs(5)"),
        )
    ]


def _mounts(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    rootfs = config["labkernel"]["rootfs"]
    if rootfs["kind"] == "overlay":
        words = [f"overlay of {len(rootfs['lower'])} layers below {rootfs['upper']}"]
        words += [f"lower  {path}" for path in rootfs["lower"]]
    else:
        words = [f"the directory {rootfs['path']}"]
    given = [
        entry for entry in config["mounts"] if entry["type"] == "bind" or entry["destination"] not in _KERNEL_PLACES
    ]
    words += [
        f"{entry['type']:6} {entry.get('source', '')} on {entry['destination']} ({','.join(entry.get('options', ()))})"
        for entry in given
    ]
    words.append("/etc/hostname, /etc/hosts, /etc/resolv.conf are put over the image's")
    pages = ("mount(2)", "openat2(2)", "https://docs.kernel.org/filesystems/overlayfs.html")
    return [Step("mounts", "mount its root and what was asked for; paths are resolved inside it", tuple(words), pages)]


_KERNEL_PLACES = ("/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/dev/shm")


def _names(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    found = []
    if any(space["type"] == "uts" for space in config["linux"]["namespaces"]):
        found.append(Step("hostname", f"sethostname {config.get('hostname') or ''}", (), ("sethostname(2)",)))
    values = config["linux"].get("sysctl") or {}
    if values:
        details = tuple(f"{name} = {value}" for name, value in values.items())
        found.append(Step("sysctls", "set kernel parameters of its namespaces", details, ("proc_sys(5)",)))
    return found


def _root(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    details = ["the old root is detached: there is no way back to it"]
    if config["root"].get("readonly"):
        details.append("and the root is remounted read-only")
    return [Step("pivot_root", "pivot_root into its root", tuple(details), ("pivot_root(2)",))]


def _process(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    process, own = config["process"], config["labkernel"]
    limits = process.get("rlimits") or []
    words = tuple(f"{limit['type']} {limit['soft']}:{limit['hard']}" for limit in limits)
    streams = "a terminal of its own devpts" if process.get("terminal") else "pipes"
    found = [
        Step("rlimits", f"descriptors 0 to 2 are {streams}; all others are closed", words, ("setrlimit(2)", "pty(7)")),
        Step(
            "user", f"look the user {own.get('user_unresolved')} up in the image's own etc/passwd", (), ("passwd(5)",)
        ),
        Step("working directory", f"chdir {process['cwd']}, and check that it lies inside", (), ("chdir(2)",)),
    ]
    names = process["capabilities"]["bounding"] if process.get("capabilities") else []
    added = [name for name in names if name not in DEFAULT_CAPABILITIES]
    dropped = [name for name in DEFAULT_CAPABILITIES if name not in names]
    details = [f"capabilities: {' '.join(name.removeprefix('CAP_').lower() for name in names) or 'none'}"]
    details += [f"more than docker's: {' '.join(added)}"] if added else []
    details += [f"fewer than docker's: {' '.join(dropped)}"] if dropped else []
    program = own.get("seccomp_program")
    details.append(_filter(program))
    details.append(
        "no_new_privs: setuid programs give nothing" if process.get("noNewPrivileges") else "setuid programs work"
    )
    pages = ("capabilities(7)", "seccomp(2)", "prctl(2)", "credentials(7)")
    return [
        *found,
        Step("privileges", "a session keyring, ids, capabilities and the system call filter", tuple(details), pages),
    ]


def _filter(program: str | None) -> str:
    import os

    if not program:
        return "no system call filter"
    try:
        count = os.path.getsize(program) // 8
    except OSError:
        return f"system call filter {program}: missing"
    return f"system call filter of {count} instructions"


def _exec(config: Mapping[str, Any], _driver: Driver) -> list[Step]:
    own, words = config["labkernel"], " ".join(config["process"]["args"])
    first = "an init that reaps and passes signals on, then " if own.get("init") else ""
    found = [Step("exec", f"execute {first}{words}", (f"looked for in {_path(config)}",), ("execve(2)",))]
    if own.get("healthcheck"):
        check = own["healthcheck"]
        every = f"every {check['interval_s']:g} s: {' '.join(check['args'])}"
        found.append(Step("health check", "then look after its health", (every,), ("nsenter(1)",)))
    return found


def _path(config: Mapping[str, Any]) -> str:
    return next((word[5:] for word in config["process"]["env"] if word.startswith("PATH=")), "the default PATH")


def _proot_steps(config: Mapping[str, Any]) -> list[Step]:
    return [
        Step("exec", "no namespaces and no mounts here: PRoot traces the command and translates its paths",
             (f"root: {config['labkernel']['rootfs'].get('path', '')}", " ".join(config["process"]["args"])),
             ("ptrace(2)", "landlock(7)")),
    ]  # fmt: skip


_STEPS: tuple[Callable[[Mapping[str, Any], Driver], list[Step]], ...] = (
    *(_namespaces, _cgroup, _network, _file_systems, _mounts, _names, _root, _process, _exec),
)
