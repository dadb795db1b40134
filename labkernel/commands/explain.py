"""`container explain`: what the sandbox does for a command line, step by step, before or after it has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click

from ..errors import LabkernelError, NoSuchContainer, NotFoundError, StartError
from .grammar import IMAGE, command, flag, host_of, words
from .host import Host
from .run import _source, run_flags
from .settings import settings_of


@command("explain", "[OPTIONS] IMAGE [COMMAND] [ARG...] | CONTAINER", interspersed=False)
@run_flags
@flag("--run", "carry_out", help="Run it, too: which step was denied, and which system calls its filter denied")
@click.argument("image", type=IMAGE)
@words("arguments")
@click.pass_context
def explain(ctx: click.Context, /, image: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Show each step the sandbox takes for a run line, in the order taken, with the manual pages.

    Takes the flags of run. The container is made to be looked at, and removed; the name of one that is there shows
    that one. With --run it is run, and what was denied is marked.
    """
    from ..running.explaining import explain as steps_of

    host = host_of(ctx)
    settings = settings_of(flags)
    if not arguments and not settings:
        with contextlib.suppress(NoSuchContainer, NotFoundError):
            return steps_of(host.engine.containers.get(image))
    image, notify = _source(host, image, flags)
    if flags["carry_out"]:
        settings["count_denials"] = True
    container = host.engine.containers.create(image, list(arguments) or None, notify=notify, **settings)
    with _removed(container):
        for warning in container.warnings:
            host.warn(warning)
        if flags["carry_out"]:
            _carry_out(host, container)
        return steps_of(container)


@contextlib.contextmanager
def _removed(container: Any) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(LabkernelError):
            container.remove(force=True, v=True)


def _carry_out(host: Host, container: Any) -> None:
    """To its end, with its output; a start that is refused is what was asked about."""
    try:
        container.start()
    except StartError:
        return
    for name, data in container.log_records(follow=True):
        host.write(name, data)
    container.wait()
    host.end_of_output()
