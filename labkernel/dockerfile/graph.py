"""What binds stages together: global ARGs, references between stages, and the checks that need the whole file."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import DockerfileError
from .flags import did_you_mean
from .instructions import (
    Add,
    Arg,
    Copy,
    Env,
    Expose,
    Instruction,
    Label,
    Onbuild,
    Program,
    Run,
    Stage,
    Stopsignal,
    User,
    Volume,
    Workdir,
    find_numbered_stage,
    program,
)
from .parser import Dockerfile, located
from .variables import Lexer, check_word

MOST_CHARACTERS = 16 << 20
"""In the values of all variables of a file: one grows to a limit of its own (variables.py), but there may be many."""

_OCTAL_MODE = re.compile(r"[0-7]{1,4}")
_SYMBOLIC_MODE = re.compile(
    r"[ugoa]*[-+=]([rwxXst]*|[ugo])([-+=]([rwxXst]*|[ugo]))*(,[ugoa]*([-+=]([rwxXst]*|[ugo]))+)*"
)
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_PROTOCOLS = ("tcp", "udp", "sctp")


def verify(dockerfile: Dockerfile | str) -> Program:
    """A Program that BuildKit would begin to build: everything wrong that needs no context, image or build argument.

    Raises DockerfileError with lines.
    """
    checked = program(dockerfile)
    escape = checked.dockerfile.escape
    for arg in checked.global_args:
        _check_words(arg, escape)
    for stage in checked.stages:
        _check_base(checked, stage)
        for command in stage.commands:
            _check_words(command, escape)
            _check_values(command)
    cycle = find_cycle(stage_dependencies(checked))
    if cycle is not None:
        stage = checked.stages[cycle]
        raise DockerfileError(
            f"circular dependency detected on stage: {stage.name or stage.index}",
            line=stage.line,
            end_line=stage.end_line,
            resolution="a stage cannot copy from itself, directly or through others",
        )
    return checked


def global_scope(
    checked: Program, build_args: Mapping[str, str] | None = None, platform: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The values FROM can use: `platform` (TARGETARCH …) and the global ARGs, `build_args` over their defaults."""
    scope = dict(platform or {})
    given = build_args or {}
    lexer = Lexer(checked.dockerfile.escape)
    size = 0
    for arg in checked.global_args:
        for name, default in arg.pairs:
            if name in given:
                scope[name] = given[name]
            elif default is not None:
                try:
                    scope[name] = lexer.process(default, scope).result
                except DockerfileError as err:
                    raise located(err, arg.line, arg.end_line) from None
                size += len(scope[name])
        if size > MOST_CHARACTERS:
            raise DockerfileError(
                f"the values of ARG are longer than {MOST_CHARACTERS} characters together",
                line=arg.line,
                end_line=arg.end_line,
            )
    return scope


def stage_dependencies(checked: Program, scope: Mapping[str, str] | None = None) -> dict[int, set[int]]:
    """For each stage the stages it is built from, copies from or mounts. `scope` as `global_scope` gives it.

    Raises DockerfileError for a stage number that does not exist.
    """
    named = {stage.name: stage for stage in checked.stages if stage.name}
    needs: dict[int, set[int]] = {}
    for stage, base in zip(checked.stages, base_stages(checked, scope), strict=True):
        needs[stage.index] = set() if base is None else {base.index}
        for command in stage.commands:
            for ref in stage_references(command):
                try:
                    found = named.get(ref.lower()) or find_numbered_stage(checked.stages, ref)
                except DockerfileError as err:
                    raise located(err, command.line, command.end_line) from None
                if found is not None:
                    needs[stage.index].add(found.index)
    return needs


def base_stages(checked: Program, scope: Mapping[str, str] | None = None) -> list[Stage | None]:
    """For each stage the earlier stage its FROM names, or None where it names an image."""
    known = global_scope(checked) if scope is None else scope
    lexer = Lexer(checked.dockerfile.escape)
    named: dict[str, Stage] = {}
    bases: list[Stage | None] = []
    for stage in checked.stages:
        try:
            bases.append(named.get(lexer.process(stage.base, known).result.lower()))
        except DockerfileError:
            bases.append(None)  # ${NAME:?…}: needs a build argument
        if stage.name:
            named[stage.name] = stage
    return bases


def stage_references(command: Instruction) -> Iterator[str]:
    """What COPY --from and RUN --mount from= name: a stage, a number or an image. Never holds variables."""
    if isinstance(command, Copy) and command.from_:
        yield command.from_
    elif isinstance(command, Run):
        for flag in command.mount_flags:
            for field in flag.split(","):
                key, _, value = field.strip('"').partition("=")
                if key.lower() == "from" and value:
                    yield value


def refuse_later(checked: Program, order: Iterable[int]) -> None:
    """Refuse that one of the stages `order` copies or mounts from a stage below it. Raises DockerfileError.

    As BuildKit: the last stage of a name is meant, and only stages that are built count."""
    named = {stage.name: stage for stage in checked.stages if stage.name}
    for index in order:
        stage = checked.stages[index]
        for command in stage.commands:
            verb = "copy" if isinstance(command, Copy) else "mount"
            for ref in stage_references(command):
                found = named.get(ref.lower()) or find_numbered_stage(checked.stages, ref)
                if found is not None and found.index > index:
                    raise DockerfileError(
                        f'cannot {verb} from stage "{ref}", it needs to be defined before current stage '
                        f'"{stage.name or f"stage-{index}"}"',
                        line=command.line,
                        end_line=command.end_line,
                        resolution=f"move the stage that begins on line {found.line} up",
                    )


def find_cycle(needs: Mapping[int, set[int]]) -> int | None:
    """A stage that needs itself in the end, or None. Iterative: a file may hold thousands of stages."""
    state: dict[int, int] = {}
    for root in needs:
        if root in state:
            continue
        state[root] = 1
        stack = [(root, iter(sorted(needs[root])))]
        while stack:
            index, following = stack[-1]
            after = next(following, None)
            if after is None:
                state[index] = 2
                stack.pop()
            elif state.get(after) == 1:
                return after
            elif after not in state:
                state[after] = 1
                stack.append((after, iter(sorted(needs.get(after, ())))))
    return None


def expandable_words(command: Instruction) -> Sequence[str]:
    """The words of `command` in which the builder replaces variables. Source: Dockerfile reference, Environment."""
    if isinstance(command, Env | Label):
        return [word for pair in command.pairs for word in pair]
    if isinstance(command, Arg):
        return [word for pair in command.pairs for word in pair if word is not None]
    if isinstance(command, Copy | Add):
        extra = [command.chown, command.chmod, *command.exclude]
        if isinstance(command, Add):
            extra.append(command.checksum)
        return [word for word in (*command.sources, command.dest, *extra) if word]
    if isinstance(command, Expose):
        return command.ports
    if isinstance(command, Volume):
        return command.paths
    if isinstance(command, Workdir):
        return [command.path]
    if isinstance(command, User):
        return [command.user]
    if isinstance(command, Stopsignal):
        return [command.signal]
    return ()


def _check_words(command: Instruction, escape: str) -> None:
    if isinstance(command, Onbuild):
        return  # expanded in the image built from this one
    for word in expandable_words(command):
        try:
            check_word(word, escape=escape)
        except DockerfileError as err:
            raise located(err, command.line, command.end_line) from None


def _check_base(checked: Program, stage: Stage) -> None:
    escape = checked.dockerfile.escape
    try:
        check_word(stage.base, escape=escape)
        check_word(stage.platform or "", escape=escape)
    except DockerfileError as err:
        raise located(err, stage.from_.line, stage.from_.end_line) from None
    try:
        met = Lexer(escape).process(stage.base, {})
    except DockerfileError:
        return  # ${NAME:?…}: needs a build argument
    if not met.result and not met.unmatched:
        raise DockerfileError(
            f"base name ({stage.base}) should not be blank", line=stage.from_.line, end_line=stage.from_.end_line
        )


def _check_values(command: Instruction) -> None:
    try:
        if isinstance(command, Copy):
            _check_copy(command)
        if isinstance(command, Copy | Add) and command.chmod and "$" not in command.chmod:
            _check_mode(command.chmod)
        if isinstance(command, Stopsignal):
            _check_signal(command.signal)
        if isinstance(command, Expose):
            for port in command.ports:
                if "$" not in port and not set("'\"\\`") & set(port):
                    parse_port(port)
    except DockerfileError as err:
        raise located(err, command.line, command.end_line) from None


def _check_copy(command: Copy) -> None:
    if command.from_ and re.search(r"\$.", command.from_):
        raise DockerfileError(
            "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope "
            "as a workaround",
            resolution="ARG NAME before the first FROM, then FROM $NAME AS source and COPY --from=source",
        )
    for source in command.sources if not command.from_ else ():
        if source.startswith(("http://", "https://", "git://", "ssh://", "git@")):
            what = "a URL" if source.startswith("http") and ".git" not in source else "a git ref"
            raise DockerfileError(f"source can't be {what} for COPY", resolution="ADD takes it")


# man 7 signal, as Docker names them; the real-time ones are counted from both ends.
_SIGNALS = (
    *(name.removeprefix("SIG") for name in signal.Signals.__members__ if name.startswith("SIG")),
    *(f"RTMIN+{number}" for number in range(1, 16)),
    *(f"RTMAX-{number}" for number in range(1, 15)),
)


def _check_signal(word: str) -> None:
    name = word.upper().removeprefix("SIG")
    if set("$'\"\\`") & set(word) or name in _SIGNALS or re.fullmatch(r"[1-9][0-9]{0,2}", word):
        return
    raise DockerfileError(
        f"invalid signal: {word[:80]}{did_you_mean(name, _SIGNALS, 'SIG')}",
        resolution="a name or number of man 7 signal, such as SIGTERM or 15",
    )


def _check_mode(mode: str) -> None:
    if not (_OCTAL_MODE.fullmatch(mode) or _SYMBOLIC_MODE.fullmatch(mode)):
        raise DockerfileError(
            f"invalid chmod parameter: '{mode[:80]}'. it should be octal string and between 0 and 07777",
            resolution="for example --chmod=755 or --chmod=u=rwX,go=rX",
        )


def parse_port(word: str) -> list[str]:
    """An expanded word of EXPOSE as the config's `port/protocol` keys; a range gives several.

    Raises DockerfileError without a line.
    """
    *_host, container = word.split(":")
    ports, slash, protocol = container.partition("/")
    protocol = protocol.lower() or "tcp"
    if protocol not in _PROTOCOLS or (slash and not ports):
        raise DockerfileError(f'invalid port: "{word[:80]}": invalid proto: {protocol}', resolution="tcp, udp or sctp")
    found = _PORTS.fullmatch(ports)
    first = int(found.group(1)) if found else -1
    last = int(found.group(2) or first) if found else -1
    if not 0 <= first <= last <= 65_535:
        raise DockerfileError(f"invalid containerPort: {ports[:80]}", resolution="EXPOSE 80, 53/udp or 8000-8010")
    return [f"{port}/{protocol}" for port in range(first, last + 1)]
