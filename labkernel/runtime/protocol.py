"""The wire between clients and the supervisor, and between supervisor and keeper.

A request and its first answer are messages: 4-byte big-endian length, then JSON; descriptors travel with the first
byte (SCM_RIGHTS). attach, exec, run and task go on with frames as in Docker's Engine API (ContainerAttach): byte 0
names the stream, bytes 4 to 7 are the big-endian length. Stream 3 is ours and carries JSON.
Standard library only.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct

TYPE_CHECKING = False  # typing itself takes 3 ms to import, and `labkernel exec` has no need of it
if TYPE_CHECKING:
    from typing import Any

STDIN, STDOUT, STDERR, CONTROL = 0, 1, 2, 3
STREAMS = {"stdin": STDIN, "stdout": STDOUT, "stderr": STDERR}
STREAM_NAMES = {STDOUT: "stdout", STDERR: "stderr"}
VERSION = 1
MAX_MESSAGE_BYTES = 16 << 20
MAX_FDS = 32
_HEADER = struct.Struct(">BxxxL")


def dumps(value: Any) -> bytes:
    """Compact JSON as bytes."""
    return json.dumps(value, separators=(",", ":")).encode()


def encode_message(value: Any) -> bytes:
    """One length-prefixed JSON message."""
    body = dumps(value)
    return len(body).to_bytes(4, "big") + body


def encode_frame(stream: int, data: bytes) -> bytes:
    """One frame."""
    return _HEADER.pack(stream, len(data)) + data


def encode_control(value: Any) -> bytes:
    """One control frame."""
    return encode_frame(CONTROL, dumps(value))


def take_message(buffer: bytearray) -> Any | None:
    """Remove a whole message from the front of `buffer`; None when it is not all there. Raises ValueError."""
    if len(buffer) < 4:
        return None
    length = int.from_bytes(buffer[:4], "big")
    if length > MAX_MESSAGE_BYTES:
        raise ValueError("message too long")
    if len(buffer) < 4 + length:
        return None
    value = json.loads(bytes(buffer[4 : 4 + length]))
    del buffer[: 4 + length]
    return value


def take_frames(buffer: bytearray) -> list[tuple[int, bytes]]:
    """Remove all whole frames from the front of `buffer`."""
    found = []
    offset = 0
    with memoryview(buffer) as view:
        while len(view) - offset >= 8:
            stream, length = _HEADER.unpack_from(view, offset)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError("frame too long")
            if len(view) - offset < 8 + length:
                break
            found.append((stream, bytes(view[offset + 8 : offset + 8 + length])))
            offset += 8 + length
    if offset:
        del buffer[:offset]
    return found


def unpack_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Descriptors received with recvmsg."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def receive(sock: socket.socket, size: int = 65536, *, flags: int = 0) -> tuple[bytes, list[int]]:
    """recvmsg with descriptors, close-on-exec.

    Of packets, those that came are had also where their sender closed without having read all of ours."""
    room, flags = socket.CMSG_SPACE(4 * MAX_FDS), flags | socket.MSG_CMSG_CLOEXEC
    try:
        data, ancillary, _, _ = sock.recvmsg(size, room, flags)
    except ConnectionResetError:
        if sock.type != socket.SOCK_SEQPACKET:
            raise
        # The kernel tells this first, and once: what the other had said, a start's error for one, is still to be read.
        data, ancillary, _, _ = sock.recvmsg(size, room, flags)
    return data, unpack_fds(ancillary) if ancillary else []


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> int:
    """sendmsg with descriptors on the first byte."""
    if not fds:
        return sock.send(data)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def send_message(sock: socket.socket, value: Any, fds: list[int] | None = None) -> None:
    """Send one message over a blocking socket."""
    data = encode_message(value)
    sent = send_with_fds(sock, data, fds or [])
    if sent < len(data):
        sock.sendall(data[sent:])


def receive_message(sock: socket.socket, buffer: bytearray | None = None) -> tuple[Any, list[int], bytearray]:
    """Receive one message over a blocking socket: (value, descriptors, bytes that came after it).

    Raises EOFError when the peer closes first.
    """
    buffer = bytearray() if buffer is None else buffer
    fds: list[int] = []
    while (value := take_message(buffer)) is None:
        data, more = receive(sock)
        fds += more
        if not data:
            for fd in fds:
                os.close(fd)
            raise EOFError("connection closed")
        buffer += data
    return value, fds, buffer
