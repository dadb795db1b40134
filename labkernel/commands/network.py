"""Commands over networks."""

from __future__ import annotations

from typing import Any

import click

from ..errors import NoSuchNetwork
from .container import confirm, document, filters_of
from .grammar import CONTAINER, NETWORK, Entry, LabGroup, command, flag, host_of, many, option, words
from .host import remove_each
from .values import Listing, Text, tabulate
from .views import created_at

TITLES = {
    "ID": "NETWORK ID",
    "Name": "NAME",
    "Driver": "DRIVER",
    "Scope": "SCOPE",
    "IPv4": "IPV4",
    "IPv6": "IPV6",
    "Internal": "INTERNAL",
    "Labels": "LABELS",
    "CreatedAt": "CREATED AT",
}

ENTRIES = {
    "connect": Entry("network:connect", "Connect a container to a network"),
    "create": Entry("network:create", "Create a network"),
    "disconnect": Entry("network:disconnect", "Disconnect a container from a network"),
    "inspect": Entry("network:inspect", "Display detailed information on one or more networks"),
    "ls": Entry("network:ls", "List networks"),
    "list": Entry("network:ls", "List networks", ""),
    "prune": Entry("network:prune", "Remove all unused networks"),
    "rm": Entry("network:rm", "Remove one or more networks"),
    "remove": Entry("network:rm", "Remove one or more networks", ""),
}
network = LabGroup("network", help="Manage networks.", entries=ENTRIES)


@command("ls", "[OPTIONS]")
@many("-f", "--filter", metavar="filter", help="Provide filter values (e.g. driver=bridge)")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("--no-trunc", help="Do not truncate the output")
@flag("-q", "--quiet", help="Only display network IDs")
@click.pass_context
def ls(ctx: click.Context, filter: tuple[str, ...], form: str | None, *, no_trunc: bool, quiet: bool) -> Listing:
    """List networks."""
    found = host_of(ctx).engine.networks.list(filters=filters_of(filter))

    def view(each: Any) -> dict[str, Any]:
        return {
            "ID": each.id if no_trunc else each.short_id,
            "Name": each.name,
            "Driver": each.driver,
            "Scope": "local",
            "IPv4": "true",
            "IPv6": "false",
            "Internal": str(each.internal).lower(),
            "Labels": ",".join(f"{key}={value}" for key, value in sorted(each.labels.items())),
            "CreatedAt": created_at(each.created_at),
            "Label": lambda name: each.labels.get(name, ""),
        }

    columns = ("ID", "Name", "Driver", "Scope")
    return tabulate(found, view, TITLES, columns=columns, form=form, quiet="ID" if quiet else None)


@command("create", "[OPTIONS] NETWORK")
@option("-d", "--driver", metavar="string", default="bridge", help="Driver to manage the Network")
@many("--subnet", metavar="strings", help="Subnet in CIDR format that represents a network segment")
@many("--gateway", metavar="strings", help="IPv4 Gateway for the master subnet")
@many("--ip-range", metavar="strings", help="Allocate container ip from a sub-range")
@flag("--internal", help="Restrict external access to the network")
@flag("--attachable", help="Enable manual container attachment")
@flag("--ipv6", help="Enable or disable IPv6 address assignment")
@option("--scope", metavar="string", help="Control the network's scope")
@option("--ipam-driver", metavar="string", default="default", help="IP Address Management Driver")
@many("--label", help="Set metadata on a network")
@many("-o", "--opt", help="Set driver specific options")
@click.argument("name")
@click.pass_context
def create(ctx: click.Context, /, name: str, **flags: Any) -> Any:
    """Create a network."""
    host = host_of(ctx)
    parts = {"Subnet": flags["subnet"], "Gateway": flags["gateway"], "IPRange": flags["ip_range"]}
    count = max(map(len, parts.values()))
    pools = [{key: values[n] for key, values in parts.items() if n < len(values)} for n in range(count)]
    made = host.engine.networks.create(
        name,
        driver=flags["driver"],
        options=dict(word.partition("=")[::2] for word in flags["opt"]),
        ipam={"Driver": flags["ipam_driver"], "Config": pools},
        internal=flags["internal"],
        labels=dict(word.partition("=")[::2] for word in flags["label"]),
        enable_ipv6=flags["ipv6"],
        attachable=flags["attachable"],
        scope=flags["scope"],
    )
    if not host.notebook:
        host.line(made.id)
    return made


@command("connect", "[OPTIONS] NETWORK CONTAINER")
@many("--alias", metavar="strings", help="Add network-scoped alias for the container")
@option("--ip", metavar="ip", help="IPv4 address (e.g., 172.30.100.104)")
@many("--link", help="Add link to another container")
@click.argument("name", type=NETWORK)
@click.argument("container", type=CONTAINER)
@click.pass_context
def connect(
    ctx: click.Context, name: str, container: str, alias: tuple[str, ...], ip: str | None, link: tuple[str, ...]
) -> None:
    """Connect a container to a network."""
    host_of(ctx).engine.networks.get(name).connect(container, aliases=alias, ipv4_address=ip, links=list(link) or None)


@command("disconnect", "[OPTIONS] NETWORK CONTAINER")
@flag("-f", "--force", help="Force the container to disconnect from a network")
@click.argument("name", type=NETWORK)
@click.argument("container", type=CONTAINER)
@click.pass_context
def disconnect(ctx: click.Context, name: str, container: str, *, force: bool) -> None:
    """Disconnect a container from a network."""
    host_of(ctx).engine.networks.get(name).disconnect(container, force=force)


@command("rm", "NETWORK [NETWORK...]")
@flag("-f", "--force", help="Do not error if the network does not exist")
@words("names", least=1, kind=NETWORK)
@click.pass_context
def rm(ctx: click.Context, names: tuple[str, ...], *, force: bool) -> Any:
    """Remove one or more networks."""
    host = host_of(ctx)
    remove_each(host, names, lambda name: host.engine.networks.get(name).remove(), spare=NoSuchNetwork if force else ())


@command("inspect", "[OPTIONS] NETWORK [NETWORK...]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@flag("-v", "--verbose", help="Verbose output for diagnostics")
@words("names", least=1, kind=NETWORK)
@click.pass_context
def inspect(ctx: click.Context, names: tuple[str, ...], form: str | None, *, verbose: bool) -> Any:
    """Display detailed information on one or more networks."""
    host = host_of(ctx)
    found, errors = [], []
    for name in names:
        try:
            found.append(host.engine.networks.get(name).attrs)
        except NoSuchNetwork as err:
            errors.append(err)
    shown = document(found, form)
    if errors:
        host.line(shown.text) if not host.notebook else None
        raise errors[0]
    return shown


@command("prune", "[OPTIONS]")
@flag("-f", "--force", help="Do not prompt for confirmation")
@many("--filter", metavar="filter", help='Provide filter values (e.g. "until=<timestamp>")')
@click.pass_context
def prune(ctx: click.Context, *, force: bool, filter: tuple[str, ...]) -> Any:
    """Remove all unused networks."""
    host = host_of(ctx)
    confirm(host, "This will remove all custom networks not used by at least one container.", force=force)
    deleted = host.engine.networks.prune(filters=filters_of(filter) or None)["NetworksDeleted"]
    return Text("\n".join(["Deleted Networks:", *deleted, ""]) if deleted else "")
