"""Commands about the machine and the store (doctor, info, events, df, check, prune), and `inspect` of anything."""

from __future__ import annotations

import html
import json
import os
import platform
import re
import time
from typing import Any

import click

from .. import __version__
from ..display import human_size, table_html, without_formulas
from ..errors import LabkernelError, NotFoundError, UsageError
from .container import confirm, document, filters_of, moment
from .grammar import Entry, LabGroup, command, flag, host_of, many, option, words
from .host import Host
from .values import Listing, Text
from .views import deleted

ENTRIES = {
    "check": Entry("system:check", "Look for what is inconsistent or leaked"),
    "df": Entry("system:df", "Show disk usage"),
    "dial-stdio": Entry("dial:dial_stdio", "Carry standard input and output to the daemon"),
    "doctor": Entry("system:doctor", "Try each capability of this machine"),
    "events": Entry("system:events", "Get events of the store"),
    "info": Entry("system:info", "Display system-wide information"),
    "prune": Entry("system:prune", "Remove unused data"),
    "reset": Entry("reset:reset", "Remove everything: containers, images, volumes, networks, the build cache"),
}
system = LabGroup("system", help="Manage the store and look at the machine.", entries=ENTRIES)


class Report(Listing):
    """The doctor's capabilities, with what is missing first in mind: `yes` or `no`, the cause, and the remedy."""

    def __init__(self, capabilities: list[Any], driver: Any) -> None:
        super().__init__(capabilities)
        self.driver = driver

    def _lines(self) -> list[tuple[str, str, str, str]]:
        return [("yes" if c.ok else "no", c.name, c.cause or "", "" if c.ok else c.remedy or "") for c in self]

    @property
    def text(self) -> str:
        width = max((len(name) for _, name, _, _ in self._lines()), default=0)
        out = [f"driver: {self.driver.name}"]
        out += [f"  warning: {warning}" for warning in self.driver.warnings]
        for mark, name, cause, remedy in self._lines():
            out.append(f"{mark:<3}  {name:<{width}}  {cause}".rstrip())
            if remedy:
                out.append(f"     {'':<{width}}  → {remedy}")
        return "\n".join(out)

    @without_formulas
    def _repr_html_(self) -> str:
        """What is missing or has something to say as a table; the plain yeses in one line below."""
        lines = self._lines()
        rows = [("✓" if mark == "yes" else "✗", *rest) for mark, *rest in lines if mark == "no" or rest[1]]
        rows.sort(key=lambda row: row[0] == "✓")
        plain = ", ".join(html.escape(name) for mark, name, cause, _ in lines if mark == "yes" and not cause)
        notes = "".join(f"<p><em>{html.escape(str(warning))}</em></p>" for warning in self.driver.warnings)
        caption = f"driver: {self.driver.name}"
        table = table_html(("", "capability", "what was seen", "what would help"), rows, caption=caption)
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", f"{notes}{table}<p>✓ works: {plain}</p>")

    def to_dict(self) -> dict[str, Any]:
        return {
            "driver": self.driver.name,
            "warnings": [str(warning) for warning in self.driver.warnings],
            "capabilities": [capability.to_dict() for capability in self],
        }


@command("doctor", "[OPTIONS]")
@flag("--json", "as_json", help="Print JSON")
@flag("--fresh", help="Try everything again instead of using what was seen since the machine started")
@click.pass_context
def doctor(ctx: click.Context, *, as_json: bool, fresh: bool) -> Any:
    """Try each capability of this machine, and tell the cause and the remedy of what does not work."""
    engine = host_of(ctx).engine
    report = Report(engine.doctor(fresh=fresh), engine.driver)
    return Text(json.dumps(report.to_dict(), indent=2)) if as_json else report


@command("check", "[OPTIONS]")
@flag("--json", "as_json", help="Print JSON")
@flag("--verify", help="Also read and hash every blob, which takes a while")
@click.pass_context
def check(ctx: click.Context, *, as_json: bool, verify: bool) -> Any:
    """Look for what is inconsistent or leaked; exit code 0 when there is nothing."""
    host = host_of(ctx)
    found = host.engine.check(verify=verify)
    if as_json:
        host.line(json.dumps({"ok": not found, "problems": [p._asdict() for p in found]}, indent=2))
    for problem in found if not as_json else ():
        host.line(str(problem))
    if found:
        raise LabkernelError(f"{len(found)} inconsistent or leaked", resolution="`system prune -f` removes leftovers")
    return None if as_json else Text("nothing inconsistent, nothing leaked")


@command("version", "[OPTIONS]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@click.pass_context
def version(ctx: click.Context, form: str | None) -> Any:
    """Show the version information."""
    part = {
        "Version": __version__,
        "ApiVersion": "1.43",
        "Os": "linux",
        "Arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "KernelVersion": os.uname().release,
        "PythonVersion": platform.python_version(),
    }
    if form:
        return (
            document([{"Client": part, "Server": part}], form)
            if form != "json"
            else _compact({"Client": part, "Server": part})
        )
    lines = [f" {name + ':':<16}{value}" for name, value in part.items()]
    return Text("\n".join(["labkernel (the engine is embedded, client and server are one)", *lines]))


def _compact(data: Any) -> Text:
    return Text(json.dumps(data, separators=(",", ":"), default=str))


@command("info", "[OPTIONS]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@click.pass_context
def info(ctx: click.Context, form: str | None) -> Any:
    """Display system-wide information."""
    host = host_of(ctx)
    engine = host.engine
    containers = engine.containers.list(all=True)
    states = [container.status for container in containers]
    data = {
        "Containers": len(containers),
        "ContainersRunning": states.count("running"),
        "ContainersPaused": states.count("paused"),
        "ContainersStopped": len(states) - states.count("running") - states.count("paused"),
        "Images": len(engine.images.list()),
        "Driver": engine.driver.name,
        "LabkernelRoot": str(engine.layout.root),
        "RuntimeDir": str(engine.layout.runtime_dir),
        "KernelVersion": os.uname().release,
        "OperatingSystem": _operating_system(),
        "OSType": "linux",
        "Architecture": platform.machine(),
        "NCPU": os.cpu_count() or 1,
        "MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "Name": os.uname().nodename,
        "ServerVersion": __version__,
        "Warnings": [str(warning) for warning in engine.driver.warnings],
    }
    if form:
        return _compact(data) if form == "json" else document([data], form)
    lines = [f"{name}: {value}" for name, value in data.items() if name not in ("Warnings", "MemTotal")]
    lines.append(f"Total Memory: {human_size(float(str(data['MemTotal'])))}")
    return Text("\n".join([*lines, *(f"WARNING: {warning}" for warning in engine.driver.warnings)]))


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


@command("events", "[OPTIONS]")
@option("--since", metavar="string", help="Show all events created since timestamp")
@option("--until", metavar="string", help="Stream events until this timestamp")
@many("-f", "--filter", metavar="filter", help="Filter output based on conditions provided")
@option("--format", "form", metavar="string", help="json or a Go template")
@click.pass_context
def events(ctx: click.Context, since: str | None, until: str | None, filter: tuple[str, ...], form: str | None) -> Any:
    """Get events of the store: past ones with --since, and live ones until interrupted (not in a notebook)."""
    host = host_of(ctx)
    start, end = moment(since), moment(until)
    if host.notebook and end is None:
        end, start = time.time(), (start if since else 0.0)
    try:
        for event in host.engine.history.stream(start, end, filters_of(filter)):
            host.line(_event_line(event, form))
    except KeyboardInterrupt:
        pass
    return None


def _event_line(event: dict[str, Any], form: str | None) -> str:
    if form in ("json", "{{json .}}"):
        return json.dumps(event, separators=(",", ":"), default=str)
    if form:
        from .template import render

        return render(form.replace("\\t", "\t").replace("\\n", "\n"), _template_event(event))
    actor = event["Actor"]
    attributes = ", ".join(f"{key}={value}" for key, value in sorted(actor["Attributes"].items()))
    return f"{_stamp(event)} {event['Type']} {event['Action']} {actor['ID']}" + (
        f" ({attributes})" if attributes else ""
    )


def _stamp(event: dict[str, Any]) -> str:
    """Local time with nanoseconds, as Go writes it."""
    local = time.localtime(event["time"])
    zone = time.strftime("%z", local)
    zone = "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}"
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{event['timeNano'] % 1_000_000_000:09d}{zone}"


def _template_event(event: dict[str, Any]) -> dict[str, Any]:
    names = {"status": "Status", "from": "From", "time": "Time", "timeNano": "TimeNano", "scope": "Scope"}
    return {**event, "ID": event["Actor"]["ID"], **{name: event.get(key, "") for key, name in names.items()}}


@command("df", "[OPTIONS]")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("-v", "--verbose", help="Show detailed information on space usage")
@click.pass_context
def df(ctx: click.Context, form: str | None, *, verbose: bool) -> Any:
    """Show disk usage."""
    from .usage import usage_table

    return usage_table(host_of(ctx).engine, form)


@command("prune", "[OPTIONS]")
@flag("-a", "--all", help="Remove all unused images not just dangling ones")
@flag("-f", "--force", help="Do not prompt for confirmation")
@flag("--volumes", help="Prune anonymous volumes")
@many("--filter", metavar="filter", help="Provide filter values")
@click.pass_context
def prune(ctx: click.Context, *, all: bool, force: bool, volumes: bool, filter: tuple[str, ...]) -> Any:
    """Remove unused data: stopped containers and VMs, networks, images, the build cache, with --volumes volumes."""
    host = host_of(ctx)
    engine: Any = host.engine
    confirm(host, "This will remove all stopped containers, unused networks and unused images.", force=force)
    filters: dict[str, Any] = filters_of(filter) or {}
    reclaimed = 0.0
    lines: list[str] = []
    engine.containers.reconcile()
    wanted = [("Deleted Containers:", engine.containers, "ContainersDeleted", filters)]
    wanted.append(("Deleted Networks:", engine.networks, "NetworksDeleted", filters))
    if volumes:
        wanted.append(("Deleted Volumes:", engine.volumes, "VolumesDeleted", filters))
    image_filters = {**filters, "dangling": ["false"]} if all else filters
    # As with docker, labels do not count for the cache, which has none.
    chosen_cache = {"until": filters["until"]} if "until" in filters else {}
    wanted.append(("Deleted build cache:", engine.builds, "CachesDeleted", chosen_cache))
    wanted.append(("Deleted Images:", engine.images, "ImagesDeleted", image_filters))
    for title, service, key, chosen in wanted:
        answer = service.prune(filters=chosen) if chosen else service.prune()
        names = [n if isinstance(n, str) else deleted(n) for n in answer.get(key) or []]
        lines += [title, *names, ""] if names else []
        reclaimed += answer.get("SpaceReclaimed", 0)
    engine.networks.sweep()
    machines = engine.vms.prune(filters, all=all)
    lines += ["Deleted VMs:", *machines["VMsDeleted"], ""] if machines["VMsDeleted"] else []
    reclaimed += machines["SpaceReclaimed"] + (engine.images.sweep() or 0)
    return Text("\n".join([*lines, f"Total reclaimed space: {human_size(reclaimed)}"]))


@command("inspect", "[OPTIONS] NAME|ID [NAME|ID...]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@flag("-s", "--size", help="Display total file sizes if the type is container")
@option("--type", "kind", metavar="string", help="Only inspect objects of the given type")
@words("names", least=1)
@click.pass_context
def inspect(ctx: click.Context, names: tuple[str, ...], form: str | None, kind: str | None, *, size: bool) -> Any:
    """Return low-level information on Docker objects."""
    return inspected(host_of(ctx), names, form, kind, size=size)


def inspected(
    host: Host, names: tuple[str, ...], form: str | None, kind: str | None = None, *, size: bool = False
) -> Any:
    """What each name is, containers first, then images, volumes and networks; goes on after one that is nothing."""
    engine: Any = host.engine
    services = {"container": "containers", "image": "images", "volume": "volumes", "network": "networks", "vm": "vms"}
    if kind and kind not in services:
        known = ", ".join(f'"{name}"' for name in services)
        raise UsageError(f'unknown type: "{kind}": must be one of {known}', exit_code=1)
    found: list[Any] = []
    missing: list[str] = []
    for name in names:
        for service in [services[kind]] if kind else services.values():
            try:
                thing = getattr(engine, service).get(name)
                sizes = dict(zip(("SizeRw", "SizeRootFs"), thing.sizes(), strict=True)) if _sized(service, size) else {}
                found.append({**thing.attrs, **sizes})
                break
            except NotFoundError:
                continue
            except LabkernelError:
                if kind:
                    raise
        else:
            missing.append(name)
    if missing:
        if not host.notebook:
            # docker's, too: scripts read the array that is left
            host.line(document(found, form).text)
        raise LabkernelError(
            f"No such {kind or 'object'}: {', '.join(missing)}",
            resolution="`ps -a`, `images` and `volume ls` list them",
        )
    return document(found, form)


def _sized(service: str, size: bool) -> bool:  # noqa: FBT001
    return size and service == "containers"
