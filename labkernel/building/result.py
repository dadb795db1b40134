"""What a build tells: BuildStep records while it runs, and the BuildResult, which shows itself."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..display import human_size, table_text, without_formulas

if TYPE_CHECKING:
    from pathlib import Path

    from ..imaging.image import Image


_SHOWN_STEPS = 16  # a table of more lines is folded under its heading


@dataclass
class BuildStep:
    """One step as it stands. `number` runs from 1 to `total` over the stages that are needed.

    `status`: `started`, `output` (`output` holds new bytes of the command), `cached`, `done`, `failed`. `size_bytes`:
    of the files in its layer, None for a step that changed the config only. `why`: why it was not taken from the cache.
    """

    number: int
    total: int
    stage: str
    text: str
    line: int
    end_line: int
    status: str = "started"
    duration_s: float = 0.0
    size_bytes: int | None = None
    layer: str | None = None
    why: str = ""
    output: bytes = b""

    @property
    def cached(self) -> bool:
        return self.status == "cached"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; output as text."""
        return {**vars(self), "output": self.output.decode(errors="replace")}


@dataclass
class Trace:
    """What a build depended on (see unchanged.py). `names`: canonical tag -> id of the images it is based on; `taken`:
    (pattern, selection) of what came from the context `directory`; `keys` of the cache; `began_ns` since 1970."""

    directory: Path | None
    began_ns: int
    names: dict[str, str] = field(default_factory=dict)
    taken: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    repeatable: bool = True


@dataclass
class BuildResult:
    """A finished build: the image, the steps in order, warnings. Iterates as (image, steps), like the Docker SDK's.
    `images` has one for each platform (`linux/arm64`) where several were asked for; `image` is one of them."""

    image: Image
    steps: list[BuildStep]
    warnings: list[str] = field(default_factory=list)
    duration_s: float = 0.0
    trace: Trace | None = field(default=None, repr=False)
    images: dict[str, Image] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.image.id

    @property
    def tags(self) -> list[str]:
        return self.image.tags

    def __iter__(self) -> Any:
        return iter((self.image, self.steps))

    def _summary(self) -> list[str]:
        cached = sum(step.cached for step in self.steps)
        return [
            self.image.id[7:19],
            ", ".join(self.image.tags) or "no tag",
            human_size(self.image.size_bytes),
            _counted(len(self.image.layers), "layer"),
            *([", ".join(self.images)] if self.images else []),
            f"{_counted(len(self.steps), 'step')}, {cached} cached, {self.duration_s:.2f} s",
        ]

    def _rows(self) -> list[list[str]]:
        return [
            [
                str(step.number),
                step.text.split("\n")[0][:100],
                "cached" if step.cached else f"{step.duration_s:.2f} s",
                "" if step.size_bytes is None else human_size(step.size_bytes),
                (step.layer or "")[7:19],
                step.why,
            ]
            for step in self.steps
        ]

    def __repr__(self) -> str:
        table = table_text(["STEP", "INSTRUCTION", "TIME", "SIZE", "LAYER", "WHY"], self._rows())
        return "\n".join(["  ".join(self._summary()), table, *(f"warning: {text}" for text in self.warnings)])

    @without_formulas
    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        cells = []
        for step, (number, text, took, size, layer, why) in zip(self.steps, self._rows(), strict=True):
            mark = "<span style='opacity:.6'>cached</span>" if step.cached else html.escape(took)
            shown = f"<code>{layer}</code>" if layer else ""
            cells.append(
                f"<tr><td>{number}</td><td {left}><code>{html.escape(text)}</code></td><td>{mark}</td>"
                f"<td>{html.escape(size)}</td><td>{shown}</td><td {left}>{html.escape(why)}</td></tr>"
            )
        names = ("step", "instruction", "time", "size", "layer", "why not cached")
        head = "".join(f"<th {left if name[0] in 'iw' else ''}>{name}</th>" for name in names)
        warnings = "".join(f"<div>&#9888; {html.escape(text)}</div>" for text in self.warnings)
        folded = "" if len(self.steps) > _SHOWN_STEPS else " open"
        short, tags, *rest = (html.escape(part) for part in self._summary())
        return (
            f"<div class='labkernel-image'><details{folded}><summary style='cursor:pointer'><b>{tags}</b> · "
            f"<code>{short}</code> · {' · '.join(rest)}</summary><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(cells)}</tbody></table></details>{warnings}</div>"
        )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
