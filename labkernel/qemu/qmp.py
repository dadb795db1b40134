"""QEMU's machine protocol, spoken blockingly over a connected socket: commands, answers, and waiting for an event.

The PyPI library `qemu.qmp` is asyncio only: an event loop in a thread beside a notebook's own, and about 60 ms of
imports, for a VM whose usual start needs no command at all. What we need is one request at a time, so it is short.
Source: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from labkernel.errors import VMError

DEFAULT_TIMEOUT_S = 10.0


class Qmp:
    """One client of one QEMU; not thread-safe. Negotiates at the first command, not before."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._pending = b""
        self._ready = False

    def execute(
        self, command: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, fds: Sequence[int] = (), **arguments: Any
    ) -> Any:
        """Run one command and return what it returns. Events that come meanwhile are dropped.

        Names of arguments are written with `_` for QEMU's `-`. `fds` travel with the request (SCM_RIGHTS), for `getfd`.

        Raises VMError when QEMU refuses, does not answer in time, or is gone.
        """
        deadline = time.monotonic() + timeout_s
        if not self._ready:
            self._read(deadline)  # the greeting
            self._ready = True
            self._ask("qmp_capabilities", {}, (), deadline)
        return self._ask(command, arguments, fds, deadline)

    def _ask(self, command: str, arguments: dict[str, Any], fds: Sequence[int], deadline: float) -> Any:
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            line = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self._socket, [line], list(fds)) if fds else 0
            self._socket.sendall(line[sent:])
        except OSError as err:
            raise VMError(f"QEMU does not take commands any more: {err}") from err
        while True:
            answer = self._read(deadline)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise VMError(f"QEMU refused {command}: {answer['error'].get('desc', answer['error'])}")

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._pending:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise VMError("QEMU did not answer on its control channel in time") from None
            except OSError as err:
                raise VMError(f"QEMU's control channel broke: {err}") from err
            if not data:
                raise VMError("QEMU ended while it was asked something")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()
