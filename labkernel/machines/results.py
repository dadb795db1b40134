"""What a command in a virtual machine gave and cost."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from ..display import human_memory, human_size, table_html, table_text, without_formulas


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a run cost. `cpu_s` and `peak_rss_bytes` are those of the QEMU process, as the host sees them.

    `inside` is the command's rusage in the guest (`user_us`, `system_us`, `maxrss_kib`, …): its CPU times count the
    guest's clock, which lies when the host is busy.
    """

    cpu_s: float
    peak_rss_bytes: int
    rss_bytes: int
    inside: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class VMResult:
    """How a command in a VM ended.

    `timings`, all in seconds since QEMU was asked for: `ready_s` (the root is mounted), `exec_s` (the command's first
    instruction), `wall_s` (its end); `prepare_s` is what came before and is not in them (disk, kernel, template).
    `start` is `template`, `cold` or `snapshot`, `accelerator` `kvm` or `tcg`, with the reason. `disk_bytes` is what the
    image's disk takes on the host, plus what this run wrote.
    """

    image: str
    command: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes
    timings: Mapping[str, float]
    usage: Usage
    accelerator: str
    accelerator_reason: str
    start: str
    kernel: str
    memory_bytes: int
    disk_bytes: int
    warnings: tuple[str, ...] = ()
    id: str = ""

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("exit code", str(self.exit_code)),
            ("kernel", self.kernel),
            ("accelerator", f"{self.accelerator.upper()} ({self.accelerator_reason})"),
            ("start", self.start),
            ("root ready", f"{self.timings['ready_s']:.2f} s"),
            ("first instruction", f"{self.timings['exec_s']:.2f} s"),
            ("wall", f"{self.timings['wall_s']:.2f} s"),
            ("CPU of QEMU", f"{self.usage.cpu_s:.2f} s"),
            ("peak memory of QEMU", human_memory(self.usage.peak_rss_bytes)),
            ("memory of the machine", human_memory(self.memory_bytes)),
            ("disk", human_size(self.disk_bytes)),
        ]

    def __repr__(self) -> str:
        return table_text(("VM", self.image), self._rows())

    @without_formulas
    def _repr_html_(self) -> str:
        return table_html(("VM", self.image), self._rows(), caption=shlex.join(self.command))


def timings_of(facts: Mapping[str, Any], prepare_s: float) -> dict[str, float]:
    """The `timings` of what machine.json tells."""
    asked = float(facts.get("asked_at") or 0.0)

    def since(name: str) -> float:
        return max(0.0, float(facts[name]) - asked) if facts.get(name) else 0.0

    return {
        "ready_s": since("ready_at"),
        "exec_s": since("exec_at"),
        "wall_s": since("ended_at"),
        "prepare_s": prepare_s,
    }


def usage_of(facts: Mapping[str, Any]) -> Usage:
    """The `Usage` of what machine.json tells."""
    inside = {name: int(value) for name, value in (facts.get("inside") or {}).items()}
    return Usage(
        cpu_s=float(facts.get("cpu_s") or 0.0),
        peak_rss_bytes=int(facts.get("peak_rss_bytes") or 0),
        rss_bytes=int(facts.get("rss_bytes") or 0),
        inside=inside,
    )
