"""From docker's flags to the Docker SDK's keyword arguments (`--memory 64m` → `mem_limit="64m"`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ..errors import LabkernelError, UsageError
from .netflags import network_settings

# Flag (as click names it) → keyword of the service, where the value goes over as it is.
_PLAIN = {
    "name": "name",
    "workdir": "working_dir",
    "user": "user",
    "hostname": "hostname",
    "memory": "mem_limit",
    "memory_swap": "memswap_limit",
    "memory_reservation": "mem_reservation",
    "cpu_shares": "cpu_shares",
    "cpu_quota": "cpu_quota",
    "cpu_period": "cpu_period",
    "cpuset_cpus": "cpuset_cpus",
    "cpuset_mems": "cpuset_mems",
    "memory_swappiness": "mem_swappiness",
    "group_add": "group_add",
    "domainname": "domainname",
    "dns_search": "dns_search",
    "dns_option": "dns_opt",
    "pids_limit": "pids_limit",
    "read_only": "read_only",
    "privileged": "privileged",
    "tty": "tty",
    "init": "init",
    "shm_size": "shm_size",
    "stop_signal": "stop_signal",
    "stop_timeout": "stop_timeout",
    "oom_score_adj": "oom_score_adj",
    "platform": "platform",
    "cap_add": "cap_add",
    "cap_drop": "cap_drop",
    "security_opt": "security_opt",
    "dns": "dns",
    "blkio_weight": "blkio_weight",
    "blkio_weight_device": "blkio_weight_device",
    "device_read_bps": "device_read_bps",
    "device_write_bps": "device_write_bps",
    "device_read_iops": "device_read_iops",
    "device_write_iops": "device_write_iops",
    "device_cgroup_rule": "device_cgroup_rules",
    "cgroup_parent": "cgroup_parent",
    "count_denials": "count_denials",
    "oom_kill_disable": "oom_kill_disable",
    "annotation": "annotations",
    "volume_driver": "volume_driver",
    "runtime": "runtime",
    "cgroupns": "cgroupns",
    "device": "devices",
    "ipc": "ipc_mode",
    "pid": "pid_mode",
    "userns": "userns_mode",
    "uts": "uts_mode",
    "volumes_from": "volumes_from",
}


def settings_of(flags: Mapping[str, Any], cwd: Path | None = None) -> dict[str, Any]:
    """The settings of `containers.create` that these flags of `run` or `create` mean; only those that were given.

    Raises UsageError with docker's words for values that cannot be meant.
    """
    cwd = cwd or Path.cwd()
    settings: dict[str, Any] = {}
    for name, keyword in _PLAIN.items():
        value = flags.get(name)
        if value is not None and value is not False and value != ():
            settings[keyword] = list(value) if isinstance(value, tuple) else value
    if flags.get("entrypoint") is not None:
        settings["entrypoint"] = [flags["entrypoint"]] if flags["entrypoint"] else []
    if flags.get("interactive"):
        settings["stdin_open"] = True
    if flags.get("cpus") is not None:
        settings["nano_cpus"] = nano_cpus(flags["cpus"])
    environment = environment_of(flags, cwd)
    if environment:
        settings["environment"] = environment
    labels = labels_of(flags, cwd)
    if labels:
        settings["labels"] = labels
    if flags.get("restart"):
        settings["restart_policy"] = restart_policy(flags["restart"])
    if flags.get("ulimit"):
        settings["ulimits"] = [ulimit(word) for word in flags["ulimit"]]
    if flags.get("add_host"):
        settings["extra_hosts"] = list(flags["add_host"])
    if flags.get("sysctl"):
        settings["sysctls"] = dict(_pair(word, "=", "--sysctl") for word in flags["sysctl"])
    settings.update(network_settings(flags))
    if flags.get("log_driver") or flags.get("log_opt"):
        options = dict(_pair(word, "=", "--log-opt") for word in flags.get("log_opt") or ())
        settings["log_config"] = {"Type": flags.get("log_driver") or "json-file", "Config": options}
    check = healthcheck_of(flags)
    if check:
        settings["healthcheck"] = check
    _mounts(settings, flags, cwd)
    return settings


def nano_cpus(text: str) -> int:
    """`0.5` CPUs as 500000000. Raises UsageError for what is no positive decimal."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise UsageError(
            f'invalid argument "{text}" for "--cpus" flag: not a decimal', resolution="for example --cpus 0.5"
        ) from None
    if not value.is_finite() or value < 0:
        raise UsageError(f'invalid argument "{text}" for "--cpus" flag: must be positive')
    return int(value * 1_000_000_000)


def environment_of(flags: Mapping[str, Any], cwd: Path) -> dict[str, str | None]:
    """--env-file, then -e; a bare name passes our own variable on. Where there is none a file's name is left out, and
    one of -e is None: it unsets the image's."""
    lines = [line for name in flags.get("env_file") or () for line in read_lines(cwd, name, "env")]
    lines = [line for line in lines if "=" in line or line in os.environ or not line]
    result: dict[str, str | None] = {}
    for word in (*lines, *(flags.get("env") or ())):
        name, equals, value = word.partition("=")
        if not name:
            raise UsageError(f'invalid argument "{word}" for "-e, --env" flag: invalid environment variable: {word}')
        result[name] = value if equals else os.environ.get(name)
    return result


def labels_of(flags: Mapping[str, Any], cwd: Path) -> dict[str, str]:
    lines = [line for name in flags.get("label_file") or () for line in read_lines(cwd, name, "label")]
    for word in flags.get("label") or ():
        name = word.partition("=")[0]
        if not name or any(map(str.isspace, name)):
            told = f"invalid label '{word}': empty name" if not name else f"label '{name}' contains whitespaces"
            raise UsageError(f'invalid argument "{word}" for "-l, --label" flag: {told}', resolution="KEY=VALUE")
    pairs = (word.partition("=") for word in (*(line for line in lines if "=" in line), *(flags.get("label") or ())))
    return {name: value for name, _, value in pairs}


def healthcheck_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """--health-* and --no-healthcheck as the SDK's `healthcheck`; empty when none was given."""
    found: dict[str, Any] = {}
    if flags.get("health_cmd"):
        found["test"] = ["CMD-SHELL", flags["health_cmd"]]
    for name in ("interval", "timeout", "start_period", "start_interval"):
        text = flags.get(f"health_{name}")
        if text:
            found[name] = duration_ns(text, f"--health-{name.replace('_', '-')}")
    if flags.get("health_retries"):
        found["retries"] = flags["health_retries"]
    if not flags.get("no_healthcheck"):
        return found
    if found:
        raise UsageError("--no-healthcheck conflicts with --health-* options")
    return {"test": ["NONE"]}


def duration_ns(text: str, name: str) -> int:
    """Go's durations (`1m30s`) in nanoseconds."""
    from ..dockerfile.durations import parse_duration_ns

    try:
        return parse_duration_ns(text)
    except LabkernelError as err:
        raise UsageError(
            f'invalid argument "{text}" for "{name}" flag: {err.brief}', resolution=err.resolution
        ) from None


def restart_policy(text: str) -> dict[str, Any]:
    """`on-failure:3` as the SDK's {"Name", "MaximumRetryCount"}."""
    name, colon, count = text.partition(":")
    if name not in ("no", "always", "unless-stopped", "on-failure") or (colon and not count.isdigit()):
        raise UsageError(
            f"invalid restart policy: {text}", resolution="one of no, on-failure[:N], always, unless-stopped"
        )
    return {"Name": name, "MaximumRetryCount": int(count) if count else 0}


def ulimit(text: str) -> dict[str, Any]:
    """`nofile=1024:2048` as the SDK's {"Name", "Soft", "Hard"}."""
    name, _, values = text.partition("=")
    soft, colon, hard = values.partition(":")
    try:
        return {"Name": name, "Soft": int(soft), "Hard": int(hard if colon else soft)}
    except ValueError:
        raise UsageError(
            f'invalid argument "{text}" for "--ulimit" flag: invalid ulimit argument: {text}',
            resolution="for example nofile=1024:2048",
        ) from None


def _mounts(settings: dict[str, Any], flags: Mapping[str, Any], cwd: Path) -> None:
    volumes = [volume(word, cwd) for word in flags.get("volume") or ()]
    tmpfs = dict(word.partition(":")[::2] for word in flags.get("tmpfs") or ())
    for word in flags.get("mount") or ():
        kind, source, target, options = _mount(word, cwd)
        if kind == "tmpfs":
            tmpfs[target] = options
        else:
            volumes.append(":".join(part for part in (source, target, options) if part))
    if volumes:
        settings["volumes"] = volumes
    if tmpfs:
        settings["tmpfs"] = tmpfs


def volume(text: str, cwd: Path) -> str:
    """`./data:/data:ro` with its source made absolute, as the docker CLI does; names of volumes stay."""
    source, colon, rest = text.partition(":")
    if colon and source.startswith((".", "~")):
        return f"{(cwd / Path(source).expanduser()).resolve()}:{rest}"
    return text


def _mount(text: str, cwd: Path) -> tuple[str, str, str, str]:
    """--mount's key=value list as (type, source, target, options)."""
    parts = _mount_parts(text)
    kind, target, source = parts.pop("type", "volume"), parts.pop("target", ""), parts.pop("source", "")
    words = ["ro"] if parts.pop("readonly", "false") == "true" else []
    if not target:
        raise _wrong_mount(text, "target is required")
    if kind not in ("bind", "volume", "tmpfs"):
        raise UsageError(f'invalid mount config for type "{kind}": mount type unknown', resolution=_MOUNT_HINT)
    foreign = next((key for key in parts if key.partition("-")[0] != kind and key != "consistency"), None)
    if foreign:
        raise _wrong_mount(text, f"cannot mix '{foreign.partition('-')[0]}-*' options with mount type '{kind}'")
    if kind == "tmpfs":
        if source:
            raise UsageError(
                'invalid mount config for type "tmpfs": field Source must not be specified', resolution=_MOUNT_HINT
            )
        size, mode = parts.get("tmpfs-size"), parts.get("tmpfs-mode")
        options = [*([f"size={size}"] if size else []), *([f"mode={mode}"] if mode else []), *words]
        return kind, "", target, ",".join(options)
    words += [parts["bind-propagation"]] if parts.get("bind-propagation") else []
    words += ["nocopy"] if parts.get("volume-nocopy") == "true" else []
    if kind == "bind":
        if not source:
            raise UsageError(
                'invalid mount config for type "bind": field Source must not be empty', resolution=_MOUNT_HINT
            )
        source = str((cwd / Path(source).expanduser()).resolve())
        if not os.path.exists(source):
            raise UsageError(f'invalid mount config for type "bind": bind source path does not exist: {source}')
    return kind, source, target, ",".join(words)


_MOUNT_HINT = "for example --mount type=bind,src=/data,dst=/data,readonly"
_MOUNT_KEYS = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
_MOUNT_FLAGS = ("readonly", "volume-nocopy")
_MOUNT_KNOWN = (
    *_MOUNT_FLAGS,
    "bind-propagation",
    "consistency",
    "source",
    "target",
    "tmpfs-mode",
    "tmpfs-size",
    "type",
)


def _mount_parts(text: str) -> dict[str, str]:
    """The pairs of a line of comma-separated values; flags as `true` or `false`. Raises UsageError."""
    import csv

    parts: dict[str, str] = {}
    for word in next(csv.reader([text]), []):
        key, equals, value = word.partition("=")
        name = _MOUNT_KEYS.get(key.lower(), key.lower())
        if name in _MOUNT_FLAGS:
            value = value.lower() if equals else "true"
            if value not in ("true", "1", "false", "0"):
                raise _wrong_mount(text, f"invalid value for {key}: {value}")
            value = "true" if value in ("true", "1") else "false"
        elif not equals:
            raise _wrong_mount(text, f"invalid field '{word}' must be a key=value pair")
        elif name not in _MOUNT_KNOWN:
            raise _wrong_mount(text, f"unexpected key '{key}' in '{word}'")
        parts[name] = value
    return parts


def _wrong_mount(text: str, why: str) -> UsageError:
    return UsageError(f'invalid argument "{text}" for "--mount" flag: {why}', resolution=_MOUNT_HINT)


def _pair(word: str, separator: str, name: str) -> tuple[str, str]:
    left, found, right = word.partition(separator)
    if not (left and found and right):
        raise UsageError(f'invalid argument "{word}" for "{name}" flag', resolution=f"for example {name} host:10.0.0.1")
    return left, right


def read_lines(cwd: Path, name: str, kind: str) -> list[str]:
    """The lines of an --env-file or --label-file without comments and blanks before them, checked as docker does.

    Raises UsageError when it cannot be read, and for a line without a name or with blanks in it."""
    try:
        lines = (cwd / name).read_text(encoding="utf-8-sig").splitlines()
    except OSError as err:
        raise UsageError(f"open {name}: {(err.strerror or str(err)).lower()}") from None
    except UnicodeDecodeError:
        raise UsageError(f"invalid {kind} file ({name}): not UTF-8") from None
    found = [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for line in found:
        word = line.partition("=")[0]
        if not word:
            raise UsageError(f"invalid {kind} file ({name}): no variable name on line '{line}'")
        if any(map(str.isspace, word)):
            raise UsageError(f"invalid {kind} file ({name}): variable '{word}' contains whitespaces")
    return found
