"""`vm`: the same images and commands in QEMU guests (docker's own verbs are in `vmverbs`)."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import click

from ..errors import ContainerExit, LabkernelError, UsageError
from . import foreground
from .grammar import IMAGE, Entry, LabGroup, command, flag, host_of, many, option, words
from .host import Host, failures, snapshot_of
from .settings import settings_of
from .values import RunResult, explain
from .vmverbs import VM

ENTRIES = {
    "run": Entry("vm:run", "Run an image's command in a virtual machine"),
    "create": Entry("vm:create", "Create a new virtual machine"),
    "start": Entry("vm:start", "Start one or more stopped virtual machines"),
    "ps": Entry("vmverbs:ps", "List virtual machines"),
    "ls": Entry("vmverbs:ps", "", ""),
    "list": Entry("vmverbs:ps", "", ""),
    "exec": Entry("vmverbs:exec_", "Execute a command in a running virtual machine"),
    "logs": Entry("vmverbs:logs", "Fetch the logs of a virtual machine"),
    "attach": Entry("vmverbs:attach", "Attach to a running virtual machine's command"),
    "stop": Entry("vmverbs:stop", "Stop one or more running virtual machines"),
    "kill": Entry("vmverbs:kill", "Kill one or more running virtual machines"),
    "restart": Entry("vmverbs:restart", "Restart one or more virtual machines"),
    "pause": Entry("vmverbs:pause", "Pause one or more virtual machines"),
    "unpause": Entry("vmverbs:unpause", "Unpause one or more virtual machines"),
    "wait": Entry("vmverbs:wait", "Block until virtual machines stop, then print their exit codes"),
    "rm": Entry("vmverbs:rm", "Remove one or more virtual machines"),
    "remove": Entry("vmverbs:rm", "", ""),
    "rename": Entry("vmverbs:rename", "Rename a virtual machine"),
    "port": Entry("vmverbs:port", "List port mappings"),
    "stats": Entry("vmverbs:stats", "Display what virtual machines use"),
    "inspect": Entry("vm:inspect", "Display detailed information on one or more virtual machines"),
    "snapshot": Entry("vm:snapshot", "Keep the state of a running virtual machine"),
    "restore": Entry("vm:restore", "Go back to a snapshot"),
    "prune": Entry("vm:prune", "Remove stopped virtual machines and disks nobody needs"),
}
vm = LabGroup("vm", help="The QEMU baseline: the same images as virtual machines.", entries=ENTRIES)
_USAGE = "[OPTIONS] IMAGE [COMMAND] [ARG...]"
_MACHINE = [
    flag("--cold", help="Boot from nothing instead of restoring a template"),
    option("-m", "--memory", metavar="bytes", help="Memory of the machine (for example 256m)"),
    option("--cpus", metavar="decimal", help="Number of virtual CPUs (a fraction limits QEMU's process)"),
    option("--kernel", metavar="file", help="The guest's kernel: a vmlinuz or vmlinux, or an unpacked package"),
    option("--timeout", metavar="seconds", type=float, help="End the machine after so many seconds"),
    option("--name", metavar="string", help="Assign a name to the machine"),
    many("-e", "--env", help="Set environment variables (K=V, or K to pass ours on)"),
    many("--env-file", help="Read in a file of environment variables"),
    option("-u", "--user", metavar="string", help="Username or UID (format: <name|uid>[:<group|gid>])"),
    option("-w", "--workdir", metavar="string", help="Working directory inside the machine"),
    option("--entrypoint", metavar="string", help="Overwrite the default ENTRYPOINT of the image"),
    option("-h", "--hostname", metavar="string", help="Host name of the machine"),
    many("-v", "--volume", help="Share a directory or a volume (SOURCE:TARGET[:ro])"),
    many("--mount", metavar="mount", help="The same in words (type=bind|volume,src=…,dst=…[,ro])"),
    many("-p", "--publish", help="Publish a port of the machine ([[IP:]PORT:]PORT[/udp])"),
    many(
        "--network",
        "--net",
        metavar="network",
        help="none (the default), bridge (from the machine outwards), NAME "
        "of a network, or name=NAME,alias=…,ip=…; several times for several networks",
    ),
    many("--network-alias", "--net-alias", help="Add network-scoped alias for the machine"),
    option("--ip", metavar="ip", help="IPv4 address in the network (e.g., 172.30.100.104)"),
    option("--mac-address", metavar="string", help="The machine's MAC address there (e.g., 92:d0:c6:0a:29:33)"),
    flag("--read-only", help="Mount the machine's root filesystem as read only"),
    many("-l", "--label", help="Set meta data on the machine"),
    many("--label-file", help="Read in a line delimited file of labels"),
    option("--stop-signal", metavar="string", help="Signal to stop the machine's command"),
    option("--stop-timeout", metavar="int", type=int, help="Timeout (in seconds) to stop the machine"),
    flag("-i", "--interactive", help="Pass our STDIN on"),
    flag("-t", "--tty", help="Allocate a terminal inside the machine"),
    flag("--rm", help="Remove the machine when it exits"),
]


def _machine_flags(function: Any) -> Any:
    for decorate in reversed(_MACHINE):
        function = decorate(function)
    return function


def _settings(host: Host, flags: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(flags, host.working_dir())
    settings.update(cold=flags["cold"], notify=host.note, timeout_s=flags["timeout"])
    if flags["kernel"]:
        settings["kernel"] = host.working_dir() / flags["kernel"]
    return settings


@command("run", _USAGE, interspersed=False)
@_machine_flags
@flag("-d", "--detach", help="Run the machine in background and print its ID")
@option("--detach-keys", metavar="string", help="Override the key sequence for detaching a machine")
@flag("--check", help="Raise an error when the command ends with a status other than 0 (for graded cells)")
@click.argument("image", type=IMAGE)
@words("arguments")
@click.pass_context
def run(ctx: click.Context, /, image: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Run an image's command in a virtual machine; output and exit code come back.

    Without -d it ends with this terminal or notebook. The magic returns what it cost, with -d the VM.
    """
    host = host_of(ctx)
    settings = _settings(host, flags)
    if flags["detach"]:
        found = host.engine.vms.run(image, list(arguments) or None, detach=True, remove=flags["rm"], **settings)
        _warn(host, found.warnings)
        return _shown(host, found)
    return _foreground(host, image, arguments, settings, flags)


def _shown(host: Host, found: Any) -> Any:
    if host.notebook:
        return found
    host.line(found.id)
    return None


def _foreground(
    host: Host, image: str, arguments: tuple[str, ...], settings: dict[str, Any], flags: dict[str, Any]
) -> Any:
    tty, stdin = flags["tty"], flags["interactive"]
    if tty and stdin and not host.stdin_is_terminal():
        raise UsageError("the input device is not a TTY", exit_code=1)
    if tty and host.terminal_size():
        settings.setdefault("environment", {}).setdefault("TERM", os.environ.get("TERM", "xterm"))
        settings["console_size"] = host.terminal_size()
    found = host.engine.vms.create(image, list(arguments) or None, **settings)
    try:
        attachment = host.engine.vms.attach_start(found, ephemeral=flags["rm"])
        code = foreground.stream(
            host, attachment, kill=found.kill, stdin=stdin, tty=tty, keys=flags["detach_keys"], proxy_signals=True
        )
        if code == foreground.DETACHED:
            host.line()
            return RunResult(0, id=found.id, container=found, note="detached; the machine goes on")
        result = found.result()
    except foreground.Interrupted:
        if flags["rm"]:
            _take_back(found)
        raise
    except KeyboardInterrupt:
        _take_back(found)
        raise foreground.Interrupted("interrupted while it came up; the machine was removed", 130) from None
    except BaseException:
        _take_back(found)
        raise
    if flags["rm"]:
        found.remove(force=True, v=True)
    _warn(host, result.warnings)
    if flags["check"] and result.exit_code != 0:
        raise ContainerExit(
            f"{image}: the command ended with exit code {result.exit_code}{explain(result.exit_code)}",
            status=result.exit_code,
        )
    return result


def _take_back(found: Any) -> None:
    """What failed or was interrupted leaves no machine behind."""
    with contextlib.suppress(LabkernelError):
        found.remove(force=True, v=True)


def _warn(host: Host, warnings: Any) -> None:
    for warning in warnings:
        host.warn(str(warning))


@command("create", _USAGE, interspersed=False)
@_machine_flags
@click.argument("image", type=IMAGE)
@words("arguments")
@click.pass_context
def create(ctx: click.Context, /, image: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Create a new virtual machine."""
    host = host_of(ctx)
    settings = _settings(host, flags)
    found = host.engine.vms.create(image, list(arguments) or None, auto_remove=flags["rm"], **settings)
    _warn(host, found.warnings)
    return _shown(host, found)


@command("start", "[OPTIONS] VM [VM...]")
@flag("-a", "--attach", help="Attach STDOUT/STDERR and forward signals")
@flag("-i", "--interactive", help="Attach the machine's STDIN")
@option("--detach-keys", metavar="string", help="Override the key sequence for detaching a machine")
@words("vms", least=1, kind=VM)
@click.pass_context
def start(ctx: click.Context, /, vms: tuple[str, ...], **flags: Any) -> Any:
    """Start one or more stopped virtual machines. What they wrote to their disk is there again."""
    host = host_of(ctx)
    if not (flags["attach"] or flags["interactive"]):
        return each(host, vms, lambda found: found.start())
    if len(vms) > 1:
        raise UsageError("you cannot start and attach multiple virtual machines at once", exit_code=1)
    found = host.engine.vms.get(vms[0])
    found.notify = host.note
    attachment = host.engine.vms.attach_start(found, tied=False)
    tty = bool(found.settings.get("tty"))
    code = foreground.stream(
        host, attachment, kill=found.kill, stdin=flags["interactive"], tty=tty, keys=flags["detach_keys"]
    )
    return RunResult(max(code, 0), id=found.id, container=found)


def each(host: Host, names: tuple[str, ...], act: Any) -> Any:
    """Do something to each named machine and print its name; goes on after one that fails."""
    errors: list[LabkernelError] = []
    for name in names:
        try:
            found = host.engine.vms.get(name)
            found.notify = host.note
            act(found)
            host.line(name)
        except LabkernelError as err:
            errors.append(err)
    failures(errors, host, [])


@command("inspect", "[OPTIONS] VM [VM...]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@words("vms", least=1, kind=VM)
@click.pass_context
def inspect(ctx: click.Context, vms: tuple[str, ...], form: str | None) -> Any:
    """Display detailed information on one or more virtual machines."""
    from .container import document

    return document([host_of(ctx).engine.vms.get(name).attrs for name in vms], form)


@command("snapshot", "[OPTIONS] VM [NAME]")
@flag("--rm", help="Remove the snapshot NAME instead")
@click.argument("vm", type=VM)
@click.argument("name", required=False)
@click.pass_context
def snapshot(ctx: click.Context, vm: str, name: str | None, *, rm: bool) -> None:
    """Keep memory and disk of a running virtual machine; it goes on. `vm inspect` lists its snapshots."""
    host = host_of(ctx)
    snapshot_of(host, host.engine.vms.get(vm), name, rm=rm)


@command("restore", "VM [NAME]")
@click.argument("vm", type=VM)
@click.argument("name", required=False)
@click.pass_context
def restore(ctx: click.Context, vm: str, name: str | None) -> Any:
    """Go back to a snapshot: what runs now is ended, the machine goes on where it was."""
    host = host_of(ctx)
    found = host.engine.vms.get(vm)
    found.restore(name) if name else found.restore()
    host.line(vm)
    return found if host.notebook else None


@command("prune", "[OPTIONS]")
@flag("-a", "--all", help="Remove all kept disks and templates, not just disks of images that are gone")
@flag("-f", "--force", help="Do not prompt for confirmation")
@many("--filter", metavar="filter", help="Provide filter values (e.g. until=<timestamp>)")
@click.pass_context
def prune(ctx: click.Context, *, all: bool, force: bool, filter: tuple[str, ...]) -> Any:
    """Remove stopped virtual machines, and what was kept to start machines faster and nobody needs any more."""
    from .container import confirm, filters_of, pruned

    host = host_of(ctx)
    confirm(host, "This will remove all stopped virtual machines.", force=force)
    answer = host.engine.vms.prune(filters_of(filter), all=all)
    return pruned("Deleted VMs:", answer["VMsDeleted"], answer["SpaceReclaimed"])
