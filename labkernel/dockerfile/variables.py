"""Variable expansion of the Dockerfile language: `$NAME`, `${NAME…}`, quotes and escapes in one word or many.

Behaves as the shell lexer of BuildKit's Dockerfile frontend (`frontend/dockerfile/shell`), including the modifiers
`:- - :+ + :? ? # ## % %% / //`. What a name is worth is the caller's business: scopes of ARG and ENV belong to the
builder. Patterns are matched by a bit-parallel automaton, so no pattern takes more than linear time in the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct, field

from ..errors import DockerfileError

# What Go's unicode.IsSpace accepts; str.isspace would add the separators U+001C to U+001F.
SPACES = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_SPACE_SET = frozenset(SPACES)
_SPACE_RUN = re.compile(f"[{SPACES}]+")

# Usable without an ARG instruction, and kept out of the image's history. Source: Dockerfile reference, ARG.
PROXY_ARGS: tuple[str, ...] = (
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
)

# In the global scope always; inside a stage only after `ARG NAME`. Source: Dockerfile reference, ARG.
PLATFORM_ARGS: tuple[str, ...] = (
    "BUILDPLATFORM",
    "BUILDOS",
    "BUILDOSVERSION",
    "BUILDARCH",
    "BUILDVARIANT",
    "TARGETPLATFORM",
    "TARGETOS",
    "TARGETOSVERSION",
    "TARGETARCH",
    "TARGETVARIANT",
    "TARGETSTAGE",
)

# Build args that steer the builder itself. Source: Dockerfile reference, "BuildKit built-in build args".
BUILDER_ARGS: tuple[str, ...] = (
    "BUILDKIT_BUILD_NAME",
    "BUILDKIT_CACHE_MOUNT_NS",
    "BUILDKIT_CONTEXT_KEEP_GIT_DIR",
    "BUILDKIT_HISTORY_PROVENANCE_V1",
    "BUILDKIT_INLINE_CACHE",
    "BUILDKIT_MULTI_PLATFORM",
    "BUILDKIT_SANDBOX_HOSTNAME",
    "BUILDKIT_SYNTAX",
    "BUILDKIT_DOCKERFILE_CHECK",
    "SOURCE_DATE_EPOCH",
)

_SPECIAL_NAMES = frozenset("@*#?-$!0")
_END = ""
_DEEPEST = 100
# By how many characters the values in one word may make it longer. No variable longer than this reaches a command
# (MAX_ARG_STRLEN, man 2 execve), and without a limit a few lines of `ARG B=$A$A` fill the memory.
MOST_GROWTH = 128 << 10


class Expansion(Struct, frozen=True):
    """What became of a word: the whole as one string, its words, and the names met."""

    result: str
    words: list[str]
    matched: frozenset[str] = field(default_factory=frozenset)
    unmatched: frozenset[str] = field(default_factory=frozenset)


class Lexer(Struct, frozen=True):
    """The rules of one expansion; the builder needs only `escape`.

    `raw_quotes` and `raw_escapes` keep quotes and escape characters in the result; `skip_quotes` gives quotes no
    meaning (heredoc bodies); `skip_unset` leaves references to unset names as they are written.
    """

    escape: str = "\\"
    raw_quotes: bool = False
    raw_escapes: bool = False
    skip_quotes: bool = False
    skip_unset: bool = False

    def process(self, word: str, env: Mapping[str, str]) -> Expansion:
        """Expand `word` with the names of `env`. Raises DockerfileError (no line: the caller knows it)."""
        return _Run(self, word, env).all()


def expand(word: str, env: Mapping[str, str], *, escape: str = "\\") -> str:
    """`word` as one string, quotes removed. Raises DockerfileError for what BuildKit refuses."""
    return Lexer(escape).process(word, env).result


def expand_words(word: str, env: Mapping[str, str], *, escape: str = "\\") -> list[str]:
    """`word` split at unquoted white space *after* expansion; empty words vanish. Raises DockerfileError."""
    return Lexer(escape).process(word, env).words


def expand_heredoc(content: str, env: Mapping[str, str]) -> str:
    """The body of an unquoted heredoc in COPY or ADD: quotes are plain text, and a backslash, whatever the escape
    character of the file, takes the meaning of what follows it and goes away."""
    return Lexer(skip_quotes=True).process(content, env).result


def references(word: str, *, escape: str = "\\") -> set[str]:
    """The names `word` refers to; empty when it cannot be expanded at all. For lint rules and cache keys."""
    try:
        met = Lexer(escape).process(word, {})
    except DockerfileError:
        return set()
    return set(met.unmatched)


class _AnyName(dict[str, str]):
    def get(self, _name: str, default: Any = None) -> str:
        return "x"


def check_word(word: str, *, escape: str = "\\") -> None:
    """Refuse `word` if its quotes or substitutions are malformed, whatever the names are worth."""
    if "$" in word or "'" in word or '"' in word:
        Lexer(escape).process(word, _AnyName())


class _Words:
    """Collects words; white space ends one only where it was not quoted."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._parts: list[str] = []

    def add_char(self, ch: str) -> None:
        if ch in _SPACE_SET:
            self._flush()
        else:
            self._parts.append(ch)

    def add_raw(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def add_text(self, text: str) -> None:
        first, *others = _SPACE_RUN.split(text)
        self.add_raw(first)
        for piece in others:
            self._flush()
            self.add_raw(piece)

    def _flush(self) -> None:
        if self._parts:
            self.done.append("".join(self._parts))
            self._parts.clear()

    def finish(self) -> list[str]:
        self._flush()
        return self.done


class _Run:
    """One pass over one word. `pos` only moves forward, so the pass is linear."""

    def __init__(self, rules: Lexer, text: str, env: Mapping[str, str]) -> None:
        self.rules = rules
        self.text = text.removeprefix("\ufeff")  # Go's scanner skips a byte order mark at the start
        self.env = env
        self.pos = 0
        self.depth = 0
        self.grown = 0
        self.raw_escapes = rules.raw_escapes
        self.matched: set[str] = set()
        self.unmatched: set[str] = set()

    def all(self) -> Expansion:
        try:
            result, words = self.until(_END, raw_escapes=self.raw_escapes)
        except _Refused as err:
            raise DockerfileError(
                f"failed to process {_quote(self.text)}: {err}", resolution=_hint_for(str(err))
            ) from None
        return Expansion(result, words, frozenset(self.matched), frozenset(self.unmatched))

    def peek(self) -> str:
        return self.text[self.pos] if self.pos < len(self.text) else _END

    def next(self) -> str:
        ch = self.peek()
        self.pos += 1 if ch else 0
        return ch

    def until(self, stop: str, *, raw_escapes: bool) -> tuple[str, list[str]]:
        """Everything up to `stop` (or the end), which is consumed."""
        if self.depth >= _DEEPEST:
            raise _Refused(f"substitutions nested more than {_DEEPEST} deep")
        before, self.raw_escapes = self.raw_escapes, raw_escapes
        self.depth += 1
        try:
            return self._until(stop)
        finally:
            self.raw_escapes = before
            self.depth -= 1

    def _until(self, stop: str) -> tuple[str, list[str]]:
        out: list[str] = []
        words = _Words()
        while ch := self.peek():
            if stop and ch == stop:
                self.pos += 1
                return "".join(out), words.finish()
            if ch == "$":
                value = self.dollar()
                out.append(value)
                words.add_text(value)
            elif ch in "'\"" and not self.rules.skip_quotes:
                value = self.single_quoted() if ch == "'" else self.double_quoted()
                out.append(value)
                words.add_raw(value)
            elif ch == self.rules.escape:
                self.pos += 1
                if self.raw_escapes:
                    words.add_raw(ch)
                    out.append(ch)
                escaped = self.next()
                if not escaped:
                    break
                words.add_raw(escaped)
                out.append(escaped)
            else:
                self.pos += 1
                words.add_char(ch)
                out.append(ch)
        if stop:
            raise _Refused(f"unexpected end of statement while looking for matching {stop}")
        return "".join(out), words.finish()

    def single_quoted(self) -> str:
        end = self.text.find("'", self.pos + 1)
        if end < 0:
            self.pos = len(self.text)
            raise _Refused("unexpected end of statement while looking for matching single-quote")
        inner = self.text[self.pos + 1 : end]
        self.pos = end + 1
        return f"'{inner}'" if self.rules.raw_quotes else inner

    def double_quoted(self) -> str:
        self.pos += 1
        out: list[str] = ['"'] if self.rules.raw_quotes else []
        while ch := self.peek():
            if ch == '"':
                self.pos += 1
                if self.rules.raw_quotes:
                    out.append(ch)
                return "".join(out)
            if ch == "$":
                out.append(self.dollar())
                continue
            self.pos += 1
            if ch == self.rules.escape:
                if self.raw_escapes:
                    out.append(ch)
                following = self.peek()
                if not following:
                    continue
                if following in ('"', "$", self.rules.escape):
                    ch = self.next()
            out.append(ch)
        raise _Refused("unexpected end of statement while looking for matching double-quote")

    def dollar(self) -> str:
        self.pos += 1
        if self.peek() != "{":
            name = self.name()
            if not name:
                return "$"
            value = self.lookup(name)
            if value is None:
                return f"${name}" if self.rules.skip_unset else ""
            return self.counted(value)
        self.pos += 1
        if not self.peek():
            raise _Refused("syntax error: missing '}'")
        if self.peek() in "{}:":
            raise _Refused("syntax error: bad substitution")
        return self.counted(self.braced(self.name()))

    def counted(self, value: str) -> str:
        self.grown += len(value)
        if self.grown > MOST_GROWTH:
            raise _Refused(f"its variables make it longer than {MOST_GROWTH} characters")
        return value

    def braced(self, name: str) -> str:
        """The rest of `${name…}`."""
        op = self.next()
        if op == "}":
            value = self.lookup(name)
            if value is None:
                return f"${{{name}}}" if self.rules.skip_unset else ""
            return value
        if op == "/":
            return self.replace(name)
        empty_is_unset = op == ":"
        sign = op
        if empty_is_unset:
            op = self.next()
            sign += op
        elif op not in ("+", "-", "?", "#", "%"):
            raise _Refused(f"unsupported modifier ({op or 'end of word'}) in substitution")
        word = self.operand("}", "}", raw_escapes=op in ("#", "%"))
        value = self.lookup(name)
        if value is None and self.rules.skip_unset:
            return f"${{{name}{sign}{word}}}"
        absent = value is None or (empty_is_unset and not value)
        if op == "-":
            return word if absent else value or ""
        if op == "+":
            return "" if absent else word
        if op == "?":
            if absent:
                state = "unset" if value is None else "empty"
                raise _Refused(f"{name}: {word or f'is not allowed to be {state}'}")
            return value or ""
        if op in ("#", "%"):
            return _trim(op, word, value or "")
        raise _Refused(f"unsupported modifier ({sign}) in substitution")

    def operand(self, stop: str, missing: str, *, raw_escapes: bool) -> str:
        try:
            return self.until(stop, raw_escapes=raw_escapes)[0]
        except _Refused:
            if not self.peek():
                where = "missing '/' in ${}" if missing == "/" else f"missing '{missing}'"
                raise _Refused(f"syntax error: {where}") from None
            raise

    def replace(self, name: str) -> str:
        every = self.peek() == "/"
        if every:
            self.pos += 1
        pattern = self.operand("/", "/", raw_escapes=True)
        replacement = self.operand("}", "}", raw_escapes=True)
        value = self.lookup(name)
        if value is None and self.rules.skip_unset:
            return f"${{{name}/{pattern}/{replacement}}}"
        return _Glob(pattern).replace(value or "", replacement, every=every)

    def name(self) -> str:
        """A name, a number or one special character; empty when none is here."""
        first = self.peek()
        if first.isdecimal():
            return self._span(str.isdecimal)
        if first and first in _SPECIAL_NAMES:
            self.pos += 1
            return first
        return self._span(lambda ch: ch.isalpha() or ch.isdecimal() or ch == "_")

    def _span(self, accept: Callable[[str], bool]) -> str:
        start = self.pos
        while (ch := self.peek()) and accept(ch):
            self.pos += 1
        return self.text[start : self.pos]

    def lookup(self, name: str) -> str | None:
        value = self.env.get(name)
        (self.unmatched if value is None else self.matched).add(name)
        return value


class _Refused(Exception):
    """The word cannot be expanded; becomes a DockerfileError at the top."""


class _Glob:
    """A shell pattern of `*` and `?` (no brackets) as an automaton of bits.

    State i says that the first i characters of the pattern are matched; `loops` holds the states before a `*`.
    Neither wildcard matches a newline, as in BuildKit's translation to a regular expression.
    """

    def __init__(self, pattern: str, *, backwards: bool = False) -> None:
        tokens = _tokens(pattern)
        if backwards:
            tokens.reverse()
        self.loops = 0
        self.any = 0
        self.masks: dict[str, int] = {}
        count = 0
        for kind, ch in tokens:
            bit = 1 << count
            if kind == "*":
                self.loops |= bit
                continue
            if kind == "?":
                self.any |= bit
            else:
                self.masks[ch] = self.masks.get(ch, 0) | bit
            count += 1
        self.accept = 1 << count
        self._pattern = pattern

    def step(self, states: int, ch: str) -> int:
        if ch == "\n":
            return (states & self.masks.get(ch, 0)) << 1
        return ((states & (self.masks.get(ch, 0) | self.any)) << 1) | (states & self.loops)

    def prefix(self, value: str, *, longest: bool, start: int = 0) -> int | None:
        """Where the shortest or longest match beginning at `start` ends; None when there is none."""
        states, end = 1, None
        for pos in range(start, len(value) + 1):
            if states & self.accept:
                end = pos
                if not longest:
                    return end
            if not states or pos == len(value):
                break
            states = self.step(states, value[pos])
        return end

    def starts(self, value: str) -> list[bool]:
        """For each position, whether some match begins there; one pass from the right."""
        back = _Glob(self._pattern, backwards=True)
        # A star after the last character of the reversed pattern only lengthens a match to the left.
        states, found = 1, [False] * (len(value) + 1)
        for pos in range(len(value), -1, -1):
            found[pos] = bool(states & back.accept)
            if pos:
                states = back.step(states, value[pos - 1]) | 1
        return found

    def replace(self, value: str, replacement: str, *, every: bool) -> str:
        starts = self.starts(value)
        out: list[str] = []
        pos, copied, last_end, size = 0, 0, -1, 0
        while pos <= len(value):
            if not starts[pos]:
                pos += 1
                continue
            end = self.prefix(value, longest=True, start=pos)
            assert end is not None
            if end == pos == last_end:  # an empty match right behind a match does not count
                pos += 1
                continue
            out.append(value[copied:pos])
            out.append(_template(replacement, value[pos:end]) if every else replacement)
            size += len(out[-1])
            if size > MOST_GROWTH:
                raise _Refused(f"its variables make it longer than {MOST_GROWTH} characters")
            copied = last_end = end
            pos = end if end > pos else pos + 1
            if not every:
                break
        out.append(value[copied:])
        return "".join(out)


def _tokens(pattern: str) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    chars = iter(pattern)
    for ch in chars:
        if ch in "*?":
            out.append((ch, ch))
        elif ch == "\\":
            escaped = next(chars, _END)
            if not escaped or escaped not in "*?\\}/":
                raise _Refused(f"invalid pattern ({pattern}) in substitution: invalid escape '\\{escaped}'")
            out.append(("", escaped))
        else:
            out.append(("", ch))
    return out


def _trim(op: str, word: str, value: str) -> str:
    longest = word.startswith(op)
    pattern = word[1:] if longest else word
    if op == "#":
        end = _Glob(pattern).prefix(value, longest=longest)
        return value if end is None else value[end:]
    end = _Glob(pattern, backwards=True).prefix(value[::-1], longest=longest)
    return value if end is None else value[: len(value) - end]


_TEMPLATE = re.compile(r"\$(?:\$|(\w+)|\{(\w+)\})")


def _template(replacement: str, whole: str) -> str:
    # `//` goes through Go's Regexp.Expand, where $0 is the match and other names are empty.
    def fill(found: re.Match[str]) -> str:
        if found.group(0) == "$$":
            return "$"
        return whole if (found.group(1) or found.group(2)) == "0" else ""

    return _TEMPLATE.sub(fill, replacement) if "$" in replacement else replacement


def _quote(text: str) -> str:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _hint_for(problem: str) -> str | None:
    if "quote" in problem:
        return "close the quote, or escape it"
    if "missing '}'" in problem or "bad substitution" in problem:
        return "write ${NAME}; a literal dollar is \\$"
    return None
