"""A container as the Engine API describes it, to the settings that `Containers.create` takes.

The bodies are types, so a word of the wrong kind is refused with its place before anything is done. What the engine
does not have is refused when it is asked for, and passed over when it stands there with the value that means nothing.
Source: Docker Engine API, ContainerCreate.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import UsageError

Words = list[str] | str | None
Numbers = int | None


class Restart(msgspec.Struct, rename="pascal"):
    name: str = ""
    maximum_retry_count: int = 0


class LogConfig(msgspec.Struct, rename="pascal"):
    type: str = ""
    config: dict[str, str] | None = None


class Device(msgspec.Struct, rename="pascal"):
    path_on_host: str = ""
    path_in_container: str = ""
    cgroup_permissions: str = ""


class Ulimit(msgspec.Struct, rename="pascal"):
    name: str = ""
    soft: int = 0
    hard: int = 0


class VolumeOptions(msgspec.Struct, rename="pascal"):
    no_copy: bool = False
    labels: dict[str, str] | None = None
    subpath: str = ""


class TmpfsOptions(msgspec.Struct, rename="pascal"):
    size_bytes: int = 0
    mode: int = 0


class BindOptions(msgspec.Struct, rename="pascal"):
    propagation: str = ""
    create_mountpoint: bool = False
    non_recursive: bool = False


class Mount(msgspec.Struct, rename="pascal"):
    type: str = ""
    source: str = ""
    target: str = ""
    read_only: bool = False
    consistency: str = ""
    volume_options: VolumeOptions | None = None
    tmpfs_options: TmpfsOptions | None = None
    bind_options: BindOptions | None = None


class Binding(msgspec.Struct, rename="pascal"):
    host_ip: str = ""
    host_port: str = ""


class Healthcheck(msgspec.Struct, rename="pascal", omit_defaults=True):
    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    retries: int = 0
    start_period: int = 0
    start_interval: int = 0


class WeightDevice(msgspec.Struct, rename="pascal"):
    path: str = ""
    weight: int = 0


class ThrottleDevice(msgspec.Struct, rename="pascal"):
    """`rate`: bytes or operations per second."""

    path: str = ""
    rate: int = 0


class Resources(msgspec.Struct, rename="pascal"):
    """Limits, as ContainerUpdate has them, too."""

    cpu_shares: Numbers = None
    memory: Numbers = None
    nano_cpus: Numbers = None
    cgroup_parent: str | None = None
    blkio_weight: Numbers = None
    cpu_period: Numbers = None
    cpu_quota: Numbers = None
    cpu_realtime_period: Numbers = None
    cpu_realtime_runtime: Numbers = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    devices: list[Device] | None = None
    device_cgroup_rules: list[str] | None = None
    device_requests: list[Any] | None = None
    kernel_memory: Numbers = None
    memory_reservation: Numbers = None
    memory_swap: Numbers = None
    memory_swappiness: Numbers = None
    oom_kill_disable: bool | None = None
    pids_limit: Numbers = None
    ulimits: list[Ulimit] | None = None
    blkio_weight_device: list[WeightDevice] | None = None
    blkio_device_read_bps: list[ThrottleDevice] | None = None
    blkio_device_write_bps: list[ThrottleDevice] | None = None
    blkio_device_read_iops: list[ThrottleDevice] | None = msgspec.field(default=None, name="BlkioDeviceReadIOps")
    blkio_device_write_iops: list[ThrottleDevice] | None = msgspec.field(default=None, name="BlkioDeviceWriteIOps")


class Update(Resources, rename="pascal"):
    """ContainerUpdate."""

    restart_policy: Restart | None = None


class HostConfig(Update, rename="pascal"):
    binds: list[str] | None = None
    log_config: LogConfig | None = None
    network_mode: str | None = None
    port_bindings: dict[str, list[Binding] | None] | None = None
    auto_remove: bool | None = None
    volume_driver: str | None = None
    volumes_from: list[str] | None = None
    console_size: list[int] | None = None
    cap_add: Words = None
    cap_drop: Words = None
    cgroupns_mode: str | None = None
    dns: list[str] | None = None
    dns_options: list[str] | None = None
    dns_search: list[str] | None = None
    extra_hosts: list[str] | None = None
    group_add: list[str] | None = None
    ipc_mode: str | None = None
    links: list[str] | None = None
    oom_score_adj: Numbers = None
    pid_mode: str | None = None
    privileged: bool | None = None
    publish_all_ports: bool | None = None
    readonly_rootfs: bool | None = None
    security_opt: list[str] | None = None
    storage_opt: dict[str, str] | None = None
    tmpfs: dict[str, str] | None = None
    uts_mode: str | None = msgspec.field(default=None, name="UTSMode")
    userns_mode: str | None = None
    shm_size: Numbers = None
    sysctls: dict[str, str] | None = None
    runtime: str | None = None
    isolation: str | None = None
    mounts: list[Mount] | None = None
    init: bool | None = None


class Endpoint(msgspec.Struct, rename="pascal", omit_defaults=True):
    """EndpointSettings, as far as a client may ask for something with them."""

    aliases: list[str] | None = None
    links: list[str] | None = None
    mac_address: str | None = None
    ipam_config: dict[str, Any] | None = msgspec.field(default=None, name="IPAMConfig")
    driver_opts: dict[str, str] | None = None
    ip_address: str | None = msgspec.field(default=None, name="IPAddress")
    gw_priority: int | None = None


class Networking(msgspec.Struct, rename="pascal"):
    endpoints_config: dict[str, Endpoint | None] | None = None


class Config(msgspec.Struct, rename="pascal"):
    """ContainerCreate. `volumes` and `exposed_ports` are Go's sets: name → {}."""

    hostname: str | None = None
    domainname: str | None = None
    user: str | None = None
    attach_stdin: bool | None = None
    attach_stdout: bool | None = None
    attach_stderr: bool | None = None
    exposed_ports: dict[str, Any] | None = None
    tty: bool | None = None
    open_stdin: bool | None = None
    stdin_once: bool | None = None
    env: list[str] | None = None
    cmd: Words = None
    healthcheck: Healthcheck | None = None
    image: str | None = None
    volumes: dict[str, Any] | None = None
    working_dir: str | None = None
    entrypoint: Words = None
    network_disabled: bool | None = None
    mac_address: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    stop_timeout: Numbers = None
    host_config: HostConfig | None = None
    networking_config: Networking | None = None


_LIMITS = {
    "cpu_shares": "cpu_shares",
    "memory": "mem_limit",
    "nano_cpus": "nano_cpus",
    "blkio_weight": "blkio_weight",
    "cpu_period": "cpu_period",
    "cpu_quota": "cpu_quota",
    "cpuset_cpus": "cpuset_cpus",
    "cpuset_mems": "cpuset_mems",
    "memory_reservation": "mem_reservation",
    "memory_swap": "memswap_limit",
    "pids_limit": "pids_limit",
    "oom_kill_disable": "oom_kill_disable",
}
_DEVICE_LIMITS = {
    "blkio_weight_device": "blkio_weight_device",
    "blkio_device_read_bps": "device_read_bps",
    "blkio_device_write_bps": "device_write_bps",
    "blkio_device_read_iops": "device_read_iops",
    "blkio_device_write_iops": "device_write_iops",
}
_SAME = (
    *("volumes_from", "cap_add", "cap_drop", "dns", "dns_search", "extra_hosts", "group_add", "ipc_mode", "pid_mode"),
    *("privileged", "publish_all_ports", "security_opt", "tmpfs", "uts_mode", "userns_mode", "shm_size", "sysctls"),
    *("oom_score_adj", "auto_remove", "device_cgroup_rules", "cgroup_parent"),
)
_ABSENT = {
    "cpu_realtime_period": "real-time scheduling",
    "cpu_realtime_runtime": "real-time scheduling",
    "storage_opt": "storage options",
}
_DEFAULTS = {
    "runtime": ("", "labkernel", "runc", "crun", "io.containerd.runc.v2"),
    "isolation": ("", "default"),
    "volume_driver": ("", "local"),
}


def settings_of(config: Config) -> tuple[list[str] | str, dict[str, Any]]:
    """(command, settings) for `Containers.create`. Raises UsageError."""
    host = config.host_config or HostConfig()
    found: dict[str, Any] = {
        "hostname": config.hostname or None,
        "domainname": config.domainname or None,
        "user": config.user or None,
        "tty": config.tty,
        "stdin_open": config.open_stdin,
        "stdin_once": config.stdin_once,
        "attach": [name for name in ("stdin", "stdout", "stderr") if getattr(config, f"attach_{name}")] or None,
        "environment": config.env,
        "healthcheck": None if config.healthcheck is None else msgspec.to_builtins(config.healthcheck) or None,
        "working_dir": config.working_dir or None,
        "entrypoint": _entrypoint(config.entrypoint),
        "network_disabled": config.network_disabled or None,
        "mac_address": config.mac_address or None,
        "labels": config.labels,
        "stop_signal": config.stop_signal or None,
        "stop_timeout": config.stop_timeout,
        "exposed_ports": list(config.exposed_ports) if config.exposed_ports else None,
    }
    found.update(_host_settings(config, host))
    found["networking_config"] = _networks(config, host) or None
    return config.cmd or [], {name: value for name, value in found.items() if value is not None}


def limits_of(given: Update) -> dict[str, Any]:
    """What `Container.update` takes: only what is given, 0 being nothing. Raises UsageError."""
    _refuse(given)
    found = {ours: value for theirs, ours in _LIMITS.items() if (value := getattr(given, theirs)) not in (None, 0, "")}
    found |= {
        ours: msgspec.to_builtins(each) for theirs, ours in _DEVICE_LIMITS.items() if (each := getattr(given, theirs))
    }
    if given.restart_policy is not None and given.restart_policy.name:
        found["restart_policy"] = _restart(given.restart_policy)
    return found


def changes_of(given: Update) -> dict[str, Any]:
    """As `limits_of`, for a container that is there. Raises UsageError also for what only a new one can have."""
    for name in ("cgroup_parent", "device_cgroup_rules", "oom_kill_disable", *_DEVICE_LIMITS):
        if getattr(given, name):
            raise UsageError(
                f"{name.replace('_', ' ')} cannot be changed", resolution="it is given when a container is made"
            )
    return limits_of(given)


def _host_settings(config: Config, host: HostConfig) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for name in _SAME if (value := getattr(host, name))}
    found.update(limits_of(host))
    swappiness = host.memory_swappiness
    mode, log = host.network_mode, host.log_config
    found.update(
        {
            "dns_opt": host.dns_options or None,
            "read_only": host.readonly_rootfs or None,
            "cgroupns": host.cgroupns_mode or None,
            "console_size": host.console_size if host.console_size and any(host.console_size) else None,
            "init": host.init,
            "log_config": msgspec.to_builtins(log) if log is not None and (log.type or log.config) else None,
            "mem_swappiness": None if swappiness in (None, -1) else swappiness,
            "network_mode": None if mode in (None, "", "default") else mode,
            "volumes": [*(host.binds or ()), *_anonymous(config, host)] or None,
            "mounts": [_mount(mount) for mount in host.mounts or ()] or None,
            "ports": _ports(host.port_bindings),
            "devices": [_device(device) for device in host.devices or ()] or None,
            "device_requests": host.device_requests or None,
            "ulimits": {each.name: [each.soft, each.hard] for each in host.ulimits or ()} or None,
        }
    )
    return found


def _networks(config: Config, host: HostConfig) -> dict[str, Any]:
    """What is asked of each network; the one of the network mode only when something is asked of it."""
    mode = host.network_mode or "default"
    found: dict[str, Any] = {}
    for name, endpoint in ((config.networking_config or Networking()).endpoints_config or {}).items():
        asked = {key: value for key, value in msgspec.to_builtins(endpoint or Endpoint()).items() if value}
        if asked or name != mode:
            found[name] = asked
    if host.links:
        asked = found.setdefault(mode, {})
        asked["links"] = [*asked.get("links", ()), *host.links]
    return found


def _refuse(given: Update) -> None:
    for name, what in _ABSENT.items():
        if getattr(given, name, None):
            raise UsageError(f"{what} are not available in this release: {name}")
    for name, usual in _DEFAULTS.items():
        if (getattr(given, name, None) or "") not in usual:
            raise UsageError(f"unknown or invalid {name.replace('_', ' ')} name: {getattr(given, name)}")


def _entrypoint(value: Words) -> list[str] | None:
    # docker: no entrypoint is the image's, [""] is none at all
    if value is None or value == []:
        return None
    words = [value] if isinstance(value, str) else value
    return [] if words == [""] else words


def _restart(policy: Restart) -> dict[str, Any]:
    return {"Name": policy.name, "MaximumRetryCount": policy.maximum_retry_count}


def _mount(mount: Mount) -> dict[str, Any]:
    if mount.volume_options is not None and mount.volume_options.subpath:
        raise UsageError("a part of a volume cannot be mounted in this release: Subpath")
    found = {"Type": mount.type, "Source": mount.source, "Target": mount.target, "ReadOnly": mount.read_only}
    if mount.tmpfs_options is not None and mount.tmpfs_options.size_bytes:
        found["TmpfsOptions"] = {"SizeBytes": mount.tmpfs_options.size_bytes}
    return found


def _device(device: Device) -> str:
    inside = device.path_in_container or device.path_on_host
    return f"{device.path_on_host}:{inside}:{device.cgroup_permissions or 'rwm'}"


def _ports(bindings: dict[str, list[Binding] | None] | None) -> dict[str, Any] | None:
    if not bindings:
        return None
    return {
        port: [{"HostIp": each.host_ip, "HostPort": each.host_port} for each in hosts or [Binding()]]
        for port, hosts in bindings.items()
    }


def _anonymous(config: Config, host: HostConfig) -> list[str]:
    """The places of `Volumes` where nothing else is mounted: docker-compose names those of its binds there, too."""
    taken = {word.split(":")[1] for word in host.binds or () if ":" in word}
    taken |= {mount.target for mount in host.mounts or ()} | set(host.tmpfs or ())
    return [place for place in config.volumes or () if place not in taken]
