"""Supervisor and keeper watch each other: what the keeper tells, and what happens when it is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

from ..linux import syscalls
from . import keeper, protocol
from .instances import Instance


def watch_keeper(sup: Any) -> None:
    """Listen to the keeper; its end makes this process the keeper."""
    assert sup.context.link is not None
    os.set_blocking(sup.context.link.fileno(), True)
    sup.loop.watch(sup.context.link.fileno(), lambda _events: _hear(sup))


def _hear(sup: Any) -> None:
    assert sup.context.link is not None
    try:
        data, _ = protocol.receive(sup.context.link)
    except OSError:
        data = b""
    if not data:
        _succeed(sup)
        return
    message = json.loads(data)
    if "exit" in message:
        pid, code = int(message["exit"]), int(message["code"])
        sup.context.exits[pid] = code
        sup.context.spent[pid] = message.get("usage") or {}
        call = sup.orphans.pop(pid, None)
        if call is not None:
            call(code)
        elif not any(inst.pid == pid for inst in sup.instances.values()) and pid not in sup.sessions:
            sup.context.exits.pop(pid, None)
            sup.context.spent.pop(pid, None)
            sup.tell_keeper({"forget": pid})


def _succeed(sup: Any) -> None:
    """The keeper was killed. This process, the parent of the containers, becomes the keeper; its fork goes on
    as supervisor, with all clients and streams."""
    context = sup.context
    assert context.link is not None
    sup.loop.unwatch(context.link.fileno())
    context.link.close()
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    context.births = 0
    context.keeper_pid = os.getpid()
    for inst in sup.instances.values():
        if inst.id in context.held:
            context.held[inst.id] = {"state": dict(inst.state), "fds": descriptors(inst)}
    for session in sup.sessions.values():
        context.held[session.key] = session.held()
    pid = os.fork()
    if pid == 0:
        ours.close()
        context.link = theirs
        syscalls.set_name(b"labkernel-super")
        sup.loop.rebuild()
        watch_keeper(sup)
        return
    os.set_blocking(ours.fileno(), False)
    context.link = ours
    _shed(context, theirs.fileno())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    keeper.tend(context, pid)


def _shed(context: keeper.Context, last: int) -> None:
    """As the new keeper, close all that only a supervisor needs. The Python objects stay referenced from the
    stack below, so none of them closes a number that is used again."""
    assert context.link is not None
    keep = {0, 1, 2, context.link.fileno(), context.listener.fileno(), *context.scratch}
    for entry in context.held.values():
        keep.update(entry["fds"].values())
    first = 3
    for fd in sorted(keep):
        if fd >= first:
            syscalls.close_range(first, fd - 1)
            first = fd + 1
    syscalls.close_range(first, max(first, last, 1 << 20))


def descriptors(inst: Instance) -> dict[str, int]:
    """What the keeper holds a duplicate of, by name."""
    listeners = {"denials": inst.denials, "owners": inst.owners}
    fds = {name: each.fd for name, each in listeners.items() if each is not None and each.fd >= 0}
    if inst.master >= 0:
        return {"master": inst.master, **fds}
    fds |= {stream: fd for fd, stream in inst.outputs.items()}
    if inst.input is not None and inst.input.fd >= 0:
        fds["stdin"] = inst.input.fd
    return fds
