"""Whether KVM is worth using here: a guest of some 100,000 instructions, run through the ioctls in a child process.

A /dev/kvm that opens says little: where the machine is itself a guest without nested virtualization, KVM may emulate
each instruction (about 1 µs) or never return, and a stock kernel looks hung. So the loop is timed, in a process that
can be killed. A machine that does not come up under KVM and does under TCG refutes a good verdict (monitor.py).
This file imports nothing of ours: it is also the program that the child runs.
Source: kernel Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

LOOPS = 50_000  # two instructions each
MAX_NS_PER_INSTRUCTION = 20.0
DEADLINE_S = 0.7  # the child's interpreter included; a good answer takes a few milliseconds

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_CREATE_VCPU = 0xAE41
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_RUN = 0xAE80
_KVM_GET_REGS = 0x8090AE81
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84
_KVM_EXIT_HLT = 5


class Verdict(NamedTuple):
    """`usable` or not, and why, in words. `ns_per_instruction` where the guest ran to its end."""

    usable: bool
    reason: str
    ns_per_instruction: float | None = None


def verdict(cache: Path, *, fresh: bool = False) -> Verdict:
    """Try KVM, or tell what an earlier try of this boot and kernel found (kept in the file `cache`)."""
    key = machine_key()
    if not fresh:
        try:
            kept = json.loads(cache.read_text())
            if kept["key"] == key:
                return Verdict(**kept["verdict"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    found = probe()
    keep(cache, key, found)
    return found


def keep(cache: Path, key: list[str], found: Verdict) -> None:
    """Write a verdict down for the boot, kernel and user of `key`."""
    partial = cache.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps({"key": key, "verdict": found._asdict()}))
        partial.replace(cache)
    except OSError:
        pass  # a verdict that can't be kept is found anew


def refute(cache: str, key: list[str], brief: str) -> None:
    """Write down that a machine failed under KVM where it came up without, so that the next one does not try again."""
    reason = f"a machine did not come up under KVM: {brief} (`labkernel doctor` tries again)"
    keep(Path(cache), key, Verdict(usable=False, reason=reason))


def processor() -> str:
    """What `-cpu host` hands to a guest: a guest's state is of no use on a machine where this is another."""
    wanted = ("vendor_id", "model name", "stepping", "microcode", "flags")
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.startswith(wanted))


def machine_key() -> list[str]:
    """What a verdict holds for: this boot, this kernel, and this user's way to the device."""
    try:
        device = os.stat("/dev/kvm")
        state = f"{device.st_mode:o} {device.st_uid} {device.st_gid} {os.geteuid()} {sorted(os.getgroups())}"
    except OSError:
        state = "none"
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [boot.read_text().strip() if boot.exists() else "", os.uname().release, state]


def _no(reason: str) -> Verdict:
    return Verdict(usable=False, reason=reason)


def probe() -> Verdict:
    """Run the tiny guest in a child that is killed at a deadline."""
    if os.uname().machine != "x86_64":
        return _no("KVM is only tried on x86_64")
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return _no("there is no /dev/kvm")
    except PermissionError:
        return _no("no permission for /dev/kvm (`usermod -aG kvm USER` gives it)")
    except OSError as err:
        return _no(f"/dev/kvm does not open: {err.strerror}")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__], capture_output=True, text=True, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        return _no(f"/dev/kvm is there, but a guest of {2 * LOOPS:,} instructions did not end in time")
    except OSError as err:
        return _no(f"the probe could not be started: {err}")
    try:
        ns = float(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return _no(f"/dev/kvm is there, but a guest does not run: {last}")
    if ns > MAX_NS_PER_INSTRUCTION:
        return Verdict(
            usable=False, reason=f"/dev/kvm is there, but emulated: {ns:.0f} ns an instruction", ns_per_instruction=ns
        )
    return Verdict(usable=True, reason=f"a guest ran at {ns:.2f} ns an instruction", ns_per_instruction=ns)


def run_guest() -> float:
    """Nanoseconds per instruction of `dec ecx; jnz` in a real-mode guest. Raises OSError, RuntimeError."""
    import fcntl

    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(kvm, _KVM_GET_API_VERSION, 0) != 12:
        raise RuntimeError("an API version other than 12")
    vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, 0x2000, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    code = b"\x66\xb9" + struct.pack("<I", LOOPS) + b"\x66\x49\x75\xfc\xf4"  # mov ecx, N; 1: dec ecx; jnz 1b; hlt
    memory[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0x1000, 0x2000, address))
    cpu = fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0)
    shared = mmap.mmap(cpu, fcntl.ioctl(kvm, _KVM_GET_VCPU_MMAP_SIZE, 0))
    sregs = bytearray(312)
    fcntl.ioctl(cpu, _KVM_GET_SREGS, sregs)
    struct.pack_into("<Q", sregs, 0, 0)  # cs.base
    struct.pack_into("<H", sregs, 12, 0)  # cs.selector
    fcntl.ioctl(cpu, _KVM_SET_SREGS, sregs)
    registers = bytearray(144)
    struct.pack_into("<QQ", registers, 128, 0x1000, 2)  # rip, rflags
    fcntl.ioctl(cpu, _KVM_SET_REGS, registers)
    began = time.perf_counter_ns()
    fcntl.ioctl(cpu, _KVM_RUN, 0)
    took = time.perf_counter_ns() - began
    reason = struct.unpack_from("<I", shared, 8)[0]
    if reason != _KVM_EXIT_HLT:
        raise RuntimeError(f"KVM_RUN ended with exit reason {reason}")
    return took / (2 * LOOPS)


if __name__ == "__main__":
    print(run_guest())  # noqa: T201
