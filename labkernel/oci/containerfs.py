"""Files of containers: look at a path, pack it, unpack onto it, and say what a container changed.

Tasks of the worker, so inside the driver's namespaces. A running container is reached through /proc/PID/root, which
shows its volumes and its /proc as it sees them; a stopped one is mounted in the task's own mount namespace. Paths are
resolved by the kernel inside that root (rootfd.py), so a link that the container exchanges meanwhile leads nowhere
else (CVE-2018-15664), and no program or library of the container is run or loaded (CVE-2019-14271).

Source: Docker Engine API, ContainerArchive and ContainerChanges.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from ..errors import RuntimeFailure, UsageError
from ..linux import mounts, syscalls
from .extract import Extractor
from .pack import Packer, is_opaque, is_whiteout, raise_limits
from .rootfd import Root, clamp_path, clean_path, open_in_root
from .tarstream import BlobStream, FdSink, TarWriter, members

View = dict[str, Any]
"""Which container: {"pid", "pid_start"} of one that runs, {"rootfs", "mounts", "base" (a directory)} of another, or
{"root", "places"} where nothing can be mounted (proot): the directory, and what else is seen where in it."""

MAX_BYTES = 1 << 40
MAX_MEMBERS = 10_000_000
_GO_DIRECTORY, _GO_SYMLINK, _GO_DEVICE, _GO_FIFO, _GO_SOCKET, _GO_CHARACTER = (
    *(1 << 31, 1 << 27, 1 << 26, 1 << 25),
    *(1 << 24, 1 << 21),
)
_GO_SETUID, _GO_SETGID, _GO_STICKY = 1 << 23, 1 << 22, 1 << 20


def look(*, view: View, path: str) -> dict[str, Any] | None:
    """{"name", "size", "mode" (Go's bits), "mtime_ns", "linkTarget"} of a path, its last link not followed.

    None when it is not there. A path that ends with `/` or `/.` names the directory a link leads to.
    """
    with _opened(view, path) as (root, inner):
        found = _find(root, inner)
        if found is None:
            return None
        directory, name, status = found
        try:
            target = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(status.st_mode) else b""
        finally:
            os.close(directory)
    return {
        "name": os.path.basename(os.path.normpath(path)) or "/",
        "size": status.st_size,
        "mode": _go_mode(status.st_mode),
        "mtime_ns": status.st_mtime_ns,
        "linkTarget": os.fsdecode(target),
    }


def archive(*, view: View, path: str, name: str, fds: Sequence[int]) -> dict[str, Any] | None:
    """Write `path` as a tar to fds[0], its first member called `name` (`.`: what lies below it). None: not there."""
    raise_limits()
    with _opened(view, path) as (root, inner):
        found = _find(root, inner)
        if found is None:
            return None
        directory, base, status = found
        try:
            return pack(directory, base, status, name, fds[0])
        finally:
            os.close(directory)


def pack(directory: int, base: bytes, status: os.stat_result, name: str, out: int) -> dict[str, Any]:
    """`base` in the open `directory` as a tar on the descriptor `out`, under the name `name`."""
    sink = FdSink(out)
    tar = TarWriter(sink)
    packer = Packer(tar, whiteouts=False)
    if stat.S_ISDIR(status.st_mode):
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            packer._header(fd, os.fsencode(name) + b"/", os.fstat(fd))
            packer.tree([fd], b"" if name == "." else os.fsencode(name))
        finally:
            os.close(fd)
    else:
        packer.entry(directory, base, os.fsencode(name), status)
    tar.close()
    sink.flush()
    return {"members": packer.members, "size_bytes": packer.size_bytes}


def unpack(*, view: View, path: str, fds: Sequence[int]) -> dict[str, Any] | None:
    """Unpack the tar on fds[0] over the directory `path`; None when that is not there.

    A directory does not take a file's place, nor a file a directory's. Raises UsageError, LayerError, OSError.
    """
    raise_limits()
    with _opened(view, path, writing=True) as (root, inner):
        prefix = clamp_path(os.fsencode(inner))
        try:
            os.close(root.open_directory(prefix))
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise UsageError("extraction point is not a directory", exit_code=1) from None
        return extract(root, prefix, fds[0])


def extract(root: Root, prefix: bytes, fd: int, *, owner: tuple[int, int] | None = None) -> dict[str, Any]:
    """The tar on `fd` below `prefix` of `root`; everything belongs to `owner` where that is given."""
    stream = BlobStream(fd, max_bytes=MAX_BYTES, hashed=False)
    out = Extractor(root, whiteouts=False, prefix=prefix, owner=owner)
    count = 0
    for member in members(stream, max_members=MAX_MEMBERS):
        name = clean_path(os.fsencode(member.name))
        if name:
            _refuse_exchange(root, b"/".join(part for part in (prefix, name) if part), name, member.isdir())
            out.add(member, stream)
            count += 1
    out.finish()
    return {"members": count, "size_bytes": out.size_bytes, "warnings": out.warnings}


def _refuse_exchange(root: Root, path: bytes, name: bytes, directory: bool) -> None:  # noqa: FBT001
    there = root.lstat(path)
    if there is None or stat.S_ISDIR(there.st_mode) == directory:
        return
    kinds = ("directory", "non-directory") if directory else ("non-directory", "directory")
    raise UsageError(
        f'cannot overwrite {kinds[1]} "/{os.fsdecode(path)}" with {kinds[0]} "{os.fsdecode(name)}"', exit_code=1
    )


def changes(*, upper: str, lowers: Sequence[str], hidden: Sequence[str] = ()) -> list[list[Any]]:
    """[kind, path] of what the overlay directory `upper` changes, in order of names; 0 changed, 1 added, 2 deleted.

    `hidden` are mount points that were made for the container: they count when there is something in them. A parent is
    told as changed when something in it is another, as docker does.
    """
    found: dict[bytes, int] = {}
    stubs = {os.fsencode(path).strip(b"/") for path in hidden}
    if not os.path.isdir(upper):
        return []
    below = [Root.open(lower) for lower in lowers]
    try:
        with Root.open(upper) as root:
            _compare(root.fd, b"", below, found, stubs)
    finally:
        for each in below:
            each.__exit__()
    return [[kind, "/" + os.fsdecode(path)] for path, kind in sorted(found.items())]


def _compare(
    fd: int, path: bytes, below: list[Root], found: dict[bytes, int], stubs: set[bytes], *, hides: bool = False
) -> None:
    for entry in sorted(os.listdir(fd)):
        name = os.fsencode(entry)
        here = path + b"/" + name if path else name
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        before = next((seen for root in below if (seen := root.lstat(here)) is not None), None)
        if before is not None and is_whiteout(before):
            before = None
        if is_whiteout(status):
            if before is not None:
                _note(found, path, here, 2)
            continue
        if here in stubs and before is None and _is_empty(fd, name, status):
            continue
        if not stat.S_ISDIR(status.st_mode):
            _note(found, path, here, 1 if before is None else 0)
            continue
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        try:
            # What lies in a directory made anew is not merged with what was there, either.
            anew = hides or is_opaque(inner)
            if before is None:
                _note(found, path, here, 1)
            elif _described(before) != _described(status):
                found[here] = 0
            if anew and before is not None:
                _note_hidden(below, here, found, inner)
            _compare(inner, here, below, found, stubs, hides=anew)
        finally:
            os.close(inner)


def _note(found: dict[bytes, int], parent: bytes, path: bytes, kind: int) -> None:
    found[path] = kind
    while parent and parent not in found:
        found[parent] = 0
        parent = parent.rpartition(b"/")[0]


def _note_hidden(below: list[Root], path: bytes, found: dict[bytes, int], fd: int) -> None:
    """A directory that replaced another one of its name: what was in that and is not here any more is deleted."""
    for root in below:
        try:
            old = root.open_directory(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            gone = set(map(os.fsencode, os.listdir(old))) - set(map(os.fsencode, os.listdir(fd)))
        finally:
            os.close(old)
        for name in gone:
            _note(found, path, path + b"/" + name, 2)


def _described(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns


def _is_empty(fd: int, name: bytes, status: os.stat_result) -> bool:
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size == 0
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        return not os.listdir(inner)
    finally:
        os.close(inner)


def _find(root: Root, path: str) -> tuple[int, bytes, os.stat_result] | None:
    """(descriptor of the directory, name in it, status); the descriptor is the caller's."""
    raw = os.fsencode(path)
    follow = raw.endswith((b"/", b"/.")) or raw in (b".", b"")
    # `..` is taken away by words, as docker's client does it, before any link is looked at.
    cleaned = clamp_path(raw)
    try:
        if follow or not cleaned:
            directory = root.open_directory(cleaned)
            return directory, b".", os.fstat(directory)
        parent, _, name = cleaned.rpartition(b"/")
        directory = root.open_directory(parent)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return directory, name, os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        os.close(directory)
        return None


def _go_mode(mode: int) -> int:
    """A mode as Go's os.FileMode, which the API speaks."""
    kinds = {
        stat.S_IFDIR: _GO_DIRECTORY,
        stat.S_IFLNK: _GO_SYMLINK,
        stat.S_IFBLK: _GO_DEVICE,
        stat.S_IFCHR: _GO_DEVICE | _GO_CHARACTER,
        stat.S_IFIFO: _GO_FIFO,
        stat.S_IFSOCK: _GO_SOCKET,
    }
    special = ((stat.S_ISUID, _GO_SETUID), (stat.S_ISGID, _GO_SETGID), (stat.S_ISVTX, _GO_STICKY))
    bits = sum(bit for flag, bit in special if mode & flag)
    return stat.S_IMODE(mode) & 0o777 | bits | kinds.get(stat.S_IFMT(mode), 0)


@contextmanager
def _opened(view: View, path: str, *, writing: bool = False) -> Iterator[tuple[Root, str]]:
    """A root of the container as it sees it, and where in it `path` lies."""
    if view.get("pid"):
        with Root.open(f"/proc/{view['pid']}/root") as root:
            if view.get("pid_start") and _start_of(view["pid"]) != view["pid_start"]:
                raise RuntimeFailure("the container has just ended", resolution="try again")
            yield root, path
        return
    if "places" in view:
        base, inner = _translated(view, path, writing=writing)
        # What is bound into it is the user's own, and stays as closed as the user left it.
        opened = _opened_up if base == view["root"] else lambda root, path: nullcontext()
        with Root.open(base) as root, opened(root, clamp_path(os.fsencode(inner))):
            yield root, inner
        return
    with _mounted(view) as root:
        yield root, path


def _translated(view: View, path: str, *, writing: bool) -> tuple[str, str]:
    """(directory of this machine, path in it) of a path of a container that only sees paths translated.

    A link that leads from one place into another is not followed there: it ends at the place's own root."""
    cleaned = "/" + os.fsdecode(clamp_path(os.fsencode(path)))
    around = [place for place in view["places"] if f"{cleaned}/".startswith(f"{place['destination'].rstrip('/')}/")]
    place = max(around, key=lambda each: len(each["destination"]), default={"destination": "/", "source": view["root"]})
    if writing and not place.get("rw", True):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    inner = cleaned[len(place["destination"].rstrip("/")) :] or "/"
    if os.path.isdir(place["source"]):
        # What the end of a name says (a directory is meant) stays.
        return place["source"], inner + ("/" if path.endswith(("/", "/.")) else "")
    return os.path.dirname(place["source"]), "/" + os.path.basename(place["source"]) + inner.rstrip("/")


@contextmanager
def _opened_up(root: Root, path: bytes) -> Iterator[None]:
    """The directories on the way to `path`, and it, opened up for as long as this takes: without privileges a mode
    binds also the owner, who in the container is root (path_resolution(7))."""
    opened: list[tuple[int, int]] = []
    parts = path.split(b"/") if path and os.geteuid() else []
    try:
        for count in range(len(parts) + 1):
            try:
                fd = open_in_root(root.fd, b"/".join(parts[:count]), os.O_PATH | os.O_CLOEXEC)
            except OSError:
                break  # who goes there says what is wrong
            mode, name = os.fstat(fd).st_mode, f"/proc/self/fd/{fd}"
            if stat.S_ISDIR(mode) and not os.access(name, os.R_OK | os.W_OK | os.X_OK):
                opened.append((fd, stat.S_IMODE(mode)))
                os.chmod(name, stat.S_IMODE(mode) | 0o700)
            else:
                os.close(fd)
        yield
    finally:
        for fd, mode in reversed(opened):
            os.chmod(f"/proc/self/fd/{fd}", mode)
            os.close(fd)


def _start_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rsplit(b")", 1)[1].split()[19])
    except OSError:
        return 0


@contextmanager
def _mounted(view: View) -> Iterator[Root]:
    """The root of a stopped container, mounted with its volumes; gone again at the end, mount points included."""
    rootfs, base = view["rootfs"], view["base"]
    lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    target = f"{base}/merged"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an upper directory must not be mounted twice
        os.makedirs(target, 0o755, exist_ok=True)
        _mount_root(rootfs, target)
        root = Root.open(target)
        made: list[str] = []
        done: list[str] = []
        try:
            for entry in view.get("mounts") or ():
                _bind(root.fd, entry, made)
                done.append(entry["destination"])
            with root:
                yield root
        finally:
            syscalls.umount2(target, mounts.MNT_DETACH)
            _tidy(rootfs, target, made)
    finally:
        os.close(lock)


def _mount_root(rootfs: dict[str, Any], target: str) -> None:
    if rootfs["kind"] != "overlay":
        mounts.mount(rootfs["path"], target, None, mounts.MS_BIND | mounts.MS_REC)
        return
    for path in (rootfs["upper"], rootfs["work"]):
        os.makedirs(path, 0o755, exist_ok=True)
    mounts.mount_overlay(
        target, list(rootfs["lower"]), rootfs["upper"], rootfs["work"], userxattr=bool(rootfs.get("userxattr"))
    )


def _bind(root_fd: int, entry: dict[str, Any], made: list[str]) -> None:
    source = os.open(entry["source"], os.O_PATH | os.O_CLOEXEC)
    try:
        fd = mounts.ensure_in_root(root_fd, entry["destination"], directory=mounts.is_directory(source), created=made)
        try:
            mounts.mount(f"/proc/self/fd/{source}", f"/proc/self/fd/{fd}", None, mounts.MS_BIND | mounts.MS_REC)
        finally:
            os.close(fd)
        if not entry.get("rw", True):
            fd = mounts.open_in_root(root_fd, entry["destination"])
            try:
                mounts.remount_readonly(f"/proc/self/fd/{fd}", recursive=True)
            finally:
                os.close(fd)
    finally:
        os.close(source)


def _tidy(rootfs: dict[str, Any], target: str, made: list[str]) -> None:
    upper = rootfs.get("upper") or rootfs.get("path")
    for path in reversed(made):
        name = f"{upper}{path}"
        try:
            os.rmdir(name) if os.path.isdir(name) and not os.path.islink(name) else os.unlink(name)
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    for path in (f"{rootfs.get('work')}/work", target):
        try:
            os.rmdir(path)
        except OSError:
            pass
