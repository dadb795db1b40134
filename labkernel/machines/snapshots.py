"""Snapshots of virtual machines: taken while they run, restored in a fraction of a second. Part of the service `vms`.

vm/machines/<id>/snapshots/<name>/   memory  disk.qcow2  snapshot.json (qemu/snapshot.py)  config.json (as it ran)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConflictError, UsageError, VMError
from ..qemu.command import card_words, late_card
from ..qemu.snapshot import copy_sparse

if TYPE_CHECKING:
    from .vm import VM


_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


def check_name(name: str) -> str:
    """Raises UsageError for a name that is no name of a snapshot."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"Invalid snapshot name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-]* are allowed")
    return name


def names(vm: VM) -> list[str]:
    """Its snapshots, oldest first."""
    found = [path.parent for path in (vm.directory / "snapshots").glob("*/snapshot.json")]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def take(vm: VM, name: str, ask: Callable[[str], object]) -> str:
    """See `VM.snapshot`; `ask(directory)` has the monitor write it."""
    folder = vm.directory / "snapshots"
    target, work = folder / check_name(name), folder / f".{name}.{os.getpid()}"
    work.mkdir(mode=0o700, parents=True)
    try:
        ask(str(work))
        shutil.copy(vm.directory / "config.json", work / "config.json")
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return name


def restore(vm: VM, name: str) -> None:
    """See `VM.restore`."""
    source = _find(vm, name)
    if vm.settings.get("auto_remove"):
        raise ConflictError(f"VM {vm.name} removes itself when it ends", resolution="start it without --rm")
    if vm.status in ("running", "paused"):
        vm.kill()
    copy_sparse(str(source / "disk.qcow2"), str(vm.directory / "disk.qcow2"))
    config = json.loads((source / "config.json").read_bytes())
    plan = config["labkernel"]["machine"]
    saved = json.loads((source / "snapshot.json").read_bytes())
    ran = plan["attempts"][saved["attempt"]]
    argv = [word for word in ran["argv"] if word not in ("-incoming", "defer")] + ["-incoming", "defer"]
    for number in range(plan["cards"], saved["cards"]):
        argv += card_words(number, late_card(number))
    # All of its memory is in the snapshot; the template it started from may be gone.
    argv = [_own_memory(word) for word in argv]
    attempt = {**ran, "argv": argv, "incoming": str(source / "memory"), "start": "snapshot"}
    plan.update(attempts=[attempt], resume=saved, warnings=[], cards=saved["cards"])
    plan["accelerator_reason"] = saved["accelerator_reason"] or plan["accelerator_reason"]
    (vm.directory / "config.json").write_text(json.dumps(config))
    vm._containers.begin(vm, lambda: vm._containers.runtime.start(vm.id))


def _own_memory(word: str) -> str:
    if not word.startswith("memory-backend-file,"):
        return word
    return ",".join(["memory-backend-ram", *(part for part in word.split(",") if part.startswith(("id=", "size=")))])


def remove(vm: VM, name: str) -> None:
    """See `VM.remove_snapshot`."""
    shutil.rmtree(_find(vm, name))


def _find(vm: VM, name: str) -> Path:
    found = vm.directory / "snapshots" / check_name(name)
    if not (found / "snapshot.json").exists():
        there = ", ".join(names(vm)) or "none"
        raise VMError(f"VM {vm.name} has no snapshot {name}", resolution=f"it has: {there}")
    return found
