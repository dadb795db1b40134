"""QEMU's command line, finalized from plain data. Pure: nothing is looked up or started here, so it is tested unrun.

Choices are measured ones. Machine `pc` with an uncompressed PVH kernel boots fastest under TCG (q35 and qboot gain
nothing; microvm hung in 7 of 15 boots); `tb-size` keeps translated code from growing to 1.5 GB: with 32 MiB of it,
a boot takes a few per cent more CPU time than with 64, and an idle machine does not hold 12 more that a boot fills.
Everything QEMU would add of its own accord is switched off; a network exists only where one is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from .channel import PORT_NAME, SHARE_PORT_NAME
from .spawn import CARD_FD, CHANNEL_FD, CONSOLE_FD, QMP_FD, SHARE_FD

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
TRANSLATION_CACHE_MIB = 32
# Networks a machine can be in at once. One that is made in a network has as many cards from the start; each costs about
# 20 ms of a start under TCG, also when it is not used. One made without gets them when it is connected (hotplug.py).
CARDS = 4
# Those that come later are at slots of the bus which are in the firmware's table of interrupts (the last is 6).
LATE_CARDS, _FIRST_LATE_SLOT = 3, 4


@dataclasses.dataclass(frozen=True)
class Port:
    """A port of the guest that this machine listens on for it."""

    protocol: str  # "tcp" or "udp"
    host_ip: str  # "" is every address
    host_port: int
    guest_port: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a guest is made of. `disk` is a qcow2 overlay. `network` is "" (none at all), "closed" (published ports
    only), "open" (QEMU's user-mode network) or "wired" (cards, whose frames somebody carries: cards.py)."""

    qemu: str
    accelerator: str  # "kvm" or "tcg"
    memory_mib: int
    kernel: Path
    initramfs: Path
    disk: Path
    cpus: int = 1
    tsc_khz: int = 0  # the rate of this machine's time stamp counter, 0 when it is not known (tsc.py)
    append: tuple[str, ...] = ()
    sandbox: bool = True
    network: str = ""
    ports: tuple[Port, ...] = ()
    memory: Path | None = None  # the file with a template's memory, or a loaded kernel's; None: it starts empty
    memory_shared: bool = False  # what the guest writes goes into that file (a template is made), else it is its own

    def kernel_command_line(self) -> str:
        """At most 2,048 bytes (the kernel cuts off the rest), so nothing of a user's command is ever in it."""
        words = ["console=ttyS0", *_QUICK_BOOT]
        if self.cpus == 1:
            # 0.6 s of a boot under TCG is ACPI's interpreter; its tables are needed to find a second processor only.
            # Without them there are no message signalled interrupts: a driver that tries has the kernel log a warning.
            words += ["acpi=off", "pci=nomsi"]
        if self.accelerator == "tcg" and self.tsc_khz:
            words.append(f"tsc_early_khz={self.tsc_khz}")
        if self.accelerator == "tcg":
            words.append("lpj=4000000")  # no calibration of the delay loop: TCG's clock makes it slow and wrong
        return " ".join([*words, *self.append])

    @property
    def cards(self) -> int:
        """How many `spawn.Qemu` has to open."""
        return CARDS if self.network == "wired" else 0

    def argv(self, *, incoming: bool = False) -> list[str]:
        """The command line; its descriptors are those of `spawn.Qemu`. `incoming`: it waits for a machine's
        state (`snapshot.come_in`)."""
        argv = [self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-name", "labkernel-guest", "-machine", "pc,usb=off,vmport=off,memory-backend=ram"]
        argv += ["-object", self._memory()]
        if self.accelerator == "tcg":
            argv += ["-accel", f"tcg,tb-size={TRANSLATION_CACHE_MIB}", "-cpu", "max"]
        else:
            argv += ["-accel", "kvm", "-cpu", "host"]
        argv += ["-m", str(self.memory_mib), "-smp", str(self.cpus)]
        argv += ["-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-append", self.kernel_command_line()]
        argv += ["-drive", f"file={_comma(self.disk)},if=none,id=root,format=qcow2,cache=unsafe"]
        argv += ["-device", "virtio-blk-pci,drive=root"]
        argv += ["-chardev", f"socket,id=channel,fd={CHANNEL_FD}"]
        argv += ["-chardev", f"socket,id=share,fd={SHARE_FD}"]
        argv += ["-device", "virtio-serial-pci,max_ports=3"]
        argv += ["-device", f"virtserialport,chardev=channel,name={PORT_NAME}"]
        argv += ["-device", f"virtserialport,chardev=share,name={SHARE_PORT_NAME}"]
        argv += ["-chardev", f"socket,id=console,fd={CONSOLE_FD}", "-serial", "chardev:console"]
        argv += ["-chardev", f"socket,id=qmp,fd={QMP_FD}", "-mon", "chardev=qmp,mode=control"]
        argv += self._network()
        if self.sandbox:
            argv += ["-sandbox", _SANDBOX]
        if incoming:
            argv += ["-incoming", "defer"]
        return argv

    def _memory(self) -> str:
        if self.memory is None:
            return f"memory-backend-ram,id=ram,size={self.memory_mib}M"
        shared = "on" if self.memory_shared else "off"
        return f"memory-backend-file,id=ram,size={self.memory_mib}M,mem-path={_comma(self.memory)},share={shared}"

    def _network(self) -> list[str]:
        if not self.network:
            return []
        if self.network == "wired":
            return [word for number in range(CARDS) for word in card_words(number, {"netdev": f"net{number}"})]
        words = ["user", "id=net", "ipv6=off"]
        if self.network == "closed":
            words.append("restrict=on")  # no way out, not even to this machine
        words += [f"hostfwd={p.protocol}:{p.host_ip}:{p.host_port}-:{p.guest_port}" for p in self.ports]
        return ["-netdev", ",".join(words), "-device", "virtio-net-pci,netdev=net,romfile="]

    def bare(self) -> Machine:
        """What of the machine its hardware and memory depend on: the same for all that one template can serve."""
        network = self.network if self.network in ("", "wired") else "closed"
        return dataclasses.replace(self, disk=Path("DISK"), ports=(), network=network, memory=None, memory_shared=False)

    def template_key(self, *facts: str) -> str:
        """Names the migration file this machine can be restored from: 32 hex digits.

        All that shapes the guest's hardware and memory goes in. `facts` are identities of the files behind the names:
        QEMU, kernel and initramfs.
        """
        bare = dataclasses.replace(self.bare(), sandbox=False)
        return hashlib.sha256(json.dumps([bare.argv(), *facts]).encode()).hexdigest()[:32]


def late_card(number: int) -> dict[str, str]:
    """The properties of a network card that is plugged in while the machine runs; a restore needs the same."""
    return {"netdev": f"net{number}", "id": f"card{number}", "addr": f"{_FIRST_LATE_SLOT + number:#x}"}


def card_words(number: int, properties: Mapping[str, str]) -> list[str]:
    """The words for card `number`, whose frames go through its descriptor of `spawn.Qemu`."""
    device = ",".join(["virtio-net-pci", *(f"{name}={value}" for name, value in properties.items()), "romfile="])
    return ["-netdev", f"socket,id=net{number},fd={CARD_FD + number}", "-device", device]


def _comma(path: Path) -> str:
    # QEMU's option parser reads a doubled comma as one comma inside a value.
    return str(path).replace(",", ",,")
