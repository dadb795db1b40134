"""A shell in a cell: there is no terminal, but the front end asks for a line and gets what it does to the shell.

The shell reads its lines from a pipe. Each is evaluated with an empty stdin of its own, so that it cannot eat the ones
after it, and is followed by a line that tells the directory behind a mark nobody else writes.
"""

from __future__ import annotations

import secrets
import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..errors import LabkernelError
from .foreground import Interrupted, Signals
from .host import Host

_SHELLS = frozenset({"sh", "ash", "bash", "dash", "ksh", "zsh"})


def speaks(program: str) -> bool:
    """Whether `program` is a shell whose lines are those of POSIX's sh."""
    return program.rpartition("/")[2] in _SHELLS


def shell_in_cell(host: Host, arguments: Sequence[str]) -> list[str] | None:
    """What `-it … sh` starts where there is no terminal but somebody to ask; None for every other command."""
    if len(arguments) == 1 and speaks(arguments[0]) and host.can_ask():
        return [arguments[0], "-i"]
    return None


class Dialogue:
    """A shell, started with `-i` and its stdin open, and its user in a cell."""

    def __init__(self, host: Host, attachment: Any) -> None:
        self._host = host
        self._attachment = attachment
        self._mark = b"\x1e" + secrets.token_hex(8).encode()

    def hold(self, kill: Callable[[int], None]) -> int:
        """Ask and answer until the shell ends or there are no more lines; its exit code. Raises Interrupted: the stop
        button ends the shell."""
        try:
            # Its prompts and what it says of a missing terminal come before the mark, where nobody reads them.
            where = self._carry_out("PS1= PS2=; exec 2>&1", kill, seen=False)
            while where is not None and (line := self._host.ask(f"{where} $ ")) is not None:
                where = self._carry_out(f"eval {shlex.quote(line)} < /dev/null", kill)
            self._end()
        except KeyboardInterrupt:
            with suppress(LabkernelError):  # it may have ended by itself in the meantime
                kill(signal.SIGKILL)
            self._end()
            code = int(self._attachment.exit_code or 0)
            raise Interrupted(f"interrupted; the shell ended with exit code {code}", code) from None
        finally:
            self._host.end_of_output()
            self._attachment.close()
        return int(self._attachment.exit_code or 0)

    def _end(self) -> None:
        self._attachment.close_stdin()
        for name, data in self._attachment:
            self._host.write(name, data)

    def _carry_out(self, line: str, kill: Callable[[int], None], *, seen: bool = True) -> str | None:
        """Show what `line` writes; the directory the shell is in then, None when it ended. Raises KeyboardInterrupt:
        pressed the moment before the wait for output begins, the stop button would be lost without `Signals`."""
        with Signals(self._host, kill, None, proxy=False) as signals:
            where = self._answer(line, seen=seen)
        if signals.seen:
            raise KeyboardInterrupt
        return where

    def _answer(self, line: str, *, seen: bool) -> str | None:
        mark = self._mark.decode()[1:]
        told = f"lk_status=$?; printf '\\036%s%s\\036' {mark} \"$PWD\"; (exit $lk_status)"
        self._attachment.send(f"{line}\n{told}\n".encode())
        text = b""
        while (chunk := self._attachment.read()) is not None:
            text += chunk[1]
            before, found, rest = text.partition(self._mark)
            # what may be the beginning of the mark waits for the rest
            sure = before if found else text.partition(b"\x1e")[0]
            if seen and sure:
                self._host.write("stdout", sure)
                text = text[len(sure) :]
            if found and rest.endswith(b"\x1e"):
                return str(rest[:-1], errors="replace")
        if seen and text:
            self._host.write("stdout", text)
        return None
