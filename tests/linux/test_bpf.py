"""A shorter filter answers as the long one does, for every call."""

from __future__ import annotations

import random
import struct

import pytest

from labkernel.errors import DriverError
from labkernel.linux import bpf, seccomp

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
ARGUMENTS = (0, 1, 8, 40, 0x20000, 0x20008, 0x7E020000, 0x10000000, 1 << 33, (1 << 64) - 1)
LOAD, EQUAL, GREATER, RETURN, AND = 0x20, 0x15, 0x25, 0x06, 0x54


def call(arch: int, number: int, arguments: tuple[int, ...] = (0,) * 6) -> bytes:
    """A struct seccomp_data (man 2 seccomp)."""
    return struct.pack("=IIQ6Q", number, arch, 0, *arguments)


def full_program(profile: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(bpf, "compact", lambda program: program)
        try:
            return seccomp.compile(profile)
        except DriverError as err:
            pytest.skip(err.brief)


@pytest.mark.parametrize("capabilities", [[], ["CAP_SYS_ADMIN", "CAP_BPF", "CAP_SYS_PTRACE"]], ids=["usual", "more"])
def test_the_default_profile(capabilities: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = full_program(seccomp.docker_profile(capabilities), monkeypatch)
    shorter = bpf.compact(program)
    assert len(shorter) < len(program) / 2
    before, after = bpf.decode(program), bpf.decode(shorter)
    chance = random.Random(7)
    edges = [0x3FFFFFFF, 0x40000000 + 1023, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
    for arch in (X86_64, I386, AARCH64, 0, 1, 0xFFFFFFFF):
        for number in [*range(1024), *range(0x40000000, 0x40000000 + 600), *edges]:
            several = [(0,) * 6, tuple(chance.choice(ARGUMENTS) for _ in range(6))]
            # clone, personality, socket and what else looks at arguments, in any of the calling conventions
            if number & 0xFFFF in (41, 56, 102, 120, 135, 136, 359):
                several += [(first, 0, 0, 0, 0, 0) for first in ARGUMENTS]
            for arguments in several:
                data = call(arch, number, arguments)
                assert bpf.run(after, data) == bpf.run(before, data), (hex(arch), hex(number), arguments)


def test_ranges_meet_where_they_did() -> None:
    # 10 < number < 20 or number == 30: 1; the top: 2; otherwise 0; on another machine: 9
    code = [
        *((LOAD, 0, 0, 4), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, 9), (LOAD, 0, 0, 0)),
        *((EQUAL, 4, 0, 30), (EQUAL, 4, 0, 0xFFFFFFFF), (GREATER, 1, 0, 19), (GREATER, 1, 0, 10)),
        *((RETURN, 0, 0, 0), (RETURN, 0, 0, 1), (RETURN, 0, 0, 2)),
        *[(RETURN, 0, 0, 5)] * 40,  # never reached
    ]
    shorter = bpf.decode(bpf.compact(bpf.encode(code)))
    assert len(shorter) < 25
    for arch in (X86_64, I386, 0):
        for number in (0, 9, 10, 11, 18, 19, 20, 29, 30, 31, 0xFFFFFFFE, 0xFFFFFFFF):
            data = call(arch, number)
            assert bpf.run(shorter, data) == bpf.run(code, data), (arch, number)
    answers = [bpf.run(shorter, call(X86_64, number)) for number in (10, 11, 19, 20, 30, 0xFFFFFFFF)]
    assert answers == [0, 1, 1, 0, 1, 2]
    assert bpf.run(shorter, call(I386, 15)) == 9


def test_what_is_not_understood_stays() -> None:
    bits = [(LOAD, 0, 0, 0), (AND, 0, 0, 0xFF), (EQUAL, 0, 1, 3), (RETURN, 0, 0, 1), (RETURN, 0, 0, 2)]
    for code in (bits, [(0x30, 0, 0, 0), *bits], [(LOAD, 0, 0, 4), (GREATER, 0, 1, 3), *bits[3:]]):
        program = bpf.encode([*code, *[(RETURN, 0, 0, 0)] * 50])
        assert bpf.compact(program) == program
