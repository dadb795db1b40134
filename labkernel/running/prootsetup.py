"""Fetch PRoot for machines without it: Debian's package, unpacked into the store, without root.

Part of opening an engine with the driver proot; a no-op where `proot` is on PATH.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import DriverError, LabkernelError
from ..runtime import prootprogram

if TYPE_CHECKING:
    from ..store.layout import Layout


def ensure(layout: Layout) -> None:
    """Make sure that PRoot and what goes with it are there. Raises DriverError with the remedy."""
    if prootprogram.find(layout.root) is None:
        _fetch(layout)
    prootprogram.prepare(layout.root)


def _fetch(layout: Layout) -> None:
    from ..imaging.packages import download_one, extract_package
    from ..store.blobs import temporary_directory

    try:
        with temporary_directory(layout, "proot") as work:
            for name in ("proot", "libtalloc2"):
                extract_package(download_one(name, work), work / "root")
            if not (layout.root / "proot").exists():
                os.rename(work / "root", layout.root / "proot")
    except (LabkernelError, OSError) as err:
        raise DriverError(
            "the driver proot needs the program proot, which is not on PATH and could not be fetched",
            details=getattr(err, "brief", str(err)),
            resolution=prootprogram.REMEDY,
        ) from err
