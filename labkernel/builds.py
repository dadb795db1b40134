"""Builds: a parsed Dockerfile becomes an image, step by step, with a cache by content.

`Builds.build` plans which stages are needed, builds each on its State (building/steps.py), and commits the last one;
the tag is set at the very end. Whatever fails leaves no tag, no container, no mount and no half layer; steps that were
finished stay in the cache, so the next build goes on there. Mechanism: dockerfile/ (language) and oci/ (layers).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .building import epoch
from .building.agents import open_agents
from .building.bases import canonical_tag, find_base
from .building.cache import BuildCache
from .building.checks import read_ignore, suggesting, surroundings
from .building.copylayers import layer_maker
from .building.debug import forget_failure, remember_failure
from .building.failures import located
from .building.finishing import Finisher
from .building.graph import carry_out, needed_stages
from .building.layers import RunEnded, Running
from .building.mounts import cache_mounts, prune_cache_mounts
from .building.options import BuildOptions
from .building.remotecache import INLINE, cache_places, export_caches, import_caches, inline_rows
from .building.result import BuildResult, BuildStep
from .building.steps import DEFAULT_PATH, Settings, StageBuilder, State
from .building.targets import arguments, build_platform, empty_document, joined, platform_of, targets
from .building.transport import export_directory
from .building.unchanged import forget as forget_records
from .building.usage import CacheRecord, records, selected
from .dockerfile.flags import did_you_mean
from .dockerfile.graph import global_scope, refuse_later, stage_dependencies, stage_references, verify
from .dockerfile.instructions import (
    Instruction,
    Program,
    Stage,
    find_named_stage,
    find_stage,
    onbuild_instruction,
)
from .dockerfile.lint import Finding, lint, lint_error
from .dockerfile.lint import options as lint_options
from .dockerfile.variables import BUILDER_ARGS, PLATFORM_ARGS, PROXY_ARGS, Lexer
from .errors import (
    BuildError,
    DockerfileError,
    NoSuchImage,
    UsageError,
)
from .oci.platforms import normal, parse_platform
from .runtime.settings import normalize

if TYPE_CHECKING:
    from .images import Images
    from .imaging.image import Image
    from .networks import Networks
    from .oci.manifest import Platform
    from .runtime.client import Runtime
    from .runtime.driver import Driver
    from .store.blobs import Blobs
    from .store.catalog import LayerInfo
    from .store.database import Database
    from .store.layout import Layout

OnStep = Callable[[BuildStep], None]
_KEPT_OUTPUT_BYTES = 16 << 10


class Builds:
    """The builder of one store. Safe to use from several threads and processes at once."""

    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        db: Database,
        runtime: Runtime,
        driver: Driver,
        images: Images,
        networks: Networks,
    ) -> None:
        self.layout = layout
        self.blobs = blobs
        self.db = db
        self.images = images
        self.runtime = runtime
        self._maker = layer_maker(layout, blobs, runtime, driver, images, networks)

    def build(
        self,
        dockerfile: str,
        *,
        context: str | Path | None = None,
        tags: Sequence[str] = (),
        build_args: Mapping[str, str] | None = None,
        target: str | None = None,
        no_cache: bool = False,
        labels: Mapping[str, str] | None = None,
        network: str = "default",
        files: Mapping[str, bytes] | None = None,
        ignore: str | None = None,
        on_step: OnStep | None = None,
        options: BuildOptions | None = None,
        **more: Any,
    ) -> BuildResult:
        """Build the text `dockerfile` and give the image `tags`.

        `context` is the directory of COPY and ADD; `files` (name -> content) are added to it; `ignore` is the text of
        a .dockerignore to use instead of the context's. `network`: `default`, `none` or `host`, for RUN. `on_step` is
        called with each BuildStep as it starts, writes, ends (from one thread at a time). The fields of `BuildOptions`
        may be given by name too: `secrets={"token": b"…"}`, `allow=["security.insecure"]`. With several platforms there
        is an image of each (`BuildResult.images`), and a tag names the one for this machine, else the first.

        Raises DockerfileError (before anything runs), BuildError (lines, `status` of a RUN), DiskFull, NoSuchImage,
        InvalidReference. Nothing is tagged then, and nothing half done stays.
        """
        started = time.monotonic()
        _refuse(tags, network)
        chosen = (options or BuildOptions()).with_fields(more)
        chosen.check()
        program = verify(dockerfile)
        wanted = targets(chosen.platform) or [build_platform()]
        forget_failure(self.db)
        with self.images.adding(unpacks=True):
            works = [
                _Build(self, program, dict(build_args or {}), target, on_step or (lambda step: None), chosen, platform)
                for platform in wanted
            ]
            results: list[BuildResult] = []
            total = sum(work.total for work in works)
            for work in works:
                work.follow(results, total, several=len(works) > 1)
                done = work.carry_out(
                    Path(context) if context is not None else None,
                    tags=tags if len(works) == 1 else (),
                    no_cache=no_cache,
                    labels=dict(labels or {}),
                    network=network,
                    files=files,
                    ignore=ignore,
                    started=started,
                )
                results.append(done)
            return results[0] if len(results) == 1 else joined(self.images, wanted, results, tags)

    def usage(self, filters: Mapping[str, Any] | None = None) -> list[CacheRecord]:
        """What the build cache holds, last used first: steps, cache mounts, downloads (building/usage.py).

        `filters` are docker's: id, type, description, inuse, shared, private, until. Raises InvalidFilter."""
        found = records(self.db, self.layout)
        if not filters:
            return found
        chosen = {record.id for record in selected(found, filters, held=True)}
        return [record for record in found if record.id in chosen]

    def prune(self, filters: Mapping[str, Any] | None = None, *, keep_bytes: int = 0) -> dict[str, Any]:
        """Forget the build cache, and the cache mounts that no build uses now: all of it, what fits all `filters`
        (see `usage`), or the oldest until no more than `keep_bytes` is left.

        Returns {"CachesDeleted": [count of steps as text, "cache mount ID" …], "Records": the CacheRecords,
        "SpaceReclaimed": bytes}. Raises InvalidFilter before anything is removed."""
        meant = selected(records(self.db, self.layout), filters, keep_bytes=keep_bytes)
        everything = not filters and keep_bytes <= 0
        forget_records(self.layout.root)
        count = BuildCache(self.db, self.blobs).forget(record.id for record in meant if record.path is None)
        freed = self.images.sweep() if count else 0
        paths = None if everything else [record.path for record in meant if record.path is not None]
        mounts, bytes_ = prune_cache_mounts(self.layout, self.runtime, paths)
        deleted = [f"{count} step{'s' * (count != 1)}"] if count else []
        self.db.add_event("builder", "prune", "", {"reclaimed": str(freed + bytes_)})
        return {
            "CachesDeleted": [*deleted, *(f"cache mount {name}" for name in mounts)],
            "Records": meant,
            "SpaceReclaimed": freed + bytes_,
        }

    def cache_mounts(self) -> list[dict[str, Any]]:
        """What RUN --mount=type=cache and ADD keep: {"id", "target", "used_at" (seconds since 1970), "path"}."""
        return cache_mounts(self.layout)

    def export_directory(self, ref: str, target: Path) -> None:
        """Write the root file system of an image to the directory `target`. Raises UsageError, NoSuchImage."""
        export_directory(self.images, ref, target)

    def check(
        self,
        dockerfile: str,
        *,
        build_args: Mapping[str, str] | None = None,
        ignore: str | None = None,
        platform: str | None = None,
    ) -> list[Finding]:
        """The build checks alone (`build --check`). `ignore`: the text of the .dockerignore; of several platforms the
        first counts. Raises DockerfileError for what could not be built at all."""
        program = verify(dockerfile)
        refuse_later(program, range(len(program.stages)))
        given = dict(build_args or {})
        wanted = lint_options(program.dockerfile, given.get("BUILDKIT_DOCKERFILE_CHECK"))
        target = (targets(platform) or [build_platform()])[0]
        scope = global_scope(program, given, arguments(target))
        matcher = read_ignore(ignore or "")
        return lint(program, wanted, surroundings(self.images, program, given, scope, matcher, platform=target))


class _Build:
    """One build under way."""

    def __init__(
        self,
        builds: Builds,
        program: Program,
        build_args: dict[str, str],
        target: str | None,
        on_step: OnStep,
        options: BuildOptions,
        platform: Platform,
    ) -> None:
        self._builds = builds
        self._options = options
        self._running = Running(builds.runtime)
        self._finisher = Finisher()
        self._telling = threading.RLock()
        self._program = program
        self._build_args = build_args
        self._on_step = on_step
        self._lock = threading.Lock()
        self._platform = platform
        self._platforms: dict[int, Platform] = {}  # of the stages
        self._predefined = arguments(platform)
        self._scope = global_scope(program, build_args, self._predefined)
        self._target = _find_target(program, target)
        self._needs = stage_dependencies(program, self._scope)
        self._order = needed_stages(self._needs, self._target.index)
        refuse_later(program, sorted(self._order))
        self.total = sum(1 + len(program.stages[index].commands) for index in self._order)
        self._number = 0
        self._prefix = ""
        self._states: dict[int, State] = {}
        self._making = [threading.Lock() for _ in program.stages]
        self._steps: list[BuildStep] = []
        self._warnings: list[str] = []
        self._cache = BuildCache(builds.db, builds.blobs)

    def follow(self, results: Sequence[BuildResult], total: int, *, several: bool) -> None:
        """Number the steps after those of the other platforms, which the caches are to have too."""
        self._number, self.total = sum(len(result.steps) for result in results), total
        self._prefix = f"{self._platform} " if several else ""
        self._cache.used += [key for result in results if result.trace for key in result.trace.keys]

    def carry_out(
        self,
        directory: Path | None,
        *,
        tags: Sequence[str],
        no_cache: bool,
        labels: Mapping[str, str],
        network: str,
        files: Mapping[str, bytes] | None,
        ignore: str | None,
        started: float,
    ) -> BuildResult:
        from .building.context import Context

        epoch_s = epoch.resolve(self._build_args, self._scope, self._options.context_epoch_s)
        if self._options.stopping is not None:
            self._options.stopping(self._running.stop)
        context = Context(directory, files, self._builds.layout, self._builds.db, ignore=ignore)
        with open_agents(self._options.ssh) as ssh, context as self._context, self._finisher:
            self._settings = Settings(
                build_args=self._build_args,
                no_cache=no_cache,
                network=network,
                epoch_s=epoch_s,
                escape=self._program.dockerfile.escape,
                secrets=self._options.secrets,
                ssh=ssh,
                allow=frozenset(self._options.allow),
                extra_hosts=tuple(self._options.extra_hosts),
                memory_bytes=self._options.memory_bytes,
                limits=normalize(self._options.limits),
            )
            self._check()
            self._builds._maker.clear_leftovers(self._finisher.later)
            images = self._builds.images
            self._cache.elsewhere = import_caches(images, cache_places(self._options.cache_from), notify=self._warn)
            needs = {index: self._needs[index] & set(self._order) for index in self._order}
            carry_out(self._order, needs, self._make_stage, self._running.stop)
        state = self._states[self._target.index]
        if labels:
            state.config["Labels"] = {**(state.config.get("Labels") or {}), **labels}
        image = self._commit(state, list(tags))
        self._cache.touch()
        self._warn_unused()
        trace = self._context.trace
        trace.keys = self._cache.used
        return BuildResult(image, self._steps, self._warnings, time.monotonic() - started, trace)

    def _commit(self, state: State, tags: list[str]) -> Image:
        """The image of the last stage, and the caches that go with it."""
        from .oci import reference

        images, keys = self._builds.images, self._cache.used
        caches = cache_places(self._options.cache_to)
        asked = self._build_args.get("BUILDKIT_INLINE_CACHE", "").lower() in ("1", "t", "true")
        if asked or any(place.kind == "inline" for place in caches):
            state.document[INLINE] = {"rows": inline_rows(images, keys, state.layers)}
        image = images.commit_layers(state.document, state.layers, tags)
        for tag in tags:
            images.tell(image, "tag", reference.parse_tag(tag).familiar)
        export_caches(images, caches, keys, notify=self._warn)
        return image

    # -- planning ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        wanted = lint_options(self._program.dockerfile, self._build_args.get("BUILDKIT_DOCKERFILE_CHECK"))
        around = surroundings(
            self._builds.images,
            self._program,
            self._build_args,
            self._scope,
            self._context.ignore_matcher(),
            platform=self._platform,
            needed=self._order,
        )
        found = lint(self._program, wanted, around)
        self._warnings += [finding.short() for finding in found]
        error = lint_error(found, wanted)
        if error is not None:
            raise error

    def _warn_unused(self) -> None:
        declared = {name for arg in self._program.global_args for name, _ in arg.pairs}
        for stage in self._program.stages:
            declared |= {name for step in stage.commands if step.name == "ARG" for name, _ in step.pairs}  # type: ignore[attr-defined]
        known = {*declared, *PROXY_ARGS, *PLATFORM_ARGS, *BUILDER_ARGS}
        unused = sorted(set(self._build_args) - known)
        if unused:
            self._warnings.append(f"One or more build-args [{' '.join(unused)}] were not consumed")

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)

    # -- stages --------------------------------------------------------------------------------------------------

    def _make_stage(self, index: int) -> None:
        # A trigger of a base image may name a stage that nothing else needs, or that another thread is at.
        with self._making[index]:
            if index not in self._states:
                self._states[index] = self._stage(self._program.stages[index])

    def _stage(self, stage: Stage) -> State:
        state = self._base(stage)
        anew = {name.lower() for name in self._options.no_cache_filter}
        fresh = bool({stage.name or "", str(stage.index)} & anew)
        builder = StageBuilder(
            state,
            settings=replace(self._settings, no_cache=True) if fresh else self._settings,
            cache=self._cache,
            maker=self._builds._maker,
            context=self._context,
            globals_=self._scope,
            platform=self._predefined | {"TARGETSTAGE": self._target.name or ""},
            source_of=lambda ref: self._source(stage, ref),
            warn=self._warn,
            layout=self._builds.layout,
            running=self._running,
            later=self._finisher.later,
        )
        triggers = [onbuild_instruction(text) for text in state.config.pop("OnBuild", None) or ()]
        with self._lock:
            self.total += len(triggers)
        for ref in [ref for trigger in triggers for ref in stage_references(trigger)]:
            try:
                self._make_for(stage, find_stage(self._program.stages, ref))
            except DockerfileError as err:
                raise self._located(err, stage.from_, b"") from _other(err)
        for trigger in triggers:
            self._step(stage, trigger, builder, place=stage.from_)
        for command in stage.commands:
            self._step(stage, command, builder, place=command)
        return state

    def _base(self, stage: Stage) -> State:
        step = self._begin(stage, stage.from_, stage.from_)
        began = time.monotonic()
        try:
            state, known = self._find_base(stage)
        except BaseException as err:
            self._failed(step, began)
            raise self._located(err, stage.from_, b"") from _other(err)
        step.status, step.duration_s = "cached" if known else "done", time.monotonic() - began
        self._tell(step)
        return state

    def _find_base(self, stage: Stage) -> tuple[State, bool]:
        """The state a stage starts from, and whether nothing had to be fetched for it."""
        lexer = Lexer(self._program.dockerfile.escape)
        name = lexer.process(stage.base, self._scope).result
        asked = lexer.process(stage.platform, self._scope).result if stage.platform else ""
        if stage.platform and not asked:
            raise DockerfileError(f"empty platform value from expression {stage.platform}")
        platform = normal(parse_platform(asked)) if asked else self._platform
        earlier = find_named_stage(self._program.stages[: stage.index], name)
        known, given = True, self._given(name, platform)
        if given is not None:
            state = State.of_image(given)
            platform = platform_of(state.document)
        elif earlier is not None:
            state, platform = self._states[earlier.index].copy(), self._platforms[earlier.index]
        elif name == "scratch":
            platform = self._platform  # whatever the stage says, as BuildKit has it
            state = State(empty_document(platform))
        elif not name:
            raise DockerfileError(f"base name ({stage.base}) should not be blank")
        else:
            exact = bool(asked or self._options.platform)
            image, known = self._image(name, platform, exact=exact)
            state = State.of_image(image)
            platform = platform if exact else platform_of(state.document)
        self._platforms[stage.index] = platform
        if "PATH" not in state.environment:
            state.config["Env"] = [*(state.config.get("Env") or []), f"PATH={DEFAULT_PATH}"]
        return state, known

    def _given(self, name: str, platform: Platform) -> Image | None:
        """What the caller says that name means (`BuildOptions.contexts`)."""
        contexts = self._options.contexts
        tag = canonical_tag(name)
        for known, image in contexts.items():
            if known.lower() == name.lower() or (tag is not None and canonical_tag(known) == tag):
                self._context.trace.repeatable = False
                if image.startswith("sha256:"):
                    return self._builds.images.get(image)
                return self._image(image, platform, exact=False)[0]
        return None

    def _image(self, name: str, platform: Platform, *, exact: bool) -> tuple[Image, bool]:
        """The image of that name and whether nothing was fetched (building/bases.py)."""
        images, pull = self._builds.images, self._options.pull
        try:
            found, known = find_base(images, name, platform, exact=exact, pull=pull, notify=self._warn)
        except NoSuchImage as err:
            raise suggesting(err, name, self._program.stages, images) from None
        trace, tag = self._context.trace, canonical_tag(name)
        if tag is not None and images.catalog.find_by_tag(tag) == found.id and not pull:
            trace.names[tag] = found.id
        else:
            trace.repeatable = False
        return found, known

    def _source(self, stage: Stage, ref: str) -> Sequence[LayerInfo]:
        """The layers that `--from=ref` copies out of."""
        given = self._given(ref, self._platforms[stage.index])
        if given is not None:
            return given.layers
        found = find_stage(self._program.stages, ref)
        if found is not None:
            return self._states[found.index].layers
        if ref == "scratch":
            return []
        return self._image(ref, self._platforms[stage.index], exact=False)[0].layers

    def _make_for(self, stage: Stage, wanted: Stage | None) -> None:
        """Make the stage that an ONBUILD trigger of `stage` names: what a base image brings is known only now."""
        if wanted is None or wanted.index in self._states:
            return
        if wanted.index >= stage.index:
            raise DockerfileError(
                f'cannot copy from stage "{wanted.name or wanted.index}", it needs to be defined before current stage '
                f'"{stage.name or stage.index}"',
                resolution="an ONBUILD trigger of the base names it: put that stage above the FROM",
            )
        order = needed_stages(self._needs, wanted.index)
        refuse_later(self._program, sorted(order))
        for index in order:
            if index not in self._order:
                with self._lock:
                    self._order.append(index)
                    self.total += 1 + len(self._program.stages[index].commands)
            self._make_stage(index)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _begin(self, stage: Stage, instruction: Instruction, place: Instruction) -> BuildStep:
        with self._lock:
            self._number += 1
            text = instruction.text if instruction is place else f"ONBUILD {instruction.text}"
            step = BuildStep(
                self._number,
                self.total,
                f"{self._prefix}{stage.name or stage.index}",
                text,
                place.line,
                place.end_line,
            )
            self._steps.append(step)
        self._tell(step)
        return step

    def _tell(self, step: BuildStep) -> None:
        with self._telling:  # stages run side by side; who is told need not know
            self._on_step(step)

    def _failed(self, step: BuildStep, began: float) -> None:
        step.status, step.output, step.duration_s = "failed", b"", time.monotonic() - began
        if not self._running.stopped():  # otherwise it was ended because another one failed
            self._tell(step)

    def _step(self, stage: Stage, instruction: Instruction, builder: StageBuilder, *, place: Instruction) -> None:
        step = self._begin(stage, instruction, place)
        began = time.monotonic()
        tail: deque[bytes] = deque()

        def output(data: bytes) -> None:
            tail.append(data)
            while len(tail) > 1 and sum(map(len, tail)) - len(tail[0]) > _KEPT_OUTPUT_BYTES:
                tail.popleft()
            step.status, step.output, step.duration_s = "output", data, time.monotonic() - began
            self._tell(step)

        try:
            outcome = builder.carry_out(instruction, output)
        except BaseException as err:
            if isinstance(err, Exception):
                remember_failure(self._builds.db, builder.state, step)
            self._failed(step, began)
            raise self._located(err, place, b"".join(tail), instruction) from _other(err)
        step.status, step.output = "cached" if outcome.cached else "done", b""
        step.duration_s = time.monotonic() - began
        step.size_bytes, step.why = outcome.size_bytes, outcome.why
        step.layer = outcome.layer.diff_id if outcome.layer else None
        self._tell(step)

    def _located(
        self, err: BaseException, place: Instruction, tail: bytes, instruction: Instruction | None = None
    ) -> BaseException:
        if self._running.stopped() and isinstance(err, RunEnded):
            return BuildError("the build was stopped")
        lines = self._program.dockerfile.excerpt(place.line, place.end_line)
        return located(err, lines, place, tail=tail, instruction=instruction)


def _other(err: BaseException) -> BaseException | None:
    """What to raise the located error `from`: one that is located in place is not its own cause."""
    return None if isinstance(err, DockerfileError) else err


def _refuse(tags: Sequence[str], network: str) -> None:
    """Raises InvalidReference, UsageError."""
    from .oci import reference

    for name in tags:
        reference.parse_tag(name)
    if network not in ("default", "none", "host"):
        raise UsageError(f"network {network!r} is not available to builds", resolution="default, none or host")


def _find_target(program: Program, target: str | None) -> Stage:
    if target is None or target == "":
        return program.stages[-1]
    try:
        found = find_stage(program.stages, target)
    except DockerfileError:
        found = None
    if found is None:
        names = [stage.name or str(stage.index) for stage in program.stages]
        raise BuildError(
            f'target stage "{target}" could not be found{did_you_mean(target, names)}',
            resolution=f"the stages are: {', '.join(names)}",
        )
    return found


__all__ = ["BuildOptions", "BuildResult", "BuildStep", "Builds"]
