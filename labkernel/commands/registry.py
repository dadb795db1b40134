"""Commands of the private registry: `registry serve`, `start`, `stop`, `ls`, `gc`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..display import human_size
from ..errors import UsageError
from .grammar import Entry, LabGroup, command, flag, host_of, option
from .values import Listing, tabulate

_SERVING = (
    option("--listen", metavar="host:port", default="127.0.0.1:5000", show_default=True, help="Address to listen on"),
    option("--root", metavar="directory", help="Directory of its content (default: below the store)"),
    flag("--store", help="Serve the store's own images; what is pushed is kept among its blobs"),
    option("--tls-cert", metavar="file", help="Certificate (PEM): serve TLS"),
    option("--tls-key", metavar="file", help="Key of the certificate (PEM)"),
    option("--htpasswd", metavar="file", help="Only users of this file (bcrypt) may pull and push"),
    flag("--read-only", help="Take no pushes and no deletes"),
    option("--quota", metavar="bytes", help="Most bytes it may keep, e.g. 20g"),
    option("--cache-of", metavar="domain", help="Fetch what is missing from this registry, and keep it"),
)


def _serving(function: Callable[..., Any]) -> Callable[..., Any]:
    for each in reversed(_SERVING):
        function = each(function)
    return function


def _options(flags: dict[str, Any]) -> Any:
    from ..registries import Options

    quota = flags.pop("quota", None)
    return Options(**flags, quota_bytes=None if quota is None else _size(quota))


def _size(text: str) -> int:
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    number, unit = text.lower().removesuffix("b"), 1
    if number[-1:] in units:
        number, unit = number[:-1], units[number[-1]]
    try:
        return int(float(number) * unit)
    except ValueError:
        raise UsageError(f"invalid size: '{text}'", resolution="bytes, or with k, m, g: --quota 20g") from None


@command("serve", "[OPTIONS]")
@_serving
@click.pass_context
def serve(ctx: click.Context, /, **flags: Any) -> None:
    """Serve in the foreground until SIGTERM."""
    host = host_of(ctx)
    if host.notebook:
        raise UsageError(
            "a cell cannot serve in the foreground", resolution="`%registry start` serves in the background"
        )
    host.engine.registry.serve(_options(flags), notify=host.note)


@command("start", "[OPTIONS]")
@_serving
@click.pass_context
def start(ctx: click.Context, /, **flags: Any) -> Any:
    """Serve in the background."""
    host = host_of(ctx)
    running = host.engine.registry.start(_options(flags))
    if not host.notebook:
        host.line(running.address)
    return running


@command("stop", "[HOST:PORT]")
@click.argument("address", required=False)
@click.pass_context
def stop(ctx: click.Context, /, address: str | None) -> None:
    """Stop a registry in the background."""
    host = host_of(ctx)
    host.line(host.engine.registry.stop(address).address)


@command("ls", "[OPTIONS]")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("-q", "--quiet", help="Only show addresses")
@click.pass_context
def ls(ctx: click.Context, /, form: str | None, *, quiet: bool) -> Listing:
    """List the registries that run."""
    titles = {"Address": "ADDRESS", "PID": "PID", "Root": "CONTENT"}
    return tabulate(
        host_of(ctx).engine.registry.list(),
        lambda each: {"Address": each.address, "PID": str(each.pid), "Root": each.root},
        titles,
        columns=tuple(titles),
        form=form,
        quiet="Address" if quiet else None,
    )


@command("gc", "[OPTIONS]")
@option("--root", metavar="directory", help="Directory of its content (default: below the store)")
@flag("--store", help="Of the registry on the store itself")
@option("--grace", metavar="seconds", type=click.FloatRange(min=0), help="Keep what is younger (default: one hour)")
@click.pass_context
def gc(ctx: click.Context, /, root: str | None, grace: float | None, *, store: bool) -> None:
    """Remove blobs that no manifest names any more."""
    host = host_of(ctx)
    more = {} if grace is None else {"grace_s": grace}
    count, freed = host.engine.registry.collect(_options({"root": root, "store": store}), **more)
    host.line(f"Removed {count} blobs, {human_size(freed)}")


registry = LabGroup(
    "registry",
    help="The private registry: pull from and push to this machine.",
    entries={"autobuild": Entry("autobuild:autobuild", "Build and publish what is pushed to a git repository")},
)
for _each in (serve, start, stop, ls, gc):
    registry.add_command(_each)
