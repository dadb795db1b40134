"""A guest kernel, fetched once for these tests, and a root file system of one static busybox."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.errors import VMError
from labkernel.qemu import disk, guest, kernel
from labkernel.qemu.machine import Machines

APPLETS = ("sh", "true", "echo", "cat", "id", "sleep", "pwd", "env", "kill", "dd", "uname", "stat", "ps", "hostname")


@pytest.fixture(scope="session")
def vm_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lk-vm-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def machines(vm_dir: Path) -> Machines:
    made = Machines(vm_dir, vm_dir, lambda _name: contextlib.nullcontext(), lambda _line: None)
    try:
        guest.find_qemu()
        disk.find_mke2fs()
        guest.get_init(vm_dir)
        kernel.get_kernel(vm_dir / "kernels", notify=lambda _line: None)
    except VMError as err:
        pytest.skip(" ".join(err.render()))
    return made


def _needs_a_loader(elf: bytes) -> bool:
    table, size, count = struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<HH", elf, 54)
    return any(struct.unpack_from("<I", elf, table + i * size)[0] == 3 for i in range(count))  # PT_INTERP


@pytest.fixture(scope="session")
def root_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    busybox = shutil.which("busybox")
    if busybox is None or _needs_a_loader(Path(busybox).read_bytes()):
        pytest.skip("no static busybox on this machine (busybox-static)")
    root = tmp_path_factory.mktemp("root")
    for name in ("bin", "etc", "tmp", "secret"):
        (root / name).mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    for name in APPLETS:
        os.symlink("busybox", root / "bin" / name)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nstudent:x:1000:1000::/home/student:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nstudent:x:1000:\nlab:x:2000:student,other\n")
    (root / "bin/script").write_text("#!/bin/missing\n")
    (root / "bin/script").chmod(0o755)
    (root / "bin/plain").write_text("no program")
    return root


@pytest.fixture(scope="session")
def root_disk(machines: Machines, root_dir: Path, vm_dir: Path) -> Path:
    path = vm_dir / "disks/busybox.img"
    disk.make_disk(lowers=[str(root_dir)], out=str(path))
    return path
