"""From a service of a project to the settings of its containers: the Docker SDK's keyword arguments. Pure.

Also the labels by which containers are found again, and the hash that tells whether one is still as the files say.
Source: docker compose's labels (com.docker.compose.*), which its other implementations read, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from .document import Node
from .project import Project
from .values import duration_ns

PREFIX = "com.docker.compose"
PROJECT, SERVICE, NUMBER = f"{PREFIX}.project", f"{PREFIX}.service", f"{PREFIX}.container-number"
ONEOFF, HASH, IMAGE, DEPENDS = f"{PREFIX}.oneoff", f"{PREFIX}.config-hash", f"{PREFIX}.image", f"{PREFIX}.depends_on"
WORKING_DIR, FILES = f"{PREFIX}.project.working_dir", f"{PREFIX}.project.config_files"
VERSION = f"{PREFIX}.version"

# The same name and meaning here and there.
_SAME = (
    *("cap_add", "cap_drop", "cpu_period", "cpu_quota", "cpu_shares", "domainname", "extra_hosts", "group_add"),
    *("hostname", "init", "mac_address", "mem_swappiness", "oom_score_adj", "pids_limit", "platform", "privileged"),
    *("read_only", "security_opt", "stdin_open", "stop_signal", "sysctls", "tty", "user", "userns_mode"),
    *("working_dir", "environment", "dns", "dns_opt", "dns_search"),
    *("cgroup_parent", "device_cgroup_rules", "oom_kill_disable"),
)
_RENAMED = {
    "cgroup": "cgroupns",
    "cpuset": "cpuset_cpus",
    "uts": "uts_mode",
    "command": "command",
    "entrypoint": "entrypoint",
}
_SIZES = {"mem_limit", "mem_reservation", "memswap_limit", "shm_size"}

FindContainer = Callable[[str], str]
"""The id of a container of a service."""


def config_hash(project: Project, name: str) -> str:
    """Of everything that makes a container of the service what it is; not of how many there are or how it is built."""
    service = dict(project.services[name])
    for key in ("build", "pull_policy", "scale", "depends_on", "profiles", "attach"):
        service.pop(key, None)
    service["deploy"] = {key: value for key, value in service.get("deploy", {}).items() if key != "replicas"}
    used: dict[str, Any] = {
        "networks": {key: project.networks[key] for key in service.get("networks") or ()},
        "volumes": {
            mount["source"]: project.volumes[mount["source"]]
            for mount in service.get("volumes", ())
            if mount["type"] == "volume" and mount.get("source")
        },
    }
    for section in ("secrets", "configs"):
        used[section] = [
            _content_key(project, getattr(project, section)[grant["source"]]) for grant in service.get(section, ())
        ]
    text = json.dumps([service, used], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content_key(project: Project, entry: Mapping[str, Any]) -> list[Any]:
    value = project.environment.get(entry["environment"], "") if "environment" in entry else entry.get("content", "")
    return [entry.get("file"), hashlib.sha256(value.encode()).hexdigest()]


def project_labels(project: Project) -> dict[str, str]:
    """What everything of a project carries."""
    return {PROJECT: project.name, VERSION: _version()}


def _version() -> str:
    from .. import __version__

    return __version__


def container_labels(project: Project, name: str, number: int, image: str, *, oneoff: bool = False) -> dict[str, str]:
    """The labels of one container; `image` is the id of its image."""
    service = project.services[name]
    needs = [f"{key}:{how['condition']}:{str(bool(how.get('restart'))).lower()}"
             for key, how in service.get("depends_on", {}).items()]  # fmt: skip
    return {
        **service.get("labels", {}),
        **project_labels(project),
        SERVICE: name,
        NUMBER: str(number),
        ONEOFF: "True" if oneoff else "False",
        HASH: config_hash(project, name),
        IMAGE: image,
        DEPENDS: ",".join(needs),
        WORKING_DIR: str(project.directory),
        FILES: ",".join(project.files),
    }


def build_limits(build: Mapping[str, Any]) -> dict[str, Any]:
    """What its steps may have, as `BuildOptions.limits`."""
    found: dict[str, Any] = {}
    if "shm_size" in build:
        found["shm_size"] = int(build["shm_size"])
    if "ulimits" in build:
        found["ulimits"] = _ulimits(build["ulimits"])
    return found


def _ulimits(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (each["soft"], each["hard"]) if isinstance(each, dict) else each for key, each in given.items()}


def _blkio(given: Mapping[str, Any]) -> dict[str, Any]:
    """`blkio_config` as settings: a list of devices as the API has it."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        setting = f"blkio_{key}" if key.startswith("weight") else key
        found[setting] = value if key == "weight" else [{word.title(): each[word] for word in each} for each in value]
    return found


def image_name(project: Project, name: str) -> str:
    """The image of a service: its own name, or what a build without one is called."""
    return str(project.services[name].get("image") or f"{project.name}-{name}")


def container_settings(project: Project, name: str, find: FindContainer) -> dict[str, Any]:
    """The keyword arguments of `containers.create`, without name, image and labels.

    `find` gives the container of a service that this one shares a namespace or volumes with."""
    service = project.services[name]
    found = {key: service[key] for key in _SAME if key in service}
    found |= {new: service[old] for old, new in _RENAMED.items() if service.get(old) is not None}
    found |= {key: int(service[key]) for key in _SIZES if key in service}
    if "cpus" in service:
        found["nano_cpus"] = math.floor(service["cpus"] * 1e9)
    found |= _limits(service)
    found |= _mounts(project, service)
    for key, setting in (("ipc", "ipc_mode"), ("pid", "pid_mode"), ("network_mode", "network_mode")):
        if key in service:
            kind, _, other = service[key].partition(":")
            found[setting] = f"container:{find(other)}" if kind == "service" else service[key]
    if "volumes_from" in service:
        found["volumes_from"] = [_volumes_from(word, find) for word in service["volumes_from"]]
    if "ulimits" in service:
        found["ulimits"] = _ulimits(service["ulimits"])
    found |= _blkio(service.get("blkio_config", {}))
    if "devices" in service:
        found["devices"] = service["devices"]
    if "healthcheck" in service:
        found["healthcheck"] = _healthcheck(service["healthcheck"])
    if "stop_grace_period" in service:
        found["stop_timeout"] = math.ceil(_ns(service["stop_grace_period"]) / 1e9)
    if "logging" in service:
        driver, options = service["logging"].get("driver", "json-file"), service["logging"].get("options", {})
        found["log_config"] = {"Type": driver, "Config": options}
    if service.get("ports"):
        found["ports"] = [_port(port) for port in service["ports"]]
    restart = _restart(service)
    if restart:
        found["restart_policy"] = restart
    if "networks" in service:
        found |= _networks(project, name)
    return found


def _ns(text: str) -> int:
    return duration_ns(Node(text))


def _limits(service: Mapping[str, Any]) -> dict[str, Any]:
    resources = service.get("deploy", {}).get("resources", {})
    limits, reserved = resources.get("limits", {}), resources.get("reservations", {})
    found: dict[str, Any] = {}
    if "cpus" in limits:
        found["nano_cpus"] = math.floor(float(limits["cpus"]) * 1e9)
    if "memory" in limits:
        found["mem_limit"] = int(limits["memory"])
    if "pids" in limits:
        found["pids_limit"] = limits["pids"]
    if "memory" in reserved:
        found["mem_reservation"] = int(reserved["memory"])
    return found


def _mounts(project: Project, service: Mapping[str, Any]) -> dict[str, Any]:
    words: list[str] = []
    tmpfs = dict(each.partition(":")[::2] for each in service.get("tmpfs", ()))
    for mount in service.get("volumes", ()):
        kind, target = mount["type"], mount["target"]
        if kind == "tmpfs":
            details = mount.get("tmpfs", {})
            options = [f"{key}={details[key]}" for key in ("size", "mode") if key in details]
            tmpfs[target] = ",".join([*options, *(["ro"] if mount.get("read_only") else [])])
            continue
        details = mount.get(kind, {})
        modes = ["ro" if mount.get("read_only") else "rw"]
        modes += ["nocopy"] if details.get("nocopy") else []
        modes += [details[key] for key in ("propagation", "selinux") if details.get(key)]
        source = mount.get("source", "")
        if kind == "volume" and source:
            source = project.volumes[source]["name"]
        words.append(f"{source}:{target}:{','.join(modes)}" if source else target)
    for section, folder in (("secrets", "/run/secrets/"), ("configs", "/")):
        for grant in service.get(section, ()):
            entry = getattr(project, section)[grant["source"]]
            if "file" in entry:
                words.append(f"{entry['file']}:{grant_target(grant, folder)}:ro")
    return {**({"volumes": words} if words else {}), **({"tmpfs": tmpfs} if tmpfs else {})}


def grant_target(grant: Mapping[str, Any], folder: str) -> str:
    """Where a secret or config appears in the container."""
    target = str(grant.get("target") or grant["source"])
    return target if target.startswith("/") else os.path.join(folder, target)


def granted_files(project: Project, name: str) -> list[tuple[str, bytes, Mapping[str, Any]]]:
    """The secrets and configs whose content is no file of this machine: (path, content, grant)."""
    found = []
    service = project.services[name]
    for section, folder in (("secrets", "/run/secrets/"), ("configs", "/")):
        for grant in service.get(section, ()):
            entry = getattr(project, section)[grant["source"]]
            if "content" in entry:
                text = entry["content"]
            elif "environment" in entry:
                variable = entry["environment"]
                if variable not in project.environment:
                    raise project.error(
                        name,
                        f'environment variable "{variable}" required by {section[:-1]} "{grant["source"]}" is not set',
                        at=section,
                    )
                text = project.environment[variable]
            else:
                continue
            found.append((grant_target(grant, folder), text.encode(), grant))
    return found


def _volumes_from(word: str, find: FindContainer) -> str:
    if word.startswith("container:"):
        return word.removeprefix("container:")
    name, colon, mode = word.partition(":")
    return f"{find(name)}{colon}{mode}"


def _port(port: Mapping[str, Any]) -> str:
    address = f"{port['host_ip']}:" if port.get("host_ip") else ""
    published = str(port.get("published") or "")
    return f"{address}{f'{published}:' if published or address else ''}{port['target']}/{port['protocol']}"


def _healthcheck(check: Mapping[str, Any]) -> dict[str, Any]:
    if check.get("disable"):
        return {"test": ["NONE"]}
    names = {
        "interval": "Interval",
        "timeout": "Timeout",
        "start_period": "StartPeriod",
        "start_interval": "StartInterval",
    }
    found: dict[str, Any] = {new: _ns(check[old]) for old, new in names.items() if old in check}
    if "test" in check:
        found["Test"] = check["test"]
    if "retries" in check:
        found["Retries"] = check["retries"]
    return found


def _restart(service: Mapping[str, Any]) -> dict[str, Any] | None:
    policy = service.get("deploy", {}).get("restart_policy")
    if policy and "restart" not in service:
        name = {"none": "no", "any": "always", "on-failure": "on-failure"}[policy.get("condition", "any")]
        retries = policy.get("max_attempts", 0) if name == "on-failure" else 0
        return {"Name": name, "MaximumRetryCount": retries}
    word, _, times = str(service.get("restart", "")).partition(":")
    return {"Name": word, "MaximumRetryCount": int(times or 0)} if word else None


def _networks(project: Project, name: str) -> dict[str, Any]:
    """The networks a container joins: the first by priority, then by name, is its main one."""
    service = project.services[name]
    order = sorted(service["networks"].items(), key=lambda item: (-(item[1] or {}).get("priority", 0), item[0]))
    config = {}
    for key, details in order:
        given = details or {}
        endpoint: dict[str, Any] = {"Aliases": list(dict.fromkeys([name, *given.get("aliases", ())]))}
        # A service is known by its own name; what this one alone calls it is a link.
        links = [word for word in service.get("links", ()) if ":" in word]
        if links:
            endpoint["Links"] = links
        if given.get("ipv6_address"):
            raise project.error(
                name, f"services.{name}.networks.{key}: IPv6 is not available in labkernel", at="networks"
            )
        if given.get("ipv4_address"):
            endpoint["IPAMConfig"] = {"IPv4Address": given["ipv4_address"]}
        if given.get("mac_address"):
            endpoint["MacAddress"] = given["mac_address"]
        config[project.networks[key]["name"]] = endpoint
    return {"network": next(iter(config)), "networking_config": config}
