"""What the pages say exists: the files they link to, and the commands they show."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from labkernel.commands.tree import CONTAINER_ROOT, LAB_ROOT, ROOT

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pages
def test_tests_exist(page: Path) -> None:
    """`test_file::test_name`; `…::test_name` is of the file named before."""
    file = ""
    for given, name in re.findall(r"`(test_\w+|…)::(test_\w+)`", page.read_text()):
        file = file if given == "…" else given
        (path,) = (REPO / "tests").rglob(f"{file}.py")
        assert re.search(rf"^def {name}\(", path.read_text(), re.M), f"{page.name}: there is no {file}::{name}"


MAGICS = {"container": CONTAINER_ROOT, "docker": ROOT, "lab": LAB_ROOT}


def commands_of(page: Path) -> Iterator[tuple[click.Command, list[str]]]:
    """The grammar and the words of every `labkernel …` and `%group …` line of a page's code."""
    text = page.read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S):
        lines += [line.strip() for line in block.splitlines()]
    lines += re.findall(r"`((?:labkernel|%)[^`\n]*)`", text)
    for line in lines:
        found = re.match(r"(?:\w+ = )?(labkernel |%(?!%))([a-z][^#…|]*)", line)
        if found is None:
            continue
        try:
            words = shlex.split(found[2])
        except ValueError:
            continue  # A quote that is closed on a later line.
        if not words or words[0] in ("load_ext", "reload_ext", "env", "run"):
            continue
        if found[1] == "%" and words[0] in MAGICS:
            yield MAGICS[words[0]], words[1:]
        else:
            yield ROOT, words


@pages
def test_commands_exist(page: Path) -> None:
    for group, words in commands_of(page):
        for word in words:
            if not isinstance(group, click.Group) or not re.fullmatch(r"[a-z][a-z-]*", word):
                break
            found = group.get_command(click.Context(group), word)
            assert found is not None, f"{page.name}: there is no command {' '.join(words)!r}"
            group = found


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_lab_opens_the_course_for_root_too() -> None:
    shown = subprocess.run(["make", "-n", "lab"], cwd=REPO, capture_output=True, text=True, timeout=120).stdout
    line = next(line for line in shown.splitlines() if "jupyter lab" in line)
    assert line.startswith("cd notebooks && ")  # nbgrader reads nbgrader_config.py of the folder it is started in
    assert ("--allow-root" in line) == (os.geteuid() == 0)
