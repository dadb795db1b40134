"""The measuring program (bench.c): the one that came with the package, or one compiled when it is first needed."""

from __future__ import annotations

import platform
from pathlib import Path

from ..errors import LabkernelError
from ..qemu import compiling

SOURCE = Path(__file__).with_name("bench.c")
INSIDE = "/.labkernel-bench"


def get_program(cache: Path) -> Path:
    """The static program for this machine, compiled into the directory `cache` when the package has none of this
    version. Raises LabkernelError when there is neither a binary nor a compiler."""
    machine = platform.machine()
    packaged = SOURCE.with_name(f"bench-{machine}")
    if compiling.is_current(packaged, SOURCE):
        return packaged
    compiled = cache / f"bench-{machine}-{compiling.source_digest(SOURCE)}"
    if not compiling.is_current(compiled, SOURCE):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = compiling.compile_init(SOURCE, compiled, machine)
        if problem is not None:
            raise LabkernelError(
                "the measuring program is missing from this installation",
                details=problem,
                resolution="install labkernel again with a C compiler at hand (`apt-get install gcc libc6-dev`)",
            )
    return compiled


def told(output: str) -> dict[str, str]:
    """The `name=value` lines the program printed."""
    pairs = (line.partition("=") for line in output.splitlines() if "=" in line)
    return {name: value for name, _, value in pairs}
