"""A wait for a container's end that an event loop can watch; `Runtime.wait` is the one for threads."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from ..errors import LabkernelError
from . import protocol

if TYPE_CHECKING:
    from .client import ExitStatus, Runtime


class PendingWait:
    """A wait that has been asked for: `fileno()` is readable when `result()` has something to say."""

    def __init__(self, runtime: Runtime, id: str, condition: str) -> None:
        self._runtime = runtime
        self._message = {"op": "wait", "id": id, "condition": condition, "version": runtime.version}
        self._sock = self._ask()

    def _ask(self) -> socket.socket:
        sock = self._runtime._connect()
        protocol.send_message(sock, self._message)
        return sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def result(self) -> ExitStatus | None:
        """How it ended; None when one has to wait on, since another supervisor answers now (`fileno` changes).
        Raises NoSuchContainer."""
        from .client import ExitStatus

        try:
            answer, _, _ = protocol.receive_message(self._sock)
        except (EOFError, ConnectionResetError):
            answer = {"upgrade": False}
        if "error" in answer and not answer.get("ok"):
            raise LabkernelError.from_dict(answer)
        if "upgrade" not in answer:
            return ExitStatus(int(answer["exit_code"]), bool(answer["oom_killed"]), str(answer["error"]))
        self.close()
        if answer["upgrade"]:
            self._runtime._upgrade()
        elif self._message["condition"] == "next-exit":
            self._message["condition"] = "not-running"  # it may have ended while nobody answered
        self._sock = self._ask()
        return None

    def close(self) -> None:
        self._sock.close()
