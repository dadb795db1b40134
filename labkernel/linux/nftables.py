"""nftables by raw nfnetlink messages, as far as running containers change it: elements of sets and maps, whole tables.

An element is added in some ten microseconds; `nft` takes five milliseconds and more. The rules themselves are written
once, as text, by libnftables or the program nft (`run`). Sources: linux/netfilter/nf_tables.h; man 8 nft.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct

from . import netlink
from .netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, attribute, attributes

NETLINK_NETFILTER = 12
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 16, 17
_GETTABLE, _DELTABLE, _NEWSETELEM, _DELSETELEM = 1, 2, 12, 14
_NESTED = 0x8000
_IPV4 = 2
_INTERVAL_END = 1

Element = tuple[bytes, bytes]
"""(key, value): concatenated parts, each padded to four bytes; the value is empty in a set that is no map."""


def interface(name: str) -> bytes:
    """The key part for type `ifname`."""
    return name.encode().ljust(16, b"\0")


def address(text: str) -> bytes:
    return socket.inet_aton(text)


def protocol(name: str) -> bytes:
    return bytes([socket.IPPROTO_TCP if name == "tcp" else socket.IPPROTO_UDP, 0, 0, 0])


def port(number: int) -> bytes:
    return struct.pack(">Hxx", number)


class Table:
    """One table of family ip, through a netlink socket that stays in the network namespace it was made in."""

    def __init__(self, name: str, fd: int | None = None) -> None:
        self.name = name
        self.sock = netlink.Socket(NETLINK_NETFILTER, fd)

    def add(self, where: str, elements: list[Element]) -> None:
        """Add elements to a set or map. Raises OSError (ENOENT: no such table or set)."""
        self._change(_NEWSETELEM, NLM_F_CREATE, [(where, elements, False)])

    def remove(self, where: str, elements: list[Element]) -> None:
        """Remove elements. Raises OSError (ENOENT)."""
        self._change(_DELSETELEM, 0, [(where, elements, False)])

    def add_range(self, where: str, first: bytes, after: bytes) -> None:
        """Add an interval, up to but not including `after`, to a set with that flag."""
        self._change(_NEWSETELEM, NLM_F_CREATE, [(where, [(first, b"")], False), (where, [(after, b"")], True)])

    def remove_range(self, where: str, first: bytes, after: bytes) -> None:
        self._change(_DELSETELEM, 0, [(where, [(first, b"")], False), (where, [(after, b"")], True)])

    def delete(self) -> None:
        """Delete the table with all that is in it. Raises OSError (ENOENT)."""
        self._batch([self._message(_DELTABLE, 0, _text(1, self.name))])

    def _change(self, kind: int, flags: int, groups: list[tuple[str, list[Element], bool]]) -> None:
        # One list of elements for each set: the two ends of an interval have to arrive together.
        lists: dict[str, bytes] = {}
        for where, elements, is_end in groups:
            for key, value in elements:
                body = attribute(1 | _NESTED, attribute(1, key))
                body += attribute(2 | _NESTED, attribute(1, value)) if value else b""
                body += attribute(3, struct.pack(">I", _INTERVAL_END)) if is_end else b""
                lists[where] = lists.get(where, b"") + attribute(1 | _NESTED, body)
        self._batch(
            [
                self._message(kind, flags, _text(1, self.name) + _text(2, where) + attribute(3 | _NESTED, body))
                for where, body in lists.items()
            ]
        )

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        head = struct.pack(">BBH", _IPV4, 0, 0)
        return netlink.message(_SUBSYSTEM << 8 | kind, flags, head + body)

    def _batch(self, messages: list[bytes]) -> None:
        """A transaction: all or nothing."""
        head = struct.pack(">BBH", 0, 0, _SUBSYSTEM)
        begin, end = (
            struct.pack("=IHHII", 16 + len(head), kind, NLM_F_REQUEST, 0, 0) + head
            for kind in (_BATCH_BEGIN, _BATCH_END)
        )
        self.sock.send(begin, *messages, end)

    def close(self) -> None:
        self.sock.close()


def tables() -> list[str]:
    """The names of the tables of family ip in the caller's network namespace. Raises OSError (EPERM)."""
    with netlink.Socket(NETLINK_NETFILTER) as sock:
        head = struct.pack(">BBH", _IPV4, 0, 0)
        found = [attributes(body, 4).get(1, b"") for body in sock.dump(_SUBSYSTEM << 8 | _GETTABLE, head)]
    return [name.rstrip(b"\0").decode() for name in found]


def run(script: str) -> str:
    """Let libnftables, or else the program nft, execute `script` in the caller's network namespace.

    Returns "" or what was wrong. Loads a library: call it in a child that ends soon."""
    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError:
        return _run_program(script)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    context = ctypes.c_void_p(library.nft_ctx_new(0))
    library.nft_ctx_buffer_output(context)
    library.nft_ctx_buffer_error(context)
    if library.nft_run_cmd_from_buffer(context, script.encode()) == 0:
        return ""
    return (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace").strip() or "libnftables failed"


def find_program() -> str | None:
    """Where nft is."""
    for folder in ("/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin"):
        if os.access(f"{folder}/nft", os.X_OK):
            return f"{folder}/nft"
    return None


def is_there() -> bool:
    """Whether libnftables or nft is installed."""
    if find_program():
        return True
    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        return False
    return True


def _run_program(script: str) -> str:
    program = find_program()
    if program is None:
        return "neither libnftables nor nft is installed"
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("rules")
    os.write(memory, script.encode())
    os.lseek(memory, 0, os.SEEK_SET)
    actions = [(os.POSIX_SPAWN_DUP2, memory, 0), (os.POSIX_SPAWN_DUP2, theirs.fileno(), 2)]
    pid = os.posix_spawn(program, [program, "-f", "-"], {"PATH": "/usr/sbin:/sbin"}, file_actions=actions)
    theirs.close()
    os.close(memory)
    words = b""
    while data := ours.recv(4096):
        words += data
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ours.close()
    return "" if status == 0 else words.decode(errors="replace").strip() or f"nft ended with {status}"


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


__all__ = ["NLM_F_ACK", "Element", "Table", "address", "interface", "is_there", "port", "protocol", "run", "tables"]
