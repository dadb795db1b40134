"""`build`, and the same build from the text of a notebook cell."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import DockerfileError, UsageError
from .buildflags import JsonProgress, build_flags, check_outputs, named_places, options_of, outputs_of, write_output
from .grammar import Entry, LabGroup, command, flag, host_of, many, option
from .host import Host


@command("build", "[OPTIONS] PATH | URL | -")
@build_flags
@option("-f", "--file", metavar="string", help='Name of the Dockerfile (default: "PATH/Dockerfile")')
@click.argument("path")
@click.pass_context
def build(ctx: click.Context, /, path: str, file: str | None, **flags: Any) -> Any:
    """Build an image from a Dockerfile."""
    host = host_of(ctx)
    if path == "-" and file == "-":
        raise UsageError(
            "invalid argument: can't use stdin for both build context and dockerfile",
            resolution="give the context as a directory, or the Dockerfile as a file in it",
            exit_code=1,
        )
    keep_git = build_args(flags["build_arg"]).get("BUILDKIT_CONTEXT_KEEP_GIT_DIR", "").lower() in ("1", "t", "true")
    moments: list[int] = []
    with _context(host, path, moments.append, keep_git=keep_git) as found:
        flags["context_epoch_s"] = moments[-1] if moments else None
        if isinstance(found, bytes):
            text = found.decode("utf-8-sig", "replace")
            if file is not None:
                text, dockerfile = _read(host, None, file)
                return build_text(host, text, None, flags, dockerfile=dockerfile)
            return build_text(host, text, None, flags)
        local = found == host.working_dir() / path
        text, dockerfile = _read(host, found, file if local or file in (None, "-") else str(_inside(found, str(file))))
        return build_text(host, text, found, flags, dockerfile=dockerfile)


@contextmanager
def _context(host: Host, path: str, told: Callable[[int], None], *, keep_git: bool) -> Iterator[Path | bytes]:
    """The directory that PATH, URL or `-` means, or the Dockerfile that came instead; `told` is given its moment."""
    from ..building.sources import git_context, is_git, is_url, stream_context, url_context

    layout = host.engine.layout if path == "-" or is_git(path) or is_url(path) else None
    if layout is None:
        yield _directory(host, path)
    elif path == "-":
        if host.stdin_fd() is None:
            raise UsageError("there is no stdin in a cell", resolution="write the Dockerfile in a %%dockerfile cell")
        with stream_context(layout, sys.stdin.buffer) as found:
            yield found
    elif is_git(path):
        with git_context(layout, path, keep_git=keep_git or None, told=told) as directory:
            yield directory
    else:
        with url_context(layout, path, told) as found:
            yield found


def _directory(host: Host, path: str) -> Path:
    context = host.working_dir() / path
    if not context.is_dir():
        raise UsageError(
            f"unable to prepare context: path {path!r} not found"
            if not context.exists()
            else f"unable to prepare context: {path!r} is not a directory",
            resolution="the context is the folder that COPY and ADD take files from",
            exit_code=1,
        )
    return context


def _inside(context: Path, file: str) -> Path:
    """A Dockerfile of a context that came from elsewhere: a link must not lead out of it."""
    path = Path(os.path.realpath(context / file.lstrip("/")))
    if not path.is_relative_to(context.resolve()):
        raise UsageError(f"forbidden path outside the build context: {file}", exit_code=1)
    return path


def _read(host: Host, context: Path | None, file: str | None) -> tuple[str, Path | None]:
    """The Dockerfile's text, and where it lies (for NAME.dockerignore)."""
    if file == "-":
        if host.stdin_fd() is None:
            raise UsageError("there is no stdin in a cell", resolution="write the Dockerfile in a %%dockerfile cell")
        return sys.stdin.buffer.read().decode("utf-8-sig", "replace"), None
    path = host.working_dir() / file if file else (context or host.working_dir()) / "Dockerfile"
    try:
        return path.read_bytes().decode("utf-8-sig"), path
    except UnicodeDecodeError:
        raise DockerfileError(f"{path}: not UTF-8 text") from None
    except OSError as err:
        reason = (err.strerror or "unreadable").lower()
        raise UsageError(
            f"unable to prepare context: unable to evaluate symlinks in Dockerfile path: lstat {path}: {reason}",
            resolution="name another one with -f FILE",
            exit_code=1,
        ) from None


@command("dockerfile", "[OPTIONS]  (the cell's text is the Dockerfile)")
@build_flags
@option("--context", metavar="dir", help="Folder that COPY and ADD take files from (default: the notebook's)")
@many("--file", metavar="NAME=VALUE", help="A value of Python (--file NAME={variable}) as build argument and as file")
@click.pass_context
def cell(ctx: click.Context, /, context: str | None, file: tuple[str, ...], **flags: Any) -> Any:
    """Build an image; the Dockerfile is the text of the cell."""
    from ..building.debug import show_in_cell
    from .foreground import Interrupted

    host = host_of(ctx)
    text = ctx.find_root().meta["labkernel.cell"]
    folder = host.working_dir() / Path(context).expanduser() if context else host.working_dir()
    if not folder.is_dir():
        raise UsageError(f"--context {context}: no such directory", resolution="the default is the notebook's folder")
    try:
        files = given_files(file)
        declared = set(_DECLARED.findall(text))
        flags["build_arg"] = (*(word for word in file if word.partition("=")[0] in declared), *flags["build_arg"])
        result = build_text(host, text, folder, flags, files=files, above=1)
    except DockerfileError as err:
        database = getattr(host.engine, "db", None)  # the engine of a context elsewhere has none here
        if database is not None and err.line:
            show_in_cell(database, err.line)
        raise in_cell(err, text) from None
    except KeyboardInterrupt:
        # One line instead of the path the interrupt took through this program.
        brief = "the build was stopped; the next one goes on after the last finished step"
        raise Interrupted(brief, 130) from None
    if result is None:  # --check
        return None
    result.warnings[:] = [_LINE.sub(_next_line, str(warning)) for warning in result.warnings]
    return result


def given_files(words: Sequence[str]) -> dict[str, bytes]:
    """`--file NAME=VALUE` as files of the context. Raises UsageError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UsageError(f"--file {word}: NAME=VALUE is wanted", resolution="--file settings.json={text}")
        found[name] = value.encode("utf-8", "surrogateescape")
    return found


_DECLARED = re.compile(r"(?mi)^[ \t]*ARG[ \t]+([A-Za-z_]\w*)")
_LINE = re.compile(r"\b(?<=line )(\d+)\b")


def _next_line(match: re.Match[str]) -> str:
    return str(int(match[1]) + 1)


def in_cell(err: DockerfileError, text: str) -> DockerfileError:
    """The same error with the cell's line numbers, as the editor shows them: the magic is its line 1."""
    lines = text.split("\n")

    def moved(match: re.Match[str]) -> str:
        number = int(match[2])
        ours = number <= len(lines) and lines[number - 1].strip() == match[4].strip()
        return f"{match[1]}{number + 1}{match[3]}{match[4]}" if ours else match[0]

    brief = _LINE.sub(_next_line, err.brief) if err.line else err.brief
    err.brief = brief
    err.args = (brief,)
    if err.details:
        details = re.sub(r"(?m)^( *)(\d+)( \|(?: >>>| {0,4})? ?)(.*)$", moved, err.details)
        # IPython ends a cell with a newline, and the empty line after it is none of the editor's.
        err.details = re.sub(rf"\n *{len(lines) + 1} \|$", "", details)
    if err.line:
        err.line += 1
        err.end_line = (err.end_line or err.line - 1) + 1
    return err


def build_text(
    host: Host,
    text: str,
    context: Path | None,
    flags: dict[str, Any],
    *,
    dockerfile: Path | None = None,
    files: dict[str, bytes] | None = None,
    above: int = 0,
) -> Any:
    """Build, with the host's progress; returns the BuildResult, and None for a check. `above`: how many lines the
    author sees above the text."""
    quiet = flags["quiet"] or flags["progress"] == "quiet"
    settings = _settings(host, context, flags, files)
    outputs = outputs_of(flags["output"])
    check_outputs(outputs, settings["options"].platform)
    for output in outputs:
        for name in output.ignored:
            host.warn(f"--output type={output.kind}: {name} is not supported and changes nothing")
    if flags["check"]:
        platform = settings["options"].platform
        ignore = _ignore_text(context, dockerfile)
        return check_text(host, text, settings["build_args"], ignore, platform, above=above)
    settings["tags"] += [name for output in outputs for name in output.name.split(",") if name]
    own = _ignore_text(None, dockerfile)
    if own is not None:
        settings["ignore"] = own
    try:
        with ExitStack() as stack:
            if quiet or flags["progress"] in ("json", "rawjson"):
                on_step: Any = (lambda step: None) if quiet else JsonProgress()
            else:
                on_step = stack.enter_context(host.build_progress(text, mode=flags["progress"]))
            _add_contexts(host, text, flags, settings, stack)
            result = host.engine.builds.build(text, on_step=on_step, **settings)
    except DockerfileError as err:
        raise pointing(err, text) from None
    # A notebook shows them with the result.
    for warning in result.warnings if not host.notebook else ():
        host.warn(str(warning))
    for output in outputs:
        write_output(host, result, output, settings["tags"])
    if flags["iidfile"]:
        (host.working_dir() / flags["iidfile"]).write_text(result.image.id)
    lines = _closing_lines(result, settings["tags"], quiet=quiet) if not host.notebook else []
    for line in lines if all(output.dest != "-" for output in outputs) or quiet else ():
        host.line(line)
    if host.words is not None and dockerfile is not None:
        _leave_record(host, text, dockerfile, flags, result, lines)
    return result


def _settings(
    host: Host, context: Path | None, flags: dict[str, Any], files: dict[str, bytes] | None
) -> dict[str, Any]:
    """The flags as arguments of `Builds.build`."""
    from ..building.epoch import from_environment

    given = build_args(flags["build_arg"])
    from_environment(given)
    return {
        "context": context,
        "tags": list(flags["tag"]),
        "build_args": given,
        "target": flags["target"],
        "no_cache": flags["no_cache"],
        "labels": dict(word.partition("=")[::2] for word in flags["label"]),
        "network": flags["network"],
        "files": files,
        "options": options_of(host, flags),
    }


def _add_contexts(host: Host, text: str, flags: dict[str, Any], settings: dict[str, Any], stack: ExitStack) -> None:
    """The named contexts into the settings, for as long as `stack` is open."""
    places = named_places(flags["build_context"])
    if not places:
        return
    if getattr(host.engine, "layout", None) is None:  # the engine of a context elsewhere has none here
        raise UsageError("--build-context: not available for builds on another engine")
    from ..building.namedcontexts import named_contexts

    builds, layout = host.engine.builds, host.engine.layout
    contexts = stack.enter_context(named_contexts(builds, layout, places, text, host.working_dir()))
    settings["options"] = replace(settings["options"], contexts=contexts)


def _closing_lines(result: Any, tags: Sequence[str], *, quiet: bool) -> list[str]:
    """What a finished build says on stdout."""
    if quiet:
        return [result.image.id]
    names = [name if ":" in name.rpartition("/")[2] else f"{name}:latest" for name in tags]
    built = f"Successfully built {result.image.id.removeprefix('sha256:')[:12]}"
    return [built, *(f"Successfully tagged {name}" for name in names)]


def _leave_record(
    host: Host, text: str, dockerfile: Path, flags: dict[str, Any], result: Any, lines: Sequence[str]
) -> None:
    """So that the same command line is answered at once while nothing has changed (`building.unchanged`)."""
    import io

    from .. import __version__
    from ..building.result import BuildStep
    from ..building.unchanged import remember
    from ..widgets.progress import terminal_progress

    trace = getattr(result, "trace", None)  # a build of another engine has none
    if trace is None:
        return
    ignores = [dockerfile.with_name(f"{dockerfile.name}.dockerignore")]
    if trace.directory is not None:
        ignores.append(trace.directory / ".dockerignore")
    texts: dict[Path, bytes | None] = {}
    try:
        for path in (dockerfile, *ignores):
            texts[path.absolute()] = path.read_bytes() if path.exists() else None
    except OSError:
        return
    if texts[dockerfile.absolute()] != text.encode():
        return  # changed meanwhile
    plain = io.StringIO()
    with terminal_progress(plain, "plain") as progress:
        for step in result.steps:
            places = (step.number, step.total, step.stage, step.text, step.line, step.end_line)
            progress(BuildStep(*places, status="cached", size_bytes=step.size_bytes))
    engine = host.engine
    words = list(host.words or ())[1:]
    remember(words, __version__, flags, result, engine.images, texts=texts, plain=plain.getvalue(), lines=lines)


def _ignore_text(context: Path | None, dockerfile: Path | None) -> str | None:
    """The text of NAME.dockerignore beside the Dockerfile, else that of the context's .dockerignore."""
    places = [dockerfile.with_name(f"{dockerfile.name}.dockerignore")] if dockerfile else []
    places += [context / ".dockerignore"] if context is not None else []
    for place in places:
        if place.is_file():
            return place.read_text(errors="replace")
    return None


def check_text(
    host: Host,
    text: str,
    build_args: dict[str, str],
    ignore: str | None = None,
    platform: str | None = None,
    *,
    above: int = 0,
) -> Any:
    """`--check`: the warnings of the build checks; as with docker's command exit code 1 when there are any."""
    from ..dockerfile.lint import lint_error, options
    from ..dockerfile.parser import parse

    try:
        findings = host.engine.builds.check(text, build_args=build_args, ignore=ignore, platform=platform)
    except DockerfileError as err:
        raise pointing(err, text) from None
    for finding in findings:
        host.line(f"WARNING: {finding.rule}: {finding.message} (line {finding.line + above})")
        for line in excerpt(text, finding.line, finding.end_line, above=above):
            host.line(line)
    count = len(findings)
    host.line(f"Check complete, {f'{count} warning' + 's' * (count > 1) if count else 'no warnings'} found.")
    failed = lint_error(findings, options(parse(text), build_args.get("BUILDKIT_DOCKERFILE_CHECK")))
    if failed is not None:
        raise failed
    if findings:
        raise click.exceptions.Exit(1)
    return None


def pointing(err: DockerfileError, text: str) -> DockerfileError:
    """The error with the Dockerfile's own lines in its details, the wrong ones marked, unless they are there."""
    lines = text.splitlines()
    if not err.line or err.line > len(lines) or lines[err.line - 1].strip() in (err.details or ""):
        return err
    shown = excerpt(text, err.line, err.end_line or err.line)
    err.details = "\n".join([*shown, *([err.details] if err.details else [])])
    return err


def excerpt(text: str, first: int, last: int, *, above: int = 0) -> list[str]:
    """The lines of a Dockerfile from `first` to `last` (twelve at most) marked, and the one before; numbered as their
    author sees them, with `above` lines above the text."""
    lines = text.splitlines()
    end = min(last, len(lines), first + 11)
    width = len(str(end + above))
    return [
        f"{n + above:>{width}} | {'>>>' if n >= first else '   '} {lines[n - 1]}"
        for n in range(max(1, first - 1), end + 1)
    ]


BUILDER = {
    "build": Entry("build:build", "Build an image"),
    "du": Entry("build:du", "Show what the build cache holds"),
    "prune": Entry("build:prune", "Remove build cache"),
}
builder = LabGroup("builder", help="Manage builds.", entries=BUILDER)


@command("prune", "[OPTIONS]")
@flag("-a", "--all", help="Remove all unused build cache, not just dangling ones")
@many("--filter", metavar="filter", help='Provide filter values (e.g. "until=24h", "type=exec.cachemount")')
@flag("-f", "--force", help="Do not prompt for confirmation")
@option("--keep-storage", "--reserved-space", metavar="bytes", help="Amount of disk space to keep for cache")
@click.pass_context
def prune(ctx: click.Context, *, all: bool, filter: tuple[str, ...], force: bool, keep_storage: str | None) -> Any:
    """Remove build cache."""
    from ..runtime.settings import parse_size
    from .container import confirm, filters_of, pruned

    host = host_of(ctx)
    keep_bytes = parse_size(keep_storage, "storage to keep") if keep_storage else 0
    confirm(host, "This will remove the build cache.", force=force)
    answer = host.engine.builds.prune(filters_of(filter) or None, keep_bytes=keep_bytes)
    return pruned("Deleted build cache:", answer["CachesDeleted"], answer["SpaceReclaimed"])


_DU_TITLES = {
    "ID": "ID",
    "Type": "TYPE",
    "Reclaimable": "RECLAIMABLE",
    "Size": "SIZE",
    "LastUsed": "LAST USED",
    "Description": "DESCRIPTION",
    "Shared": "SHARED",
}


@command("du", "[OPTIONS]")
@many("--filter", metavar="filter", help='Provide filter values (e.g. "until=24h", "type=exec.cachemount")')
@option("--format", metavar="string", help="Format output using a custom template")
@click.pass_context
def du(ctx: click.Context, *, filter: tuple[str, ...], format: str | None) -> Any:
    """Show what the build cache holds."""
    from ..display import human_age, human_size
    from .container import filters_of
    from .values import tabulate

    found = host_of(ctx).engine.builds.usage(filters_of(filter) or None)

    def view(record: Any) -> dict[str, Any]:
        return {
            "ID": record.id[:12] if record.path is None else record.id,
            "Type": record.kind,
            "Reclaimable": str(not record.shared and not record.in_use).lower(),
            "Size": human_size(record.size_bytes),
            "LastUsed": human_age(record.used_at),
            "Description": record.description,
            "Shared": str(record.shared).lower(),
        }

    columns = ("ID", "Type", "Reclaimable", "Size", "LastUsed", "Description")
    return tabulate(found, view, _DU_TITLES, columns=columns, form=format)


def build_args(given: tuple[str, ...]) -> dict[str, str]:
    """`K=V`, or `K` for our own variable if there is one."""
    result: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if equals:
            result[name] = value
        elif name in os.environ:
            result[name] = os.environ[name]
    return result
