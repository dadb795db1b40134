"""A container's settings: the keyword arguments of the Docker SDK, checked and brought to one form.

`normalize` is pure: it either returns JSON-able settings in which only given values appear, or raises UsageError with
docker's wording, before anything on the machine has changed. Left out: what the image says (`spec.py` merges that).
Source: Docker SDK for Python, `containers.run`; Docker Engine API, ContainerCreate.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UsageError
from . import devicelimits, healthcheck, logsettings, netsettings, sharing

MINIMUM_MEMORY_BYTES = 6 << 20
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmgtp]?)(i?b)?", re.IGNORECASE)
_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?")

CAPABILITIES = frozenset(
    f"CAP_{name}"
    for name in """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
    """.split()  # noqa: SIM905
)
_ULIMITS = frozenset(
    "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack as".split()  # noqa: SIM905
)
_MODE_KINDS = (  # one word of each at most
    {"ro", "rw"},
    {"z", "Z"},
    {"nocopy"},
    {"rprivate", "private", "rslave", "slave", "rshared", "shared"},
    {"cached", "delegated", "consistent", "default"},
)

# Docker SDK names that mean something here later; refused, since ignoring them would be a lie.
_LATER = {
    "isolation": "isolation technologies",
    "use_config_proxy": "proxy settings",
    "link": "links between containers",
    "links": "links between containers",
}


def normalize(given: Mapping[str, Any], *, cpus: int | None = None) -> dict[str, Any]:
    """Checked settings; `cpus` is the number of CPUs available (default: this machine's).

    Values: sizes in bytes, `environment` a list of KEY=VALUE, `volumes` a list of {"source", "destination", "mode"},
    `entrypoint` a list, `ulimits` {"name": [soft, hard]}, signals numbers, capabilities with CAP_. None counts as not
    given. Raises UsageError."""
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        check = _CHECKS.get(key)
        if check is not None:
            settings[key] = check(value)
        elif key in _LATER:
            if value:
                raise UsageError(f"{_LATER[key]} are not available in this release: {key}")
        else:
            raise UsageError(f"unknown setting of a container: {key}", resolution=_suggestion(key))
    if settings:
        sharing.sort_devices(settings)
        _check_memory(settings)
        _check_cpu(settings, cpus)
        _check_together(settings)
    return settings


def available_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def parse_size(value: Any, what: str = "size") -> int:
    """Bytes from an int or words such as `64m`, `1.5GiB`, `100kb` (all units are powers of 1024). -1 stays -1."""
    if isinstance(value, bool):
        raise UsageError(f"invalid {what}: {value!r}")
    if isinstance(value, int):
        return value
    text = str(value).strip()
    if text == "-1":
        return -1
    found = _SIZE.fullmatch(text)
    if not found:
        raise UsageError(f"invalid size: '{value}'", resolution="a number with b, k, m or g, such as 64m")
    power = "kmgtp".find(found[2].lower() or "-") + 1
    return int(float(found[1]) * 1024**power)


def parse_signal(value: Any) -> int:
    """A signal's number from `TERM`, `SIGTERM`, `15` or 15. Raises UsageError."""
    text = str(value).strip().upper()
    if text.isdigit() and 1 <= int(text) <= signal.SIGRTMAX:
        return int(text)
    found = re.fullmatch(r"(?:SIG)?RTM(IN|AX)(?:([+-])(\d+))?", text)
    if found:
        base = int(signal.SIGRTMIN if found[1] == "IN" else signal.SIGRTMAX)
        number = base + int((found[2] or "+") + (found[3] or "0"))
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    elif not text.isdigit():
        member = signal.Signals.__members__.get("SIG" + text.removeprefix("SIG"))
        if member is not None:
            return int(member)
    raise UsageError(f"invalid signal: {value}", resolution="a name or number of man 7 signal, such as TERM or 15")


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; a real-time signal stays a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def check_name(name: str) -> str:
    """A container's name as docker allows it; a leading slash is dropped."""
    bare = name.removeprefix("/")
    if not NAME.fullmatch(bare):
        raise UsageError(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return bare


def check_volume_name(name: str) -> str:
    """A volume's name as docker allows it."""
    if len(name) == 1:
        raise UsageError("volume name is too short, names should be at least two alphanumeric characters")
    if not VOLUME_NAME.fullmatch(name):
        raise UsageError(
            f'"{name}" includes invalid characters for a local volume name, '
            'only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path',
        )
    return name


def parse_command(value: Any) -> list[str]:
    """A command as list; a string is split as a shell would split it."""
    if value is None:
        return []
    if isinstance(value, str):
        import shlex

        try:
            return shlex.split(value)
        except ValueError as err:
            raise UsageError(f"invalid command: {value!r}: {err}") from err
    return [str(word) for word in value]


def _suggestion(key: str) -> str | None:
    import difflib

    close = difflib.get_close_matches(key, _CHECKS, 1)
    return f"did you mean {close[0]}?" if close else None


def _flag(value: Any) -> bool:
    if isinstance(value, (bool, int)):
        return bool(value)
    raise UsageError(f"not true or false: {value!r}")


def _text(value: Any) -> str:
    return str(value)


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"not a number: {value!r}") from None


def _environment(value: Any) -> list[str]:
    pairs = value.items() if isinstance(value, Mapping) else None
    # None as a value means: not set, also when the image sets it (docker: a name without "=")
    words = [f"{k}={v}" if v is not None else str(k) for k, v in pairs] if pairs is not None else list(map(str, value))
    for word in words:
        name, _, _ = word.partition("=")
        if not name or "\0" in word:
            raise UsageError(f"invalid environment variable: {word}")
    return words


def _labels(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(k): str(v) for k, v in value.items()}
    return {name: text for name, _, text in (str(item).partition("=") for item in value)}


def _working_dir(value: Any) -> str:
    path = str(value)
    if not path.startswith("/"):
        raise UsageError(f"the working directory '{path}' is invalid, it needs to be an absolute path")
    return os.path.normpath(path).replace("//", "/")


def _entrypoint(value: Any) -> list[str]:
    return parse_command(value)


def _hostname(value: Any) -> str:
    if not _HOSTNAME.fullmatch(str(value)):
        raise UsageError(f"invalid hostname format: {value}")
    return str(value)


def _capabilities(word: str) -> Callable[[Any], list[str]]:
    def check(value: Any) -> list[str]:
        names = [value] if isinstance(value, str) else list(value)
        found = []
        for name in names:
            full = str(name).upper()
            if full != "ALL":
                full = full if full.startswith("CAP_") else f"CAP_{full}"
                if full not in CAPABILITIES:
                    raise UsageError(f'invalid {word}: unknown capability: "{full}"')
            found.append(full)
        return found

    return check


def _security_opt(value: Any) -> list[str]:
    options = [value] if isinstance(value, str) else [str(option) for option in value]
    for option in options:
        # docker takes "key=value" and the older "key:value"
        key, separator, text = (
            option.replace(":", "=", 1).partition("=") if "=" not in option else option.partition("=")
        )
        known = key in ("seccomp", "apparmor", "label", "systempaths") and bool(separator and text)
        if not known and (key != "no-new-privileges" or (separator and text not in ("true", "false"))):
            raise UsageError(f'invalid --security-opt: "{option}"')
    return options


def _tmpfs(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        found = {str(k): str(v or "") for k, v in value.items()}
    else:
        words = [value] if isinstance(value, str) else list(value)
        found = {path: options for path, _, options in (str(word).partition(":") for word in words)}
    known = {"ro", "rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "noatime", "relatime", "sync", "dirsync"}
    for path, options in found.items():
        if not path.startswith("/"):
            raise UsageError(f"invalid mount path: '{path}' mount path must be absolute")
        if os.path.normpath(path) == "/":
            raise UsageError("invalid specification: destination can't be '/'")
        for option in filter(None, options.split(",")):
            name, _, text = option.partition("=")
            if name not in known and name not in ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks"):
                raise UsageError(f'invalid tmpfs option ["{option}"]')
            if name == "size" and not text.endswith("%"):
                parse_size(text)
            if name == "mode" and not re.fullmatch(r"[0-7]{1,4}", text):
                raise UsageError(f'invalid tmpfs option ["{option}"]')
    return found


def _volumes(value: Any) -> list[dict[str, str]]:
    """From SDK's mapping {source: {"bind", "mode"}} or docker's words `[source:]destination[:mode]`."""
    if isinstance(value, Mapping):
        found = []
        for source, how in value.items():
            if isinstance(how, str):
                how = {"bind": how}
            if not isinstance(how, Mapping) or "bind" not in how:
                raise UsageError(f"invalid volume specification: '{source}': no bind")
            found.append(_volume(str(source), str(how["bind"]), str(how.get("mode") or "rw"), str(source)))
        return found
    words = [value] if isinstance(value, str) else list(value)
    return [_volume_words(str(word)) for word in words]


def _volume_words(text: str) -> dict[str, str]:
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise UsageError(f"invalid volume specification: '{text}'", resolution="SOURCE:/DESTINATION[:ro]")
    if len(parts) == 1:
        return _volume("", parts[0], "rw", text)
    return _volume(parts[0], parts[1], parts[2] if len(parts) == 3 else "rw", text)


def _volume(source: str, destination: str, mode: str, text: str) -> dict[str, str]:
    if not destination.startswith("/"):
        raise UsageError(
            f"invalid volume specification: '{text}': invalid mount path: '{destination}' mount path must be absolute"
        )
    destination = os.path.normpath(destination)
    if destination.strip("/") == "":
        raise UsageError(f"invalid volume specification: '{text}': invalid specification: destination can't be '/'")
    words = mode.split(",")
    kinds = [next((number for number, kind in enumerate(_MODE_KINDS) if word in kind), -1) for word in words]
    if -1 in kinds or len(set(kinds)) < len(kinds):
        raise UsageError(f"invalid mode: {mode}", resolution="SOURCE:/DESTINATION[:ro]")
    if source.startswith((".", "~")):
        source = os.path.abspath(os.path.expanduser(source))
    if source and not source.startswith("/"):
        check_volume_name(source)
    return {"source": os.path.normpath(source) if source.startswith("/") else source, "destination": destination,
            "mode": mode}  # fmt: skip


def _mounts(value: Any) -> list[dict[str, Any]]:
    """Docker SDK `Mount` objects or dictionaries of the API: {"Type", "Source", "Target", "ReadOnly"}."""
    found = []
    for item in value:
        kind, source, target = item.get("Type", "volume"), item.get("Source") or "", item.get("Target") or ""
        if kind not in ("bind", "volume", "tmpfs"):
            raise UsageError(f'invalid mount config for type "{kind}": mount type unknown')
        if kind == "bind" and not str(source).startswith("/"):
            raise UsageError(
                f"invalid mount config for type \"bind\": invalid mount path: '{source}' mount path must be absolute"
            )
        if not str(target).startswith("/") or os.path.normpath(target).strip("/") == "":
            raise UsageError(
                f"invalid mount config for type \"{kind}\": invalid mount path: '{target}' mount path must be absolute"
            )
        if kind == "bind" and not os.path.exists(source):
            raise UsageError(f'invalid mount config for type "bind": bind source path does not exist: {source}')
        if kind == "volume" and source:
            check_volume_name(source)
        size = (item.get("TmpfsOptions") or {}).get("SizeBytes")
        mount = {"type": kind, "source": source, "destination": os.path.normpath(target)}
        mount["mode"] = "ro" if item.get("ReadOnly") else "rw"
        found.append({**mount, "size": int(size)} if size else mount)
    return found


def _ulimits(value: Any) -> dict[str, list[int]]:
    """From docker's words `nofile=64:128`, SDK `Ulimit` objects (Name, Soft, Hard) or {"name": (soft, hard)}."""
    items = value.items() if isinstance(value, Mapping) else [_ulimit_item(item) for item in value]
    found: dict[str, list[int]] = {}
    for name, numbers in items:
        soft, hard = (numbers, numbers) if isinstance(numbers, int) else numbers
        if name not in _ULIMITS:
            raise UsageError(f"invalid ulimit type: {name}")
        if soft > hard != -1:
            raise UsageError(f"ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}")
        found[name] = [int(soft), int(hard)]
    return found


def _ulimit_item(item: Any) -> tuple[str, tuple[int, int]]:
    if isinstance(item, str):
        name, _, text = item.partition("=")
        soft, _, hard = text.partition(":")
        try:
            return name, (int(soft), int(hard or soft))
        except ValueError:
            raise UsageError(f"invalid ulimit argument: {item}", resolution="NAME=SOFT[:HARD]") from None
    read = {str(key).lower(): number for key, number in item.items()}
    hard = read.get("hard", read.get("soft", 0))
    return str(read.get("name")), (int(read.get("soft", hard)), int(hard))


def _restart_policy(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        word, _, times = value.partition(":")
        if times and not times.isdigit():
            raise UsageError("invalid restart policy format: maximum retry count must be an integer")
        value = {"Name": word, "MaximumRetryCount": int(times or 0)}
    name = str(value.get("Name") or value.get("name") or "no")
    retries = int(value.get("MaximumRetryCount") or value.get("max_retries") or 0)
    if name not in ("no", "always", "unless-stopped", "on-failure"):
        raise UsageError(
            f"invalid restart policy: unknown policy '{name}'; "
            "use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
        )
    if retries < 0:
        raise UsageError("invalid restart policy: maximum retry count cannot be negative")
    if retries and name != "on-failure":
        raise UsageError("invalid restart policy: maximum retry count can only be used with 'on-failure'")
    return {"name": name, "max_retries": retries}


def _oom_score_adj(value: Any) -> int:
    number = _number(value)
    if not -1000 <= number <= 1000:
        raise UsageError(f"Invalid value {number}, range for oom score adj is [-1000, 1000]")
    return number


def _shm_size(value: Any) -> int:
    size = parse_size(value, "shm size")
    if size < 0:
        raise UsageError("SHM size can not be less than 0")
    return size


def _network_mode(value: Any) -> str:
    mode = str(value)
    if mode.startswith("ns:") or mode == "container:":
        raise UsageError(f"invalid network mode: {mode}")
    return mode


def _extra_hosts(value: Any) -> list[str]:
    items = [f"{k}:{v}" for k, v in value.items()] if isinstance(value, Mapping) else list(map(str, value))
    for item in items:
        name, _, address = item.replace("=", ":", 1).partition(":")
        if not name or not address:
            raise UsageError(f'bad format for add-host: "{item}"', resolution="NAME:ADDRESS or NAME:host-gateway")
        if address != "host-gateway":
            _ip_address(address.removeprefix("[").removesuffix("]"), "invalid IP address in add-host")
    return [item.replace("=", ":", 1) if ":" not in item.partition("=")[0] else item for item in items]


def _ip_address(text: str, complaint: str) -> str:
    import ipaddress  # costs more than most containers need

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UsageError(f'{complaint}: "{text}"') from None


def _dns(value: Any) -> list[str]:
    return [_ip_address(word, "IP address is not correctly formatted") for word in _words(value)]


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(word) for word in value]


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "attach": lambda value: [str(word).lower() for word in value],
    "annotations": _labels,
    "auto_remove": _flag,
    "blkio_weight": _number,
    "blkio_weight_device": devicelimits.weights,
    "cap_add": _capabilities("CapAdd"),
    "cap_drop": _capabilities("CapDrop"),
    "cgroup_parent": sharing.cgroup_parent,
    "cgroupns": sharing.mode_check("cgroupns", "private", "host"),
    "count_denials": _flag,
    "console_size": lambda value: [int(number) for number in value],
    "cpu_period": _number,
    "cpu_quota": _number,
    "cpu_shares": _number,
    "cpuset_cpus": _text,
    "cpuset_mems": _text,
    **{setting: devicelimits.rates(setting) for setting in devicelimits.RATES},
    "device_cgroup_rules": devicelimits.rules,
    "device_requests": sharing.device_requests,
    "devices": sharing.devices,
    "dns": _dns,
    "dns_opt": _words,
    "dns_search": _words,
    "domainname": _text,
    "entrypoint": _entrypoint,
    "environment": _environment,
    "exposed_ports": netsettings.exposed,
    "extra_hosts": _extra_hosts,
    "group_add": _words,
    "healthcheck": healthcheck.check,
    "hostname": _hostname,
    "init": _flag,
    "ipc_mode": sharing.mode_check("ipc", "none", "private", "shareable", "host", container=True),
    "labels": _labels,
    "log_config": logsettings.check,
    "mac_address": netsettings.mac_address,
    "mem_limit": lambda value: parse_size(value, "memory limit"),
    "mem_reservation": lambda value: parse_size(value, "memory reservation"),
    "mem_swappiness": _number,
    "memswap_limit": lambda value: parse_size(value, "memory and swap limit"),
    "mounts": _mounts,
    "name": lambda value: check_name(str(value)),
    "nano_cpus": _number,
    "network": _network_mode,
    "network_disabled": _flag,
    "network_mode": _network_mode,
    "networking_config": netsettings.networking_config,
    "oom_kill_disable": _flag,
    "oom_score_adj": _oom_score_adj,
    "pid_mode": sharing.mode_check("pid", "host", container=True),
    "pids_limit": _number,
    "platform": _text,
    "ports": netsettings.ports,
    "privileged": _flag,
    "publish_all_ports": _flag,
    "read_only": _flag,
    "restart_policy": _restart_policy,
    "runtime": sharing.only("runtime", "unknown or invalid runtime name", "labkernel", "runc"),
    "security_opt": _security_opt,
    "shm_size": _shm_size,
    "stdin_once": _flag,
    "stdin_open": _flag,
    "stop_signal": parse_signal,
    "stop_timeout": _number,
    "sysctls": sharing.sysctls,
    "tmpfs": _tmpfs,
    "tty": _flag,
    "ulimits": _ulimits,
    "user": _text,
    "userns_mode": sharing.mode_check("userns", "host"),
    "uts_mode": sharing.mode_check("uts", "host"),
    "volume_driver": sharing.only("volume driver", "no such volume driver", "local"),
    "volumes": _volumes,
    "volumes_from": _words,
    "working_dir": _working_dir,
}


def _check_memory(settings: Mapping[str, Any]) -> None:
    limit, reservation = settings.get("mem_limit", 0), settings.get("mem_reservation", 0)
    swap, swappiness = settings.get("memswap_limit", 0), settings.get("mem_swappiness")
    if limit < 0 or 0 < limit < MINIMUM_MEMORY_BYTES:
        raise UsageError("Minimum memory limit allowed is 6MB", resolution="for example --memory 64m")
    if 0 < reservation < MINIMUM_MEMORY_BYTES:
        raise UsageError("Minimum memory reservation allowed is 6MB")
    if limit and reservation > limit:
        raise UsageError("Minimum memory limit can not be less than memory reservation limit, see usage")
    if swap > 0 and not limit:
        raise UsageError("You should always set the Memory limit when using Memoryswap limit, see usage")
    if 0 < swap < limit:
        raise UsageError("Minimum memoryswap limit should be larger than memory limit, see usage")
    if swappiness is not None and not -1 <= swappiness <= 100:
        raise UsageError(f"Invalid value: {swappiness}, valid memory swappiness range is 0-100")


def _check_cpu(settings: Mapping[str, Any], cpus: int | None) -> None:
    nano, quota, period = (settings.get(key, 0) for key in ("nano_cpus", "cpu_quota", "cpu_period"))
    if nano and (quota or period):
        other = "Quota" if quota else "Period"
        raise UsageError(f"Conflicting options: Nano CPUs and CPU {other} cannot both be set.")
    cpus = available_cpus() if nano and cpus is None else cpus or 0
    if nano and not 10_000_000 <= nano <= cpus * 1_000_000_000:
        raise UsageError(f"Range of CPUs is from 0.01 to {cpus}.00, as there are only {cpus} CPUs available")
    if period and not 1000 <= period <= 1_000_000:
        raise UsageError("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
    if quota > 0 and quota < 1000:
        raise UsageError("CPU cfs quota can not be less than 1ms (i.e. 1000)")
    if settings.get("cpu_shares", 0) < 0:
        raise UsageError(f"invalid CPU shares ({settings['cpu_shares']}): value must be a positive integer")
    if settings.get("cpuset_cpus") and not _cpu_list(settings["cpuset_cpus"]) <= set(range(os.cpu_count() or 1)):
        last = (os.cpu_count() or 1) - 1
        raise UsageError(f"Requested CPUs are not available - requested {settings['cpuset_cpus']}, available: 0-{last}")
    weight = settings.get("blkio_weight", 0)
    if weight and not 10 <= weight <= 1000:
        raise UsageError("Range of blkio weight is from 10 to 1000")


def _cpu_list(text: str) -> set[int]:
    """The CPUs of a list such as `0-2,4` (man 7 cpuset, List format)."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found.update(range(int(first), int(last or first) + 1))
        except ValueError:
            raise UsageError(f"Invalid value {text} for cpuset cpus") from None
    return found


def _check_together(settings: Mapping[str, Any]) -> None:
    if settings.get("auto_remove") and (settings.get("restart_policy") or {}).get("name", "no") != "no":
        raise UsageError("can't create 'AutoRemove' container with restart policy")
    if settings.get("network") and settings.get("network_mode"):
        raise UsageError("network and network_mode cannot both be set")
    if settings.get("hostname") and settings.get("uts_mode") == "host":
        raise UsageError("conflicting options: hostname and the UTS mode")
    if str(settings.get("network_mode", "")).startswith("container:"):
        for key, words in (("hostname", "hostname"), ("extra_hosts", "custom host-to-IP mapping")):
            if settings.get(key):
                raise UsageError(f"conflicting options: {words} and the network mode")
    sharing.check_sysctls(settings)
    seen: set[str] = set()
    places = [volume["destination"] for volume in settings.get("volumes", ())]
    places += [mount["destination"] for mount in settings.get("mounts", ())]
    for place in [*places, *(os.path.normpath(path) for path in settings.get("tmpfs", ()))]:
        if place in seen:
            raise UsageError(f"Duplicate mount point: {place}")
        seen.add(place)
