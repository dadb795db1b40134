"""Dockerfile text to a list of nodes: lines, continuations, comments, heredocs, flags, JSON and shell forms.

Knows how each instruction splits its arguments but not what they mean; `instructions` gives meaning, and an unknown
instruction is still a node here. Follows BuildKit's `frontend/dockerfile/parser`. Reads no file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ..errors import DockerfileError
from .variables import SPACES, Lexer

INSTRUCTIONS: tuple[str, ...] = (
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
)
DIRECTIVES = ("syntax", "escape", "check")

# The token limit of BuildKit's line scanner: a longer line is refused there too.
MAX_LINE_BYTES = 65_535
_DEEPEST_ONBUILD = 20
_HEREDOC_HOLDERS = ("ADD", "COPY", "RUN")

# BuildKit looks at bytes where it looks for flags: of wider spaces the first byte is none.
_FLAG_SPACES = "\t\n\v\f\r "
_WHITE = re.compile(r"[\t\v\f\r ]+")
_DIRECTIVE = re.compile(
    r"#[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"
    r"([a-zA-Z][a-zA-Z0-9]*)[\t\n\f\r ]*=[\t\n\f\r ]*(.+)"
)
_HEREDOC = re.compile(r"([0-9]*)<<(-?)([^<]*)")
_LEADING_TABS = re.compile(r"^\t+", re.MULTILINE)


class Heredoc(Struct, frozen=True):
    """One `<<NAME`. `content` is the body as written; `text` is what a command or file gets (tabs of `<<-` gone)."""

    name: str
    content: str
    expand: bool
    chomp: bool
    fd: int

    @property
    def text(self) -> str:
        return _LEADING_TABS.sub("", self.content) if self.chomp else self.content

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "content": self.content,
            "expand": self.expand,
            "chomp": self.chomp,
            "fd": self.fd,
        }


class Directive(Struct, frozen=True):
    """`# name=value` at the top of the file."""

    name: str
    value: str
    line: int


class Node(Struct, frozen=True):
    """One instruction with its arguments split.

    `args` is what the JSON interface promises: strings; for ENV and LABEL (key, value) pairs; for ONBUILD one Node.
    `original` is the logical line: continuations joined, comments dropped, heredoc bodies not included.
    """

    instruction: str
    keyword: str
    flags: tuple[str, ...]
    args: tuple[Any, ...]
    json_form: bool
    line: int
    end_line: int
    original: str
    heredocs: tuple[Heredoc, ...] = ()
    comments: tuple[str, ...] = ()
    legacy_pair: bool = False
    empty_continuation: bool = False

    @property
    def text(self) -> str:
        """The instruction as a heredoc-complete text that parses to itself."""
        bodies = "".join(f"\n{doc.content}{doc.name}" for doc in self.heredocs)
        return self.original.strip(SPACES) + bodies

    def to_dict(self) -> dict[str, Any]:
        """The object `labkernel dockerfile parse` prints."""
        return {
            "instruction": self.instruction,
            "flags": list(self.flags),
            "args": [_plain(arg) for arg in self.args],
            "json_form": self.json_form,
            "heredocs": [doc.to_dict() for doc in self.heredocs],
            "line": self.line,
            "end_line": self.end_line,
        }


class Dockerfile(Struct, frozen=True):
    """A parsed Dockerfile: its nodes in order, its directives, and its escape character."""

    source: str
    nodes: tuple[Node, ...]
    directives: tuple[Directive, ...]
    escape: str

    def directive(self, name: str) -> str | None:
        return next((item.value for item in self.directives if item.name == name), None)

    def excerpt(self, line: int, end_line: int | None = None) -> str:
        return excerpt(self.source, line, end_line)


def parse(text: str) -> Dockerfile:
    """Parse a Dockerfile. A BOM is skipped; lines end in LF or CRLF.

    Raises DockerfileError with `line` and `end_line` for what BuildKit's parser refuses: a bad escape directive, a
    repeated directive, an unterminated heredoc, a JSON array of other things than strings, ENV and LABEL without a
    value, a line longer than 65,535 bytes, no instruction at all.
    """
    return _Reader(text).read()


def parse_heredoc(word: str) -> Heredoc | None:
    """The heredoc that `word` (such as `<<-"EOF"`) opens, without content; None when it is no heredoc."""
    found = _HEREDOC.fullmatch(word)
    if not found or not found.group(3):
        return None
    fd, dash, rest = found.groups()
    # Read the word with and without its quotes: where they differ, it was quoted and the body is literal.
    plain = Lexer(skip_unset=True).process(rest, {}).words
    if len(plain) != 1:
        return None
    raw = Lexer(skip_unset=True, raw_quotes=True).process(rest, {}).words
    quoted = _quote_count(raw[0]) != _quote_count(plain[0])
    return Heredoc(name=plain[0], content="", expand=not quoted, chomp=bool(dash), fd=_descriptor(fd))


def excerpt(source: str, line: int, end_line: int | None = None) -> str:
    """The lines around an error, the offending ones marked, as BuildKit prints them."""
    lines = source.split("\n")
    end_line = min(end_line or line, len(lines))
    first, last = max(1, line - 2), min(len(lines), end_line + 2)
    width = len(str(last))
    out = []
    for number in range(first, last + 1):
        mark = ">>> " if line <= number <= end_line else "    "
        out.append(f"{number:>{width}} | {mark}{lines[number - 1]}".rstrip())
    return "\n".join(out)


def _descriptor(digits: str) -> int:
    # Go's ParseUint gives the largest number for one out of range, and BuildKit ignores the error.
    return min(int(digits or "0"), 2**64 - 1) if len(digits) <= 20 else 2**64 - 1


def _plain(arg: Any) -> Any:
    if isinstance(arg, Node):
        return arg.to_dict()
    return list(arg) if isinstance(arg, tuple) else arg


def _quote_count(word: str) -> int:
    return word.count("'") + word.count('"')


class _Reader:
    """Walks the physical lines once; `number` is the 1-based line just taken."""

    def __init__(self, text: str) -> None:
        self.source = text.removeprefix("\ufeff")
        self.lines = self.source.split("\n")
        self.ends_in_newline = self.lines[-1] == ""
        if self.ends_in_newline:
            self.lines.pop()
        self.number = 0
        self.directives: list[Directive] = []
        self.in_directives = True
        self.escape = "\\"

    def read(self) -> Dockerfile:
        nodes: list[Node] = []
        comments: list[str] = []
        while (taken := self.take()) is not None:
            physical = _trim_newline(taken).lstrip(SPACES)
            is_directive = self.note_directive(physical)
            if physical.startswith("#"):
                comment = physical[1:].strip(SPACES)
                comments = [*comments[-50:], comment] if comment and not is_directive else []
                continue
            if not physical:
                comments = []
                continue
            start = self.number
            node = self.instruction(physical, tuple(comments))
            comments = []
            nodes.append(replace(node, line=start, end_line=self.number))
        if not nodes:
            raise DockerfileError(
                "file with no instructions",
                line=max(1, self.number),
                resolution="a Dockerfile begins with `FROM IMAGE`",
            )
        nodes = [_with_nested_lines(node) for node in nodes]
        return Dockerfile(self.source, tuple(nodes), tuple(self.directives), self.escape)

    def take(self) -> str | None:
        if self.number >= len(self.lines):
            return None
        line = self.lines[self.number]
        self.number += 1
        if len(line) > MAX_LINE_BYTES // 4 and len(line.encode("utf-8", "surrogatepass")) > MAX_LINE_BYTES:
            raise DockerfileError(
                f"dockerfile line greater than max allowed size of {MAX_LINE_BYTES}",
                line=self.number,
                resolution="break the line with the escape character, or COPY a file",
            )
        return line

    def note_directive(self, line: str) -> bool:
        if not self.in_directives:
            return False
        found = _DIRECTIVE.match(line)
        name = found.group(1).lower() if found else ""
        if not found or name not in DIRECTIVES:
            self.in_directives = False
            return False
        if any(seen.name == name for seen in self.directives):
            raise DockerfileError(f"only one {name} parser directive can be used", line=self.number)
        value = found.group(2).rstrip("\t\n\f\r ")
        if not value:
            self.in_directives = False
            return False
        self.directives.append(Directive(name, value, self.number))
        if name == "escape":
            if value not in ("\\", "`"):
                raise DockerfileError(f"invalid escape token '{value}' does not match ` or \\", line=self.number)
            self.escape = value
        return True

    def instruction(self, first: str, comments: tuple[str, ...]) -> Node:
        start = self.number
        line, blank = self.logical_line(first)
        try:
            node = _node(line, self.escape)
            docs = _heredocs_of(node, line)
        except DockerfileError as err:
            raise located(err, start, self.number) from None
        bodies = tuple(self.heredoc_body(doc, start) for doc in docs)
        return replace(node, heredocs=bodies, comments=comments, empty_continuation=blank)

    def logical_line(self, first: str) -> tuple[str, bool]:
        parts: list[str] = []
        blank = False
        piece, more = self.continued(first)
        parts.append(piece)
        while more and (taken := self.take()) is not None:
            physical = _trim_newline(taken)
            bare = physical.lstrip(SPACES)
            if bare.startswith("#"):
                continue
            if not bare:
                blank = True
                continue
            piece, more = self.continued(physical)
            parts.append(piece)
        return "".join(parts), blank

    def continued(self, line: str) -> tuple[str, bool]:
        """`line` without its continuation character, and whether it had one."""
        bare = line.rstrip("\t ")
        if not bare.endswith(self.escape):
            return line, False
        body = bare[:-1]
        # BuildKit's rule: an escape before the escape makes both literal, whatever stands before them.
        if body.endswith(self.escape):
            return line, False
        return body, True

    def heredoc_body(self, doc: Heredoc, start: int) -> Heredoc:
        body: list[str] = []
        while (taken := self.take()) is not None:
            last_word = _trim_newline(taken)
            if doc.chomp:
                last_word = last_word.lstrip("\t")
            if last_word == doc.name:
                return replace(doc, content="".join(body))
            body.append(taken)
            body.append("\n")
        raise DockerfileError(
            "unterminated heredoc",
            line=start,
            end_line=self.number,
            resolution=f"end it with a line that holds only {doc.name}",
        )


def located(err: DockerfileError, line: int, end_line: int) -> DockerfileError:
    """`err` with its lines, where it has none yet."""
    if err.line is None:
        err.line, err.end_line = line, end_line
    return err


def _trim_newline(line: str) -> str:
    return line.rstrip("\r\n")


def _with_nested_lines(node: Node) -> Node:
    if node.instruction != "ONBUILD" or not node.args:
        return node
    inner = replace(node.args[0], line=node.line, end_line=node.end_line, heredocs=node.heredocs)
    return replace(node, args=(_with_nested_lines(inner),))


def _heredocs_of(node: Node, line: str) -> list[Heredoc]:
    holder = node
    if node.instruction == "ONBUILD" and node.args:
        holder = node.args[0]
    if holder.instruction not in _HEREDOC_HOLDERS or holder.json_form or "<<" not in line:
        return []
    try:
        words = Lexer(raw_quotes=True, raw_escapes=True, skip_unset=True).process(line, {}).words
    except DockerfileError:
        return []  # an unbalanced quote: BuildKit leaves the line to the shell
    docs = (parse_heredoc(word) for word in words)
    return [doc for doc in docs if doc is not None]


def _node(line: str, escape: str, depth: int = 0) -> Node:
    pieces = _WHITE.split(line.strip(SPACES), maxsplit=1)
    keyword = pieces[0]
    flags, rest = _split_flags(pieces[1]) if len(pieces) == 2 else ((), "")
    rest = rest.strip(SPACES)
    name = keyword.upper()
    made = Node(name, keyword, flags, (), json_form=False, line=0, end_line=0, original=line)
    if name == "ONBUILD":
        if depth >= _DEEPEST_ONBUILD:
            raise DockerfileError("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
        if not rest:
            return made
        inner = _node(rest, escape, depth + 1)
        return replace(made, args=(inner,))
    if name in ("ENV", "LABEL"):
        pairs, legacy = _pairs(name, rest, escape)
        return replace(made, args=pairs, legacy_pair=legacy)
    splitter = _SPLITTERS.get(name)
    if splitter is None:
        # BuildKit's parser keeps an unknown instruction as one empty argument; refusing it is not its work.
        return replace(made, args=("",))
    args, is_json = splitter(rest, escape)
    return replace(made, args=args, json_form=is_json)


def _split_flags(rest: str) -> tuple[tuple[str, ...], str]:
    """Leading `--words`, quotes and backslashes resolved, and the text after them."""
    flags: list[str] = []
    pos, size = 0, len(rest)
    while True:
        while pos < size and rest[pos] in _FLAG_SPACES:
            pos += 1
        if not rest.startswith("--", pos):
            return tuple(flags), rest[pos:]
        word, pos, blank_ok = _flag_word(rest, pos)
        if word == "--":
            return tuple(flags), rest[pos:]
        if word or blank_ok:
            flags.append(word)


def _flag_word(rest: str, pos: int) -> tuple[str, int, bool]:
    out: list[str] = []
    quote, quoted = "", False
    while pos < len(rest):
        ch = rest[pos]
        if not quote and ch in _FLAG_SPACES:
            break
        if ch == quote:
            quote = ""
        elif not quote and ch in "'\"":
            quote, quoted = ch, True
        elif ch == "\\":
            pos += 1
            out.append(rest[pos : pos + 1])
        else:
            out.append(ch)
        pos += 1
    return "".join(out), min(pos, len(rest)), quoted


def split_words(rest: str, escape: str) -> list[str]:
    """Words with their quotes kept, as ENV, LABEL and ARG read them."""
    words: list[str] = []
    out: list[str] = []
    quote, blank_ok = "", False
    pos, size = 0, len(rest)
    while pos < size:
        ch = rest[pos]
        pos += 1
        if not quote and ch in SPACES:
            if out or blank_ok:
                words.append("".join(out))
            out, blank_ok = [], False
            continue
        if not quote and ch in "'\"":
            quote, blank_ok = ch, True
        elif ch == quote:
            quote = ""
        elif ch == escape and quote != "'":
            if pos == size:
                break  # an escape at the very end is dropped
            out.append(ch)
            ch = rest[pos]
            pos += 1
        out.append(ch)
    if out or blank_ok:
        words.append("".join(out))
    return words


def _pairs(name: str, rest: str, escape: str) -> tuple[tuple[tuple[str, str], ...], bool]:
    words = split_words(rest, escape)
    if not words:
        return (), False
    if "=" not in words[0]:
        parts = _WHITE.split(rest, maxsplit=1)
        if len(parts) < 2:
            raise DockerfileError(f"{name} must have two arguments", resolution=f"write {name} {parts[0]}=VALUE")
        return ((parts[0], parts[1]),), True
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise DockerfileError(
                f'Syntax error - can\'t find = in "{_shorten(word)}". Must be of the form: name=value',
                resolution="quote a value that holds spaces",
            )
        pairs.append((key, value))
    return tuple(pairs), False


def _shorten(word: str) -> str:
    return word if len(word) <= 100 else word[:100] + "…"


_Split = tuple[tuple[str, ...], bool]


def _as_string(rest: str, _escape: str) -> _Split:
    return ((rest,) if rest else ()), False


def _as_words(rest: str, _escape: str) -> _Split:
    return (tuple(_WHITE.split(rest)) if rest else ()), False


def _as_quoted_words(rest: str, escape: str) -> _Split:
    return tuple(split_words(rest, escape)), False


def _as_json_or_string(rest: str, escape: str) -> _Split:
    strings = json_strings(rest)
    return _as_string(rest, escape) if strings is None else (strings, True)


def _as_json_or_words(rest: str, escape: str) -> _Split:
    strings = json_strings(rest)
    return _as_words(rest, escape) if strings is None else (strings, True)


def _as_health(rest: str, escape: str) -> _Split:
    # BuildKit looks at bytes here: only ASCII white space separates the type from its command.
    found = re.match(r"([^\t\n\v\f\r ]*)[\t\n\v\f\r ]*", rest)
    if not found or not found.group(1):
        return (), False
    command, is_json = _as_json_or_string(rest[found.end() :], escape)
    return (found.group(1), *command), is_json


_SPLITTERS: dict[str, Callable[[str, str], _Split]] = {
    "ADD": _as_json_or_words,
    "ARG": _as_quoted_words,
    "CMD": _as_json_or_string,
    "COPY": _as_json_or_words,
    "ENTRYPOINT": _as_json_or_string,
    "EXPOSE": _as_words,
    "FROM": _as_words,
    "HEALTHCHECK": _as_health,
    "MAINTAINER": _as_string,
    "RUN": _as_json_or_string,
    "SHELL": _as_json_or_string,
    "STOPSIGNAL": _as_string,
    "USER": _as_string,
    "VOLUME": _as_json_or_words,
    "WORKDIR": _as_string,
}


def _finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")):
        raise ValueError(number)
    return value


def _no_constant(name: str) -> float:
    raise ValueError(name)


_JSON = json.JSONDecoder(parse_int=_finite, parse_float=_finite, parse_constant=_no_constant)


def json_strings(rest: str) -> tuple[str, ...] | None:
    """The strings of a JSON array; None when `rest` does not begin with one. Raises for other elements."""
    bare = rest.lstrip(SPACES)
    if not bare.startswith("["):
        return None
    try:
        value, _end = _JSON.raw_decode(bare)
    except (ValueError, RecursionError):
        return None  # `[ -f x ] && …` is shell
    if any(not isinstance(item, str) for item in value):
        raise DockerfileError(
            "when using JSON array syntax, arrays must be comprised of strings only",
            resolution='put every element into double quotes: ["sleep", "10"]',
        )
    return tuple(_SURROGATES.sub("\ufffd", item) for item in value)


_SURROGATES = re.compile("[\ud800-\udfff]")
