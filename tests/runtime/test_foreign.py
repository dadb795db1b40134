"""What is read of binfmt_misc and of programs; the directory is the tests' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from labkernel.errors import FOREIGN_HINT
from labkernel.linux import elf
from labkernel.runtime import foreign

OTHER = "s390x" if elf.host() != "s390x" else "riscv64"


def entry(architecture: str, *, flags: str = "F", state: str = "enabled") -> str:
    magic = elf.header(architecture)[:20].hex()
    mask = "ffffffffffffff00" + "ff" * 8 + "feffffff"
    if elf.MACHINES[architecture][1] == ">":
        mask = "ffffffffffffff00" + "ff" * 8 + "fffeffff"
    return f"{state}\ninterpreter /usr/bin/qemu-x\nflags: {flags}\noffset 0\nmagic {magic}\nmask {mask}\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "status").write_text("enabled\n")
    (tmp_path / "register").write_text("")
    (tmp_path / "python").write_text("enabled\ninterpreter /usr/bin/python3\nflags: \nextension .pyc\n")
    return tmp_path


@pytest.mark.parametrize("architecture", elf.MACHINES)
def test_a_header_is_read_back(architecture: str) -> None:
    assert elf.architecture_of(elf.header(architecture)) == architecture
    assert elf.architecture_of(elf.header(architecture)[:10]) is None


def test_this_machines_programs_are_native(tmp_path: Path) -> None:
    assert elf.architecture_of(Path(sys.executable).read_bytes()[:64]) == elf.host()
    assert elf.native(elf.host())
    assert elf.foreign_program(sys.executable) is None
    (tmp_path / "prog").write_bytes(elf.header(OTHER))
    (tmp_path / "script").write_text(f"#! {tmp_path}/prog -x\n")
    assert elf.foreign_program(str(tmp_path / "script")) == OTHER
    assert elf.foreign_program(str(tmp_path / "no-such")) is None


def test_what_is_registered_is_reported(directory: Path) -> None:
    assert foreign.report(str(directory / "nothing")) == (
        False,
        f"binfmt_misc is not mounted at {directory}/nothing",
        FOREIGN_HINT,
    )
    assert foreign.report(str(directory))[:2] == (False, "no interpreter is registered with binfmt_misc")
    (directory / "qemu-x").write_text(entry(OTHER))
    assert foreign.report(str(directory)) == (True, f"{OTHER} (/usr/bin/qemu-x)", "")
    # A shared object is a program too, and the mask says so.
    head = bytearray(elf.header(OTHER))
    head[17 if elf.MACHINES[OTHER][1] == ">" else 16] = 3
    assert [each.name for each in foreign.interpreters(str(directory)) or () if each.takes(bytes(head))] == ["qemu-x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [(entry(OTHER, flags="OC"), "has no flag F"), (entry(OTHER, state="disabled"), "is switched off")],
)
def test_an_entry_that_does_not_help_is_none(directory: Path, text: str, words: str) -> None:
    (directory / "qemu-x").write_text(text)
    ok, cause, remedy = foreign.report(str(directory))
    assert (ok, remedy) == (False, FOREIGN_HINT)
    assert f"{OTHER}: qemu-x {words}" in cause


def test_all_of_it_can_be_switched_off(directory: Path) -> None:
    (directory / "qemu-x").write_text(entry(OTHER))
    (directory / "status").write_text("disabled\n")
    assert not foreign.report(str(directory))[0]
