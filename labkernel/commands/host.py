"""What a command may ask of the place it was typed in: the terminal (cli.py) or a notebook (magics.py).

A command parses, calls one service, and returns a value; a host decides how output, progress and values are shown.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LabkernelError, UsageError

if TYPE_CHECKING:
    from ..engine import Engine


class Progress(Protocol):
    """Shows the steps of a build as they happen; a context manager, called with each BuildStep."""

    def __call__(self, step: Any, /) -> None: ...

    def __enter__(self) -> Progress: ...

    def __exit__(self, kind: Any, err: Any, trace: Any, /) -> None: ...


class Host(ABC):
    """Base of both hosts. `prog` is how the user calls us (`labkernel`, `%container`)."""

    notebook = False
    words: Sequence[str] | None = None  # the command line of a terminal

    def __init__(self, open_engine: Callable[[], Engine], prog: str = "labkernel") -> None:
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self.prog = prog

    @property
    def engine(self) -> Engine:
        """The engine, opened at the first need."""
        if self._engine is None:
            self._engine = self._open_engine()
        return self._engine

    def close(self) -> None:
        """Close the engine, where one was opened."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def own_engine(self) -> Engine:
        """The embedded engine, also where the context is a daemon elsewhere."""
        from ..contexts import EMBEDDED, Contexts

        if Contexts().current() == EMBEDDED:
            return self.engine
        from ..engine import Engine

        return Engine.open()

    # -- output

    @abstractmethod
    def write(self, stream: str, data: bytes) -> None:
        """Bytes of a container, as they come; `stream` is `stdout` or `stderr`."""

    def end_of_output(self) -> None:  # noqa: B027 - most hosts keep nothing back
        """No more bytes of this container follow (an unfinished character is given up on)."""

    @abstractmethod
    def line(self, text: str = "") -> None:
        """One line of ours on stdout."""

    @abstractmethod
    def warn(self, text: str) -> None:
        """One line about something the user should know and did not ask for."""

    @abstractmethod
    def note(self, text: str) -> None:
        """What happens meanwhile, and what stands in for what (`pulling …`, `lab/busybox stands in for busybox`)."""

    def warn_once(self, text: str) -> None:
        """The same for what is true of this release whatever the command: told once, not at every command."""
        self.warn(text)

    @abstractmethod
    def error(self, err: LabkernelError) -> None:
        """An error that does not end the command (one of several names)."""

    @abstractmethod
    def live(self) -> AbstractContextManager[Callable[[str, str | None], None]]:
        """A region that is redrawn: call it with text and HTML (`stats`)."""

    @abstractmethod
    def build_progress(self, dockerfile: str, *, mode: str) -> Progress:
        """A display of the steps of one build; `mode` is docker's --progress (auto, plain, tty)."""

    # -- input

    def stdin_fd(self) -> int | None:
        """The descriptor a container's stdin may be fed from; None where there is no such thing (a cell)."""
        return None

    def stdin_is_terminal(self) -> bool:
        fd = self.stdin_fd()
        return fd is not None and os.isatty(fd)

    def can_ask(self) -> bool:
        """Whether `ask` gets answers: there is no terminal, but somebody who may type a line when asked for one."""
        return False

    def ask(self, prompt: str) -> str | None:
        """A line typed there; None at the end."""
        return None

    def terminal_size(self) -> tuple[int, int] | None:
        """(rows, columns) of the terminal, if output goes to one."""
        return None

    def stdout_binary(self) -> Any | None:
        """A binary stream for tar archives; None where there is none or where it is a person's screen."""
        return None

    def working_dir(self) -> Path:
        return Path.cwd()


def failures(errors: list[LabkernelError], host: Host, done: list[Any]) -> list[Any]:
    """End a command over several names: all good gives `done`, otherwise the last error is raised, earlier ones shown.

    docker goes on after a name that fails and ends with 1.
    """
    if errors:
        for err in errors[:-1]:
            host.error(err)
        last = errors[-1]
        last.exit_code = 1
        raise last
    return done


def snapshot_of(host: Host, found: Any, name: str | None, *, rm: bool) -> None:
    """Take the snapshot `name` (or the one it is called without a name) of a volume or machine, or remove it."""
    if rm:
        if not name:
            raise UsageError("which snapshot? NAME is missing", exit_code=1)
        found.remove_snapshot(name)
    else:
        name = found.snapshot(name) if name else found.snapshot()
    host.line(str(name))


def remove_each(
    host: Host,
    names: Iterable[str],
    remove: Callable[[str], object],
    *,
    spare: type[LabkernelError] | tuple[type[LabkernelError], ...],
) -> None:
    """docker's `rm NAME…`: each name that is gone now is a line; what fails otherwise is told, and the rest goes on."""
    errors: list[LabkernelError] = []
    for name in names:
        try:
            remove(name)
        except spare:
            pass  # --force: one that is not there is as good as removed
        except LabkernelError as err:
            errors.append(err)
            continue
        host.line(name)
    failures(errors, host, [])
