"""What a build's failure says: the lines of the Dockerfile it belongs to, the end of the output, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dockerfile.instructions import Instruction
from ..errors import DISK_FULL_HINT, BuildError, DiskFull, DockerfileError, LabkernelError, foreign_hint
from .layers import RunEnded

_SHOWN_LINES = 12


def located(
    err: BaseException, lines: str, place: Instruction, *, tail: bytes = b"", instruction: Instruction | None = None
) -> BaseException:
    """The same failure with the lines of the Dockerfile it belongs to, those of `place`, which are `lines`; `tail` is
    the end of what `instruction` put out."""
    where: dict[str, Any] = {"line": place.line, "end_line": place.end_line}
    if isinstance(err, RunEnded):
        return _of_run(err, tail, lines, where, instruction)
    if isinstance(err, DiskFull):
        err.details = err.details or lines
        return err
    if isinstance(err, DockerfileError):
        if err.line is None:
            err.line, err.end_line = place.line, place.end_line
        err.details = err.details or lines
        return err
    if isinstance(err, LabkernelError):
        return BuildError(
            err.brief,
            details="\n".join(part for part in (err.details, lines) if part),
            resolution=err.resolution,
            link=err.link,
            **where,
        )
    return err


def _of_run(
    err: RunEnded, tail: bytes, lines: str, where: dict[str, Any], instruction: Instruction | None
) -> LabkernelError:
    shown = tail.decode(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
    details = "\n".join([*shown, lines])
    if err.disk_full:
        brief = "the disk became full while the image was built"
        return DiskFull(brief, details=details, resolution=DISK_FULL_HINT)
    command = getattr(instruction, "text", "").split(" ", 1)[-1].splitlines()[0] if instruction else ""
    why = "out of memory" if err.oom_killed else f"exit code: {err.status}"
    brief = f'process "{command}" did not complete successfully: {why}'
    if err.error and err.status in (126, 127) and not shown:
        brief = f"{brief}: {err.error}"
    resolution = foreign_hint(err.error) or _hint(err.status, shown)
    return BuildError(brief, status=err.status, details=details, resolution=resolution, **where)


def _hint(status: int, shown: Sequence[str]) -> str:
    text = "\n".join(shown)
    if status == 127 or "not found" in text:
        return "the command is not in the image at this step: install it in an earlier RUN, or check its spelling"
    if any(word in text for word in ("resolve", "Network is unreachable", "Temporary failure")):
        return (
            "RUN is in the default network: does this machine reach the address? `labkernel doctor` knows of networks; "
            "--network=host, given to the build, shares the machine's own"
        )
    return (
        "`%container debug` (in a terminal `labkernel debug`) opens a shell in the file system just before this step; "
        "the steps before it are cached, so the next build starts here"
    )
