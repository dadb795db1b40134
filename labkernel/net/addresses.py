"""IPv4 subnets and addresses: which are free, and which to take. Pure but for `machine_subnets`.

Numbers and CIDR words only: `ipaddress` costs more to import than a container start may take.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# As docker's default pools 172.17 to 172.31, but in twentieths: 240 networks of 4,093 containers each.
_POOL_FIRST = (172 << 24) | (17 << 16)
_POOL_PREFIX = 20
_POOL_COUNT = 15 * 16


class Subnet(NamedTuple):
    """An IPv4 network: its first address as a number, and its prefix length."""

    first: int
    prefix: int

    @property
    def size(self) -> int:
        return 1 << (32 - self.prefix)

    @property
    def last(self) -> int:
        return self.first + self.size - 1

    def overlaps(self, other: Subnet) -> bool:
        return self.first <= other.last and other.first <= self.last

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.first <= address <= self.last

    def __str__(self) -> str:
        return f"{words(self.first)}/{self.prefix}"


def number(address: str) -> int:
    """An IPv4 address as a number. Raises ValueError."""
    try:
        return int.from_bytes(socket.inet_pton(socket.AF_INET, address), "big")
    except OSError:
        raise ValueError(f"invalid IPv4 address: {address}") from None


def words(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4, "big"))


def parse(text: str) -> Subnet:
    """`10.5.0.0/16`; bits of the host part are dropped. Raises ValueError."""
    address, slash, length = text.partition("/")
    if not slash or not length.isdigit() or not 0 < int(length) <= 32:
        raise ValueError(f"invalid CIDR address: {text}")
    prefix = int(length)
    return Subnet(number(address) >> (32 - prefix) << (32 - prefix), prefix)


def candidates(seed: str) -> Iterator[Subnet]:
    """The subnets of the pool, each store (`seed`) beginning elsewhere: two stores of one machine rarely meet."""
    start = zlib.crc32(seed.encode())
    for step in range(_POOL_COUNT):
        yield Subnet(_POOL_FIRST + ((start + step) % _POOL_COUNT) * (1 << (32 - _POOL_PREFIX)), _POOL_PREFIX)


def free_subnet(seed: str, taken: Iterable[Subnet]) -> Subnet | None:
    """The first of the pool that meets none of `taken`; None when there is none."""
    taken = list(taken)
    for subnet in candidates(seed):
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    return None


def free_address(subnet: Subnet, used: Iterable[int], within: Subnet | None = None) -> int | None:
    """The lowest free address that is neither the network's nor the broadcast address; None when all are taken."""
    busy = set(used)
    span = within or subnet
    for address in range(max(span.first, subnet.first + 1), min(span.last, subnet.last - 1) + 1):
        if address not in busy:
            return address
    return None


def last_free_address(subnet: Subnet, used: Iterable[int]) -> int | None:
    """The highest free one: where the containers that no database knows live, far from `free_address`'s."""
    busy = set(used)
    return next((address for address in range(subnet.last - 1, subnet.first, -1) if address not in busy), None)


def mac_of(address: int) -> str:
    """Docker's rule: 02:42 and the four bytes of the IPv4 address."""
    return "02:42:" + ":".join(f"{byte:02x}" for byte in address.to_bytes(4, "big"))


def machine_subnets(except_for: Iterable[str] = ()) -> list[tuple[str, Subnet]]:
    """(interface, subnet) of this machine's IPv4 routes but for the default ones and those of the named interfaces.

    Source: man 5 proc_pid_net, `route` (little-endian hexadecimal words)."""
    skipped, found = set(except_for), []
    try:
        with open("/proc/net/route", encoding="ascii") as file:
            lines = file.readlines()[1:]
    except OSError:
        return []
    for line in lines:
        parts = line.split()
        if len(parts) > 7 and parts[0] not in skipped and parts[1] != "00000000":
            first = int.from_bytes(bytes.fromhex(parts[1])[::-1], "big")
            mask = int.from_bytes(bytes.fromhex(parts[7])[::-1], "big")
            found.append((parts[0], Subnet(first, mask.bit_count())))
    return found
