"""The parser against golden folders: tests/data/dockerfile/parse/CASE/{Dockerfile,result.json}."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkernel.dockerfile.parser import excerpt, parse, parse_heredoc
from labkernel.errors import DockerfileError

CASES = Path(__file__).parents[1] / "data" / "dockerfile" / "parse"


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.iterdir()))
def test_golden(case: str) -> None:
    text = (CASES / case / "Dockerfile").read_bytes().decode()
    expected = json.loads((CASES / case / "result.json").read_text())
    assert [node.to_dict() for node in parse(text).nodes] == expected


def test_node_text_parses_to_itself() -> None:
    for case in CASES.iterdir():
        parsed = parse((case / "Dockerfile").read_bytes().decode())
        for node in parsed.nodes:
            again = parse(f"# escape={parsed.escape}\n" + node.text).nodes
            assert len(again) == 1
            assert again[0].args == node.args or node.instruction == "ONBUILD"
            assert again[0].heredocs == node.heredocs


def test_directives_have_lines() -> None:
    parsed = parse("# syntax=docker/dockerfile:1\n# Check = skip=all ;error=true\nFROM a\n# escape=`\n")
    assert [(item.name, item.value, item.line) for item in parsed.directives] == [
        ("syntax", "docker/dockerfile:1", 1),
        ("check", "skip=all ;error=true", 2),
    ]
    assert parsed.escape == "\\"


def test_chomped_heredoc() -> None:
    doc = parse("FROM a\nCOPY <<-E /x\n\t\ta\n\tb\tc\n\tE\n").nodes[1].heredocs[0]
    assert (doc.content, doc.text) == ("\t\ta\n\tb\tc\n", "a\nb\tc\n")


def test_heredoc_words() -> None:
    assert parse_heredoc("<<") is None
    assert parse_heredoc("a<<b") is None
    doc = parse_heredoc("7<<-'x'")
    assert doc is not None
    assert (doc.name, doc.fd, doc.chomp, doc.expand) == ("x", 7, True, False)


def test_line_limit_counts_bytes() -> None:
    parse("FROM a\nRUN " + "x" * 65_531)
    with pytest.raises(DockerfileError, match="max allowed size") as caught:
        parse("FROM a\nRUN " + "é" * 40_000)
    assert caught.value.line == 2


def test_excerpt_marks_the_lines() -> None:
    assert excerpt("a\nb\nc\nd\ne\n", 3, 4).splitlines()[:4] == ["1 |     a", "2 |     b", "3 | >>> c", "4 | >>> d"]


def test_comments_describe_the_next_instruction() -> None:
    parsed = parse("# syntax=x\n# a first\n# a second\nARG a\n# lost\n\nFROM a\n")
    assert parsed.nodes[0].comments == ("a first", "a second")
    assert parsed.nodes[1].comments == ()
