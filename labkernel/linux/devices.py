"""Device rules of a version 2 cgroup: a small eBPF program, since v2 has no files for them.

Left out: other program types. Source: man 2 bpf; kernel Documentation admin-guide/cgroup-v2.rst, "Device controller".
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_BPF_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "i686": 357, "armv7l": 386, "ppc64le": 361, "s390x": 351}
_BPF_PROG_LOAD = 5
_BPF_PROG_ATTACH = 8
_BPF_PROG_TYPE_CGROUP_DEVICE = 15
_BPF_CGROUP_DEVICE = 6
_BPF_F_ALLOW_MULTI = 2  # programs of the groups above stay in force

_TYPES = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ALL_ACCESS = 7


def device_program(rules: list[dict[str, object]]) -> bytes:
    """The rules (runtime-spec `resources.devices`) as eBPF instructions of 8 bytes; the last rule that fits decides,
    and without one the answer is no. The context is struct bpf_cgroup_dev_ctx. Pure."""
    code = [
        _instruction(0x61, 2, 1, 0, 0),  # r2 = access << 16 | type
        _instruction(0x61, 4, 1, 4, 0),  # r4 = major
        _instruction(0x61, 5, 1, 8, 0),  # r5 = minor
        _instruction(0xBC, 3, 2, 0, 0),  # w3 = w2
        _instruction(0x74, 3, 0, 0, 16),  # w3 >>= 16: access
        _instruction(0x54, 2, 0, 0, 0xFFFF),  # w2 &= 0xffff: type
    ]
    for rule in reversed(rules):
        answer = _rule(rule)
        code += answer
        if len(answer) == 2:  # fits everything; the verifier refuses instructions that can never be reached
            return b"".join(code)
    code += [_instruction(0xB7, 0, 0, 0, 0), _instruction(0x95, 0, 0, 0, 0)]
    return b"".join(code)


def attach_rules(cgroup: str, rules: list[dict[str, object]]) -> None:
    """Attach the rules to the v2 group at `cgroup`.

    Needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN. Raises OSError."""
    program = device_program(rules)
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"BSD")  # no helper is called, so no GPL-only one
    load = struct.pack(
        "=IIQQIIQII",
        _BPF_PROG_TYPE_CGROUP_DEVICE,
        len(program) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
    )
    program_fd = _bpf(_BPF_PROG_LOAD, load)
    try:
        directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(
                _BPF_PROG_ATTACH,
                struct.pack("=IIIII", directory, program_fd, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI, 0),
            )
        finally:
            os.close(directory)
    finally:
        os.close(program_fd)  # the group holds the program from now on


def _rule(rule: dict[str, object]) -> list[bytes]:
    tests: list[tuple[int, int, int]] = []  # (prepare access mask or -1, register, value)
    kind = str(rule.get("type") or "a")
    if kind in _TYPES:
        tests.append((-1, 2, _TYPES[kind]))
    access = sum(_ACCESS[letter] for letter in set(str(rule.get("access") or "rwm")))
    if access != _ALL_ACCESS:
        tests.append((_ALL_ACCESS & ~access, 1, 0))
    for register, key in ((4, "major"), (5, "minor")):
        number = rule.get(key)
        if number is not None and int(str(number)) >= 0:
            tests.append((-1, register, int(str(number))))
    code: list[bytes] = [_instruction(0xB7, 0, 0, 0, int(bool(rule.get("allow")))), _instruction(0x95, 0, 0, 0, 0)]
    for mask, register, value in reversed(tests):
        code.insert(0, _instruction(0x55, register, 0, len(code), value))  # if it differs: the next rule
        if mask >= 0:  # w1 = access & what the rule does not cover
            code[:0] = [_instruction(0xBC, 1, 3, 0, 0), _instruction(0x54, 1, 0, 0, mask)]
    return code


def _instruction(opcode: int, destination: int, source: int, offset: int, immediate: int) -> bytes:
    return struct.pack("=BBhi", opcode, destination | source << 4, offset, immediate)


def _bpf(command: int, attributes: bytes) -> int:
    number = _BPF_NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "bpf")
    libc = ctypes.CDLL(None, use_errno=True)
    # union bpf_attr may be shorter than the kernel's idea of it; missing bytes count as zero
    buffer = ctypes.create_string_buffer(attributes, max(len(attributes), 72))
    result = int(libc.syscall(number, command, ctypes.byref(buffer), len(buffer)))
    if result < 0:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err), "bpf")
    return result
