"""Expansion: tests/data/dockerfile/expand.json holds [mode, word, result]; null means refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkernel.dockerfile.variables import expand, expand_heredoc, expand_words, references
from labkernel.errors import DockerfileError

ENV = {"A": "foo/bar/baz.tar.gz", "E": "", "N": "1", "S": "*b*c", "W": "x  y ", "é": "ü"}
CASES = json.loads((Path(__file__).parents[1] / "data" / "dockerfile" / "expand.json").read_text())


@pytest.mark.parametrize(("mode", "word", "expected"), CASES)
def test_expand(mode: str, word: str, expected: Any) -> None:
    run = expand if mode == "word" else expand_words
    if expected is None:
        with pytest.raises(DockerfileError):
            run(word, ENV)
    else:
        assert run(word, ENV) == expected


def test_other_escape() -> None:
    assert expand("`$A\\", ENV, escape="`") == "$A\\"


def test_heredoc_bodies_keep_quotes() -> None:
    assert expand_heredoc('it\'s "$N" \\\\n \\$N', ENV) == 'it\'s "1" \\n $N'
    assert expand_heredoc("a\\\nb\\c", ENV) == "a\nbc"


def test_references() -> None:
    assert references("$a ${b:-$c} '$d' \\$e") == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("word", "value", "expected"),
    [
        ("${v//a/b}", "banana", "bbnbnb"),
        ("${v//a*/x}", "banana", "bx"),
        ("${v//?/x}", "abc", "xxx"),
        ("${v/#b/x}", "banana", "banana"),
        ("${v%a*}", "banana", "banan"),
        ("${v%%a*}", "banana", "b"),
        ("${v#*a}", "banana", "nana"),
        ("${v##*a}", "banana", ""),
    ],
)
def test_patterns(word: str, value: str, expected: str) -> None:
    assert expand(word, {"v": value}) == expected
