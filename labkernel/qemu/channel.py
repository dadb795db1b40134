"""The frames spoken with the guest's init over virtio-serial. Pure: bytes in, frames out. The other end: guest/*.c.

A frame is kind (1 byte), 0, process number (2 bytes), payload length (4 bytes), payload; numbers are big endian. The
kinds 0, 1 and 2 are the standard streams, as in Docker's attach protocol. Process 0 is the command of the VM, higher
numbers are what `exec` added.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

PROTOCOL = 3
PORT_NAME = "labkernel.0"
SHARE_PORT_NAME = "labkernel.1"  # requests of shared directories and their answers
MAX_PAYLOAD = (1 << 20) - 8
STDIN_WINDOW = 256 << 10  # bytes of stdin that may wait unconsumed in the guest (init.c has a buffer of this size)

_HEADER = struct.Struct(">BxHI")


class Kind(IntEnum):
    """What a frame is. 0 to 31 are streams and requests, from 32 on the guest answers."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    SETUP = 16
    START = 17
    SIGNAL = 18
    STATS = 19
    POWEROFF = 20
    HOLD = 21
    RESIZE = 22
    CLOCK = 23
    SHARED = 24
    FREEZE = 25
    NETWORK = 26
    HELLO = 32
    READY = 33
    STARTED = 34
    EXITED = 35
    FIGURES = 36
    FAILED = 37
    CONSUMED = 38
    SHARE = 39
    FROZEN = 40
    NETWORKED = 41


class Frame(NamedTuple):
    """One message: its kind (a number this version may not know), the guest process it is about, its bytes."""

    kind: int
    process: int
    payload: bytes

    def words(self) -> dict[str, str]:
        """A payload of `name=value` words as a dictionary."""
        pairs = (word.partition("=") for word in self.payload.decode("utf-8", "replace").split())
        return {name: value for name, _, value in pairs}

    def numbers(self) -> dict[str, int]:
        """The words of the payload whose values are whole numbers."""
        return {name: int(value) for name, value in self.words().items() if value.lstrip("-").isdigit()}


def encode(kind: Kind, payload: bytes = b"", *, process: int = 0) -> bytes:
    """The bytes of one frame. Raises ValueError for a payload the guest would refuse."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame holds at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    return _HEADER.pack(kind, process, len(payload)) + payload


class Decoder:
    """Cuts a byte stream into frames; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """All frames that `data` completes."""
        self._pending += data
        while len(self._pending) >= _HEADER.size:
            kind, process, length = _HEADER.unpack_from(self._pending)
            end = _HEADER.size + length
            if len(self._pending) < end:
                return
            payload = bytes(self._pending[_HEADER.size : end])
            del self._pending[:end]
            yield Frame(kind, process, payload)


def _records(records: Iterable[tuple[str, str]]) -> bytes:
    out = bytearray()
    for letter, text in records:
        raw = text.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise ValueError(f"a NUL byte in {text!r}")
        out += letter.encode() + raw + b"\0"
    return bytes(out)


def clock_payload(*, time_s: float, entropy: bytes) -> bytes:
    """CLOCK: set the clock and mix in entropy, of which what is beyond 64 bytes is ignored."""
    return _records(_clock(time_s, entropy))


def _clock(time_s: float, entropy: bytes) -> list[tuple[str, str]]:
    whole, nanoseconds = divmod(round(time_s * 1e9), 10**9)
    return [("t", f"{whole}.{nanoseconds:09d}"), ("r", entropy.hex())]


def setup_payload(
    *,
    time_s: float,
    entropy: bytes,
    device: str,
    hostname: str | None = None,
    readonly: bool = False,
    network: str = "",
    wires: Mapping[str, Any] | None = None,
    shares: Sequence[tuple[str, bool, bool]] = (),
) -> bytes:
    """SETUP: what CLOCK does, then mount `device` as the root.

    `network` is "" (none), "closed" (an address, no way out), "open", or "wired": then `wires` tells what
    `network_payload` does. `shares` are (absolute path in the guest, is a
    directory, is writable); they are numbered in this order in SHARE frames.
    """
    records = [*_clock(time_s, entropy), ("d", device)]
    if hostname:
        records.append(("h", hostname))
    if readonly:
        records.append(("o", ""))
    if network:
        records.append(("n", network))
    if wires:
        records += _wires(wires)
    for target, directory, writable in shares:
        records.append(("m", f"{'d' if directory else 'f'} {'rw' if writable else 'ro'} {target}"))
    return _records(records)


def network_payload(wires: Mapping[str, Any]) -> bytes:
    """NETWORK: the cards in use from now on, and the files that tell names.

    `wires` is {"cards": [{"number", "mac", "mtu", "ip", "prefix", "gateway" ("" for none)}], "hosts", "resolv"}."""
    return _records(_wires(wires))


def _wires(wires: Mapping[str, Any]) -> list[tuple[str, str]]:
    cards = [
        ("w", f"{c['number']} {c['mac']} {c['mtu']} {c['ip']} {c['prefix']} {c['gateway'] or '-'}")
        for c in wires["cards"]
    ]
    return [*cards, ("R", str(wires["resolv"])), ("H", str(wires["hosts"]))]


def start_payload(
    args: Sequence[str],
    *,
    env: Mapping[str, str] | Sequence[str],
    cwd: str,
    user: str,
    stdin: bool,
    tty: tuple[int, int] | None = None,
) -> bytes:
    """START: run `args` (not empty) with exactly this environment (the guest adds HOME where it lacks one); `tty` is
    (rows, columns) of the terminal it gets, if it gets one."""
    pairs = [f"{name}={value}" for name, value in env.items()] if isinstance(env, Mapping) else list(env)
    records = [("a", arg) for arg in args] + [("e", pair) for pair in pairs] + [("c", cwd or "/"), ("u", user or "0")]
    if stdin:
        records.append(("i", ""))
    if tty is not None:
        records.append(("t", f"{tty[0]} {tty[1]}"))
    return _records(records)
