"""Mounting: flags, overlay options, and paths that are resolved inside a root, never by name.

Source: man 2 mount, man 7 mount_namespaces, kernel Documentation/filesystems/overlayfs.rst. Everything here changes
the mount namespace of the calling process and needs CAP_SYS_ADMIN in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from . import syscalls
from .syscalls import mount, pivot_root, umount2

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MNT_DETACH = 2

# Words of mount(8) and of runtime-spec config.md "mounts": (flag, whether the word sets or clears it).
_WORDS = {
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (MS_NOSUID, True),
    "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True),
    "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True),
    "exec": (MS_NOEXEC, False),
    "noatime": (MS_NOATIME, True),
    "atime": (MS_NOATIME, False),
    "nodiratime": (MS_NODIRATIME, True),
    "relatime": (MS_RELATIME, True),
    "norelatime": (MS_RELATIME, False),
    "strictatime": (MS_STRICTATIME, True),
    "bind": (MS_BIND, True),
    "rbind": (MS_BIND | MS_REC, True),
    "remount": (MS_REMOUNT, True),
}
_PROPAGATION = {
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
    "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
}
# A bind remount must repeat what the superblock's owner locked, so these are read from statvfs (man 2 mount, EPERM).
_LOCKED = {os.ST_NOSUID: MS_NOSUID, os.ST_NODEV: MS_NODEV, os.ST_NOEXEC: MS_NOEXEC, os.ST_RDONLY: MS_RDONLY}

__all__ = [
    "bind",
    "make_private",
    "mount",
    "open_in_root",
    "overlay_options",
    "parse_options",
    "pivot_root",
    "read_mountinfo",
    "remount_readonly",
    "umount2",
]


def parse_options(words: list[str]) -> tuple[int, int, str]:
    """Sort runtime-spec mount options into (flags, propagation flags, data string)."""
    flags = 0
    propagation = 0
    data = []
    for word in words:
        if word in _WORDS:
            flag, on = _WORDS[word]
            flags = flags | flag if on else flags & ~flag
        elif word in _PROPAGATION:
            propagation = _PROPAGATION[word]
        elif word != "defaults":
            data.append(word)
    return flags, propagation, ",".join(data)


def make_private(target: str = "/") -> None:
    """Cut `target` and all below it off from mount propagation (MS_REC | MS_PRIVATE)."""
    mount(None, target, None, MS_REC | MS_PRIVATE)


def bind(source: str, target: str, *, recursive: bool = True) -> None:
    """Bind `source` to `target`; both may be `/proc/self/fd/N`."""
    mount(source, target, None, MS_BIND | (MS_REC if recursive else 0))


def remount_flags(target: str, flags: int) -> None:
    """Set per-mount `flags` on the bind mount at `target`, keeping those the kernel has locked."""
    have = os.statvfs(target).f_flag
    for st_flag, ms_flag in _LOCKED.items():
        if have & st_flag:
            flags |= ms_flag
    mount(None, target, None, MS_REMOUNT | MS_BIND | flags)


def remount_readonly(target: str, *, recursive: bool = False) -> None:
    """Make the mount at `target` read-only; with `recursive` also every mount below (mount_setattr, Linux 5.12)."""
    if recursive:
        try:
            syscalls.mount_setattr(-100, target, syscalls.AT_RECURSIVE, attr_set=syscalls.MOUNT_ATTR_RDONLY)
            return
        except OSError as err:
            if err.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
                raise
    remount_flags(target, MS_RDONLY)


def _escape(path: str) -> str:
    # overlayfs splits `lowerdir` at colons and options at commas; a backslash protects both.
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def overlay_options(
    lower: list[str], upper: str | None, work: str | None, *, userxattr: bool = False, volatile: bool = False
) -> str:
    """The data string of an overlay mount; `lower` is top first.

    mount(2) takes one page. Where absolute names don't fit, each lower directory is opened and named
    `/proc/self/fd/N` (`mount_overlay` does it). `volatile` skips the sync at unmount: for containers whose upper
    directory is thrown away. `userxattr` is needed inside a user namespace (Linux 5.11).
    """
    words = ["lowerdir=" + ":".join(_escape(path) for path in lower)]
    if upper is not None and work is not None:
        words += [f"upperdir={_escape(upper)}", f"workdir={_escape(work)}"]
    if userxattr:
        words.append("userxattr")
    if volatile:
        words.append("volatile")
    return ",".join(words)


def mount_overlay(
    target: str,
    lower: list[str],
    upper: str | None,
    work: str | None,
    *,
    userxattr: bool = False,
    volatile: bool = False,
) -> None:
    """Mount an overlay at `target`. Without `upper` and `work` it is read-only and needs two lower directories.

    With `/` among several lower directories two mounts more lie below it at `target`: see `_mount_host_apart`.
    """
    if "/" in lower and len(lower) > 1:
        lower = [_mount_host_apart(target) if path == "/" else path for path in lower]
    options = overlay_options(lower, upper, work, userxattr=userxattr, volatile=volatile)
    opened: list[int] = []
    try:
        if len(options) > 3900:
            opened = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in lower]
            short = [f"/proc/self/fd/{fd}" for fd in opened]
            options = overlay_options(short, upper, work, userxattr=userxattr, volatile=volatile)
        _overlay_or_sync(target, options, volatile=volatile)
    finally:
        for fd in opened:
            os.close(fd)


def _mount_host_apart(target: str) -> str:
    """The machine's root directory as a file system of its own; returns where.

    overlayfs refuses (ELOOP) a lower directory that lies inside another one, and all that is stored on this disk lies
    inside `/`. Seen through a read-only overlay, `/` is the root of another file system.
    """
    mount("labkernel-host", target, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64k")
    for name in ("none", "host"):
        os.mkdir(f"{target}/{name}", 0o755)
    mount("overlay", f"{target}/host", "overlay", MS_RDONLY, overlay_options(["/", f"{target}/none"], None, None))
    return f"{target}/host"


def _overlay_or_sync(target: str, options: str, *, volatile: bool) -> None:
    try:
        mount("overlay", target, "overlay", 0, options)
    except OSError as err:
        # Kernels before 5.10 do not know `volatile`; a work directory left by a volatile mount refuses another one.
        if not volatile or err.errno != errno.EINVAL:
            raise
        mount("overlay", target, "overlay", 0, options.replace(",volatile", ""))


def open_in_root(root_fd: int, path: str, flags: int = os.O_PATH) -> int:
    """Open `path` as a process whose root is `root_fd` would: links and `..` cannot lead outside (openat2)."""
    return syscalls.openat2(root_fd, path, flags)


def ensure_in_root(root_fd: int, path: str, *, directory: bool, created: list[str] | None = None) -> int:
    """Open `path` inside `root_fd` with O_PATH, making what is missing; returns a descriptor.

    Missing parents become directories (0755); the last part a directory, or an empty file when not `directory`.
    Names that were made are appended to `created`, parents first.
    """
    path = "/" + path.strip("/")
    try:
        return open_in_root(root_fd, path)
    except FileNotFoundError:
        pass
    parent, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        raise OSError(errno.EINVAL, "cannot make this mount point", path)
    parent_fd = ensure_in_root(root_fd, parent, directory=True, created=created)
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent_fd)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent_fd))
        if created is not None:
            created.append(path)
    except FileExistsError:
        # A dangling link: opening it again names the right error.
        pass
    finally:
        os.close(parent_fd)
    return open_in_root(root_fd, path)


def open_read_only(path: str) -> int | None:
    """A descriptor of the file `path` on a read-only mount of its own, None where that is not allowed.

    A process that is executed from `/proc/self/fd/N` of it has that mount behind its `/proc/PID/exe`: a container whose
    command is `/proc/self/exe` then cannot open the engine's interpreter for writing (CVE-2019-5736)."""
    try:
        fd = syscalls.open_tree(os.path.realpath(path))
    except OSError:
        return None
    try:
        syscalls.mount_setattr(fd, "", syscalls.AT_EMPTY_PATH, attr_set=syscalls.MOUNT_ATTR_RDONLY)
    except OSError:
        os.close(fd)
        return None
    return fd


def open_program(path: str, driver: str) -> int | None:
    """What to execute in place of the program `path`, so that no container can write to it through `/proc/PID/exe`
    (CVE-2019-5736). None when it cannot anyway: who is root in a container does not own the file.

    Under the driver `root` a read-only mount of its own, else, and where that is refused (before Linux 5.12, or without
    CAP_SYS_ADMIN), a sealed copy in memory, some 7 MB once for each supervisor. Raises OSError when neither can be."""
    info = os.stat(path)
    if driver == "proot" or (driver == "rootless" and info.st_uid != os.geteuid() and not os.access(path, os.W_OK)):
        return None
    held = open_read_only(path) if driver == "root" else None
    return _sealed_copy(path) if held is None else held


def _sealed_copy(path: str) -> int:
    """A copy in memory that nobody can change any more (man 2 memfd_create, man 2 fcntl "File Sealing")."""
    fd = os.memfd_create("labkernel-program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(path, "rb") as file:
            while os.sendfile(fd, file.fileno(), None, 1 << 24):
                pass
        seal, shrink, grow, write = 1, 2, 4, 8
        fcntl.fcntl(fd, 1033, seal | shrink | grow | write)  # F_ADD_SEALS
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_directory(fd: int) -> bool:
    """Whether an O_PATH descriptor names a directory."""
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def read_mountinfo(path: str = "/proc/self/mountinfo") -> list[dict[str, str]]:
    """The mounts a process sees, in order. Source: man 5 proc_pid_mountinfo.

    Each is {"id","parent","device","root","target","options","fstype","source","super_options"}, octal escapes undone.
    """
    found = []
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            mount_id, parent, device, root, target, options = left.split(" ")[:6]
            fstype, source, super_options = [*right.split(" "), "", ""][:3]
            found.append(
                {
                    "id": mount_id,
                    "parent": parent,
                    "device": device,
                    "root": _unescape(root),
                    "target": _unescape(target),
                    "options": options,
                    "fstype": fstype,
                    "source": _unescape(source),
                    "super_options": super_options,
                }
            )
    return found


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text
