"""How `compare --workload` proceeds: make the rows, warm each up, then run them in an order that turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, UsageError
from .experiments import BY_NAME, OF_A_COMMAND, Experiment
from .measurements import Measurements, Row
from .program import INSIDE, told
from .subjects import IDLE_MS, Measured, Subject, make_subject
from .words import machine_text

if TYPE_CHECKING:
    from ..imaging.image import Image
    from .laboratory import Laboratory

BUDGET_MS = 60
DEFAULT_ROWS = ("bare", "root", "rootless", "proot", "vm", "vm-cold")
_IDLE_RUNS = 2


def measure(
    lab: Laboratory,
    image: str,
    experiments: Sequence[Experiment],
    *,
    runs: int,
    rows: Sequence[str],
    command: Sequence[str] = (),
    context: str = "",
    settings: dict[str, Any] | None = None,
) -> Measurements:
    """Measure `experiments` (or, with a `command`, what that costs) in each row that can run here.

    The first run of each row is not counted: it unpacks, makes disks and templates (a cold boot has nothing left to
    prepare where a template was made). Then `runs` rounds; each starts one row further, so that what else the machine
    does hits all alike. Raises what the row of the engine's own driver raises; any other row that fails, at whatever
    time, is left out, with its reason.
    """
    with contextlib.ExitStack() as undo:
        if command:
            base = lab.images.resolve(image, notify=lab.say)
            made, name = base, (base.tags or [base.id])[0]
        else:
            made, name = undo.enter_context(lab.instrumented(image))
        procedure = _Procedure(lab, experiments, list(command), settings or {})
        left_out = procedure.prepare(undo, rows, made, name, context)
        procedure.rounds(runs, left_out)
        names = list(OF_A_COMMAND) if command else [experiment.name for experiment in experiments]
        return Measurements(
            image=image,
            command=list(command),
            experiments=names,
            rows=procedure.finished(),
            runs=runs,
            machine=machine_text(),
            measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            left_out=left_out,
            warnings=procedure.warnings(),
        )


class _Procedure:
    def __init__(
        self, lab: Laboratory, experiments: Sequence[Experiment], command: list[str], settings: dict[str, Any]
    ) -> None:
        self._lab, self._command, self._settings = lab, command, settings
        self._wanted = {experiment.name for experiment in experiments} if not command else set(OF_A_COMMAND)
        self._asks = list(dict.fromkeys(one.asks for one in experiments if one.asks))
        self._subjects: list[Subject] = []
        self._rows: dict[str, Row] = {}
        self._codes: dict[str, int] = {}

    def prepare(
        self, undo: contextlib.ExitStack, rows: Sequence[str], image: Image, name: str, context: str
    ) -> dict[str, str]:
        left_out: dict[str, str] = {}
        own = self._lab.containers.driver_name
        for row in dict.fromkeys(own if row == "container" else row for row in rows):
            if row == "bare" and self._command:
                left_out[row] = "a command of the image is not one of this machine"
                continue
            self._lab.say(f"making ready: {row}")
            try:
                subject = make_subject(self._lab, row, image, name, context=context)
                undo.callback(subject.close)
                if row != "vm-cold" or "vm" not in self._rows:
                    self._run(subject)
            except UsageError:
                raise
            except LabkernelError as err:
                if row == own:
                    raise
                left_out[row] = _reason(err)
                continue
            self._subjects.append(subject)
            self._rows[row] = Row(row, subject.label, subject.family)
        return left_out

    def rounds(self, runs: int, left_out: dict[str, str]) -> None:
        for number in range(runs):
            turn = number % max(1, len(self._subjects))
            for subject in (*self._subjects[turn:], *self._subjects[:turn]):
                self._lab.say(f"run {number + 1} of {runs}: {subject.label}")
                try:
                    self._note(subject, self._run(subject))
                    if "idle" in self._wanted and number < _IDLE_RUNS:
                        self._value(subject, "idle", subject.idle([INSIDE, "idle", str(IDLE_MS)]))
                except UsageError:
                    raise
                except LabkernelError as err:
                    if subject.name == self._lab.containers.driver_name:
                        raise
                    left_out[subject.name] = f"run {number + 1}: {_reason(err)}"
                    self._subjects.remove(subject)
                    del self._rows[subject.name]
                    self._codes.pop(subject.name, None)

    def _run(self, subject: Subject) -> Measured:
        if self._command:
            return subject.run(self._command, self._settings)
        words = ["run", str(BUDGET_MS), *self._asks]
        if subject.family == "bare":
            return subject.run([INSIDE, *words], {})
        return subject.run(words, {"entrypoint": [INSIDE], "user": "0"})

    def _note(self, subject: Subject, done: Measured) -> None:
        self._codes[subject.name] = self._codes.get(subject.name) or done.exit_code
        outside = {"start": done.start_s, "wall": done.wall_s, "cpu_time": done.cpu_s, "peak": done.peak_bytes}
        outside["disk"] = subject.disk_bytes()
        for name, value in outside.items():
            self._value(subject, name, value)
        if not self._command:
            for name, text in told(done.output).items():
                if name in BY_NAME and text != "-":
                    self._value(subject, name, float(text))

    def _value(self, subject: Subject, name: str, value: float | None) -> None:
        if value is not None and name in self._wanted:
            self._rows[subject.name].values.setdefault(name, []).append(float(value))

    def finished(self) -> list[Row]:
        for subject in self._subjects:
            self._rows[subject.name].label = subject.label
        return list(self._rows.values())

    def warnings(self) -> list[str]:
        found = list(dict.fromkeys(note for subject in self._subjects for note in subject.notes))
        found += [f"{name}: the command ended with exit status {code}" for name, code in self._codes.items() if code]
        if any("TCG" in subject.label for subject in self._subjects):
            found.append("TCG emulates the machine's processor in software; under KVM its figures are other ones")
        return found


def _reason(err: LabkernelError) -> str:
    return err.brief if not err.details else f"{err.brief} ({err.details.splitlines()[0]})"
