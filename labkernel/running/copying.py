"""`docker cp`: what it copies to where, in both directions, for directories, trailing slashes, links and tars.

The rules are those of docker's client, where a name's end counts: `DIR/` must be a directory, `DIR/.` means what lies
in it, and a link is copied as a link unless it is followed (-L). Source: Docker documentation, "docker cp".
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LabkernelError, UsageError
from .files import GO_DIRECTORY, GO_SYMLINK, get_archive, look, put_archive

if TYPE_CHECKING:
    from .container import Container

_CHUNK = 1 << 18


class Target(NamedTuple):
    """Where something is to go: `exists`, and whether as a directory."""

    path: str
    exists: bool
    directory: bool


def copy_from(container: Container, path: str, target: str, *, follow: bool = False) -> int:
    """Copy `path` of the container to the local `target` (absolute); owners become this user. Returns its size.

    Raises NoSuchFile, UsageError (docker's words)."""
    from ..oci.containerfs import extract
    from ..oci.rootfd import Root

    parent = os.path.dirname(_cleaned(target))
    if not os.path.isdir(parent):
        raise UsageError(f'invalid output path: directory "{parent}" does not exist', exit_code=1)
    source, name = path, _base(path)
    if follow:
        source = _followed(container, path)
    found = look(container, source)
    directory = bool(found and found["mode"] & GO_DIRECTORY)
    there = Target(target, os.path.exists(target), os.path.isdir(target))
    folder, name = _placed(name, there, directory=directory)
    chunks, _ = get_archive(container, source, _CHUNK, name)
    with Root.open(folder) as root, _piped(chunks) as fd:
        done = extract(root, b"", fd, owner=(os.geteuid(), os.getegid()))
    return int(done["size_bytes"])


def tar_from(container: Container, path: str, *, follow: bool = False) -> Iterator[bytes]:
    """`cp CONTAINER:PATH -`: a tar of it."""
    source = _followed(container, path) if follow else path
    return get_archive(container, source, _CHUNK, _base(path))[0]


def copy_to(container: Container, source: str, path: str, *, follow: bool = False) -> int:
    """Copy the local `source` (absolute) to `path` of the container; owners stay. Returns its size."""
    from ..oci.containerfs import pack

    name = _base(source)
    local = os.path.realpath(source) if follow else _cleaned(source)
    through = source.endswith(("/", "/."))
    try:
        status = os.stat(local) if through else os.lstat(local)
    except OSError as err:
        raise UsageError(f"lstat {_cleaned(source)}: {(err.strerror or '').lower()}", exit_code=1) from None
    if through and not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{_cleaned(source)}: not a directory", exit_code=1)
    directory = stat.S_ISDIR(status.st_mode)
    folder, name = _placed(name, find_target(container, path), directory=directory)
    sizes: list[int] = []

    def write(fd: int) -> None:
        if directory:
            parent, base = os.open(local, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), b"."
        else:
            parent = os.open(os.path.dirname(local), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            base = os.fsencode(os.path.basename(local))
        try:
            sizes.append(pack(parent, base, status, name, fd)["size_bytes"])
        finally:
            os.close(parent)

    with _written(write) as file:
        put_archive(container, folder, file)
    return sizes[0] if sizes else 0


def tar_to(container: Container, data: Any, path: str, *, shown: str) -> None:
    """`cp - CONTAINER:PATH`: unpack a tar over a directory that is there. `shown` is how the user wrote the target."""
    there = find_target(container, path)
    if not there.directory:
        raise UsageError(f'destination "{shown}" must be a directory', exit_code=1)
    put_archive(container, there.path, data)


def find_target(container: Container, path: str) -> Target:
    """What is at the place in the container; a link at the end is followed once, as docker's client does."""
    found = look(container, path)
    if found is not None and found["mode"] & GO_SYMLINK:
        path = os.path.join(os.path.dirname(_cleaned(path)), found["linkTarget"])
        found = look(container, path)
    return Target(path, found is not None, bool(found and found["mode"] & GO_DIRECTORY))


def _followed(container: Container, path: str) -> str:
    found = look(container, path)
    if found is None or not found["mode"] & GO_SYMLINK:
        return path
    return os.path.join(os.path.dirname(_cleaned(path)), found["linkTarget"])


def _placed(name: str, there: Target, *, directory: bool) -> tuple[str, str]:
    """(directory to unpack in, what the first member is called there)."""
    if there.exists and there.directory:
        return there.path, name
    if there.exists and directory:
        raise UsageError("cannot copy directory", exit_code=1)
    if not there.exists and not directory and there.path.endswith(("/", "/.")):
        raise UsageError("no such directory", exit_code=1)
    cleaned = _cleaned(there.path)
    return os.path.dirname(cleaned), os.path.basename(cleaned)


def _cleaned(path: str) -> str:
    return os.path.normpath(path)


def _base(path: str) -> str:
    """What a copy of it is called: the last part, `.` for `DIR/.` and for the root."""
    return "." if path.endswith("/.") or path == "." else os.path.basename(_cleaned(path)) or "."


@contextmanager
def _piped(chunks: Iterator[bytes]) -> Iterator[int]:
    """A descriptor to read the chunks from; what went wrong in making them is raised at the end."""
    errors: list[BaseException] = []

    def write(fd: int) -> None:
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(fd, view) :]
        except BaseException as err:
            errors.append(err)
            raise

    with _written(write) as file:
        try:
            yield file.fileno()
        except LabkernelError:
            if errors and isinstance(errors[0], LabkernelError):
                raise errors[0] from None  # the tar ended early because of that
            raise
    if errors and not isinstance(errors[0], BrokenPipeError):
        raise errors[0]


@contextmanager
def _written(write: Callable[[int], None]) -> Iterator[Any]:
    """A file to read what `write(descriptor)` writes meanwhile, in a thread."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            write(writing)
        except BaseException as err:
            errors.append(err)
        finally:
            os.close(writing)

    thread = threading.Thread(target=work, name="labkernel-cp", daemon=True)
    thread.start()
    try:
        with os.fdopen(reading, "rb") as file:
            yield file
    finally:
        thread.join()
    if errors and not isinstance(errors[0], BrokenPipeError):
        raise errors[0]
