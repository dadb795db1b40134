"""YAML as a tree of nodes that remember their file and line, so that every later error can name them.

Scalars are those of YAML 1.2 (`yes`, `on` and `22:22` are text), as Compose reads them. Anchors, aliases and `<<` are
resolved here; Compose's tags `!reset` and `!override` stay on the node for the merge.
Source: YAML 1.2.2, chapter 10 (core schema); Compose specification, "Fragments", "Merge Compose files".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LabkernelError

MAX_BYTES = 4 << 20
MAX_NODES = 200_000
TAGS = ("!reset", "!override")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class ComposeError(LabkernelError):
    """A Compose file is wrong, or what it says cannot be had here. `file` and `line` (from 1) say where."""

    def __init__(self, brief: str, *, file: str | None = None, line: int | None = None, **parts: Any) -> None:
        place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(f"{place}{brief}", **parts)
        self.file = file
        self.line = line


@dataclass
class Node:
    """One value: a dictionary of nodes by key, a list of nodes, or a scalar (str, int, float, bool, None)."""

    value: Any
    file: str = ""
    line: int = 0
    tag: str = ""

    @property
    def kind(self) -> str:
        """The word an error calls it by."""
        if isinstance(self.value, dict):
            return "mapping"
        return "list" if isinstance(self.value, list) else "null" if self.value is None else type(self.value).__name__

    def error(self, brief: str, **parts: Any) -> ComposeError:
        """An error at this node's place."""
        return ComposeError(brief, file=self.file or None, line=self.line or None, **parts)

    def with_value(self, value: Any) -> Node:
        """The same place with another value; its tag goes."""
        return replace(self, value=value, tag="")

    def get(self, *keys: str) -> Node | None:
        """The node below the keys, if they are there."""
        found: Node | None = self
        for key in keys:
            if found is None or not isinstance(found.value, dict):
                return None
            found = found.value.get(key)
        return found

    def plain(self) -> Any:
        """The values alone."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


def read(text: str, file: str) -> Node:
    """The one document of `text`. Raises ComposeError with the line."""
    import yaml

    if len(text) > MAX_BYTES:
        raise ComposeError(f"more than {MAX_BYTES} bytes", file=file)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        documents = list(yaml.compose_all(text, Loader=loader))
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        said = " ".join(part for part in (err.context, err.problem) if part)
        raise ComposeError(
            f"yaml: {said or err}", file=file, line=mark.line + 1 if mark else None, details=_excerpt(text, mark)
        ) from None
    except yaml.YAMLError as err:
        raise ComposeError(f"yaml: {' '.join(str(err).split())[:200]}", file=file) from None
    documents = [document for document in documents if document is not None]
    if not documents:
        raise ComposeError("empty compose file", file=file, resolution="a Compose file has at least `services:`")
    if len(documents) > 1:
        raise ComposeError("more than one YAML document", file=file, line=documents[1].start_mark.line + 1)
    return _Builder(file).build(documents[0])


def _excerpt(text: str, mark: Any) -> str | None:
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return None
    return f"{lines[mark.line]}\n{' ' * mark.column}^"


class _Builder:
    def __init__(self, file: str) -> None:
        self._file = file
        self._open: list[Any] = []
        self._count = 0

    def build(self, node: Any) -> Node:
        # An alias is the same object again; one that contains itself would never end, many can grow without bound.
        self._count += 1
        if any(node is outer for outer in self._open):
            raise self._error("an anchor contains itself", node)
        if self._count > MAX_NODES:
            raise self._error("too many values (aliases of aliases?)", node)
        line, tag = node.start_mark.line + 1, node.tag if node.tag in TAGS else ""
        self._open.append(node)
        try:
            if node.id == "mapping":
                value: Any = self._mapping(node)
            elif node.id == "sequence":
                value = [self.build(item) for item in node.value]
            else:
                value = self._scalar(node)
        finally:
            self._open.pop()
        return Node(value, self._file, line, tag)

    def _mapping(self, node: Any) -> dict[str, Node]:
        merged: dict[str, Node] = {}
        own: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar":
                raise self._error("a key has to be text", key_node)
            if key_node.value == "<<" and not key_node.style:
                for source in self._merge_sources(value_node):
                    merged = {**source, **merged}
                continue
            key = str(key_node.value)
            if key in own:
                raise self._error(f'mapping key "{key}" already defined at line {own[key].line}', key_node)
            own[key] = self.build(value_node)
            # What an editor jumps to is the line of the key.
            own[key].line = key_node.start_mark.line + 1
        return {**merged, **own}

    def _merge_sources(self, node: Any) -> Iterator[dict[str, Node]]:
        for source in node.value if node.id == "sequence" else [node]:
            built = self.build(source)
            if not isinstance(built.value, dict):
                raise self._error("map merge requires map or sequence of maps as the value", source)
            yield built.value

    def _scalar(self, node: Any) -> Any:
        text = node.value
        if node.tag == "tag:yaml.org,2002:str" and node.style:
            return text
        if node.style or node.tag in TAGS:
            return None if node.tag == "!reset" else text
        if text in ("", "~", "null", "Null", "NULL"):
            return None
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text):
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def _error(self, brief: str, node: Any) -> ComposeError:
        return ComposeError(brief, file=self._file, line=node.start_mark.line + 1)
