"""The guest's init program: the one that came with the package, or one compiled when it is first needed."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from labkernel.errors import VMError

from . import compiling

SOURCE = Path(__file__).with_name("guest")
MACHINES = {"x86_64": "qemu-system-x86_64"}


def find_qemu() -> str:
    """The path of QEMU for this machine. Raises VMError with the way to get it."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise VMError(f"virtual machines need an x86_64 computer, this is {machine}")
    path = shutil.which(MACHINES[machine])
    if path is None:
        raise VMError("QEMU is not installed", resolution="`apt-get install qemu-system-x86 e2fsprogs`")
    return path


def get_init(cache: Path) -> Path:
    """The static init for this machine; compiled into the directory `cache` when the package has none of this version.

    Raises VMError when there is neither a binary nor a compiler.
    """
    machine = platform.machine()
    packaged = Path(__file__).with_name(f"guest-init-{machine}")
    if compiling.is_current(packaged, SOURCE):
        return packaged
    compiled = cache / f"guest-init-{machine}-{compiling.source_digest(SOURCE)}"
    if compiling.is_current(compiled, SOURCE):
        return compiled
    problem = compiling.compile_init(SOURCE, compiled, machine)
    if problem is not None:
        raise VMError(
            "the guest's init program is missing from this installation",
            details=problem,
            resolution="install labkernel again with a C compiler at hand (`apt-get install gcc libc6-dev`)",
        )
    return compiled
