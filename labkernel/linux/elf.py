"""ELF files: for which architecture a program is. Source: System V ABI, ELF header; Go's words for architectures, which
image-spec uses. Left out: whether anything executes it (`runtime.foreign`). Standard library only."""

from __future__ import annotations

import os
import struct

# Go's word for an architecture -> (bits, byte order, e_machine)
MACHINES = {
    "amd64": (64, "<", 62),
    "386": (32, "<", 3),
    "arm64": (64, "<", 183),
    "arm": (32, "<", 40),
    "riscv64": (64, "<", 243),
    "ppc64le": (64, "<", 21),
    "s390x": (64, ">", 22),
    "mips64le": (64, "<", 8),
    "loong64": (64, "<", 258),
}
# Go's word -> QEMU's, where it is another one
_QEMU = {"arm64": "aarch64", "mips64le": "mips64el", "loong64": "loongarch64", "amd64": "x86_64", "386": "i386"}
_INTERPRETER = 3  # PT_INTERP
_HOSTS = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "i386": "386",
    "loongarch64": "loong64",
}
_EXECUTABLE = 2  # e_type; ET_DYN, 3, is taken wherever this is
_HEADER_BYTES = 64


def host() -> str:
    """This machine's architecture."""
    machine = os.uname().machine
    return _HOSTS.get(machine, machine)


def native(architecture: str) -> bool:
    """Whether this machine's kernel executes its programs by itself."""
    return architecture == host() or (host(), architecture) == ("amd64", "386")


def header(architecture: str) -> bytes:
    """The first bytes of a program for `architecture`; none for one that is not known here."""
    if architecture not in MACHINES:
        return b""
    bits, order, machine = MACHINES[architecture]
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    return (ident + struct.pack(f"{order}HHI", _EXECUTABLE, machine, 1)).ljust(_HEADER_BYTES, b"\0")


def architecture_of(head: bytes) -> str | None:
    """What the ELF file is for that begins with `head`; None for other files, and where the machine is unknown."""
    if len(head) < 20 or not head.startswith(b"\x7fELF"):
        return None
    order = ">" if head[5] == 2 else "<"
    found = ({1: 32, 2: 64}.get(head[4]), order, struct.unpack_from(f"{order}H", head, 18)[0])
    return next((name for name, known in MACHINES.items() if known == found), None)


def emulator_names(architecture: str) -> tuple[str, ...]:
    """What programs are called that execute those of `architecture` (qemu-user): Debian's, and what newer ones are."""
    name = f"qemu-{_QEMU.get(architecture, architecture)}"
    return f"{name}-static", name


def is_static(path: str) -> bool:
    """Whether the ELF file of 64 bits at `path` needs no dynamic loader."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
            if len(head) < _HEADER_BYTES or not head.startswith(b"\x7fELF\2\1"):
                return False
            offset, (size, count) = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<HH", head, 54)
            file.seek(offset)
            table = file.read(size * count)
    except OSError:
        return False
    return all(struct.unpack_from("<I", table, at)[0] != _INTERPRETER for at in range(0, len(table), size))


def foreign_program(path: str) -> str | None:
    """The architecture that `path`, or the interpreter its first line names, is for when it is not this machine's."""
    for _ in range(2):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            head = os.read(fd, 256)
            os.close(fd)
        except OSError:
            return None
        if not head.startswith(b"#!"):
            found = architecture_of(head)
            return found if found is not None and not native(found) else None
        words = head[2:].split(b"\n", 1)[0].split()
        if not words:
            return None
        path = os.fsdecode(words[0])
    return None
