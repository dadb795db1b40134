"""Named contexts of a build (`--build-context NAME=…`): each becomes an image while the build goes on.

A directory or a repository is copied into an image without a name, which the cache knows by its content; so FROM, COPY
--from and RUN --mount=from= need to know nothing of it (`BuildOptions.contexts`). Source: Docker documentation, "docker
buildx build", --build-context.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .sources import git_context, is_git, url_context

if TYPE_CHECKING:
    from ..builds import Builds
    from ..store.layout import Layout

IMAGE = "docker-image://"
_ELSEWHERE = ("oci-layout://", "target:", "input:", "service:")
_WHOLE = "FROM scratch\nCOPY . /\n"


def is_meant(name: str, dockerfile: str) -> bool:
    """Whether the Dockerfile may mean the context of that name; what it does not name is not fetched."""
    return re.search(rf"(?i)(?<![\w.-]){re.escape(name.partition(':')[0])}(?![\w.-])", dockerfile) is not None


@contextmanager
def named_contexts(
    builds: Builds, layout: Layout, places: Mapping[str, str], dockerfile: str, folder: Path
) -> Iterator[dict[str, str]]:
    """Name -> image of those that the Dockerfile may mean, while the block runs. A place is a directory (a relative one
    lies below `folder`), a repository, the URL of an archive, or `docker-image://NAME`. Raises UsageError, BuildError.
    """
    found: dict[str, str] = {}
    with ExitStack() as stack:
        for name, place in places.items():
            if place.startswith(_ELSEWHERE):
                raise UsageError(
                    f"a named context {place} is not available",
                    resolution="a directory, a repository, a URL and docker-image://NAME are",
                )
            if not is_meant(name, dockerfile):
                continue
            if place.startswith(IMAGE):
                found[name] = place.removeprefix(IMAGE)
                continue
            with ExitStack() as fetched:
                directory, ignore = fetch(layout, place, fetched) or (folder / Path(place).expanduser(), None)
                if not directory.is_dir():
                    raise UsageError(f"named context {name}: path {place!r} not found", exit_code=1)
                found[name] = stack.enter_context(image_of(builds, directory, ignore=ignore))
        yield found


def fetch(layout: Layout, place: str, stack: ExitStack) -> tuple[Path, str | None] | None:
    """The directory of a repository or of an archive behind a URL, for as long as `stack` is open, and what is left out
    of it (nothing); None when `place` is neither. Raises UsageError, BuildError."""
    if is_git(place):
        return stack.enter_context(git_context(layout, place)), ""
    if place.startswith(("http://", "https://")):
        given = stack.enter_context(url_context(layout, place, lambda moment: None))
        if isinstance(given, bytes):
            raise UsageError(f"not an archive: {place}")
        return given, ""
    return None


@contextmanager
def image_of(
    builds: Builds, directory: Path, *, ignore: str | None = "", stopping: Callable[[Any], None] | None = None
) -> Iterator[str]:
    """An image of the files in `directory`, there while the block runs. A label makes it nobody else's."""
    labels = {"labkernel.context": os.urandom(16).hex()}
    image = builds.build(_WHOLE, context=directory, ignore=ignore, labels=labels, stopping=stopping).image
    try:
        yield image.id
    finally:
        image.remove(force=True)
