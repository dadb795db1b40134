"""Commands over volumes."""

from __future__ import annotations

from typing import Any

import click

from ..errors import NoSuchVolume
from .container import confirm, document, filters_of, pruned
from .grammar import VOLUME, Entry, LabGroup, command, flag, host_of, many, option, words
from .host import remove_each, snapshot_of
from .values import Listing, tabulate

TITLES = {
    "Driver": "DRIVER",
    "Name": "VOLUME NAME",
    "Mountpoint": "MOUNTPOINT",
    "Labels": "LABELS",
    "Scope": "SCOPE",
    "Size": "SIZE",
    "Links": "LINKS",
}

ENTRIES = {
    "create": Entry("volume:create", "Create a volume"),
    "inspect": Entry("volume:inspect", "Display detailed information on one or more volumes"),
    "ls": Entry("volume:ls", "List volumes"),
    "list": Entry("volume:ls", "List volumes", ""),
    "prune": Entry("volume:prune", "Remove unused local volumes"),
    "rm": Entry("volume:rm", "Remove one or more volumes"),
    "remove": Entry("volume:rm", "Remove one or more volumes", ""),
    "snapshot": Entry("volume:snapshot", "Keep the files of a volume under a name"),
    "restore": Entry("volume:restore", "Go back to a snapshot of a volume"),
}
volume = LabGroup("volume", help="Manage volumes.", entries=ENTRIES)


@command("ls", "[OPTIONS]")
@many("-f", "--filter", metavar="filter", help="Provide filter values (e.g. dangling=true)")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("-q", "--quiet", help="Only display volume names")
@click.pass_context
def ls(ctx: click.Context, filter: tuple[str, ...], form: str | None, *, quiet: bool) -> Listing:
    """List volumes."""
    found = host_of(ctx).engine.volumes.list(filters=filters_of(filter))

    def view(volume: Any) -> dict[str, Any]:
        attrs = volume.attrs
        labels = attrs.get("Labels") or {}
        return {
            "Driver": attrs.get("Driver", "local"),
            "Name": volume.name,
            "Mountpoint": attrs.get("Mountpoint", ""),
            "Labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
            "Scope": "local",
            "Size": "N/A",
            "Links": "N/A",
            "Label": lambda name: labels.get(name, ""),
        }

    return tabulate(found, view, TITLES, columns=("Driver", "Name"), form=form, quiet="Name" if quiet else None)


@command("create", "[OPTIONS] [VOLUME]")
@option("-d", "--driver", metavar="string", default="local", help="Specify volume driver name")
@many("--label", help="Set metadata for a volume")
@many("-o", "--opt", help="Set driver specific options")
@click.argument("name", required=False)
@click.pass_context
def create(ctx: click.Context, name: str | None, driver: str, label: tuple[str, ...], opt: tuple[str, ...]) -> Any:
    """Create a volume."""
    host = host_of(ctx)
    settings: dict[str, Any] = {"labels": dict(word.partition("=")[::2] for word in label)} if label else {}
    if driver != "local":
        settings["driver"] = driver
    if opt:
        settings["driver_opts"] = dict(word.partition("=")[::2] for word in opt)
    made = host.engine.volumes.create(name, **settings)
    if not host.notebook:
        host.line(made.name)
    return made


@command("rm", "[OPTIONS] VOLUME [VOLUME...]")
@flag("-f", "--force", help="Force the removal of one or more volumes")
@words("names", least=1, kind=VOLUME)
@click.pass_context
def rm(ctx: click.Context, names: tuple[str, ...], *, force: bool) -> Any:
    """Remove one or more volumes."""
    host = host_of(ctx)
    remove_each(
        host, names, lambda name: host.engine.volumes.get(name).remove(force=force), spare=NoSuchVolume if force else ()
    )


@command("inspect", "[OPTIONS] VOLUME [VOLUME...]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@words("names", least=1, kind=VOLUME)
@click.pass_context
def inspect(ctx: click.Context, names: tuple[str, ...], form: str | None) -> Any:
    """Display detailed information on one or more volumes."""
    engine = host_of(ctx).engine
    return document([engine.volumes.get(name).attrs for name in names], form)


@command("snapshot", "[OPTIONS] VOLUME [NAME]")
@flag("--rm", help="Remove the snapshot NAME instead")
@click.argument("volume", type=VOLUME)
@click.argument("name", required=False)
@click.pass_context
def snapshot(ctx: click.Context, volume: str, name: str | None, *, rm: bool) -> None:
    """Keep the files of a volume as they are now, to go back to them. `volume inspect` lists its snapshots."""
    host = host_of(ctx)
    snapshot_of(host, host.engine.volumes.get(volume), name, rm=rm)


@command("restore", "VOLUME [NAME]")
@click.argument("volume", type=VOLUME)
@click.argument("name", required=False)
@click.pass_context
def restore(ctx: click.Context, volume: str, name: str | None) -> None:
    """Go back to a snapshot of a volume, the newest when none is named: resets an exercise."""
    host = host_of(ctx)
    host.line(host.engine.volumes.get(volume).restore(name))


@command("prune", "[OPTIONS]")
@flag("-a", "--all", help="Remove all unused volumes, not just anonymous ones")
@flag("-f", "--force", help="Do not prompt for confirmation")
@many("--filter", metavar="filter", help="Provide filter values (e.g. label=<label>)")
@click.pass_context
def prune(ctx: click.Context, *, all: bool, force: bool, filter: tuple[str, ...]) -> Any:
    """Remove unused local volumes."""
    host = host_of(ctx)
    kind = "all local volumes" if all else "anonymous local volumes"
    confirm(host, f"This will remove {kind} not used by at least one container.", force=force)
    filters: dict[str, Any] = filters_of(filter) or {}
    if all:
        filters["all"] = ["true"]
    answer = host.engine.volumes.prune(filters=filters or None)
    return pruned("Deleted Volumes:", answer.get("VolumesDeleted") or [], answer.get("SpaceReclaimed", 0))
