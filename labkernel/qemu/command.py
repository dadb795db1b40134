"""QEMU's command line, finalized from plain data. Pure: nothing is looked up or started here, so it is tested unrun.

Choices are measured ones. Machine `pc` with an uncompressed PVH kernel boots fastest under TCG (q35 and qboot gain
nothing; microvm hung in 7 of 15 boots); `tb-size=64` keeps translated code from growing to 1.5 GB. Everything QEMU
would add of its own accord is switched off; a network exists only where one is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from .channel import PORT_NAME

# Each word is worth something at boot; the initcalls set up tracing, certificates and crypto tests nobody uses here.
_QUICK_BOOT = (
    "quiet",
    "panic=-1",
    "reboot=t",
    "no_timer_check",
    "tsc=reliable",
    "nokaslr",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "i8042.noaux",
    "noreplace-smp",
    "initcall_blacklist=init_kprobe_trace,load_system_certificate_list,crypto_kdf108_init",
)
# spawn=deny forbids fork and exec: a migration file therefore comes in as a descriptor, never by `exec:cat`.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
TRANSLATION_CACHE_MIB = 64


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a guest is made of. Descriptor numbers are those the QEMU process will have."""

    qemu: str
    accelerator: str  # "kvm" or "tcg"
    memory_mib: int
    kernel: Path
    initramfs: Path
    disk: Path
    cpus: int = 1
    append: tuple[str, ...] = ()
    sandbox: bool = True
    channel_fd: int = -1
    console_fd: int = -1
    qmp_fd: int = -1
    incoming_fd: int | None = None

    def kernel_command_line(self) -> str:
        """At most 2,048 bytes (the kernel cuts off the rest), so nothing of a user's command is ever in it."""
        words = ["console=ttyS0", *_QUICK_BOOT]
        if self.cpus == 1:
            # 0.6 s of a boot under TCG is ACPI's interpreter; its tables are needed to find a second processor only.
            words.append("acpi=off")
        if self.accelerator == "tcg":
            words.append("lpj=4000000")  # no calibration of the delay loop: TCG's clock makes it slow and wrong
        return " ".join([*words, *self.append])

    def argv(self) -> list[str]:
        """The command line. The disk is opened with a throw-away overlay: what the guest writes is gone at its end."""
        argv = [self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-name", "labkernel-guest", "-machine", "pc,usb=off,vmport=off"]
        if self.accelerator == "tcg":
            argv += ["-accel", f"tcg,tb-size={TRANSLATION_CACHE_MIB}", "-cpu", "max"]
        else:
            argv += ["-accel", "kvm", "-cpu", "host"]
        argv += ["-m", str(self.memory_mib), "-smp", str(self.cpus)]
        argv += ["-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-append", self.kernel_command_line()]
        argv += ["-drive", f"file={_comma(self.disk)},if=none,id=root,format=raw,snapshot=on,cache=unsafe"]
        argv += ["-device", "virtio-blk-pci,drive=root"]
        argv += ["-chardev", f"socket,id=channel,fd={self.channel_fd}"]
        argv += ["-device", "virtio-serial-pci,max_ports=2"]
        argv += ["-device", f"virtserialport,chardev=channel,name={PORT_NAME}"]
        argv += ["-chardev", f"socket,id=console,fd={self.console_fd}", "-serial", "chardev:console"]
        argv += ["-chardev", f"socket,id=qmp,fd={self.qmp_fd}", "-mon", "chardev=qmp,mode=control"]
        if self.sandbox:
            argv += ["-sandbox", _SANDBOX]
        if self.incoming_fd is not None:
            argv += ["-incoming", f"fd:{self.incoming_fd}"]
        return argv

    def template_key(self, *facts: str) -> str:
        """Names the migration file this machine can be restored from: 32 hex digits.

        All that shapes the guest's hardware and memory goes in; the disk and the descriptors do not, since they are
        attached anew. `facts` are identities of the files behind the names: QEMU, kernel and initramfs.
        """
        bare = dataclasses.replace(
            self, disk=Path("DISK"), channel_fd=-1, console_fd=-1, qmp_fd=-1, incoming_fd=None, sandbox=False
        )
        return hashlib.sha256(json.dumps([bare.argv(), *facts]).encode()).hexdigest()[:32]


def _comma(path: Path) -> str:
    # QEMU's option parser reads a doubled comma as one comma inside a value.
    return str(path).replace(",", ",,")
