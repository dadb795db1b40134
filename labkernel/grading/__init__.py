"""Checks over the state of an engine, for graded cells.

A graded cell names what must be true and ends with the points, as nbgrader wants them (a plain float):

    from labkernel.grading import container, grade, image

    grade(
        image("greeter").exists(points=1),
        image("greeter").prints("hello, world", points=2),
        container("guest").limited(memory="32m", points=1),
    )

A check observes state (image config, layers, exit status, cgroup limits), never the text of a student's cell. Checks
are evaluated by an interpreter of their own that opens the same store: what the notebook's Python has patched does not
reach them. That keeps honest mistakes and simple tricks out; a notebook that is graded where it also runs can still lie
about the value of its own last cell, so grade submissions by running them again (`nbgrader autograde` does).
"""

from __future__ import annotations

from .checks import Check, container, image
from .results import Result, grade

__all__ = ["Check", "Result", "container", "grade", "image"]
