"""`run`, `create` and `exec`: what starts a command in a container, and docker's flags for it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import ContainerExit, LabkernelError, NoSuchContainer, UsageError
from . import foreground, netflags, resourceflags
from .grammar import CONTAINER, IMAGE, command, flag, host_of, many, option, words
from .host import Host
from .resourceflags import absent as _absent
from .settings import environment_of, settings_of
from .values import RunResult, explain

if TYPE_CHECKING:
    from .dialogue import Dialogue

RUN_USAGE = "[OPTIONS] IMAGE [COMMAND] [ARG...]"


def run_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """docker's flags of `run` and `create` that this engine takes; `settings_of` gives them their SDK names."""
    for decorate in reversed(_RUN_FLAGS):
        function = decorate(function)
    return function


_RUN_FLAGS: list[Callable[[Any], Any]] = [
    option("--name", metavar="string", help="Assign a name to the container"),
    many("-e", "--env", help="Set environment variables (K=V, or K to pass ours on)"),
    many("--env-file", help="Read in a file of environment variables"),
    option("-w", "--workdir", metavar="string", help="Working directory inside the container"),
    option("-u", "--user", metavar="string", help="Username or UID (format: <name|uid>[:<group|gid>])"),
    option("--entrypoint", metavar="string", help="Overwrite the default ENTRYPOINT of the image"),
    option("-h", "--hostname", metavar="string", help="Container host name"),
    option("-m", "--memory", metavar="bytes", help="Memory limit (for example 64m)"),
    option("--memory-reservation", metavar="bytes", help="Memory soft limit"),
    option("--cpus", metavar="decimal", help="Number of CPUs (for example 0.5)"),
    *resourceflags.SHARED,
    option("--memory-swappiness", metavar="int", type=int, help="Tune container memory swappiness (0 to 100)"),
    many("--group-add", help="Add additional groups to join"),
    option("--domainname", metavar="string", help="Container NIS domain name"),
    option("--pids-limit", metavar="int", type=int, help="Limit of processes and threads (-1 for unlimited)"),
    flag("--read-only", help="Mount the container's root filesystem as read only"),
    many("--tmpfs", help="Mount a tmpfs directory (PATH[:OPTIONS])"),
    many("-v", "--volume", help="Bind mount a volume (SOURCE:TARGET[:ro])"),
    many("--mount", metavar="mount", help="Attach a filesystem mount (type=bind|volume|tmpfs,src=…,dst=…[,ro])"),
    many("--cap-add", help="Add Linux capabilities"),
    many("--cap-drop", help="Drop Linux capabilities"),
    many("--security-opt", help="Security options (seccomp=…, no-new-privileges)"),
    flag("--privileged", help="Give extended privileges to this container"),
    *netflags.FLAGS,
    flag("-i", "--interactive", help="Keep STDIN open even if not attached"),
    flag("-t", "--tty", help="Allocate a pseudo-TTY"),
    flag("--init", help="Run an init inside the container that forwards signals and reaps processes"),
    flag("--rm", help="Remove the container and its volumes when it exits"),
    many("-l", "--label", help="Set meta data on a container"),
    many("--label-file", help="Read in a line delimited file of labels"),
    many("--ulimit", metavar="ulimit", help="Ulimit options (name=soft[:hard])"),
    option("--shm-size", metavar="bytes", help="Size of /dev/shm"),
    option("--stop-signal", metavar="string", help="Signal to stop the container"),
    option("--stop-timeout", metavar="int", type=int, help="Timeout (in seconds) to stop a container"),
    option("--restart", metavar="string", help="Restart policy: no, on-failure[:N], always, unless-stopped"),
    option("--oom-score-adj", metavar="int", type=int, help="Tune the host's OOM preferences (-1000 to 1000)"),
    option("--platform", metavar="string", help="Platform the image must have (for example linux/amd64)"),
    many("--add-host", help="Add a custom host-to-IP mapping (host:ip)"),
    many("--dns", help="Set custom DNS servers"),
    many("--dns-search", help="Set custom DNS search domains"),
    many("--dns-option", help="Set DNS options"),
    option("--cidfile", metavar="string", help="Write the container ID to the file"),
    option(
        "--pull",
        metavar="string",
        type=click.Choice(["always", "missing", "never"]),
        default="missing",
        help="Pull the image before running (always, missing, never)",
    ),
    many("--device", help="Add a host device to the container (/dev/x[:/dev/y[:rwm]] or a CDI name)"),
    many("--volumes-from", help="Mount volumes from the specified container(s)"),
    many("--sysctl", help="Sysctl options of the container's own namespaces"),
    option("--pid", metavar="string", help="PID namespace to use (host, container:<name|id>)"),
    option("--ipc", metavar="string", help="IPC mode to use (private, shareable, host, container:<name|id>)"),
    option("--uts", metavar="string", help="UTS namespace to use (host)"),
    option("--userns", metavar="string", help="User namespace to use (host)"),
    option("--cgroupns", metavar="string", help="Cgroup namespace to use (private, host)"),
    option("--blkio-weight", metavar="uint16", type=int, help="Block IO (relative weight), between 10 and 1000"),
    _absent("--gpus", why="containers see docker's default devices only"),
    _absent("--ip6", why="networks are IPv4 in this release"),
    *resourceflags.FLAGS,
]  # fmt: skip


@command("run", RUN_USAGE, interspersed=False)
@run_flags
@flag("-d", "--detach", help="Run container in background and print container ID")
@option("--detach-keys", metavar="string", help="Override the key sequence for detaching a container")
@many("-a", "--attach", help="Attach to STDIN, STDOUT or STDERR")
@option("--sig-proxy", metavar="bool", type=bool, default=True, help="Proxy received signals to the process")
@flag("--check", help="Raise an error when the command ends with a status other than 0 (for graded cells)")
@click.argument("image", type=IMAGE)
@words("arguments")
@click.pass_context
def run(ctx: click.Context, /, image: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Create and run a new container from an image.

    Everything after IMAGE is the command. In a notebook the magic returns the Container with -d, otherwise a
    RunResult with the exit code.
    """
    host = host_of(ctx)
    settings = settings_of(flags)
    if flags["rm"] and flags["restart"] not in (None, "no"):
        raise UsageError(
            "conflicting options: cannot specify both --restart and --rm",
            resolution="leave one out: a container that removes itself has nothing to start again",
        )
    _check_attach(flags)
    if flags["detach"]:
        settings["auto_remove"] = flags["rm"]
        container = _create(host, image, arguments, settings, flags)
        before_start = container.warnings
        container.start()
        for warning in container.warnings[len(before_start) :]:
            host.warn(warning)
        host.line(container.id) if not host.notebook else None
        return container
    return _run_foreground(host, image, arguments, settings, flags)


def _check_attach(flags: dict[str, Any]) -> None:
    for word in flags["attach"]:
        if word.lower() not in ("stdin", "stdout", "stderr"):
            raise UsageError(
                f'invalid argument "{word}" for "-a, --attach" flag: valid streams are stdin, stdout and stderr',
                resolution="for example -a stdout",
            )
    if flags["attach"] and flags["detach"]:
        raise UsageError("conflicting options: cannot specify both --attach and --detach", resolution="leave one out")


def _without_terminal(
    host: Host, flags: dict[str, Any], arguments: Sequence[str]
) -> tuple[Callable[[Any], Dialogue] | None, Sequence[str]]:
    """`-it` where stdin is no terminal: in a cell a shell can be talked to by what is returned; then the command.
    Raises UsageError for everything else, as docker does."""
    if not (flags["tty"] and flags["interactive"]) or host.stdin_is_terminal():
        return None, arguments
    from .dialogue import Dialogue, shell_in_cell

    found = shell_in_cell(host, arguments)
    if found is None:
        hint = "a cell has no terminal: leave -t out, name just a shell (`sh`), or open a terminal in JupyterLab"
        raise UsageError("the input device is not a TTY", resolution=hint if host.notebook else None, exit_code=1)
    return lambda attachment: Dialogue(host, attachment), found


def _run_foreground(
    host: Host, image: str, arguments: Sequence[str], settings: dict[str, Any], flags: dict[str, Any]
) -> RunResult:
    shell, arguments = _without_terminal(host, flags, arguments)
    tty, interactive = flags["tty"] and shell is None, flags["interactive"]
    if shell:
        settings["tty"] = False
    if host.terminal_size() and tty:
        settings.setdefault("environment", {}).setdefault("TERM", os.environ.get("TERM", "xterm"))
        settings["console_size"] = host.terminal_size()
    wanted = {word.lower() for word in flags["attach"]}
    stdin = interactive and (not wanted or "stdin" in wanted)
    before = time.monotonic()
    settings["auto_remove"] = flags["rm"]
    image, notify = _source(host, image, flags)
    with _id_file(host, flags) as write_id:
        container = host.engine.containers.create(image, list(arguments) or None, notify=notify, **settings)
        write_id(container.id)
    # As with docker it lives on when a terminal's client is killed; a notebook's kernel takes it along.
    attachment = host.engine.containers.start_attached(container, tied=host.notebook)
    _announce(host, container)
    try:
        exit_code = (
            shell(attachment).hold(container.kill)
            if shell
            else foreground.stream(
                host,
                attachment,
                kill=container.kill,
                stdin=stdin,
                tty=tty,
                proxy_signals=flags["sig_proxy"],
                keys=flags["detach_keys"],
            )
        )
    except foreground.Interrupted:
        if flags["rm"]:
            _wait_until_gone(host, container)
        raise
    if exit_code == foreground.DETACHED:
        host.line()
        return RunResult(0, id=container.id, container=container, note="detached; the container goes on")
    result = finished(container, attachment, exit_code, before)
    if result.oom_killed and not host.notebook:
        # A notebook's result says so itself; in a terminal there would be a bare 137.
        host.warn(f"{container.name}: out of memory at its limit; raise it with --memory")
    if flags["rm"]:
        _wait_until_gone(host, container)
    return checked(result, flags["check"])


def _wait_until_gone(host: Host, container: Any) -> None:
    """The supervisor answers first and cleans up after; what follows a --rm must not meet its remains."""
    with contextlib.suppress(NoSuchContainer):
        host.engine.runtime.wait(container.id, "removed")


def finished(container: Any, attachment: Any, exit_code: int, before: float) -> RunResult:
    """The result of a foreground command."""
    oom_killed = bool(getattr(attachment, "oom_killed", False))
    timings = {}
    exec_at = getattr(attachment, "exec_at", None)
    if exec_at:
        timings["exec_s"] = max(0.0, exec_at - before)
    return RunResult(
        exit_code,
        id=container.id,
        container=container,
        seconds=time.monotonic() - before,
        timings=timings,
        oom_killed=oom_killed,
    )


def checked(result: RunResult, check: bool) -> RunResult:  # noqa: FBT001
    """With --check, a status other than 0 raises ContainerExit."""
    if check and not result.ok:
        why = explain(result.exit_code, oom_killed=result.oom_killed)
        name = getattr(result.container, "name", result.id)
        raise ContainerExit(
            f"{name}: the command ended with exit code {result.exit_code}{why}", status=result.exit_code
        )
    return result


@command("create", RUN_USAGE, interspersed=False)
@run_flags
@click.argument("image", type=IMAGE)
@words("arguments")
@click.pass_context
def create(ctx: click.Context, /, image: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Create a new container."""
    host = host_of(ctx)
    settings = settings_of(flags)
    settings["auto_remove"] = flags["rm"]
    container = _create(host, image, arguments, settings, flags)
    host.line(container.id) if not host.notebook else None
    return container


def _create(host: Host, image: str, arguments: Sequence[str], settings: dict[str, Any], flags: dict[str, Any]) -> Any:
    image, notify = _source(host, image, flags)
    with _id_file(host, flags) as write_id:
        container = host.engine.containers.create(image, list(arguments) or None, notify=notify, **settings)
        write_id(container.id)
    _announce(host, container)
    return container


def _source(host: Host, image: str, flags: dict[str, Any]) -> tuple[str, Callable[[str], None]]:
    """The image, or the directory of --rootfs, and who hears of a pull."""

    def silent(_line: str) -> None:
        pass

    notify = silent if flags["quiet"] else host.note
    if flags["rootfs"]:
        path, over = image.removesuffix(":O"), image.endswith(":O")
        return f"{os.path.abspath(host.working_dir() / path)}{':O' if over else ''}", notify
    if image.startswith(("/", ".")):
        raise UsageError("invalid reference format", resolution=f"--rootfs {image} runs a directory", exit_code=125)
    if flags["pull"] == "never":
        host.engine.images.get(image)
    elif flags["pull"] == "always":
        from ..imaging.pulls import parse_name

        images, wanted = host.engine.images, parse_name(image)
        if images.is_builtin(wanted) or not images.registry_answers(wanted.domain, fresh=True):
            images.resolve(image, notify=notify, ask=False)
        else:
            host.engine.pulls.pull(image, notify=notify)
    return image, notify


def _announce(host: Host, container: Any) -> None:
    for warning in container.warnings or ():
        host.warn(warning)


@contextlib.contextmanager
def _id_file(host: Host, flags: dict[str, Any]) -> Iterator[Callable[[str], None]]:
    """What writes the file of --cidfile: made before anything else is, and taken back when no container came of it."""
    name = flags["cidfile"]
    if not name:
        yield lambda _id: None
        return
    path = host.working_dir() / name
    try:
        file = path.open("x")
    except FileExistsError:
        raise UsageError(
            f"container ID file found, make sure the other container isn't running or delete {name}"
        ) from None
    except OSError as err:
        why = (err.strerror or str(err)).lower()
        raise UsageError(f"failed to create the container ID file: open {name}: {why}") from None
    written = False

    def write(id: str) -> None:
        nonlocal written
        file.write(id)
        written = True

    with file:
        try:
            yield write
        finally:
            if not written:
                path.unlink(missing_ok=True)


@command("exec", "[OPTIONS] CONTAINER COMMAND [ARG...]", interspersed=False)
@flag("-d", "--detach", help="Detached mode: run command in the background")
@option("--detach-keys", metavar="string", help="Override the key sequence for detaching a container")
@many("-e", "--env", help="Set environment variables")
@many("--env-file", help="Read in a file of environment variables")
@flag("-i", "--interactive", help="Keep STDIN open even if not attached")
@flag("--privileged", help="Give extended privileges to the command")
@flag("-t", "--tty", help="Allocate a pseudo-TTY")
@option("-u", "--user", metavar="string", help="Username or UID (format: <name|uid>[:<group|gid>])")
@option("-w", "--workdir", metavar="string", help="Working directory inside the container")
@flag("--check", help="Raise an error when the command ends with a status other than 0 (for graded cells)")
@click.argument("container", type=CONTAINER)
@words("arguments", least=1)
@click.pass_context
def exec_(ctx: click.Context, /, container: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Execute a command in a running container."""
    host = host_of(ctx)
    shell, argv = (None, arguments) if flags["detach"] else _without_terminal(host, flags, arguments)
    tty, interactive = flags["tty"] and shell is None, flags["interactive"]
    found = host.engine.containers.get(container)
    before = time.monotonic()
    attachment = found.open_exec(
        list(argv),
        environment=environment_of(flags, host.working_dir()),
        user=flags["user"] or "",
        workdir=flags["workdir"],
        privileged=flags["privileged"],
        tty=tty,
        stdin=interactive,
        detach=flags["detach"],
        console_size=host.terminal_size() if tty else None,
        tied=host.notebook and not flags["detach"],
    )
    if flags["detach"]:
        attachment.close()
        return None
    exit_code = (
        shell(attachment).hold(lambda number: _kill_exec(attachment, number))
        if shell
        else foreground.stream(
            host,
            attachment,
            kill=lambda number: _kill_exec(attachment, number),
            stdin=interactive,
            tty=tty,
            keys=flags["detach_keys"],
        )
    )
    if exit_code == foreground.DETACHED:
        return RunResult(0, id=found.id, container=found, note="detached; the command goes on")
    return checked(finished(found, attachment, exit_code, before), flags["check"])


def _kill_exec(attachment: Any, number: int) -> None:
    """A signal for a command started by exec: its pid is in our view, docker has no verb for it."""
    if attachment.pid:
        try:
            os.kill(attachment.pid, number)
        except (ProcessLookupError, PermissionError):
            raise LabkernelError("the command has ended") from None


@command("attach", "[OPTIONS] CONTAINER")
@option("--detach-keys", metavar="string", help="Override the key sequence for detaching a container")
@flag("--no-stdin", help="Do not attach STDIN")
@option("--sig-proxy", metavar="bool", type=bool, default=True, help="Proxy received signals to the process")
@click.argument("container", type=CONTAINER)
@click.pass_context
def attach(ctx: click.Context, /, container: str, **flags: Any) -> Any:
    """Attach local standard input, output, and error streams to a running container."""
    host = host_of(ctx)
    found = host.engine.containers.get(container)
    return _attached(host, found, flags)


def _attached(host: Host, found: Any, flags: dict[str, Any]) -> Any:
    config = found.attrs.get("Config") or {}
    stdin = bool(config.get("OpenStdin")) and not flags.get("no_stdin") and host.stdin_fd() is not None
    before = time.monotonic()
    attachment = found.open_attachment(stdin=stdin)
    size = host.terminal_size() if config.get("Tty") else None
    if size:
        # As docker: a size that differs for a moment makes the program draw its prompt or screen once more.
        with contextlib.suppress(LabkernelError):
            found.resize(size[0] + 1, size[1])
            found.resize(*size)
    exit_code = foreground.stream(
        host,
        attachment,
        kill=found.kill,
        stdin=stdin,
        tty=bool(config.get("Tty")),
        proxy_signals=flags.get("sig_proxy", True),
        keys=flags.get("detach_keys"),
    )
    if exit_code == foreground.DETACHED:
        return RunResult(0, id=found.id, container=found, note="detached; the container goes on")
    return finished(found, attachment, exit_code, before)


@command("start", "[OPTIONS] CONTAINER [CONTAINER...]")
@flag("-a", "--attach", help="Attach STDOUT/STDERR and forward signals")
@flag("-i", "--interactive", help="Attach container's STDIN")
@option("--detach-keys", metavar="string", help="Override the key sequence for detaching a container")
@words("containers", least=1, kind=CONTAINER)
@click.pass_context
def start(ctx: click.Context, /, containers: tuple[str, ...], **flags: Any) -> Any:
    """Start one or more stopped containers."""
    from .container import each

    host = host_of(ctx)
    if not (flags["attach"] or flags["interactive"]):
        return each(host, containers, lambda container: container.start())
    if len(containers) > 1:
        raise UsageError("you cannot start and attach multiple containers at once", exit_code=1)
    found = host.engine.containers.get(containers[0])
    stdin = flags["interactive"]
    before = time.monotonic()
    attachment = host.engine.runtime.run(found.id, stdin=stdin)
    tty = bool((found.attrs.get("Config") or {}).get("Tty"))
    exit_code = foreground.stream(host, attachment, kill=found.kill, stdin=stdin, tty=tty, keys=flags["detach_keys"])
    return finished(found, attachment, max(exit_code, 0), before)
