"""The supervisor's door to the room `net`, which is loaded by name and only when a container has a network.

Mechanisms do not import each other; as with the worker's tasks, what does the work is named here. Every function is
cheap for a container without a network. Standard library only.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from . import hostfiles
from .instances import Instance
from .loop import Connection

_SWITCH = "labkernel.net.switch:Switch"


def _switch(sup: Any) -> Any:
    if sup.switch is None:
        module, _, name = _SWITCH.partition(":")
        sup.switch = getattr(importlib.import_module(module), name)(sup)
    return sup.switch


def attach(sup: Any, inst: Instance, pid: int) -> dict[str, Any] | None:
    """Interfaces, ports and what the first process has to do for them; None without a network. Raises StartError."""
    inst.state.pop("network", None)
    other = _sharing(sup, inst)
    if other is not None:
        found: dict[str, Any] | None = sup.switch.shared(other) if sup.switch is not None else None
        return found
    if not os.path.exists(f"{inst.directory}/network.json"):
        return None
    result: dict[str, Any] | None = _switch(sup).attach(inst, pid)
    return result


def _sharing(sup: Any, inst: Instance) -> Any:
    """The container whose network namespace this one is in, None when it is in its own."""
    for space in (inst.config.get("linux") or {}).get("namespaces") or ():
        if space.get("type") == "network" and str(space.get("path") or "").startswith("container:"):
            return sup.instances.get(str(space["path"]).partition(":")[2])
    return None


def take_sockets(sup: Any, inst: Instance, fds: list[int]) -> None:
    """The resolver's sockets have come from the first process."""
    sup.switch.take_sockets(inst, fds)


def detach(sup: Any, inst: Instance) -> None:
    """The container has ended, or has not started: its ports and names are free again."""
    if sup.switch is not None:
        sup.switch.detach(inst)


def recover(sup: Any) -> None:
    """In a new supervisor, when it has taken over what runs."""
    running = [inst for inst in sup.instances.values() if inst.running]
    if any(inst.state.get("network") for inst in running) or _has_leftovers():
        _switch(sup).recover(running)


def _has_leftovers() -> bool:
    try:
        return any(name.startswith(("lk", "lv")) and len(name) > 10 for name in os.listdir("/sys/class/net"))
    except OSError:
        return False


def leave(sup: Any) -> None:
    """The supervisor goes."""
    if sup.switch is not None:
        sup.switch.leave()


def request(sup: Any, conn: Connection, message: dict[str, Any], _fds: list[int]) -> None:
    """{"id": container} whose network.json has changed, {"remove": bridge} of a network that is gone."""
    from . import monitors, protocol

    warnings: list[str] = []
    answer: dict[str, Any] = {"ok": True, "warnings": warnings}
    if message.get("remove"):
        if sup.switch is not None:
            sup.switch.remove_bridge(str(message["remove"]))
    else:
        inst = sup.instances.get(message["id"])
        if inst is not None and inst.running and inst.setup is None:
            switch = _switch(sup)
            before = switch.files(inst)
            warnings += switch.reload(inst)
            after = switch.files(inst)
            if "monitor" in inst.own:
                # Its files are in the guest: who asks tells the machine's monitor.
                answer["wires"] = monitors.wires(inst.config, after or monitors.NO_NETWORK)
            elif before and after and before != after:
                warnings += hostfiles.update(inst, before, after)
    conn.finish(protocol.encode_message(answer))
