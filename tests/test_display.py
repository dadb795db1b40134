"""What is shown in a notebook: in HTML a dollar is a dollar, wherever it is shown."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.display import no_formulas, table_html

CODE = Path(__file__).resolve().parent.parent / "labkernel"
IGNORED = "<div class='tex2jax_ignore mathjax_ignore'>"


def shown_values(tree: ast.AST) -> Iterator[ast.expr]:
    """What stands beside the key "text/html"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "text/html":
                    yield value


@pytest.mark.parametrize("path", [path for path in CODE.rglob("*.py") if "html" in path.read_text()], ids=str)
def test_nothing_is_shown_that_may_become_a_formula(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "_repr_html_":
            names = [item.id for item in node.decorator_list if isinstance(item, ast.Name)]
            assert "without_formulas" in names, f"line {node.lineno}"
    for value in shown_values(tree):
        called = value.func if isinstance(value, ast.Call) else None
        name = getattr(called, "id", getattr(called, "attr", ""))
        assert name in ("no_formulas", "_repr_html_"), f"line {value.lineno}"


def test_the_classes_are_around_all_of_it() -> None:
    assert no_formulas("<b>$A and $B</b>") == f"{IGNORED}<b>$A and $B</b></div>"
    assert table_html(["A"], [["$x"]]).startswith("<table")
