"""`debug`: a shell, or one command, in the file system just before the step a build failed at."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from ..errors import LabkernelError, UsageError
from . import foreground
from .grammar import command, flag, host_of, option, words
from .host import Host
from .run import _wait_until_gone, checked, finished


@command("debug", "[OPTIONS] [COMMAND] [ARG...]", interspersed=False)
@option("-u", "--user", metavar="string", help="Username or UID instead of the step's")
@option("-w", "--workdir", metavar="string", help="Working directory instead of the step's")
@option("--network", metavar="network", help="Connect to a network (none, host)")
@flag("--check", help="Raise an error when the command ends with a status other than 0")
@words("arguments")
@click.pass_context
def debug(ctx: click.Context, /, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Look around where the last build failed.

    Opens a shell in the file system just before the failing step, with that step's user, directory and variables; with
    COMMAND it runs that instead. In a cell the shell asks for one line after the other, until `exit`; where nobody can
    be asked, only the step is shown. Nothing that is changed there is kept, and the next build ends it.
    """
    from ..building.debug import find_failure
    from .dialogue import speaks

    host = host_of(ctx)
    failed = find_failure(host.engine.db)
    terminal = host.stdin_is_terminal()
    if not arguments and not terminal:
        if host.notebook and not (host.can_ask() and speaks(failed.shell)):
            return failed
        if not host.notebook:
            raise UsageError("the input device is not a TTY", resolution="debug COMMAND… runs one command")
    if not arguments:
        host.note(repr(failed).rpartition("\n")[0])
    image = failed.image(host.engine.images)
    argv = list(arguments) or ([failed.shell] if terminal else [failed.shell, "-i"])
    try:
        return _run(
            host, image.id, argv, failed.environment, flags, shell=not arguments, tty=not arguments and terminal
        )
    finally:
        # Another container may have been made from it meanwhile; it is then a dangling image like any other.
        host.engine.images.remove(image.id, force=True)


def _run(
    host: Host,
    image: str,
    argv: list[str],
    environment: dict[str, str],
    flags: dict[str, Any],
    *,
    shell: bool,
    tty: bool,
) -> Any:
    import time

    from .dialogue import Dialogue

    settings: dict[str, Any] = {
        "environment": dict(environment),
        "auto_remove": True,
        "tty": tty,
        "stdin_open": shell,
        **({"user": flags["user"]} if flags["user"] else {}),
        **({"working_dir": flags["workdir"]} if flags["workdir"] else {}),
        **({"network_mode": flags["network"]} if flags["network"] else {}),
    }
    before = time.monotonic()
    container, attachment = host.engine.containers.run_attached(
        image, argv, notify=host.note, tied=host.notebook, **settings
    )
    try:
        if shell and not tty:
            code = Dialogue(host, attachment).hold(container.kill)
        else:
            code = foreground.stream(host, attachment, kill=container.kill, stdin=tty, tty=tty)
        if code == foreground.DETACHED:
            container.kill()
            code = 0
        result = finished(container, attachment, code, before)
    except BaseException:
        with contextlib.suppress(LabkernelError):  # ended by what interrupted us
            container.kill()
        raise
    finally:
        _wait_until_gone(host, container)  # its image is removed next
    return checked(result, flags["check"])
