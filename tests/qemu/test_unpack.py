"""LZ4 blocks, compressed modules, and kernels that are none."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkernel.errors import VMError
from labkernel.qemu import unpack


def test_literals_then_a_copy_that_runs_into_itself() -> None:
    assert unpack.lz4_block(memoryview(b"\x25ab\x02\x00\x10!")) == b"ab" + b"ababababa" + b"!"


@given(st.binary(max_size=200))
def test_rubbish_never_hangs(data: bytes) -> None:
    try:
        unpack.lz4_block(memoryview(data))
    except (ValueError, IndexError):
        pass


def test_the_lz4_program_agrees(tmp_path: Path) -> None:
    if not shutil.which("lz4"):
        pytest.skip("no lz4 program to compare with")
    text = Path(__file__).read_bytes() * 300 + bytes(100_000)
    (tmp_path / "in").write_bytes(text)
    subprocess.run(["lz4", "-lq", "in", "out.lz4"], cwd=tmp_path, check=True)
    assert unpack.decompress((tmp_path / "out.lz4").read_bytes(), len(text)) == text


@pytest.mark.parametrize(("suffix", "squeeze"), [(".gz", gzip.compress), (".xz", lzma.compress), ("", bytes)])
def test_modules_come_out_uncompressed(tmp_path: Path, suffix: str, squeeze: type[bytes]) -> None:
    path = tmp_path / f"virtio.ko{suffix}"
    path.write_bytes(squeeze(b"\x7fELF module"))
    assert unpack.module(path) == b"\x7fELF module"


def test_what_is_no_kernel_is_refused() -> None:
    with pytest.raises(VMError, match="not a Linux kernel"):
        unpack.vmlinux(b"hello" * 1000)


def test_an_elf_without_pvh_entry_is_refused() -> None:
    with pytest.raises(VMError, match="PVH"):
        unpack.vmlinux(b"\x7fELF\x02\x01" + bytes(200))
