"""From an image's config and a container's settings to an OCI runtime-spec configuration. Pure.

Settings come from `settings.normalize`; what is not given follows Docker's defaults. The result is what the supervisor
reads as `config.json`, with one property more than the runtime-spec has, `labkernel`.
Source: runtime-spec config.md and config-linux.md; image-spec config.md; Docker documentation, "docker run".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..linux.limits import DEVICE_RULES
from . import devicelimits, healthcheck, logsettings
from .sharing import SHARED, device_rules, find_devices

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_STOP_TIMEOUT_S = 10.0
DEFAULT_SHM_BYTES = 64 << 20
CPU_PERIOD_USEC = 100_000

DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)
MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NAMESPACES = ("mount", "uts", "ipc", "pid", "network", "cgroup")

_HARD = ["nosuid", "noexec", "nodev"]
_KERNELS = ("/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/dev/shm")


def finalize_spec(
    *,
    id: str,
    command: Sequence[str],
    image_config: Mapping[str, Any],
    settings: Mapping[str, Any],
    rootfs: dict[str, Any],
    directory: str,
    mounts: Sequence[dict[str, Any]] = (),
    single_id: bool = False,
    limits: bool = True,
    devices: bool = True,
    seccomp_program: str | None = None,
    cgroup_parent: str = "/labkernel",
    hidden: Sequence[str] = (),
) -> dict[str, Any]:
    """The configuration of container `id` in `directory`.

    `mounts` are the volumes as runtime-spec mounts, `hidden` further masked paths; `devices` says whether a device
    cgroup is wanted, `limits` whether there is any cgroup. Raises UsageError when there is no command to run."""
    of_host = "host" in (network_mode(settings), settings.get("uts_mode"))
    hostname = settings.get("hostname") or (os.uname().nodename if of_host else id[:12])
    options = security_options(settings)
    privileged = bool(settings.get("privileged"))
    all_open = options.get("systempaths") == "unconfined" or privileged
    nodes = find_devices(settings.get("devices", ()), everything=privileged)
    process = _process(command, image_config, settings, hostname)
    return {
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": bool(settings.get("read_only"))},
        "hostname": hostname,
        **({"domainname": settings["domainname"]} if settings.get("domainname") else {}),
        **({"annotations": settings["annotations"]} if settings.get("annotations") else {}),
        "mounts": [
            *_default_mounts(settings, single_id=single_id, cgroup=limits),
            *order_mounts([*mounts, *tmpfs_mounts(settings.get("tmpfs") or {})]),
        ],
        "linux": {
            "namespaces": _namespaces(settings),
            "resources": finalize_resources(settings, devices=devices, nodes=nodes),
            **({"devices": nodes} if nodes else {}),
            **({"sysctl": settings["sysctls"]} if settings.get("sysctls") else {}),
            "maskedPaths": [] if all_open else [*MASKED_PATHS, *hidden],
            "readonlyPaths": [] if all_open else list(READONLY_PATHS),
            "cgroupsPath": f"{cgroup_parent}/{id}",
        },
        "labkernel": {
            "rootfs": rootfs,
            "log": _log(f"{directory}/log.json", id, process["env"], image_config, settings),
            "seccomp_program": seccomp_program,
            "cgroup_parent": cgroup_parent if limits else "",
            **_own(image_config, settings),
        },
    }


def _log(
    path: str, id: str, environment: Sequence[str], image_config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    labels = {**(image_config.get("Labels") or {}), **settings.get("labels", {})}
    return logsettings.plan(settings, path=path, id=id, labels=labels, environment=environment)


def _process(
    command: Sequence[str], image_config: Mapping[str, Any], settings: Mapping[str, Any], hostname: str
) -> dict[str, Any]:
    """runtime-spec config.md, "Process"."""
    capabilities = finalize_capabilities(settings)
    return {
        "terminal": bool(settings.get("tty")),
        **_console_size(settings),
        "user": _user(settings, image_config),
        "args": finalize_args(command, image_config, settings),
        "env": finalize_environment(image_config, settings, hostname),
        "cwd": settings.get("working_dir") or image_config.get("WorkingDir") or "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "rlimits": _rlimits(settings),
        "noNewPrivileges": "no-new-privileges" in security_options(settings),
        "oomScoreAdj": settings.get("oom_score_adj", 0),
    }


def _own(image_config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the runtime-spec has no place for, and the supervisor needs."""
    return {
        "stdin_open": bool(settings.get("stdin_open")),
        "auto_remove": bool(settings.get("auto_remove")),
        "stop_signal": stop_signal(image_config, settings),
        "stop_timeout_s": float(settings.get("stop_timeout", DEFAULT_STOP_TIMEOUT_S)),
        "init": bool(settings.get("init")),
        **({"count_denials": True} if settings.get("count_denials") else {}),
        **({"shared_memory": False} if settings.get("ipc_mode") == "none" else {}),
        "user_unresolved": settings.get("user") or image_config.get("User") or "0",
        "cwd_create": True,
        "path_search": True,
        "restart": settings.get("restart_policy") or {"name": "no", "max_retries": 0},
        "healthcheck": healthcheck.plan(image_config, settings),
        "extra_hosts": settings.get("extra_hosts") or [],
        "dns": settings.get("dns") or [],
        "dns_search": settings.get("dns_search") or [],
        "dns_opt": settings.get("dns_opt") or [],
    }


def finalize_args(command: Sequence[str], image_config: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Entrypoint and command: an entrypoint of one's own drops the image's command (image-spec config.md)."""
    own_entrypoint = settings.get("entrypoint")
    words = list(command)
    if not words and own_entrypoint is None:
        words = list(image_config.get("Cmd") or [])
    entrypoint = own_entrypoint if own_entrypoint is not None else image_config.get("Entrypoint") or []
    args = [*(word for word in entrypoint if word or own_entrypoint is None), *words]
    if not args:
        raise UsageError("No command specified", resolution="name one after the image, or set CMD in its Dockerfile")
    return args


def finalize_environment(image_config: Mapping[str, Any], settings: Mapping[str, Any], hostname: str) -> list[str]:
    """PATH, HOSTNAME, TERM with a terminal, the image's, then the given ones; a later one replaces an earlier.

    A given name without `=` is unset, whoever sets it."""
    values: dict[str, str] = {}
    name, _, text = DEFAULT_PATH.partition("=")
    values[name] = text
    values["HOSTNAME"] = hostname
    if settings.get("tty"):
        values["TERM"] = "xterm"
    for word in image_config.get("Env") or ():
        name, _, text = word.partition("=")
        values[name] = text
    for word in settings.get("environment", ()):
        name, separator, text = word.partition("=")
        if separator:
            values[name] = text
        else:
            values.pop(name, None)
    return [f"{name}={text}" for name, text in values.items()]


def finalize_capabilities(settings: Mapping[str, Any]) -> list[str]:
    """Docker's 14 default capabilities, with `cap_drop` taken away, then `cap_add` added; `ALL` works in both."""
    from .settings import CAPABILITIES

    drop, add = settings.get("cap_drop", ()), settings.get("cap_add", ())
    if settings.get("privileged"):
        return sorted(CAPABILITIES)
    if not drop and not add:
        return list(DEFAULT_CAPABILITIES)
    if "ALL" in add:
        return sorted(CAPABILITIES - set(drop))
    kept = [] if "ALL" in drop else [name for name in DEFAULT_CAPABILITIES if name not in drop]
    return [*kept, *(name for name in add if name not in kept)]


def without_mknod(config: dict[str, Any]) -> None:
    """Take CAP_MKNOD from a container whose device nodes nothing would keep it from using."""
    sets = config["process"].get("capabilities") or {}
    for name, words in sets.items():
        sets[name] = [word for word in words if word != "CAP_MKNOD"]


def finalize_resources(
    settings: Mapping[str, Any], *, devices: bool = True, nodes: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """`linux.resources`: only what was asked for, and the device rules, which let `nodes` through, too."""
    resources: dict[str, Any] = {}
    memory: dict[str, int] = {}
    limit = settings.get("mem_limit", 0)
    if limit > 0:
        memory["limit"] = limit
        # docker's default: as much swap again as there is memory
        memory["swap"] = settings.get("memswap_limit") or 2 * limit
    if settings.get("mem_reservation"):
        memory["reservation"] = settings["mem_reservation"]
    if settings.get("oom_kill_disable"):
        memory["disableOOMKiller"] = 1
    if settings.get("mem_swappiness") is not None and settings["mem_swappiness"] >= 0:
        memory["swappiness"] = settings["mem_swappiness"]
    if memory:
        resources["memory"] = memory
    cpu: dict[str, Any] = {}
    if settings.get("cpu_shares"):
        cpu["shares"] = settings["cpu_shares"]
    if settings.get("nano_cpus"):
        cpu["period"] = CPU_PERIOD_USEC
        cpu["quota"] = settings["nano_cpus"] * CPU_PERIOD_USEC // 1_000_000_000
    if settings.get("cpu_period"):
        cpu["period"] = settings["cpu_period"]
    if settings.get("cpu_quota"):
        cpu["quota"] = settings["cpu_quota"]
    for key, name in (("cpuset_cpus", "cpus"), ("cpuset_mems", "mems")):
        if settings.get(key):
            cpu[name] = settings[key]
    if cpu:
        resources["cpu"] = cpu
    if settings.get("pids_limit", 0) > 0:
        resources["pids"] = {"limit": settings["pids_limit"]}
    block_io = devicelimits.block_io(settings)
    if settings.get("blkio_weight"):
        block_io["weight"] = settings["blkio_weight"]
    if block_io:
        resources["blockIO"] = block_io
    if devices:
        # Not the type `a`: version 1 takes that for a group without children only.
        own_rules = [*DEVICE_RULES, *device_rules(nodes), *devicelimits.cgroup_rules(settings)]
        everything = [DEVICE_RULES[0], *({"allow": True, "type": kind, "access": "rwm"} for kind in "cb")]
        resources["devices"] = everything if settings.get("privileged") else own_rules
    return resources


def security_options(settings: Mapping[str, Any]) -> dict[str, str]:
    """`security_opt` as a mapping; both of docker's spellings, `key=value` and `key:value`."""
    found: dict[str, str] = {}
    for option in settings.get("security_opt", ()):
        key, separator, text = option.partition("=") if "=" in option else option.partition(":")
        if key == "no-new-privileges" and text == "false":
            continue
        found[key] = text if separator else "true"
    return found


def stop_signal(image_config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """The signal `stop` sends first: SIGTERM unless the settings or the image say otherwise."""
    if settings.get("stop_signal"):
        return int(settings["stop_signal"])
    word = image_config.get("StopSignal")
    if not word:
        return 15
    from .settings import parse_signal

    return parse_signal(word)


def network_mode(settings: Mapping[str, Any]) -> str:
    """`default`, `none`, `host` or another network's name."""
    if settings.get("network_disabled"):
        return "none"
    return settings.get("network_mode") or settings.get("network") or "default"


def _namespaces(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Those of its own, and with a `path` of `container:ID` those of another container."""
    found = []
    for name in NAMESPACES:
        mode = str(network_mode(settings) if name == "network" else settings.get(SHARED.get(name, ""), ""))
        if mode.startswith("container:"):
            found.append({"type": name, "path": mode})
        elif mode != "host":
            found.append({"type": name})
    return found


def _console_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and columns of the terminal, so that the first program finds them (runtime-spec config.md, consoleSize)."""
    if not settings.get("console_size"):
        return {}
    rows, columns = settings["console_size"]
    return {"consoleSize": {"height": rows, "width": columns}}


def _user(settings: Mapping[str, Any], image_config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers where numbers were given; names are resolved in the root file system (`user_unresolved`)."""
    name, _, group = str(settings.get("user") or image_config.get("User") or "0").partition(":")
    user: dict[str, Any] = {"uid": int(name) if name.isdigit() else 0, "gid": int(group) if group.isdigit() else 0}
    groups = [int(word) for word in settings.get("group_add", ()) if word.isdigit()]
    names = [word for word in settings.get("group_add", ()) if not word.isdigit()]
    # names are looked up in the image's etc/group (`accounts.resolve`)
    return {**user, **({"additionalGids": groups} if groups else {}), **({"groups_unresolved": names} if names else {})}


def _rlimits(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    limits = settings.get("ulimits") or {}
    return [
        {"type": f"RLIMIT_{name.upper()}", "soft": soft, "hard": hard} for name, (soft, hard) in sorted(limits.items())
    ]


def _default_mounts(settings: Mapping[str, Any], *, single_id: bool, cgroup: bool) -> list[dict[str, Any]]:
    shm = settings.get("shm_size") or DEFAULT_SHM_BYTES
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": _HARD},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        # The group tty is 5 on every distribution; with one mapped id the kernel refuses the number.
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": pts if single_id else [*pts, "gid=5"],
        },
        {
            "destination": "/sys",
            "type": "sysfs",
            "source": "sysfs",
            "options": [*_HARD, "rw" if settings.get("privileged") else "ro"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _HARD},
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": [*_HARD, "mode=1777", f"size={shm // 1024}k"],
        },
    ]
    if str(settings.get("ipc_mode")).startswith(("host", "container:")):
        bind = {"type": "bind", "source": "/dev/shm", "options": ["rbind", "rw", "rprivate"]}
        mounts[-1] = {"destination": "/dev/shm", **bind}
    elif settings.get("ipc_mode") == "none":
        del mounts[-1]
    if cgroup:
        mounts.insert(
            4, {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*_HARD, "ro"]}
        )
    return mounts


def tmpfs_mounts(tmpfs: Mapping[str, str]) -> list[dict[str, Any]]:
    """`--tmpfs PATH:OPTIONS` as runtime-spec mounts."""
    found = []
    for path, options in tmpfs.items():
        given = [word for word in options.split(",") if word]
        defaults = [word for word in ("nosuid", "nodev", "noexec") if word.removeprefix("no") not in given]
        own = [*(word for word in defaults if word not in given), *given]
        found.append({"destination": os.path.normpath(path), "type": "tmpfs", "source": "tmpfs", "options": own})
    return found


def order_mounts(mounts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernel's file systems in their order, then volumes and tmpfs, parents before what lies in them."""
    given = [mount for mount in mounts if mount["destination"] not in _KERNELS]
    first = [mount for mount in mounts if mount["destination"] in _KERNELS]
    return [*first, *sorted(given, key=lambda mount: mount["destination"].rstrip("/").count("/"))]
