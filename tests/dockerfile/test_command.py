"""`labkernel dockerfile …`: JSON on standard output, exit status, the error's lines on standard error."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from labkernel.commands.dockerfile import dockerfile


def run(verb: str, text: str | bytes) -> tuple[int, str, str]:
    done = CliRunner().invoke(dockerfile, [verb], input=text)
    return done.exit_code, done.stdout, done.stderr


def answers(verb: str, items: Any) -> Any:
    status, out, _ = run(verb, json.dumps(items))
    assert status == 0
    return json.loads(out)


def test_parse() -> None:
    status, out, _ = run("parse", "FROM a\nONBUILD RUN x\n")
    nested = {"instruction": "RUN", "flags": [], "args": ["x"], "json_form": False, "heredocs": []}
    assert status == 0
    assert json.loads(out)[1]["args"] == [{**nested, "line": 2, "end_line": 2}]
    assert run("parse", "FROM a\nRUN <<EOF\n")[0] != 0
    assert run("parse", b"FROM a\nRUN \xff\xfe\n")[0] == 0
    assert run("parse", "")[0] != 0


def test_check() -> None:
    assert run("check", "FROM a\n") == (0, "", "")
    status, out, err = run("check", "FROM a\nRUNN x\n")
    assert (status, out) == (1, "")
    assert err.startswith("Dockerfile:2: ")
    assert "2 | >>> RUNN x" in err
    status, _, err = run("check", "# check=error=true\nFROM a AS B\n")
    assert status == 1
    assert "StageNameCasing" in err


def test_expand() -> None:
    items = [
        {"word": "$a b", "env": {"a": "x y"}, "mode": "word"},
        {"word": "$a b", "env": {"a": "x y"}, "mode": "words"},
        {"word": "${a", "env": {}, "mode": "word"},
    ]
    first, second, third = answers("expand", items)
    assert (first, second) == ({"result": "x y b"}, {"result": ["x", "y", "b"]})
    assert "error" in third


def test_ignore() -> None:
    items = [{"patterns": ["a"], "path": "a/b"}, {"patterns": ["a"], "path": "b"}, {"patterns": ["["], "path": "b"}]
    first, second, third = answers("ignore", items)
    assert (first, second) == (True, False)
    assert "error" in third


def test_bad_json_is_refused() -> None:
    assert run("expand", "{")[0] != 0
    assert run("ignore", "[" * 5000)[0] != 0
    assert "error" in answers("expand", [{"word": 1}])[0]
