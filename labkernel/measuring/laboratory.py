"""What the experiments work with: the services of an engine, the measuring program, and an image that holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .program import INSIDE, get_program

if TYPE_CHECKING:
    from ..builds import Builds
    from ..containers import Containers
    from ..images import Images
    from ..imaging.image import Image
    from ..vms import VMs


def _silent(_line: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """The services of one engine. `open_engine` opens another one (for rows of other drivers); `cache` keeps the
    measuring program where the package has none; `scratch` is where the bare process writes its files."""

    containers: Containers
    vms: VMs
    images: Images
    builds: Callable[[], Builds]
    open_engine: Callable[..., Any]
    cache: Path
    scratch: Path
    say: Callable[[str], None] = _silent

    def program(self) -> Path:
        return get_program(self.cache)

    def beside(self, engine: Any) -> Laboratory:
        """The same for another engine's containers."""
        return dataclasses.replace(self, containers=engine.containers, vms=engine.vms, images=engine.images)

    @contextlib.contextmanager
    def instrumented(self, image: str) -> Iterator[tuple[Image, str]]:
        """`image` with the measuring program in it, and its name, removed in the end; its layers stay in the cache."""
        base = self.images.resolve(image, notify=self.say)
        name = f"labkernel-bench:{secrets.token_hex(4)}"
        source = f"FROM {base.tags[0] if base.tags else base.id}\nCOPY --chmod=755 bench {INSIDE}\n"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "bench").write_bytes(self.program().read_bytes())
            made: Image = self.builds().build(source, context=folder, tags=[name]).image
        try:
            yield made, name
        finally:
            self.images.remove(name, force=True)
