"""A virtual machine as `docker inspect` shows a container. Source: Docker Engine API, ContainerInspect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import NoSuchContainer
from ..networking.settings import network_settings, port_bindings, summarize_networks
from ..runtime.logs import timestamp

if TYPE_CHECKING:
    from .vm import VM


_NEVER = "0001-01-01T00:00:00Z"


def summarize_vm(vm: VM) -> dict[str, Any]:
    """The parts of the document that `vm ps` shows."""
    state = vm.runtime_state()
    status = state["status"]
    running = status in ("running", "paused")
    args = vm.record["args"]
    mounts = [
        {
            "Type": mount["type"],
            **({"Name": mount["name"]} if mount["type"] == "volume" else {}),
            "Source": mount["source"],
            "Destination": mount["destination"],
            "Mode": "" if mount["mode"] == "rw" else mount["mode"],
            "RW": mount["rw"],
        }
        for mount in vm.record.get("mounts", ())
    ]
    return {
        "Id": vm.id,
        "Created": _time(vm.created_at),
        "Path": args[0],
        "Args": args[1:],
        "State": {
            "Status": status,
            "Running": running,
            "Paused": status == "paused",
            "OOMKilled": bool(state.get("oom_killed")),
            "Pid": int(state.get("pid") or 0) if running else 0,
            "ExitCode": 0 if running else int(state.get("exit_code") or 0),
            "Error": state.get("error") or "",
            "StartedAt": _time(state.get("started_at")),
            "FinishedAt": _NEVER if running else _time(state.get("finished_at")),
        },
        "HostConfig": {"NetworkMode": vm.network_mode},
        "NetworkSettings": summarize_networks(vm, state)
        if vm.wired
        else {"Ports": vm.ports if running else {}, "Networks": {}},
        "Mounts": mounts,
        "Config": {"Image": vm.image_ref, "Labels": vm.labels},
    }


def _time(seconds: float | None) -> str:
    return timestamp(int(seconds * 1e9)) if seconds else _NEVER


def inspect_vm(vm: VM) -> dict[str, Any]:
    """The parts of the document that mean something for a machine, and `Machine` for what only it has."""
    found = summarize_vm(vm)
    settings, machine, facts = vm.settings, vm.record["machine"], vm.facts
    network = machine.get("network") or ""
    try:
        config = vm.config()
    except NoSuchContainer:  # never started
        config = {}
    process = config.get("process") or {}
    found.update(
        Image=vm.image_id,
        Name=f"/{vm.name}",
        LogPath=str(vm.log_path),
        Driver="qemu",
        Platform="linux",
    )
    found["State"]["QemuPid"] = vm.pid or 0
    found["HostConfig"] = {
        "NetworkMode": vm.network_mode,
        "PortBindings": vm.ports,
        "AutoRemove": bool(settings.get("auto_remove")),
        "ReadonlyRootfs": bool(settings.get("read_only")),
        "Memory": settings["mem_limit"],
        "NanoCpus": settings["nano_cpus"],
        "Binds": [f"{m['source']}:{m['destination']}:{m['mode']}" for m in vm.record.get("mounts", ())] or None,
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "Runtime": "qemu",
    }
    found["Config"] = {
        "Hostname": config.get("hostname") or "",
        "User": settings.get("user") or "",
        "Tty": bool(settings.get("tty")),
        "OpenStdin": bool(settings.get("stdin_open")),
        "Env": process.get("env") or [],
        "Cmd": vm.command or None,
        "Image": vm.image_ref,
        "WorkingDir": process.get("cwd") or "",
        "Entrypoint": settings.get("entrypoint"),
        "Labels": vm.labels,
    }
    if vm.wired:
        found["NetworkSettings"] = network_settings(vm, vm.runtime_state())
        found["HostConfig"]["PortBindings"] = port_bindings(settings)
    else:
        found["NetworkSettings"] = {"Ports": vm.ports, "IPAddress": "10.0.2.15" if network else "", "Networks": {}}
    found["Machine"] = {
        "Accelerator": vm.accelerator,
        "AcceleratorReason": vm.accelerator_reason,
        "Start": vm.booted,
        "Kernel": vm.kernel,
        "KernelSource": vm.kernel_source,
        "Disk": machine.get("disk", ""),
        "TimeLimit": machine.get("timeout_s"),
        "Problem": facts.get("problem", ""),
        "Snapshots": vm.snapshots,
    }
    found["Labkernel"] = {"Driver": vm._containers.driver_name, "Warnings": vm.warnings}
    return found
