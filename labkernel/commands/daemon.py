"""`labkernel daemon`: the Docker Engine API for docker's own client and SDKs; `%daemon start` in a notebook."""

from __future__ import annotations

import os
from typing import Any

import click

from ..errors import UsageError
from .grammar import LabGroup, command, flag, host_of, many, option
from .values import Text

_OPTIONS = (
    many("-H", "--host", "hosts", help="Where to listen: unix:///PATH, tcp://HOST:PORT, fd:// (several)"),
    flag("--tls", help="Use TLS; implied by --tlsverify"),
    flag("--tlsverify", help="Use TLS and verify the remote"),
    option("--tlscacert", metavar="file", help="Trust certs signed only by this CA"),
    option("--tlscert", metavar="file", help="Path to TLS certificate file"),
    option("--tlskey", metavar="file", help="Path to TLS key file"),
)


def _listening(function: Any) -> Any:
    for each in reversed(_OPTIONS):
        function = each(function)
    return function


def _tls(flags: dict[str, Any]) -> Any:
    """The TLS settings of the flags, with docker's defaults below DOCKER_CERT_PATH; None without TLS."""
    from ..api.server import Tls

    if not (flags["tls"] or flags["tlsverify"]):
        if any(flags[name] for name in ("tlscacert", "tlscert", "tlskey")):
            raise UsageError("certificates without TLS", resolution="add --tlsverify")
        return None
    folder = os.environ.get("DOCKER_CERT_PATH") or os.path.expanduser("~/.docker")
    found = {
        name: flags[f"tls{name}"] or os.path.join(folder, default)
        for name, default in (("cert", "cert.pem"), ("key", "key.pem"), ("cacert", "ca.pem"))
    }
    authority = found["cacert"] if flags["tlsverify"] or flags["tlscacert"] else None
    return Tls(found["cert"], found["key"], authority, verify=flags["tlsverify"])


def _words(flags: dict[str, Any]) -> list[str]:
    words = [f"--host={address}" for address in flags["hosts"]]
    words += [f"--{name}" for name in ("tls", "tlsverify") if flags[name]]
    paths = {name: flags[name] for name in ("tlscacert", "tlscert", "tlskey") if flags[name]}
    return [*words, *(f"--{name}={os.path.abspath(path)}" for name, path in paths.items())]


@command("start", "[OPTIONS]")
@_listening
@click.pass_context
def start(ctx: click.Context, /, **flags: Any) -> Any:
    """Serve in the background; in a notebook also set DOCKER_HOST, for `!docker` and the Docker SDK."""
    from ..api import background

    host = host_of(ctx)
    running = background.start(host.own_engine.layout, host.own_engine.driver.name, _words(flags))
    if host.notebook:
        os.environ["DOCKER_HOST"] = running.address
    else:
        host.line(f"export DOCKER_HOST={running.address}")
    return running


@command("stop", "[OPTIONS]")
@click.pass_context
def stop(ctx: click.Context) -> None:
    """End the daemon in the background; containers go on."""
    from ..api import background

    host = host_of(ctx)
    ended = background.stop(host.own_engine.layout)
    if os.environ.get("DOCKER_HOST") in ended.addresses:
        del os.environ["DOCKER_HOST"]
    host.line(ended.address)


@command("status", "[OPTIONS]")
@click.pass_context
def status(ctx: click.Context) -> Any:
    """Show whether a daemon runs, and where it listens."""
    from ..api import background

    host = host_of(ctx)
    running = background.find(host.own_engine.layout)
    if running is None:
        return Text("no daemon runs; `daemon start` starts one")
    if host.notebook:
        return running
    return Text("\n".join([f"process {running.pid}", *(f"listens on {address}" for address in running.addresses)]))


@command("unit", "[OPTIONS] [service|socket]")
@click.argument("kind", type=click.Choice(["service", "socket"]), default="service")
@click.pass_context
def unit(ctx: click.Context, kind: str) -> Text:
    """Print systemd's user unit of the daemon."""
    from ..api import background

    return Text(background.unit(kind, host_of(ctx).own_engine.layout).rstrip())


class _Daemon(LabGroup):
    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS] | COMMAND"]


@click.group(
    "daemon",
    cls=_Daemon,
    invoke_without_command=True,
    no_args_is_help=False,
    help="Serve the Docker Engine API in the foreground until SIGTERM: docker's client and SDKs work with this engine.",
)
@_listening
@click.pass_context
def daemon(ctx: click.Context, /, **flags: Any) -> None:
    if ctx.invoked_subcommand is not None:
        return
    host = host_of(ctx)
    if host.notebook:
        raise UsageError("a cell cannot serve in the foreground", resolution="`%daemon start` serves in the background")
    from ..api import background, server

    engine = host.own_engine
    addresses = flags["hosts"] or [background.default_address(engine.layout)]
    server.serve(engine, addresses, tls=_tls(flags), notify=host.note)


for _each in (start, stop, status, unit):
    daemon.add_command(_each)
