"""Ignore rules: tests/data/dockerfile/ignore.json holds [patterns, path, ignored]; null means refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkernel.dockerfile.ignorefile import BadPattern, IgnoreMatcher, ignore_matcher, ignores, read_ignorefile

CASES = json.loads((Path(__file__).parents[1] / "data" / "dockerfile" / "ignore.json").read_text())


@pytest.mark.parametrize(("patterns", "path", "expected"), CASES)
def test_ignores(patterns: list[str], path: str, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(BadPattern):
            ignores(patterns, path)
    else:
        assert ignores(patterns, path) is expected


@pytest.mark.parametrize(("patterns", "path", "expected"), [case for case in CASES if case[2] is not None])
def test_walk_agrees(patterns: list[str], path: str, expected: bool) -> None:
    if path == ".":
        pytest.skip("the context itself is never walked")
    matcher = ignore_matcher("\n".join(patterns))
    state: tuple[bool, ...] = ()
    names = path.split("/")
    for depth in range(len(names)):
        matched, state = matcher.child("/".join(names[: depth + 1]), state)
        if matched and matcher.can_skip("/".join(names[: depth + 1])):
            break
    assert matched is expected


@pytest.mark.parametrize("pattern", ["**/a/**/b*", "*a*b*c", "a**b**c**d", "x/**/*[ab]?/**"])
def test_automaton_agrees_with_regex(pattern: str) -> None:
    one = IgnoreMatcher([pattern]).patterns[0]
    for path in ("a/b", "x/a/y/b1", "xaybzc", "ab/c/d", "a/q/b/w/c/d", "x/yab/z", "x/y/qa1/z", "aabbcc", "abcd", "b"):
        assert one._machine().match(path) == (one._compile()[3].fullmatch(path) is not None), path


def test_file_lines() -> None:
    assert read_ignorefile("\ufeff# c\n a \n\n!/b/\n! c\n/d//e\r\n") == ["a", "!b", "!c", "d/e"]
    with pytest.raises(BadPattern) as caught:
        ignore_matcher("a\n[\n")
    assert caught.value.line == 2


def test_skipping_directories() -> None:
    matcher = IgnoreMatcher(["*", "!src/app/*.py", "!*.md"])
    assert not matcher.can_skip("src")
    assert not matcher.can_skip("src/app")
    assert IgnoreMatcher(["*"]).can_skip("src")
    assert IgnoreMatcher(["*", "!src"]).can_skip("build")
