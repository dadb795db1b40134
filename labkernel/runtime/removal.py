"""Deleting directories inside the driver's user namespace, where files of subordinate ids can be deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..errors import file_of
from ..linux import trees
from .rootfs import forget_volatile

_SMALL = ("config.json", "state.json", "log.json", "hostname", "hosts", "resolv.conf", "upper", "work")


def remove_tree(sup: Any, path: str, done: Callable[[str | None], None]) -> None:
    """Delete `path`; a container that wrote nothing at once, anything else in a forked child. `done(error)` follows."""
    if _remove_small(path):
        done(None)
        return
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        error = _remove_all(path)
        os.write(write, (error or "").encode()[:4000])
        os._exit(0)
    os.close(write)
    os.set_blocking(read, False)

    def finished(_events: int) -> None:
        try:
            text = os.read(read, 4096).decode("utf-8", "replace")
        except BlockingIOError:
            return
        sup.loop.unwatch(read)
        os.close(read)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass
        done(text or None)

    sup.loop.watch(read, finished)


def _remove_small(path: str) -> bool:
    """Delete the directory of a container whose upper directory is empty; False leaves the rest to a child."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return True
    if any(name not in _SMALL and not name.startswith("state.json") for name in names):
        return False
    try:
        for name in names:
            full = f"{path}/{name}"
            if name == "work":
                forget_volatile(full)
                os.rmdir(full)
            elif name == "upper":
                os.rmdir(full)
            else:
                os.unlink(full)
        os.rmdir(path)
    except OSError:
        return False
    return True


def _remove_all(path: str) -> str | None:
    """What went wrong with `rm -rf`, None when nothing did."""
    try:
        trees.remove_tree(path)
    except OSError as err:
        return f"{file_of(err) or os.fsdecode(path)}: {err.strerror}"
    return None
