"""A command in the foreground: output to the host, signals and stdin to the container, its exit status back.

Signals are caught while the command runs and handed to the container by a helper thread: a handler that raised in
the middle of a frame would lose bytes, and one that called the engine could meet the engine's own lock.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ..errors import LabkernelError, UsageError
from ..linux.waiting import readable
from .host import Host

INTERRUPT_GRACE_S = 1.0
DETACHED = -1
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


class Interrupted(KeyboardInterrupt):
    """The user pressed stop while a command ran. A KeyboardInterrupt that IPython shows as one line."""

    def __init__(self, brief: str, exit_code: int) -> None:
        super().__init__(brief)
        self.brief = brief
        self.exit_code = exit_code

    def _render_traceback_(self) -> list[str]:
        return [f"\x1b[31mInterrupted\x1b[0m: {self.brief}"]


def detach_keys(text: str | None) -> bytes:
    """`ctrl-p,ctrl-q` as the bytes a terminal sends. Source: docker attach, "Override the detach sequence"."""
    result = bytearray()
    for key in (text or "ctrl-p,ctrl-q").split(","):
        if key.startswith("ctrl-") and len(key) == 6 and "@" <= key[-1].upper() <= "_":
            result.append(ord(key[-1].upper()) & 0x1F)
        elif len(key) == 1:
            result += key.encode()
        else:
            raise UsageError(f"invalid detach keys: {text}", resolution="for example --detach-keys ctrl-p,ctrl-q")
    return bytes(result)


def stream(
    host: Host,
    attachment: Any,
    *,
    kill: Callable[[int], None],
    stdin: bool = False,
    tty: bool = False,
    proxy_signals: bool = True,
    keys: str | None = None,
) -> int:
    """Pass everything through until the command ends; its exit code, or DETACHED after the detach keys.

    In a notebook the stop button sends SIGINT to the command, SIGKILL after a second or at the second press, and
    ends with `Interrupted`. In a terminal, signals are forwarded as they are (`kill(number)` does it), and the third
    SIGINT becomes SIGKILL.
    """
    detached = threading.Event()
    with ExitStack() as stack:
        stack.callback(attachment.close)
        resize = _resizer(host, attachment) if tty else None
        signals = stack.enter_context(Signals(host, kill, resize, proxy=proxy_signals and not (tty and stdin)))
        if stdin:
            stack.enter_context(_stdin(host, attachment, raw=tty, keys=detach_keys(keys), detached=detached))
        try:
            for name, data in attachment:
                host.write(name, data)
        except (OSError, LabkernelError):
            if not detached.is_set():
                raise
        finally:
            host.end_of_output()
        if detached.is_set():
            return DETACHED
        exit_code = int(attachment.exit_code or 0)
    if host.notebook and signals.seen:
        raise Interrupted(f"interrupted; the command ended with exit code {exit_code}", exit_code)
    return exit_code


def _resizer(host: Host, attachment: Any) -> Callable[[], None] | None:
    """Gives the container's terminal the size of ours, now and at each call (SIGWINCH); None without a terminal."""

    def resize() -> None:
        size = host.terminal_size()
        if size:
            attachment.resize(*size)

    resize()
    return resize if host.terminal_size() else None


class Signals:
    """Catches signals for the time of a `with` block and serves them in a thread of its own.

    The thread learns of them through the wake-up descriptor, which the C level writes: a Python handler would wait for
    the main thread, and that one may have entered its read a moment before the signal came. `seen` are those that came.
    Sources: signal.set_wakeup_fd, signal(7).
    """

    def __init__(self, host: Host, kill: Callable[[int], None], resize: Callable[[], None] | None, *, proxy: bool):
        self.seen: list[int] = []
        self._notebook = host.notebook
        self._kill = kill
        self._resize = resize or (lambda: None)
        names = ("SIGINT",) if host.notebook else _FORWARDED if proxy else ()
        if threading.current_thread() is not threading.main_thread():
            names = ()  # Only the main thread may set handlers.
        self._numbers = [int(getattr(signal, name)) for name in names]
        if resize is not None and threading.current_thread() is threading.main_thread():
            self._numbers.append(int(signal.SIGWINCH))
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if not self._numbers:
            return self
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        self._helper = threading.Thread(target=self._serve, name="labkernel-signals", daemon=True)
        self._helper.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._numbers:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
        os.write(self._write, b"\0")
        self._helper.join(timeout=5)
        os.close(self._write)
        os.close(self._read)

    def _serve(self) -> None:
        grace_s: float | None = None
        while True:
            ready = readable(self._read, timeout_s=grace_s)
            for number in os.read(self._read, 512) if ready else bytes([signal.SIGKILL]):
                if number == 0:
                    return
                if number in self._numbers or number == signal.SIGKILL:
                    grace_s = self._one(number)
                elif self._wakeup_before != -1:  # Not ours: the kernel's event loop waits for it.
                    with suppress(OSError):
                        os.write(self._wakeup_before, bytes([number]))

    def _one(self, number: int) -> float | None:
        """Serve a signal; after how long without another one SIGKILL is due (None: never)."""
        if number == signal.SIGWINCH:
            with suppress(OSError, LabkernelError):
                self._resize()
            return None
        if number != signal.SIGKILL:
            self.seen.append(number)
        presses = 2 if self._notebook else 3
        if self.seen.count(signal.SIGINT) >= presses:
            number = signal.SIGKILL
        with suppress(LabkernelError):  # It may have ended by itself in the meantime.
            self._kill(number)
        return INTERRUPT_GRACE_S if self._notebook and number == signal.SIGINT else None


@contextmanager
def _stdin(host: Host, attachment: Any, *, raw: bool, keys: bytes, detached: threading.Event) -> Iterator[None]:
    """Feed our stdin to the command; its end becomes a half-close, so that output still comes."""
    fd = host.stdin_fd()
    if fd is None:
        attachment.close_stdin()
        yield
        return
    stop_read, stop_write = os.pipe()
    with ExitStack() as stack:
        if raw and os.isatty(fd):
            stack.enter_context(_raw_terminal(fd))

        def on_keys() -> None:
            # Ends the read in progress too; the command goes on without us.
            detached.set()
            attachment.close()

        feeder = threading.Thread(
            target=_feed, args=(fd, stop_read, attachment, keys if raw else b"", on_keys), name="labkernel-stdin",
            daemon=True,
        )  # fmt: skip
        feeder.start()
        try:
            yield
        finally:
            os.write(stop_write, b"x")
            if feeder is not threading.current_thread():
                feeder.join(timeout=5)
            os.close(stop_write)
            os.close(stop_read)


def _feed(fd: int, stop: int, attachment: Any, keys: bytes, on_keys: Callable[[], None]) -> None:
    import selectors

    pending = b""
    # A regular file is always readable and epoll refuses it, so poll is the selector that takes every kind of stdin.
    with selectors.PollSelector() as selector:
        selector.register(stop, selectors.EVENT_READ)
        selector.register(fd, selectors.EVENT_READ)
        while True:
            if any(key.fd == stop for key, _ in selector.select()):
                return
            try:
                data = os.read(fd, 65536)
                if not data:
                    attachment.close_stdin()
                    return
                if keys:
                    data, pending, found = split_detach(pending + data, keys)
                    if found:
                        on_keys()
                        return
                if data:
                    attachment.send(data)
            except (OSError, ValueError, LabkernelError):
                return  # The command has ended or closed its stdin.


def split_detach(data: bytes, keys: bytes) -> tuple[bytes, bytes, bool]:
    """(bytes to send, bytes held back because they may begin the detach keys, whether the keys were there)."""
    before, found, _ = data.partition(keys)
    if found:
        return before, b"", True
    for length in range(min(len(keys) - 1, len(data)), 0, -1):
        if data.endswith(keys[:length]):
            return data[:-length], data[-length:], False
    return data, b"", False


@contextmanager
def _raw_terminal(fd: int) -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)  # What was typed ahead stays.
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
