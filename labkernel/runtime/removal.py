"""Deleting directories inside the driver's user namespace, where files of subordinate ids can be deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

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
    """rm -rf that never follows a link; directories without permission bits are opened up first."""
    problems: list[str] = []

    def clear(folder_fd: int, where: str) -> None:
        with os.scandir(folder_fd) as entries:
            names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        if names and os.fstat(folder_fd).st_mode & 0o300 != 0o300:
            os.fchmod(folder_fd, 0o700)  # without privileges (driver proot) its mode binds its owner, too
        for name, is_folder in names:
            try:
                if is_folder:
                    enter(name, folder_fd, where)
                    os.rmdir(name, dir_fd=folder_fd)
                else:
                    os.unlink(name, dir_fd=folder_fd)
            except FileNotFoundError:
                pass
            except OSError as err:
                problems.append(f"{where}/{name}: {err.strerror}")

    def enter(name: str, folder_fd: int | None, where: str) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=folder_fd)
        except PermissionError:
            os.chmod(name, 0o700, dir_fd=folder_fd)
            fd = os.open(name, flags, dir_fd=folder_fd)
        try:
            clear(fd, f"{where}/{name}" if where else name)
        finally:
            os.close(fd)

    try:
        enter(path, None, "")
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError as err:
        problems.append(f"{path}: {err.strerror}")
    return problems[0] if problems else None
