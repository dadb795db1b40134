"""Typed instructions and stages: what each node of the parser means.

Checks what can be known without a build: flags, argument counts, names, durations, ONBUILD rules, heredoc places.
Variables stay as written; the builder expands them with the scope of the stage. Follows BuildKit's
`frontend/dockerfile/instructions`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from ..errors import DockerfileError
from .durations import MIN_DURATION_NS, parse_duration_ns
from .flags import Flags, did_you_mean, parse_device, read_flags
from .mounts import Mount, check_mount, parse_mount
from .parser import INSTRUCTIONS, Dockerfile, Heredoc, Node, located, parse, parse_heredoc
from .variables import SPACES

_STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*")
NETWORK_MODES = ("default", "none", "host")
SECURITY_MODES = ("sandbox", "insecure")


class Instruction(Struct, frozen=True, kw_only=True):
    """Where an instruction stands: 1-based lines; its text with continuations joined and heredocs kept.

    `keyword` is the instruction as written (`run`), `name` its upper-case name.
    """

    line: int
    end_line: int
    text: str
    keyword: str = ""

    @property
    def name(self) -> str:
        return type(self).__name__.upper()


class From(Instruction, frozen=True, kw_only=True):
    """`image` may hold variables; `stage` is the lower-cased AS name."""

    image: str
    stage: str | None = None
    stage_as_written: str | None = None
    as_keyword: str | None = None
    platform: str | None = None


class CommandLine(Instruction, frozen=True, kw_only=True):
    """RUN, CMD, ENTRYPOINT. JSON form: `args` is the argv. Shell form: at most one string, for SHELL to run."""

    args: tuple[str, ...]
    json_form: bool
    heredocs: tuple[Heredoc, ...] = ()


class Run(CommandLine, frozen=True, kw_only=True):
    """`mount_flags` as written: `mounts(expand)` gives them typed."""

    mount_flags: tuple[str, ...] = ()
    network: str = "default"
    security: str = "sandbox"
    devices: tuple[str, ...] = ()

    def mounts(self, expand: Callable[[str], str] | None = None) -> tuple[Mount, ...]:
        """The mounts, their values passed through `expand`. Raises DockerfileError with this RUN's lines."""
        try:
            return tuple(parse_mount(flag, expand) for flag in self.mount_flags)
        except DockerfileError as err:
            raise located(err, self.line, self.end_line) from None


class Cmd(CommandLine, frozen=True, kw_only=True):
    """`args` empty with `json_form` set resets the command."""


class Entrypoint(CommandLine, frozen=True, kw_only=True):
    """`args` empty with `json_form` set resets the entry point."""


class Transfer(Instruction, frozen=True, kw_only=True):
    """What COPY and ADD share. `contents` are heredocs used as sources: their name is the file's name.

    `ordered` keeps sources and heredocs as they stood. `link` is None when not said, so a default can apply.
    """

    sources: tuple[str, ...]
    dest: str
    contents: tuple[Heredoc, ...] = ()
    ordered: tuple[str | Heredoc, ...] = ()
    chown: str | None = None
    chmod: str | None = None
    link: bool | None = None
    exclude: tuple[str, ...] = ()
    json_form: bool = False


class Copy(Transfer, frozen=True, kw_only=True):
    from_: str | None = None
    parents: bool = False


class Add(Transfer, frozen=True, kw_only=True):
    """`unpack` None: local archives are unpacked, downloaded ones are not."""

    keep_git_dir: bool | None = None
    checksum: str | None = None
    unpack: bool | None = None


class Env(Instruction, frozen=True, kw_only=True):
    pairs: tuple[tuple[str, str], ...]
    legacy: bool = False


class Label(Instruction, frozen=True, kw_only=True):
    pairs: tuple[tuple[str, str], ...]
    legacy: bool = False


class Arg(Instruction, frozen=True, kw_only=True):
    """(name, default); the default is None where none was given."""

    pairs: tuple[tuple[str, str | None], ...]


class Workdir(Instruction, frozen=True, kw_only=True):
    path: str


class User(Instruction, frozen=True, kw_only=True):
    user: str


class Expose(Instruction, frozen=True, kw_only=True):
    """Words such as `80`, `53/udp`, `8000-8010`, `$PORT`, in the order written; not yet expanded."""

    ports: tuple[str, ...]


class Volume(Instruction, frozen=True, kw_only=True):
    paths: tuple[str, ...]


class Stopsignal(Instruction, frozen=True, kw_only=True):
    signal: str


class Healthcheck(Instruction, frozen=True, kw_only=True):
    """`test` is the image config's Test: ("NONE",), ("CMD", argv…) or ("CMD-SHELL", line). Durations in ns, 0 unset."""

    test: tuple[str, ...]
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


class Shell(Instruction, frozen=True, kw_only=True):
    shell: tuple[str, ...]


class Onbuild(Instruction, frozen=True, kw_only=True):
    """`expression` is stored in the image config; `trigger` is the same, typed."""

    expression: str
    trigger: Instruction


class Maintainer(Instruction, frozen=True, kw_only=True):
    maintainer: str


class Stage(Struct, frozen=True):
    """One FROM and what follows it. `base` may hold variables; `name` is lower case or None."""

    index: int
    from_: From
    commands: tuple[Instruction, ...]

    @property
    def name(self) -> str | None:
        return self.from_.stage

    @property
    def base(self) -> str:
        return self.from_.image

    @property
    def platform(self) -> str | None:
        return self.from_.platform

    @property
    def line(self) -> int:
        return self.from_.line

    @property
    def end_line(self) -> int:
        return self.commands[-1].end_line if self.commands else self.from_.end_line


class Program(Struct, frozen=True):
    """A checked Dockerfile: global ARGs and stages in order."""

    dockerfile: Dockerfile
    global_args: tuple[Arg, ...]
    stages: tuple[Stage, ...]


def program(dockerfile: Dockerfile | str) -> Program:
    """Typed global ARGs and stages. Raises DockerfileError with its lines for what BuildKit refuses before building."""
    parsed = parse(dockerfile) if isinstance(dockerfile, str) else dockerfile
    global_args: list[Arg] = []
    groups: list[tuple[From, list[Instruction]]] = []
    for node in parsed.nodes:
        made = instruction(node)
        if isinstance(made, From):
            groups.append((made, []))
        elif groups:
            groups[-1][1].append(made)
        elif isinstance(made, Arg):
            global_args.append(made)
        else:
            raise DockerfileError(
                f"dockerfile parse error on line {node.line}: no build stage in current context",
                line=node.line,
                end_line=node.end_line,
                resolution="only ARG may stand before the first FROM",
            )
    if not groups:
        last = parsed.nodes[-1]
        raise DockerfileError(
            "dockerfile contains no stages to build",
            line=last.line,
            end_line=last.end_line,
            resolution="add `FROM IMAGE`",
        )
    built = tuple(Stage(index, head, tuple(body)) for index, (head, body) in enumerate(groups))
    return Program(parsed, tuple(global_args), built)


def stages(dockerfile: Dockerfile | str) -> list[Stage]:
    """The stages of a Dockerfile, in order. Raises DockerfileError."""
    return list(program(dockerfile).stages)


def find_stage(known: Sequence[Stage], ref: str) -> Stage | None:
    """The stage that COPY --from or a mount's from= means: a name (any case, the last so named) or a number.

    None: it is an image. Raises DockerfileError for a number without a stage. FROM knows only names of earlier stages:
    `find_named_stage(stages[:index], base)`.
    """
    return find_named_stage(known, ref) or find_numbered_stage(known, ref)


def find_numbered_stage(known: Sequence[Stage], ref: str) -> Stage | None:
    """The stage of that number, None when `ref` is no number. Raises DockerfileError when there is no such stage."""
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", ref):
        return None
    index = int(ref)
    if not 0 <= index < len(known):
        raise DockerfileError(f"invalid stage index {index}", resolution=f"the file has {len(known)} stages, from 0")
    return known[index]


def find_named_stage(known: Sequence[Stage], name: str) -> Stage | None:
    lowered = name.lower()
    return next((stage for stage in reversed(known) if stage.name == lowered), None)


def onbuild_instruction(expression: str) -> Instruction:
    """An ONBUILD trigger out of an image's config, typed. Raises DockerfileError as if it stood on line 1."""
    nodes = parse(expression).nodes
    if len(nodes) != 1 or nodes[0].instruction in ("FROM", "ONBUILD", "MAINTAINER"):
        raise DockerfileError(f"invalid ONBUILD trigger in the base image: {expression.splitlines()[0][:100]}")
    return instruction(nodes[0])


def instruction(node: Node) -> Instruction:
    """One node, typed and checked. Raises DockerfileError."""
    make = _MAKERS.get(node.instruction)
    try:
        if make is None:
            raise DockerfileError(
                f"unknown instruction: {node.keyword[:80]}{did_you_mean(node.keyword, INSTRUCTIONS)}",
                resolution=None if node.keyword else "an instruction is missing before the end of the line",
            )
        return make(node)
    except DockerfileError as err:
        if err.line is None:
            err.brief = f"dockerfile parse error on line {node.line}: {err.brief}"
            err.args = (err.brief,)
        raise located(err, node.line, node.end_line) from None


def _where(node: Node) -> dict[str, Any]:
    return {"line": node.line, "end_line": node.end_line, "text": node.text, "keyword": node.keyword}


def _no_flags(node: Node) -> None:
    read_flags(node.instruction, node.flags)


def _one(node: Node) -> str:
    if len(node.args) != 1:
        raise DockerfileError(f"{node.instruction} requires exactly one argument")
    _no_flags(node)
    return str(node.args[0])


def _some(node: Node) -> tuple[str, ...]:
    if not node.args:
        raise DockerfileError(f"{node.instruction} requires at least one argument")
    _no_flags(node)
    return node.args


def _from(node: Node) -> From:
    args = node.args
    stage = written = keyword = None
    if len(args) == 3 and args[1].lower() == "as":
        keyword, written = args[1], args[2]
        stage = written.lower()
        if not _STAGE_NAME.fullmatch(stage):
            raise DockerfileError(
                f'invalid name for build stage: "{written[:80]}", name can\'t start with a number or contain symbols'
            )
    elif len(args) != 1:
        raise DockerfileError("FROM requires either one or three arguments", resolution="FROM IMAGE [AS NAME]")
    flags = read_flags("FROM", node.flags)
    return From(
        image=args[0],
        stage=stage,
        stage_as_written=written,
        as_keyword=keyword,
        platform=flags.text("platform") or None,
        **_where(node),
    )


def _run(node: Node) -> Run:
    flags = read_flags("RUN", node.flags)
    for mount in flags.all("mount"):
        check_mount(mount)
    network = flags.text("network") or "default"
    _refuse_other(network, NETWORK_MODES, f'unsupported network mode "{network}"')
    security = flags.text("security") or "sandbox"
    _refuse_other(security, SECURITY_MODES, f'security "{security}" is not valid')
    for device in flags.all("device"):
        parse_device(device)
    return Run(
        args=node.args,
        json_form=node.json_form,
        heredocs=node.heredocs,
        mount_flags=flags.all("mount"),
        network=network,
        security=security,
        devices=flags.all("device"),
        **_where(node),
    )


def _refuse_other(value: str, known: Sequence[str], words: str) -> None:
    if value not in known:
        raise DockerfileError(f"{words}{did_you_mean(value, known)}", resolution="one of " + ", ".join(known))


def _cmd(node: Node) -> Cmd:
    _no_flags(node)
    return Cmd(args=node.args, json_form=node.json_form, **_where(node))


def _entrypoint(node: Node) -> Entrypoint:
    _no_flags(node)
    return Entrypoint(args=node.args, json_form=node.json_form, **_where(node))


def _transfer(node: Node) -> tuple[Flags, dict[str, Any]]:
    if len(node.args) < 2:
        raise DockerfileError(
            f"{node.instruction} requires at least two arguments, but only one was provided. "
            "Destination could not be determined"
        )
    flags = read_flags(node.instruction, node.flags)
    *words, dest = node.args
    if _opens(dest):
        raise DockerfileError(
            f"{node.instruction} cannot accept a heredoc as a destination",
            resolution=f"{node.instruction} <<EOF /path/of/the/file",
        )
    bodies = {doc.name: doc for doc in node.heredocs}
    ordered: list[str | Heredoc] = []
    for word in words:
        doc = _opens(word)
        ordered.append(word if doc is None else bodies.get(doc.name, doc))
    return flags, {
        "sources": tuple(item for item in ordered if isinstance(item, str)),
        "contents": tuple(item for item in ordered if isinstance(item, Heredoc)),
        "ordered": tuple(ordered),
        "dest": dest,
        "chown": flags.text("chown") or None,
        "chmod": flags.text("chmod") or None,
        "link": flags.switch("link"),
        "exclude": flags.all("exclude"),
        "json_form": node.json_form,
    }


def _opens(word: str) -> Heredoc | None:
    try:
        return parse_heredoc(word)
    except DockerfileError:
        return None


def _copy(node: Node) -> Copy:
    flags, shared = _transfer(node)
    return Copy(**shared, from_=flags.text("from") or None, parents=bool(flags.switch("parents")), **_where(node))


def _add(node: Node) -> Add:
    flags, shared = _transfer(node)
    return Add(
        **shared,
        keep_git_dir=flags.switch("keep-git-dir"),
        checksum=flags.text("checksum") or None,
        unpack=flags.switch("unpack"),
        **_where(node),
    )


def _env_pairs(node: Node) -> tuple[tuple[str, str], ...]:
    _no_flags(node)
    if not node.args:
        raise DockerfileError(f"{node.instruction} requires at least one argument")
    if any(not key for key, _ in node.args):
        raise DockerfileError(f"{node.instruction} names can not be blank")
    return node.args


def _env(node: Node) -> Env:
    return Env(pairs=_env_pairs(node), legacy=node.legacy_pair, **_where(node))


def _label(node: Node) -> Label:
    return Label(pairs=_env_pairs(node), legacy=node.legacy_pair, **_where(node))


def _arg(node: Node) -> Arg:
    if not node.args:
        raise DockerfileError("ARG requires at least one argument")
    _no_flags(node)
    pairs: list[tuple[str, str | None]] = []
    for word in node.args:
        name, equals, value = word.partition("=")
        if not name:
            raise DockerfileError("ARG names can not be blank")
        pairs.append((name, value if equals else None))
    return Arg(pairs=tuple(pairs), **_where(node))


def _volume(node: Node) -> Volume:
    paths = tuple(path.strip(SPACES) for path in _some(node))
    if not all(paths):
        raise DockerfileError("VOLUME specified can not be an empty string")
    return Volume(paths=paths, **_where(node))


def _healthcheck(node: Node) -> Healthcheck:
    if not node.args:
        raise DockerfileError("HEALTHCHECK requires at least one argument")
    kind, *command = node.args
    kind = kind.upper()
    if kind == "NONE":
        if command:
            raise DockerfileError("HEALTHCHECK NONE takes no arguments")
        return Healthcheck(test=("NONE",), **_where(node))
    flags = read_flags("HEALTHCHECK", node.flags)
    if kind != "CMD":
        raise DockerfileError(f'unknown type "{kind[:80]}" in HEALTHCHECK (try CMD)')
    if not command:
        raise DockerfileError("missing command after HEALTHCHECK CMD")
    test = ("CMD", *command) if node.json_form else ("CMD-SHELL", *command)
    return Healthcheck(
        test=test,
        interval_ns=_interval(flags, "interval"),
        timeout_ns=_interval(flags, "timeout"),
        start_period_ns=_interval(flags, "start-period"),
        start_interval_ns=_interval(flags, "start-interval"),
        retries=_retries(flags.text("retries") or ""),
        **_where(node),
    )


def _interval(flags: Flags, name: str) -> int:
    text = flags.text(name)
    value = parse_duration_ns(text) if text else 0
    if value != 0 and value < MIN_DURATION_NS:
        raise DockerfileError(f'Interval "{name}" cannot be less than 1ms')
    return value


def _retries(text: str) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", text) or not -(2**31) <= int(text) < 2**31:
        raise DockerfileError(f'strconv.ParseInt: parsing "{text[:80]}": invalid syntax', resolution="--retries=3")
    if int(text) < 0:
        raise DockerfileError(f"--retries cannot be negative ({int(text)})")
    return int(text)


def _shell(node: Node) -> Shell:
    _no_flags(node)
    if not node.args:
        raise DockerfileError("SHELL requires at least one argument")
    if not node.json_form:
        raise DockerfileError(
            f"SHELL requires the arguments to be in JSON form, not {node.args[0][:80]}",
            resolution='SHELL ["/bin/bash", "-c"]',
        )
    return Shell(shell=node.args, **_where(node))


def _onbuild(node: Node) -> Onbuild:
    if not node.args:
        raise DockerfileError("ONBUILD requires at least one argument")
    _no_flags(node)
    inner: Node = node.args[0]
    if inner.instruction == "ONBUILD":
        raise DockerfileError("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
    if inner.instruction in ("MAINTAINER", "FROM"):
        raise DockerfileError(f"{inner.instruction} isn't allowed as an ONBUILD trigger")
    expression = re.sub(r"^\s*ONBUILD\s*", "", node.text, count=1, flags=re.IGNORECASE)
    return Onbuild(expression=expression, trigger=instruction(inner), **_where(node))


_MAKERS: dict[str, Callable[[Node], Instruction]] = {
    "ADD": _add,
    "ARG": _arg,
    "CMD": _cmd,
    "COPY": _copy,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": lambda node: Expose(ports=_some(node), **_where(node)),
    "FROM": _from,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "MAINTAINER": lambda node: Maintainer(maintainer=_one(node), **_where(node)),
    "ONBUILD": _onbuild,
    "RUN": _run,
    "SHELL": _shell,
    "STOPSIGNAL": lambda node: Stopsignal(signal=_one(node), **_where(node)),
    "USER": lambda node: User(user=_one(node), **_where(node)),
    "VOLUME": _volume,
    "WORKDIR": lambda node: Workdir(path=_one(node), **_where(node)),
}
