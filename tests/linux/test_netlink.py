from __future__ import annotations

import os
import socket

import pytest

from labkernel.linux import netlink
from labkernel.runtime import tries


def in_own_network(call: object) -> list[object] | None:
    def body() -> None:
        if os.geteuid() != 0:
            tries.enter_user_namespace()
        tries.unshare(tries.CLONE_NEWNET)
        call()  # type: ignore[operator]

    return tries.attempt(body)


def use_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_loopback_is_up_after_the_call() -> None:
    # without namespaces there is nothing to try
    if in_own_network(lambda: None) is not None:
        pytest.skip("no network namespace can be made here")
    assert in_own_network(use_loopback) is not None
    assert in_own_network(lambda: (netlink.loopback_up(), use_loopback())) is None


def test_without_privilege_it_says_so() -> None:
    def drop() -> None:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        netlink.loopback_up()

    answer = tries.attempt(drop)
    assert answer is not None
    assert answer[0] == 1
