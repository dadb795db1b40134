"""A network card for a machine that runs: made when it is connected to a network, for one that was made without.

QEMU plugs it into the PCI bus and would tell the guest by ACPI, which a guest of ours has not: its init, told of the
card as of any change of networks, has the kernel look at the bus again (guest/net.c). So a machine without a network
has no card to pay for, and can have one. Runs in the machine's monitor. Standard library only.
Sources: QEMU docs/interop, `netdev_add`, `device_add`; kernel Documentation/ABI/testing/sysfs-bus-pci, `rescan`.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from .command import late_card
from .qmp import Qmp
from .spawn import card_pair


def add_card(qmp: Qmp, number: int) -> socket.socket:
    """Plug in card `number`; returns our end of it. Raises VMError, OSError."""
    ours, theirs = card_pair()
    try:
        qmp.execute("getfd", fds=[theirs.fileno()], fdname=f"card{number}")
        qmp.execute("netdev_add", type="socket", id=f"net{number}", fd=f"card{number}")
        properties: dict[str, Any] = {"romfile": "", **late_card(number)}
        qmp.execute("device_add", driver="virtio-net-pci", **properties)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    os.set_blocking(ours.fileno(), False)
    return ours
