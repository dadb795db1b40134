"""Each check of a graded cell, right and wrong, against the real engine; and what grade() makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labkernel.engine import Engine
from labkernel.errors import LabkernelError, UsageError
from labkernel.grading import Check, container, grade, image
from labkernel.grading.evaluate import EVALUATORS, evaluate, memory_bytes

DOCKERFILE = """\
FROM busybox
ENV COURSE=containers EMPTY=
WORKDIR /work
RUN echo made > made.txt
CMD ["sh", "-c", "echo welcome to $COURSE"]
"""


@pytest.fixture(scope="module")
def lab(shared_engine: Engine) -> Iterator[Engine]:
    shared_engine.builds.build(DOCKERFILE, tags=["graded"])
    settings = {"mem_limit": "32m", "nano_cpus": 500_000_000}
    done = shared_engine.containers.run("graded", detach=True, name="done", **settings)
    done.wait()
    failed = shared_engine.containers.run("graded", ["sh", "-c", "exit 3"], detach=True, name="failed")
    failed.wait()
    going = shared_engine.containers.run("busybox", ["sleep", "600"], detach=True, name="going")
    yield shared_engine
    for made in (done, failed, going):
        made.remove(force=True)
    shared_engine.images.remove("graded", force=True)


RIGHT = [
    image("graded").exists(),
    image("graded").env("COURSE"),
    image("graded").env("COURSE", "containers"),
    image("graded").env("EMPTY", ""),
    image("graded").workdir("/work"),
    image("graded").workdir("/work/"),
    image("graded").layers(2),
    image("graded").prints("welcome to containers"),
    image("graded").prints("made", command=["cat", "made.txt"]),
    image("graded").prints("", command=["sh", "-c", "exit 4"], status=4),
    container("done").exists(),
    container("done").made_of("graded"),
    container("done").exited(),
    container("failed").exited(3),
    container("going").running(),
    container("done").limited(memory="32m"),
    container("done").limited(memory=32 << 20, cpus=0.5),
    container("done").logged("welcome to containers"),
]
WRONG = [
    (image("nothing").exists(), "nothing"),
    (image("graded").env("MISSING"), "MISSING is not set"),
    (image("graded").env("COURSE", "vms"), "COURSE is “containers”"),
    (image("graded").workdir("/"), "/work"),
    (image("graded").layers(9), "it has"),
    (image("graded").prints("goodbye"), "it printed “welcome to containers”"),
    (image("graded").prints("", status=1), "it ended with 0"),
    (image("graded").prints("x", command=["no-such-command"]), "executable file not found"),
    (image("nothing").prints("x"), "nothing"),
    (container("nobody").exists(), "nobody"),
    (container("going").made_of("graded"), "its image is"),
    (container("going").exited(), "it is running"),
    (container("failed").exited(0), "it ended with 3"),
    (container("done").running(), "it is exited"),
    (container("failed").limited(memory="32m"), "its memory limit is none"),
    (container("done").limited(memory="64m"), "its memory limit is 33554432"),
    (container("done").limited(cpus=1), "its CPU limit is 0.5"),
    (container("failed").limited(cpus=1), "its CPU limit is none"),
    (container("done").logged("goodbye"), "it logged “welcome to containers”"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.title)
def test_a_right_state_gives_the_points(lab: Engine, check: Check) -> None:
    found = evaluate(lab, check.to_dict())
    assert (found["ok"], found["points"]) == (True, 1), found["message"]


@pytest.mark.parametrize(("check", "message"), WRONG, ids=lambda value: getattr(value, "title", ""))
def test_a_wrong_state_gives_none_and_says_what_was_seen(lab: Engine, check: Check, message: str) -> None:
    found = evaluate(lab, check.to_dict())
    assert (found["ok"], found["points"], found["max_points"]) == (False, 0.0, 1)
    assert message in found["message"]
    assert "\n" not in found["message"]


def test_every_kind_is_tried_both_ways() -> None:
    kinds = {check.kind for check in RIGHT}
    assert kinds == {check.kind for check, _ in WRONG} == set(EVALUATORS)


@pytest.fixture
def environment(lab: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_ROOT", str(lab.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(lab.layout.runtime_dir))


@pytest.mark.usefixtures("environment")
def test_grade_sums_in_another_interpreter(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # What a submission patches in its own interpreter does not reach the grader.
    monkeypatch.setitem(EVALUATORS, "image_exists", lambda *_: "fooled")
    points = grade(image("graded").exists(points=2), image("nothing").exists(points=4), container("done").exists())
    assert type(points) is float
    assert points == 3.0
    out, err = capfd.readouterr()
    assert err == "", "nbgrader gives no points to a cell that writes to stderr"
    assert [line[:5] for line in out.splitlines()] == ["✓ 2/2", "✗ 0/4", "✓ 1/1"]


@pytest.mark.usefixtures("environment")
def test_a_file_beside_the_notebook_does_not_grade_it(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labkernel.py").write_text("raise SystemExit('fooled')")  # type: ignore[operator]
    (tmp_path / "json.py").write_text("raise SystemExit('fooled')")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert grade(image("graded").exists()) == 1.0


@pytest.mark.usefixtures("environment")
def test_a_container_that_never_ends_ends_the_grading() -> None:
    from labkernel.grading.results import evaluate_all

    with pytest.raises(LabkernelError, match="longer than"):
        evaluate_all((image("busybox").prints("x", command=["sleep", "600"]),), timeout_s=2)


def test_points_cannot_be_negative() -> None:
    with pytest.raises(UsageError, match="negative"):
        image("graded").exists(points=-1)


@pytest.mark.parametrize(
    ("words", "size"), [("64m", 64 << 20), ("64M", 64 << 20), ("64MiB", 64 << 20), ("1.5g", 3 << 29), ("7", 7), (9, 9)]
)
def test_sizes_read_as_docker_reads_them(words: str | int, size: int) -> None:
    assert memory_bytes(words) == size
