"""Programs of other architectures: which this kernel executes, and what to install where it does not.

The kernel hands them to an interpreter (qemu-user) that somebody has registered with binfmt_misc. Its entries hold for
the user namespaces below the one they were made in, so rootless containers have them too. Flag F matters: the kernel
has then opened the interpreter when it was registered; without it the interpreter's path is looked up in the container,
which rarely has it. Nothing here decides whether a program runs (the kernel does, when it is executed); it is for
reports. Source: Documentation/admin-guide/binfmt-misc.rst.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import FOREIGN_HINT
from ..linux import elf

DIRECTORY = "/proc/sys/fs/binfmt_misc"


class Interpreter(NamedTuple):
    """An entry of binfmt_misc that goes by the first bytes of a file. `flags` as the kernel shows them (`OCF`)."""

    name: str
    enabled: bool
    path: str
    flags: str
    offset: int
    magic: bytes
    mask: bytes

    @property
    def fixed(self) -> bool:
        """Whether containers have it whatever is in their file systems."""
        return "F" in self.flags

    def takes(self, head: bytes) -> bool:
        """Whether a file that begins with `head` is this interpreter's."""
        part = head[self.offset : self.offset + len(self.magic)]
        if len(part) < len(self.magic):
            return False
        return all((a ^ b) & m == 0 for a, b, m in zip(part, self.magic, self.mask, strict=True))


def interpreters(directory: str = DIRECTORY) -> list[Interpreter] | None:
    """The registered ones; None where binfmt_misc is not mounted at `directory`."""
    try:
        with open(f"{directory}/status") as file:
            on = file.read().strip() == "enabled"
        names = sorted(set(os.listdir(directory)) - {"status", "register"})
    except OSError:
        return None
    found = [_read(directory, name, on=on) for name in names]
    return [entry for entry in found if entry is not None]


def _read(directory: str, name: str, *, on: bool) -> Interpreter | None:
    try:
        with open(f"{directory}/{name}") as file:
            lines = file.read().splitlines()
    except OSError:  # taken away meanwhile
        return None
    values = dict(line.rstrip().partition(" ")[::2] for line in lines)
    if "magic" not in values:
        return None  # goes by the end of the name
    magic = bytes.fromhex(values["magic"])
    mask = bytes.fromhex(values["mask"]) if "mask" in values else b"\xff" * len(magic)
    enabled = on and lines[0] == "enabled"
    flags, offset = values.get("flags:", ""), int(values.get("offset", "0"))
    return Interpreter(name, enabled, values.get("interpreter", ""), flags, offset, magic, mask)


def report(directory: str = DIRECTORY) -> tuple[bool, str, str]:
    """(whether programs of any foreign architecture run in containers, which and by what or why not, remedy)."""
    known = interpreters(directory)
    if known is None:
        return False, f"binfmt_misc is not mounted at {directory}", FOREIGN_HINT
    running, other = [], []
    for name in elf.MACHINES:
        entry = next((entry for entry in known if not elf.native(name) and entry.takes(elf.header(name))), None)
        if entry is not None and entry.enabled and entry.fixed:
            running.append(f"{name} ({entry.path})")
        elif entry is not None:
            why = "has no flag F: containers need it in their own files" if entry.enabled else "is switched off"
            other.append(f"{name}: {entry.name} {why}")
    if running:
        return True, ", ".join(running + other), ""
    return False, ", ".join(other) or "no interpreter is registered with binfmt_misc", FOREIGN_HINT
