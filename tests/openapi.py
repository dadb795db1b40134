"""The published description of the Engine API (OpenAPI 2, from Debian's package docker-doc) as operations to try.

Gives each operation's parameters as hypothesis strategies, valid ones and others, and each answer's schema as JSON
Schema. Lenient only in what Go's servers need: a list or an object that is not there may be null.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st
from jsonschema import Draft7Validator

FILE = Path("/usr/share/doc/docker-doc/api/v1.41.yaml.gz")
# What dockerd itself answers with null although the description knows only a value (Go's pointers to one).
_POINTERS = ("ExitCode", "MemorySwappiness", "OomKillDisable", "PidsLimit", "Init", "StopTimeout")
_METHODS = ("get", "head", "post", "put", "delete")
_CONSTRAINTS = ("enum", "minimum", "maximum", "pattern", "minItems", "maxItems")

ODD = st.one_of(
    st.sampled_from(["", "0", "-1", "true", "9" * 20, "\0", "../..", "a" * 5000, "é\u202e", "{}", "null", "[[]]", " "]),
    st.text(max_size=20),
)
ODD_JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False), ODD),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD, inner, max_size=3)),
    max_leaves=5,
)


@cache
def document() -> dict[str, Any]:
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        found: dict[str, Any] = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


class Operation(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    parameters: list[dict[str, Any]]
    responses: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    def validate(self, status: int, body: Any) -> None:
        """Raises jsonschema's ValidationError when the answer is not what its status promises."""
        schema = self.responses.get(str(status), {}).get("schema")
        if schema is not None:
            _validator(repr(schema), self).validate(body)

    def schema(self, status: int) -> dict[str, Any] | None:
        return self.responses.get(str(status), {}).get("schema")


@cache
def operations() -> list[Operation]:
    if not FILE.exists():
        return []
    found = []
    for path, methods in document()["paths"].items():
        for method in _METHODS:
            if method in methods:
                each = methods[method]
                parameters = [_resolved(one) for one in (*methods.get("parameters", ()), *each.get("parameters", ()))]
                responses = {str(status): _resolved(answer) for status, answer in each["responses"].items()}
                found.append(Operation(method.upper(), path, parameters, responses))
    return found


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        found: Any = document()
        for word in schema["$ref"].removeprefix("#/").split("/"):
            found = found[word]
        schema = found
    return schema


# -- answers ---------------------------------------------------------------------------------------------------------


_VALIDATORS: dict[str, Draft7Validator] = {}


def _validator(key: str, operation: Operation) -> Draft7Validator:
    if key not in _VALIDATORS:
        schema = next(each["schema"] for each in operation.responses.values() if repr(each.get("schema")) == key)
        definitions = {name: _as_json_schema(each) for name, each in document()["definitions"].items()}
        _VALIDATORS[key] = Draft7Validator({**_as_json_schema(schema), "definitions": definitions})
    return _VALIDATORS[key]


def _as_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return {"anyOf": [{"$ref": schema["$ref"]}, {"type": "null"}]}
    kind = schema.get("type", "object" if "properties" in schema or "additionalProperties" in schema else None)
    found: dict[str, Any] = {name: schema[name] for name in (*_CONSTRAINTS, "required") if name in schema}
    if schema.get("x-nullable") or kind in ("array", "object"):
        found["type"] = [kind, "null"] if kind else None
        if "enum" in found:
            found["enum"] = [*found["enum"], None]
    elif kind is not None:
        found["type"] = kind
    if found.get("type", ...) is None:
        del found["type"]
    if kind == "string" and "enum" in found:
        found["enum"] = [*found["enum"], ""]  # Go's zero value
    if "properties" in schema:
        inner = {key: _as_json_schema(each) for key, each in schema["properties"].items()}
        found["properties"] = {
            key: {"anyOf": [each, {"type": "null"}]} if key in _POINTERS else each for key, each in inner.items()
        }
    if isinstance(schema.get("items"), dict):
        found["items"] = _as_json_schema(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = _as_json_schema(schema["additionalProperties"])
    if "allOf" in schema:
        found["allOf"] = [_as_json_schema(each) for each in schema["allOf"]]
    return found


# -- requests --------------------------------------------------------------------------------------------------------


def values(schema: dict[str, Any], *, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a schema allows."""
    schema = _resolved(schema)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "allOf" in schema:
        parts = [values(each, depth=depth) for each in schema["allOf"]]
        return st.tuples(*parts).map(
            lambda found: {key: value for part in found for key, value in (part or {}).items()}
        )
    kind = schema.get("type", "object")
    if kind == "array":
        return st.lists(values(schema.get("items", {}), depth=depth + 1), max_size=2)
    if kind == "object":
        return _objects(schema, depth)
    return {
        "string": st.one_of(
            st.text(st.characters(codec="ascii"), max_size=12), st.just(str(schema.get("default", "x")))
        ),
        "integer": st.integers(int(schema.get("minimum", -2)), int(schema.get("maximum", 1 << 31))),
        "number": st.floats(0, 1e9),
        "boolean": st.booleans(),
    }[kind]


def _objects(schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    properties = schema.get("properties") or {}
    if depth > 4:
        return st.just({})
    if properties:
        optional = {name: values(each, depth=depth + 1) for name, each in properties.items()}
        # A few at a time: what all of them at once is refused for hides the rest.
        return st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: optional[name] for name in names})
        )
    inner = schema.get("additionalProperties")
    if isinstance(inner, dict):
        return st.dictionaries(
            st.text(st.characters(codec="ascii"), max_size=8), values(inner, depth=depth + 1), max_size=2
        )
    return st.just({})


def parameter(each: dict[str, Any]) -> st.SearchStrategy[Any]:
    """A value of a parameter of path, query or header as text; now and then one that it does not allow."""
    if each.get("type") == "array":
        valid = values(each).map(lambda found: ",".join(map(str, found)))
    else:
        valid = values(each).map(lambda found: str(found).lower() if isinstance(found, bool) else str(found))
    if each["name"] == "filters":
        names = re.findall(r"`([a-z-]+)=", each.get("description", "")) or ["label"]
        valid = st.dictionaries(
            st.sampled_from(names), st.lists(st.one_of(ODD, st.sampled_from(["true", "1h", "a=b"])), max_size=2)
        ).map(json.dumps)
    return st.one_of(valid, valid, ODD)


def body(operation: Operation) -> st.SearchStrategy[Any]:
    """A JSON body, mostly one the schema allows; None where there is none."""
    schema = next((each["schema"] for each in operation.parameters if each["in"] == "body" and "schema" in each), None)
    if schema is None:
        return st.none()
    if _resolved(schema).get("type") == "string":
        return ODD
    valid = values(schema)
    spoilt = st.tuples(valid, st.sampled_from([*(_resolved(schema).get("properties") or {"X": {}})]), ODD_JSON).map(
        lambda found: {**found[0], found[1]: found[2]} if isinstance(found[0], dict) else [found[0], found[2]]
    )
    return st.one_of(valid, valid, spoilt, ODD_JSON)
