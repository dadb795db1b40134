"""A container as `docker inspect` shows it. Source: Docker Engine API, ContainerInspect."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..networking.settings import exposed_ports, network_settings, port_bindings, summarize_networks
from ..runtime import healthcheck
from ..runtime.logs import timestamp
from ..runtime.settings import signal_name
from ..runtime.sharing import parse_device
from ..runtime.spec import DEFAULT_SHM_BYTES, MASKED_PATHS, READONLY_PATHS, network_mode
from .guarantees import guarantees

if TYPE_CHECKING:
    from .container import Container

_NEVER = "0001-01-01T00:00:00Z"


def inspect_container(container: Container) -> dict[str, Any]:
    """The document; what this release does not have is there with the value docker gives when it is unused."""
    config, state = container.config(), container.runtime_state()
    own, directory = config["labkernel"], str(container.directory)
    return {
        "Id": container.id,
        "Created": _time(container.created_at),
        "Path": config["process"]["args"][0],
        "Args": config["process"]["args"][1:],
        "State": _state(state),
        "Image": container.image_id,
        "ResolvConfPath": f"{directory}/resolv.conf",
        "HostnamePath": f"{directory}/hostname",
        "HostsPath": f"{directory}/hosts",
        "LogPath": "" if _log_config(container.settings)["Type"] == "none" else str(container.log_path),
        "Name": f"/{container.name}",
        "RestartCount": int(state.get("restart_count") or 0),
        "Driver": "overlay2" if own["rootfs"]["kind"] == "overlay" else "vfs",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": None,
        "HostConfig": _host_config(container, config),
        "GraphDriver": _graph_driver(own["rootfs"]),
        "Mounts": [_mount(mount) for mount in container.record.get("mounts", ())],
        "Config": _config(container, config),
        "NetworkSettings": network_settings(container, state),
        "Labkernel": {
            "Driver": container._containers.driver_name,
            "Warnings": container.warnings,
            **guarantees(container),
            **_denied(state),
        },
    }


def summarize_container(container: Container, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parts of the document that `ps` shows; costs one state file, unless its content is known."""
    args = container.record.get("args") or container.command or [""]
    state = container.runtime_state() if state is None else state
    return {
        "Id": container.id,
        "Created": _time(container.created_at),
        "Path": args[0],
        "Args": args[1:],
        "State": _state(state),
        "HostConfig": {"NetworkMode": network_mode(container.settings)},
        "NetworkSettings": summarize_networks(container, state),
        "Mounts": [_mount(mount) for mount in container.record.get("mounts", ())],
        "Config": {"Image": container.image_ref, "Labels": container.labels},
    }


def _time(seconds: float | None) -> str:
    return timestamp(int(seconds * 1e9)) if seconds else _NEVER


def _state(state: Mapping[str, Any]) -> dict[str, Any]:
    status = state["status"]
    running = status in ("running", "paused", "restarting")
    found = {
        "Status": status,
        "Running": running,
        "Paused": status == "paused",
        "Restarting": status == "restarting",
        "OOMKilled": bool(state.get("oom_killed")),
        "Dead": status == "dead",
        "Pid": int(state.get("pid") or 0) if running else 0,
        "ExitCode": 0 if running else int(state.get("exit_code") or 0),
        "Error": state.get("error") or "",
        "StartedAt": _time(state.get("started_at")),
        "FinishedAt": _NEVER if running else _time(state.get("finished_at")),
    }
    return {**found, "Health": state["health"]} if state.get("health") else found


def _host_config(container: Container, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = container.settings
    restart = settings.get("restart_policy") or {"name": "no", "max_retries": 0}
    binds = [f"{v['source']}:{v['destination']}:{v['mode']}" for v in settings.get("volumes", ()) if v["source"]]
    return {
        "Binds": binds or None,
        "ContainerIDFile": "",
        "LogConfig": _log_config(settings),
        "NetworkMode": network_mode(container.settings),
        "PortBindings": port_bindings(settings),
        "RestartPolicy": {"Name": restart["name"], "MaximumRetryCount": restart["max_retries"]},
        "AutoRemove": bool(settings.get("auto_remove")),
        "VolumeDriver": settings.get("volume_driver", ""),
        "VolumesFrom": settings.get("volumes_from") or None,
        "CapAdd": settings.get("cap_add") or None,
        "CapDrop": settings.get("cap_drop") or None,
        "CgroupnsMode": settings.get("cgroupns") or "private",
        "Dns": settings.get("dns") or [],
        "DnsOptions": settings.get("dns_opt") or [],
        "DnsSearch": settings.get("dns_search") or [],
        "ExtraHosts": settings.get("extra_hosts") or None,
        "GroupAdd": settings.get("group_add") or None,
        "IpcMode": settings.get("ipc_mode") or "private",
        "Cgroup": "",
        "Links": None,
        "OomScoreAdj": settings.get("oom_score_adj", 0),
        "PidMode": settings.get("pid_mode") or "",
        "Privileged": bool(settings.get("privileged")),
        "PublishAllPorts": bool(settings.get("publish_all_ports")),
        "ReadonlyRootfs": bool(settings.get("read_only")),
        "SecurityOpt": settings.get("security_opt") or None,
        "Tmpfs": settings.get("tmpfs") or None,
        "UTSMode": settings.get("uts_mode") or "",
        "UsernsMode": settings.get("userns_mode") or "",
        "ShmSize": settings.get("shm_size") or DEFAULT_SHM_BYTES,
        "Runtime": "labkernel",
        "Isolation": "",
        **_resources(settings),
        "Init": settings.get("init"),
        "MaskedPaths": config["linux"].get("maskedPaths", list(MASKED_PATHS)),
        "ReadonlyPaths": config["linux"].get("readonlyPaths", list(READONLY_PATHS)),
    }


def _denied(state: Mapping[str, Any]) -> dict[str, Any]:
    if "denied" not in state:
        return {}
    from ..linux.seccomp import call_name

    named = {call_name(key): count for key, count in state["denied"].items()}
    return {"DeniedSystemCalls": dict(sorted(named.items(), key=lambda item: -item[1]))}


def _resources(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the Engine API calls `Resources`: its limits."""
    ulimits = settings.get("ulimits") or {}
    return {
        "CpuShares": settings.get("cpu_shares", 0),
        "Memory": settings.get("mem_limit", 0),
        "NanoCpus": settings.get("nano_cpus", 0),
        "CgroupParent": settings.get("cgroup_parent", ""),
        "BlkioWeightDevice": settings.get("blkio_weight_device") or [],
        "BlkioDeviceReadBps": settings.get("device_read_bps") or [],
        "BlkioDeviceWriteBps": settings.get("device_write_bps") or [],
        "BlkioDeviceReadIOps": settings.get("device_read_iops") or [],
        "BlkioDeviceWriteIOps": settings.get("device_write_iops") or [],
        "DeviceCgroupRules": settings.get("device_cgroup_rules") or None,
        "Annotations": settings.get("annotations") or {},
        "BlkioWeight": settings.get("blkio_weight", 0),
        "CpuPeriod": settings.get("cpu_period", 0),
        "CpuQuota": settings.get("cpu_quota", 0),
        "CpusetCpus": settings.get("cpuset_cpus", ""),
        "CpusetMems": settings.get("cpuset_mems", ""),
        "Devices": [_device(word) for word in settings.get("devices", ())],
        "DeviceRequests": _device_requests(settings.get("device_requests") or ()),
        **({"Sysctls": settings["sysctls"]} if settings.get("sysctls") else {}),
        "MemoryReservation": settings.get("mem_reservation", 0),
        "MemorySwap": settings.get("memswap_limit") or 2 * settings.get("mem_limit", 0),
        "MemorySwappiness": settings.get("mem_swappiness"),
        "OomKillDisable": settings.get("oom_kill_disable"),
        "PidsLimit": settings.get("pids_limit"),
        "Ulimits": [{"Name": name, "Soft": soft, "Hard": hard} for name, (soft, hard) in ulimits.items()] or None,
    }


def _log_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    given = settings.get("log_config") or {}
    return {"Type": given.get("type", "json-file"), "Config": given.get("config", {})}


def _device_requests(names: Sequence[str]) -> list[dict[str, Any]] | None:
    request = {"Driver": "cdi", "Count": 0, "DeviceIDs": list(names), "Capabilities": None, "Options": None}
    return [request] if names else None


def _device(word: str) -> dict[str, str]:
    source, target, access = parse_device(word)
    return {"PathOnHost": source, "PathInContainer": target, "CgroupPermissions": access}


def _graph_driver(rootfs: Mapping[str, Any]) -> dict[str, Any]:
    if rootfs["kind"] != "overlay":
        return {"Name": "vfs", "Data": {"RootDir": rootfs["path"]}}
    return {
        "Name": "overlay2",
        "Data": {
            "LowerDir": ":".join(rootfs["lower"]),
            "MergedDir": f"{os.path.dirname(rootfs['upper'])}/merged",
            "UpperDir": rootfs["upper"],
            "WorkDir": rootfs["work"],
        },
    }


def _mount(mount: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"Type": mount["type"]}
    if mount["type"] == "volume":
        found.update({"Name": mount["name"], "Driver": "local"})
    return {
        **found,
        "Source": mount["source"],
        "Destination": mount["destination"],
        "Mode": "" if mount["mode"] == "rw" else mount["mode"],
        "RW": mount["rw"],
        "Propagation": "rprivate" if mount["type"] == "bind" else "",
    }


def _config(container: Container, config: Mapping[str, Any]) -> dict[str, Any]:
    from .container import find_image

    settings, process = container.settings, config["process"]
    image = find_image(container)
    image_config = image.config if image else {}
    entrypoint = settings.get("entrypoint", image_config.get("Entrypoint"))
    cmd = container.command or (None if "entrypoint" in settings else image_config.get("Cmd"))
    volumes: dict[str, Any] = {
        mount["destination"]: {} for mount in container.record.get("mounts", ()) if mount.get("anonymous")
    }
    attached = settings.get("attach") or ()
    health = healthcheck.merge(image_config, settings)
    exposed: dict[str, Any] = {port: {} for port in exposed_ports(container, image_config.get("ExposedPorts") or ())}
    number = settings.get("stop_signal")
    stop_signal = signal_name(number) if number else image_config.get("StopSignal")
    return {
        "Hostname": config.get("hostname") or "",
        "Domainname": settings.get("domainname", ""),
        "User": settings.get("user") or image_config.get("User") or "",
        "AttachStdin": "stdin" in attached,
        "AttachStdout": "stdout" in attached,
        "AttachStderr": "stderr" in attached,
        **({"ExposedPorts": exposed} if exposed else {}),
        "Tty": process["terminal"],
        "OpenStdin": bool(settings.get("stdin_open")),
        "StdinOnce": bool(settings.get("stdin_once")),
        "Env": _environment(process["env"], settings, image_config),
        "Cmd": cmd,
        **({"Healthcheck": health} if health else {}),
        "Image": container.image_ref,
        "Volumes": volumes or None,
        "WorkingDir": settings.get("working_dir") or image_config.get("WorkingDir") or "",
        "Entrypoint": entrypoint,
        "OnBuild": None,
        "Labels": container.labels,
        **({"StopSignal": stop_signal} if stop_signal else {}),
        **({"StopTimeout": settings["stop_timeout"]} if "stop_timeout" in settings else {}),
    }


def _environment(process: Sequence[str], settings: Mapping[str, Any], image_config: Mapping[str, Any]) -> list[str]:
    """The variables given, then those of the image that they leave; HOSTNAME and TERM are the start's own."""
    found = dict(word.partition("=")[::2] for word in process)
    names = [word.partition("=")[0] for word in (*settings.get("environment", ()), *(image_config.get("Env") or ()))]
    return [f"{name}={found[name]}" for name in dict.fromkeys(names) if name in found]
