"""COPY and ADD: where their sources come from, and the layer that takes them in.

Sources are the context, other stages and images, URLs, git repositories and heredocs. `plan_transfer` finds and digests
them; the layer is made only when the cache has none. Source: Dockerfile reference, COPY and ADD.
"""

from __future__ import annotations

import fcntl
import posixpath
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..dockerfile import instructions as ins
from ..dockerfile.ignorefile import IgnoreMatcher
from ..dockerfile.parser import Heredoc
from ..dockerfile.variables import expand_heredoc
from ..errors import BuildError
from ..oci.selection import select, selection_digest
from ..store.catalog import LayerInfo
from .cache import SELECTION, digest_of

if TYPE_CHECKING:
    from .steps import StageBuilder

Source = tuple[Any, list[dict[str, Any]], bool]  # (index into the descriptors or layers, selection, from elsewhere)
_MANY_FILES = 5000


class LayerPlan(Struct):
    """A layer that a step wants: words for history and cache, inputs by name, and how it is made. `details` gives the
    inputs in parts, which only a miss asks for, so that it can name the one that changed."""

    message: str
    text: str
    inputs: dict[str, str]
    make: Callable[[], tuple[LayerInfo, int, list[str]]]
    linked: bool = False
    details: Callable[[], dict[str, str]] = dict


def plan_transfer(step: ins.Copy | ins.Add, stage: StageBuilder, stack: ExitStack) -> LayerPlan:
    """Find what `step` takes. What was fetched for it stays until `stack` ends. Raises BuildError, LayerError."""
    return _Transfer(step, stage, stack).plan()


class _Transfer:
    def __init__(self, step: ins.Copy | ins.Add, stage: StageBuilder, stack: ExitStack) -> None:
        self._step = step
        self._stage = stage
        self._stack = stack
        self._fds: list[int] = []
        self._sources = [stage.expand(word) for word in step.sources]
        self._dest = destination(stage.expand(step.dest), stage.state.config.get("WorkingDir"))
        self._chown = stage.expand(step.chown) if step.chown else None
        self._chmod = stage.expand(step.chmod) if step.chmod else None
        self._exclude = [stage.expand(word) for word in step.exclude]
        self._parents = isinstance(step, ins.Copy) and step.parents

    def plan(self) -> LayerPlan:
        step, stage = self._step, self._stage
        texts = [self._heredoc_text(doc) for doc in step.contents]
        found = self._find()
        common: dict[str, Any] = {"dest": self._dest, "chmod": self._chmod, "mtime_ns": stage.mtime_ns()}
        common["several"] = len(step.ordered) > 1
        operations: list[dict[str, Any]] = [
            {"do": "write", "name": doc.name, "data": text, "owner": self._chown or "", **common}
            for doc, text in zip(step.contents, texts, strict=True)
        ]
        operations += [self._operation(source, common) for source in found if source[1]]
        selected = [item for _, items, _ in found for item in items]
        if self._sources and not selected:
            stage.warn(
                f"{step.name} {' '.join(self._sources)}: nothing matches, so nothing was copied (line {step.line})"
            )
        words = self._words()
        single = selected[0] if len(selected) == 1 else None
        inputs = {} if single else {entry["path"] or ".": selection_digest([entry]) for entry in selected}
        inputs |= {f"<<{doc.name}": digest_of(text) for doc, text in zip(step.contents, texts, strict=True)}
        inputs |= {"link": "true"} if step.link else {}
        lowers = [] if step.link else stage.state.layers
        return LayerPlan(
            f"{self._shown()} # labkernel",
            words,
            inputs | {SELECTION: selection_digest(selected)},
            lambda: stage.maker.place(
                lowers, operations, later=stage.later, fds=self._fds, clamp_s=stage.settings.epoch_s
            ),
            linked=bool(step.link),
            details=lambda: _finer(single) if single else {},
        )

    def _shown(self) -> str:
        """As BuildKit words it in the history: the destination as it is written, of the flags those about the files."""
        step = self._step
        flags = ["--parents"] if self._parents else []
        flags += [f"--chown={self._chown}"] if self._chown else []
        flags += [f"--chmod={self._chmod}"] if self._chmod else []
        documents = [f"<<{doc.name}" for doc in step.contents]
        return " ".join([step.name, *flags, *self._sources, *documents, self._stage.expand(step.dest)])

    def _words(self) -> str:
        """What identifies the step in the cache, beside the content of its inputs."""
        step = self._step
        flags = [f"--chown={self._chown}"] if self._chown else []
        flags += [f"--chmod={self._chmod}"] if self._chmod else []
        flags += [f"--from={step.from_}"] if isinstance(step, ins.Copy) and step.from_ else []
        flags += ["--parents"] if self._parents else []
        flags += [f"--exclude={pattern}" for pattern in self._exclude]
        if isinstance(step, ins.Add):
            flags += ["--keep-git-dir"] if step.keep_git_dir else []
            flags += [] if step.unpack is None else [f"--unpack={str(step.unpack).lower()}"]
        return " ".join([step.name, *flags, *self._sources, *(f"<<{doc.name}" for doc in step.contents), self._dest])

    def _operation(self, source: Source, common: dict[str, Any]) -> dict[str, Any]:
        origin, selected, remote = source
        step = self._step
        unpack = isinstance(step, ins.Add) and (bool(step.unpack) if remote else step.unpack is not False)
        kept = None if isinstance(step, ins.Copy) and step.from_ else ""
        return {
            "do": "copy",
            "from": origin,
            "selected": selected,
            "unpack": unpack,
            "owner": self._chown or kept,
            "archive_owner": self._chown,
            **common,
        }

    # -- sources -----------------------------------------------------------------------------------------------

    def _find(self) -> list[Source]:
        step, stage = self._step, self._stage
        if not self._sources:
            return []
        if isinstance(step, ins.Copy) and step.from_:
            layers = stage.source_of(step.from_)
            selected = scan_stage(
                stage, step.name, step.from_, layers, self._sources, exclude=self._exclude, parents=self._parents
            )
            return [(stage.maker.directories(layers), selected, False)]
        from .sources import is_remote

        remote = [is_remote(word) if isinstance(step, ins.Add) else False for word in self._sources]
        self._refuse_checksum(sum(remote))
        found: list[Source] = []
        local = [word for word, far in zip(self._sources, remote, strict=True) if not far]
        exclude = IgnoreMatcher(self._exclude) if self._exclude else None
        if local:
            selected = stage.context.select(step, local, exclude, parents=self._parents)
            found.append((len(self._fds), selected, False))
            extra = stage.context.select_extra(local, parents=self._parents)
            found += [(len(self._fds) + 1, extra, False)] if extra else []
            self._fds += stage.context.descriptors()
        for word, far in zip(self._sources, remote, strict=True):
            if far:
                found.append(self._fetch(word, exclude))
        return found

    def _refuse_checksum(self, remotes: int) -> None:
        step = self._step
        if not isinstance(step, ins.Add) or not step.checksum:
            return
        if not remotes:
            raise BuildError("checksum can't be specified for non-HTTP(S) & non-Git sources")
        if len(self._sources) > 1:
            raise BuildError("checksum can't be specified for multiple sources")

    def _fetch(self, word: str, exclude: IgnoreMatcher | None) -> Source:
        from ..oci.rootfd import Root
        from ..store.blobs import temporary_directory
        from .sources import clone, download, is_git

        step, stage = self._step, self._stage
        assert isinstance(step, ins.Add)
        layout = stage.layout
        stage.context.trace.repeatable = False  # it has to be asked again
        checksum = stage.expand(step.checksum) if step.checksum else None
        if is_git(word):
            base = self._stack.enter_context(temporary_directory(layout, "git"))
            directory = clone(word, base, keep_git=step.keep_git_dir, commit=checksum)
            root = self._stack.enter_context(Root.open(str(directory)))
            selected = select(root, ["/"], exclude=exclude)
        else:
            got = download(word, layout, checksum=checksum)
            root = self._stack.enter_context(Root.open(str(got.path.parent)))
            fcntl.flock(root.fd, fcntl.LOCK_SH)  # so that no prune takes it away
            selected = select(root, [got.path.name])
            selected = [{**item, "name": got.name} for item in selected]
        self._fds.append(root.fd)
        return len(self._fds) - 1, selected, True

    def _heredoc_text(self, doc: Heredoc) -> str:
        if not doc.expand:
            return doc.text
        return expand_heredoc(doc.text, self._stage.state.variables())


def scan_stage(
    stage: StageBuilder,
    name: str,
    origin: str,
    layers: Sequence[LayerInfo],
    sources: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    parents: bool = False,
) -> list[dict[str, Any]]:
    """What the instruction `name` takes out of the stage or image called `origin`. Raises BuildError."""
    try:
        return stage.maker.scan(layers, sources, exclude=exclude, parents=parents)
    except FileNotFoundError as err:
        raise BuildError(
            f"{name} failed: stat {err.filename}: file does not exist in {origin}",
            resolution=f"`RUN ls` in {origin} shows what there is; paths start at its /",
        ) from None


def destination(dest: str, workdir: str | None) -> str:
    """The absolute destination; it ends with a slash when it has to be a directory."""
    if not dest:
        raise BuildError("the destination is empty")
    full = posixpath.join("/", workdir or "/", dest)
    directory = full.endswith(("/", "/.")) or dest == "."
    return "/" + posixpath.normpath(full).lstrip("/") + ("/" if directory and full.strip("/.") else "")


def _finer(source: dict[str, Any]) -> dict[str, str]:
    """One input per file of a copied directory, so that a miss can name the file; the whole for very many."""
    base = source["path"]
    if len(source["entries"]) > _MANY_FILES:
        return {base or ".": selection_digest([source])}
    above = f"{base}/" if base else ""
    return {
        above + name if name else base or ".": f"{kind}{mode:o}{digest}"
        for name, kind, mode, _, _, digest in source["entries"]
    }
