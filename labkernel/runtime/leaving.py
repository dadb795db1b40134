"""How a supervisor goes: after a while with nothing to do, or when asked, and without leaving anything behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import Any

from . import networking
from .recovery import sweep_cgroups


def check_idle(sup: Any) -> None:
    """Leave when nothing has run or been asked for `idle_exit_s`; else look again later."""
    idle_exit_s = float(sup.settings["idle_exit_s"])
    quiet = time.monotonic() - sup.idle_since
    if not sup.instances and not sup.sessions and not sup.chores and quiet >= idle_exit_s and leave(sup):
        return
    sup.loop.later(max(0.05, min(idle_exit_s - quiet, 5.0)) if quiet < idle_exit_s else 1.0, lambda: check_idle(sup))


def leave(sup: Any) -> bool:
    """Go away and leave nothing behind; False when a client is just coming."""
    try:
        lock = os.open(f"{sup.runtime_dir}/supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        pass  # somebody deleted the runtime directory: no client can come any more
    else:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
    sup.context.listener.close()
    try:
        os.unlink(f"{sup.runtime_dir}/supervisor.sock")
    except OSError:
        pass
    sup.pool.discard()
    sup.entrance.discard()
    if sup.worker is not None:
        sup.worker.dismiss()
    networking.leave(sup)
    _remove_parents(sup)
    for directory in (f"{sup.runtime_dir}/stage", f"{sup.runtime_dir}/run"):
        try:
            os.rmdir(directory)
        except OSError:
            pass
    sup.tell_keeper({"bye": True})
    os._exit(0)


def _remove_parents(sup: Any) -> None:
    for _ in range(100):  # the kernel takes a moment to let go of the groups of processes that have just ended
        if sweep_cgroups(sup):
            break
        time.sleep(0.01)
    for parent in sup.context.parents:
        sup.hierarchy.remove_parent(parent)
    with contextlib.suppress(OSError):
        os.unlink(f"{sup.runtime_dir}/cgroups")
