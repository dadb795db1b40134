"""Taking the uncompressed kernel out of a bzImage, and modules out of their compression. Bytes in, bytes out.

Source: kernel Documentation/x86/boot.rst (`payload_offset`, `payload_length`), lz4_Frame_format.md ("legacy frame"),
lz4_Block_format.md, Xen's pvh.pandoc (the ELF note that makes a kernel bootable by PVH).
"""

from __future__ import annotations

import bz2
import lzma
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

from labkernel.errors import VMError

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK_MAX = 8 << 20
_XEN_NOTE_PHYS32_ENTRY = 18
_PT_NOTE = 4


def vmlinux(data: bytes) -> tuple[bytes, str]:
    """What to hand to QEMU for the kernel file `data`, and its format: `vmlinux` (PVH ELF) or `bzImage`.

    A kernel whose compression is unknown here, or that has no PVH entry, stays a bzImage: it boots, later.
    Raises VMError for what is neither.
    """
    if data[:4] == b"\x7fELF":
        if has_pvh_entry(data):
            return data, "vmlinux"
        raise VMError("this vmlinux has no PVH entry point", resolution="give the bzImage (vmlinuz) instead")
    if data[0x202:0x206] != b"HdrS":
        raise VMError("not a Linux kernel image")
    try:
        inner = _payload(data)
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, ImportError):
        return data, "bzImage"
    return (inner, "vmlinux") if has_pvh_entry(inner) else (data, "bzImage")


def _payload(data: bytes) -> bytes:
    sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = data[start : start + length]
    # All formats but gzip are followed by the length of the result, for the unpacker inside the kernel.
    size = struct.unpack("<I", payload[-4:])[0]
    return decompress(payload, size)


def decompress(data: bytes, size: int | None = None) -> bytes:
    """Undo the compression that the first bytes tell; `size` is the result's length, needed for lz4's legacy form."""
    if data[:2] == b"\x1f\x8b":
        return zlib.decompressobj(31).decompress(data)
    if data[:6] == b"\xfd7zXZ\0" or data[:3] == b"\x5d\0\0":
        return lzma.LZMADecompressor().decompress(data)
    if data[:3] == b"BZh":
        return bz2.BZ2Decompressor().decompress(data)
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return bytes(_zstd().ZstdDecompressor().decompress(data))
    if data[:4] == _LZ4_LEGACY:
        return _lz4_legacy(data, size)
    if data[:4] == b"\x7fELF":
        return data
    raise ValueError("unknown compression")


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]

        return zstd
    from backports import zstd as backport

    return backport


def module(path: Path) -> bytes:
    """The module at `path`, uncompressed (.ko, .ko.gz, .ko.xz, .ko.zst)."""
    return decompress(path.read_bytes())


def _lz4_legacy(data: bytes, size: int | None) -> bytes:
    out = bytearray()
    at = 4
    while at + 4 <= len(data) and (size is None or len(out) < size):
        length = struct.unpack_from("<I", data, at)[0]
        at += 4
        out += lz4_block(memoryview(data)[at : at + length])
        at += length
    if size is not None and len(out) != size:
        raise ValueError(f"{len(out)} bytes instead of {size}")
    return bytes(out)


def lz4_block(block: memoryview) -> bytearray:
    """One LZ4 block: sequences of literals and of copies from what is already out.

    Python's library has no LZ4 and Debian compresses its kernels with it; some seconds for 30 MB, once per kernel.
    """
    out = bytearray()
    at, end = 0, len(block)
    while at < end:
        token = block[at]
        at += 1
        length = token >> 4
        if length == 15:
            while True:
                more = block[at]
                at += 1
                length += more
                if more != 255:
                    break
        out += block[at : at + length]
        at += length
        if at >= end:
            break  # the last sequence has literals only
        distance = block[at] | block[at + 1] << 8
        at += 2
        length = (token & 15) + 4
        if length == 19:
            while True:
                more = block[at]
                at += 1
                length += more
                if more != 255:
                    break
        start = len(out) - distance
        if distance == 0 or start < 0 or len(out) > _LZ4_BLOCK_MAX:
            raise ValueError("not an LZ4 block")
        if distance >= length:
            out += out[start : start + length]
        else:  # the copy runs into itself: a pattern repeated
            pattern = out[start:]
            out += (pattern * (length // distance + 1))[:length]
    return out


def has_pvh_entry(elf: bytes) -> bool:
    """Whether a 64-bit little-endian ELF carries the Xen note with the PVH entry point."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return False
    table = struct.unpack_from("<Q", elf, 32)[0]
    entry_size, count = struct.unpack_from("<HH", elf, 54)
    for index in range(count):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
        if kind == _PT_NOTE and _notes_have(elf[offset : offset + size]):
            return True
    return False


def _notes_have(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, text_size, kind = struct.unpack_from("<III", notes, at)
        at += 12
        if kind == _XEN_NOTE_PHYS32_ENTRY and notes[at : at + name_size] == b"Xen\0":
            return True
        at += (name_size + 3 & ~3) + (text_size + 3 & ~3)
    return False
