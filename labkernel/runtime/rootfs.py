"""The file system a container sees, in two halves: what can be ready before a container is known, and the rest.

`prepare` runs in a new mount namespace and builds /proc, /sys and /dev beside each other on a small tmpfs (the
stage). `assemble` mounts the root file system there, moves the prepared parts into it, adds the mounts of the
config, and `enter` makes it the root. Everything inside the image is opened with openat2(RESOLVE_IN_ROOT) and used
through its descriptor. All of it lives in the container's own mount namespace, so nothing can be left on the host.

Source: runtime-spec config.md "Mounts", config-linux.md "Default Devices", "Masked Paths"; man 2 pivot_root.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from ..linux import mounts
from ..linux.mounts import (
    MNT_DETACH,
    MS_BIND,
    MS_MOVE,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_STRICTATIME,
    ensure_in_root,
    is_directory,
    mount,
    open_in_root,
)
from ..linux.syscalls import AT_RECURSIVE, mount_setattr, move_mount, open_tree, pivot_root, umount2

_ONE_ID = "-one-id"
_APT_SETTINGS = "/etc/apt/apt.conf.d"
_APT = b"""// labkernel: one id is mapped in here, so apt cannot become its user _apt.
APT::Sandbox::User "root";
"""
DEVICES = (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9))
LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
)
# Destinations that `prepare` has built; an entry of the config for one of them only adjusts it.
PREPARED = ("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup")
_ATTR_SYS = 0x01 | 0x02 | 0x04 | 0x08  # MOUNT_ATTR_RDONLY, NOSUID, NODEV, NOEXEC
_HARD = MS_NOSUID | MS_NOEXEC | MS_NODEV


def prepare(stage: str, *, cgroup_paths: dict[str, str], profile: dict[str, Any], single_id: bool) -> None:
    """Build STAGE/{root,proc,sys,dev} in this (new) mount namespace; needs the new pid and network namespaces too."""
    mounts.make_private("/")
    mount("labkernel", stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64k")
    for name in ("root", "proc", "sys", "dev"):
        os.mkdir(f"{stage}/{name}", 0o755)
    try:
        mount("proc", f"{stage}/proc", "proc", _HARD)
    except PermissionError:
        # The machine's own /proc is partly covered (a pod): the kernel forbids a fresh one in a user namespace.
        mount("/proc", f"{stage}/proc", None, MS_BIND | MS_REC)
    _prepare_sys(f"{stage}/sys", cgroup_paths)
    _prepare_dev(f"{stage}/dev", single_id=single_id)
    stage_fd = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _cover(stage_fd, profile, inside=True)
    os.close(stage_fd)


def _prepare_sys(target: str, cgroup_paths: dict[str, str]) -> None:
    try:
        mount("sysfs", target, "sysfs", MS_RDONLY | _HARD)
    except PermissionError:
        # A fresh sysfs belongs to the network namespace, which is not ours with the host's network under rootless.
        mount("/sys", target, None, MS_BIND | MS_REC)
        mounts.remount_readonly(target, recursive=True)
        return
    where = f"{target}/fs/cgroup"
    try:
        if "" in cgroup_paths:
            mount(cgroup_paths[""], where, None, MS_BIND)
        elif cgroup_paths:
            mount("tmpfs", where, "tmpfs", _HARD, "mode=755,size=64k")
            for path in dict.fromkeys(cgroup_paths.values()):
                name = path.removeprefix("/sys/fs/cgroup/").split("/", 1)[0]
                os.mkdir(f"{where}/{name}")
                mount(path, f"{where}/{name}", None, MS_BIND)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.EPERM):
            raise  # control groups that are not shown: what is there already is closed below all the same
    _close_all(target)


def _close_all(target: str) -> None:
    """What is mounted at `target` and below may only be looked at. A control group that could be written to would be a
    way out, so what cannot be closed ends the start."""
    try:
        mount_setattr(-100, target, AT_RECURSIVE, attr_set=_ATTR_SYS)
    except OSError as err:
        if err.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
        for each in mounts.read_mountinfo():  # before Linux 5.12, or forbidden by an outer filter
            if each["target"] == target or each["target"].startswith(f"{target}/"):
                mounts.remount_flags(each["target"], MS_RDONLY | _HARD)


def _prepare_dev(target: str, *, single_id: bool) -> None:
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k")
    for name, minor in DEVICES:
        _make_device(target, name, 1, minor)
    _make_device(target, "tty", 5, 0)
    for name, points_to in LINKS:
        os.symlink(points_to, f"{target}/{name}")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{target}/{name}", 0o755)
    group = "" if single_id else ",gid=5"
    mount("devpts", f"{target}/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"newinstance,ptmxmode=0666,mode=0620{group}")
    mount("shm", f"{target}/shm", "tmpfs", _HARD, "mode=1777,size=65536k")
    try:
        mount("mqueue", f"{target}/mqueue", "mqueue", _HARD)
    except PermissionError:
        pass  # the machine's own IPC namespace, seen from a user namespace


def _make_device(target: str, name: str, major: int, minor: int) -> None:
    path = f"{target}/{name}"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    except PermissionError:
        # A user namespace may not make device nodes; the host's own ones can be bound.
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        mount(f"/dev/{name}", path, None, MS_BIND)


def _cover(root_fd: int, profile: dict[str, Any], *, inside: bool) -> None:
    """Masked and read-only paths; `inside` selects those below /proc, /sys and /dev, otherwise all others."""
    for path in profile.get("masked") or ():
        if path.startswith(("/proc/", "/sys/", "/dev/")) == inside:
            _with_target(root_fd, path, _mask)
    for path in profile.get("readonly") or ():
        if path.startswith(("/proc/", "/sys/", "/dev/")) == inside:
            _with_target(root_fd, path, _freeze)


def _with_target(root_fd: int, path: str, act: Any) -> None:
    try:
        fd = open_in_root(root_fd, path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        act(fd, root_fd, path)
    finally:
        os.close(fd)


def _mask(fd: int, _root_fd: int, _path: str) -> None:
    if is_directory(fd):
        mount("tmpfs", f"/proc/self/fd/{fd}", "tmpfs", MS_RDONLY, "size=0k,mode=755")
    else:
        info = os.stat("/dev/null")
        if not stat.S_ISCHR(info.st_mode) or info.st_rdev != os.makedev(1, 3):
            # Whatever lies there instead would be what the container reads (CVE-2025-31133).
            raise OSError(errno.ENODEV, "not the null device", "/dev/null")
        mount("/dev/null", f"/proc/self/fd/{fd}", None, MS_BIND)


def _freeze(fd: int, root_fd: int, path: str) -> None:
    mount(f"/proc/self/fd/{fd}", f"/proc/self/fd/{fd}", None, MS_BIND | MS_REC)
    # The old descriptor names what lies below the new mount, so the mount is opened again.
    again = open_in_root(root_fd, path)
    mounts.remount_readonly(f"/proc/self/fd/{again}")
    os.close(again)


def make_skeleton(root: str, *, single_id: bool) -> str:
    """ROOT/skeleton: the mount points every container needs, as a last lower directory below each image's own.

    Without it they would be made in the upper directory: a copy-up of /etc for every start of an image that lacks
    /etc/hosts, and entries that are not the container's doing. What an image has itself, hides it. With one mapped id
    there is a second one beside it, for images with apt, which cannot become its own user then (apt.conf(5)).
    """
    base = f"{root}/skeleton"
    _make_below(base, ("/proc", "/sys", "/dev", "/etc"), dict.fromkeys(("hostname", "hosts", "resolv.conf"), b""))
    if single_id:
        directories = ("/etc", "/etc/apt", _APT_SETTINGS)
        _make_below(base + _ONE_ID, directories, {"apt/apt.conf.d/99labkernel-one-id": _APT})
    return base


def _make_below(base: str, directories: Sequence[str], files: Mapping[str, bytes]) -> None:
    for name in ("", *directories):
        if not os.path.isdir(base + name):
            os.mkdir(base + name)
            os.chmod(base + name, 0o755)
    for name, data in files.items():
        path = f"{base}/etc/{name}"
        if not os.path.exists(path):
            fd = os.open(f"{path}.{os.getpid()}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            os.fchmod(fd, 0o644)
            os.write(fd, data)
            os.close(fd)
            os.rename(f"{path}.{os.getpid()}", path)


def open_shared(config: dict[str, Any]) -> dict[str, int]:
    """Destination -> a copy of what is bound there, for binds that are to take part in the machine's mounts.

    To be called where the machine's mounts are: in the container's own namespace all are private, so a bind made there
    takes part in nothing. The descriptors are the caller's. Source: man 7 mount_namespaces."""
    found: dict[str, int] = {}
    if not any(space["type"] == "mount" for space in config["linux"].get("namespaces") or ()):
        return found
    try:
        for entry in config.get("mounts") or ():
            flags, propagation, _ = mounts.parse_options(list(entry.get("options") or ()))
            if propagation & (mounts.MS_SLAVE | mounts.MS_SHARED) and flags & MS_BIND:
                found[entry["destination"]] = open_tree(entry["source"], recursive=bool(flags & MS_REC))
    except BaseException:
        for fd in found.values():
            os.close(fd)
        raise
    return found


def assemble(
    stage: str,
    config: dict[str, Any],
    container_dir: str,
    profile: dict[str, Any],
    skeleton: str | None = None,
    shared: dict[str, int] | None = None,
) -> list[str]:
    """Mount the root file system and all else; returns the mount points that had to be made in it. `shared` is what
    `open_shared` gave."""
    root = f"{stage}/root"
    own = config.get("labkernel") or {}
    rootfs = own.get("rootfs") or {"kind": "dir", "path": config["root"]["path"]}
    _mount_root(root, rootfs, skeleton, single_id=bool(own.get("single_id")))
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    created: list[str] = []
    entries = list(config.get("mounts") or ())
    covered = {entry["destination"].rstrip("/") for entry in entries}
    for name in ("proc", "sys", "dev"):
        _move(f"{stage}/{name}", root_fd, name, created)
    for node in (config.get("linux") or {}).get("devices") or ():
        _add_device(root_fd, node)
    if own.get("shared_memory") is False:  # --ipc none
        _with_target(root_fd, "/dev/shm", lambda fd, *_: umount2(f"/proc/self/fd/{fd}", MNT_DETACH))
    for entry in entries:
        _mount_entry(root_fd, entry, created, (shared or {}).get(entry["destination"], -1))
    # Three new files on disk take longer than three mounts: one that removes itself has them in the stage's memory.
    folder = stage if own.get("auto_remove") else container_dir
    for name, text in network_files(config, own):
        if f"/etc/{name}" not in covered:
            _provide(root_fd, folder, name, text, created)
    _cover(root_fd, profile, inside=False)
    os.close(root_fd)
    return created


def _add_device(root_fd: int, node: dict[str, Any]) -> None:
    """A node of `linux.devices` below /dev or elsewhere; where none may be made, the machine's own is bound."""
    folder, _, name = node["path"].rpartition("/")
    parent = ensure_in_root(root_fd, folder or "/", directory=True)
    try:
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if there.st_rdev == os.makedev(node["major"], node["minor"]):
                return  # one of those every container has; a bound one could not be removed
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        kind = {"b": stat.S_IFBLK, "p": stat.S_IFIFO}.get(node["type"], stat.S_IFCHR)
        try:
            os.mknod(name, kind | node["fileMode"], os.makedev(node["major"], node["minor"]), dir_fd=parent)
            os.chown(name, node["uid"], node["gid"], dir_fd=parent)
        except PermissionError:
            flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o666, dir_fd=parent)
            mount(node["source"], f"/proc/self/fd/{fd}", None, MS_BIND)
            os.close(fd)
    finally:
        os.close(parent)


def _mount_root(root: str, rootfs: dict[str, Any], skeleton: str | None, *, single_id: bool) -> None:
    if rootfs["kind"] == "overlay":
        for path in (rootfs.get("upper"), rootfs.get("work")):
            if path:
                os.makedirs(path, 0o755, exist_ok=True)
        forget_volatile(rootfs.get("work"))
        below = [skeleton] if skeleton and os.path.isdir(skeleton) else []
        if below and single_id and any(os.path.isdir(lower + _APT_SETTINGS) for lower in rootfs["lower"]):
            below.append(f"{skeleton}{_ONE_ID}")
        mounts.mount_overlay(
            root,
            [*rootfs["lower"], *below],
            rootfs.get("upper"),
            rootfs.get("work"),
            userxattr=bool(rootfs.get("userxattr")),
            volatile=bool(rootfs.get("volatile")),
        )
        return
    mount(rootfs["path"], root, None, MS_BIND | MS_REC)
    mounts.make_private(root)


def forget_volatile(work: str | None) -> None:
    """A volatile overlay leaves a mark that forbids mounting it again: the machine might have crashed before all was
    on disk. For containers that is the user's own bargain (kernel overlayfs.rst, "Volatile mount")."""
    try:
        os.unlink(f"{work}/work/incompat/volatile/dirty")
    except OSError:
        pass
    for name in ("work/incompat/volatile", "work/incompat", "work"):
        try:
            os.rmdir(f"{work}/{name}")
        except OSError:
            pass


def _move(source: str, root_fd: int, name: str, created: list[str]) -> None:
    fd = ensure_in_root(root_fd, name, directory=True, created=created)
    mount(source, f"/proc/self/fd/{fd}", None, MS_MOVE)
    os.close(fd)


def _mount_entry(root_fd: int, entry: dict[str, Any], created: list[str], tree: int) -> None:
    destination = "/" + entry["destination"].strip("/")
    flags, propagation, data = mounts.parse_options(list(entry.get("options") or ()))
    kind = entry.get("type") or ("bind" if flags & MS_BIND else "tmpfs")
    if destination in PREPARED and kind not in ("bind", "rbind") and not flags & MS_BIND:
        _adjust(root_fd, destination, flags, data)
        return
    if kind in ("bind", "rbind") or flags & MS_BIND:
        source = tree if tree >= 0 else os.open(entry["source"], os.O_PATH | os.O_CLOEXEC)
        _bind_entry(root_fd, destination, source, flags, propagation, created, ready=tree >= 0)
        return
    made = len(created)
    fd = ensure_in_root(root_fd, destination, directory=True, created=created)
    if kind == "tmpfs" and "mode=" not in data and len(created) == made:
        # A tmpfs takes over the mode of the directory it covers; over none it is everybody's (1777), as docker's is.
        data = ",".join(word for word in (data, f"mode={stat.S_IMODE(os.fstat(fd).st_mode):o}") if word)
    mount(entry.get("source") or kind, f"/proc/self/fd/{fd}", kind, flags, data or None)
    os.close(fd)


def _adjust(root_fd: int, destination: str, flags: int, data: str) -> None:
    if destination == "/dev/shm" and data and "size=65536k" not in data.split(","):
        fd = open_in_root(root_fd, destination)
        mount(None, f"/proc/self/fd/{fd}", None, MS_REMOUNT | flags, data)
        os.close(fd)
    elif destination == "/sys" and not flags & MS_RDONLY:
        fd = open_in_root(root_fd, destination)
        mount_setattr(fd, "", 0x1000, attr_clr=0x01)
        os.close(fd)


def _bind_entry(
    root_fd: int, destination: str, source_fd: int, flags: int, propagation: int, created: list[str], *, ready: bool
) -> None:
    """Bind what `source_fd` names, which is closed; `ready`: it is a mount already that only needs a place."""
    fd = ensure_in_root(root_fd, destination, directory=is_directory(source_fd), created=created)
    recursive = MS_REC if flags & MS_REC or not flags & MS_BIND else 0
    if ready:
        move_mount(source_fd, fd)
    else:
        mount(f"/proc/self/fd/{source_fd}", f"/proc/self/fd/{fd}", None, MS_BIND | recursive)
    os.close(fd)
    os.close(source_fd)
    fd = open_in_root(root_fd, destination)
    target = f"/proc/self/fd/{fd}"
    mount(None, target, None, propagation or (mounts.MS_PRIVATE | MS_REC))
    rest = flags & ~(MS_BIND | MS_REC)
    if rest & MS_RDONLY and recursive:
        mounts.remount_readonly(target, recursive=True)
    if rest:
        mounts.remount_flags(target, rest)
    os.close(fd)


def network_files(config: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, str]]:
    """/etc/hostname, /etc/hosts and /etc/resolv.conf as docker writes them."""
    hostname = config.get("hostname") or ""
    types = {space["type"] for space in (config.get("linux") or {}).get("namespaces") or ()}
    hosts = (
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n"
        "ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    )
    network = own.get("network") or {}
    for word in own.get("extra_hosts") or ():
        name, _, address = str(word).partition(":")
        hosts += f"{network.get('host_gateway', '127.0.0.1') if address == 'host-gateway' else address}\t{name}\n"
    if network:
        hosts += "".join(f"{address}\t{host_names(config)}\n" for address in network["addresses"])
        return [("hostname", f"{hostname}\n"), ("hosts", hosts), ("resolv.conf", resolver_lines(network))]
    if hostname and "network" in types:
        hosts += f"127.0.1.1\t{hostname}\n"
    servers = own.get("dns") or ()
    resolv = "".join(f"nameserver {server}\n" for server in servers)
    if not resolv and "network" not in types:
        try:
            with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
                resolv = file.read(65536)
        except OSError:
            resolv = ""
    if own.get("dns_search"):
        resolv += f"search {' '.join(own['dns_search'])}\n"
    if own.get("dns_opt"):
        resolv += f"options {' '.join(own['dns_opt'])}\n"
    return [("hostname", f"{hostname}\n"), ("hosts", hosts), ("resolv.conf", resolv)]


def host_names(config: dict[str, Any]) -> str:
    """The container's own names in /etc/hosts: the full one first."""
    hostname = config.get("hostname") or ""
    full = f"{hostname}.{config['domainname']}" if config.get("domainname") else hostname
    return f"{full} {full.partition('.')[0]}" if "." in full else full


def resolver_lines(network: dict[str, Any]) -> str:
    """The text of /etc/resolv.conf."""
    lines = [f"nameserver {server}\n" for server in network["servers"]]
    for key in ("search", "options"):
        if network[key]:
            lines.append(f"{key} {' '.join(network[key])}\n")
    return "".join(lines)


def _provide(root_fd: int, folder: str, name: str, text: str, created: list[str]) -> None:
    path = f"{folder}/{name}"
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        os.write(fd, text.encode())
        os.close(fd)
    except FileExistsError:
        pass  # from an earlier start; what the container changed in it stays, as with docker
    target = ensure_in_root(root_fd, f"/etc/{name}", directory=False, created=created)
    mount(path, f"/proc/self/fd/{target}", None, MS_BIND)
    os.close(target)


def enter(stage: str, *, readonly: bool) -> None:
    """pivot_root into STAGE/root and drop the old root. The old and the new root share one mount point for a
    moment (`pivot_root(".", ".")`, man 2 pivot_root), so no directory for the old one is needed in the image."""
    os.chdir(f"{stage}/root")
    pivot_root(".", ".")
    umount2(".", MNT_DETACH)
    os.chdir("/")
    if readonly:
        mounts.remount_flags("/", MS_RDONLY)
