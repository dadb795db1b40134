"""`compose up`, `run` and `exec`: what stays in the foreground."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import LabkernelError, UsageError
from . import foreground
from .compose import Session, scale_of
from .composelogs import Printer, follow, short_name
from .grammar import command, flag, many, option, words
from .run import finished
from .values import RunResult

if TYPE_CHECKING:
    from ..compose.project import Project


@command("up", "[OPTIONS] [SERVICE...]")
@flag("-d", "--detach", help="Detached mode: Run containers in the background")
@flag("--build", help="Build images before starting containers")
@flag("--no-build", help="Don't build an image, even if it's policy")
@flag("--force-recreate", help="Recreate containers even if their configuration and image haven't changed")
@flag("--no-recreate", help="If containers already exist, don't recreate them")
@flag("--always-recreate-deps", help="Recreate dependent containers")
@flag("--no-deps", help="Don't start linked services")
@flag("--no-start", help="Don't start the services after creating them")
@option("--pull", metavar="string", help="Pull image before running (always|missing|never)")
@flag("--quiet-pull", help="Pull without printing progress information")
@flag("--remove-orphans", help="Remove containers for services not defined in the Compose file")
@flag("-V", "--renew-anon-volumes", help="Recreate anonymous volumes instead of retrieving data from the previous ones")
@many("--scale", metavar="stringArray", help="Scale SERVICE to NUM instances")
@option("-t", "--timeout", metavar="int", type=float, help="Timeout in seconds for container shutdown")
@flag("--wait", help="Wait for services to be running|healthy. Implies detached mode")
@option("--wait-timeout", metavar="int", type=float, help="Maximum duration in seconds to wait")
@flag("--abort-on-container-exit", help="Stops all containers if any container was stopped")
@flag("--abort-on-container-failure", help="Stops all containers if any container exited with failure")
@option("--exit-code-from", metavar="string", help="Return the exit code of the selected service container")
@many("--attach", metavar="stringArray", help="Restrict attaching to the specified services")
@many("--no-attach", metavar="stringArray", help="Do not attach (stream logs) to the specified services")
@flag("--no-color", help="Produce monochrome output")
@flag("--no-log-prefix", help="Don't print prefix in logs")
@flag("--timestamps", help="Show timestamps")
@words("services")
@click.pass_context
def up(ctx: click.Context, /, services: tuple[str, ...], **flags: Any) -> Any:
    """Create and start containers."""
    session = Session(ctx)
    project = session.load()
    attached = not (flags["detach"] or flags["wait"] or flags["no_start"])
    if flags["detach"] and (flags["abort_on_container_exit"] or flags["exit_code_from"]):
        raise UsageError("--abort-on-container-exit and --detach are incompatible", exit_code=1)
    before = time.time()
    running = {each.id for each in session.service.containers(project.name, stopped=False)}
    with _terminable():
        try:
            containers = bring_up(session, project, services, flags)
        except KeyboardInterrupt:
            session.host.note("canceled")
            raise
        if not attached:
            return session.listing(project.name)
        return _watch(session, project, containers, flags, before, running)


def bring_up(session: Session, project: Project, services: tuple[str, ...], flags: dict[str, Any]) -> list[Any]:
    """`up` without what follows it."""
    from ..compose.converge import UpOptions

    if flags.get("force_recreate") and flags.get("no_recreate"):
        raise UsageError("--force-recreate and --no-recreate are incompatible", exit_code=1)
    if flags.get("build") and flags.get("no_build"):
        raise UsageError("--build and --no-build are incompatible", exit_code=1)
    scale = scale_of(flags.get("scale") or ())
    for name in scale:
        if name not in project.services:
            raise UsageError(f"no such service: {name}", exit_code=1)
        if scale[name] > 1 and project.services[name].get("container_name"):
            raise project.error(
                name, f"service {name} has a container_name, so there can be one only", at="container_name"
            )
    options = UpOptions(
        recreate="force" if flags.get("force_recreate") else "never" if flags.get("no_recreate") else "diverged",
        recreate_dependencies=bool(flags.get("always_recreate_deps")),
        start=not flags.get("no_start"),
        scale=scale,
        timeout_s=flags.get("timeout"),
        renew_anonymous_volumes=bool(flags.get("renew_anon_volumes")),
        wait=bool(flags.get("wait")),
        wait_timeout_s=flags.get("wait_timeout"),
    )
    containers = session.service.up(
        project,
        services,
        build=True if flags.get("build") else False if flags.get("no_build") else None,
        pull=flags.get("pull"),
        dependencies=not flags.get("no_deps"),
        remove_orphans=bool(flags.get("remove_orphans")),
        report=session.report,
        on_step=session.steps(),
        options=options,
    )
    session.warn(project)
    for container in containers:
        for warning in container.warnings:
            session.host.warn_once(f"{short_name(container)}: {warning}")
    return containers


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as an interrupt does, so that what was started is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _watch(
    session: Session,
    project: Project,
    containers: list[Any],
    flags: dict[str, Any],
    before: float,
    running: set[str],
) -> RunResult:
    """Show what the containers write until they end, or until an interrupt, which stops them."""
    services = {each.labels["com.docker.compose.service"] for each in containers}
    wanted = (set(flags["attach"]) or services) - set(flags["no_attach"])
    shown = [
        each
        for each in containers
        if (name := each.labels["com.docker.compose.service"]) in wanted and project.services[name].get("attach", True)
    ]
    colour = not flags["no_color"]
    printer = Printer(
        session.host,
        [short_name(each) for each in shown],
        prefix=not flags["no_log_prefix"],
        colour=colour,
        timestamps=flags["timestamps"],
    )
    source = flags["exit_code_from"]
    if source and source not in services:
        raise UsageError(f"no such service: {source}", exit_code=1)
    abort = flags["abort_on_container_exit"] or bool(source)
    codes: dict[str, int] = {}
    aborted = False

    def ended(container: Any, code: int) -> None:
        nonlocal aborted
        codes[container.id] = code
        printer.said(f"{short_name(container)} exited with code {code}")
        if not aborted and (abort or (flags["abort_on_container_failure"] and code)):
            aborted = True
            printer.said("Aborting on container exit...")
            session.service.stop(project.name, timeout_s=flags["timeout"], report=session.report)

    began = time.monotonic()
    try:
        # Of what ran before, only what it writes from now on.
        follow(printer, shown, ended=ended, settings=lambda each: {"since": before} if each.id in running else {})
    except KeyboardInterrupt:
        return _interrupted(session, project, containers, flags["timeout"])
    code = 0
    if source or aborted:
        mine = [each for each in containers if not source or each.labels["com.docker.compose.service"] == source]
        found = [codes.get(each.id, int(each.runtime_state().get("exit_code") or 0)) for each in mine]
        code = next(iter(found), 0) if source else next(iter(codes.values()), 0)
    return RunResult(code, seconds=time.monotonic() - began, note=f"{len(containers)} containers ended")


def _interrupted(session: Session, project: Project, containers: list[Any], timeout_s: float | None) -> RunResult:
    """The first interrupt stops the containers, the next one kills them."""
    session.host.note("Gracefully Stopping... press Ctrl+C again to force")
    try:
        session.service.stop(project.name, timeout_s=timeout_s, report=session.report)
    except KeyboardInterrupt:
        for each in containers:
            with contextlib.suppress(LabkernelError):
                each.kill()
    return RunResult(130, note="stopped")


@command("run", "[OPTIONS] SERVICE [COMMAND] [ARGS...]", interspersed=False)
@flag("-d", "--detach", help="Run container in background and print container ID")
@flag("--build", help="Build image before starting container")
@many("--cap-add", help="Add Linux capabilities")
@many("--cap-drop", help="Drop Linux capabilities")
@option("--entrypoint", metavar="string", help="Override the entrypoint of the image")
@many("-e", "--env", metavar="stringArray", help="Set environment variables")
@flag("-i", "--interactive", help="Keep STDIN open even if not attached")
@many("-l", "--label", metavar="stringArray", help="Add or override a label")
@option("--name", metavar="string", help="Assign a name to the container")
@flag("-T", "--no-TTY", "no_tty", help="Disable pseudo-TTY allocation")
@flag("--no-deps", help="Don't start linked services")
@many("-p", "--publish", metavar="stringArray", help="Publish a container's port(s) to the host")
@flag("--quiet-pull", help="Pull without printing progress information")
@flag("--rm", help="Automatically remove the container when it exits")
@flag("-P", "--service-ports", help="Run command with all service's ports enabled and mapped to the host")
@flag("--use-aliases", help="Use the service's network useAliases in the network(s) the container connects to")
@option("-u", "--user", metavar="string", help="Run as specified username or uid")
@many("-v", "--volume", metavar="stringArray", help="Bind mount a volume")
@option("-w", "--workdir", metavar="string", help="Working directory inside the container")
@click.argument("service")
@words("arguments")
@click.pass_context
def run(ctx: click.Context, /, service: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Run a one-off command on a service."""
    session = Session(ctx)
    host, project = session.host, session.load()
    project.select([service])
    settings = project.services[service]
    terminal = host.stdin_is_terminal() and host.terminal_size() is not None and not host.notebook
    tty = terminal and not flags["no_tty"] and not flags["detach"]
    stdin = (terminal or flags["interactive"] or bool(settings.get("stdin_open"))) and host.stdin_fd() is not None
    container = session.service.prepare_run(
        project,
        service,
        list(arguments) or None,
        name=flags["name"],
        start_dependencies=not flags["no_deps"],
        service_ports=flags["service_ports"],
        aliases=flags["use_aliases"],
        build=True if flags["build"] else None,
        change=_run_changes(session, project, service, flags, tty=tty, stdin=stdin and not flags["detach"]),
        report=session.report,
        on_step=session.steps(),
    )
    session.warn(project)
    for warning in container.warnings:
        host.warn_once(warning)
    if flags["detach"]:
        container.start()
        if host.notebook:
            return container
        host.line(container.id)
        return None
    before = time.monotonic()
    try:
        attachment = host.engine.runtime.run(container.id, stdin=stdin)
    except LabkernelError:
        if flags["rm"]:
            with contextlib.suppress(LabkernelError):
                container.remove(force=True, v=True)
        raise
    exit_code = foreground.stream(host, attachment, kill=container.kill, stdin=stdin, tty=tty)
    if exit_code == foreground.DETACHED:
        return RunResult(0, id=container.id, container=container, note="detached; the container goes on")
    result = finished(container, attachment, exit_code, before)
    if flags["rm"]:
        with contextlib.suppress(LabkernelError):
            container.remove(force=True, v=True)
    return result


def _run_changes(
    session: Session, project: Project, service: str, flags: dict[str, Any], *, tty: bool, stdin: bool
) -> dict[str, Any]:
    from .build import build_args

    settings = project.services[service]
    change: dict[str, Any] = {"tty": tty, "stdin_open": stdin}
    if flags["entrypoint"] is not None:
        change["entrypoint"] = flags["entrypoint"]
    if flags["env"]:
        change["environment"] = {**settings.get("environment", {}), **build_args(flags["env"])}
    for key, name in (("user", "user"), ("workdir", "working_dir")):
        if flags[key]:
            change[name] = flags[key]
    for key in ("cap_add", "cap_drop"):
        if flags[key]:
            change[key] = [*settings.get(key, ()), *flags[key]]
    if flags["publish"]:
        change["ports"] = list(flags["publish"])
    return change


@command("exec", "[OPTIONS] SERVICE COMMAND [ARGS...]", interspersed=False)
@flag("-d", "--detach", help="Detached mode: Run command in the background")
@many("-e", "--env", metavar="stringArray", help="Set environment variables")
@option("--index", metavar="int", type=int, help="Index of the container if service has multiple replicas")
@flag("-i", "--interactive", help="Keep STDIN open even if not attached")
@flag("-T", "--no-TTY", "no_tty", help="Disable pseudo-TTY allocation")
@flag("--privileged", help="Give extended privileges to the process")
@option("-u", "--user", metavar="string", help="Run the command as this user")
@option("-w", "--workdir", metavar="string", help="Path to workdir directory for this command")
@click.argument("service")
@words("arguments", least=1)
@click.pass_context
def exec_(ctx: click.Context, /, service: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Execute a command in a running container."""
    from .run import exec_ as command_

    session = Session(ctx)
    name, _ = session.scope((service,))
    container = session.service.container(name, service, index=flags["index"])
    host = session.host
    terminal = host.stdin_is_terminal() and host.terminal_size() is not None and not host.notebook
    tty = terminal and not flags["no_tty"] and not flags["detach"]
    stdin = (terminal or flags["interactive"]) and host.stdin_fd() is not None and not flags["detach"]
    return ctx.invoke(
        command_,
        container=container.id,
        arguments=arguments,
        detach=flags["detach"],
        detach_keys=None,
        env=flags["env"],
        env_file=(),
        interactive=stdin,
        privileged=flags["privileged"],
        tty=tty,
        user=flags["user"],
        workdir=flags["workdir"],
        check=False,
    )
