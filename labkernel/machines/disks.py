"""The files a machine's disk is made of, where the driver can mount no overlay of an image's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.client import Runtime
    from ..runtime.driver import Driver


@contextlib.contextmanager
def one_tree(runtime: Runtime, driver: Driver, layers: Sequence[Path], target: str) -> Iterator[list[str]]:
    """The directories of `layers`, top first, for qemu/disk.py; under a driver that copies one tree of hard links at
    `target` while this lasts: nobody writes to it."""
    lowers = [str(layer) for layer in layers]
    # Under proot also a single layer: what its modes close to us has to be opened up, which a layer cannot be.
    if driver.overlay != "copy" or (len(lowers) == 1 and driver.name != "proot"):
        yield lowers
        return
    try:
        runtime.task("labkernel.runtime.copies:remove_tree", path=target)  # of a task that was killed
        runtime.task("labkernel.runtime.copies:flatten", lowers=lowers, target=target, link=True)
        yield [target]
    finally:
        runtime.task("labkernel.runtime.copies:remove_tree", path=target)
