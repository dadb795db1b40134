"""`vm run`: the same image and command in a QEMU guest; `compare`: both, measured side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import ContainerExit, UsageError
from . import foreground
from .grammar import IMAGE, Entry, LabGroup, command, flag, host_of, many, option, words
from .settings import environment_of, nano_cpus
from .values import explain

ENTRIES = {"run": Entry("vm:run", "Run an image's command in a virtual machine")}
LATER = dict.fromkeys(
    ("ps", "ls", "stop", "kill", "rm", "exec", "logs", "start"), "`vm run IMAGE CMD` runs and ends with it"
)
vm = LabGroup("vm", help="The QEMU baseline: the same images as virtual machines.", entries=ENTRIES, absent=LATER)


@command("run", "[OPTIONS] IMAGE [COMMAND] [ARG...]", interspersed=False)
@flag("--cold", help="Boot from nothing instead of restoring a template")
@option("-m", "--memory", metavar="bytes", help="Memory of the machine (for example 256m)")
@many("-e", "--env", help="Set environment variables (K=V, or K to pass ours on)")
@many("--env-file", help="Read in a file of environment variables")
@option("-u", "--user", metavar="string", help="Username or UID (format: <name|uid>[:<group|gid>])")
@option("-w", "--workdir", metavar="string", help="Working directory inside the machine")
@option("--cpus", metavar="int", type=click.IntRange(1), help="Number of virtual CPUs")
@option("--entrypoint", metavar="string", help="Overwrite the default ENTRYPOINT of the image")
@option("-h", "--hostname", metavar="string", help="Host name of the machine")
@flag("-i", "--interactive", help="Pass our STDIN on")
@option("--timeout", metavar="seconds", type=float, help="Give up after so many seconds")
@flag("--rm", help="(always: a machine leaves nothing behind)")
@flag("--check", help="Raise an error when the command ends with a status other than 0 (for graded cells)")
@click.argument("image", type=IMAGE)
@words("arguments")
@click.pass_context
def run(ctx: click.Context, /, image: str, arguments: tuple[str, ...], **flags: Any) -> Any:
    """Run an image's command in a virtual machine; output and exit code come back."""
    host = host_of(ctx)
    settings: dict[str, Any] = {"cold": flags["cold"], "on_output": host.write, "notify": host.note}
    if flags["interactive"]:
        # In a cell there is no stdin: the command sees its end at once.
        settings["stdin"] = b"" if host.stdin_fd() is None else sys.stdin.buffer
    environment = environment_of(flags, host.working_dir())
    if environment:
        settings["environment"] = environment
    for name, keyword in (
        ("memory", "mem_limit"),
        ("user", "user"),
        ("workdir", "working_dir"),
        ("timeout", "timeout_s"),
        ("cpus", "cpus"),
        ("entrypoint", "entrypoint"),
        ("hostname", "hostname"),
    ):
        if flags[name] is not None:
            settings[keyword] = flags[name]
    try:
        result = host.engine.vms.run(image, list(arguments) or None, **settings)
    except KeyboardInterrupt:
        # Only this thread was told: the service has ended the machine on its way out.
        raise foreground.Interrupted("interrupted; the machine was stopped", 130) from None
    finally:
        host.end_of_output()
    for warning in result.warnings:
        host.warn(str(warning))
    if flags["check"] and result.exit_code != 0:
        code = result.exit_code
        raise ContainerExit(f"{image}: the command ended with exit code {code}{explain(code)}", status=code)
    return result


@command("compare", "[OPTIONS] IMAGE [-n RUNS] [--json FILE] -- CMD [ARG...]", interspersed=False)
@option("-n", "--runs", metavar="int", type=click.IntRange(1, 100), default=1, help="Runs of each kind")
@option("--json", "json_file", metavar="file", help="Also write the figures to this file (- for stdout)")
@option("--png", metavar="file", help="Also write the picture to this file")
@option("-m", "--memory", metavar="bytes", help="Memory limit of the container, and memory of the machine")
@option("--cpus", metavar="decimal", help="CPU limit of the container")
@many("-e", "--env", help="Set environment variables")
@many("--env-file", help="Read in a file of environment variables")
@option("-u", "--user", metavar="string", help="Username or UID")
@option("-w", "--workdir", metavar="string", help="Working directory")
@flag("--cold", help="Boot the machine from nothing each time")
@option("--timeout", metavar="seconds", type=float, help="Give up on a run after so many seconds")
@words("line", least=1)
@click.pass_context
def compare(ctx: click.Context, /, line: tuple[str, ...], **flags: Any) -> Any:
    """Run the same image and command as a container and as a virtual machine, and put the figures side by side."""
    host = host_of(ctx)
    image, flags, words_ = _split(ctx, list(line), flags)
    settings: dict[str, Any] = {"runs": flags["runs"], "cold": flags["cold"]}
    if flags["memory"]:
        settings["memory"] = flags["memory"]
    if flags["cpus"]:
        settings["cpus"] = nano_cpus(flags["cpus"]) / 1e9
    if flags["timeout"]:
        settings["timeout_s"] = flags["timeout"]
    if environment := environment_of(flags, host.working_dir()):
        settings["environment"] = environment
    for name, keyword in (("user", "user"), ("workdir", "working_dir")):
        if flags[name]:
            settings[keyword] = flags[name]
    for file in filter(None, (flags["json_file"], flags["png"])):
        if file != "-" and not (host.working_dir() / file).parent.is_dir():
            raise UsageError(f"{file}: no such directory", exit_code=1)
    result = host.engine.comparisons.compare(image, words_ or None, notify=host.note, **settings)
    if flags["json_file"] == "-":
        host.line(_json(result))
        return None
    if flags["json_file"]:
        (host.working_dir() / flags["json_file"]).write_text(_json(result) + "\n")
    if flags["png"]:
        Path(host.working_dir() / flags["png"]).write_bytes(result.to_png())
    return result


def _json(result: Any) -> str:
    text = result.to_json()
    return text if isinstance(text, str) else json.dumps(text, indent=2)


def _split(ctx: click.Context, line: list[str], flags: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """`IMAGE [flags] -- CMD`: flags may stand after the image, but nothing after `--` is ours."""
    image = line.pop(0)
    if "--" in line:
        place = line.index("--")
        ours, words_ = line[:place], line[place + 1 :]
    else:
        ours, words_ = ([], line) if not line or not line[0].startswith("-") else (line, [])
    if ours:
        inner = ctx.command.make_context(ctx.info_name, [*ours, "--", image], parent=ctx.parent)
        given = inner.get_parameter_source
        for name, value in inner.params.items():
            source = given(name)
            if name != "line" and source is not None and source.name == "COMMANDLINE":
                flags[name] = (*flags[name], *value) if isinstance(value, tuple) else value
        if len(inner.params["line"]) > 1:
            raise UsageError(
                f"what to run comes after `--`: {ctx.command_path} {image} -- {' '.join(inner.params['line'][:-1])}"
            )
    return image, flags, words_
