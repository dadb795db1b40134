"""The grammar of our command lines: click made to speak docker's dialect.

One tree of commands serves the terminal and the magics. What click words differently from docker (unknown flags,
missing arguments, `--flag=false`) is translated here, once. Commands are imported when they are first named, so that
`labkernel ps` pays for one module only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..errors import ConflictError, LabkernelError, NoSuchImage, NotFoundError, UsageError

if TYPE_CHECKING:
    from .host import Host

_TRUE = {"true", "1", "t", "yes"}
_FALSE = {"false", "0", "f", "no"}


class Entry(NamedTuple):
    """Where a command lives (`module:attribute` below this package), its one line, and the help section it is in."""

    where: str
    summary: str
    section: str = "Commands"


def host_of(ctx: click.Context) -> Host:
    """The host (terminal or notebook) that this command line came from."""
    found: Host = ctx.find_root().obj
    return found


class LabCommand(click.Command):
    """A command with docker's usage line and docker's wording of wrong command lines.

    `usage` is what follows the command's name, e.g. `[OPTIONS] IMAGE [COMMAND] [ARG...]`.
    """

    def __init__(self, *args: Any, usage: str = "[OPTIONS]", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.usage = usage

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.usage]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, _without_flag_values(self, ctx, args))
        except click.UsageError as err:
            raise translate(err, ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """A line docker's client refuses ends with 125; what its daemon refuses with 1, and only for `run` with 125."""
        try:
            return super().invoke(ctx)
        except (ConflictError, NotFoundError, UsageError) as err:
            if err.exit_code in (1, 125) and not err.brief.startswith(_OF_CLIENT):
                if self.name == "run":
                    err.exit_code = 125
                elif not isinstance(err, NoSuchImage):
                    err.exit_code = 1
            raise


_OF_CLIENT = ("invalid argument ", "invalid value for ", "the input device is not a TTY")


class LabGroup(click.Group):
    """A group whose commands are imported when named. `absent` names what a later release brings."""

    command_class = LabCommand

    def __init__(
        self, *args: Any, entries: Mapping[str, Entry] | None = None, absent: Mapping[str, str] | None = None, **kw: Any
    ) -> None:
        kw.setdefault("no_args_is_help", True)
        super().__init__(*args, **kw)
        self.entries = dict(entries or {})
        self.absent = dict(absent or {})

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["COMMAND"] if ctx.parent else ["[OPTIONS] COMMAND"]

    def list_commands(self, ctx: click.Context) -> list[str]:
        shown = [name for name, entry in self.entries.items() if entry.section]
        return [*shown, *(name for name in super().list_commands(ctx) if name not in self.entries)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = entry.where.partition(":")
        command: click.Command = getattr(import_module(f".{module}", __package__), attribute)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.exceptions.NoArgsIsHelpError:
            host_of(ctx).line(ctx.get_help())
            raise click.exceptions.Exit(0) from None
        except click.UsageError as err:
            raise translate(err, ctx) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is not None:
            return name, command, args[1:]
        if name in self.absent:
            raise UsageError(f"{name}: not in this release of labkernel", resolution=self.absent[name])
        near = _near(name, self.list_commands(ctx))
        hint = f"did you mean `{near[0]}`? " if near else ""
        # As docker: 1, and not the 125 of a flag that `run` does not know.
        raise UsageError(
            f"unknown command: {ctx.command_path} {name}",
            resolution=f"{hint}See '{ctx.command_path} --help'.",
            exit_code=1,
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            if name in self.entries:
                section, summary = self.entries[name].section, self.entries[name].summary
            else:
                section, summary = "Commands", self.commands[name].get_short_help_str(70)
            sections.setdefault(section, []).append((name, summary))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)


def command(
    name: str, usage: str, *, interspersed: bool = True, **attrs: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a command; `interspersed=False` leaves what follows the first argument alone (`run IMG cmd --x`)."""
    settings = {"allow_interspersed_args": interspersed}
    return click.command(name, cls=LabCommand, usage=usage, context_settings=settings, **attrs)


def option(*names: str, **attrs: Any) -> Callable[[Any], Any]:
    """click.option with a default metavar of docker's style."""
    return click.option(*names, **attrs)


def flag(*names: str, help: str | None = None, **attrs: Any) -> Callable[[Any], Any]:
    """A boolean flag (also `--flag=false`)."""
    return click.option(*names, is_flag=True, help=help, **attrs)


def many(*names: str, metavar: str = "list", help: str | None = None, **attrs: Any) -> Callable[[Any], Any]:
    """An option that may be given several times."""
    return click.option(*names, multiple=True, metavar=metavar, help=help, **attrs)


def words(name: str, *, least: int = 0, kind: click.ParamType[Any] | None = None) -> Callable[[Any], Any]:
    """All remaining arguments; fewer than `least` is docker's "requires at least" error."""
    return click.argument(name, nargs=-1, required=least > 0, type=kind or click.UNPROCESSED)


def invoke(
    root: click.Command, argv: Sequence[str], host: Host, prog: str, *, meta: Mapping[str, Any] | None = None
) -> Any:
    """Parse and run one command line; returns what the command returns (None after --help).

    `meta` is what a host knows beside the line (the text of a cell), found again in the root context's `meta`.

    Raises UsageError for a line that cannot be meant, and whatever the command raises.
    """
    try:
        with root.make_context(prog, list(argv), obj=host) as ctx:
            ctx.meta.update(meta or {})
            return root.invoke(ctx)
    except click.exceptions.Exit as err:
        return Status(err.exit_code) if err.exit_code else None
    except click.UsageError as err:
        raise (translate(err, err.ctx) if err.ctx else UsageError(err.format_message())) from None
    except click.ClickException as err:
        raise UsageError(err.format_message()) from None


class Status:
    """How a command ended that has said all: the terminal's exit code, and nothing to see in a notebook."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code

    def __str__(self) -> str:
        return ""

    def _ipython_display_(self) -> None:
        pass


def translate(err: click.UsageError, ctx: click.Context) -> LabkernelError:
    """docker's words for what click found wrong; exit code 125, or 1 for a wrong number of arguments, as docker."""
    see = f"See '{ctx.command_path} --help'."
    if isinstance(err, click.NoSuchOption):
        name = err.option_name
        known = sorted({opt for param in ctx.command.params for opt in param.opts if opt.startswith("--")})
        near = _near(name, known) if name.startswith("--") else []
        hint = f"did you mean `{near[0]}`? {see}" if near else see
        word = f"unknown flag: {name}" if name.startswith("--") else f"unknown shorthand flag: '{name[1:]}' in {name}"
        return UsageError(word, resolution=hint)
    if isinstance(err, click.MissingParameter) and isinstance(err.param, click.Argument):
        return _argument_count(ctx, see)
    if isinstance(err, click.BadOptionUsage):
        if "requires an argument" in err.message or "requires" in err.message:
            return UsageError(f"flag needs an argument: {err.option_name}", resolution=see)
        return UsageError(f"invalid argument for {err.option_name}: {err.message}", resolution=see)
    if isinstance(err, click.BadParameter) and err.param is not None:
        names = ", ".join(err.param.opts) if isinstance(err.param, click.Option) else err.param.human_readable_name
        what = "flag" if isinstance(err.param, click.Option) else "argument"
        return UsageError(f'invalid value for "{names}" {what}: {err.message.rstrip(".")}', resolution=see)
    if "unexpected extra argument" in err.message:
        return _argument_count(ctx, see)
    return UsageError(err.message, resolution=see)


def _near(word: str, known: Sequence[str]) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(word, known, n=1)


def _argument_count(ctx: click.Context, see: str) -> UsageError:
    arguments = [param for param in ctx.command.params if isinstance(param, click.Argument)]
    least = sum(param.required if param.nargs < 0 else param.nargs * param.required for param in arguments)
    plural = "argument" if least == 1 else "arguments"
    open_ended = any(param.nargs < 0 for param in arguments)
    if not arguments:
        brief = f"'{ctx.command_path}' accepts no arguments"
    elif open_ended or any(not param.required for param in arguments):
        brief = f"'{ctx.command_path}' requires at least {least} {plural}"
    else:
        brief = f"'{ctx.command_path}' requires {least} {plural}"
    usage = ctx.command.collect_usage_pieces(ctx)
    resolution = f"usage: {ctx.command_path} {' '.join(usage)}. {see}"
    return UsageError(brief, resolution=resolution, exit_code=1)


def _without_flag_values(command: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
    """Turn `--rm=true` into `--rm` and drop `--rm=false`, as far as flags go (not inside a container's command)."""
    options = {name: p for p in command.params if isinstance(p, click.Option) for name in p.opts}
    result: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        known = options.get(name)
        if word == "--" or (not word.startswith("-") and not ctx.allow_interspersed_args):
            return [*result, word, *rest]
        if known is not None and known.is_flag and equals and value.lower() in _TRUE | _FALSE:
            if value.lower() in _TRUE:
                result.append(name)
            elif known.default and known.name:  # not to be named is not enough
                ctx.default_map = {**(ctx.default_map or {}), known.name: False}
            continue
        result.append(word)
        takes_next = known is not None and not known.is_flag and not equals
        if not word.startswith("--") and len(word) > 1 and word.startswith("-") and known is None:
            last = options.get(f"-{word[-1]}")
            middle = [options.get(f"-{letter}") for letter in word[1:-1]]
            takes_next = last is not None and not last.is_flag and all(p is not None and p.is_flag for p in middle)
        if takes_next and rest:
            result.append(rest.pop(0))
    return result


class ContainerName(click.ParamType[str]):
    """A container's name, id or unique prefix; completes to the names there are."""

    name = "container"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return _complete(incomplete, lambda: [c.name for c in host_of(ctx).engine.containers.list(all=True)])


class ImageName(click.ParamType[str]):
    """An image reference or id; completes to the tags there are."""

    name = "image"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return _complete(incomplete, lambda: image_tags(host_of(ctx)))


class VolumeName(click.ParamType[str]):
    """A volume's name."""

    name = "volume"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return _complete(incomplete, lambda: [v.name for v in host_of(ctx).engine.volumes.list()])


class NetworkName(click.ParamType[str]):
    """A network's name."""

    name = "network"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return _complete(incomplete, lambda: [n.name for n in host_of(ctx).engine.networks.list()])


def image_tags(host: Host) -> list[str]:
    """The names of the images there are, `:latest` left out."""
    found = [tag for image in host.engine.images.list() for tag in image.tags]
    return [tag.removesuffix(":latest") for tag in found]


CONTAINER = ContainerName()
IMAGE = ImageName()
VOLUME = VolumeName()
NETWORK = NetworkName()


def _complete(incomplete: str, names: Callable[[], list[str]]) -> list[Any]:
    from click.shell_completion import CompletionItem

    # Completion must never be the place where an error shows, nor wait for one.
    try:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]
    except Exception:
        return []
