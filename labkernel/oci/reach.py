"""Whether a registry takes connections at all: asked before a pull that nobody ordered in so many words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

from labkernel.errors import UsageError

from .endpoints import Endpoint, find_proxy, proxy_address


def connects(endpoints: Sequence[Endpoint], timeout_s: float) -> bool:
    """Whether a TCP connection to one of them succeeds. Name look-ups cannot be timed out, so a thread makes them."""
    answers: list[bool] = []

    def attempt() -> None:
        for endpoint in endpoints:
            address = (endpoint.host, endpoint.port)
            proxy = find_proxy("https" if endpoint.secure else "http", *address)
            try:
                if proxy is not None:
                    address = proxy_address(proxy)[:2]
                socket.create_connection(address, timeout=timeout_s).close()
            except (OSError, UsageError):
                continue
            answers.append(True)
            return

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)
