"""A command in the foreground: output to the host, signals and stdin to the container, its exit status back.

Signals are caught while the command runs and handed to the container by a helper thread: a handler that raised in
the middle of a frame would lose bytes, and one that called the engine could meet the engine's own lock.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import LabkernelError, UsageError
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
        interrupts = stack.enter_context(_signals(host, kill, proxy=proxy_signals and not (tty and stdin)))
        if tty:
            stack.enter_context(_window(host, attachment))
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
    if host.notebook and interrupts:
        raise Interrupted(f"interrupted; the command ended with exit code {exit_code}", exit_code)
    return exit_code


@contextmanager
def _signals(host: Host, kill: Callable[[int], None], *, proxy: bool) -> Iterator[list[int]]:
    """Catch signals for the time of the block; yields the list of those that came."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread() or not (proxy or host.notebook):
        yield seen
        return
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def forward() -> None:
        grace_s: float | None = None
        while True:
            try:
                number = todo.get(timeout=grace_s)
            except queue.Empty:
                number = signal.SIGKILL
            if number is None:
                return
            try:
                kill(number)
            except LabkernelError:
                pass  # It ended by itself in the meantime.
            grace_s = INTERRUPT_GRACE_S if host.notebook and number == signal.SIGINT else None

    presses = 2 if host.notebook else 3

    def caught(number: int, frame: object) -> None:
        seen.append(number)
        todo.put(signal.SIGKILL if seen.count(signal.SIGINT) >= presses else number)

    names = ("SIGINT",) if host.notebook else _FORWARDED
    numbers = [getattr(signal, name) for name in names]
    before = {number: signal.signal(number, caught) for number in numbers}
    helper = threading.Thread(target=forward, name="labkernel-signals", daemon=True)
    helper.start()
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        todo.put(None)
        helper.join(timeout=5)


@contextmanager
def _window(host: Host, attachment: Any) -> Iterator[None]:
    """Give the container's terminal the size of ours, now and whenever it changes (SIGWINCH)."""

    def resize(*_: object) -> None:
        size = host.terminal_size()
        if size:
            attachment.resize(*size)

    resize()
    if host.terminal_size() is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()

    def follow() -> None:
        while todo.get():
            try:
                resize()
            except (OSError, LabkernelError):
                return

    before = signal.signal(signal.SIGWINCH, lambda *_: todo.put("resize"))
    helper = threading.Thread(target=follow, name="labkernel-window", daemon=True)
    helper.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before if before is not None else signal.SIG_DFL)
        todo.put("")


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
