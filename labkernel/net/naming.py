"""What our interfaces and rules are called on the machine, so that they are told from everybody else's."""

from __future__ import annotations

import os
import zlib


def store_key(root: str | os.PathLike[str]) -> str:
    """Eight digits that stand for one store: `system check` tells its own from another store's by them."""
    return f"{zlib.crc32(os.fsencode(root)):08x}"


def bridge_name(key: str, network_id: str) -> str:
    """The bridge of a network. Fifteen characters, the longest name an interface can have."""
    return f"lk{key[:5]}{network_id[:8]}"


def prefixes(key: str) -> tuple[str, str]:
    """How a store's bridges, and this machine's ends of its containers' interfaces, begin."""
    return f"lk{key[:5]}", f"lv{key[:5]}"


def table_name(key: str) -> str:
    """The one nftables table of a store; no other rule of the machine is ever touched."""
    return f"labkernel_{key}"
