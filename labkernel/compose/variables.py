"""`${VAR:-default}` in Compose files, and the `.env` files that give variables their values. Pure.

Source: Compose specification, "Interpolation"; docker documentation, "Set environment variables", ".env file syntax".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .document import ComposeError, Node

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATORS = (":-", ":?", ":+", "-", "?", "+")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$", "'": "'"}


class Invalid(ValueError):
    """Not an interpolation."""


class Missing(ValueError):
    """A variable that `?` requires."""


class Substitution:
    """Substitutes in strings; `unset` collects the names that had no value and no default."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self.unset: dict[str, None] = {}

    def text(self, text: str) -> str:
        """Raises Invalid, Missing."""
        if "$" not in text:
            return text
        result, end = self._until(text, 0, closing=False)
        assert end == len(text)
        return result

    def node(self, node: Node, path: str = "") -> Node:
        """The tree with its strings substituted. Raises ComposeError with the place."""
        if isinstance(node.value, dict):
            found = {key: self.node(item, f"{path}.{key}" if path else key) for key, item in node.value.items()}
            return Node(found, node.file, node.line, node.tag)
        if isinstance(node.value, list):
            items = [self.node(item, f"{path}.[{index}]") for index, item in enumerate(node.value)]
            return Node(items, node.file, node.line, node.tag)
        if not isinstance(node.value, str) or "$" not in node.value:
            return node
        try:
            return Node(self.text(node.value), node.file, node.line, node.tag)
        except Invalid:
            raise node.error(
                f'invalid interpolation format for {path}: "{node.value}"',
                resolution="a $ of its own is written $$",
            ) from None
        except Missing as err:
            raise node.error(
                f"error while interpolating {path}: {err}", resolution="set it in the environment or in .env"
            ) from None

    def _until(self, text: str, start: int, *, closing: bool) -> tuple[str, int]:
        """(substituted, where it ended): up to the `}` of our own level, or to the end."""
        out: list[str] = []
        index = start
        while index < len(text):
            char = text[index]
            if char == "}" and closing:
                return "".join(out), index
            if char != "$":
                out.append(char)
                index += 1
            elif text.startswith("$$", index):
                out.append("$")
                index += 2
            elif text.startswith("${", index):
                piece, index = self._braced(text, index + 2)
                out.append(piece)
            elif (found := _NAME.match(text, index + 1)) is not None:
                out.append(self._value(found[0]) or "")
                index = found.end()
            else:
                raise Invalid
        if closing:
            raise Invalid
        return "".join(out), index

    def _braced(self, text: str, index: int) -> tuple[str, int]:
        found = _NAME.match(text, index)
        if found is None:
            raise Invalid
        name, index = found[0], found.end()
        if text.startswith("}", index):
            return self._value(name) or "", index + 1
        operator = next((each for each in _OPERATORS if text.startswith(each, index)), None)
        if operator is None:
            raise Invalid
        # What is not taken is not warned about.
        known = dict(self.unset)
        word, end = self._until(text, index + len(operator), closing=True)
        value = self._values.get(name)
        given = value is not None and (value != "" or not operator.startswith(":"))
        if operator[-1] == "+":
            taken = word if given else ""
        elif given:
            taken = value or ""
        elif operator[-1] == "?":
            raise Missing(f"required variable {name} is missing a value" + (f": {word}" if word else ""))
        else:
            return word, end + 1
        if taken != word:
            self.unset = known
        return taken, end + 1

    def _value(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is None:
            self.unset[name] = None
        return value


def parse_env(text: str, file: str, outer: Mapping[str, str]) -> dict[str, str | None]:
    """The variables of a `.env` or `env_file`; None for a name without `=` that `outer` does not have.

    `outer` is what `${…}` sees beside the names above it. Single quotes are literal, double quotes know `\\n` and
    substitution, both may go over several lines; ` #` begins a comment outside them. Raises ComposeError.
    """
    found: dict[str, str | None] = {}
    index, line = 0, 1
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    pattern = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][\w.\-]*)[ \t]*(=|:[ \t]|\n|\Z|(?=#))?[ \t]*")
    while index < len(text):
        end = text.find("\n", index)
        end = len(text) if end < 0 else end
        bare = text[index:end].strip()
        if not bare or bare.startswith("#"):
            index, line = end + 1, line + 1
            continue
        head = pattern.match(text, index)
        if head is None or head[2] is None:
            raise ComposeError(f'unexpected character in variable name near "{bare[:60]}"', file=file, line=line)
        if head[2] not in ("=", ": "):
            if head[1] in outer:
                found[head[1]] = outer[head[1]]
            else:
                found[head[1]] = None
            index, line = end + 1, line + 1
            continue
        substitution = Substitution({**outer, **{name: value for name, value in found.items() if value is not None}})
        try:
            value, after = _env_value(text, head.end(), substitution)
        except (Invalid, Missing) as err:
            raise ComposeError(str(err) or f'invalid template: "{bare[:60]}"', file=file, line=line) from None
        found[head[1]] = value
        line += text.count("\n", index, after) + 1
        index = after + 1
    return found


def _env_value(text: str, start: int, substitution: Substitution) -> tuple[str, int]:
    """(value, index of the newline that ends it)."""
    quote = text[start : start + 1]
    if quote in ("'", '"') and quote:
        out: list[str] = []
        index = start + 1
        while index < len(text) and text[index] != quote:
            if quote == '"' and text[index] == "\\" and index + 1 < len(text):
                escaped = text[index + 1]
                # A dollar stays escaped until after the substitution.
                out.append("$$" if escaped == "$" else _ESCAPES.get(escaped, "\\" + escaped))
                index += 2
            else:
                out.append(text[index])
                index += 1
        if index >= len(text):
            raise Invalid(f"unterminated quoted value {text[start : start + 20]}")
        end = text.find("\n", index)
        value = "".join(out)
        return (substitution.text(value) if quote == '"' else value), len(text) if end < 0 else end
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    raw = text[start:end]
    raw = "" if raw.startswith("#") else re.split(r"\s#", raw, maxsplit=1)[0]
    return substitution.text(raw.strip()), end
