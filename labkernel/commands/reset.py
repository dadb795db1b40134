"""`system reset`: the store as it was before its first use."""

from __future__ import annotations

import os
import shutil
from typing import Any

import click

from ..errors import LabkernelError, NotFoundError
from .container import confirm
from .grammar import command, flag, host_of
from .values import Text


@command("reset", "[OPTIONS]")
@flag("-f", "--force", help="Do not prompt for confirmation")
@click.pass_context
def reset(ctx: click.Context, *, force: bool) -> Any:
    """Remove all containers, images, volumes, networks and caches, and stop the supervisor.

    Nothing is left in the store's directory, and nothing on the machine.
    """
    host = host_of(ctx)
    engine: Any = host.engine
    root = str(engine.layout.root)
    confirm(host, f"This will remove all containers, images, volumes, networks and caches in {root}.", force=force)
    # Each by its own service first: it knows what lies elsewhere, and files of subordinate ids need the supervisor.
    for container in engine.containers.list(all=True):
        container.remove(force=True, v=True)
    engine.containers.reconcile()
    engine.networks.prune()
    for volume in engine.volumes.list():
        volume.remove(force=True)
    engine.builds.prune()
    for image in engine.images.list(all=True):
        try:
            engine.images.remove(image.id, force=True)
        except NotFoundError:
            pass  # it went with another one
    engine.images.sweep()
    engine.runtime.shutdown(force=True)
    engine.close()
    left = _empty(root)
    if left:
        raise LabkernelError(f"could not be removed: {', '.join(left[:5])}", resolution="remove them as their owner")
    return Text(f"nothing is left in {root}")


def _empty(root: str) -> list[str]:
    """Remove what is in the directory; returns what would not go."""
    left: list[str] = []
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, onerror=lambda _call, path, _info: left.append(path))
        else:
            os.unlink(entry.path)
    return left
