"""`compose ps`, `logs`, `config` and the other commands that only look."""

from __future__ import annotations

import json
from typing import Any

import click

from ..display import human_size
from ..errors import UsageError
from .compose import Session
from .composelogs import Printer, follow, past, short_name
from .container import moment
from .grammar import command, flag, host_of, option, words
from .values import Listing, Text, tabulate

_TITLES = {
    "Name": "NAME",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "Service": "SERVICE",
    "RunningFor": "CREATED",
    "Status": "STATUS",
    "Ports": "PORTS",
}


def table(containers: list[Any], *, projects: str, form: str | None = None, quiet: bool = False) -> Listing:
    """The containers of a project as `compose ps` lists them."""
    from .views import container_view

    def view(container: Any) -> dict[str, Any]:
        fields = container_view(container)
        labels = container.labels
        return {
            **fields,
            "ID": container.id if quiet else fields["ID"],
            "Name": container.name,
            "Service": labels.get("com.docker.compose.service", ""),
            "Project": projects,
            "ExitCode": int(container.runtime_state().get("exit_code") or 0) if container.status != "removed" else 0,
            "Health": "" if container.health in ("unknown", "none") else container.health,
        }

    return tabulate(containers, view, _TITLES, columns=list(_TITLES), form=form, quiet="ID" if quiet else None)


@command("ps", "[OPTIONS] [SERVICE...]")
@flag("-a", "--all", "everything", help="Show all stopped containers")
@option("--format", "form", metavar="string", help="table, json or a Go template")
@flag("-q", "--quiet", help="Only display IDs")
@flag("--services", "only_services", help="Display services")
@option("--status", metavar="string", help="Filter services by status")
@flag("--no-trunc", help="Don't truncate output")
@words("services")
@click.pass_context
def ps(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """List containers."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    found = session.service.containers(name, chosen, stopped=flags["everything"] or bool(flags["status"]))
    if flags["status"]:
        found = [each for each in found if each.status == flags["status"]]
    if flags["only_services"]:
        names = dict.fromkeys(each.labels["com.docker.compose.service"] for each in found)
        return Listing(list(names), text="\n".join(names))
    return table(found, projects=name, form=flags["form"], quiet=flags["quiet"])


@command("logs", "[OPTIONS] [SERVICE...]")
@flag("-f", "--follow", help="Follow log output")
@option("--index", metavar="int", type=int, help="index of the container if service has multiple replicas")
@flag("--no-color", help="Produce monochrome output")
@flag("--no-log-prefix", help="Don't print prefix in logs")
@option("--since", metavar="string", help="Show logs since timestamp or relative (e.g. 42m)")
@option("--until", metavar="string", help="Show logs before a timestamp or relative (e.g. 42m)")
@option("-n", "--tail", metavar="string", default="all", help="Number of lines to show from the end of the logs")
@flag("-t", "--timestamps", help="Show timestamps")
@words("services")
@click.pass_context
def logs(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> None:
    """View output from containers."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    found = session.service.containers(name, chosen)
    if flags["index"] is not None:
        index = str(flags["index"])
        found = [each for each in found if each.labels.get("com.docker.compose.container-number") == index]
    tail = flags["tail"]
    if tail != "all" and not tail.isdigit():
        raise UsageError(f'invalid value for "tail": {tail}', resolution="a number of lines, or all")
    settings = {
        "tail": tail if tail == "all" else int(tail),
        "since": moment(flags["since"]),
        "until": moment(flags["until"]),
    }
    printer = Printer(
        session.host,
        [short_name(each) for each in found],
        prefix=not flags["no_log_prefix"],
        colour=not flags["no_color"],
        timestamps=flags["timestamps"],
    )
    try:
        if flags["follow"]:
            follow(printer, found, settings=lambda each: settings)
        else:
            past(printer, found, **settings)
    except KeyboardInterrupt:
        if not flags["follow"]:
            raise
    finally:
        session.host.end_of_output()


@command("config", "[OPTIONS] [SERVICE...]")
@flag("--environment", help="Print environment used for interpolation")
@option("--format", "form", metavar="string", type=click.Choice(["yaml", "json"]), help="Format the output")
@option("--hash", "hashes", is_flag=False, flag_value="*", metavar="string", help="Print the service config hash")
@flag("--images", help="Print the image names, one per line")
@flag("--networks", help="Print the network names, one per line")
@flag("--no-interpolate", help="Don't interpolate environment variables")
@option("-o", "--output", metavar="string", help="Save to file")
@flag("--profiles", "only_profiles", help="Print the profile names, one per line")
@flag("-q", "--quiet", help="Only validate the configuration, don't print anything")
@flag("--services", "only_services", help="Print the service names, one per line")
@flag("--volumes", "only_volumes", help="Print the volume names, one per line")
@words("services")
@click.pass_context
def config(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """Parse, resolve and render compose file in canonical format."""
    from ..compose.settings import config_hash, image_name

    session = Session(ctx)
    project = session.load(interpolate=not flags["no_interpolate"])
    if services:
        project.services = {name: project.services[name] for name in project.select(services)}
    lines: list[str] | None = None
    if flags["only_services"]:
        lines = sorted(project.services)
    elif flags["only_volumes"]:
        lines = sorted(project.volumes)
    elif flags["networks"]:
        lines = sorted(project.networks)
    elif flags["only_profiles"]:
        every = [*project.services.values(), *project.others.values()]
        lines = sorted({profile for service in every for profile in service.get("profiles", ())})
    elif flags["images"]:
        lines = sorted({image_name(project, name) for name in project.services})
    elif flags["hashes"]:
        names = sorted(project.services) if flags["hashes"] == "*" else flags["hashes"].split(",")
        lines = [f"{name} {config_hash(project, name)}" for name in project.select(names, with_dependencies=False)]
    elif flags["environment"]:
        lines = [f"{key}={value}" for key, value in sorted(project.environment.items())]
    if flags["quiet"]:
        return None
    text = "\n".join(lines) if lines is not None else render(project, flags["form"] or "yaml", flags)
    if flags["output"]:
        (session.host.working_dir() / flags["output"]).write_text(f"{text}\n")
        return None
    return Text(text)


def render(project: Any, form: str, flags: dict[str, Any]) -> str:
    """The project as one file; a `$` of a value is doubled, so that it can be read again."""
    document = project.document()
    if not flags["no_interpolate"]:
        document = _escaped(document)
    if form == "json":
        return json.dumps(document, indent=2, ensure_ascii=False)
    import yaml

    head = yaml.safe_dump({"name": document.pop("name")}, sort_keys=False)
    return str(head + yaml.safe_dump(document, sort_keys=True, allow_unicode=True, width=1000)).rstrip("\n")


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


@command("ls", "[OPTIONS]")
@flag("-a", "--all", "everything", help="Show all stopped Compose projects")
@option("--format", "form", metavar="string", help="table or json")
@flag("-q", "--quiet", help="Only display project names")
@click.pass_context
def ls(ctx: click.Context, /, **flags: Any) -> Listing:
    """List running compose projects."""
    found = host_of(ctx).engine.compose.projects(stopped=flags["everything"])
    titles = {"Name": "NAME", "Status": "STATUS", "ConfigFiles": "CONFIG FILES"}
    if flags["form"] == "json":
        return Listing(found, text=json.dumps(found))
    return tabulate(
        found, lambda each: each, titles, columns=list(titles), form=None, quiet="Name" if flags["quiet"] else None
    )


@command("images", "[OPTIONS] [SERVICE...]")
@flag("-q", "--quiet", help="Only display IDs")
@words("services")
@click.pass_context
def images(ctx: click.Context, services: tuple[str, ...], *, quiet: bool) -> Listing:
    """List images used by the created containers."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    found = session.service.containers(name, chosen)

    def view(container: Any) -> dict[str, Any]:
        repository, _, tag = container.image_ref.rpartition(":")
        if "/" in tag or not repository:
            repository, tag = container.image_ref, "latest"
        return {
            "Container": container.name,
            "Repository": repository,
            "Tag": tag,
            "ID": container.image_id[7:19],
            "Size": human_size(container.image.size_bytes),
        }

    titles = {"Container": "CONTAINER", "Repository": "REPOSITORY", "Tag": "TAG", "ID": "IMAGE ID", "Size": "SIZE"}
    return tabulate(found, view, titles, columns=list(titles), form=None, quiet="ID" if quiet else None)


@command("top", "[SERVICES...]")
@words("services")
@click.pass_context
def top(ctx: click.Context, services: tuple[str, ...]) -> Text:
    """Display the running processes."""
    from ..display import table_text

    session = Session(ctx)
    name, chosen = session.scope(services)
    parts = []
    for container in session.service.containers(name, chosen, stopped=False):
        answer = container.top()
        parts.append(f"{container.name}\n{table_text(answer['Titles'], answer['Processes'])}\n")
    return Text("\n".join(parts))


@command("port", "[OPTIONS] SERVICE PRIVATE_PORT")
@option("--index", metavar="int", type=int, help="Index of the container if service has multiple replicas")
@option("--protocol", metavar="string", default="tcp", help="tcp or udp")
@click.argument("service")
@click.argument("private_port")
@click.pass_context
def port(ctx: click.Context, /, service: str, private_port: str, **flags: Any) -> Text:
    """Print the public port for a port binding."""
    session = Session(ctx)
    name, _ = session.scope((service,))
    container = session.service.container(name, service, index=flags["index"])
    bound = (container.ports or {}).get(f"{private_port}/{flags['protocol']}")
    if not bound:
        raise UsageError(f"no port {private_port}/{flags['protocol']} for container {container.name}", exit_code=1)
    return Text(f"{bound[0]['HostIp']}:{bound[0]['HostPort']}")


@command("version", "[OPTIONS]")
@flag("--short", help="Shows only Compose's version number")
@click.pass_context
def version(ctx: click.Context, *, short: bool) -> Text:
    """Show the version information."""
    from .. import __version__

    return Text(__version__ if short else f"labkernel compose version {__version__}")
