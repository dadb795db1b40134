"""What a service may say, as a table: each attribute with its reader. The result is the form `compose config` prints.

Attributes that cannot be had here are in the table, too, so that they are refused by name and never overlooked.
Source: Compose specification, "Services top-level elements", "Compose Build Specification", "Compose Deploy
Specification".
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .document import Node
from .reading import (
    Reader,
    Surroundings,
    absent,
    choice,
    command,
    duration,
    fields,
    flag,
    ignored,
    keys,
    labels,
    named,
    number,
    optional,
    pairs,
    size,
    text,
    text_or_texts,
    texts,
    unique,
    whole,
)
from .values import parse_port, parse_volume, size_bytes
from .variables import parse_env

CONDITIONS = ("service_started", "service_healthy", "service_completed_successfully")
PULL_POLICIES = ("always", "never", "missing", "if_not_present", "build")
_RESTART = re.compile(r"no|always|unless-stopped|on-failure(:[0-9]+)?")


# -- environment -----------------------------------------------------------------------------------------------------


def _env_files(node: Node, path: str, around: Surroundings) -> list[dict[str, Any]]:
    found = []
    for index, item in enumerate(node.value if isinstance(node.value, list) else [node]):
        where = f"{path}.{index}"
        if isinstance(item.value, dict):
            entry = fields(item, where, around, {"path": text, "required": flag, "format": choice("raw")})
            if "path" not in entry:
                raise item.error(f"{where} needs a path")
        else:
            entry = {"path": text(item, where, around)}
        entry["path"] = around.path(item, entry["path"])
        found.append({"required": True, **entry})
    return found


def read_environment(node: Node, service: dict[str, Any], path: str, around: Surroundings) -> dict[str, str | None]:
    """The files of `env_file` in order, then `environment`; a key without value is the project's, if it has it."""
    result: dict[str, str | None] = {}
    for entry in service.get("env_file", ()):
        try:
            content = Path(entry["path"]).read_text()
        except FileNotFoundError:
            if entry["required"]:
                place = node.get("env_file") or node
                raise place.error(f"env file {entry['path']} not found") from None
            continue
        except (OSError, UnicodeDecodeError) as err:
            raise (node.get("env_file") or node).error(f"env file {entry['path']} cannot be read: {err}") from None
        if entry.get("format") == "raw":
            lines = (line for line in content.splitlines() if line.strip() and not line.lstrip().startswith("#"))
            result.update({key: value for key, _, value in (line.partition("=") for line in lines)})
        else:
            result.update(parse_env(content, entry["path"], around.environment))
    result.update(service.get("environment") or {})
    return {key: around.environment.get(key) if value is None else value for key, value in result.items()}


# -- build -----------------------------------------------------------------------------------------------------------


def _build(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    if isinstance(node.value, str):
        node = node.with_value({"context": node})
    found = fields(node, path, around, _BUILD)
    found.setdefault("context", ".")
    if not re.match(r"[a-z]+://|git@", found["context"]):
        found["context"] = around.path(node.get("context") or node, found["context"])
    if "dockerfile" in found and "dockerfile_inline" in found:
        raise node.error(f"{path}: dockerfile and dockerfile_inline cannot both be given")
    if "dockerfile_inline" not in found:
        found.setdefault("dockerfile", "Dockerfile")
    if found.get("args"):
        found["args"] = {
            key: around.environment.get(key) if value is None else value for key, value in found["args"].items()
        }
    return found


def _extra_hosts(node: Node, path: str, around: Surroundings) -> list[str]:
    return [f"{name}={address}" for name, address in pairs(node, path, around).items()]


def _contexts(node: Node, path: str, around: Surroundings) -> dict[str, str]:
    found = {name: str(place or "") for name, place in pairs(node, path, around).items()}
    for name, place in found.items():
        if not place or place.startswith("service:"):
            raise node.error(
                f"{path}.{name}: a directory, a repository, a URL or docker-image://NAME is wanted: {place}"
            )
    return found


def _build_secrets(node: Node, path: str, around: Surroundings) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _grants("secrets")(node, path, around)
    return found


def _build_network(node: Node, path: str, around: Surroundings) -> str | None:
    found = text(node, path, around)
    if found not in ("default", "none", "host"):
        raise node.error(f"{path}: builds have the network default, none or host: {found}")
    return found


# -- ports, volumes, networks ----------------------------------------------------------------------------------------


def _ports(node: Node, path: str, around: Surroundings) -> list[dict[str, Any]]:
    if not isinstance(node.value, list):
        raise node.error(f"{path} must be a list")
    found: list[dict[str, Any]] = []
    for item in node.value:
        found += [port for port in parse_port(item) if port not in found]
    return found


def _volumes(node: Node, path: str, around: Surroundings) -> list[dict[str, Any]]:
    if not isinstance(node.value, list):
        raise node.error(f"{path} must be a list")
    found: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(node.value):
        where = f"{path}.{index}"
        entry = fields(item, where, around, _VOLUME) if isinstance(item.value, dict) else None
        if entry is None:
            entry = parse_volume(text(item, where, around), item)
        target = entry.get("target", "")
        if not target.startswith("/"):
            raise item.error(f"{where}: the target of a volume must be an absolute path: '{target}'")
        kind = entry.setdefault("type", "volume")
        if kind == "bind":
            if not entry.get("source"):
                raise item.error(f"{where}: a bind mount needs its source")
            entry["source"] = around.path(item, entry["source"])
            entry.setdefault("bind", {}).setdefault("create_host_path", True)
        elif kind == "volume":
            entry.setdefault("volume", {})
        found[os.path.normpath(target)] = entry
    return list(found.values())


def _tmpfs(node: Node, path: str, around: Surroundings) -> list[str]:
    found = text_or_texts(node, path, around)
    for place in found:
        if not place.startswith("/"):
            raise node.error(f"{path}: not an absolute path: '{place}'")
    return found


def _networks(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in named(node, path).items():
        found[name] = fields(item, f"{path}.{name}", around, _ENDPOINT) or None
    return found


def _depends_on(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    table: dict[str, Reader] = {"condition": choice(*CONDITIONS), "restart": flag, "required": flag}
    found = {}
    for name, item in named(node, path).items():
        entry = fields(item, f"{path}.{name}", around, table)
        found[name] = {"condition": "service_started", "required": True, **entry}
    return found


def _grants(kind: str) -> Reader:
    def read(node: Node, path: str, around: Surroundings) -> list[dict[str, Any]]:
        if not isinstance(node.value, list):
            raise node.error(f"{path} must be a list")
        table: dict[str, Reader] = {"source": text, "target": text, "uid": text, "gid": text, "mode": _mode}
        found = []
        for index, item in enumerate(node.value):
            if not isinstance(item.value, dict):
                found.append({"source": text(item, f"{path}.{index}", around)})
                continue
            entry = fields(item, f"{path}.{index}", around, table)
            if "source" not in entry:
                raise item.error(f"{path}.{index} needs the name of its source")
            found.append(entry)
        return found

    return read


def _mode(node: Node, path: str, around: Surroundings) -> str:
    # In YAML 1.2 0440 is the number 440, and that is how it is meant.
    found = str(node.value)
    if not re.fullmatch(r"(0o?)?[0-7]{1,4}", found):
        raise node.error(f"{path}: not a file mode: {found}", resolution="octal digits, such as 0440")
    return "0" + found.removeprefix("0o").lstrip("0").rjust(3, "0")


# -- health, limits, the rest ----------------------------------------------------------------------------------------


def _healthcheck(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    found = fields(node, path, around, _HEALTHCHECK)
    test = found.get("test")
    if found.get("disable") or test == ["NONE"]:
        return {"disable": True}
    if test is not None and (not test or test[0] not in ("CMD", "CMD-SHELL", "NONE")):
        place = node.get("test") or node
        raise place.error(f"{path}.test: the first item must be NONE, CMD or CMD-SHELL")
    return found


def _health_test(node: Node, path: str, around: Surroundings) -> list[str]:
    return texts(node, path, around) if isinstance(node.value, list) else ["CMD-SHELL", text(node, path, around)]


def _deploy(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    return fields(node, path, around, _DEPLOY)


def _table(table: dict[str, Reader]) -> Reader:
    return lambda node, path, around: fields(node, path, around, table)


def _restart(node: Node, path: str, around: Surroundings) -> str:
    found = "no" if node.value is False else text(node, path, around)
    if not _RESTART.fullmatch(found):
        raise node.error(
            f"{path}: invalid restart policy: {found}",
            resolution="no, always, on-failure[:TIMES] or unless-stopped; no and on-failure in quotes",
        )
    return found


def _ulimits(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in keys(node, path, node.value if isinstance(node.value, dict) else ()).items():
        where = f"{path}.{name}"
        if isinstance(item.value, dict):
            found[name] = fields(item, where, around, {"soft": whole, "hard": whole})
            if set(found[name]) != {"soft", "hard"}:
                raise item.error(f"{where} needs soft and hard")
        else:
            found[name] = whole(item, where, around)
    return found


def _device_limits(name: str) -> Reader:
    """A list of maps with `path` and `name`; a rate may be a size ("1mb")."""
    reader = size if name == "rate" else whole

    def read(node: Node, path: str, around: Surroundings) -> list[dict[str, Any]]:
        if not isinstance(node.value, list):
            raise node.error(f"{path} must be a list")
        found = []
        for index, item in enumerate(node.value):
            where = f"{path}.{index}"
            found.append(fields(item, where, around, {"path": text, name: reader}))
            if set(found[-1]) != {"path", name}:
                raise item.error(f"{where} needs path and {name}")
        return found

    return read


def _blkio(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    rates = ("device_read_bps", "device_write_bps", "device_read_iops", "device_write_iops")
    table = {"weight": whole, "weight_device": _device_limits("weight"), **dict.fromkeys(rates, _device_limits("rate"))}
    return fields(node, path, around, table)


def _logging(node: Node, path: str, around: Surroundings) -> dict[str, Any]:
    return fields(node, path, around, {"driver": text, "options": pairs})


def _pull_policy(node: Node, path: str, around: Surroundings) -> str:
    found = text(node, path, around)
    if found not in PULL_POLICIES:
        raise node.error(f"{path} must be one of {', '.join(PULL_POLICIES)}: {found}")
    return "missing" if found == "if_not_present" else found


def _swap(node: Node, path: str, around: Surroundings) -> str:
    return str(size_bytes(node))


_SWARM = "it is for a swarm of machines"
_BUILD: dict[str, Reader] = {
    "context": text,
    "dockerfile": text,
    "dockerfile_inline": text,
    "args": pairs,
    "labels": labels,
    "target": text,
    "network": _build_network,
    "no_cache": flag,
    "pull": flag,
    "tags": unique,
    "extra_hosts": _extra_hosts,
    "secrets": _build_secrets,
    "platforms": unique,
    "privileged": absent("privileged builds are", "RUN --security=insecure"),
    "shm_size": size,
    "cache_from": ignored("the builder's own cache is used"),
    "cache_to": ignored("the builder's own cache is used"),
    "ssh": absent("forwarding of SSH agents to builds is"),
    "additional_contexts": _contexts,
    "ulimits": _ulimits,
    "isolation": absent("isolation technologies are"),
    "entitlements": unique,
    "provenance": ignored("no attestations are made"),
    "sbom": ignored("no attestations are made"),
}
_VOLUME: dict[str, Reader] = {
    "type": choice("volume", "bind", "tmpfs"),
    "source": text,
    "target": text,
    "read_only": flag,
    "consistency": ignored("there is one kind of consistency on Linux"),
    "bind": _table({"create_host_path": flag, "propagation": text, "selinux": text, "recursive": absent("it is")}),
    "volume": _table({"nocopy": flag, "subpath": absent("mounting a part of a volume is"), "labels": labels}),
    "tmpfs": _table({"size": size, "mode": _mode}),
    "image": absent("mounting images is"),
}
_ENDPOINT: dict[str, Reader] = {
    "aliases": unique,
    "ipv4_address": text,
    "ipv6_address": text,
    "mac_address": text,
    "priority": whole,
    "gw_priority": whole,
    "link_local_ips": absent("link-local addresses are"),
    "interface_name": absent("names of interfaces are"),
    "driver_opts": absent("options of endpoints are"),
}
_HEALTHCHECK: dict[str, Reader] = {
    "test": optional(_health_test),
    "interval": duration,
    "timeout": duration,
    "start_period": duration,
    "start_interval": duration,
    "retries": whole,
    "disable": flag,
}
_DEPLOY: dict[str, Reader] = {
    "replicas": whole,
    "labels": labels,
    "mode": choice("replicated"),
    "resources": _table(
        {
            "limits": _table({"cpus": text, "memory": size, "pids": whole}),
            "reservations": _table(
                {
                    "cpus": ignored("CPUs are limited, not reserved"),
                    "memory": size,
                    "devices": absent("devices by request are"),
                    "generic_resources": absent("generic resources are"),
                }
            ),
        }
    ),
    "restart_policy": _table(
        {
            "condition": choice("none", "on-failure", "any"),
            "max_attempts": whole,
            "delay": ignored("the delay between restarts is the engine's"),
            "window": ignored("a restart counts as successful by the engine's rule"),
        }
    ),
    "endpoint_mode": ignored(_SWARM),
    "placement": ignored(_SWARM),
    "rollback_config": ignored(_SWARM),
    "update_config": ignored(_SWARM),
}
SERVICE: dict[str, Reader] = {
    "annotations": absent("annotations are", "use labels"),
    "attach": flag,
    "blkio_config": optional(_blkio),
    "build": _build,
    "cap_add": unique,
    "cap_drop": unique,
    "cgroup": choice("host", "private"),
    "cgroup_parent": text,
    "command": optional(command),
    "configs": _grants("configs"),
    "container_name": text,
    "cpu_period": whole,
    "cpu_quota": whole,
    "cpu_shares": whole,
    "cpus": number,
    "cpuset": text,
    "depends_on": _depends_on,
    "deploy": optional(_deploy),
    "develop": ignored("`compose watch` is not available"),
    "device_cgroup_rules": unique,
    "devices": unique,
    "dns": text_or_texts,
    "dns_opt": unique,
    "dns_search": text_or_texts,
    "domainname": text,
    "entrypoint": optional(command),
    "env_file": optional(_env_files),
    "environment": pairs,
    "expose": unique,
    "extra_hosts": _extra_hosts,
    "group_add": unique,
    "healthcheck": optional(_healthcheck),
    "hostname": text,
    "image": optional(text),
    "init": flag,
    "ipc": text,
    "labels": labels,
    "links": texts,
    "logging": optional(_logging),
    "mac_address": text,
    "mem_limit": size,
    "mem_reservation": size,
    "mem_swappiness": whole,
    "memswap_limit": _swap,
    "network_mode": text,
    "networks": _networks,
    "oom_kill_disable": flag,
    "oom_score_adj": whole,
    "pid": text,
    "pids_limit": whole,
    "platform": text,
    "ports": _ports,
    "privileged": flag,
    "profiles": unique,
    "pull_policy": _pull_policy,
    "read_only": flag,
    "restart": _restart,
    "scale": whole,
    "secrets": _grants("secrets"),
    "security_opt": unique,
    "shm_size": size,
    "stdin_open": flag,
    "stop_grace_period": duration,
    "stop_signal": text,
    "sysctls": pairs,
    "tmpfs": _tmpfs,
    "tty": flag,
    "ulimits": _ulimits,
    "user": text,
    "userns_mode": text,
    "uts": text,
    "volumes": _volumes,
    "volumes_from": unique,
    "working_dir": text,
    # known, and not to be had
    "cpu_count": absent("a number of CPUs is", "use cpus or cpuset"),
    "cpu_percent": absent("a part of the CPUs in percent is", "use cpus"),
    "cpu_rt_period": absent("real-time scheduling is"),
    "cpu_rt_runtime": absent("real-time scheduling is"),
    "credential_spec": absent("Windows credentials are"),
    "external_links": absent("links to containers outside the project are", "connect both to an external network"),
    "gpus": absent("devices by request are"),
    "isolation": absent("isolation technologies are"),
    "label_file": absent("files of labels are", "use labels"),
    "models": absent("models are"),
    "post_start": absent("hooks are"),
    "pre_stop": absent("hooks are"),
    "provider": absent("providers are"),
    "runtime": absent("other runtimes are"),
    "storage_opt": absent("options of the storage driver are"),
    "use_api_socket": absent("the API socket inside a service is", "mount the daemon's socket"),
    "volume_driver": absent("volume drivers are"),
}


def read_service(node: Node, name: str, around: Surroundings) -> dict[str, Any]:
    """One service in the form that `config` prints. Raises ComposeError."""
    path = f"services.{name}"
    found = fields(node, path, around, SERVICE)
    if "image" not in found and "build" not in found:
        raise node.error(
            f'service "{name}" has neither an image nor a build context specified: invalid compose project'
        )
    environment = read_environment(node, found, path, around)
    found.pop("env_file", None)
    found.pop("environment", None)
    if environment:
        found["environment"] = dict(sorted(environment.items()))
    _check(node, name, found)
    return found


def _check(node: Node, name: str, found: dict[str, Any]) -> None:
    """What does not go together."""
    if "network_mode" in found and "networks" in found:
        raise (node.get("network_mode") or node).error(
            f"service {name} declares mutually exclusive `network_mode` and `networks`: invalid compose project"
        )
    replicas = found.get("deploy", {}).get("replicas")
    if "scale" in found and replicas is not None and found["scale"] != replicas:
        raise (node.get("scale") or node).error(
            f"services.{name}: can't set distinct values on 'scale' and 'deploy.replicas': invalid compose project"
        )
    count = found.get("scale", replicas)
    if count is not None and count < 0:
        raise node.error(f"services.{name}: a negative number of containers")
    if found.get("container_name") and (count or 0) > 1:
        raise (node.get("container_name") or node).error(
            f"services.{name}: can't set container_name and more than one container: invalid compose project",
            resolution="container names are unique: leave container_name out, and they are PROJECT-SERVICE-NUMBER",
        )
    limits = found.get("deploy", {}).get("resources", {}).get("limits", {})
    for own, other in (("mem_limit", "memory"), ("pids_limit", "pids")):
        if own in found and other in limits and found[own] != limits[other]:
            raise (node.get(own) or node).error(
                f"services.{name}: can't set distinct values on '{own}' and 'deploy.resources.limits.{other}': "
                "invalid compose project"
            )
