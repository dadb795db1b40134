"""Isolation, shown: what a program sees from inside a container and from inside a virtual machine, beside the host.

The measuring program looks (`bench look`); nothing is inferred. Whose kernel it is, the boot id tells: the kernel makes
it once for each boot, and a container shows the host's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..display import table_html, table_text, without_formulas
from ..errors import LabkernelError
from ..metrics import dataframe
from .program import INSIDE, told
from .subjects import Bare, Container, Machine, Subject
from .words import machine_text, memory_text

if TYPE_CHECKING:
    from .laboratory import Laboratory


@dataclass(frozen=True, repr=False)
class Isolation:
    """What each side saw: `seen` maps `host`, `container` and `vm` to names and words of bench.c."""

    image: str
    driver: str
    seen: dict[str, dict[str, str]]
    machine: str
    warnings: list[str]

    @property
    def shares_kernel(self) -> dict[str, bool]:
        """Whether a side runs on the host's kernel: its boot id is the host's."""
        host = self.seen["host"].get("boot_id")
        return {side: found.get("boot_id") == host for side, found in self.seen.items() if side != "host"}

    def header(self) -> tuple[str, ...]:
        names = {"host": "this machine", "container": f"container ({self.driver})", "vm": "virtual machine"}
        return ("", *(names[side] for side in self.seen))

    def table(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, label in _SHOWN:
            rows.append((label, *(_said(name, found.get(name, "?")) for found in self.seen.values())))
        reach = ["everything here"]
        for side, shared in self.shares_kernel.items():
            inside = "this machine and everything on it"
            reach.append(
                inside if shared else f"the {_NAMES[side]}; then QEMU, a process of the user, stands before it"
            )
        rows.append(("a bug in that kernel reaches", *reach))
        return rows

    def caption(self) -> str:
        return f"what {self.image} sees from inside; {self.machine}"

    def text(self) -> str:
        lines = [self.caption(), table_text(self.header(), self.table())]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        return self.text()

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        notes = "".join(f"<p><em>{html.escape(warning)}</em></p>" for warning in self.warnings)
        table = table_html(self.header(), self.table(), caption=self.caption())
        return f"<div style='overflow-x:auto'>{table}</div>{notes}"

    def rows(self) -> list[dict[str, Any]]:
        return [{"side": side, **found} for side, found in self.seen.items()]

    def to_dataframe(self) -> Any:
        return dataframe(self.rows())

    def to_json(self) -> str:
        return json.dumps({"format": "labkernel.isolation/1", **asdict(self)}, separators=(",", ":"))


_NAMES = {"container": "container", "vm": "guest"}
_SHOWN = (
    ("kernel", "kernel"),
    ("boot_id", "boot id"),
    ("uptime", "uptime"),
    ("processes", "processes seen"),
    ("pid", "it is process"),
    ("devices", "devices in /dev"),
    ("disks", "disks in /dev"),
    ("interfaces", "network interfaces"),
    ("modules", "kernel modules listed"),
    ("kmsg", "the kernel's log (/proc/kmsg)"),
    ("set_clock", "setting the clock"),
    ("memory", "memory it sees"),
    ("cpus", "processors it sees"),
    ("hostname", "host name"),
)


def _said(name: str, value: str) -> str:
    if name == "memory" and value.isdigit():
        return memory_text(int(value))
    if name == "uptime":
        return f"{float(value.split()[0]):,.1f} s" if value[:1].isdigit() else value
    if name == "boot_id":
        return f"{value[:8]}…" if len(value) > 30 else value
    return "hidden" if value == "-1" else value


def isolation(lab: Laboratory, image: str) -> Isolation:
    """Look from inside a container and a virtual machine of `image`, and from this machine itself."""
    warnings: list[str] = []
    driver = lab.containers.driver_name
    with lab.instrumented(image) as (made, _name):
        sides: dict[str, Subject] = {
            "host": Bare(lab.program(), lab.scratch),
            "container": Container(lab, made, driver),
            "vm": Machine(lab, made, cold=False, say=lab.say),
        }
        seen: dict[str, dict[str, str]] = {}
        for side, subject in sides.items():
            lab.say(f"looking from inside: {subject.label}")
            inside: Mapping[str, Any] = {} if side == "host" else {"entrypoint": [INSIDE], "user": "0"}
            try:
                output = subject.run([INSIDE, "look"] if side == "host" else ["look"], inside).output
                seen[side] = told(output)
            except LabkernelError as err:
                if side != "vm":
                    raise
                warnings.append(f"no virtual machine: {err.brief}")
    return Isolation(image, driver, seen, machine_text(), warnings)
