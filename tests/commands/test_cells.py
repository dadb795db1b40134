"""The words around a magic: variables, comments, help, values of lines that are not the last, completion."""

from __future__ import annotations

import ast
import shlex
from typing import Any

import pytest

from labkernel.commands.cells import HelpLines, ShowDiscarded, expand, split
from labkernel.errors import UsageError


class Thing:
    id = "0123456789abcdef"
    name = "web server"


Thing.__module__ = "labkernel.running.container"
NAMES: dict[str, Any] = {"n": 5, "text": "two words", "c": Thing(), "both": [Thing(), "x"], "json": __import__("json")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("run web{n}", ["run", "web5"]),
        ("run $text", ["run", "two words"]),
        ("run {text}", ["run", "two words"]),
        ('run "say {text}"', ["run", "say two words"]),
        ("run '{text} $n'", ["run", "{text} $n"]),
        ("ps --format {{.Names}}", ["ps", "--format", "{{.Names}}"]),
        ("ps --format '{{.Names}}'", ["ps", "--format", "{{.Names}}"]),
        ("ps --format {{n}}", ["ps", "--format", "{{n}}"]),
        ("run sh -c 'echo $HOME'", ["run", "sh", "-c", "echo $HOME"]),
        ('run sh -c "echo $nothing ${n}"', ["run", "sh", "-c", "echo $nothing ${n}"]),
        ("rm {c}", ["rm", "0123456789abcdef"]),
        ("rm $c", ["rm", "0123456789abcdef"]),
        ("rm {c.name}", ["rm", "web server"]),
        ("rm {c.nothing}", ["rm", "{c.nothing}"]),
        ("rm {both}", ["rm", "0123456789abcdef", "x"]),
        ("run awk {print}", ["run", "awk", "{print}"]),
        ("run x {n+1} {}", ["run", "x", "{n+1}", "{}"]),
        (r"run \{n\} \$n", ["run", "{n}", "$n"]),
        ("ps -a   # all of them", ["ps", "-a"]),
        ("run x a#b '# kept'", ["run", "x", "a#b", "# kept"]),
    ],
)
def test_variables(line: str, expected: list[str]) -> None:
    assert shlex.split(expand(line, NAMES)) == expected


@pytest.mark.parametrize(
    ("line", "words", "silent"),
    [
        ("ps -a", ["ps", "-a"], False),
        ("ps -a;", ["ps", "-a"], True),
        ("ps -a ;", ["ps", "-a"], True),
        ("run x sh -c 'a; b;'", ["run", "x", "sh", "-c", "a; b;"], False),
        ("", [], False),
    ],
)
def test_words(line: str, words: list[str], silent: bool) -> None:
    assert split(line) == (words, silent)


def test_open_quote() -> None:
    with pytest.raises(UsageError, match="no closing quotation"):
        split("run 'x")


def test_question_mark_asks_for_help_only_behind_commands() -> None:
    lines = HelpLines(("container",), lambda name, words: words == ["run"])
    assert lines(["%container run?\n"]) == ["get_ipython().run_line_magic('container', 'run --help')\n"]
    assert lines(["  %container run ??\n"]) == ["  get_ipython().run_line_magic('container', 'run --help')\n"]
    assert lines(["%container run x echo what?\n"]) == [
        "get_ipython().run_line_magic('container', 'run x echo what?')\n"
    ]
    assert lines(["%container?\n", "x = 1\n"]) == ["%container?\n", "x = 1\n"]
    assert lines(["%%dockerfile\n", "RUN echo %container run?\n"])[1] == "RUN echo %container run?\n"


def test_values_of_lines_in_the_middle_are_shown() -> None:
    call = "get_ipython().run_line_magic('container', 'ps')"
    other = "get_ipython().run_line_magic('time', 'x')"
    code = f"{call}\n{other}\nc = {call}\nfor i in x:\n    {call}\n{call}\n"
    tree = ShowDiscarded(("container",)).visit(ast.parse(code))
    compile(tree, "cell", "exec")
    lines = ast.unparse(tree).splitlines()
    shown = ["show(" in line for line in lines]
    assert shown == [True, False, False, False, True, False]
