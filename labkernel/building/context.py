"""The build context: a directory whose files COPY and ADD may take, less what `.dockerignore` leaves out."""

from __future__ import annotations

import difflib
import os
import posixpath
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..dockerfile.ignorefile import IgnoreMatcher
from ..dockerfile.instructions import Add, Copy, Run
from ..errors import BuildError, UsageError, file_of
from ..oci.rootfd import Root, clamp_path
from ..oci.selection import follow, has_wildcards, select
from ..store.blobs import storage_error, temporary_directory
from ..store.database import Database
from ..store.layout import Layout
from .cache import ContextDigests
from .checks import read_ignore
from .result import Trace


class Context:
    """An open context, a context manager. `files` (name -> content) are there beside, and instead of, the directory's.

    Nothing is read before the first COPY. Links inside the directory that lead out of it end at its own root.
    """

    def __init__(
        self,
        directory: Path | None,
        files: Mapping[str, bytes] | None,
        layout: Layout,
        db: Database,
        *,
        ignore: str | None = None,
    ) -> None:
        self._db = db
        self._ignore_text = ignore
        self._layout = layout
        self._files = files or {}
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.directory = directory
        self._beside: Path | None = None
        self._root: Root | None = None
        self._extra: Root | None = None
        self._ignore: IgnoreMatcher | None = None
        self._digests: ContextDigests | None = None
        self.trace = Trace(self.directory, time.time_ns(), repeatable=not files)

    def __enter__(self) -> Context:
        if self._files:
            _check_names(self._files)
            # In the store, whose next opener removes what a killed build left.
            made = self._stack.enter_context(temporary_directory(self._layout, "context"))
            try:
                _write(self._files, made)
            except BaseException:
                self._stack.close()
                raise
            # Beside a directory, which may be a home with all that lies in it, they are a second place to select from.
            if self.directory is None:
                self.directory = self.trace.directory = made
            else:
                self._beside = made
        return self

    def __exit__(self, *_: object) -> None:
        if self._digests is not None:
            self._digests.save()
        for root in (self._root, self._extra):
            if root is not None:
                root.__exit__()
        self._root = self._extra = None
        self._stack.close()

    def ignore_matcher(self) -> IgnoreMatcher | None:
        """What leaves files of the context out; None where nothing does."""
        text = self._ignore_text
        if text is None and self.directory is not None:
            try:
                text = (self.directory / ".dockerignore").read_text(errors="replace")
            except OSError:
                text = ""
        self._ignore_text = text or ""
        return read_ignore(self._ignore_text)

    def descriptors(self) -> list[int]:
        """The open directory and, where there are any, the files beside it, for a task that copies from them; empty
        when nothing has been selected."""
        return [root.fd for root in (self._root, self._extra) if root is not None]

    def select_extra(self, sources: Sequence[str], *, parents: bool = False) -> list[dict[str, Any]]:
        """What COPY takes from the files beside the directory, which go over what is taken from there."""
        with self._lock:
            self._open()
            if self._extra is None:
                return []
            here = [word for word in sources if _is_in(self._extra, word)]
            return select(self._extra, here, parents=parents) if here else []

    def select(
        self,
        step: Copy | Add | Run,
        sources: Sequence[str],
        exclude: IgnoreMatcher | None,
        *,
        parents: bool = False,
    ) -> list[dict[str, Any]]:
        """What `step` takes (see `oci.selection.select`). Raises BuildError in docker's words. Thread-safe."""
        if self.directory is None:
            raise BuildError(
                f"{step.name} failed: this build has no context to take {sources[0]} from",
                resolution="give it a directory, or use COPY --from or a heredoc",
            )
        for source in sources:
            if posixpath.normpath(source.lstrip("/") or ".").split("/")[0] == "..":
                raise BuildError(
                    f"{step.name} failed: forbidden path outside the build context: {source}",
                    resolution="move the file into the context, or choose a context above it",
                )
        try:
            with self._lock:
                root = self._open()
                if self._extra is not None:
                    extra = self._extra
                    sources = [word for word in sources if _is_in(root, word) or not _is_in(extra, word)]
                found = select(
                    root, sources, leave_out=self._ignore, exclude=exclude, parents=parents, digest=self._digests
                )
        except FileNotFoundError as err:
            raise self._missing(step, str(err.filename)) from None
        except OSError as err:
            name = file_of(err) or "a file"
            raise BuildError(f"{step.name} failed: cannot read {name} in the build context: {err.strerror}") from err
        self.trace.taken += [(word, [item for item in found if item["pattern"] == word]) for word in sources]
        return found

    def _open(self) -> Root:
        if self._root is None:
            assert self.directory is not None
            try:
                self._root = Root.open(str(self.directory))
            except OSError as err:
                raise UsageError(f"unable to prepare context: {self.directory}: {err.strerror}") from err
            self._extra = Root.open(str(self._beside)) if self._beside is not None else None
            self._ignore = self.ignore_matcher()
            self._digests = ContextDigests(self._db, str(self.directory))
        return self._root

    def _missing(self, step: Copy | Add | Run, name: str) -> BuildError:
        ignored = self._ignore is not None and self._ignore.ignores(name.strip("/"))
        where = posixpath.dirname(name.strip("/"))
        try:
            names = os.listdir(f"{self.directory}/{where}")
        except OSError:
            names = []
        near = difflib.get_close_matches(posixpath.basename(name), names, 1)
        if ignored:
            hint = "a line of .dockerignore leaves it out"
        elif near:
            hint = f"did you mean {posixpath.join(where, near[0])}?"
        else:
            hint = f"the build context is {self.directory}"
        return BuildError(
            f"{step.name} failed: file not found in build context or excluded by .dockerignore: "
            f"stat {name}: file does not exist",
            resolution=hint,
        )


def _is_in(root: Root, word: str) -> bool:
    """Whether a source is there; one with wildcards may be."""
    return has_wildcards(word) or follow(root, clamp_path(os.fsencode(word))) is not None


def _check_names(files: Mapping[str, bytes]) -> None:
    """Raises UsageError for a name outside the context."""
    for name in files:
        if posixpath.normpath(name).startswith(("/", "..")):
            raise UsageError(f"a file of the build needs a name inside the context: {name}")


def _write(files: Mapping[str, bytes], directory: Path) -> None:
    """Raises StoreError, DiskFull."""
    try:
        for name, data in files.items():
            path = directory / posixpath.normpath(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            os.utime(path, (0, 0))
    except OSError as err:
        raise storage_error("writing the context's files", err) from err
