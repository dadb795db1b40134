"""Which reader reads what: a container, a virtual machine, a process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .processes import ProcessReader, ProcessTreeReader, is_over, slurp
from .samples import CgroupReader, Limits, Reader


def reader_for(thing: Any, *, net: bool = False) -> Reader | None:
    """The reader of a container, a virtual machine, a state (the contents of state.json) or a pid.

    None when it does not run. A container's state is asked from `runtime_state()`; a VM is what has a `pid` only.
    """
    ask = getattr(thing, "figures_reader", None)
    if callable(ask):
        made: Reader | None = ask()
        return made
    if kind_of(thing) == "vm" and not isinstance(thing, int):
        pid = getattr(thing, "pid", None)  # of QEMU: a machine's own state tells of the command inside
        if not pid or not os.path.exists(f"/proc/{pid}/stat"):
            return None
        return ProcessReader(pid, getattr(thing, "limits", None) or Limits())
    if isinstance(thing, int):
        return ProcessReader(thing) if os.path.exists(f"/proc/{thing}/stat") else None
    state = state_of(thing) or {}
    if state.get("status") not in ("running", "paused") or not state.get("pid"):
        return None
    pid, cgroup = int(state["pid"]), state.get("cgroup") or {}
    if cgroup.get("version") and cgroup.get("paths"):
        return CgroupReader(int(cgroup["version"]), cgroup["paths"], net_pid=pid if net else None)
    try:
        over = is_over(slurp(f"/proc/{pid}/stat", None))
    except OSError:
        over = True
    return None if over else ProcessTreeReader(pid, net=net)


def kind_of(thing: Any) -> str:
    """`container` or `vm`: a virtual machine says so, or is what has a `pid` and no runtime state."""
    return str(getattr(thing, "kind", "") or ("vm" if state_of(thing) is None else "container"))


def state_of(thing: Any) -> Mapping[str, Any] | None:
    """The runtime state (contract: containers/ID/state.json) of a container or a mapping, None for anything else."""
    if isinstance(thing, Mapping):
        return thing
    ask = getattr(thing, "runtime_state", None)
    # A machine of ours has such a state, too; what it uses is what QEMU uses, not its monitor and the page cache.
    if not callable(ask) or getattr(thing, "kind", "") == "vm":
        return None
    return dict(ask() or {"status": "created"})
