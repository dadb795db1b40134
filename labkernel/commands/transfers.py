"""Commands that talk to registries: pull, push, login, logout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import LabkernelError, NoSuchImage, UsageError
from .grammar import IMAGE, command, flag, host_of, option
from .host import Host
from .values import Listing, tabulate


@contextmanager
def _watching(host: Host, *, quiet: bool) -> Iterator[Any]:
    """A display of layers: redrawn on a terminal and in a cell, lines elsewhere."""
    from ..widgets.transfers import Transfer

    if quiet or not (host.notebook or host.terminal_size()):
        yield Transfer(None, host.line, quiet=quiet)
        return
    with host.live() as redraw:
        yield Transfer(redraw, host.line)


@contextmanager
def _failing_with_1() -> Iterator[None]:
    # docker's 125 is for `run`; a pull or push that fails ends with 1.
    try:
        yield
    except LabkernelError as err:
        if not isinstance(err, UsageError):
            err.exit_code = 1
        raise


@command("pull", "[OPTIONS] NAME[:TAG|@DIGEST]")
@flag("-a", "--all-tags", help="Download all tagged images in the repository")
@flag("-q", "--quiet", help="Suppress verbose output")
@option("--platform", metavar="string", help="Set platform if the registry has several")
@flag("--no-unpack", help="Fetch without unpacking")
@click.argument("name", type=IMAGE)
@click.pass_context
def pull(ctx: click.Context, /, name: str, **flags: Any) -> Any:
    """Download an image from a registry."""
    host = host_of(ctx)
    with _failing_with_1():
        if not flags["all_tags"]:
            return _pull(host, name, flags)
        if ":" in name.rpartition("/")[2] or "@" in name:
            raise UsageError("tag can't be used with --all-tags/-a", resolution="name the repository alone")
        found = [_pull(host, f"{name}:{tag}", flags) for tag in host.engine.pulls.tags(name, notify=host.note)]
        return found if host.notebook else None


def _pull(host: Host, name: str, flags: dict[str, Any]) -> Any:
    from ..imaging.pulls import parse_name

    engine, quiet = host.engine, flags["quiet"]
    wanted = parse_name(name)
    if engine.images.is_builtin(wanted) or not engine.images.registry_answers(wanted.domain, fresh=True):
        image = engine.images.resolve(name, notify=(lambda line: None) if quiet else host.note, ask=False)
        if not host.notebook:
            host.line(image.tags[0] if image.tags else image.id)
        return image
    if not quiet:
        if wanted.tag and name.rpartition("/")[2].find(":") < 0:
            host.line(f"Using default tag: {wanted.tag}")
        host.line(f"{wanted.digest or wanted.tag}: Pulling from {wanted.path}")
    with _watching(host, quiet=quiet) as watch:
        done = engine.pulls.pull(
            name, platform=flags["platform"], unpack=not flags["no_unpack"], notify=host.note, watch=watch
        )
    if not quiet:
        host.line(f"Digest: {done.digest}")
        host.line(f"Status: {'Downloaded newer image' if done.new else 'Image is up to date'} for {wanted.familiar}")
    if not host.notebook:
        host.line(str(wanted))
    return done.image


@command("push", "[OPTIONS] NAME[:TAG]")
@flag("-a", "--all-tags", help="Push all tags of an image to the repository")
@flag("-q", "--quiet", help="Suppress verbose output")
@option("--chunk-size", metavar="bytes", type=click.IntRange(min=1), help="Send layers in chunks of this size")
@click.argument("name", type=IMAGE)
@click.pass_context
def push(ctx: click.Context, /, name: str, **flags: Any) -> None:
    """Upload an image to a registry."""
    from ..imaging.pulls import parse_name

    host = host_of(ctx)
    engine, quiet = host.engine, flags["quiet"]
    with _failing_with_1():
        wanted = parse_name(name)
        names = [str(wanted)]
        if flags["all_tags"]:
            names = list(engine.images.names(wanted.name))
            if not names:
                raise NoSuchImage(name)
        if not quiet:
            host.line(f"The push refers to repository [{wanted.name}]")
        for each in names:
            with _watching(host, quiet=quiet) as watch:
                done = engine.pushes.push(each, chunk_bytes=flags["chunk_size"], notify=host.note, watch=watch)
            host.line(each if quiet else f"{each.rpartition(':')[2]}: digest: {done.digest} size: {done.size_bytes}")


SEARCH_TITLES = {"Name": "NAME", "Description": "DESCRIPTION", "StarCount": "STARS", "IsOfficial": "OFFICIAL"}


@command("search", "[OPTIONS] [REGISTRY/]TERM")
@option("--limit", metavar="int", type=click.IntRange(min=1, max=100), default=25, help="Max number of search results")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("--no-trunc", help="Don't truncate output")
@click.argument("term")
@click.pass_context
def search(ctx: click.Context, /, term: str, limit: int, form: str | None, *, no_trunc: bool) -> Listing:
    """Search Docker Hub, or another registry, for images."""
    with _failing_with_1():
        found = host_of(ctx).engine.images.search(term, limit=limit)

    def view(each: dict[str, Any]) -> dict[str, Any]:
        text = " ".join(each["description"].split())
        return {
            "Name": each["name"],
            "Description": text if no_trunc or len(text) <= 45 else f"{text[:44]}…",
            "StarCount": str(each["star_count"]),
            "IsOfficial": "[OK]" if each["is_official"] else "",
        }

    return tabulate(found, view, SEARCH_TITLES, columns=tuple(SEARCH_TITLES), form=form)


@command("login", "[OPTIONS] [SERVER]")
@option("-u", "--username", metavar="string", help="Username")
@option("-p", "--password", metavar="string", help="Password or personal access token")
@flag("--password-stdin", help="Take the password from stdin")
@click.argument("server", required=False)
@click.pass_context
def login(ctx: click.Context, /, server: str | None, **flags: Any) -> None:
    """Authenticate to a registry."""
    host = host_of(ctx)
    username, password = flags["username"], flags["password"]
    if flags["password_stdin"]:
        if password:
            raise UsageError("--password and --password-stdin are mutually exclusive", exit_code=1)
        if not username:
            raise UsageError("Must provide --username with --password-stdin", exit_code=1)
        if host.stdin_fd() is None:
            raise UsageError("a cell has no stdin", resolution="log in from a terminal", exit_code=1)
        password = sys.stdin.read().rstrip("\r\n")
    elif password:
        host.warn("Using --password via the CLI is insecure. Use --password-stdin.")
    username, password = username or _ask(host, "Username"), password or _ask(host, "Password", hide=True)
    with _failing_with_1():
        path = host.engine.logins.login(server, username, password, notify=host.note)
    host.line(f"Login Succeeded (kept in {path})")


def _ask(host: Host, what: str, *, hide: bool = False) -> str:
    if host.notebook:
        import getpass

        # The kernel asks the front end: the answer is in no cell.
        return getpass.getpass(f"{what}: ") if hide else input(f"{what}: ")
    if not host.stdin_is_terminal():
        raise UsageError(
            "cannot perform an interactive login from a non TTY device",
            resolution="give --username and --password-stdin",
            exit_code=1,
        )
    return str(click.prompt(what, hide_input=hide, err=True))


@command("logout", "[SERVER]")
@click.argument("server", required=False)
@click.pass_context
def logout(ctx: click.Context, /, server: str | None) -> None:
    """Log out from a registry."""
    host = host_of(ctx)
    domain, was = host.engine.logins.logout(server)
    host.line(f"Removing login credentials for {domain}" if was else f"Not logged in to {domain}")
