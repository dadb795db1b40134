"""Layers on disk: apply a blob, turn an overlay upper directory into a blob, flatten several into one tar.

These functions are tasks: the worker runs them inside the driver's namespaces (as root there), with JSON arguments and
results. An unpacked layer is an overlay lower directory: whiteouts are character devices 0:0, opaque directories carry
an xattr. Unpacked layers are a cache of the blobs, so they are not fsynced unless asked; blobs are made durable by
whoever puts them into the store. Left out: mounting, the store's tables.

Sources: OCI image-spec layer.md; kernel Documentation filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from isal import isal_zlib  # noqa: F401 -- here, so that the worker has it before it forks a task's child

from ..errors import LayerError
from ..linux.trees import remove_tree
from .extract import Extractor
from .notes import read_notes
from .pack import Fill, Packer, raise_limits
from .rootfd import Root
from .tarstream import BlobStream, FdSink, GrowingFile, LayerWriter, TarWriter, members

MAX_LAYER_BYTES = 1 << 38
MAX_LAYER_MEMBERS = 5_000_000

Report = Callable[[dict[str, Any]], None]


def apply_layer(
    *,
    blob: str = "",
    target: str,
    diff_id: str,
    media_type: str = "",
    userxattr: bool = False,
    single_id: bool = False,
    lowers: Sequence[str] = (),
    max_bytes: int = MAX_LAYER_BYTES,
    max_members: int = MAX_LAYER_MEMBERS,
    sync: bool = False,
    report: Report | None = None,
    fds: Sequence[int] = (),
) -> dict[str, Any]:
    """Unpack the layer blob at path `blob` to the directory `target`; all or nothing.

    With `fds` it is a blob that is still being written: fds[0] its file, fds[1] the pipe of a `GrowingFile`. Then the
    caller verifies the blob, and runs `adopt_attributes` with "undescribed" once the layers below are there.

    An empty directory is filled in place, and emptied again on failure. When there is none, the layer is unpacked
    beside it and renamed. The diff ID of what was read must be `diff_id`. gzip, zstd and plain tars are told apart by
    their bytes; `single_id` is not needed, since an owner the kernel refuses is recorded. `lowers` (directories, top
    first) give the attributes of parent directories that the tar does not hold. `report` gets {"bytes": uncompressed so
    far} about every 8 MB.

    Returns {"diff_id", "size_bytes" (of regular files), "members", "warnings", "undescribed" (directories)}.
    Raises LayerError (broken, hostile or too large; nothing is left) and OSError.
    """
    os.umask(0o022)
    in_place = os.path.isdir(target)
    if in_place and os.listdir(target):
        raise LayerError(f"cannot unpack a layer into {target}: it is not empty")
    new = target if in_place else _new_directory(os.path.dirname(target), os.path.basename(target))
    try:
        with _stream_of(blob, fds, max_bytes) as stream:
            result = _unpack(stream, new, userxattr, lowers, max_bytes, max_members, report)
        if result["diff_id"] != diff_id:
            raise LayerError(
                f"layer unpacks to {result['diff_id']}, its config says {diff_id}",
                resolution="the image is damaged: fetch or build it again",
            )
        if sync:
            _sync(new)
        if not in_place:
            _move_in(new, target)
    except BaseException:
        discard(paths=[f"{new}/{name}" for name in os.listdir(new)] if in_place else [new])
        raise
    return result


@contextmanager
def _stream_of(blob: str, fds: Sequence[int], max_bytes: int) -> Iterator[BlobStream]:
    if fds:
        yield BlobStream(fds[0], max_bytes=max_bytes, read=GrowingFile(fds[0], fds[1]).read)
        return
    blob_fd = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield BlobStream(blob_fd, max_bytes=max_bytes)
    finally:
        os.close(blob_fd)


def adopt_attributes(*, target: str, paths: Sequence[str], lowers: Sequence[str]) -> None:
    """Give directories of the unpacked layer `target` owner, mode and time that they have in `lowers` (top first)."""
    with Root.open(target) as root:
        Extractor(root, whiteouts=True, lowers=lowers).adopt([os.fsencode(path) for path in paths])


def _unpack(
    stream: BlobStream,
    directory: str,
    userxattr: bool,  # noqa: FBT001
    lowers: Sequence[str],
    max_bytes: int,
    max_members: int,
    report: Report | None,
) -> dict[str, Any]:
    opaque = "user.overlay.opaque" if userxattr else "trusted.overlay.opaque"
    with Root.open(directory) as root:
        out = Extractor(root, whiteouts=True, opaque_xattr=opaque, lowers=lowers, max_bytes=max_bytes)
        count, told = 0, 0
        for member in members(stream, max_members=max_members):
            out.add(member, stream)
            count += 1
            if report is not None and stream.tell() - told > 1 << 23:
                told = stream.tell()
                report({"bytes": told})
        found, _ = stream.finish()
        out.finish()
    return {
        "diff_id": found,
        "size_bytes": out.size_bytes,
        "members": count,
        "warnings": out.warnings,
        "undescribed": [os.fsdecode(path) for path in out.undescribed],
    }


def diff_layer(
    *,
    upper: str,
    blob_tmp: str,
    lowers: Sequence[str] = (),
    stubs: Sequence[str] = (),
    layers: str | None = None,
    compress: bool = True,
    clamp_s: int | None = None,
    userxattr: bool = False,
    single_id: bool = False,
    fill: Mapping[bytes, Fill] | None = None,
    owners: str = "",
) -> dict[str, Any]:
    """Write what the overlay upper directory `upper` holds as a layer blob to the path `blob_tmp`.

    One pass: tar -> diff ID -> gzip -> digest. Byte order of names, so equal directories give equal layers. `lowers`
    are the directories it was mounted over, top first: when owner or mode of the root directory differ from there, the
    layer says so; and directories which overlay marked opaque as an optimisation, with nothing below to hide, lose
    the mark, also on disk. `stubs` are paths made as mount points; still empty, they are removed first. With `layers`
    (the store's directory of unpacked layers) `upper` is renamed to layers/<diff ID>: it becomes the layer. Directories
    in `fill` are empty yet: they are filled while they are packed (fresh.py). `owners` is a path of notes about owners
    that the disk does not have (runtime/owners.py); it need not be there.

    Returns {"diff_id", "digest", "media_type", "blob_bytes", "tar_bytes", "size_bytes", "members"}.
    Raises LayerError, OSError; `blob_tmp` is then gone.
    """
    raise_limits()
    _remove_stubs(upper, stubs)
    if owners:
        read_notes(owners, upper, lowers)
    fd = os.open(blob_tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        writer = LayerWriter(fd, compress=compress)
        tar = TarWriter(writer)
        packer = Packer(tar, whiteouts=True, clamp_s=clamp_s)
        packer.fill.update(fill or {})
        _pack_upper(packer, upper, lowers)
        tar.close()
        diff_id, digest = writer.finish()
    except BaseException:
        discard(paths=[blob_tmp])
        raise
    finally:
        os.close(fd)
    if layers is not None:
        _move_in(upper, os.path.join(layers, diff_id.partition(":")[2]))
    return {
        "diff_id": diff_id,
        "digest": digest,
        "media_type": f"application/vnd.oci.image.layer.v1.tar{'+gzip' if compress else ''}",
        "blob_bytes": writer.blob_size,
        "tar_bytes": writer.size,
        "size_bytes": packer.size_bytes,
        "members": packer.members,
    }


def _pack_upper(packer: Packer, upper: str, lowers: Sequence[str]) -> None:
    with Root.open(upper) as root, ExitStack() as stack:
        if lowers and _differs(root.fd, lowers[0]):
            packer.root(root.fd)
        packer.below = [stack.enter_context(Root.open(path)) for path in lowers] if lowers else None
        packer.tree([root.fd])


def export_tree(
    *,
    lowers: Sequence[str],
    fds: Sequence[int],
    upper: str | None = None,
    userxattr: bool = False,
    single_id: bool = False,
) -> dict[str, Any]:
    """Write the merged file system of `lowers` (top first, `upper` above them) as one plain tar to fds[0].

    Needs no overlay mount. Returns {"members", "size_bytes"}. Raises OSError (EPIPE when the reader leaves).
    """
    raise_limits()
    sink = FdSink(fds[0])
    tar = TarWriter(sink)
    packer = Packer(tar, whiteouts=False)
    opened: list[int] = []
    try:
        for path in ([upper] if upper else []) + list(lowers):
            opened.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        if opened:
            packer.tree(opened)
        tar.close()
        sink.flush()
    finally:
        for fd in opened:
            os.close(fd)
    return {"members": packer.members, "size_bytes": packer.size_bytes}


def discard(*, paths: Sequence[str]) -> None:
    """Remove trees and files, whoever owns them inside the namespaces; missing ones are fine. Raises OSError."""
    for path in paths:
        remove_tree(path)


def move(*, source: str, target: str) -> None:
    """rename(2) for a directory that is another user's outside the namespaces: that needs write permission on it."""
    os.rename(source, target)


def _new_directory(parent: str, base: str) -> str:
    path = os.path.join(parent, f"{base}.new-{secrets.token_hex(6)}")
    os.mkdir(path, 0o755)
    os.chmod(path, 0o755)
    return path


def _move_in(source: str, target: str) -> None:
    """Rename to a directory that must hold the same content if it exists; then `source` is discarded."""
    try:
        os.rename(source, target)
    except OSError:
        if not os.path.isdir(target):
            raise
        if os.path.isdir(source):
            discard(paths=[source])


def _sync(path: str) -> None:
    import ctypes

    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(fd)


def _differs(fd: int, lower: str) -> bool:
    ours, theirs = os.fstat(fd), os.stat(lower)
    return (ours.st_mode, ours.st_uid, ours.st_gid) != (theirs.st_mode, theirs.st_uid, theirs.st_gid)


def _remove_stubs(upper: str, stubs: Sequence[str]) -> None:
    """Mount points go again, deepest first, when nobody put anything there."""
    with Root.open(upper) as root:
        for stub in sorted(stubs, reverse=True):
            path = os.fsencode(stub).strip(b"/")
            status = root.lstat(path) if path else None
            if status is None:
                continue
            parent, name = root.parent(path, create=False)
            try:
                if stat.S_ISDIR(status.st_mode):
                    os.rmdir(name, dir_fd=parent)
                elif stat.S_ISREG(status.st_mode) and status.st_size == 0:
                    os.unlink(name, dir_fd=parent)
            except OSError:  # not empty: somebody put something there
                continue
