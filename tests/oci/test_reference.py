"""References against a table in references/: one case per line, tab between columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkernel.errors import InvalidReference
from labkernel.oci.reference import parse, parse_tag

CASES = Path(__file__).parent / "references"


def rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (CASES / name).read_text().splitlines()]


@pytest.mark.parametrize(("text", "canonical", "familiar"), rows("valid.tsv"))
def test_a_name_is_normalised_as_docker_does(text: str, canonical: str, familiar: str) -> None:
    found = parse(text)
    assert (str(found), found.familiar) == (canonical, familiar)
    assert parse(canonical) == parse(familiar) == found


@pytest.mark.parametrize(("text", "brief"), rows("invalid.tsv"))
def test_a_bad_name_is_refused_in_dockers_words(text: str, brief: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        parse(text)
    assert caught.value.brief == brief
    assert caught.value.resolution


def test_a_long_path_is_refused() -> None:
    with pytest.raises(InvalidReference, match="must not be more than 255 characters"):
        parse("a/" + "b" * 300)


def test_tags_are_filled_in_and_digests_are_no_tags() -> None:
    assert str(parse_tag("web")) == "docker.io/library/web:latest"
    with pytest.raises(InvalidReference):
        parse_tag("web@sha256:" + "0" * 64)


@given(st.text(alphabet="aB0._-:/@[]", max_size=40))
def test_any_text_is_refused_or_survives_a_round_trip(text: str) -> None:
    try:
        found = parse(text)
    except InvalidReference:
        return
    assert parse(str(found)) == found
    assert parse(found.familiar).name == found.name
