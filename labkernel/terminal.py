"""The terminal's host of the commands: `labkernel …`. Parsing and meaning are in `commands/`; `cli` starts it."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .commands.grammar import invoke
from .commands.host import Host, Progress
from .commands.tree import ROOT
from .errors import LabkernelError

if TYPE_CHECKING:
    from .engine import Engine


def _open() -> Engine:
    from .contexts import open_engine

    return open_engine()


class TerminalHost(Host):
    """Writes to the process's own stdout and stderr; asks its terminal."""

    def __init__(
        self,
        open_engine: Callable[[], Engine] = _open,
        prog: str = "labkernel",
        *,
        words: Sequence[str] | None = None,
    ) -> None:
        super().__init__(open_engine, prog)
        self.words = words

    def write(self, stream: str, data: bytes) -> None:
        target = sys.stderr if stream == "stderr" else sys.stdout
        target.flush()
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(target.fileno(), rest) :]

    def line(self, text: str = "") -> None:
        print(text, flush=True)  # noqa: T201

    def warn(self, text: str) -> None:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    def warn_once(self, text: str) -> None:
        # Once per store and boot: the runtime directory does not outlive a reboot.
        marker = self.engine.layout.runtime_dir / f"told-{zlib.crc32(text.encode()):08x}"
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL, 0o600))
        except OSError:
            return
        self.warn(text)

    def error(self, err: LabkernelError) -> None:
        first, *rest = err.render()
        print("\n".join([f"{self.prog}: {first}", *rest]), file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def live(self) -> Iterator[Callable[[str, str | None], None]]:
        height = 0
        moves = sys.stdout.isatty()

        def redraw(text: str, html: str | None) -> None:
            nonlocal height
            lines = text.splitlines()
            up = f"\x1b[{height}A\x1b[J" if height and moves else ""
            self.line(up + "\n".join(lines))
            height = len(lines)

        yield redraw

    def build_progress(self, dockerfile: str, *, mode: str) -> Progress:
        from .widgets.progress import terminal_progress

        return terminal_progress(mode=mode)  # type: ignore[arg-type]

    def stdin_fd(self) -> int | None:
        try:
            return sys.stdin.fileno()
        except (AttributeError, OSError, ValueError):
            return None

    def terminal_size(self) -> tuple[int, int] | None:
        try:
            size = os.get_terminal_size(sys.stdout.fileno())
        except (OSError, ValueError):
            return None
        return size.lines, size.columns

    def stdout_binary(self) -> Any | None:
        return None if sys.stdout.isatty() else sys.stdout.buffer


def run(argv: Sequence[str], host: Host) -> int:
    """One command line; prints its value or its error, and gives the exit code.

    A bug keeps its traceback; what a user can meet is one line and a hint on stderr.
    """
    try:
        value = invoke(ROOT, argv, host, host.prog)
        text = getattr(value, "text", None)
        text = text() if callable(text) else text
        if text:
            host.line(str(text))
        elif text == "" and not hasattr(value, "exit_code"):
            pass
        return int(getattr(value, "exit_code", 0))
    except LabkernelError as err:
        sys.stdout.flush()
        host.error(err)
        return err.exit_code or 1
    except KeyboardInterrupt as err:
        return 128 + (err.number if isinstance(err, Ended) else signal.SIGINT)


class Ended(KeyboardInterrupt):
    """A signal has ended the command: it takes back what it began, as at Control-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_tidily() -> None:
    """From now on `kill`, `timeout` and a terminal that closes are an interrupt, unless they are ignored (nohup).

    Commands that give these signals a meaning of their own (`run`, `registry serve`) put it in this one's place.
    """

    def end(number: int, frame: object) -> None:
        raise Ended(number)

    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is signal.SIG_DFL:
            signal.signal(each, end)


def complete() -> None:
    """Answer a shell's completion script; does not return."""
    ROOT.main(prog_name="labkernel", obj=TerminalHost())
