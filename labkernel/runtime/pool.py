"""Warm children: cloned into their namespaces, in their cgroup, with /dev, /proc and /sys built, waiting for work.

A container whose settings do not fit the pool (the host's network, other masked paths, another cgroup parent) takes a
child made for it at once: the same code, only not ahead of time.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from ..linux import mounts, syscalls
from ..linux.cgroups import Cgroup, Hierarchy
from ..linux.namespaces import FLAGS, clone_into_pid_namespace
from . import init, monitors, proot

STANDARD_NAMESPACES = ("cgroup", "ipc", "mount", "network", "pid", "uts")


class Warm:
    """A child that waits: `sock` takes the request and tells of the exec, `cgroup` is its own group or None, `started`
    its start time in ticks once somebody has looked."""

    __slots__ = ("cgroup", "pid", "pidfd", "profile", "sock", "started")

    def __init__(self, pid: int, pidfd: int, sock: socket.socket, cgroup: Cgroup | None, profile: dict[str, Any]):
        self.pid = pid
        self.pidfd = pidfd
        self.sock = sock
        self.cgroup = cgroup
        self.profile = profile
        self.started = 0


def profile_of(config: dict[str, Any]) -> dict[str, Any]:
    """What of a container's settings has to be known before its child is made."""
    linux = config.get("linux") or {}
    spaces = [space["type"] for space in linux.get("namespaces") or () if not space.get("path")]
    return {
        "namespaces": sorted(name for name in spaces if name != "user"),
        "masked": linux.get("maskedPaths") or [],
        "readonly": linux.get("readonlyPaths") or [],
        "cgroup_parent": (config.get("labkernel") or {}).get("cgroup_parent") or "",
        "bounding": (config["process"].get("capabilities") or {}).get("bounding"),
        "proot": "proot" in (config.get("labkernel") or {}),
        "monitor": "monitor" in (config.get("labkernel") or {}),
    }


class Pool:
    """Up to `size` warm children of one profile, the one asked for last."""

    def __init__(self, stage: str, hierarchy: Hierarchy, *, size: int, single_id: bool, skeleton: str) -> None:
        self.stage = stage
        self.skeleton = skeleton
        self.hierarchy = hierarchy
        self.size = size
        self.single_id = single_id
        self.profile: dict[str, Any] | None = None
        self.waiting: list[Warm] = []
        self.serial = 0
        self.prefix = f"c{os.getpid()}-"

    def take(self, profile: dict[str, Any]) -> Warm:
        """A child for `profile`, warm when there is one. Raises OSError when the kernel refuses."""
        if tuple(profile["namespaces"]) == STANDARD_NAMESPACES and profile != self.profile:
            self.discard()
            self.profile = profile
        if profile == self.profile and self.waiting:
            return self.waiting.pop(0)
        return self.spawn(profile)

    def refill(self) -> bool:
        """Make one child; False when the pool is full."""
        if self.profile is None or len(self.waiting) >= self.size:
            return False
        self.waiting.append(self.spawn(self.profile))
        return True

    def spawn(self, profile: dict[str, Any]) -> Warm:
        cgroup: Cgroup | None = None
        if self.hierarchy.version and profile["cgroup_parent"]:
            self.serial += 1
            cgroup = self.hierarchy.create(profile["cgroup_parent"], f"{self.prefix}{self.serial}")
        flags = 0
        for name in profile["namespaces"]:
            flags |= FLAGS[name] if name != "cgroup" else 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        join: dict[str, int] = profile.get("join") or {}
        try:
            pid, pidfd = clone_into_pid_namespace(join["pid"], flags) if "pid" in join else syscalls.clone(flags)
        except OSError:
            ours.close()
            theirs.close()
            if cgroup is not None:
                cgroup.remove(timeout_s=0)
            raise
        if pid == 0:
            _join(theirs, join)
            settings = {
                "stage": self.stage,
                "cgroup": cgroup,
                "profile": profile,
                "single_id": self.single_id,
                "skeleton": self.skeleton,
            }
            body = monitors if profile.get("monitor") else proot if profile.get("proot") else init
            body.main(theirs, settings)
        theirs.close()
        os.set_blocking(ours.fileno(), False)
        return Warm(pid, pidfd, ours, cgroup, profile)

    def discard(self) -> list[Warm]:
        """Send all waiting children away; the caller's next idle moment removes what they leave."""
        gone, self.waiting = self.waiting, []
        for warm in gone:
            dismiss(warm)
        return gone


def _join(sock: socket.socket, join: dict[str, int]) -> None:
    """In the child: enter namespaces of other containers (name -> pidfd of a process in it)."""
    try:
        for name, pidfd in join.items():
            if name != "pid":
                syscalls.setns(pidfd, FLAGS[name])
        if "ipc" in join:
            _share_memory(join["ipc"])
    except OSError as err:
        init.report(sock, f"cannot join the other container's {next(iter(join))} namespace: {err.strerror}", 125)
        os._exit(125)


def _share_memory(pidfd: int) -> None:
    """Put the other container's /dev/shm over this mount namespace's own; the configuration binds that one."""
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(pidfd, syscalls.CLONE_NEWNS)
    fd = syscalls.open_tree("/dev/shm")
    syscalls.setns(own, syscalls.CLONE_NEWNS)
    os.close(own)
    mounts.make_private("/")
    syscalls.move_mount(fd, "/dev/shm")
    os.close(fd)


def dismiss(warm: Warm) -> None:
    """End a child that never became a container, and remove its cgroup."""
    warm.sock.close()
    try:
        os.kill(warm.pid, 9)
        os.waitpid(warm.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    os.close(warm.pidfd)
    if warm.cgroup is not None:
        warm.cgroup.remove(timeout_s=0.05)
