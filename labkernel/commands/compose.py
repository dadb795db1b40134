"""`compose`: the services of a Compose file, brought up and looked after; also the text of a `%%compose` cell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import LabkernelError, UsageError
from .grammar import Entry, LabGroup, command, flag, host_of, many, option, words
from .host import Host
from .values import Text

if TYPE_CHECKING:
    from ..compose.project import Project
    from ..compose.service import Compose

CELL = "<cell>"
_ENTRIES = {
    "build": Entry("compose:build", "Build or rebuild services"),
    "config": Entry("composeviews:config", "Parse, resolve and render compose file in canonical format"),
    "convert": Entry("composeviews:config", "", ""),
    "create": Entry("compose:create", "Creates containers for a service"),
    "down": Entry("compose:down", "Stop and remove containers, networks"),
    "exec": Entry("composerun:exec_", "Execute a command in a running container"),
    "images": Entry("composeviews:images", "List images used by the created containers"),
    "kill": Entry("compose:kill", "Force stop service containers"),
    "logs": Entry("composeviews:logs", "View output from containers"),
    "ls": Entry("composeviews:ls", "List running compose projects"),
    "pause": Entry("compose:pause", "Pause services"),
    "port": Entry("composeviews:port", "Print the public port for a port binding"),
    "ps": Entry("composeviews:ps", "List containers"),
    "pull": Entry("compose:pull", "Pull service images"),
    "restart": Entry("compose:restart", "Restart service containers"),
    "rm": Entry("compose:rm", "Removes stopped service containers"),
    "run": Entry("composerun:run", "Run a one-off command on a service"),
    "start": Entry("compose:start", "Start services"),
    "stop": Entry("compose:stop", "Stop services"),
    "top": Entry("composeviews:top", "Display the running processes"),
    "unpause": Entry("compose:unpause", "Unpause services"),
    "up": Entry("composerun:up", "Create and start containers"),
    "version": Entry("composeviews:version", "Show the version information"),
}
_ABSENT = ("watch", "publish", "bridge", "attach", "cp", "events", "push", "scale", "stats", "wait")
_LATER = "`labkernel compose --help` lists what there is"
compose = LabGroup(
    "compose",
    help="Define and run multi-container applications.",
    entries=_ENTRIES,
    absent=dict.fromkeys(
        ("watch", "publish", "bridge", "attach", "cp", "events", "push", "scale", "stats", "wait"), _LATER
    ),
    params=[
        click.Option(["-f", "--file", "files"], multiple=True, metavar="list", help="Compose configuration files"),
        click.Option(["-p", "--project-name"], metavar="string", help="Project name"),
        click.Option(["--profile", "profiles"], multiple=True, metavar="list", help="Specify a profile to enable"),
        click.Option(["--env-file", "env_files"], multiple=True, metavar="list", help="Alternate environment files"),
        click.Option(["--project-directory"], metavar="string", help="Alternate working directory"),
        click.Option(["--progress"], metavar="string", help="Type of progress output (auto, plain, quiet)"),
        click.Option(["--ansi"], metavar="string", hidden=True),
        click.Option(["--compatibility"], is_flag=True, hidden=True),
        click.Option(["--parallel"], type=int, hidden=True),
    ],
)


class Session:
    """One command line of compose: where its files are, and the engine's compose service."""

    def __init__(self, ctx: click.Context) -> None:
        self.host: Host = host_of(ctx)
        parent = ctx
        while parent.parent is not None and "files" not in parent.params:
            parent = parent.parent
        self._given = parent.params
        self._meta = ctx.find_root().meta
        self.quiet = self._given.get("progress") == "quiet"
        self._warned: set[str] = set()

    @property
    def service(self) -> Compose:
        found: Compose = self.host.engine.compose
        return found

    def load(self, *, interpolate: bool = True) -> Project:
        """The project of the files given, of the cell, or of those found here."""
        from ..compose.project import load

        texts: dict[str, str] = {}
        files: list[str] = list(self._given.get("files") or ())
        cell = self._meta.get("labkernel.cell")
        if cell is not None:
            # The magic's own line is the cell's first one.
            texts[CELL] = "\n" + cell
            files.insert(0, CELL)
        elif not files and self._meta.get("labkernel.last_cell") and not self._has_file():
            # `%compose ps` after a cell is about that cell.
            texts[CELL] = "\n" + self._meta["labkernel.last_cell"]
            files.append(CELL)
        if "-" in files:
            if self.host.stdin_fd() is None:
                raise UsageError("there is no stdin in a cell", resolution="write the file in a %%compose cell")
            texts["-"] = sys.stdin.read()
        project = load(
            files,
            texts=texts,
            name=self._given.get("project_name"),
            directory=self._given.get("project_directory"),
            working_dir=self.host.working_dir(),
            profiles=self._given.get("profiles") or (),
            env_files=self._given.get("env_files") or (),
            interpolate=interpolate,
        )
        self.warn(project)
        return project

    def _has_file(self) -> bool:
        from ..compose.project import NAMES

        return "COMPOSE_FILE" in os.environ or any((self.host.working_dir() / each).is_file() for each in NAMES)

    def name(self) -> tuple[str, Project | None]:
        """The project's name, and the project where there are files: what is looked after is found by the name."""
        from ..compose.document import ComposeError

        name = self._given.get("project_name") or os.environ.get("COMPOSE_PROJECT_NAME")
        try:
            project = self.load()
        except ComposeError as err:
            if name and err.brief.startswith("no configuration file"):
                return name, None
            raise
        return project.name, project

    def scope(self, services: tuple[str, ...]) -> tuple[str, list[str]]:
        """The project's name, and the services a command is about: those named, or those of active profiles."""
        name, project = self.name()
        if project is None:
            return name, list(services)
        if services:
            project.select(services, with_dependencies=False)
            return name, list(services)
        # Without a name of one it is about what is there, also of files that have changed since.
        return name, []

    def warn(self, project: Project) -> None:
        """Show what is not carried out, each once."""
        for line in project.warnings:
            if line not in self._warned:
                self._warned.add(line)
                self.host.warn(line)

    def report(self, what: str, state: str) -> None:
        """What happens, in docker compose's form."""
        if not self.quiet:
            self.host.note(f" {what}  {state}")

    def steps(self) -> Callable[[str, Any], None] | None:
        """The listener of builds: their steps as lines, with the service in front."""
        if self.quiet:
            return None

        def told(name: str, step: Any) -> None:
            if step.status in ("done", "cached", "failed"):
                state = "CACHED" if step.status == "cached" else f"{step.duration_s:.1f}s"
                text = step.text.split("\n")[0]
                self.host.note(f"#[{name} {step.number}/{step.total}] {text} {state}")
            elif step.status == "output":
                for line in step.output.decode(errors="replace").splitlines():
                    self.host.note(f"#[{name}] {line}")

        return told

    def listing(self, name: str) -> Any:
        """What a notebook shows after a verb: the project's containers."""
        if not self.host.notebook:
            return None
        from .composeviews import table

        return table(self.service.containers(name), projects=name)


def pairs_of(given: tuple[str, ...]) -> dict[str, str]:
    """`K=V`, or `K` for our own variable if there is one."""
    from .build import build_args

    return build_args(given)


@command("build", "[OPTIONS] [SERVICE...]")
@many("--build-arg", metavar="stringArray", help="Set build-time variables for services")
@flag("--no-cache", help="Do not use cache when building the image")
@flag("--pull", help="Always attempt to pull a newer version of the image")
@flag("-q", "--quiet", help="Suppress the build output")
@words("services")
@click.pass_context
def build(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """Build or rebuild services."""
    session = Session(ctx)
    session.quiet = session.quiet or flags["quiet"]
    built = session.service.build(
        session.load(),
        services,
        no_cache=flags["no_cache"],
        pull=flags["pull"],
        build_args=pairs_of(flags["build_arg"]),
        report=session.report,
        on_step=session.steps(),
    )
    return list(built.values()) if session.host.notebook else None


@command("create", "[OPTIONS] [SERVICE...]")
@flag("--build", help="Build images before starting containers")
@flag("--no-build", help="Don't build an image, even if it's policy")
@flag("--force-recreate", help="Recreate containers even if their configuration and image haven't changed")
@flag("--no-recreate", help="If containers already exist, don't recreate them")
@option("--pull", metavar="string", help="Pull image before running (always|missing|never|build)")
@flag("--remove-orphans", help="Remove containers for services not defined in the Compose file")
@many("--scale", metavar="stringArray", help="Scale SERVICE to NUM instances")
@words("services")
@click.pass_context
def create(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """Creates containers for a service."""
    from .composerun import bring_up

    session = Session(ctx)
    project = session.load()
    bring_up(session, project, services, {**flags, "no_start": True})
    return session.listing(project.name)


@command("down", "[OPTIONS] [SERVICES]")
@flag("--remove-orphans", help="Remove containers for services not defined in the Compose file")
@option("--rmi", metavar="string", type=click.Choice(["local", "all"]), help="Remove images used by services")
@option("-t", "--timeout", metavar="int", type=float, help="Specify a shutdown timeout in seconds")
@flag("-v", "--volumes", help="Remove named and anonymous volumes")
@words("services")
@click.pass_context
def down(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> None:
    """Stop and remove containers, networks."""
    session = Session(ctx)
    name, project = session.name()
    session.service.down(
        name,
        services,
        volumes=flags["volumes"],
        images=flags["rmi"],
        timeout_s=flags["timeout"],
        known=[*project.services, *project.others] if project else None,
        remove_orphans=flags["remove_orphans"],
        report=session.report,
    )


@command("stop", "[OPTIONS] [SERVICE...]")
@option("-t", "--timeout", metavar="int", type=float, help="Specify a shutdown timeout in seconds")
@words("services")
@click.pass_context
def stop(ctx: click.Context, /, services: tuple[str, ...], timeout: float | None) -> None:
    """Stop services."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    session.service.stop(name, chosen, timeout_s=timeout, report=session.report)


@command("start", "[OPTIONS] [SERVICE...]")
@words("services")
@click.pass_context
def start(ctx: click.Context, services: tuple[str, ...]) -> Any:
    """Start services."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    session.service.start(name, chosen, report=session.report)
    return session.listing(name)


@command("restart", "[OPTIONS] [SERVICE...]")
@option("-t", "--timeout", metavar="int", type=float, help="Specify a shutdown timeout in seconds")
@words("services")
@click.pass_context
def restart(ctx: click.Context, /, services: tuple[str, ...], timeout: float | None) -> Any:
    """Restart service containers."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    session.service.restart(name, chosen, timeout_s=timeout, report=session.report)
    return session.listing(name)


@command("kill", "[OPTIONS] [SERVICE...]")
@option("-s", "--signal", metavar="string", default="SIGKILL", help="SIGNAL to send to the container")
@words("services")
@click.pass_context
def kill(ctx: click.Context, /, services: tuple[str, ...], signal: str) -> None:
    """Force stop service containers."""
    session = Session(ctx)
    name, chosen = session.scope(services)
    for container in session.service.containers(name, chosen, stopped=False):
        container.kill(signal)
        session.report(f"Container {container.name}", "Killed")


def _each(ctx: click.Context, services: tuple[str, ...], verb: str, word: str) -> None:
    session = Session(ctx)
    name, chosen = session.scope(services)
    for container in session.service.containers(name, chosen, stopped=False):
        getattr(container, verb)()
        session.report(f"Container {container.name}", word)


@command("pause", "[OPTIONS] [SERVICE...]")
@words("services")
@click.pass_context
def pause(ctx: click.Context, services: tuple[str, ...]) -> None:
    """Pause services."""
    _each(ctx, services, "pause", "Paused")


@command("unpause", "[OPTIONS] [SERVICE...]")
@words("services")
@click.pass_context
def unpause(ctx: click.Context, services: tuple[str, ...]) -> None:
    """Unpause services."""
    _each(ctx, services, "unpause", "Unpaused")


@command("rm", "[OPTIONS] [SERVICE...]")
@flag("-f", "--force", help="Don't ask to confirm removal")
@flag("-s", "--stop", help="Stop the containers, if required, before removing")
@flag("-v", "--volumes", help="Remove any anonymous volumes attached to containers")
@words("services")
@click.pass_context
def rm(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """Removes stopped service containers."""
    from .container import confirm

    session = Session(ctx)
    name, chosen = session.scope(services)
    if flags["stop"]:
        session.service.stop(name, chosen, report=session.report)
    there = [each for each in session.service.containers(name, chosen)
             if each.status not in ("running", "paused", "restarting")]  # fmt: skip
    if not there:
        session.host.line("No stopped containers")
        return None
    listed = ", ".join(each.name for each in there)
    confirm(session.host, f"Going to remove {listed}", force=flags["force"])
    gone = session.service.remove(name, chosen, volumes=flags["volumes"], report=session.report)
    return Text("\n".join(gone)) if session.host.notebook else None


@command("pull", "[OPTIONS] [SERVICE...]")
@flag("--ignore-pull-failures", help="Pull what it can and ignores images with pull failures")
@flag("-q", "--quiet", help="Pull without printing progress information")
@words("services")
@click.pass_context
def pull(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """Pull service images."""
    session = Session(ctx)
    session.quiet = session.quiet or flags["quiet"]
    found = session.service.pull(
        session.load(), services, ignore_failures=flags["ignore_pull_failures"], report=session.report
    )
    return found if session.host.notebook else None


# -- the cell ----------------------------------------------------------------------------------------------------------


class _CellGroup(LabGroup):
    """`%%compose` without words is `%%compose up -d`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not any(not word.startswith("-") for word in _without_values(self, args)):
            args = [*args, "up", "-d"]
        return super().parse_args(ctx, args)


def _without_values(group: click.Group, args: list[str]) -> list[str]:
    """The words that are no flags of the group and no values of them."""
    takes = {
        name for param in group.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts
    }
    found, skip = [], False
    for word in args:
        if skip:
            skip = False
            continue
        skip = word in takes
        if not skip:
            found.append("-h" if word in ("--help", "-h") else word)
    return [*found, "help"] if "-h" in found else found


cell = _CellGroup(
    "compose", help="The cell is the Compose file: `%%compose up -d`.", entries=_ENTRIES, params=list(compose.params)
)


def scale_of(given: tuple[str, ...]) -> dict[str, int]:
    """`--scale web=3`."""
    found = {}
    for word in given:
        name, _, count = word.partition("=")
        if not name or not count.isdigit():
            raise UsageError(f'invalid --scale option "{word}"', resolution="--scale SERVICE=NUMBER", exit_code=1)
        found[name] = int(count)
    return found


def read_file(host: Host, path: str) -> str:
    """A file relative to where the command was typed."""
    try:
        return (host.working_dir() / Path(path)).read_text()
    except OSError as err:
        raise LabkernelError(f"cannot read {path}: {err.strerror}") from None
