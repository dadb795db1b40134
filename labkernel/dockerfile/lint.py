"""BuildKit's build checks: rules as data, and one function that finds what breaks them.

A warning never stops a build unless the file says `# check=error=true`. Source: Docker documentation, *Build checks*.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ..errors import DockerfileError
from .flags import nearest
from .graph import MOST_CHARACTERS, base_stages, expandable_words, global_scope
from .ignorefile import IgnoreMatcher
from .instructions import (
    Add,
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    Program,
    Run,
    Shell,
    Stage,
    Workdir,
)
from .parser import Dockerfile, Node
from .variables import PLATFORM_ARGS, PROXY_ARGS, Expansion, Lexer

_DOCS = "https://docs.docker.com/go/dockerfile/rule/"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Rule(Struct, frozen=True):
    """One build check. `level` is `warning`, or `experimental` for rules that are off until asked for."""

    name: str
    description: str
    level: str = "warning"

    @property
    def url(self) -> str:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", self.name.replace("JSON", "Json"))
        return f"{_DOCS}{words.lower()}/"


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("StageNameCasing", "Stage names should be lowercase"),
        Rule("FromAsCasing", "The 'as' keyword should match the case of the 'from' keyword"),
        Rule("NoEmptyContinuation", "Empty continuation lines will become errors in a future release"),
        Rule(
            "ConsistentInstructionCasing",
            "All commands within the Dockerfile should use the same casing (either upper or lower)",
        ),
        Rule("DuplicateStageName", "Stage names should be unique"),
        Rule("ReservedStageName", "Reserved words should not be used as stage names"),
        Rule(
            "JSONArgsRecommended",
            "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals",
        ),
        Rule(
            "MaintainerDeprecated",
            "The MAINTAINER instruction is deprecated, use a label instead to define an image author",
        ),
        Rule("UndefinedArgInFrom", "FROM command must use declared ARGs"),
        Rule(
            "WorkdirRelativePath",
            "Relative workdir without an absolute workdir declared within the build can have unexpected results if "
            "the base image changes",
        ),
        Rule("UndefinedVar", "Variables should be defined before their use"),
        Rule(
            "MultipleInstructionsDisallowed",
            "Multiple instructions of the same type should not be used in the same stage",
        ),
        Rule("LegacyKeyValueFormat", "Legacy key/value format with whitespace separator should not be used"),
        Rule(
            "RedundantTargetPlatform",
            "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior",
        ),
        Rule("SecretsUsedInArgOrEnv", "Sensitive data should not be used in the ARG or ENV commands"),
        Rule(
            "InvalidDefaultArgInFrom",
            "Default value for global ARG results in an empty or invalid base image name",
        ),
        Rule("FromPlatformFlagConstDisallowed", "FROM --platform flag should not use a constant value"),
        Rule("CopyIgnoredFile", "Attempting to Copy file that is excluded by .dockerignore"),
        Rule(
            "InvalidDefinitionDescription",
            "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. If "
            "this is not intended to be a description comment, add an empty line or comment between the instruction "
            "and the comment.",
            level="experimental",
        ),
        Rule("ExposeProtoCasing", "Protocol in EXPOSE instruction should be lowercase"),
        Rule("ExposeInvalidFormat", "IP address and host-port mapping should not be used in EXPOSE instruction"),
        Rule("InvalidBaseImagePlatform", "Base image platform does not match expected target platform"),
    )
}


class Finding(Struct, frozen=True):
    """One finding, with its 1-based lines."""

    rule: str
    message: str
    line: int
    end_line: int

    def short(self) -> str:
        return f"{self.rule}: {self.message} (line {self.line})"

    def to_dict(self) -> dict[str, Any]:
        rule = RULES[self.rule]
        return {
            "rule": self.rule,
            "description": rule.description,
            "url": rule.url,
            "level": rule.level,
            "message": self.message,
            "line": self.line,
            "end_line": self.end_line,
        }


class Options(Struct, frozen=True):
    """What `# check=…` (or BUILDKIT_DOCKERFILE_CHECK) asks for."""

    skip: frozenset[str] = frozenset()
    experimental: frozenset[str] = frozenset()
    error: bool = False


ALL = frozenset({"all"})


def parse_options(text: str) -> Options:
    """`skip=NAME,…;error=true;experimental=all` as Options. Raises DockerfileError for another key or value."""
    found = Options()
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        names = frozenset(name.strip() for name in value.split(",") if name.strip())
        if not equals or key not in ("skip", "error", "experimental"):
            raise DockerfileError(f'invalid check option "{part[:80]}"', resolution="# check=skip=RULE,RULE;error=true")
        if key == "skip":
            found = replace(found, skip=names)
        elif key == "experimental":
            found = replace(found, experimental=names)
        elif value in ("1", "t", "T", "TRUE", "true", "True"):
            found = replace(found, error=True)
        elif value not in ("0", "f", "F", "FALSE", "false", "False"):
            raise DockerfileError(f'failed to parse check option "{part[:80]}"', resolution="error=true or error=false")
    return found


def options(dockerfile: Dockerfile, override: str | None = None) -> Options:
    """The options of the `check` directive, or of `override` (a build argument). Raises DockerfileError."""
    if override is not None:
        return parse_options(override)
    directive = next((item for item in dockerfile.directives if item.name == "check"), None)
    if directive is None:
        return Options()
    try:
        return parse_options(directive.value)
    except DockerfileError as err:
        err.line = err.end_line = directive.line
        raise


_IN_COMMENT = re.compile(r"check\s*=\s*(\S.*)", re.IGNORECASE)


def _own_options(dockerfile: Dockerfile) -> dict[int, Options]:
    """By line, what a comment `# check=skip=RULE` right above an instruction asks for; one that is malformed asks for
    nothing. Words behind the first space say why."""
    found: dict[int, Options] = {}
    for node in dockerfile.nodes:
        given = next((match for text in node.comments if (match := _IN_COMMENT.match(text))), None)
        if given is not None:
            with suppress(DockerfileError):
                found[node.line] = parse_options(given.group(1).split(" ")[0])
    return found


class Surroundings(Struct):
    """What lint may know beyond the file: build arguments, the .dockerignore, environment and platform (the name asked
    for, what it is, what is expected) of base images that are here."""

    build_args: Mapping[str, str] = field(default_factory=dict)
    ignore: IgnoreMatcher | None = None
    base_env: Callable[[Stage], Mapping[str, str] | None] = lambda _stage: None
    base_platform: Callable[[Stage], tuple[str, str, str] | None] = lambda _stage: None
    platform: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(PLATFORM_ARGS, ""))


def lint(program: Program, settings: Options | None = None, surroundings: Surroundings | None = None) -> list[Finding]:
    """Every finding in a checked Dockerfile, by line, skipped rules left out."""
    settings = options(program.dockerfile) if settings is None else settings
    around = surroundings or Surroundings()
    if settings.skip & ALL:
        return []
    found: list[Finding] = []
    for check in (_file_rules, _stage_rules, _base_rules, _command_rules, _variable_rules):
        found.extend(check(program, around))
    own = _own_options(program.dockerfile)
    kept = (warning for warning in found if _wanted(warning, settings, own.get(warning.line, Options())))
    return sorted(kept, key=lambda warning: (warning.line, warning.rule))


def lint_error(warnings: Iterable[Finding], settings: Options) -> DockerfileError | None:
    """The error `# check=error=true` turns warnings into."""
    listed = list(warnings)
    if not settings.error or not listed:
        return None
    names = ", ".join(dict.fromkeys(warning.rule for warning in listed))
    first = listed[0]
    return DockerfileError(
        f"lint violation found for rules: {names}",
        line=first.line,
        end_line=first.end_line,
        details="\n".join(warning.short() for warning in listed),
    )


def _wanted(warning: Finding, settings: Options, own: Options) -> bool:
    if (settings.skip | own.skip) & (ALL | {warning.rule}):
        return False
    if RULES[warning.rule].level == "experimental":
        return bool((settings.experimental | own.experimental) & (ALL | {warning.rule}))
    return True


def _at(place: Instruction | Node, rule: str, message: str) -> Finding:
    return Finding(rule, message, place.line, place.end_line)


def _file_rules(program: Program, _around: Surroundings) -> Iterator[Finding]:
    for node in program.dockerfile.nodes:
        if node.empty_continuation:
            yield _at(node, "NoEmptyContinuation", "Empty continuation line")
        if node.instruction in ("ARG", "FROM"):
            yield from _description(node)
    everything = [item for stage in program.stages for item in (stage.from_, *stage.commands)]
    lower = sum(item.keyword == item.keyword.lower() for item in everything)
    upper = sum(item.keyword == item.keyword.upper() for item in everything)
    majority, cased = ("lowercase", str.lower) if lower > upper else ("uppercase", str.upper)
    for item in everything:
        if cased(item.keyword) != item.keyword:
            yield _at(
                item,
                "ConsistentInstructionCasing",
                f"Command '{item.keyword}' should match the case of the command majority ({majority})",
            )


def _description(node: Node) -> Iterator[Finding]:
    if not node.comments:
        return
    if node.instruction == "ARG":
        names, what = [word.partition("=")[0] for word in node.args], "ARG"
    else:
        names, what = ([node.args[2].lower()] if len(node.args) == 3 else []), "FROM"
    if names and node.comments[-1].split(" ")[0] not in names:
        example = names[0] if len(names) == 1 else "<arg_key>"
        yield _at(
            node,
            "InvalidDefinitionDescription",
            f"Comment for {what} should follow the format: `# {example} <description>`",
        )


def _stage_rules(program: Program, _around: Surroundings) -> Iterator[Finding]:
    seen: set[str] = set()
    for stage in program.stages:
        head, name = stage.from_, stage.name
        if name is None:
            continue
        if head.stage_as_written != name:
            yield _at(head, "StageNameCasing", f"Stage name '{head.stage_as_written}' should be lowercase")
        if head.as_keyword and _cases_differ(head.keyword, head.as_keyword):
            yield _at(head, "FromAsCasing", f"'{head.as_keyword}' and '{head.keyword}' keywords' casing do not match")
        if name in ("context", "scratch"):
            message = f'Stage name should not use the same name as reserved stage "{name}"'
            yield _at(head, "ReservedStageName", message)
        if name in seen:
            yield _at(head, "DuplicateStageName", f'Duplicate stage name "{name}", stage names should be unique')
        seen.add(name)


def _cases_differ(keyword: str, other: str) -> bool:
    if keyword == keyword.lower():
        return other != other.lower()
    return keyword == keyword.upper() and other != other.upper()


_TAG = r"[\w][\w.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(rf"(?:{_PATH_PART}(?:/{_PATH_PART})*)(?::{_TAG})?(?:@{_DIGEST})?", re.ASCII)
_HOST = re.compile(r"[a-zA-Z0-9.-]+(?::[0-9]+)?|\[[a-fA-F0-9:]+\](?::[0-9]+)?")
_OS = ("linux", "windows", "darwin", "freebsd", "wasi", "js", "aix", "android", "netbsd", "openbsd", "solaris")
_ARCH = ("386", "amd64", "arm", "arm64", "loong64", "mips64", "mips64le", "ppc64le", "riscv64", "s390x", "wasm")


def _is_reference(name: str) -> bool:
    if not name or len(name) > 400:
        return False
    host, slash, rest = name.partition("/")
    if slash and ("." in host or ":" in host or host == "localhost") and _HOST.fullmatch(host):
        name = rest
    return _REFERENCE.fullmatch(name) is not None


def _base_rules(program: Program, around: Surroundings) -> Iterator[Finding]:
    lexer = Lexer(program.dockerfile.escape)
    declared = {name for arg in program.global_args for name, _ in arg.pairs}
    known = sorted(declared | set(PLATFORM_ARGS))
    scope, defaults = _scopes(program, around)
    for stage in program.stages:
        head = stage.from_
        for word in (stage.base, stage.platform or ""):
            met = _try(lexer, word, scope)
            for name in sorted(met.unmatched - set(known)) if met else ():
                message = f"FROM argument '{name}' is not declared{_suggest(name, known, '')}"
                yield _at(head, "UndefinedArgInFrom", message)
        plain = _try(lexer, stage.base, defaults)
        if plain is not None and not _is_reference(plain.result) and "$" in stage.base:
            message = f"Default value for ARG {stage.base} results in empty or invalid base image name"
            yield _at(head, "InvalidDefaultArgInFrom", message)
        yield from _platform_rules(stage, _try(lexer, stage.platform or "", scope))
        found = around.base_platform(stage)
        if found is not None and found[1] != found[2]:
            name, actual, expected = found
            message = f'Base image {name} was pulled with platform "{actual}", expected "{expected}" for current build'
            yield _at(head, "InvalidBaseImagePlatform", message)


def _scopes(program: Program, around: Surroundings) -> tuple[dict[str, str], dict[str, str]]:
    platform = {name: value or name.lower() for name, value in around.platform.items()}
    try:
        return (
            global_scope(program, around.build_args, platform),
            global_scope(program, None, platform),
        )
    except DockerfileError:
        return dict(platform), dict(platform)


def _platform_rules(stage: Stage, met: Expansion | None) -> Iterator[Finding]:
    head = stage.from_
    if met is None or not stage.platform:
        return
    if stage.platform in ("$TARGETPLATFORM", "${TARGETPLATFORM}"):
        yield _at(
            head,
            "RedundantTargetPlatform",
            f"Setting platform to predefined {stage.platform} in FROM is redundant as this is the default behavior",
        )
    if met.matched or met.unmatched:
        return
    parts = met.result.lower().split("/")
    if parts[0] not in _OS and (len(parts) > 1 or parts[0] not in _ARCH):
        return
    if not any(part and part in (stage.name or "") for part in parts[:2]):
        message = f'FROM --platform flag should not use constant value "{met.result}"'
        yield _at(head, "FromPlatformFlagConstDisallowed", message)


_SECRET = re.compile(
    r"(?:_|^)(?:apikey|auth|credential|credentials|key|password|psw|pword|passwd|secret|token)(?:_|$)", re.IGNORECASE
)
_NOT_SECRET = re.compile(r"(?:_|^)(?:public|file|version)(?:_|$)", re.IGNORECASE)


def _command_rules(program: Program, around: Surroundings) -> Iterator[Finding]:
    absolute: dict[int, bool] = {}
    scope, _ = _scopes(program, around)
    for stage, base in zip(program.stages, base_stages(program, scope), strict=True):
        absolute[stage.index] = base is not None and absolute[base.index]
        last: dict[str, Instruction] = {}
        own_shell = False
        for command in stage.commands:
            own_shell = own_shell or isinstance(command, Shell)
            yield from _one_command(command, last, own_shell=own_shell)
            if isinstance(command, Workdir):
                if not absolute[stage.index] and not command.path.strip("'\"").startswith(("/", "$")):
                    message = f'Relative workdir "{command.path}" can have unexpected results if the base image changes'
                    yield _at(command, "WorkdirRelativePath", message)
                absolute[stage.index] = True
            elif isinstance(command, Copy | Add):
                yield from _ignored_sources(command, around.ignore)


def _one_command(command: Instruction, last: dict[str, Instruction], *, own_shell: bool) -> Iterator[Finding]:
    if isinstance(command, Cmd | Entrypoint | Healthcheck):
        previous = last.get(command.name)
        if previous is not None:
            message = (
                f"Multiple {command.name} instructions should not be used in the same stage because only the last "
                "one will be used"
            )
            yield _at(previous, "MultipleInstructionsDisallowed", message)
        last[command.name] = command
    if isinstance(command, Cmd | Entrypoint) and not command.json_form and not own_shell:
        written = command.keyword or command.name
        message = f"JSON arguments recommended for {written} to prevent unintended behavior related to OS signals"
        yield _at(command, "JSONArgsRecommended", message)
    if isinstance(command, Maintainer):
        message = "Maintainer instruction is deprecated in favor of using label"
        yield _at(command, "MaintainerDeprecated", message)
    if isinstance(command, Env | Label) and command.legacy:
        written = command.keyword or command.name
        message = f'"{written} key=value" should be used instead of legacy "{written} key value" format'
        yield _at(command, "LegacyKeyValueFormat", message)
    if isinstance(command, Env | Arg):
        for name, _ in command.pairs:
            if _SECRET.search(name) and not _NOT_SECRET.search(name):
                message = f'Do not use ARG or ENV instructions for sensitive data ({command.name} "{name}")'
                yield _at(command, "SecretsUsedInArgOrEnv", message)
    if isinstance(command, Expose):
        yield from _port_rules(command)


def _port_rules(command: Expose) -> Iterator[Finding]:
    for port in command.ports:
        if "$" in port:
            continue
        *host, container = port.split(":")
        protocol = container.partition("/")[2]
        if protocol != protocol.lower():
            message = f"Defined protocol '{port}' in EXPOSE instruction should be lowercase"
            yield _at(command, "ExposeProtoCasing", message)
        if any(host):
            message = f"EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'"
            yield _at(command, "ExposeInvalidFormat", message)


def _ignored_sources(command: Copy | Add, ignore: IgnoreMatcher | None) -> Iterator[Finding]:
    # With `!` lines a directory may be ignored while files in it are not: nothing can be said.
    if ignore is None or ignore.has_exceptions or (isinstance(command, Copy) and command.from_):
        return
    for source in command.sources:
        if "://" in source or "$" in source or source.startswith("git@"):
            continue
        path = posixpath.normpath(source).lstrip("/")
        if ignore.ignores(path):
            verb = "Copy" if isinstance(command, Copy) else "Add"
            message = f'Attempting to {verb} file "{path}" that is excluded by .dockerignore'
            yield _at(command, "CopyIgnoredFile", message)


def _variable_rules(program: Program, around: Surroundings) -> Iterator[Finding]:
    scope, _ = _scopes(program, around)
    children: dict[int | None, list[Stage]] = {}
    for stage, base in zip(program.stages, base_stages(program, scope), strict=True):
        children.setdefault(None if base is None else base.index, []).append(stage)
    for root in children.get(None, ()):
        yield from _variables_from(root, children, _Known(program, around, scope, root))


def _variables_from(root: Stage, children: Mapping[int | None, Sequence[Stage]], known: _Known) -> Iterator[Finding]:
    """What `root` and the stages that are FROM it, and so on, do with variables. Down and up the tree with one
    environment, since a copy for each stage would be quadratic."""
    waiting: list[tuple[Stage, int | None]] = [(root, None)]
    while waiting:
        stage, mark = waiting.pop()
        if mark is not None:
            known.go_back(mark)
            continue
        waiting.append((stage, known.mark()))
        for command in stage.commands:
            yield from known.follow(command)
        waiting += [(child, None) for child in children.get(stage.index, ())]


class _Known:
    """The variables at one place of a file, and a way back to an earlier place.

    A stage has what the one it is FROM has, its ARGs too; of an ARG and an ENV of one name the later one holds."""

    def __init__(self, program: Program, around: Surroundings, scope: Mapping[str, str], root: Stage) -> None:
        self._lexer = Lexer(program.dockerfile.escape)
        self._build_args = around.build_args
        self._scope = scope
        self._env = {"PATH": DEFAULT_PATH, **(around.base_env(root) or {})}
        self._declared: Counter[str] = Counter(PROXY_ARGS)
        self._done: list[tuple[str, str | None] | str] = []
        self._size = 0

    def mark(self) -> int:
        return len(self._done)

    def go_back(self, mark: int) -> None:
        while len(self._done) > mark:
            last = self._done.pop()
            if isinstance(last, str):
                self._declared[last] -= 1
            elif last[1] is None:
                del self._env[last[0]]
            else:
                self._env[last[0]] = last[1]

    def _set(self, name: str, value: str) -> None:
        self._size += len(value)
        if self._size > MOST_CHARACTERS:
            value = ""  # that it is defined is what the rules ask
        self._done.append((name, self._env.get(name)))
        self._env[name] = value

    def follow(self, command: Instruction) -> Iterator[Finding]:
        yield from _undefined(command, self._lexer, self._env, self._declared)
        if isinstance(command, Arg):
            for name, default in command.pairs:
                self._declared[name] += 1
                self._done.append(name)
                given = self._build_args.get(name, self._scope.get(name, default))
                if given is not None:
                    self._set(name, given)
        elif isinstance(command, Env):
            # Each value sees the environment before its instruction.
            for name, value in [(name, _result(self._lexer, value, self._env)) for name, value in command.pairs]:
                self._set(name, value)


def _result(lexer: Lexer, word: str, values: Mapping[str, str]) -> str:
    met = _try(lexer, word, values)
    return met.result if met else word


def _undefined(
    command: Instruction, lexer: Lexer, values: Mapping[str, str], declared: Mapping[str, int]
) -> Iterator[Finding]:
    words = list(expandable_words(command))
    if isinstance(command, Run):
        words += list(command.mount_flags)
    texts = [doc.text for doc in command.contents if doc.expand] if isinstance(command, Copy | Add) else []
    if not any("$" in word for word in (*words, *texts)):
        return
    unmatched: set[str] = set()
    for word in words:
        met = _try(lexer, word, values)
        unmatched |= met.unmatched if met else set()
    for text in texts:
        met = _try(Lexer(skip_quotes=True), text, values)
        unmatched |= met.unmatched if met else set()
    for name in sorted(name for name in unmatched if not declared.get(name)):
        message = f"Usage of undefined variable '${name}'{_suggest(name, values, '$')}"
        yield _at(command, "UndefinedVar", message)


def _suggest(name: str, known: Iterable[str], sign: str) -> str:
    best = nearest(name, known)
    return f" (did you mean {sign}{best}?)" if best and best != name else ""


def _try(lexer: Lexer, word: str, env: Mapping[str, str]) -> Expansion | None:
    try:
        return lexer.process(word, env)
    except DockerfileError:
        return None
