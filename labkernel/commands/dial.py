"""`system dial-stdio`: what an `ssh://` client runs on this machine to reach the daemon."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

import click

from ..errors import UsageError
from .grammar import command, host_of

CHUNK = 1 << 18


@command("dial-stdio", "")
@click.pass_context
def dial_stdio(ctx: click.Context) -> None:
    """Carry standard input and output to the daemon, which is started when none runs. For ssh:// addresses."""
    from ..api import background

    host = host_of(ctx)
    if host.notebook:
        raise UsageError("a cell has no standard input", resolution="an `ssh://` client runs this on its own")
    engine = host.own_engine
    running = background.find(engine.layout) or background.start(engine.layout, engine.driver.name)
    path = next((each for each in running.addresses if each.startswith("unix://")), None)
    if path is None:
        raise UsageError("the daemon listens on no unix socket", resolution="start it with -H unix:///PATH, too")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path.removeprefix("unix://"))
        carry(0, 1, sock)


def carry(reading: int, writing: int, sock: socket.socket) -> None:
    """Bytes both ways until the daemon has ended its side; the end of `reading` is passed on."""
    watch = select.poll()
    watch.register(reading, select.POLLIN)
    watch.register(sock, select.POLLIN)
    while True:
        for fd, _ in watch.poll():
            if fd == reading:
                data = os.read(reading, CHUNK)
                if data:
                    sock.sendall(data)
                else:
                    watch.unregister(reading)
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
                continue
            data = sock.recv(CHUNK)
            if not data:
                return
            view = memoryview(data)
            while view:
                view = view[os.write(writing, view) :]
