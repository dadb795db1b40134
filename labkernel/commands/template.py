"""`--format`: the part of Go's text/template that docker lines use, over plain data. Pure.

Known: `{{.A.B}}`, `{{json .}}`, `{{index .A "k"}}`, `{{range}}`, `{{if}}`, `{{with}}`, `{{else}}`, `{{end}}`, variables
(`{{$k, $v := .A}}`, `{{$v}}`), pipes, trim markers, and the functions of docker's own formatter (json, join, split,
lower, upper, title, len, index, slice, println, print, printf, truncate, eq, ne, lt, gt, and, or, not). No templates
within templates, no methods beyond those the data offers.
Source: pkg.go.dev/text/template; docs.docker.com, "Format command and log output".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UsageError

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)|(?P<chain>(?<=\))(?:\.\w+)+)"""
    r"""|(?P<punct>\(|\)|\||:=|,)"""
    r"""|(?P<path>\$?\w*(?:\.\w+)+|\.|\$\w*)|(?P<word>\w+))"""
)
Node = tuple[Any, ...]
_KNOWN = ""  # among the variables, under a name none can have: fields that may be missing


def render(template: str, data: Any, *, document: bool = False) -> str:
    """The text `template` gives for `data` (dicts, lists, strings, numbers, None; callables are methods).

    In a `document` of `inspect` fields that docker leaves out while they are empty are known, too.

    Raises UsageError for a template that is not understood or a field that is not there.
    """
    nodes, rest, _ = _parse(_split(template), 0, ())
    if rest < len(_split(template)):
        raise _error("unexpected {{end}}")
    out: list[str] = []
    _execute(nodes, data, {"$": data, _KNOWN: _LEFT_OUT if document else {}}, out)
    return "".join(out)


def _error(message: str) -> UsageError:
    return UsageError(
        f"template parsing error: {message}", resolution="templates look like --format '{{.Names}}'", exit_code=1
    )


def _split(template: str) -> list[tuple[str, str]]:
    """Text and actions in turn; `{{-` and `-}}` trim the text beside them."""
    pieces: list[tuple[str, str]] = []
    position = 0
    trim = False
    for match in re.finditer(r"\{\{(-(?=\s))?\s*(.*?)\s*((?<=\s)-)?\}\}", template, re.DOTALL):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        pieces.append(("text", text.rstrip() if match.group(1) else text))
        body = match.group(2)
        if not body.startswith("/*"):
            pieces.append(("action", body))
        trim = match.group(3) is not None
        position = match.end()
    rest = template[position:]
    if "{{" in rest:
        raise _error(f"unclosed action in {template!r}")
    pieces.append(("text", rest.lstrip() if trim else rest))
    return pieces


def _parse(pieces: Sequence[tuple[str, str]], index: int, stop: tuple[str, ...]) -> tuple[list[Node], int, str]:
    nodes: list[Node] = []
    while index < len(pieces):
        kind, body = pieces[index]
        index += 1
        if kind == "text":
            nodes.append(("text", body))
            continue
        word, _, rest = body.partition(" ")
        if word in stop:
            return nodes, index, body
        if word in ("if", "range", "with"):
            node, index = _parse_block(pieces, index, word, rest)
            nodes.append(node)
        elif word in ("end", "else"):
            raise _error(f"unexpected {{{{{word}}}}}")
        else:
            nodes.append(("print", *_declaration(body)))
    if stop:
        raise _error("unexpected EOF, an {{end}} is missing")
    return nodes, index, ""


def _parse_block(pieces: Sequence[tuple[str, str]], index: int, word: str, rest: str) -> tuple[Node, int]:
    body, index, ending = _parse(pieces, index, ("end", "else"))
    other: list[Node] = []
    if ending.startswith("else if"):
        nested, index = _parse_block(pieces, index, "if", ending[len("else if") :].strip())
        other = [nested]
    elif ending.startswith("else"):
        other, index, _ = _parse(pieces, index, ("end",))
    return (word, *_declaration(rest), body, other), index


def _declaration(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """`$k, $v := pipeline` as (variables, tokens of the pipeline)."""
    tokens = _tokens(text)
    for place, (_, value) in enumerate(tokens):
        if value == ":=":
            return [v for _, v in tokens[:place] if v != ","], tokens[place + 1 :]
    return [], tokens


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error(f"unexpected {text[position:].strip()!r}")
        tokens.append((str(match.lastgroup), match.group(str(match.lastgroup))))
        position = match.end()
    if not tokens:
        raise _error("missing value for command")
    return tokens


def _execute(nodes: Sequence[Node], dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
            continue
        names, tokens = node[1], node[2]
        value = _pipeline(tokens, dot, variables)
        if node[0] == "print":
            if names:
                variables[names[0]] = value
            else:
                out.append(_text(value))
        elif node[0] == "range":
            _range(node, value, dot, variables, out)
        elif value:
            inner = {**variables, **({names[0]: value} if names else {})}
            _execute(node[3], value if node[0] == "with" else dot, inner, out)
        else:
            _execute(node[4], dot, dict(variables), out)


def _range(node: Node, value: Any, dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    pairs = sorted(value.items()) if isinstance(value, Mapping) else list(enumerate(value or ()))
    if not pairs:
        _execute(node[4], dot, dict(variables), out)
    for key, item in pairs:
        names = node[1]
        bound = {names[0]: key, names[1]: item} if len(names) == 2 else {names[0]: item} if names else {}
        _execute(node[3], item, {**variables, **bound}, out)


def _pipeline(tokens: Sequence[tuple[str, str]], dot: Any, variables: dict[str, Any]) -> Any:
    stages: list[list[tuple[str, str]]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token[1], 0) if token[0] == "punct" else 0
        if token == ("punct", "|") and depth == 0:
            stages.append([])
        else:
            stages[-1].append(token)
    value: Any = None
    for number, stage in enumerate(stages):
        value = _call(stage, dot, variables, [value] if number else [])
    return value


def _call(tokens: list[tuple[str, str]], dot: Any, variables: dict[str, Any], piped: list[Any]) -> Any:
    if not tokens:
        raise _error("missing value for command")
    kind, word = tokens[0]
    if kind == "word" and word not in ("true", "false", "nil"):
        if word not in _FUNCTIONS:
            raise _error(f'function "{word}" not defined')
        try:
            return _FUNCTIONS[word](*_operands(tokens[1:], dot, variables), *piped)
        except (TypeError, KeyError, IndexError, ValueError) as err:
            raise _error(f"error calling {word}: {err}") from None
    values = _operands(tokens, dot, variables)
    head, arguments = values[0], [*values[1:], *piped]
    if callable(head):
        return head(*arguments)
    if arguments:
        raise _error(f"can't give argument to non-function {word}")
    return head


def _operands(tokens: Sequence[tuple[str, str]], dot: Any, variables: dict[str, Any]) -> list[Any]:
    values: list[Any] = []
    index = 0
    while index < len(tokens):
        kind, word = tokens[index]
        index += 1
        if word == "(" and kind == "punct":
            start, depth = index, 1
            while index < len(tokens) and depth:
                depth += {"(": 1, ")": -1}.get(tokens[index][1], 0)
                index += 1
            if depth:
                raise _error("unclosed left paren")
            values.append(_pipeline(tokens[start : index - 1], dot, variables))
        elif kind == "chain":  # (index .Networks "web").IPAddress
            values.append(_follow(values.pop(), word.split("."), variables))
        else:
            values.append(_operand(kind, word, dot, variables))
    return values


def _operand(kind: str, word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if kind == "string":
        return word[1:-1] if word[0] == "`" else json.loads(word)
    if kind == "number":
        return float(word) if "." in word else int(word)
    if kind == "word":
        return {"true": True, "false": False, "nil": None}.get(word, word)
    if kind != "path":
        raise _error(f"unexpected {word!r}")
    head, *names = word.split(".")
    if head and head not in variables:
        raise _error(f"undefined variable {head!r}")
    return _follow(variables[head] if head else dot, names, variables)


def _follow(value: Any, names: Sequence[str], variables: Mapping[str, Any]) -> Any:
    for name in filter(None, names):
        value = _field(value, name, variables[_KNOWN])
    return value


class _Nil:
    """A field of docker's that is nil: empty in every condition and loop, `null` in JSON, printed by its type."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


_NIL = {
    **dict.fromkeys(
        "Aliases Binds CapAdd CapDrop Cmd DNSNames DeviceCgroupRules DeviceRequests Entrypoint ExecIDs ExtraHosts "  # noqa: SIM905
        "GroupAdd Links OnBuild SecurityOpt Shell Ulimits VolumesFrom".split(),
        _Nil("[]"),
    ),
    **dict.fromkeys("DriverOpts ExposedPorts Labels Options StorageOpt Sysctls Tmpfs Volumes".split(), _Nil("map[]")),  # noqa: SIM905
}
# What docker's documents leave out when it is empty, though its templates know it.
_LEFT_OUT: dict[str, Any] = {
    **dict.fromkeys("Health Healthcheck Init SizeRootFs SizeRw StopTimeout".split()),  # noqa: SIM905
    **dict.fromkeys("Comment DockerVersion Driver MacAddress Name StopSignal Variant".split(), ""),  # noqa: SIM905
    **dict.fromkeys("Mounts".split(), _Nil("[]")),  # noqa: SIM905
    **_NIL,
}


def _field(value: Any, name: str, known: Mapping[str, Any]) -> Any:
    if value is None or isinstance(value, _Nil):
        return None
    if isinstance(value, Mapping):
        if name in value:
            found = value[name]
            return _NIL.get(name, _Nil("<nil>")) if found is None else found
        if name in known:
            return _Nil("<nil>") if known[name] is None else known[name]
        near = next((key for key in value if str(key).lower() == name.lower()), None)
        hint = f"did you mean `.{near}`?" if near else f"there is: {' '.join(sorted(map(str, value)))}"
        raise UsageError(f'template: no entry for field "{name}"', resolution=hint, exit_code=1)
    raise UsageError(f'template: can\'t evaluate field "{name}" in {type(value).__name__}', exit_code=1)


def _text(value: Any) -> str:
    """Values as Go's fmt prints them."""
    if isinstance(value, _Nil):
        return value.text
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{key}:{_text(item)}" for key, item in sorted(value.items())) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_text(item) for item in value) + "]"
    return str(value() if callable(value) else value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Nil):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not callable(item)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key, "") if isinstance(value, Mapping) else None if value is None else value[key]
    return value


def _slice(value: Any, *bounds: int) -> Any:
    return value[slice(*bounds)] if len(bounds) == 2 else value[bounds[0] if bounds else 0 :]


def _printf(form: str, *values: Any) -> str:
    converted = [value if isinstance(value, (int, float)) else _text(value) for value in values]
    form = re.sub(r"%(-?\d*(?:\.\d+)?)[vq]", r"%\1s", form)
    return form % tuple(converted)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": lambda value: json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False),
    "join": lambda values, separator: separator.join(map(_text, values or ())),
    "split": lambda text, separator: str(text).split(separator),
    "lower": lambda text: str(text).lower(),
    "upper": lambda text: str(text).upper(),
    "title": lambda text: str(text).title(),
    "len": lambda value: len(value or ()),
    "index": _index,
    "print": lambda *values: "".join(map(_text, values)),
    "slice": _slice,
    "println": lambda *values: " ".join(map(_text, values)) + "\n",
    "printf": _printf,
    "truncate": lambda text, length: str(text)[:length],
    "pad": lambda text, before, after: " " * before + str(text) + " " * after,
    "eq": lambda value, *others: any(value == other for other in others),
    "ne": lambda value, other: value != other,
    "lt": lambda value, other: value < other,
    "gt": lambda value, other: value > other,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
}
