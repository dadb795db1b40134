"""From checks to points: evaluate them in another interpreter, show what was found, return a plain float."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LabkernelError
from .checks import Check

TIMEOUT_S = 60.0
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Result:
    """What one check found. `message` says why it is wrong, or what was seen."""

    title: str
    ok: bool
    points: float
    max_points: float
    message: str

    def line(self) -> str:
        return f"{'✓' if self.ok else '✗'} {self.points:g}/{self.max_points:g}  {self.title}" + (
            f": {self.message}" if self.message else ""
        )


def evaluate_all(checks: tuple[Check, ...], *, timeout_s: float = TIMEOUT_S) -> list[Result]:
    """Evaluate `checks` in an interpreter of its own on the store and driver of this process's environment.

    Raises LabkernelError when that interpreter does not answer within `timeout_s`.
    """
    request = json.dumps([check.to_dict() for check in checks])
    # -P and the package's own place first: a file `labkernel.py` beside the notebook must not grade it.
    start = f"import sys; sys.path.insert(0, {PACKAGE_PARENT!r}); from labkernel.grading.evaluate import main; main()"
    command = [sys.executable, "-P", "-c", start]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        answer = subprocess.run(
            command, input=request, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise LabkernelError(
            f"the checks took longer than {timeout_s:g} s",
            resolution="a container that never ends? give its command an end, or raise timeout_s",
        ) from err
    if answer.returncode != 0:
        raise LabkernelError("the checks could not be evaluated", details=answer.stderr.strip()[-2000:])
    found: list[dict[str, Any]] = json.loads(answer.stdout)
    return [Result(**record) for record in found]


def grade(*checks: Check, timeout_s: float = TIMEOUT_S) -> float:
    """Evaluate `checks`, print a line for each to stdout, and return the sum of their points.

    The value is a plain float because nbgrader reads partial credit from the repr of a cell's last value; the lines go
    to stdout because nbgrader gives no points to a cell that wrote to stderr.
    """
    results = evaluate_all(checks, timeout_s=timeout_s)
    for result in results:
        print(result.line())  # noqa: T201 (the cell's own output)
    return float(sum(result.points for result in results))
