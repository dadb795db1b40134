"""Our parser beside BuildKit's own (PyPI `dockerfile`), on golden files and on random text.

The oracle runs in a subprocess: its Go threads would forbid unshare(2) in ours. It drops the flags and heredocs of
ONBUILD, and mangles flags that are not ASCII, so these are not compared.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkernel.dockerfile.parser import Node, parse
from labkernel.errors import DockerfileError

CASES = Path(__file__).parents[1] / "data" / "dockerfile" / "parse"
ORACLE = """
import dockerfile, json, sys
def one(text):
    try:
        commands = dockerfile.parse_string(text)
    except dockerfile.GoParseError:
        return None
    return [[c.cmd or "", list(c.value), list(c.flags), c.json, c.start_line, c.end_line,
             [[h.name, h.file_descriptor, h.content] for h in c.heredocs]] for c in commands]
json.dump([one(text) for text in json.load(sys.stdin)], sys.stdout)
"""
PIECES = [
    *(
        [
            "FROM",
            "RUN",
            "COPY",
            "ADD",
            "ENV",
            "LABEL",
            "ARG",
            "CMD",
            "ONBUILD",
            "HEALTHCHECK",
            "SHELL",
            "EXPOSE",
            "VOLUME",
            "run",
            "NONE",
            "FOO",
        ]
    ),
    *(
        [
            "# escape=`",
            "# syntax=x",
            "#",
            "# c",
            "\n",
            "\n",
            "\n",
            "\n",
            "\\\n",
            "`\n",
            "\\ \n",
            " \n",
            "\r\n",
            " ",
            "  ",
            "\t",
            "a",
            "b",
            "=",
            "a=b",
            '"',
            "'",
            "\\",
            "`",
            "\x0b",
            "1",
        ]
    ),
    *(
        [
            "<<EOF",
            "EOF\n",
            "EOF",
            "<<-E2",
            "E2\n",
            "\tE2\n",
            '3<<"X Y"',
            "X Y\n",
            "<<$X",
            "<<",
            "<",
            "<<E\\OF",
            "<<'EOF'",
        ]
    ),
    *(
        [
            "--x",
            "--from=a",
            "--",
            "-",
            "[",
            '"a"',
            ",",
            "]",
            '["a","b"]',
            '["a",1]',
            "[]",
            "null",
            "1e9",
            "$X",
            "${X}",
            "${X:-y}",
            "{",
            "}",
            "&&",
            "/x/",
            '\\"',
        ]
    ),
]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("dockerfile") is None, reason="PyPI dockerfile not installed")


def ask_oracle(texts: list[str]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", ORACLE], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    answers: list[Any] = json.loads(done.stdout)
    return answers


def ours(text: str) -> list[Any] | None:
    try:
        return [_plain(node) for node in parse(text).nodes]
    except DockerfileError:
        return None


def _plain(node: Node) -> list[Any]:
    shown = node.args[0] if node.instruction == "ONBUILD" and node.args else node
    args: list[str] = []
    for arg in shown.args:
        args += [""] if isinstance(arg, Node) else [arg] if isinstance(arg, str) else list(arg)
    docs = [] if node.instruction == "ONBUILD" else [[doc.name, doc.fd, doc.content] for doc in node.heredocs]
    return [node.keyword, args, list(node.flags), shown.json_form, node.line, node.end_line, docs]


def compare(texts: list[str]) -> None:
    for text, theirs in zip(texts, ask_oracle(texts), strict=True):
        assert ours(text) == theirs, repr(text)


def test_golden_files_agree_with_buildkit() -> None:
    compare([(case / "Dockerfile").read_bytes().decode() for case in sorted(CASES.iterdir())])


@pytest.mark.parametrize("seed", range(4))
def test_random_text_agrees_with_buildkit(seed: int) -> None:
    source = random.Random(seed)
    texts = []
    for _ in range(2000):
        body = "".join(
            source.choice(PIECES) + (" " if source.random() < 0.4 else "") for _ in range(source.randint(1, 25))
        )
        texts.append("FROM a\n" + body if source.random() < 0.5 else body)
    compare(texts)
