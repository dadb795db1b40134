"""Named contexts of a BuildKit client's build: its own directories come through the session.

Source: BuildKit, the attributes "context:NAME" of the frontend "dockerfile.v0".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..building.namedcontexts import IMAGE, fetch, image_of, is_meant
from ..dockerfile.ignorefile import read_ignorefile
from .filesync import receive
from .grpc import UNIMPLEMENTED, RpcError

if TYPE_CHECKING:
    from ..engine import Engine
    from .solving import Wanted
    from .trace import Trace

_LOCAL = "local:"


@contextmanager
def named_contexts(engine: Engine, wanted: Wanted, trace: Trace, work: Path) -> Iterator[Mapping[str, str]]:
    """Name -> image, of those that the Dockerfile may mean; the directories are fetched below `work`."""
    found: dict[str, str] = {}
    stopping = wanted.settings["options"].stopping
    with ExitStack() as stack:
        for name, place in wanted.contexts.items():
            if not is_meant(name, wanted.text):
                continue
            if place.startswith(IMAGE):
                found[name] = place.removeprefix(IMAGE)
                continue
            with trace.doing(f"[context {name}] load from client"), ExitStack() as fetched:
                directory = _fetch(engine, wanted, place, work / str(len(found)), fetched)
                found[name] = stack.enter_context(image_of(engine.builds, directory, stopping=stopping))
        yield found


def _fetch(engine: Engine, wanted: Wanted, place: str, target: Path, stack: ExitStack) -> Path:
    """The directory that `place` means."""
    if not place.startswith(_LOCAL):
        found = fetch(engine.layout, place, stack)
        if found is None:
            raise RpcError(
                UNIMPLEMENTED, f"a named context {place} is not available: an image, a directory or a URL is"
            )
        return found[0]
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
