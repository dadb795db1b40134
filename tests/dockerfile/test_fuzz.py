"""Whatever the text, only DockerfileError comes out, with a line that exists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkernel.dockerfile.graph import verify
from labkernel.dockerfile.ignorefile import ignores
from labkernel.dockerfile.lint import lint
from labkernel.dockerfile.variables import expand, expand_words
from labkernel.errors import DockerfileError

PIECES = st.sampled_from(
    [
        *(
            [
                "FROM a\n",
                "FROM a AS b\n",
                "RUN ",
                "COPY ",
                "ADD ",
                "ENV ",
                "LABEL ",
                "ARG ",
                "CMD ",
                "ONBUILD ",
                "HEALTHCHECK ",
                "SHELL ",
                "EXPOSE ",
            ]
        ),
        *(
            [
                "VOLUME ",
                "USER ",
                "WORKDIR ",
                "STOPSIGNAL ",
                "MAINTAINER ",
                "# escape=`\n",
                "# check=skip=",
                "\\\n",
                "\n",
                "<<EOF",
                "EOF\n",
                "<<-'x y'",
            ]
        ),
        *(
            [
                "--mount=type=",
                "--mount=",
                "cache,",
                "target=/x",
                "--from=0",
                "--from=b",
                "--interval=",
                "1s",
                "--chmod=",
                "=",
                '"',
                "'",
                "\\",
                "`",
                "$",
                "${",
                "}",
                ":-",
            ]
        ),
        *(
            [
                '["a"]',
                "[1]",
                "[",
                "]",
                "{",
                ",",
                "80-90/tcp",
                ":",
                "/",
                "//",
                "#",
                "##",
                "%",
                "*",
                "?",
                "é",
                "\x00",
                "\ufeff",
                "\xa0",
                "\ud800",
                "a",
                "b",
                " ",
                "\t",
                "\r",
                "AS",
                "NONE",
                "CMD ",
            ]
        ),
    ]
)


def refusal(act: Callable[[], object]) -> DockerfileError | None:
    try:
        act()
    except DockerfileError as err:
        return err
    return None


DOCKERFILES = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join))


@settings(max_examples=400, deadline=None)
@given(DOCKERFILES)
def test_dockerfiles(text: str) -> None:
    err = refusal(lambda: lint(verify(text)))
    if err is not None:
        assert err.brief
        assert err.line is not None
        assert 1 <= err.line <= (err.end_line or err.line) <= text.count("\n") + 1


@settings(max_examples=400, deadline=None)
@given(DOCKERFILES, st.dictionaries(st.sampled_from("ab"), st.text(max_size=20)))
def test_words(word: str, env: dict[str, str]) -> None:
    for run in (expand, expand_words):
        err = refusal(lambda run=run: run(word, env))  # type: ignore[misc]
        assert err is None or err.brief


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text("ab*?[]!^-\\/.#", max_size=12), max_size=4), st.text("ab*/.-\n", max_size=12))
def test_ignore(patterns: list[str], path: str) -> None:
    err = refusal(lambda: ignores(patterns, path))
    assert err is None or err.brief


@pytest.mark.parametrize("text", ["${a:-" * 12_000, '"$' * 30_000, "[" * 60_000, "ONBUILD " * 7_000])
def test_deep_nesting_is_refused_not_fatal(text: str) -> None:
    refusal(lambda: expand(text, {}))
    refusal(lambda: lint(verify(f"FROM a\nENV x={text}\nCMD {text}\n")))
    refusal(lambda: lint(verify(f"FROM a\n{text}\n")))


def test_values_that_double_are_refused() -> None:
    doubling = "".join(f"A{number}=$A{number - 1}$A{number - 1}\n" for number in range(1, 64))
    for keyword in ("ARG", "ENV"):
        lines = "A0=xxxxxxxx\n" + doubling
        text = lines.replace("A0=", f"{keyword} A0=", 1).replace("\nA", f"\n{keyword} A")
        refusal(lambda text=text: lint(verify(f"FROM a\n{text}")))  # type: ignore[misc]
    globals_ = "ARG A0=xxxxxxxx\n" + "".join(f"ARG {line}\n" for line in doubling.splitlines())
    err = refusal(lambda: verify(f"{globals_}FROM a\n"))
    assert err is not None
    assert "longer than" in err.brief
    assert err.line == 16
    assert refusal(lambda: expand("${A//?/$A}", {"A": "x" * 1000})) is not None
    assert expand("${A}" * 100, {"A": "x" * 1000}) == "x" * 100_000


def test_stages_on_stages_take_linear_time() -> None:
    # A copy of the variables for each stage took 10 GB here.
    stages = "".join(f"FROM s{number - 1} AS s{number}\nENV V{number}=$V{number - 1}\n" for number in range(1, 10_000))
    found = lint(verify(f"FROM a AS s0\nENV V0=1\n{stages}FROM s9999\nCOPY $V5000 $W5000 /\n"))
    assert [item.rule for item in found] == ["UndefinedVar"]
