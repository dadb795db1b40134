"""Signals of a foreground command reach it whatever the main thread is doing."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.commands.foreground import Interrupted, detach_keys, split_detach, stream


class Notebook:
    """The part of a Host that `stream` asks, as a notebook answers."""

    notebook = True

    def __init__(self) -> None:
        self.written = b""

    def write(self, stream: str, data: bytes) -> None:
        self.written += data

    def end_of_output(self) -> None: ...

    def terminal_size(self) -> None:
        return None

    def stdin_fd(self) -> None:
        return None


class Silent:
    """An attachment whose command says nothing until it is sent a signal."""

    exit_code = 5

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.signals: list[int] = []
        self.reading = threading.Event()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        self.reading.set()
        yield "stdout", self.ours.recv(100)

    def kill(self, number: int) -> None:
        self.signals.append(number)
        self.theirs.send(b"asked to stop")

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def _send_when_reading(attachment: Silent) -> threading.Thread:
    """A signal that another thread takes leaves the main thread's read alone, as one a moment too early does."""

    def send() -> None:
        attachment.reading.wait(60)
        while Path(f"/proc/self/task/{os.getpid()}/syscall").read_text().startswith("running"):
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_signal_that_does_not_wake_the_main_thread_is_served() -> None:
    host, attachment = Notebook(), Silent()
    before: Any = signal.getsignal(signal.SIGINT)
    thread = _send_when_reading(attachment)
    with pytest.raises(Interrupted, match="exit code 5"):
        stream(host, attachment, kill=attachment.kill)  # type: ignore[arg-type]
    thread.join(60)
    assert attachment.signals == [signal.SIGINT]
    assert host.written == b"asked to stop"
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.set_wakeup_fd(-1) == -1, "the wake-up descriptor is handed back"


def test_signals_of_others_are_passed_on() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.set_wakeup_fd(write)
    try:
        attachment = Silent()
        thread = _send_when_reading(attachment)
        with pytest.raises(Interrupted):
            stream(Notebook(), _Other(attachment), kill=attachment.kill)  # type: ignore[arg-type]
        thread.join(60)
        assert os.read(read, 10) == bytes([signal.SIGUSR1])
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, before)
        os.close(read)
        os.close(write)


class _Other:
    """An attachment during whose life a signal of somebody else comes."""

    exit_code = 5

    def __init__(self, inner: Silent) -> None:
        self.inner = inner
        self.close = inner.close

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        yield from self.inner


@pytest.mark.parametrize(("text", "sent"), [(None, b"\x10\x11"), ("ctrl-a", b"\x01"), ("a,b", b"ab")])
def test_detach_keys(text: str | None, sent: bytes) -> None:
    assert detach_keys(text) == sent
    assert split_detach(b"x" + sent + b"y", sent) == (b"x", b"", True)
