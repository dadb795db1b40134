"""Takes away the store of a row when the process that measures is killed: its supervisor would run on for ever.

A row of another driver has a store of its own (subjects.py), which its process empties and shuts down. A killed one
cannot; so a small process waits for the end of its standard input, which comes with the end of whoever holds it.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LabkernelError

_DONE = b"."


@contextlib.contextmanager
def swept(home: Path, driver: str) -> Iterator[None]:
    """While this lasts, `home` (with `root` and `run` in it) is taken away when this process is killed."""
    command = [sys.executable, "-m", __name__, str(home), driver]
    nothing = subprocess.DEVNULL
    # A session of its own: control-C in a terminal is for who measures.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True
    ) as waiting:
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                waiting.communicate(_DONE)


def empty(engine: Any) -> None:
    """Remove what an engine has; files of subordinate ids can be removed only by the engine that made them."""
    acts: list[Callable[[], Any]] = [
        *(lambda c=c: c.remove(force=True) for c in engine.containers.list(all=True)),
        *(lambda i=i: engine.images.remove(i.id, force=True) for i in engine.images.list()),
        lambda: engine.runtime.shutdown(force=True),
        engine.close,
    ]
    for act in acts:
        with contextlib.suppress(LabkernelError, OSError):
            act()


def main(home: str, driver: str) -> None:
    if sys.stdin.buffer.read(1) == _DONE:
        return
    if Path(home, "root").exists():
        # Named and not imported, as the worker's tasks are: a service knows no engine.
        engine: Any = importlib.import_module("labkernel.engine")
        empty(engine.Engine.open(Path(home, "root"), runtime_dir=Path(home, "run"), driver=driver))
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
