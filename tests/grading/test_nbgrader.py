"""The graded exercise of notebook 01 under the real nbgrader: right, half right and untouched submissions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from labkernel.engine import Engine

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
EXERCISE = ("load", "exercise-md", "exercise-image", "exercise-run", "exercise-check")
RIGHT_IMAGE = '%%dockerfile -t greeter\nFROM busybox\nENV COURSE=containers\nCMD echo "welcome to $COURSE"\n'
RIGHT_RUN = "%container rm -f guest\n%container run --name guest --memory 32m greeter"


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A course with the exercise of notebook 01 as assignment `ps1`, released."""
    source = tmp_path / "source" / "ps1"
    source.mkdir(parents=True)
    notebook = nbformat.read(NOTEBOOKS / "01_containers_and_vms.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell["id"] in EXERCISE]
    assert len(notebook.cells) == len(EXERCISE)
    nbformat.write(notebook, source / "containers.ipynb")
    shutil.copy(NOTEBOOKS / "nbgrader_config.py", tmp_path)
    nbgrader(tmp_path, "generate_assignment", "ps1")
    return tmp_path


def nbgrader(course: Path, *words: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *words],
        cwd=course,
        # nbgrader calls alembic by its name.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(course: Path, student: str, change: Callable[[dict[str, nbformat.NotebookNode]], None]) -> None:
    notebook = nbformat.read(course / "release" / "ps1" / "containers.ipynb", as_version=4)
    change({cell["metadata"].get("nbgrader", {}).get("grade_id", cell["id"]): cell for cell in notebook.cells})
    target = course / "submitted" / student / "ps1"
    target.mkdir(parents=True)
    nbformat.write(notebook, target / "containers.ipynb")


def scores(course: Path) -> dict[str, float]:
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        return {sub.student.id: sub.score for sub in book.assignment_submissions("ps1")}


def test_release_holds_no_solution(course: Path) -> None:
    text = (course / "release" / "ps1" / "containers.ipynb").read_text()
    assert "YOUR CODE HERE" in text
    assert "SOLUTION" not in text
    assert "ENV COURSE=containers" not in text


@pytest.mark.slow
def test_autograde_gives_full_and_partial_points(course: Path, fresh_engine: Engine) -> None:
    def right(cells: dict[str, nbformat.NotebookNode]) -> None:
        cells["greeter_image"]["source"] = RIGHT_IMAGE
        cells["guest_container"]["source"] = RIGHT_RUN

    def without_limit_and_greeting(cells: dict[str, nbformat.NotebookNode]) -> None:
        cells["greeter_image"]["source"] = RIGHT_IMAGE.replace("welcome to $COURSE", "hello")
        cells["guest_container"]["source"] = RIGHT_RUN.replace(" --memory 32m", "")

    submit(course, "ada", right)
    submit(course, "bob", without_limit_and_greeting)
    submit(course, "eve", lambda cells: None)
    env = {
        "LABKERNEL_ROOT": str(fresh_engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(fresh_engine.layout.runtime_dir),
    }
    for student in ("ada", "bob", "eve"):
        nbgrader(course, "autograde", "ps1", "--student", student, env=env)
        # Each submission is graded on a clean state, as a fresh grading machine would have it.
        for container in fresh_engine.containers.list(all=True):
            container.remove(force=True)
        for image in fresh_engine.images.list():
            if "greeter:latest" in image.tags:
                fresh_engine.images.remove("greeter", force=True)
    assert scores(course) == {"ada": 7.0, "bob": 4.0, "eve": 0.0}
