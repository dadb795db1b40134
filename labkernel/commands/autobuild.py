"""`registry autobuild`: build and publish what is pushed to a git repository; its list, its log."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import click

from ..errors import UsageError
from .grammar import LabGroup, command, flag, host_of, many, option
from .host import Host
from .values import Listing, Text, tabulate


class _Autobuild(LabGroup):
    """`autobuild REPOSITORY -t NAME` adds one; the other words are commands."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS] GIT-REPO -t NAME | COMMAND"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["add", *args]
        return super().parse_args(ctx, args)


@command("add", "[OPTIONS] GIT-REPO")
@option("-t", "--tag", "name", metavar="name", required=True, help="Publish as this name, with its registry")
@option("-b", "--branch", metavar="branch", help="Branch to build (default: the repository's own)")
@option("-f", "--file", metavar="string", default="Dockerfile", show_default=True, help="Dockerfile, below --context")
@option("--context", "directory", metavar="directory", default="", help="Folder of the repository to build")
@many("--build-arg", help="Set build-time variables")
@option("--poll", "poll_s", metavar="seconds", type=float, help="Ask the repository this often, instead of a hook")
@flag("--no-push", help="Build only, publish nothing")
@click.argument("repository")
@click.pass_context
def add(ctx: click.Context, /, repository: str, *, no_push: bool, build_arg: tuple[str, ...], **flags: Any) -> Any:
    """Build and publish on every push to a git repository."""
    host = host_of(ctx)
    build_args = dict(each.partition("=")[::2] for each in build_arg)
    service = host.engine.autobuilds
    where = str(host.working_dir() / repository) if (host.working_dir() / repository).is_dir() else repository
    made = service.add(where, push=not no_push, build_args=build_args, **flags)
    if made.poll_s is not None:
        service.start_watching()
    else:
        # What is there is built at once: a repository that is never pushed to again has an image, too.
        _run(host, made.id, force=False)
    host.line(made.id)
    return made if host.notebook else None


@command("ls", "[OPTIONS]")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("-q", "--quiet", help="Only show ids")
@click.pass_context
def ls(ctx: click.Context, /, form: str | None, *, quiet: bool) -> Listing:
    """List automated builds."""
    from ..display import human_age

    host = host_of(ctx)
    service = host.engine.autobuilds
    found = service.list()
    titles = {
        "ID": "ID",
        "Name": "NAME",
        "Repository": "REPOSITORY",
        "Branch": "BRANCH",
        "Trigger": "TRIGGER",
        "LastBuild": "LAST BUILD",
    }

    def view(each: Any) -> dict[str, Any]:
        log = service.log(each.id)
        last = f"{log[-1].number}: {log[-1].status} {human_age(log[-1].started_at)}" if log else "none"
        return {
            "ID": each.id,
            "Name": each.name,
            "Repository": each.repository,
            "Branch": each.branch or "(default)",
            "Trigger": each.trigger,
            "LastBuild": last,
        }

    if any(each.poll_s is not None for each in found) and service.watcher() is None:
        host.warn(
            "no process asks the polled repositories: `labkernel registry autobuild watch` does, or add one again"
        )
    return tabulate(found, view, titles, columns=tuple(titles), form=form, quiet="ID" if quiet else None)


@command("rm", "AUTOBUILD [AUTOBUILD...]")
@click.argument("names", nargs=-1, required=True)
@click.pass_context
def rm(ctx: click.Context, /, names: tuple[str, ...]) -> None:
    """Remove automated builds, their logs and hooks. Images stay."""
    host = host_of(ctx)
    service = host.engine.autobuilds
    for name in names:
        host.line(service.remove(name).id)
    if not any(each.poll_s is not None for each in service.list()):
        service.stop_watching()


@command("log", "[OPTIONS] AUTOBUILD [NUMBER]")
@flag("--last", help="Show what the last build said")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@click.argument("name")
@click.argument("number", required=False, type=int)
@click.pass_context
def log(ctx: click.Context, /, name: str, number: int | None, form: str | None, *, last: bool) -> Any:
    """List the builds, or show what one of them said."""
    from ..display import human_age

    service = host_of(ctx).engine.autobuilds
    if last or number is not None:
        return Text(service.output(name, number).rstrip("\n"))
    titles = {
        "Number": "BUILD",
        "Commit": "COMMIT",
        "Subject": "SUBJECT",
        "Started": "STARTED",
        "Took": "TOOK",
        "Status": "STATUS",
        "Digest": "DIGEST",
    }

    def view(build: Any) -> dict[str, Any]:
        return {
            "Number": str(build.number),
            "Commit": build.commit[:12],
            "Subject": build.subject if len(build.subject) <= 40 else f"{build.subject[:39]}…",
            "Started": human_age(build.started_at),
            "Took": f"{build.seconds:.1f} s",
            "Status": f"{build.status}: {build.error}" if build.error else build.status,
            "Digest": build.digest[:19],
        }

    return tabulate(service.log(name), view, titles, columns=tuple(titles), form=form)


@command("run", "[OPTIONS] AUTOBUILD")
@flag("--force", help="Also when the newest commit was built last")
@click.argument("name")
@click.pass_context
def run(ctx: click.Context, /, name: str, *, force: bool) -> None:
    """Build now what the branch has: what the repository's hook calls."""
    if not _run(host_of(ctx), name, force=force):
        raise click.exceptions.Exit(1)


@command("watch", "")
@click.pass_context
def watch(ctx: click.Context, /) -> None:
    """Ask the polled repositories, in the foreground until SIGTERM."""
    host = host_of(ctx)
    if host.notebook:
        raise UsageError("a cell cannot watch in the foreground", resolution="adding one with --poll starts a watcher")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    host.engine.autobuilds.watch(echo=_echo(host), ended=ended.wait)


def _run(host: Host, name: str, *, force: bool) -> bool:
    """Build; whether it went well (or there was nothing to do)."""
    build = host.engine.autobuilds.run(name, echo=_echo(host), force=force)
    return build is None or build.status != "failed"


def _echo(host: Host) -> Any:
    if host.notebook:
        return lambda text: host.note(text.rstrip("\n"))

    def write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    return write


autobuild = _Autobuild("autobuild", help="Build and publish what is pushed to a git repository.")
for _each in (add, ls, rm, log, run, watch):
    autobuild.add_command(_each)
