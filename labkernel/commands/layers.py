"""`image tree` and `image diff`: what is in the layers of an image, and how two images differ."""

from __future__ import annotations

from typing import Any

import click

from ..imaging.layerview import differences, explore
from .grammar import IMAGE, command, flag, host_of
from .values import Listing


@command("tree", "[OPTIONS] IMAGE")
@flag("-s", "--summary", help="One line per layer")
@flag("--json", "as_json", help="As JSON")
@click.argument("image", type=IMAGE)
@click.pass_context
def tree(ctx: click.Context, /, image: str, *, summary: bool, as_json: bool) -> Any:
    """What each layer of an image added, changed and removed, and the bytes wasted."""
    import json

    host = host_of(ctx)
    found = explore(host.engine.images, image)
    if as_json:
        return Listing(text=json.dumps(found.to_dict(), indent=2))
    if host.notebook:
        return found
    return Listing(text=repr(found) if summary else found.text)


@command("diff", "IMAGE OTHER")
@click.argument("image", type=IMAGE)
@click.argument("other", type=IMAGE)
@click.pass_context
def diff(ctx: click.Context, /, image: str, other: str) -> Any:
    """Compare the file systems of two images: + is only in OTHER, - only in IMAGE, ~ in both and different."""
    changes = differences(host_of(ctx).engine.images, image, other)
    return Listing(changes, text="\n".join(change.text for change in changes) or "no difference")
