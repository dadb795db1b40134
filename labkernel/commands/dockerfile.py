"""`labkernel dockerfile parse|check|expand|ignore`: the language on its own, standard input to JSON.

Needs no engine and starts none. The JSON shapes are a stable interface: editors, courses and tests rely on them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from ..errors import DockerfileError, LabkernelError, UsageError

REFUSED = 1


@click.group(name="dockerfile", help="Parse, check and explain Dockerfiles without building (standard input to JSON).")
def dockerfile() -> None:
    """The group `cli` mounts."""


@dockerfile.command("parse")
def parse_command() -> None:
    """A Dockerfile on standard input to a JSON list of its instructions."""
    from ..dockerfile.parser import parse

    text = _read_text()
    try:
        nodes = [node.to_dict() for node in parse(text).nodes]
    except DockerfileError as err:
        _refuse(err, text)
    _print(nodes)


@dockerfile.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print the warnings of the build checks as JSON.")
def check_command(*, as_json: bool) -> None:
    """Exit 0 when the Dockerfile on standard input is acceptable; warnings go to standard error."""
    from ..dockerfile.graph import refuse_later, verify
    from ..dockerfile.lint import lint, lint_error, options
    from ..dockerfile.parser import parse

    text = _read_text()
    try:
        parsed = parse(text)
        program = verify(parsed)
        refuse_later(program, range(len(program.stages)))
        settings = options(parsed)
        warnings = lint(program, settings)
        if as_json:
            _print([warning.to_dict() for warning in warnings])
        else:
            for warning in warnings:
                click.echo(f"warning: {warning.short()}", err=True)
        failed = lint_error(warnings, settings)
        if failed is not None:
            raise failed
    except DockerfileError as err:
        _refuse(err, text)


@dockerfile.command("expand")
def expand_command() -> None:
    """A JSON list of {word, env, mode} on standard input to a list of {result} or {error}."""
    from ..dockerfile.variables import expand, expand_words

    answers: list[dict[str, Any]] = []
    for item in _read_list():
        word, env, mode = item.get("word"), item.get("env") or {}, item.get("mode", "word")
        escape = item.get("escape", "\\")
        try:
            _require(isinstance(word, str), "`word` must be a string")
            _require(mode in ("word", "words"), "`mode` is word or words")
            _require(escape in ("\\", "`"), "`escape` is \\ or `")
            env = _environment(env)
            if mode == "word":
                answers.append({"result": expand(str(word), env, escape=escape)})
            else:
                answers.append({"result": expand_words(str(word), env, escape=escape)})
        except LabkernelError as err:
            answers.append({"error": err.brief})
    _print(answers)


@dockerfile.command("ignore")
def ignore_command() -> None:
    """A JSON list of {patterns, path} on standard input to a list of true, false or {error}."""
    from ..dockerfile.ignorefile import ignores

    answers: list[bool | dict[str, str]] = []
    for item in _read_list():
        patterns, path = item.get("patterns"), item.get("path")
        try:
            listed = isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)
            _require(listed, "`patterns` must be a list of strings")
            _require(isinstance(path, str), "`path` must be a string")
            answers.append(ignores(patterns or [], str(path)))
        except LabkernelError as err:
            answers.append({"error": err.brief})
    _print(answers)


def _environment(env: Any) -> dict[str, str]:
    if isinstance(env, list):  # ["NAME=value"], as docker writes environments
        env = dict(item.partition("=")[::2] for item in env if isinstance(item, str))
    _require(isinstance(env, dict) and all(isinstance(value, str) for value in env.values()), "`env` maps to strings")
    return dict(env)


def _require(condition: bool, message: str) -> None:  # noqa: FBT001
    if not condition:
        raise UsageError(message)


def _read_text() -> str:
    # As Go's decoder does: every byte that is not UTF-8 becomes one U+FFFD.
    data: bytes = sys.stdin.buffer.read()
    text = data.decode("utf-8", "surrogateescape")
    return "".join("\ufffd" if "\ud800" <= ch <= "\udfff" else ch for ch in text) if not text.isascii() else text


def _read_list() -> list[dict[str, Any]]:
    text = _read_text()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise click.ClickException(f"standard input is not JSON: {err}") from None
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise click.ClickException("standard input must be a JSON list of objects")
    return data


def _print(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def _refuse(err: DockerfileError, text: str) -> None:
    from ..dockerfile.parser import excerpt

    where = ""
    if err.line is not None:
        where = f"{err.line}" if err.end_line in (None, err.line) else f"{err.line}-{err.end_line}"
        where = f"Dockerfile:{where}: "
    click.echo(f"{where}{err.brief}", err=True)
    if err.line is not None:
        click.echo(excerpt(text.removeprefix("\ufeff"), err.line, err.end_line), err=True)
    if err.resolution:
        click.echo(f"hint: {err.resolution}", err=True)
    sys.exit(REFUSED)
