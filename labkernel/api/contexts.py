"""Named contexts of a build (`--build-context NAME=…`): each becomes an image while the build goes on.

A directory of the client or a repository is copied into an image without a name, which the cache knows by its content;
so FROM, COPY --from and RUN --mount=from= need to know nothing of it. Source: Docker documentation, "docker buildx
build", --build-context; BuildKit, the attributes "context:NAME" of the frontend "dockerfile.v0".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..building.sources import git_context, is_git, url_context
from ..dockerfile.ignorefile import read_ignorefile
from ..errors import UsageError
from .filesync import receive
from .grpc import UNIMPLEMENTED, RpcError

if TYPE_CHECKING:
    from ..engine import Engine
    from .solving import Wanted
    from .trace import Trace

_IMAGE, _LOCAL = "docker-image://", "local:"
_WHOLE = "FROM scratch\nCOPY . /\n"


@contextmanager
def named_contexts(engine: Engine, wanted: Wanted, trace: Trace, work: Path) -> Iterator[Mapping[str, str]]:
    """Name -> image, of those that the Dockerfile may mean; the directories are fetched below `work`."""
    found: dict[str, str] = {}
    with ExitStack() as stack:
        for name, place in wanted.contexts.items():
            if not re.search(rf"(?i)\b{re.escape(name.partition(':')[0])}\b", wanted.text):
                continue
            if place.startswith(_IMAGE):
                found[name] = place.removeprefix(_IMAGE)
                continue
            with trace.doing(f"[context {name}] load from client"), ExitStack() as fetched:
                directory = _fetch(engine, wanted, place, work / str(len(found)), fetched)
                found[name] = stack.enter_context(_image_of(engine, directory, wanted))
        yield found


def _fetch(engine: Engine, wanted: Wanted, place: str, target: Path, stack: ExitStack) -> Path:
    """The directory that `place` means."""
    if place.startswith(_LOCAL):
        general = target / "ignore"
        general.mkdir(parents=True)
        name = place.removeprefix(_LOCAL)
        receive(wanted.session, name, general, follow=[".dockerignore"])
        file = general / ".dockerignore"
        ignore = file.read_text(errors="replace") if file.is_file() and not file.is_symlink() else ""
        directory = target / "context"
        directory.mkdir()
        receive(wanted.session, name, directory, exclude=read_ignorefile(ignore))
        return directory
    if is_git(place):
        return stack.enter_context(git_context(engine.layout, place))
    if place.startswith(("http://", "https://")):
        given = stack.enter_context(url_context(engine.layout, place, lambda moment: None))
        if isinstance(given, bytes):
            raise UsageError(f"not an archive: {place}")
        return given
    raise RpcError(UNIMPLEMENTED, f"a named context {place} is not available: an image, a directory or a URL is")


@contextmanager
def _image_of(engine: Engine, directory: Path, wanted: Wanted) -> Iterator[str]:
    """An image of the files in `directory`, there while the block runs. A label makes it nobody else's."""
    labels = {"labkernel.context": os.urandom(16).hex()}
    stopping = wanted.settings["options"].stopping
    image = engine.builds.build(_WHOLE, context=directory, ignore="", labels=labels, stopping=stopping).image
    try:
        yield image.id
    finally:
        image.remove(force=True)
