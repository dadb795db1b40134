"""The root disk of a guest: an ext4 file made from an image's layers with `mke2fs -d`. No root needed, nothing mounted
but an overlay in the private mount namespace of the task.

`make_disk` runs in a child of the worker (`Runtime.task("labkernel.qemu.disk:make_disk", …)`): as root or inside the
user namespace of the rootless driver, so owners are those of the container's view. The file is sparse: its apparent
size is the same for all images of a size class, because the disk's size is part of what a VM template remembers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from labkernel.errors import TaskError, VMError

FORMAT = 2  # changes when the file system made here does: part of the name of a kept disk
SIZE_BYTES = 8 << 30
_SEARCH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # plain users' PATH leaves these out
_TIMEOUT_S = 1800
_Edit = tuple[str, list[str]]
"""A path inside the root and commands of debugfs, in which {} is that path."""
# No journal: the disk is thrown away with the VM, and nothing has to survive a crash.
# uninit_bg lets inode tables stay unwritten: 0.2 MB on disk for a small image instead of 36.
_FEATURES = "^has_journal,^resize_inode,^metadata_csum,^huge_file,uninit_bg"


def find_mke2fs() -> str:
    """The path of mke2fs. Raises VMError with the way to get it."""
    path = shutil.which("mke2fs", path=_SEARCH)
    if path is None:
        raise VMError("mke2fs is missing: the guest's disk cannot be made", resolution="`apt-get install e2fsprogs`")
    return path


def make_disk(
    *,
    lowers: Sequence[str],
    out: str,
    size_bytes: int = SIZE_BYTES,
    userxattr: bool = False,
    owner_xattr: str | None = None,
) -> dict[str, Any]:
    """Write the root file system of `lowers` (overlay lower directories, top first) to the file `out`.

    `owner_xattr` names the attribute in which the intended owner of a file is recorded (`uid:gid`) where the driver
    cannot set it: on the disk the owner is right. Without privileges `lowers` is one tree that is this task's: what its
    modes close to us is opened up there; on the disk they are right, too. The file appears complete or not at all, and
    one task at a time makes it (the caller holds its lock).

    Returns `{"size_bytes": bytes on disk, "warnings": […]}`. Mounts an overlay in the calling
    process's mount namespace when there is more than one layer, so it needs CAP_SYS_ADMIN there for that.
    Raises VMError (no mke2fs, or it failed), DiskFull.
    """
    program = find_mke2fs()
    partial = f"{out}.partial"  # the caller's lock makes it ours: what a killed task left is written over
    try:
        with open(partial, "wb") as file:
            os.truncate(file.fileno(), size_bytes)
        with _merged(lowers, f"{out}.merged", userxattr=userxattr) as source:
            edits = _opened_up(source) if os.geteuid() else []
            edits += _owners(source, owner_xattr) if owner_xattr else []
            _mke2fs(program, source, partial)
        warnings = _edit(partial, edits)
        os.replace(partial, out)
    except OSError as err:
        raise TaskError.from_oserror("make the guest's disk", err) from err
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return {"size_bytes": os.stat(out).st_blocks * 512, "warnings": warnings}


@contextlib.contextmanager
def _merged(lowers: Sequence[str], target: str, *, userxattr: bool) -> Iterator[str]:
    if len(lowers) == 1:
        yield lowers[0]
        return
    from labkernel.linux import mounts

    os.makedirs(target, mode=0o700, exist_ok=True)  # there, and empty, when a task before was killed
    try:
        mounts.mount_overlay(target, list(lowers), None, None, userxattr=userxattr)
        try:
            yield target
        finally:
            mounts.umount2(target, mounts.MNT_DETACH)
    finally:
        os.rmdir(target)


def _opened_up(source: str) -> list[_Edit]:
    """Open up what its mode closes to us; the modes to be written into the file system."""
    found = []
    for directory, names, files in os.walk(source):
        inside = [(os.path.join(directory, name), os.R_OK | os.W_OK | os.X_OK) for name in names]
        inside += [(os.path.join(directory, name), os.R_OK) for name in files]
        for path, flags in inside:
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode) and not os.access(path, flags):
                os.chmod(path, stat.S_IMODE(mode) | flags << 6)
                found.append((path[len(source) :], [f"sif {{}} mode 0{mode:o}"]))
    return found


def _owners(source: str, xattr: str) -> list[_Edit]:
    """How the file system gets to know owners that are only written down. Without any namespace this user's own files
    are root's."""
    found = []
    own = bool(os.geteuid())
    for directory, names, files in os.walk(source):
        for path in [os.path.join(directory, name) for name in (*names, *files)]:
            try:
                uid, gid, *_ = os.getxattr(path, xattr, follow_symlinks=False).split(b":")
                lines = [f"sif {{}} uid {int(uid)}", f"sif {{}} gid {int(gid)}", f"ea_rm {{}} {xattr}"]
            except (OSError, ValueError):
                lines = ["sif {} uid 0", "sif {} gid 0"] if own else []
            if lines:
                found.append((path[len(source) :], lines))
    return found


def _edit(image: str, edits: Sequence[_Edit]) -> list[str]:
    """Carry out edits of the file system; returns warnings. debugfs edits the image itself: no mount, no root."""
    if not edits:
        return []
    program = shutil.which("debugfs", path=_SEARCH)
    if program is None:
        return ["debugfs is missing (e2fsprogs): not all files in the machine have their owners and modes"]
    named = [(path, each) for path, each in edits if not {'"', "\n"} & set(path)]  # debugfs quotes nothing else
    lines = [line.replace("{}", f'"{path}"') for path, each in named for line in each]
    script = "\n".join(lines) + "\n"
    done = subprocess.run(
        [program, "-w", "-f", "-", image], input=script, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode != 0:
        return [f"owners and modes of files could not be set: {done.stderr.strip()[-200:]}"]
    left = len({path for path, _ in edits} - {path for path, _ in named})
    return (
        [f"{left} files with a quote or a line break in their names have other owners in the machine"] if left else []
    )


def _mke2fs(program: str, source: str, out: str) -> None:
    argv = [program, "-q", "-F", "-t", "ext4", "-O", _FEATURES, "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]
    argv += ["-m", "0", "-i", "65536" if _few_files(source) else "16384", "-d", source, out]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as err:
        raise VMError("mke2fs did not end in time") from err
    if done.returncode == 0:
        return
    if "o space left" in done.stderr or "Could not allocate block" in done.stderr:
        raise TaskError.from_oserror("make the guest's disk", OSError(28, "No space left on device"))
    raise VMError("the guest's disk could not be made", details=done.stderr.strip()[-800:])


def _few_files(source: str) -> bool:
    # Inode tables cost time and space; only an image with very many files needs the usual number.
    count = 0
    for _, dirs, files in os.walk(source):
        count += len(dirs) + len(files)
        if count > 60000:
            return False
    return True
