"""Which files a COPY or ADD takes: sources with wildcards, found in a tree, each with a digest of its content.

The same scan serves the build context (in the caller's process) and other stages (in the worker, on their merged
layers), so that both give the cache the same kind of key: names, types, modes, owners, link targets, content; never
times. A `Selection` is plain JSON. Source: Dockerfile reference, COPY; Go's path/filepath.Match for wildcards.
"""

from __future__ import annotations

import errno
import hashlib
import operator
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ..errors import LayerError
from ..linux.ownfiles import open_own
from .pack import is_whiteout
from .rootfd import Root, clamp_path, open_in_root

_MAX_LINKS = 40
_NAME = operator.attrgetter("name")
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

# path -> digest of content; `status` lets a caller remember it
Digester = Callable[[int, str, str, os.stat_result], str]


class Filter(Protocol):
    """What leaves paths out: `.dockerignore` and --exclude. `child` is asked from the top down."""

    def child(self, path: str, parent: Sequence[bool] = ()) -> tuple[bool, tuple[bool, ...]]: ...

    def can_skip(self, directory: str) -> bool: ...


class Nothing:
    """The filter that leaves nothing out."""

    def child(self, path: str, parent: Sequence[bool] = ()) -> tuple[bool, tuple[bool, ...]]:
        return False, ()

    def can_skip(self, directory: str) -> bool:
        return True


def select(
    root: Root,
    patterns: Sequence[str],
    *,
    leave_out: Filter | None = None,
    exclude: Filter | None = None,
    owners: bool = False,
    parents: bool = False,
    digest: Digester | None = None,
) -> list[dict[str, Any]]:
    """Find `patterns` (relative to the root) and everything below what they match.

    Each found source is {"pattern", "path" (real, inside the root), "name" (last name as asked), "entries"}; entries
    are [name below the source ("" for itself), type letter `d f l p c b`, mode, size, mtime_ns, digest], byte order.
    `leave_out` sees paths from the root, `exclude` paths below the source (a file that is a source: its name). With
    `owners` they enter the digests. A pattern with wildcards may match nothing in a directory that is there. Raises
    FileNotFoundError for what is not.

    With `parents` (COPY --parents) `name` is the whole path, less what stands before a `/./` in the pattern, `**` in a
    pattern stands for any directories, and "parents" lists the directories above: [name, mode, mtime_ns, real path].
    """
    scan = _Scan(root, leave_out or Nothing(), exclude or Nothing(), owners, digest or content_digest)
    found = []
    for pattern in patterns:
        wild = has_wildcards(pattern)
        clean = clamp_path(os.fsencode(pattern))
        matched = sorted(_glob(root, clean, deep=parents)) if wild else [clean]
        if wild and not matched and not parents:
            _need_directory(root, pattern)
        for path in _without_nested(root, matched) if parents else matched:
            source = scan.source(path)
            if source is not None and scan.leaves_out_file(source):
                continue
            if source is not None:
                above = _parents(root, pattern, path) if parents else {}
                found.append({"pattern": pattern, **source, **above})
            elif not wild:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), pattern)
    return found


def _need_directory(root: Root, pattern: str) -> None:
    """Of a pattern that matches nothing, as much as has no wildcards has to be there. Raises FileNotFoundError."""
    fixed = []
    for part in pattern.split("/"):
        if has_wildcards(part):
            break
        fixed.append(part)
    folder = "/".join(fixed)
    if follow(root, clamp_path(os.fsencode(folder))) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)


def selection_digest(sources: Iterable[dict[str, Any]]) -> str:
    """One digest of what would be copied, times left out."""
    sha = hashlib.sha256()
    for source in sources:
        sha.update(f"{source['name']}\0".encode("utf-8", "surrogateescape"))
        for name, mode, *_ in source.get("parents") or ():
            sha.update(f"{name}\0{mode:o}\0".encode("utf-8", "surrogateescape"))
        text = "".join(f"{name}\0{kind}\0{mode:o}\0{digest}\0" for name, kind, mode, _, _, digest in source["entries"])
        sha.update(text.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


class _Scan:
    def __init__(self, root: Root, leave_out: Filter, exclude: Filter, owners: bool, digest: Digester) -> None:  # noqa: FBT001
        self._root = root
        self._leave_out = leave_out
        self._exclude = exclude
        self._owners = owners
        self._digest = digest
        self._takes_all = isinstance(leave_out, Nothing) and isinstance(exclude, Nothing)

    def source(self, path: bytes) -> dict[str, Any] | None:
        real = follow(self._root, path)
        if real is None:
            return None
        text = os.fsdecode(real)
        ignored, state = self._state(text)
        status = self._root.lstat(real)
        if status is None or is_whiteout(status):
            return None
        entries: list[list[Any]] = []
        if stat.S_ISDIR(status.st_mode):
            if ignored and self._leave_out.can_skip(text):
                return None
            fd = self._root.open_directory(real)
            try:
                self._directory(fd, text, "", state, (), entries)
            finally:
                os.close(fd)
            if ignored and not entries:
                return None
            entries.insert(0, self._entry(-1, "", "", text, status))
        else:
            if ignored:
                return None
            fd = self._root.open_directory(real.rpartition(b"/")[0])
            try:
                entries.append(self._entry(fd, text.rpartition("/")[2], "", text, status))
            finally:
                os.close(fd)
        name = os.fsdecode(path.rpartition(b"/")[2])
        return {"path": text, "name": name, "entries": entries}

    def leaves_out_file(self, source: dict[str, Any]) -> bool:
        """Whether `exclude` names a source that is a single file."""
        name = posixpath.basename(source["name"])
        return bool(name) and source["entries"][0][1] != "d" and self._exclude.child(name)[0]

    def _state(self, path: str) -> tuple[bool, tuple[bool, ...]]:
        """What the ignore file says of `path`, and what `child` needs for the names below it."""
        ignored = False
        state: tuple[bool, ...] = ()
        if path:
            parts = path.split("/")
            for count in range(1, len(parts) + 1):
                ignored, state = self._leave_out.child("/".join(parts[:count]), state)
        return ignored, state

    def _directory(
        self,
        fd: int,
        path: str,
        below: str,
        state: tuple[bool, ...],
        excluded: tuple[bool, ...],
        entries: list[list[Any]],
    ) -> None:
        # What a cached build spends its time on, twice for each file: so no bytes and no calls that can be spared.
        with os.scandir(fd) as found:
            listed = sorted(found, key=_NAME)
        if not all(entry.name.isascii() for entry in listed):
            listed.sort(key=lambda entry: os.fsencode(entry.name))
        path, below = path and f"{path}/", below and f"{below}/"
        for entry in listed:
            name = entry.name
            full, relative = path + name, below + name
            ignored, left_out = False, False
            inner, outer = state, excluded
            if not self._takes_all:
                ignored, inner = self._leave_out.child(full, state)
                left_out, outer = self._exclude.child(relative, excluded)
            directory = entry.is_dir(follow_symlinks=False)
            if (ignored or left_out) and not (
                directory
                and (not ignored or not self._leave_out.can_skip(full))
                and (not left_out or not self._exclude.can_skip(relative))
            ):
                continue
            status = entry.stat(follow_symlinks=False)
            if not directory:
                if stat.S_ISREG(status.st_mode) or not (is_whiteout(status) or stat.S_ISSOCK(status.st_mode)):
                    entries.append(self._entry(fd, name, relative, full, status))
                continue
            place = len(entries)
            inside = os.open(name, _FLAGS | os.O_DIRECTORY, dir_fd=fd)
            try:
                self._directory(inside, full, relative, inner, outer, entries)
            finally:
                os.close(inside)
            if len(entries) > place or not (ignored or left_out):
                entries.insert(place, self._entry(-1, "", relative, full, status))

    def _entry(self, fd: int, name: str, relative: str, full: str, status: os.stat_result) -> list[Any]:
        mode = status.st_mode
        if stat.S_ISREG(mode):
            kind, digest = "f", self._digest(fd, name, full, status)
        elif stat.S_ISLNK(mode):
            kind, digest = "l", os.readlink(name, dir_fd=fd)
        elif stat.S_ISDIR(mode):
            kind, digest = "d", ""
        else:
            kind = "p" if stat.S_ISFIFO(mode) else "c" if stat.S_ISCHR(mode) else "b"
            digest = str(status.st_rdev)
        if self._owners:
            digest = f"{status.st_uid}:{status.st_gid}:{digest}"
        return [relative, kind, stat.S_IMODE(mode), status.st_size, status.st_mtime_ns, digest]


def content_digest(dir_fd: int, name: str, path: str, status: os.stat_result) -> str:
    """sha256 of a regular file's bytes."""
    return _digest(os.open(name, _FLAGS, dir_fd=dir_fd), status)


def stored_digest(dir_fd: int, name: str, path: str, status: os.stat_result) -> str:
    """The same of a file of our store, whatever its mode."""
    return _digest(open_own(name, _FLAGS, dir_fd), status)


def _digest(fd: int, status: os.stat_result) -> str:
    try:
        if status.st_size <= 1 << 16:
            return hashlib.sha256(os.read(fd, (1 << 16) + 1)).hexdigest()
        with open(fd, "rb", buffering=0, closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(fd)


def follow(root: Root, path: bytes, *, missing: bool = False) -> bytes | None:
    """The real path inside the root, the last component followed too; None when there is nothing, unless `missing`:
    then what is not there yet stays as it is written, behind the links that lead to it.

    Raises LayerError for a loop of links.
    """
    done: list[bytes] = []
    waiting = path.split(b"/") if path else []
    links = 0
    while waiting:
        part = waiting.pop(0)
        if part in (b"", b"."):
            continue
        if part == b"..":
            del done[-1:]
            continue
        here = b"/".join([*done, part])
        status = root.lstat(here)
        if status is None and not missing:
            return None
        if status is None or not stat.S_ISLNK(status.st_mode):
            done.append(part)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise LayerError(f"too many symbolic links: {os.fsdecode(path)}")
        parent = open_in_root(root.fd, b"/".join(done), os.O_PATH | os.O_DIRECTORY)
        try:
            target = os.readlink(part, dir_fd=parent)
        finally:
            os.close(parent)
        if target.startswith(b"/"):
            done = []
        waiting = target.split(b"/") + waiting
    return b"/".join(done)


def has_wildcards(pattern: str) -> bool:
    return any(character in pattern for character in "*?[\\")


def _without_nested(root: Root, paths: Sequence[bytes]) -> list[bytes]:
    """`paths` (sorted) less those below a directory that is among them: it brings them along."""
    kept: list[bytes] = []
    for path in paths:
        if not any(path.startswith(above + b"/") or not above for above in kept):
            kept.append(path)
    return kept


def _parents(root: Root, pattern: str, path: bytes) -> dict[str, Any]:
    before, pivot, _ = pattern.partition("/./")
    skipped = len(clamp_path(os.fsencode(before)).split(b"/")) if pivot and before.strip("/.") else 0
    parts = path.split(b"/") if path else []
    above = []
    for count in range(skipped + 1, len(parts)):
        real = follow(root, b"/".join(parts[:count]))
        status = root.lstat(real) if real is not None else None
        if real is not None and status is not None:
            name = os.fsdecode(b"/".join(parts[skipped:count]))
            above.append([name, stat.S_IMODE(status.st_mode), status.st_mtime_ns, os.fsdecode(real)])
    return {"name": os.fsdecode(b"/".join(parts[skipped:])), "parents": above}


def _directories_below(root: Root, path: bytes) -> list[bytes]:
    found, waiting = [], [path]
    while waiting:
        here = waiting.pop()
        found.append(here)
        try:
            fd = root.open_directory(here)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            with os.scandir(fd) as entries:
                names = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        finally:
            os.close(fd)
        waiting += [here + b"/" + name if here else name for name in names]
    return found


def _glob(root: Root, pattern: bytes, *, deep: bool = False) -> list[bytes]:
    """Paths that match, component by component; wildcards never cross a slash and do match dot files.

    With `deep` a component `**` stands for any number of directories, and as the last one for all below.
    """
    found = [b""]
    parts = pattern.split(b"/")
    for index, part in enumerate(parts):
        text = os.fsdecode(part)
        if deep and text == "**":
            found = list(dict.fromkeys(below for path in found for below in _directories_below(root, path)))
            if index < len(parts) - 1:
                continue
            text = "*"
        if not has_wildcards(text):
            found = [path + b"/" + part if path else part for path in found]
            continue
        test = re.compile(_translate(text), re.DOTALL)
        wider = []
        for path in found:
            try:
                fd = root.open_directory(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                names = [name for name in os.listdir(fd) if test.fullmatch(name)]
            finally:
                os.close(fd)
            wider += [(path + b"/" if path else b"") + os.fsencode(name) for name in names]
        found = wider
    return [path for path in found if root.lstat(path) is not None]


def _translate(pattern: str) -> str:
    """One component of Go's filepath.Match as a regular expression. Raises LayerError for a malformed one."""
    out, pos = [], 0
    while pos < len(pattern):
        character = pattern[pos]
        pos += 1
        if character == "*":
            out.append(".*")
        elif character == "?":
            out.append(".")
        elif character == "\\" and pos < len(pattern):
            out.append(re.escape(pattern[pos]))
            pos += 1
        elif character == "[":
            end = pattern.find("]", pos + 2 if pattern[pos : pos + 1] == "^" else pos + 1)
            if end < 0:
                raise LayerError(
                    f"syntax error in pattern: {pattern}", resolution="escape a literal [ with a backslash"
                )
            body = pattern[pos:end]
            negated = body.startswith("^")
            inner = re.sub(r"([\[&~|\]])", r"\\\1", body[1:] if negated else body)
            out.append(f"[{'^' if negated else ''}{inner}]")
            pos = end + 1
        else:
            out.append(re.escape(character))
    return "".join(out)
