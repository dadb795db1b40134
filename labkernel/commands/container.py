"""Commands over containers that are there: list, stop, remove, look inside. Starting them is in `run`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..errors import LabkernelError, NoSuchContainer, UsageError
from .grammar import CONTAINER, command, flag, host_of, many, option, words
from .host import Host, failures
from .values import Document, Listing, Text, tabulate
from .views import CONTAINER_COLUMNS, CONTAINER_TITLES, container_view

NAMES = "[OPTIONS] CONTAINER [CONTAINER...]"


def filters_of(given: Sequence[str]) -> dict[str, list[str]] | None:
    """`--filter key=value`, several of them, as the SDK's dictionary."""
    result: dict[str, list[str]] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(
                f'invalid argument "{word}" for "-f, --filter" flag: bad format of filter (expected name=value)'
            )
        result.setdefault(key.strip().lower(), []).append(value.strip())
    return result or None


def each(host: Host, names: Sequence[str], act: Callable[[Any], object], *, missing_ok: bool = False) -> Any:
    """Do something to each named container and print its name, as docker does; goes on after one that fails.

    Returns the containers (one: itself). Raises the last error at the end.
    """
    done: list[Any] = []
    errors: list[LabkernelError] = []
    for name in names:
        try:
            found = host.engine.containers.get(name)
            act(found)
        except NoSuchContainer as err:
            if missing_ok:
                host.error(err)
            else:
                errors.append(err)
        except LabkernelError as err:
            errors.append(err)
        else:
            host.line(name)
            done.append(found)
    failures(errors, host, done)
    return None


@command("ps", "[OPTIONS]")
@flag("-a", "--all", help="Show all containers (default shows just running)")
@many("-f", "--filter", metavar="filter", help="Filter output based on conditions provided")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@option("-n", "--last", metavar="int", type=int, default=-1, help="Show n last created containers")
@flag("-l", "--latest", help="Show the latest created container (includes all states)")
@flag("--no-trunc", help="Don't truncate output")
@flag("-q", "--quiet", help="Only display container IDs")
@flag("-s", "--size", help="Display total file sizes")
@click.pass_context
def ps(ctx: click.Context, /, **flags: Any) -> Listing:
    """List containers."""
    if flags["quiet"] and flags["form"] not in (None, "table"):
        host_of(ctx).warn("Ignoring custom format, because both --format and --quiet are set.")
        flags["form"] = None
    limit = 1 if flags["latest"] else flags["last"] if flags["last"] > 0 else None
    found = host_of(ctx).engine.containers.list(
        all=flags["all"] or limit is not None, filters=filters_of(flags["filter"]), limit=limit
    )
    columns = (*CONTAINER_COLUMNS, "Size") if flags["size"] else CONTAINER_COLUMNS
    sizes = flags["size"] or ".Size" in (flags["form"] or "")
    return tabulate(
        found,
        lambda container: container_view(container, no_trunc=flags["no_trunc"], sizes=sizes),
        {**CONTAINER_TITLES, **_id_title(ctx)},
        columns=columns,
        form=flags["form"],
        quiet="ID" if flags["quiet"] else None,
    )


def _id_title(ctx: click.Context) -> dict[str, str]:
    """What the first column is called: machines are listed by the same commands (`vmverbs`)."""
    return {"ID": getattr(host_of(ctx).engine, "id_title", CONTAINER_TITLES["ID"])}


@command("stop", NAMES)
@option("-s", "--signal", metavar="string", help="Signal to send to the container")
@option("-t", "--timeout", "--time", metavar="int", type=int, help="Seconds to wait before killing the container")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def stop(ctx: click.Context, containers: tuple[str, ...], signal: str | None, timeout: int | None) -> Any:
    """Stop one or more running containers."""
    settings: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if signal:
        settings["signal"] = signal
    return each(host_of(ctx), containers, lambda container: container.stop(**settings))


@command("restart", NAMES)
@option("-s", "--signal", metavar="string", help="Signal to send to the container")
@option("-t", "--timeout", "--time", metavar="int", type=int, help="Seconds to wait before killing the container")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def restart(ctx: click.Context, containers: tuple[str, ...], signal: str | None, timeout: int | None) -> Any:
    """Restart one or more containers."""
    settings: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if signal:
        settings["signal"] = signal
    return each(host_of(ctx), containers, lambda container: container.restart(**settings))


@command("kill", NAMES)
@option("-s", "--signal", metavar="string", help="Signal to send to the container (default SIGKILL)")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def kill(ctx: click.Context, containers: tuple[str, ...], signal: str | None) -> Any:
    """Kill one or more running containers."""

    def act(container: Any) -> None:
        container.kill(signal or "KILL")
        if (signal or "KILL").upper().removeprefix("SIG") in ("KILL", "9"):
            # As docker: a container killed this way is gone when the command returns.
            container.wait(timeout=10)

    return each(host_of(ctx), containers, act)


@command("pause", "CONTAINER [CONTAINER...]")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def pause(ctx: click.Context, containers: tuple[str, ...]) -> Any:
    """Pause all processes within one or more containers."""
    return each(host_of(ctx), containers, lambda container: container.pause())


@command("unpause", "CONTAINER [CONTAINER...]")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def unpause(ctx: click.Context, containers: tuple[str, ...]) -> Any:
    """Unpause all processes within one or more containers."""
    return each(host_of(ctx), containers, lambda container: container.unpause())


@command("rm", NAMES)
@flag("-f", "--force", help="Force the removal of a running container (uses SIGKILL)")
@flag("-v", "--volumes", help="Remove anonymous volumes associated with the container")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def rm(ctx: click.Context, containers: tuple[str, ...], *, force: bool, volumes: bool) -> Any:
    """Remove one or more containers."""
    host = host_of(ctx)
    return each(host, containers, lambda container: container.remove(force=force, v=volumes), missing_ok=force)


@command("wait", "CONTAINER [CONTAINER...]")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def wait(ctx: click.Context, containers: tuple[str, ...]) -> Any:
    """Block until one or more containers stop, then print their exit codes."""
    host = host_of(ctx)
    codes: list[int] = []
    errors: list[LabkernelError] = []
    for name in containers:
        try:
            codes.append(int(host.engine.containers.get(name).wait()["StatusCode"]))
        except LabkernelError as err:
            errors.append(err)
    failures(errors, host, codes)
    return Listing(codes)


@command("rename", "CONTAINER NEW_NAME")
@click.argument("container", type=CONTAINER)
@click.argument("new_name")
@click.pass_context
def rename(ctx: click.Context, container: str, new_name: str) -> None:
    """Rename a container."""
    host_of(ctx).engine.containers.get(container).rename(new_name)


def moment(text: str | None) -> float | None:
    """`--since`/`--until`: an age (`42m`, `1h30m`), seconds since the epoch, or an RFC 3339 time."""
    if not text:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if re.fullmatch(r"(\d+(\.\d+)?(ms|h|m|s|d))+", text):
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s|d)", text)
        return time.time() - sum(float(number) * units[unit] for number, unit in parts)
    from .views import epoch

    found = epoch(text)
    if not found:
        raise UsageError(
            f'invalid value for "since": failed to parse value as time or duration: "{text}"',
            resolution="for example 42m or 2026-11-02T13:23:37Z",
            exit_code=1,
        )
    return found


@command("logs", "[OPTIONS] CONTAINER")
@flag("-f", "--follow", help="Follow log output")
@option("--since", metavar="string", help="Show logs since a timestamp or relative (e.g. 42m)")
@option("--until", metavar="string", help="Show logs before a timestamp or relative (e.g. 42m)")
@option("-n", "--tail", metavar="string", default="all", help="Number of lines to show from the end of the logs")
@flag("-t", "--timestamps", help="Show timestamps")
@flag("--details", help="Show extra details provided to logs")
@click.argument("container", type=CONTAINER)
@click.pass_context
def logs(ctx: click.Context, /, container: str, **flags: Any) -> None:
    """Fetch the logs of a container."""
    host = host_of(ctx)
    found = host.engine.containers.get(container)
    tail: int | str = "all"
    if flags["tail"] != "all":
        if not flags["tail"].lstrip("-").isdigit():
            raise UsageError(f'invalid value for "tail": {flags["tail"]}', resolution="a number or all", exit_code=1)
        tail = int(flags["tail"]) if int(flags["tail"]) >= 0 else "all"
    settings = {key: flags[key] for key in ("timestamps", "follow", "details")} | {"tail": tail}
    settings.update(since=moment(flags["since"]), until=moment(flags["until"]))
    _show_logs(host, found, settings)


def _show_logs(host: Host, container: Any, settings: dict[str, Any]) -> None:
    """Both streams, each to its own, in the order in which they were written."""
    try:
        for name, data in container.log_records(**settings):
            host.write(name, data)
    except KeyboardInterrupt:
        if not settings["follow"]:
            raise
    finally:
        host.end_of_output()


@command("top", "CONTAINER [ps OPTIONS]", interspersed=False)
@click.argument("container", type=CONTAINER)
@words("ps_options")
@click.pass_context
def top(ctx: click.Context, container: str, ps_options: tuple[str, ...]) -> Listing:
    """Display the running processes of a container."""
    found = host_of(ctx).engine.containers.get(container)
    answer = found.top(ps_args=" ".join(ps_options)) if ps_options else found.top()
    rows = answer["Processes"]
    return Listing([dict(zip(answer["Titles"], row, strict=False)) for row in rows], header=answer["Titles"], rows=rows)


@command("stats", "[OPTIONS] [CONTAINER...]")
@flag("-a", "--all", "everything", help="Show all containers (default shows just running)")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("--no-stream", help="Disable streaming stats and only pull the first result")
@flag("--stream", help="Keep streaming in a notebook too (ends with the stop button)")
@flag("--no-trunc", help="Do not truncate output")
@words("containers", kind=CONTAINER)
@click.pass_context
def stats(ctx: click.Context, /, containers: tuple[str, ...], **flags: Any) -> Any:
    """Display a live stream of container(s) resource usage statistics.

    In a notebook one reading is shown (lab.monitor(container) is the live picture), unless --stream is given.
    """
    host = host_of(ctx)
    found = (
        [host.engine.containers.get(name) for name in containers]
        if containers
        else host.engine.containers.list(all=flags["everything"])
    )
    once = flags["no_stream"] or (host.notebook and not flags["stream"])
    if once:
        return _stats_table(host, found, flags)
    with host.live() as redraw:
        try:
            while True:
                if not containers:
                    found = host.engine.containers.list(all=flags["everything"])
                listing = _stats_table(host, found, flags)
                redraw(listing.text, listing._repr_html_())
                if not listing and containers:
                    return None
        except KeyboardInterrupt:
            return None


_STATS_FIELDS = ("ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs")


def _stats_table(host: Host, containers: Sequence[Any], flags: dict[str, Any]) -> Listing:
    """One reading of each, over a second side by side (a percentage needs two)."""
    from concurrent.futures import ThreadPoolExecutor

    from ..metrics import STATS_HEADER, stats_row

    def reading(container: Any) -> dict[str, Any]:
        row = stats_row({"id": container.id, "name": container.name, **container.stats(stream=False)})
        cells = dict(zip(_STATS_FIELDS, row, strict=True))
        cells["ID"] = container.id if flags["no_trunc"] else container.id[:12]
        return {**cells, "Container": cells["ID"]}

    with ExitStack() as stack:
        if len(containers) > 1:
            pool = stack.enter_context(ThreadPoolExecutor(min(16, len(containers))))
            views = list(pool.map(reading, containers))
        else:
            views = [reading(container) for container in containers]
    titles = {**dict(zip(_STATS_FIELDS, STATS_HEADER, strict=True)), "Container": "CONTAINER"}
    titles["ID"] = getattr(host.engine, "id_title", titles["ID"])
    return tabulate(views, lambda view: view, titles, columns=_STATS_FIELDS, form=flags["form"])


@command("update", NAMES)
@option("--blkio-weight", metavar="uint16", type=int, help="Block IO (relative weight), between 10 and 1000")
@option("--cpu-period", metavar="int", type=int, help="Length of the CPU period, in microseconds")
@option("--cpu-quota", metavar="int", type=int, help="CPU time per period, in microseconds")
@option("-c", "--cpu-shares", metavar="int", type=int, help="CPU shares (relative weight)")
@option("--cpus", metavar="decimal", help="Number of CPUs")
@option("--cpuset-cpus", metavar="string", help="CPUs in which to allow execution (0-3, 0,1)")
@option("--cpuset-mems", metavar="string", help="MEMs in which to allow execution (0-3, 0,1)")
@option("-m", "--memory", metavar="bytes", help="Memory limit")
@option("--memory-reservation", metavar="bytes", help="Memory soft limit")
@option("--memory-swap", metavar="bytes", help="Memory plus swap: -1 for unlimited swap")
@option("--pids-limit", metavar="int", type=int, help="Limit of processes and threads (-1 for unlimited)")
@option("--restart", metavar="string", help="Restart policy to apply when a container exits")
@many("--mount", metavar="mount", help="Add or replace a mount (as run --mount); one that runs is stopped and started")
@many("--mount-rm", metavar="path", help="Take the mount at this path away")
@many("-p", "--publish", help="Publish a port (as run -p); one that runs is stopped and started")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def update(ctx: click.Context, /, containers: tuple[str, ...], **flags: Any) -> Any:
    """Update configuration of one or more containers."""
    from .settings import settings_of

    host = host_of(ctx)
    limits = settings_of(flags)
    if flags["mount_rm"]:
        limits["remove_mounts"] = list(flags["mount_rm"])
    if not limits:
        raise UsageError("you must provide one or more flags when using this command", exit_code=1)

    def act(container: Any) -> None:
        for warning in container.update(**limits)["Warnings"]:
            host.warn(warning)

    return each(host, containers, act)


@command("diff", "CONTAINER")
@click.argument("container", type=CONTAINER)
@click.pass_context
def diff(ctx: click.Context, container: str) -> Listing:
    """Inspect changes to files or directories on a container's filesystem."""
    changes = host_of(ctx).engine.containers.get(container).diff()
    lines = [f"{'CAD'[int(change['Kind'])]} {change['Path']}" for change in changes]
    return Listing(changes, text="\n".join(lines))


@command("port", "CONTAINER [PRIVATE_PORT[/PROTO]]")
@click.argument("container", type=CONTAINER)
@click.argument("private_port", required=False)
@click.pass_context
def port(ctx: click.Context, container: str, private_port: str | None) -> Listing:
    """List port mappings or a specific mapping for the container."""
    found = host_of(ctx).engine.containers.get(container)
    wanted = private_port and (private_port if "/" in private_port else f"{private_port}/tcp")
    lines = found.port_lines(wanted)
    if wanted and not lines:
        raise LabkernelError(f"No public port '{wanted}' published for {container}", exit_code=1)
    return Listing(lines, text="\n".join(lines))


@command("export", "[OPTIONS] CONTAINER")
@option("-o", "--output", metavar="string", help="Write to a file, instead of STDOUT")
@click.argument("container", type=CONTAINER)
@click.pass_context
def export(ctx: click.Context, container: str, output: str | None) -> None:
    """Export a container's filesystem as a tar archive."""
    host = host_of(ctx)
    found = host.engine.containers.get(container)
    with tar_output(host, output) as out:
        for chunk in found.export():
            out.write(chunk)


@command("cp", "[OPTIONS] CONTAINER:SRC_PATH DEST_PATH|- | SRC_PATH|- CONTAINER:DEST_PATH")
@flag("-a", "--archive", help="Archive mode (copy all uid/gid information)")
@flag("-L", "--follow-link", help="Always follow symbol link in SRC_PATH")
@flag("-q", "--quiet", help="Suppress progress output during copy")
@click.argument("source")
@click.argument("target")
@click.pass_context
def cp(ctx: click.Context, source: str, target: str, *, archive: bool, follow_link: bool, quiet: bool) -> None:
    """Copy files/folders between a container and the local filesystem.

    '-' as the source reads a tar archive from stdin and extracts it to a directory in the container; '-' as the
    destination streams a tar archive of a container source to stdout.
    """
    host = host_of(ctx)
    (from_name, from_path), (to_name, to_path) = _place(source), _place(target)
    if from_name and to_name:
        raise UsageError("copying between containers is not supported", exit_code=1)
    if not from_name and not to_name:
        raise UsageError("must specify at least one container source", exit_code=1)
    found = host.engine.containers.get(from_name or to_name)
    try:
        if from_name:
            size = _copy_out(host, found, from_path, to_path, follow=follow_link)
        else:
            size = _copy_in(host, found, from_path, to_path, follow=follow_link, shown=target)
    except LabkernelError as err:
        err.exit_code = 1
        raise
    if size is not None and not quiet and host.terminal_size():
        from ..display import human_size

        shown = target if to_name else to_path
        host.note(f"Successfully copied {human_size(size)} to {shown}")


def _place(text: str) -> tuple[str, str]:
    """(container, path); no container for what begins with `/` or `.`."""
    name, colon, path = text.partition(":")
    return ("", text) if not colon or text.startswith(("/", ".")) else (name, path)


def _copy_out(host: Host, found: Any, path: str, target: str, *, follow: bool) -> int | None:
    from ..running.copying import copy_from, tar_from

    if target != "-":
        return copy_from(found, path, _absolute(host, target), follow=follow)
    with tar_output(host, None) as out:
        for chunk in tar_from(found, path, follow=follow):
            out.write(chunk)
    return None


def _copy_in(host: Host, found: Any, source: str, path: str, *, follow: bool, shown: str) -> int | None:
    from ..running.copying import copy_to, tar_to

    if source != "-":
        return copy_to(found, _absolute(host, source), path, follow=follow)
    fd = host.stdin_fd()
    if fd is None:
        raise UsageError("a cell has no standard input: give the name of a file", exit_code=1)
    with open(fd, "rb", closefd=False) as stdin:
        tar_to(found, stdin, path, shown=shown)
    return None


def _absolute(host: Host, path: str) -> str:
    # Not normalized: `DIR/` and `DIR/.` mean something of their own.
    return path if path.startswith("/") else f"{host.working_dir()}/{path}"


@command("commit", "[OPTIONS] CONTAINER [REPOSITORY[:TAG]]")
@option("-a", "--author", metavar="string", help="Author")
@many("-c", "--change", help="Apply Dockerfile instruction to the created image")
@option("-m", "--message", metavar="string", help="Commit message")
@flag("-p", "--pause", help="Pause container during commit", default=True)
@click.argument("container", type=CONTAINER)
@click.argument("repository", required=False)
@click.pass_context
def commit(ctx: click.Context, /, container: str, repository: str | None, **flags: Any) -> Any:
    """Create a new image from a container's changes."""
    host = host_of(ctx)
    found = host.engine.containers.get(container)
    name, tag = split_tag(repository)
    settings = {key: flags[key] for key in ("author", "message", "pause")}
    image = found.commit(name, tag, changes=list(flags["change"]), **settings)
    host.line(image.id) if not host.notebook else None
    return image


def split_tag(reference: str | None) -> tuple[str | None, str | None]:
    """`name:tag` as (name, tag); a port is no tag."""
    if not reference:
        return None, None
    name, colon, tag = reference.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (reference, None)


def tar_output(host: Host, output: str | None) -> Any:
    """Where an archive goes: the file (written beside, then renamed), or stdout when that is no terminal."""
    if output:
        return _FileOutput(host.working_dir() / output)
    stream = host.stdout_binary()
    if stream is None:
        raise UsageError(
            "cowardly refusing to save to a terminal. Use the -o flag or redirect",
            resolution="-o FILE.tar",
            exit_code=1,
        )
    from contextlib import nullcontext

    return nullcontext(stream)


class _FileOutput:
    """A file that appears whole or not at all. What is there and no file (a pipe, /dev/null) is written to instead:
    replacing /dev/null by a file would harm the whole machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target = path.resolve() if path.is_symlink() else path
        self.partial: Path | None = None
        if self.target.is_file() or not self.target.exists():
            self.partial = self.target.with_name(f".{self.target.name}.partial")

    def __enter__(self) -> Any:
        try:
            self.stream = (self.partial or self.target).open("wb")
        except OSError as err:
            raise UsageError(f"open {self.path}: {(err.strerror or str(err)).lower()}", exit_code=1) from None
        return self.stream

    def __exit__(self, kind: object, *_: object) -> None:
        self.stream.close()
        if self.partial is None:
            return
        if kind is None:
            self.partial.replace(self.target)
        else:
            self.partial.unlink(missing_ok=True)


@command("prune", "[OPTIONS]")
@flag("-f", "--force", help="Do not prompt for confirmation")
@many("--filter", metavar="filter", help="Provide filter values (e.g. until=<timestamp>)")
@click.pass_context
def prune(ctx: click.Context, *, force: bool, filter: tuple[str, ...]) -> Any:
    """Remove all stopped containers."""
    host = host_of(ctx)
    confirm(host, "This will remove all stopped containers.", force=force)
    answer = host.engine.containers.prune(filters=filters_of(filter)) if filter else host.engine.containers.prune()
    return pruned("Deleted Containers:", answer.get("ContainersDeleted") or [], answer.get("SpaceReclaimed", 0))


def confirm(host: Host, what: str, *, force: bool) -> None:
    """docker's question before a prune; a notebook and a pipe have nobody to ask, so they need -f."""
    if force:
        return
    if not host.stdin_is_terminal():
        raise UsageError(f"{what} Nobody to ask here", resolution="give -f to do it without a question", exit_code=1)
    answer = input(f"WARNING! {what}\nAre you sure you want to continue? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed", exit_code=1)


def pruned(title: str, names: Sequence[str], reclaimed: float) -> Listing:
    from ..display import human_size

    lines = [title, *names, ""] if names else []
    return Listing(names, text="\n".join([*lines, f"Total reclaimed space: {human_size(reclaimed)}"]))


def document(data: Sequence[Any], form: str | None) -> Any:
    """What `inspect` prints: JSON, or the template for each."""
    if form in (None, "", "json"):
        return Document(list(data)) if form != "json" else Listing(data, text=_json(data))
    from .template import render

    assert form is not None
    return Text("\n".join(render(form.replace("\\t", "\t").replace("\\n", "\n"), item, document=True) for item in data))


def _json(data: Sequence[Any]) -> str:
    import json

    return json.dumps(list(data), separators=(",", ":"), default=str)
