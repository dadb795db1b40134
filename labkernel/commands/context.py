"""`context`: which engine the commands are for."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..contexts import EMBEDDED, VARIABLE, Contexts
from ..errors import LabkernelError, UsageError
from .grammar import Entry, LabGroup, command, flag, host_of, option, words
from .host import failures
from .values import Document, Listing, Text

_ENTRIES = {
    "create": Entry("context:create", "Create a context"),
    "inspect": Entry("context:inspect", "Display detailed information on one or more contexts"),
    "ls": Entry("context:ls", "List contexts"),
    "list": Entry("context:ls", "", ""),
    "rm": Entry("context:rm", "Remove one or more contexts"),
    "remove": Entry("context:rm", "", ""),
    "show": Entry("context:show", "Print the name of the current context"),
    "use": Entry("context:use", "Set the current context"),
}
context = LabGroup("context", help="Manage contexts: the embedded engine, and daemons elsewhere.", entries=_ENTRIES)
_TLS = ("ca", "cert", "key")


@command("create", "[OPTIONS] CONTEXT")
@option("--description", metavar="string", default="", help="Description of the context")
@option(
    "--docker", "endpoint", metavar="host=ADDRESS,…", help="host=unix://…|tcp://…|ssh://…, ca=, cert=, key= (files)"
)
@click.argument("name")
@click.pass_context
def create(ctx: click.Context, /, name: str, description: str, endpoint: str | None) -> Any:
    """Create a context."""
    given = dict(word.partition("=")[::2] for word in (endpoint or "").split(",") if word)
    wrong = sorted(set(given) - {"host", *_TLS})
    if wrong:
        raise UsageError(f"unrecognized config key: {wrong[0]}", resolution="host, ca, cert, key", exit_code=1)
    files = {key: given[key] for key in _TLS if given.get(key)}
    made = Contexts().create(name, given.get("host", ""), description=description, tls=files)
    host_of(ctx).note(f'Successfully created context "{made.name}"')
    return Text(made.name)


@command("ls", "[OPTIONS]")
@option("--format", "form", metavar="string", help="table or json")
@flag("-q", "--quiet", help="Only show context names")
@click.pass_context
def ls(ctx: click.Context, /, form: str | None, *, quiet: bool) -> Listing:
    """List contexts."""
    contexts = Contexts()
    current, found = contexts.current(), contexts.list()
    if quiet:
        return Listing([each.name for each in found], text="\n".join(each.name for each in found))
    if form == "json":
        lines = [
            {"Name": each.name, "Current": each.name == current, "Description": each.description,
             "DockerEndpoint": each.host, "Source": each.source} for each in found
        ]  # fmt: skip
        return Listing(lines, text="\n".join(map(json.dumps, lines)))
    if current not in {each.name for each in found}:
        found.append(contexts.get(current))
    rows = [
        (f"{each.name} *" if each.name == current else each.name, each.description, each.host, each.source)
        for each in found
    ]
    return Listing(found, header=("NAME", "DESCRIPTION", "DOCKER ENDPOINT", "SOURCE"), rows=rows)


@command("show", "")
@click.pass_context
def show(ctx: click.Context) -> Text:
    """Print the name of the current context."""
    return Text(Contexts().current())


@command("inspect", "[CONTEXT...]")
@words("names")
@click.pass_context
def inspect(ctx: click.Context, names: tuple[str, ...]) -> Document:
    """Display detailed information on one or more contexts."""
    contexts = Contexts()
    return Document([contexts.get(name).to_dict() for name in names or (contexts.current(),)])


@command("use", "CONTEXT|ADDRESS")
@click.argument("name")
@click.pass_context
def use(ctx: click.Context, name: str) -> Any:
    """Set the current context. In a notebook: of this notebook and the programs it starts; in a terminal: of this user.

    The name `embedded` comes back to labkernel's own engine.
    """
    host, contexts = host_of(ctx), Contexts()
    chosen = contexts.get(name)
    if chosen.host:
        from ..remote.engine import connect

        # Where it cannot be reached, nothing changes.
        connect(chosen).close()
    if host.notebook:
        os.environ[VARIABLE] = name
        if name == EMBEDDED:
            del os.environ[VARIABLE]
    else:
        contexts.use(name)
        if os.environ.get(VARIABLE):
            host.warn(f"{VARIABLE} environment variable overrides the active context; unset it to use {name}")
    host.note(f'Current context is now "{name}"')
    return Text(name)


@command("rm", "[OPTIONS] CONTEXT [CONTEXT...]")
@flag("-f", "--force", help="Force the removal of a context in use")
@words("names", least=1)
@click.pass_context
def rm(ctx: click.Context, names: tuple[str, ...], *, force: bool) -> Any:
    """Remove one or more contexts."""
    host, contexts = host_of(ctx), Contexts()
    done: list[str] = []
    errors: list[LabkernelError] = []
    for name in names:
        try:
            contexts.remove(name, force=force)
            done.append(name)
        except LabkernelError as err:
            errors.append(err)
    failures(errors, host, done)
    return Listing(done, text="\n".join(done))
