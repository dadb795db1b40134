"""A kernel that lies in a guest's memory before its QEMU starts: a machine maps it instead of copying it.

    vm/kernels/<kernel>/loaded    memory as a boot loader leaves it: the kernel's segments at their addresses
                        entry     an ELF file with the PVH note and one page of the kernel: what `-kernel` names

QEMU given the whole kernel keeps a second copy of it for as long as it runs (for a reset, which `-no-reboot` rules
out), and copies every page into the guest: 65 MiB more for an idle machine, and a tenth of the CPU time of a boot. From
`loaded`, mapped privately, a guest takes the pages it touches; all machines share those that nobody writes.

Left out: kernels that are compressed, for they unpack themselves. Sources: ELF gabi (program headers), Xen's
pvh.pandoc.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

_HEADER, _SEGMENT = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
_LOAD, _NOTE = 1, 4
_PAGE = 4096
ROOM_BYTES = 96 << 20  # the kernel must end below: the smallest machine has so much


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The two files of one kernel."""

    entry: Path
    memory: Path


@dataclasses.dataclass(frozen=True)
class _Segment:
    kind: int
    flags: int
    virtual: int
    physical: int
    data: bytes
    size: int  # in memory; what is beyond the data is zero

    def header(self, offset: int, size: int) -> bytes:
        """A program header for its first `size` bytes, which lie at `offset` of the file."""
        return _SEGMENT.pack(self.kind, self.flags, offset, self.virtual, self.physical, size, size, 4)


def get_loaded(image: Path, memory_mib: int) -> Loaded | None:
    """The files for a machine with so much memory, made beside `image` when they are not there yet.

    None when this kernel cannot be used so. The caller holds the lock of the kernels. Raises OSError.
    """
    found = Loaded(image.with_name("entry"), image.with_name("loaded"))
    if not found.entry.exists():
        with open(image, "rb") as file:
            header = file.read(_HEADER.size)
            segments = _segments(header, file)
        loads = [segment for segment in segments if segment.kind == _LOAD]
        notes = [segment for segment in segments if segment.kind == _NOTE]
        if not loads or not notes or any(each.physical + each.size > ROOM_BYTES for each in loads):
            return None
        _write(found.memory, _memory(loads))
        _write(found.entry, [(0, _entry(header, loads[0], notes))])  # last: it says that both are complete
    if found.memory.stat().st_size < memory_mib << 20:
        os.truncate(found.memory, memory_mib << 20)  # a longer hole at its end; machines that run do not notice
    return found


def _segments(header: bytes, file: BinaryIO) -> list[_Segment]:
    if header[:6] != b"\x7fELF\x02\x01" or len(header) < _HEADER.size:
        return []
    _, _, _, _, _, table, _, _, _, each, count, _, _, _ = _HEADER.unpack(header)
    file.seek(table)
    headers = file.read(each * count)
    found = []
    for index in range(count):
        kind, flags, offset, virtual, physical, length, size, _ = _SEGMENT.unpack_from(headers, index * each)
        file.seek(offset)
        found.append(_Segment(kind, flags, virtual, physical, file.read(length), size))
    return found


def _memory(loads: list[_Segment]) -> list[tuple[int, bytes]]:
    """(address, page) of all pages that are not zero."""
    pages = []
    for segment in loads:
        for at in range(0, len(segment.data), _PAGE):
            page = segment.data[at : at + _PAGE]
            if page.strip(b"\0"):
                pages.append((segment.physical + at, page))
    return pages


def _entry(header: bytes, first: _Segment, notes: list[_Segment]) -> bytes:
    """A small kernel to QEMU: the notes name the entry point; of the rest one page, as a file must load something."""
    parts = [first.header(_PAGE, min(_PAGE, len(first.data)))]
    body = bytearray(first.data[:_PAGE].ljust(_PAGE, b"\0"))
    for note in notes:
        parts.append(note.header(_PAGE + len(body), len(note.data)))
        body += note.data + bytes(-len(note.data) % 4)
    ident, kind, machine, version, entry, _, _, flags, *_ = _HEADER.unpack(header)
    sizes = _HEADER.size, _SEGMENT.size, len(parts)
    head = _HEADER.pack(ident, kind, machine, version, entry, _HEADER.size, 0, flags, *sizes, 0, 0, 0)
    return (head + b"".join(parts)).ljust(_PAGE, b"\0") + bytes(body)


def _write(path: Path, pieces: list[tuple[int, bytes]]) -> None:
    """The file with these bytes at these offsets: complete or not at all."""
    with tempfile.NamedTemporaryFile(prefix=".loaded-", dir=path.parent, delete=False) as out:
        try:
            for offset, data in pieces:
                out.seek(offset)
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
            os.replace(out.name, path)
        except BaseException:
            os.unlink(out.name)
            raise
