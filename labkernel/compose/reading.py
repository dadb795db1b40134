"""Reading single values of a Compose file: each function takes a node and its path, and gives plain data.

They raise ComposeError in Compose's words, with the line. What a program would print back is the same value again, so
reading what `config` wrote gives the same project.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .document import ComposeError, Node
from .merging import as_mapping, as_named
from .values import duration_ns, duration_text, size_bytes


@dataclass
class Surroundings:
    """What a file does not say itself: the project's directory and environment, and where paths of other files begin.

    `warnings` collects what is known and not carried out."""

    directory: Path
    environment: Mapping[str, str]
    bases: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def path(self, node: Node, text: str) -> str:
        """A path of a file, absolute: relative ones begin at the project's directory, or at an extended file's."""
        if text.startswith("~"):
            text = os.path.expanduser(text)
        return os.path.normpath(self.bases.get(node.file, self.directory) / text)


Reader = Callable[[Node, str, Surroundings], Any]


def keys(node: Node, path: str, known: Iterable[str]) -> dict[str, Node]:
    """The items of a map, without `x-…`; others than `known` raise."""
    if node.value is None:
        return {}
    if not isinstance(node.value, dict):
        raise node.error(f"{path} must be a mapping", resolution=f"here is a {node.kind}")
    names = set(known)
    found = {}
    for key, item in node.value.items():
        if key in names:
            found[key] = item
        elif not key.startswith("x-"):
            near = difflib.get_close_matches(key, names, 1)
            raise item.error(
                f"{path} additional properties '{key}' not allowed",
                resolution=f"did you mean {near[0]}?" if near else None,
            )
    return found


def text(node: Node, path: str, around: Surroundings) -> str:
    """A string; numbers are taken as they are written in plain notation."""
    if node.value is None or isinstance(node.value, (dict, list)):
        raise node.error(f"{path} must be a string")
    if isinstance(node.value, bool):
        return "true" if node.value else "false"
    return str(node.value)


def whole(node: Node, path: str, around: Surroundings) -> int:
    """An integer, also as text (`"${N}"`)."""
    if isinstance(node.value, bool) or not str(node.value).lstrip("-").isdigit():
        raise node.error(f"{path} must be a integer")
    return int(node.value)


def number(node: Node, path: str, around: Surroundings) -> float:
    try:
        return float(node.value)
    except (TypeError, ValueError):
        raise node.error(f"{path} must be a number") from None


def flag(node: Node, path: str, around: Surroundings) -> bool:
    if isinstance(node.value, bool):
        return node.value
    word = str(node.value).lower()
    if word in ("true", "y", "yes", "on", "1"):
        return True
    if word in ("false", "n", "no", "off", "0"):
        return False
    raise node.error(f"{path} must be a boolean")


def texts(node: Node, path: str, around: Surroundings) -> list[str]:
    """A list of strings."""
    if not isinstance(node.value, list):
        raise node.error(f"{path} must be a list")
    return [text(item, f"{path}.{index}", around) for index, item in enumerate(node.value)]


def unique(node: Node, path: str, around: Surroundings) -> list[str]:
    """A list of strings in which nothing counts twice."""
    return list(dict.fromkeys(texts(node, path, around)))


def text_or_texts(node: Node, path: str, around: Surroundings) -> list[str]:
    return texts(node, path, around) if isinstance(node.value, list) else [text(node, path, around)]


def command(node: Node, path: str, around: Surroundings) -> list[str] | None:
    """The words of a command; a string is split as a shell would. None for null: the image's own."""
    if node.value is None:
        return None
    if isinstance(node.value, list):
        return texts(node, path, around)
    try:
        return shlex.split(text(node, path, around))
    except ValueError as err:
        raise node.error(f"{path}: invalid command line string: {err}") from None


def pairs(node: Node, path: str, around: Surroundings) -> dict[str, str | None]:
    """`KEY: VALUE` or a list of `KEY=VALUE`; None for a key without value."""
    if node.value is None:
        return {}
    if not isinstance(node.value, (dict, list)):
        raise node.error(f"{path} must be a mapping or a list")
    mapping = as_mapping(node, hosts=path.endswith("extra_hosts"))
    return {
        key: None if item.value is None else text(item, f"{path}.{key}", around) for key, item in mapping.value.items()
    }


def labels(node: Node, path: str, around: Surroundings) -> dict[str, str]:
    return {key: value or "" for key, value in pairs(node, path, around).items()}


def named(node: Node, path: str) -> dict[str, Node]:
    """A map, or a list of its keys."""
    if node.value is None:
        return {}
    found = as_named(node).value
    if not isinstance(found, dict):
        raise node.error(f"{path} must be a mapping or a list")
    return found


def duration(node: Node, path: str, around: Surroundings) -> str:
    return duration_text(duration_ns(node))


def size(node: Node, path: str, around: Surroundings) -> str:
    """Bytes as digits: large numbers survive every JSON reader."""
    return str(size_bytes(node))


def choice(*allowed: str) -> Reader:
    """One of some words."""

    def read(node: Node, path: str, around: Surroundings) -> str:
        found = text(node, path, around)
        if found not in allowed:
            raise node.error(f"{path} must be one of {', '.join(allowed)}: {found}")
        return found

    return read


def absent(what: str, hint: str | None = None) -> Reader:
    """A known attribute that cannot be had: refused where it says something."""

    def read(node: Node, path: str, around: Surroundings) -> None:
        if node.value in (None, False, [], {}):
            return
        raise node.error(f"{path}: {what} not available in labkernel", resolution=hint or f"take {path} out")

    return read


def ignored(why: str) -> Reader:
    """A known attribute without effect here, which changes nothing for the program in the container: a warning."""

    def read(node: Node, path: str, around: Surroundings) -> None:
        around.warnings.append(f"{path} is ignored: {why}")

    return read


def fields(node: Node, path: str, around: Surroundings, table: Mapping[str, Reader]) -> dict[str, Any]:
    """The values of a map by a table of readers; None (also what was refused or ignored) is left out."""
    found = {}
    for key, item in keys(node, path, table).items():
        value = table[key](item, f"{path}.{key}", around)
        if value is not None:
            found[key] = value
    return found


def optional(reader: Reader) -> Reader:
    """null is the same as not given."""
    return lambda node, path, around: None if node.value is None else reader(node, path, around)


__all__ = ["ComposeError", "Node", "Reader", "Surroundings"]
