"""What networks could leave on a machine: interfaces and rules of a store that nobody needs. Part of `system check`.

Under the driver root only: under rootless all of it lies in a namespace that goes with the supervisor.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from ..errors import LabkernelError
from ..linux import netlink, nftables
from ..net.naming import prefixes, store_key, table_name
from ..net.switch import leftovers

if TYPE_CHECKING:
    from ..networks import Networks

_SETTLING_S = 5.0


def find_leaks(networks: Networks) -> list[str]:
    """Names of our interfaces that no running container uses, and `table NAME` for rules without a supervisor."""
    deadline = time.monotonic() + _SETTLING_S
    veths = prefixes(store_key(networks.layout.root))[1]
    found = _look(networks)
    # The kernel takes a container's interfaces away some moments after its end.
    while any(name.startswith(veths) for name in found) and time.monotonic() < deadline:
        time.sleep(0.1)
        found = _look(networks)
    return found


def _look(networks: Networks) -> list[str]:
    if networks.driver.name != "root":
        return []
    key = store_key(networks.layout.root)
    present = leftovers(key)
    try:
        tables = [f"table {name}" for name in nftables.tables() if name == table_name(key)]
    except OSError:
        tables = []
    if not present and not tables:
        return []
    if not networks.layout.socket.exists():
        return [*present, *tables]
    try:
        states = networks.runtime.states()
    except LabkernelError:
        return []  # the check of containers tells
    used = {network.bridge for network in networks.list()}
    for state in states.values():
        if state["status"] in ("running", "paused"):
            used |= {each["veth"] for each in (state.get("network") or {}).get("endpoints") or ()}
    ours = tuple(prefixes(key))
    return [name for name in present if name not in used and name.startswith(ours)]


def remove_leaks(networks: Networks) -> list[str]:
    """Remove what `find_leaks` finds; returns it. Needs what the driver root needs."""
    found = find_leaks(networks)
    links = [name for name in found if not name.startswith("table ")]
    if links:
        with netlink.Socket() as sock:
            sock.send(*map(netlink.delete_link, links), ignore=(errno.ENODEV,))
    if len(links) != len(found):
        try:
            nftables.Table(table_name(store_key(networks.layout.root))).delete()
        except OSError as err:
            if err.errno != errno.ENOENT:
                raise
    return found
