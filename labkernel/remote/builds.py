"""Builds by a remote daemon's classic builder, told as our own BuildSteps. Source: Docker Engine API, ImageBuild."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..building.result import BuildResult, BuildStep
from ..errors import BuildError, UsageError
from .objects import translated

if TYPE_CHECKING:
    from .engine import RemoteEngine

_STEP = re.compile(r"Step (\d+)/(\d+) : (.*)", re.DOTALL)
_DOCKERFILE = ".labkernel.Dockerfile"
_SILENT = (" --->", "Removing intermediate", "Successfully tagged")


class RemoteBuilds:
    """`engine.builds` of a remote engine: the arguments of `Builds.build`, as far as the classic builder has them."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

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
        ignore: str | None = None,
        on_step: Any = None,
        options: Any = None,
        **more: Any,
    ) -> BuildResult:
        """Send the context, less what its .dockerignore leaves out, and build there. Raises BuildError, RemoteError."""
        _refuse(options, more)
        began = time.monotonic()
        api = self._engine.client.api
        teller = _Teller(on_step or (lambda step: None))
        with _archive(context, dockerfile, ignore) as archive, translated():
            stream = api.build(
                fileobj=archive,
                custom_context=True,
                dockerfile=_DOCKERFILE,
                tag=tags[0] if tags else None,
                buildargs=dict(build_args or {}),
                target=target,
                nocache=no_cache,
                labels=dict(labels or {}),
                network_mode=None if network == "default" else network,
                pull=bool(getattr(options, "pull", False)),
                platform=getattr(options, "platform", None),
                rm=True,
                decode=True,
            )
            for record in stream:
                teller.take(record)
        teller.end()
        if teller.image is None:
            raise BuildError("the daemon did not say which image it built")
        image = self._engine.images.get(teller.image)
        for name in tags[1:]:
            self._engine.images.tag(image.id, name)
        return BuildResult(self._engine.images.get(image.id), teller.steps, [], time.monotonic() - began)  # type: ignore[arg-type]

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Forget the daemon's build cache."""
        with translated():
            found: dict[str, Any] = self._engine.client.api.prune_builds()
        return {**found, "CachesDeleted": found.get("CachesDeleted") or []}


def _refuse(options: Any, more: Mapping[str, Any]) -> None:
    for name in ("secrets", "ssh", "allow", "no_cache_filter", "cache_from", "cache_to", "limits"):
        if getattr(options, name, None) or more.get(name):
            raise UsageError(
                f"{name}: not available for builds on another engine", resolution="`context use embedded` comes back"
            )


@contextlib.contextmanager
def _archive(context: str | Path | None, dockerfile: str, ignore: str | None) -> Any:
    from docker.utils import exclude_paths
    from docker.utils.build import create_archive

    root = str(context) if context is not None else None
    patterns: list[str] = []
    if root is not None:
        text = ignore
        if text is None:
            file = Path(root, ".dockerignore")
            text = file.read_text(errors="replace") if file.is_file() else ""
        patterns = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    extra = [(_DOCKERFILE, dockerfile)]
    if root is None:
        import tempfile

        with (
            tempfile.TemporaryDirectory(prefix="labkernel-context-") as empty,
            create_archive(empty, files=[], extra_files=extra) as archive,
        ):
            yield archive
        return
    names = sorted(exclude_paths(root, patterns))
    with create_archive(root, files=names, extra_files=extra) as archive:
        yield archive


class _Teller:
    """Reads the classic builder's stream and tells steps."""

    def __init__(self, on_step: Any) -> None:
        self._on_step = on_step
        self.steps: list[BuildStep] = []
        self.image: str | None = None
        self._began = 0.0

    def take(self, record: Mapping[str, Any]) -> None:
        if "error" in record:
            detail = record.get("errorDetail") or {}
            if self.steps:
                self._tell("failed")
            status = detail.get("code") or None
            raise BuildError(str(detail.get("message") or record["error"]), status=status)
        if isinstance(record.get("aux"), dict) and record["aux"].get("ID"):
            self.image = str(record["aux"]["ID"])
        text = str(record.get("stream") or "")
        found = _STEP.match(text)
        if found:
            self.end()
            number, total = int(found[1]), int(found[2])
            self.steps.append(BuildStep(number, total, "0", found[3].strip(), number, number))
            self._began = time.monotonic()
            self._tell("started")
        elif text.startswith(" ---> Using cache") and self.steps:
            self._tell("cached")
        elif text.startswith("Successfully built "):
            self.image = self.image or text.split()[2]
        elif (
            text.strip()
            and not text.startswith((" --->", "Removing intermediate", "Successfully tagged"))
            and self.steps
        ):
            self.steps[-1].output = text.encode()
            self._tell("output")

    def end(self) -> None:
        """The step before is done."""
        if self.steps and self.steps[-1].status in ("started", "output"):
            self._tell("done")

    def _tell(self, status: str) -> None:
        step = self.steps[-1]
        step.status, step.duration_s = status, time.monotonic() - self._began
        if status != "output":
            step.output = b""
        self._on_step(step)
