"""Several Compose files become one: maps are merged, lists appended, with the exceptions the specification names. Pure.

The same rules join a service with the one it `extends`. Source: Compose specification, "Merge Compose files",
"Extend your Compose file".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .document import Node
from .values import parse_port, parse_volume

_REPLACED = {"command", "entrypoint", "test"}
# Lists of KEY=VALUE that may be maps, too.
_PAIRS = {"environment", "labels", "annotations", "args", "extra_hosts", "sysctls", "additional_contexts", "options"}
# Lists of names that may be maps from the name to its details.
_NAMED = {"networks", "depends_on", "models"}
_LISTS_OF_ONE = {"dns", "dns_search", "dns_opt", "tmpfs", "env_file", "label_file"}


def merge_documents(base: Node, over: Node) -> Node:
    """Two Compose files, the second over the first."""
    result = dict(base.value)
    for key, node in over.value.items():
        if node.tag == "!reset":
            result.pop(key, None)
        elif key in result and key in ("services", "networks", "volumes", "secrets", "configs"):
            result[key] = _merge_section(result[key], node, key)
        elif key in result and isinstance(node.value, dict):
            result[key] = _merge(result[key], node, key)
        else:
            result[key] = _settled(node)
    return base.with_value(result)


def _merge_section(base: Node, over: Node, section: str) -> Node:
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or over.tag == "!override":
        return _settled(over)
    result = dict(base.value)
    for name, node in over.value.items():
        if node.tag == "!reset":
            result.pop(name, None)
        elif name in result and section == "services":
            result[name] = merge_services(result[name], node)
        elif name in result:
            result[name] = _merge(result[name], node, name)
        else:
            result[name] = _settled(node)
    return over.with_value(result)


def merge_services(base: Node, over: Node) -> Node:
    """Two descriptions of one service, the second over the first."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or over.tag == "!override":
        return _settled(over)
    result = dict(base.value)
    for key, node in over.value.items():
        if node.tag == "!reset":
            result.pop(key, None)
        elif key in result:
            result[key] = _merge_attribute(result[key], node, key)
        else:
            result[key] = _settled(node)
    return Node(result, over.file, over.line)


def _merge_attribute(base: Node, over: Node, key: str) -> Node:
    if over.tag == "!override" or key in _REPLACED or base.value is None:
        return _settled(over)
    if over.value is None:
        return base
    unique = _UNIQUE.get(key)
    if unique is not None and isinstance(base.value, list) and isinstance(over.value, list):
        return over.with_value(_unique([*base.value, *over.value], unique))
    if key == "build":
        return _merge(_as_build(base), _as_build(over), key)
    if key == "logging":
        return _merge_logging(base, over)
    return _merge(base, over, key)


def _merge(base: Node, over: Node, key: str) -> Node:
    """Any two values: maps by key, lists one after the other, otherwise the second."""
    if over.tag == "!override" or key in _REPLACED or base.value is None:
        return _settled(over)
    if key in _PAIRS:
        hosts = key == "extra_hosts"
        base, over = as_mapping(base, hosts=hosts), as_mapping(over, hosts=hosts)
    elif key in _NAMED:
        base, over = as_named(base), as_named(over)
    elif key in _LISTS_OF_ONE:
        base, over = _as_list(base), _as_list(over)
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        result = dict(base.value)
        for name, node in over.value.items():
            if node.tag == "!reset":
                result.pop(name, None)
            elif name in result:
                result[name] = _merge(result[name], node, name)
            else:
                result[name] = _settled(node)
        return over.with_value(result)
    if isinstance(base.value, list) and isinstance(over.value, list):
        return over.with_value(_unique([*base.value, *over.value], lambda node: repr(node.plain())))
    if over.value is None and isinstance(base.value, (dict, list)):
        return base
    return _settled(over)


def _settled(node: Node) -> Node:
    """Without the merge's tags, which mean nothing where there is nothing to merge with."""
    if isinstance(node.value, dict):
        found = {key: _settled(item) for key, item in node.value.items() if item.tag != "!reset"}
        return node.with_value(found)
    if isinstance(node.value, list):
        return node.with_value([_settled(item) for item in node.value])
    return node.with_value(node.value)


def _merge_logging(base: Node, over: Node) -> Node:
    old, new = base.get("driver"), over.get("driver")
    if new is not None and old is not None and new.value != old.value:
        return _settled(over)
    return _merge(base, over, "logging")


def as_mapping(node: Node, *, hosts: bool = False) -> Node:
    """A list of `KEY=VALUE` or `KEY` (of hosts also `NAME:ADDRESS`) as a map; anything else as it is."""
    if not isinstance(node.value, list):
        return node
    found: dict[str, Node] = {}
    for item in node.value:
        text = str(item.value)
        cut = ":" if hosts and "=" not in text else "="
        key, sign, value = text.partition(cut)
        found[key] = item.with_value(value if sign else None)
    return node.with_value(found)


def as_named(node: Node) -> Node:
    """A list of names as a map of the names to nothing."""
    if not isinstance(node.value, list):
        return node
    return node.with_value({str(item.value): item.with_value(None) for item in node.value})


def _as_list(node: Node) -> Node:
    return node if isinstance(node.value, list) or node.value is None else node.with_value([node])


def _as_build(node: Node) -> Node:
    return node.with_value({"context": node}) if isinstance(node.value, str) else node


def _unique(items: list[Node], key: Callable[[Node], Any]) -> list[Node]:
    """The last of those that mean the same stays, at the place of the first."""
    found: dict[Any, Node] = {}
    for item in items:
        found[key(item)] = _settled(item)
    return list(found.values())


def _volume_key(node: Node) -> str:
    if isinstance(node.value, Mapping):
        target = node.get("target")
        return str(target.value if target else "")
    return str(parse_volume(str(node.value), node)["target"])


def _port_key(node: Node) -> str:
    ports = parse_port(node)
    return repr([[port.get(k) for k in ("host_ip", "target", "published", "protocol")] for port in ports])


def _source_key(node: Node) -> str:
    if isinstance(node.value, Mapping):
        target = node.get("target") or node.get("source")
        return str(target.value if target else "")
    return str(node.value)


_UNIQUE: dict[str, Callable[[Node], Any]] = {
    "volumes": _volume_key,
    "ports": _port_key,
    "secrets": _source_key,
    "configs": _source_key,
    "devices": lambda node: str(node.value).split(":")[1:2] or str(node.value),
}
