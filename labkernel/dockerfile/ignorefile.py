"""`.dockerignore`: which paths of a context are left out.

Go's rules as BuildKit applies them (moby/patternmatcher): `*` and `?` stay within a path component, `**` crosses them,
`!` takes back, the last matching line wins, and a path is matched when one of its parents is. A pattern becomes a
regular expression where that cannot backtrack much, otherwise an automaton of bits, so no pattern is slow. wcmatch was
measured too: it matches 15 of 15 common cases, but not Go's errors, escapes, or `**` inside a word.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import DockerfileError
from .variables import SPACES

_CLASS_ESCAPES = frozenset("dDsSwW")
_CONTROL = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_BACKTRACKING_LIMIT = 1024


class BadPattern(DockerfileError):
    """A line of a .dockerignore that Go's filepath.Match refuses."""


@dataclass(frozen=True)
class _Item:
    """One step of a pattern: lit, class, one (`?`), star (`*`), rest (final `**`), dirs (`**/` or `**` before text)."""

    kind: str
    regex: str
    text: str = ""


@dataclass
class Pattern:
    """One line. `negated` for `!`; `match` looks at the whole path, parents are the matcher's business."""

    text: str
    negated: bool
    _kind: str = field(init=False)
    _items: list[_Item] = field(init=False, repr=False)
    _regex: re.Pattern[str] | None = field(init=False, default=None, repr=False)
    _automaton: _Automaton | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        _check_syntax(self.text)
        self._kind, self._items = _compile(self.text)
        if self._kind == "regex":
            self._regex = re.compile("".join(item.regex for item in self._items), re.ASCII)
            if sum(item.kind in ("star", "rest", "dirs") for item in self._items) > 1:
                self._automaton = _Automaton(self._items)

    @property
    def few_wildcards(self) -> bool:
        return sum(item.kind in ("star", "rest", "dirs") for item in self._items) <= 2

    def match(self, path: str) -> bool:
        if self._kind == "exact":
            return path == self.text
        if self._kind == "prefix":
            return path.startswith(self.text[:-2])
        if self._kind == "suffix":
            suffix = self.text[2:]
            return path.endswith(suffix) or (suffix[:1] == "/" and path == suffix[1:])
        if self._automaton is not None and (len(path) > _BACKTRACKING_LIMIT or not self.few_wildcards):
            return self._automaton.match(path)
        assert self._regex is not None
        return self._regex.fullmatch(path) is not None


class IgnoreMatcher:
    """The patterns of one .dockerignore, in order. Raises BadPattern when made."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns: list[Pattern] = []
        for raw in patterns:
            text = raw.strip(SPACES)
            if not text:
                continue
            text = _clean(text)
            negated = text.startswith("!")
            if negated:
                text = text[1:]
                if not text:
                    raise BadPattern('illegal exclusion pattern: "!"', resolution="write !NAME")
            self.patterns.append(Pattern(text, negated))
        self.has_exceptions = any(pattern.negated for pattern in self.patterns)

    def ignores(self, path: str) -> bool:
        """Whether `path` (slashes, relative to the context) is left out, looking at its parents too."""
        path = _clean(path)
        if path == "." or not self.patterns:
            return False
        candidates = [path]
        parent = posixpath.dirname(path)
        if parent not in ("", "."):
            names = parent.split("/")
            candidates += ["/".join(names[: count + 1]) for count in range(len(names))]
        matched = False
        for pattern in self.patterns:
            if pattern.negated == matched and any(pattern.match(candidate) for candidate in candidates):
                matched = not pattern.negated
        return matched

    def child(self, path: str, parent: Sequence[bool] = ()) -> tuple[bool, tuple[bool, ...]]:
        """As `ignores`, for a walk from the top down: pass the second result of the parent directory.

        `path` must be clean. The parent of a top-level name is `()`.
        """
        matched = False
        hits: list[bool] = []
        for index, pattern in enumerate(self.patterns):
            hit = bool(parent) and parent[index]
            if not hit and pattern.negated == matched:
                hit = pattern.match(path)
            hits.append(hit)
            if hit:
                matched = not pattern.negated
        return matched, tuple(hits)

    def can_skip(self, directory: str) -> bool:
        """Whether nothing below an ignored `directory` can be taken back by a `!` line."""
        if not self.has_exceptions:
            return True
        below = directory.rstrip("/") + "/"
        for pattern in self.patterns:
            if not pattern.negated:
                continue
            fixed = re.split(r"[*?\[\\]", pattern.text, maxsplit=1)[0]
            if (pattern.text + "/").startswith(below) or below.startswith(fixed) or fixed.startswith(below):
                return False
        return True


def read_ignorefile(text: str) -> list[str]:
    """The patterns of a .dockerignore file's text: comments and blank lines gone, leading slashes dropped."""
    return [pattern for line in text.removeprefix("\ufeff").split("\n") if (pattern := _pattern_of(line))]


def ignore_matcher(text: str) -> IgnoreMatcher:
    """The matcher for a .dockerignore file's text. Raises BadPattern with the line."""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        try:
            IgnoreMatcher([_pattern_of(line)])
        except BadPattern as err:
            err.line = err.end_line = number
            raise
    return IgnoreMatcher(read_ignorefile(text))


def ignores(patterns: Iterable[str], path: str) -> bool:
    """Whether `path` is left out by these lines of a .dockerignore. Raises BadPattern."""
    return IgnoreMatcher(_pattern_of(line) for line in patterns).ignores(path)


def _pattern_of(line: str) -> str:
    if line.startswith("#"):
        return ""
    text = line.strip(SPACES)
    negated = text.startswith("!")
    if negated:
        text = text[1:].strip(SPACES)
    if text:
        text = _clean(text)
        if len(text) > 1 and text.startswith("/"):
            text = text[1:]
    return "!" + text if negated else text


def _clean(path: str) -> str:
    # Go's path.Clean; Python's normpath keeps two leading slashes.
    cleaned = posixpath.normpath(path)
    return cleaned[1:] if cleaned.startswith("//") else cleaned


def _check_syntax(pattern: str) -> None:
    """What filepath.Match calls ErrBadPattern: open or empty brackets, a lone dash in them, a final backslash."""
    pos, size = 0, len(pattern)
    while pos < size:
        if pattern[pos] == "\\":
            pos += 1
            if pos >= size:
                raise _bad(pattern)
        elif pattern[pos] == "[":
            pos = _bracket_end(pattern, pos)
        pos += 1


def _bracket_end(pattern: str, pos: int) -> int:
    """Index of the `]` that closes the bracket at `pos`."""
    pos += 1
    if pattern[pos : pos + 1] == "^":
        pos += 1
    ranges = 0
    while True:
        if pattern[pos : pos + 1] == "]" and ranges:
            return pos
        pos = _bracket_char(pattern, pos)
        if pattern[pos] == "-":
            pos = _bracket_char(pattern, pos + 1)
        ranges += 1


def _bracket_char(pattern: str, pos: int) -> int:
    if pattern[pos : pos + 1] in ("", "-", "]"):
        raise _bad(pattern)
    if pattern[pos] == "\\":
        pos += 1
    if pos + 1 >= len(pattern):
        raise _bad(pattern)
    return pos + 1


def _bad(pattern: str) -> BadPattern:
    return BadPattern(
        f"syntax error in pattern: {pattern[:200]}", resolution="escape a literal [ or \\ with a backslash"
    )


def _compile(pattern: str) -> tuple[str, list[_Item]]:
    """The kind of match (exact, prefix, suffix, regex) and its steps, decided as patternmatcher does."""
    kind = "exact"
    items: list[_Item] = []
    pos, first = 0, True
    while pos < len(pattern):
        ch = pattern[pos]
        pos += 1
        if ch == "*" and pattern.startswith("*", pos):
            pos += 1
            if pattern.startswith("/", pos):
                pos += 1
            if pos < len(pattern):
                items.append(_Item("dirs", "(?:.*/)?"))
                kind = "regex"
            elif kind == "exact":
                kind = "prefix"
            else:
                items.append(_Item("rest", ".*"))
                kind = "regex"
            if first:
                kind = "suffix"
        elif ch == "*":
            items.append(_Item("star", "[^/]*"))
            kind = "regex"
        elif ch == "?":
            items.append(_Item("one", "[^/]"))
            kind = "regex"
        elif ch == "[":
            item, pos = _class(pattern, pos)
            items.append(item)
            kind = "regex"
        elif ch == "\\":
            items.append(_escaped(pattern, pattern[pos]))
            pos += 1
            kind = "regex"
        else:
            items.append(_Item("lit", re.escape(ch), ch))
            if ch == "]":
                kind = "regex"
        first = False
    return kind, items


def _escaped(pattern: str, ch: str) -> _Item:
    # The escape reaches Go's regexp package as it is, so \d is a digit there.
    if ch in _CLASS_ESCAPES:
        return _Item("class", f"\\{ch}")
    if ch in _CONTROL:
        return _Item("lit", re.escape(_CONTROL[ch]), _CONTROL[ch])
    if ch.isascii() and ch.isalnum():
        raise _bad(pattern)
    return _Item("lit", re.escape(ch), ch)


def _class(pattern: str, pos: int) -> tuple[_Item, int]:
    """The bracket whose `[` stands before `pos`, as an item, and the position after its `]`."""
    end = _bracket_end(pattern, pos - 1)
    out = ["["]
    if pattern[pos] == "^":
        out.append("^")
        pos += 1
    while pos < end:
        low, pos = _class_char(pattern, pos)
        if pattern[pos] == "-" and pos < end:
            high, pos = _class_char(pattern, pos + 1)
            if low > high:
                raise _bad(pattern)
            out.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            out.append(re.escape(low))
    return _Item("class", "".join(out) + "]"), end + 1


def _class_char(pattern: str, pos: int) -> tuple[str, int]:
    if pattern[pos] == "\\":
        pos += 1
    return pattern[pos], pos + 1


class _Automaton:
    """The steps of a pattern as bits of one integer; each character of the path moves all states at once."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.stay_in_name = self.stay = self.skips = 0
        self._tests: list[tuple[int, re.Pattern[str]]] = []
        self._masks: dict[str, int] = {}
        state = 0
        for item in items:
            bit = 1 << state
            if item.kind == "star":
                self.stay_in_name |= bit
                continue
            if item.kind == "rest":
                self.stay |= bit
                continue
            if item.kind == "dirs":
                # before --> inside (any characters) --/--> after, and before --> after at once
                self.skips |= bit
                state += 1
                self.stay |= 1 << state
                self._tests.append((1 << state, re.compile("/")))
            else:
                self._tests.append((bit, re.compile(item.regex, re.ASCII)))
            state += 1
        self.accept = 1 << state

    def match(self, path: str) -> bool:
        states = self._close(1)
        for ch in path:
            following = (states & self._mask(ch)) << 1
            if ch != "\n":
                following |= states & self.stay
            if ch != "/":
                following |= states & self.stay_in_name
            states = self._close(following)
            if not states:
                return False
        return bool(states & self.accept)

    def _close(self, states: int) -> int:
        while True:
            here = states & self.skips
            wider = states | here << 1 | here << 2
            if wider == states:
                return states
            states = wider

    def _mask(self, ch: str) -> int:
        mask = self._masks.get(ch)
        if mask is None:
            mask = 0
            for bit, test in self._tests:
                if test.fullmatch(ch):
                    mask |= bit
            self._masks[ch] = mask
        return mask
