"""Completion inside a Dockerfile: what is offered at `|`, and the text it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkernel.commands.dockerwords import INSTRUCTIONS, complete
from labkernel.dockerfile.instructions import _MAKERS

STAGES = "FROM busybox AS build\nFROM build AS test\n"


def at(text: str, directory: str = ".") -> tuple[list[str], str]:
    *lines, before = text.partition("|")[0].split("\n")
    return complete(lines, before, images=lambda: ["busybox", "hello:1"], directory=directory)


def test_every_instruction_is_known() -> None:
    assert set(INSTRUCTIONS) == set(_MAKERS)


@pytest.mark.parametrize(
    ("text", "found", "fragment"),
    [
        ("FROM busybox\nCO|", ["COPY"], "CO"),
        ("FROM busybox\nco|", ["COPY"], "co"),
        ("FROM busybox\n|", [], ""),
        ("FROM busybox\nONBUILD WO|", ["WORKDIR"], "WO"),
        ("# sy|", ["syntax="], "sy"),
        ("FROM busybox\n# sy|", [], "sy"),
        ("FROM bu|", ["busybox"], "bu"),
        (f"{STAGES}FROM |", ["build", "test", "scratch", "busybox", "hello:1"], ""),
        ("FROM busybox |", ["AS"], ""),
        ("FROM --pl|", ["--platform="], "--pl"),
        ("FROM --platform=linux/a|", ["linux/amd64", "linux/arm64"], "linux/a"),
        ("FROM busybox\nCOPY --c|", ["--chown=", "--chmod="], "--c"),
        ("FROM busybox\nCOPY --li|", ["--link"], "--li"),
        (f"{STAGES}COPY --from=|", ["build", "test", "busybox", "hello:1"], ""),
        (f"{STAGES}COPY --from=te|", ["test"], "te"),
        (f"{STAGES}COPY --from=build /|", [], "/"),
        (f"{STAGES}RUN --mount=type=c|", ["cache"], "c"),
        (f"{STAGES}RUN --mount=type=cache,sh|", ["sharing="], "sh"),
        (f"{STAGES}RUN --mount=type=cache,sharing=|", ["shared", "private", "locked"], ""),
        (f"{STAGES}RUN --mount=from=b|", ["build", "busybox"], "b"),
        (f"{STAGES}RUN --network=n|", ["none"], "n"),
        (f"{STAGES}RUN apt-get update && \\\n  CO|", [], "CO"),
        ("ARG VERSION=1 OTHER\nENV VALUE=2\nFROM busybox\nRUN echo ${V|", ["VALUE", "VERSION"], "V"),
        ("FROM busybox\nRUN <<EOT\nCO|", [], ""),
        ("FROM busybox\nRUN <<EOT\necho\nEOT\nCO|", ["COPY"], "CO"),
        ("FROM busybox\nRUN a <<'A' <<-B\nA\n\tB\nCO|", ["COPY"], "CO"),
        ("FROM busybox\nSTOPSIGNAL SIGI|", ["SIGINT"], "SIGI"),
        ("FROM busybox\nHEALTHCHECK --interval=3s C|", ["CMD"], "C"),
        ("FROM busybox\nHEALTHCHECK --ti|", ["--timeout="], "--ti"),
        ("FROM busybox\nRUN import o|", [], "o"),
        ("FROM busybox\nNONSENSE --x|", [], "--x"),
    ],
)
def test_completions(text: str, found: list[str], fragment: str) -> None:
    assert at(text) == (found, fragment)


def test_files_of_the_context(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/app.py").touch()
    (tmp_path / "setup.py").touch()
    (tmp_path / ".hidden").touch()
    where = str(tmp_path)
    assert at("FROM x\nCOPY s|", where) == (["setup.py", "src/"], "s")
    assert at("FROM x\nCOPY src/|", where) == (["src/app.py"], "src/")
    assert at("FROM x\nCOPY |", where) == (["setup.py", "src/"], "")
    assert at("FROM x\nADD .h|", where) == ([".hidden"], ".h")
    assert at("FROM x\nCOPY ../|", where) == ([], "../")
    assert at("FROM x\nCOPY none/|", where) == ([], "none/")
