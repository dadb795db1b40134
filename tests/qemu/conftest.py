"""A guest kernel, fetched once for these tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.errors import VMError
from labkernel.qemu import guest, kernel


@pytest.fixture(scope="session")
def vm_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lk-vm-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def kernels(vm_dir: Path) -> Path:
    """A directory with a kept kernel; skips where none is to be had."""
    (vm_dir / "kernels").mkdir()
    try:
        guest.find_qemu()
        guest.get_init(vm_dir)
        kernel.get_kernel(vm_dir / "kernels", notify=lambda _line: None)
    except VMError as err:
        pytest.skip(" ".join(err.render()))
    return vm_dir / "kernels"
