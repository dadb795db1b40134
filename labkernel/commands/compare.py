"""`compare`: the same image and command as a container and as a virtual machine; workloads in every way to run that
works here; the experiments density, isolation and portability; and figures that were saved."""

from __future__ import annotations

import contextlib
import html
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .grammar import command, flag, host_of, many, option, words
from .host import Host
from .settings import environment_of, nano_cpus

TABLES = ("isolation", "portability")
EXPERIMENTS = ("density", "isolation", "portability", "show")
_HELP_WORKLOAD = "all, or of: start, idle, disk, cpu, syscall, exec, memory, file, fsync, network"
_HELP_ROWS = (
    "Ways to run, of: bare, root, rootless, proot, vm, vm-cold, docker (default: all but docker that work here)"
)


@command("compare", "[OPTIONS] IMAGE [-n RUNS] [--json FILE] -- CMD [ARG...]", interspersed=False)
@option("-n", "--runs", metavar="int", type=click.IntRange(1, 100), help="Runs of each kind (default 1; workloads 3)")
@option("--workload", metavar="names", help=_HELP_WORKLOAD)
@option("--rows", metavar="names", help=_HELP_ROWS)
@option("--docker-context", metavar="name", default="", help="The docker context of the row docker")
@option("--json", "json_file", metavar="file", help="Also write the figures to this file (- for stdout)")
@option("--png", metavar="file", help="Also write the picture to this file")
@option("-m", "--memory", metavar="bytes", help="Memory limit of the container, and memory of the machine; of density")
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
    """Run the same image and command as a container and as a virtual machine, and put the figures side by side.

    \b
    compare IMAGE -- CMD              one command: start, time, CPU, memory, disk, with curves
    compare IMAGE --rows all -- CMD   the same in every way to run that works here
    compare IMAGE --workload all      what a system call, fork, fsync, a page, … costs in each
    compare density [IMAGE]           how many idle containers and machines fit into a memory
    compare isolation [IMAGE]         what a program sees from inside
    compare portability [IMAGE]       the same digest everywhere, and in Docker
    compare show FILE [FILE]          saved figures, of one machine or of two
    """
    host = host_of(ctx)
    image, flags, words_ = _split(ctx, list(line), flags)
    for file in filter(None, (flags["json_file"], flags["png"])):
        if file != "-" and not (host.working_dir() / file).parent.is_dir():
            raise UsageError(f"{file}: no such directory", exit_code=1)
    if flags["png"] and image in TABLES and "--" not in line:
        raise UsageError(f"{image} is a table and has no picture", resolution="leave --png out", exit_code=1)
    with _telling(host) as notify:
        if image in EXPERIMENTS and "--" not in line:
            result = _experiment(host, image, words_, flags, notify)
        elif flags["workload"] or flags["rows"]:
            result = _measure(host, image, words_, flags, notify)
        else:
            result = _compare(host, image, words_, flags, notify)
    return _kept(host, result, flags)


@contextlib.contextmanager
def _telling(host: Host) -> Iterator[Callable[[str], None]]:
    """What happens, line by line; in a cell one line that changes and opens, since a minute of them would push the
    figure out of sight."""
    if not host.notebook:
        yield host.note
        return
    lines: list[str] = []
    with host.live() as redraw:

        def tell(line: str) -> None:
            lines.append(line)
            redraw(line, _opening(line, lines))

        yield tell
        if lines:
            redraw("\n".join(lines), _opening(f"measured in {len(lines)} steps", lines))


def _opening(summary: str, lines: Sequence[str]) -> str:
    inside = "".join(f"<div style='margin-left:18px'>{html.escape(line)}</div>" for line in lines)
    return f"<details><summary style='cursor:pointer'>{html.escape(summary)}</summary>{inside}</details>"


def _compare(host: Host, image: str, words_: list[str], flags: dict[str, Any], notify: Callable[[str], None]) -> Any:
    settings: dict[str, Any] = {"runs": flags["runs"] or 1, "cold": flags["cold"]}
    if flags["memory"]:
        settings["memory"] = flags["memory"]
    if flags["cpus"]:
        settings["cpus"] = nano_cpus(flags["cpus"]) / 1e9
    if flags["timeout"]:
        settings["timeout_s"] = flags["timeout"]
    settings |= _shared(host, flags)
    return host.engine.comparisons.compare(image, words_ or None, notify=notify, **settings)


def _shared(host: Host, flags: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if environment := environment_of(flags, host.working_dir()):
        settings["environment"] = environment
    for name, keyword in (("user", "user"), ("workdir", "working_dir")):
        if flags[name]:
            settings[keyword] = flags[name]
    return settings


def _measure(host: Host, image: str, words_: list[str], flags: dict[str, Any], notify: Callable[[str], None]) -> Any:
    if flags["workload"] and words_:
        raise UsageError("either --workload or a command", resolution="a command is a workload of its own")
    settings: dict[str, Any] = {"runs": flags["runs"] or 3, "notify": notify}
    if flags["rows"] and flags["rows"] != "all":
        settings["rows"] = flags["rows"]
    if words_:
        settings |= {"command": words_, **_shared(host, flags)}
    settings["docker_context"] = flags["docker_context"]
    return host.engine.comparisons.measure(image, flags["workload"] or "all", **settings)


def _experiment(host: Host, name: str, words_: list[str], flags: dict[str, Any], notify: Callable[[str], None]) -> Any:
    comparisons = host.engine.comparisons
    if name == "show":
        return _saved(host, words_)
    if len(words_) > 1:
        raise UsageError(f"`compare {name}` takes one image", resolution=f"{name} {words_[0]}")
    image = words_[0] if words_ else "busybox"
    if name == "density":
        return comparisons.density(image, memory=flags["memory"], notify=notify)
    if name == "isolation":
        return comparisons.isolation(image, notify=notify)
    return comparisons.portability(image, docker_context=flags["docker_context"], notify=notify)


def _saved(host: Host, files: list[str]) -> Any:
    """What `--json` wrote: a comparison, or measurements of one machine or of two side by side."""
    if not 1 <= len(files) <= 2:
        raise UsageError("`compare show` takes one file, or two to put side by side")
    texts = []
    for file in files:
        try:
            texts.append((host.working_dir() / file).read_text())
        except (OSError, UnicodeDecodeError) as err:
            raise UsageError(f"cannot read {file}: {err}", exit_code=1) from err
    return host.engine.comparisons.saved(*texts)


def _kept(host: Host, result: Any, flags: dict[str, Any]) -> Any:
    if flags["json_file"] == "-":
        host.line(_json(result))
        return None
    wanted: list[tuple[str | None, Callable[[], bytes]]] = [
        (flags["json_file"], lambda: f"{_json(result)}\n".encode()),
        (flags["png"], result.to_png if flags["png"] else bytes),
    ]
    unsaved = [_unsaved(host.working_dir() / file, content) for file, content in wanted if file]
    if not any(unsaved):
        return result
    # What took a minute to measure is shown all the same.
    words_ = "; ".join(filter(None, unsaved))
    if not host.notebook:
        host.line(result.text())
        raise UsageError(words_, resolution="the figures above were not kept", exit_code=1)
    host.warn(f"{words_}; the result is there and can be saved elsewhere: to_json(), to_png()")
    return result


def _unsaved(file: Path, content: Callable[[], bytes]) -> str:
    """Write a file whole or not at all, so that an older one is not lost; gives why it could not be written."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(content())
        os.replace(partial, file)
    except OSError as err:
        with contextlib.suppress(OSError):
            partial.unlink()
        return f"{file.name} was not written: {err.strerror or err}"
    return ""


def _json(result: Any) -> str:
    text = result.to_json()
    return text if isinstance(text, str) else json.dumps(text, indent=2)


def _split(ctx: click.Context, line: list[str], flags: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """`IMAGE [flags] -- CMD`: flags may stand after the image, but nothing after `--` is ours."""
    image = line.pop(0)
    named = image in EXPERIMENTS and "--" not in line
    if "--" in line:
        place = line.index("--")
        ours, words_ = line[:place], line[place + 1 :]
    elif named:
        place = next((i for i, word in enumerate(line) if word.startswith("-")), len(line))
        ours, words_ = line[place:], line[:place]
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
