"""A kernel laid out in a guest's memory before QEMU starts, and the small file that says where it begins."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest

from labkernel.qemu import loaded, unpack
from labkernel.qemu.command import Machine
from labkernel.qemu.kernel import get_kernel
from labkernel.qemu.machine import Machines

MIB = 1 << 20
NOTE = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 16 * MIB)  # where a PVH kernel begins


def elf(*segments: tuple[int, int, bytes, int]) -> bytes:
    """A 64-bit ELF of (kind, physical address, data, size in memory)."""
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 16 * MIB, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    offset, table, body = 4096, b"", b""
    for kind, physical, data, size in segments:
        table += struct.pack("<IIQQQQQQ", kind, 5, offset + len(body), physical, physical, len(data), size, 4)
        body += data
    return (head + table).ljust(offset, b"\0") + body


def write(tmp_path: Path, data: bytes) -> Path:
    image = tmp_path / "image"
    image.write_bytes(data)
    return image


def test_segments_lie_at_their_addresses_and_zeros_are_holes(tmp_path: Path) -> None:
    text, more = b"T" * 5000, b"\0" * 8192 + b"D"
    image = write(tmp_path, elf((1, 16 * MIB, text, 5000), (1, 20 * MIB, more, 3 * MIB), (4, 16 * MIB, NOTE, 20)))
    found = loaded.get_loaded(image, 96)
    assert found is not None
    with open(found.memory, "rb") as file:
        file.seek(16 * MIB)
        assert file.read(5001) == text + b"\0"
        file.seek(20 * MIB)
        assert file.read(8194) == more + b"\0"
    info = found.memory.stat()
    assert info.st_size == 96 * MIB
    assert info.st_blocks * 512 < MIB, "only what is not zero takes room"


def test_the_entry_is_bootable_and_small(tmp_path: Path) -> None:
    found = loaded.get_loaded(write(tmp_path, elf((1, 16 * MIB, b"T" * 9000, 9000), (4, 0, NOTE, 20))), 96)
    assert found is not None
    data = found.entry.read_bytes()
    assert unpack.has_pvh_entry(data)
    assert len(data) < 16384
    with open(found.entry, "rb") as file:
        first, notes = loaded._segments(file.read(64), file)
    assert (first.physical, first.data) == (16 * MIB, b"T" * 4096)
    assert notes.data == NOTE


def test_more_memory_only_lengthens_the_file(tmp_path: Path) -> None:
    image = write(tmp_path, elf((1, 16 * MIB, b"T" * 10, 10), (4, 0, NOTE, 20)))
    small = loaded.get_loaded(image, 96)
    assert small is not None
    inode = small.memory.stat().st_ino
    assert loaded.get_loaded(image, 1024) == small == loaded.get_loaded(image, 128)
    assert (small.memory.stat().st_ino, small.memory.stat().st_size) == (inode, 1024 * MIB)


@pytest.mark.parametrize(
    "data",
    [
        b"MZ" + bytes(600) + b"HdrS",
        elf((1, 90 * MIB, b"T", 8 * MIB), (4, 0, NOTE, 20)),
        elf((1, 16 * MIB, b"T", 1)),
        elf((4, 0, NOTE, 20)),
    ],
    ids=["compressed", "ends too high", "no note", "nothing to load"],
)
def test_other_kernels_are_left_as_they_are(tmp_path: Path, data: bytes) -> None:
    assert loaded.get_loaded(write(tmp_path, data), 256) is None
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_a_real_kernel(kernels: Path) -> None:
    image = get_kernel(kernels, notify=lambda _line: None, fetch=False).image
    found = loaded.get_loaded(image, 128)
    if not unpack.has_pvh_entry(image.read_bytes()):
        pytest.skip("this machine's kernel has no PVH entry")
    assert found is not None
    assert unpack.has_pvh_entry(found.entry.read_bytes())
    assert b"Linux version " in found.memory.read_bytes()


def test_a_cold_machine_maps_its_kernel_and_may_fall_back_to_a_copy(
    vm_dir: Path, kernels: Path, tmp_path: Path
) -> None:
    if get_kernel(kernels, notify=lambda _line: None, fetch=False).format != "vmlinux":
        pytest.skip("this machine's kernel has no PVH entry")
    said: list[str] = []
    machines = Machines(vm_dir, tmp_path, lambda _name: contextlib.nullcontext(), said.append, pytest.fail)
    wanted = Machine("", "", 128, Path(), Path(), Path("/disk"))
    first, second = (each["argv"] for each in machines.plan(wanted, cold=True)["attempts"])
    memory = next(word for word in first if word.startswith("memory-backend-file,"))
    assert memory.endswith("/loaded,share=off")
    assert first[first.index("-kernel") + 1].endswith("/entry")
    assert second[second.index("-kernel") + 1].endswith("/image")
    assert any(word.startswith("memory-backend-ram,") for word in second)
    assert not said
