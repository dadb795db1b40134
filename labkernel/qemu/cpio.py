"""Writing a cpio archive in the `newc` form, the one the kernel unpacks as initramfs. Pure; reading is left out.

Source: kernel Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat


class Archive:
    """An archive being written; all members belong to 0:0 and carry no time, so equal input gives equal bytes."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def directory(self, name: str, *, mode: int = 0o755) -> None:
        self._add(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def device(self, name: str, major: int, minor: int, *, mode: int = 0o600) -> None:
        """A character device. Needs no privilege: it is only a record in the archive."""
        self._add(name, stat.S_IFCHR | mode, b"", device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive. Nothing can be added afterwards."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._out)

    def _add(self, name: str, mode: int, data: bytes, *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(raw), 0)
        self._out += b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        self._pad()
        self._out += data
        self._pad()

    def _pad(self) -> None:
        self._out += bytes(-len(self._out) % 4)
