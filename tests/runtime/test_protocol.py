"""Messages between the supervisor and its children."""

from __future__ import annotations

import os
import socket

import pytest

from labkernel.runtime import protocol


def test_what_was_said_is_heard_where_the_other_left_without_listening() -> None:
    """A start that fails before it reads its request: the kernel tells of the reset before it hands out the reason."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(b"request")
        theirs.send(b'{"error": "no device"}')
        null = os.open(os.devnull, os.O_RDONLY)
        protocol.send_with_fds(theirs, b"a descriptor", [null])
        os.close(null)
        theirs.close()
        assert protocol.receive(ours) == (b'{"error": "no device"}', [])
        data, fds = protocol.receive(ours)
        assert (data, len(fds)) == (b"a descriptor", 1)
        os.close(fds[0])
        assert protocol.receive(ours) == (b"", [])


def test_a_stream_that_was_reset_says_so() -> None:
    """Its sender repeats then what cannot have been carried out, unlike what was read and has no answer."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.send(b"request")
        theirs.close()
        with pytest.raises(ConnectionResetError):
            protocol.receive(ours)
