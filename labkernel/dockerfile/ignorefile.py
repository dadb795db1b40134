"""`.dockerignore`: which paths of a context are left out.

Go's rules as BuildKit applies them (moby/patternmatcher): `*` and `?` stay within a path component, `**` crosses them,
`!` takes back, the last matching line wins, and a path is matched when one of its parents is. A pattern becomes a
regular expression where that cannot backtrack much, otherwise an automaton of bits, so no pattern is slow. wcmatch,
which matches the common cases, has neither Go's errors and escapes nor its `**` inside a word.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from ..errors import DockerfileError
from .variables import SPACES

_CLASS_ESCAPES = frozenset("dDsSwW")
_CONTROL = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_BACKTRACKING_LIMIT = 1024


class BadPattern(DockerfileError):
    """A line of a .dockerignore that Go's filepath.Match refuses."""


class _Item(Struct, frozen=True):
    """One step of a pattern: lit, class, one (`?`), star (`*`), rest (final `**`), dirs (`**/` or `**` before text)."""

    kind: str
    regex: str
    text: str = ""


class Pattern:
    """One line. `negated` for `!`."""

    def __init__(self, text: str, *, negated: bool = False) -> None:
        _check_syntax(text)
        self.text = text
        self.negated = negated
        self._compiled: tuple[str, list[_Item], int, re.Pattern[str]] | None = None
        self._automaton: _Automaton | None = None

    def _compile(self) -> tuple[str, list[_Item], int, re.Pattern[str]]:
        # Late, as in Go: a malformed pattern that is never asked about is no error there.
        if self._compiled is None:
            kind, items = _compile(self.text)
            wildcards = sum(item.kind in ("star", "rest", "dirs") for item in items)
            regex = re.compile("".join(item.regex for item in items) if kind == "regex" else "", re.ASCII)
            self._compiled = kind, items, wildcards, regex
        return self._compiled

    def match(self, path: str, end: int | None = None) -> bool:
        """Whether the whole of `path[:end]` matches; parents are not looked at."""
        end = len(path) if end is None else end
        kind, _items, wildcards, regex = self._compile()
        if kind == "exact":
            return end == len(self.text) and path.startswith(self.text)
        if kind == "prefix":
            return path.startswith(self.text[:-2], 0, end)
        if kind == "suffix":
            suffix = self.text[2:]
            return path.endswith(suffix, 0, end) or (suffix[:1] == "/" and path[:end] == suffix[1:])
        if wildcards > 2 or len(path) > _BACKTRACKING_LIMIT:
            return self._machine().match(path[:end])
        return regex.fullmatch(path, 0, end) is not None

    def match_with_parents(self, path: str, parents: Sequence[int]) -> bool:
        """Whether `path` or one of `path[:end] for end in parents` matches."""
        kind, _items, wildcards, _regex = self._compile()
        if kind == "exact":
            size = len(self.text)
            return path.startswith(self.text) and (size == len(path) or path[size] == "/")
        if kind == "regex" and (wildcards > 2 or len(path) > _BACKTRACKING_LIMIT):
            return self._machine().match(path, parents=True)
        return self.match(path) or any(self.match(path, end) for end in parents)

    def _machine(self) -> _Automaton:
        if self._automaton is None:
            self._automaton = _Automaton(self._compile()[1])
        return self._automaton


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
            self.patterns.append(Pattern(text, negated=negated))
        self.has_exceptions = any(pattern.negated for pattern in self.patterns)

    def ignores(self, path: str) -> bool:
        """Whether `path` (slashes, relative to the context) is left out, looking at its parents too."""
        path = _clean(path)
        if path == "." or not self.patterns:
            return False
        parents = [index for index, ch in enumerate(path) if ch == "/"]
        matched = False
        for pattern in self.patterns:
            if pattern.negated == matched and pattern.match_with_parents(path, parents):
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
    """Refuse what filepath.Match(pattern, ".") calls ErrBadPattern: open or empty brackets, a final backslash.

    Match reads a pattern from star to star and stops at the first part that cannot match, so a mistake behind it shows
    only when the pattern is compiled, that is, when it is first asked about a path.
    """
    left, pos, size = ".", 0, len(pattern)
    while pos < size:
        star = pattern[pos] == "*"
        while pos < size and pattern[pos] == "*":
            pos += 1
        parts, pos = _chunk(pattern, pos)
        if star and not parts:
            return
        for skipped in range(len(left) + 1 if star else 1):
            tail = left[skipped:]
            if _fits(parts, tail) and (len(parts) == len(tail) or pos < size):
                left = tail[len(parts) :]
                break
        else:
            return


def _fits(parts: Sequence[str], text: str) -> bool:
    return len(parts) <= len(text) and all(_accepts(part, ch) for part, ch in zip(parts, text, strict=False))


def _accepts(part: str, ch: str) -> bool:
    if part.startswith("["):
        try:
            return re.fullmatch(_class(part, 1)[0].regex, ch) is not None
        except BadPattern:
            return False  # a range the wrong way round matches nothing here
    return part == "?" or part[-1] == ch


def _chunk(pattern: str, pos: int) -> tuple[list[str], int]:
    """The single-character parts up to the next star, and where it stands. Raises BadPattern."""
    parts: list[str] = []
    while pos < len(pattern) and pattern[pos] != "*":
        start = pos
        if pattern[pos] == "\\":
            pos += 1
            if pos >= len(pattern):
                raise _bad(pattern)
        elif pattern[pos] == "[":
            pos = _bracket_end(pattern, pos)
        pos += 1
        parts.append(pattern[start:pos])
    return parts, pos


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
        elif ch == "\\" and pos == len(pattern):
            # Go's expression then ends in `\$`: a dollar, and no end.
            items += [_Item("lit", r"\$", "$"), _Item("rest", "(?s:.*)")]
            kind = "regex" if kind != "exact" else kind
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
    if not ch.isascii() or ch.isalnum():
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

    def match(self, path: str, *, parents: bool = False) -> bool:
        """Whether `path` matches; with `parents`, whether it does up to some slash."""
        states = self._close(1)
        for ch in path:
            if parents and ch == "/" and states & self.accept:
                return True
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
