"""Portability, shown: the same image digest as a container, as a virtual machine, and in a real Docker.

What is portable is the image: one digest names its bytes wherever they go. Each side runs it and computes a digest over
all files of its root (names, modes, contents; bench.c, `tree`); the same number is the proof.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..display import table_html, table_text, without_formulas
from ..errors import LabkernelError
from ..metrics import dataframe
from .program import INSIDE, told
from .subjects import Docker, Subject, make_subject
from .words import disk_text, machine_text

if TYPE_CHECKING:
    from .laboratory import Laboratory

ROWS = ("root", "rootless", "proot", "vm", "docker")


@dataclass(frozen=True, repr=False)
class Portability:
    """`sides`: dictionaries with `side`, `image` (the digest it ran), `kernel`, `files`, `tree` (their digest)."""

    image: str
    digest: str
    archive_digest: str
    archive_bytes: int
    sides: list[dict[str, str]]
    left_out: dict[str, str]
    machine: str

    @property
    def same(self) -> bool:
        """Whether the exported archive and every side have the same digest and the same files."""
        trees = {side["tree"] for side in self.sides}
        images = {side["image"] for side in self.sides} | {self.archive_digest}
        return len(trees) == 1 and images == {self.digest}

    def header(self) -> tuple[str, ...]:
        return ("run by", "image digest", "kernel", "files", "digest of all files")

    def table(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            (side["side"], f"{side['image'][:19]}…", side["kernel"], side["files"], side["tree"]) for side in self.sides
        ]
        rows.append(("exported (docker save)", f"{self.archive_digest[:19]}…", "", disk_text(self.archive_bytes), ""))
        return rows

    def verdict(self) -> str:
        count = len(self.sides)
        if self.same:
            return f"the same image and the same files in all {count} ways to run it and in the exported archive"
        return "the files differ: see the digests"

    def caption(self) -> str:
        return f"{self.image}: {self.digest[:19]}…; {self.machine}"

    def text(self) -> str:
        lines = [self.caption(), table_text(self.header(), self.table()), self.verdict()]
        return "\n".join([*lines, *(f"{name}: left out: {why}" for name, why in self.left_out.items())])

    def __repr__(self) -> str:
        return self.text()

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        notes = [self.verdict(), *(f"{name}: left out: {why}" for name, why in self.left_out.items())]
        told_notes = "".join(f"<p><em>{html.escape(note)}</em></p>" for note in notes)
        table = table_html(self.header(), self.table(), caption=self.caption())
        return f"<div style='overflow-x:auto'>{table}</div>{told_notes}"

    def rows(self) -> list[dict[str, Any]]:
        return [dict(side) for side in self.sides]

    def to_dataframe(self) -> Any:
        return dataframe(self.rows())

    def to_json(self) -> str:
        return json.dumps({"format": "labkernel.portability/1", **asdict(self)}, separators=(",", ":"))


def portability(lab: Laboratory, image: str, *, context: str = "") -> Portability:
    """Run `image` in each way that works here and compare digests; Docker where its command line and engine answer."""
    sides: list[dict[str, str]] = []
    left_out: dict[str, str] = {}
    with lab.instrumented(image) as (made, name), contextlib.ExitStack() as undo:
        archived, size = _exported(lab, name)
        for row in ROWS:
            lab.say(f"running it as {row}")
            try:
                subject = make_subject(lab, row, made, name, context=context)
                undo.callback(subject.close)
                sides.append(_side(subject, made.id))
            except LabkernelError as err:
                if row == lab.containers.driver_name:
                    raise
                left_out[row] = err.brief
        return Portability(image, made.id, archived, size, sides, left_out, machine_text())


def _side(subject: Subject, digest: str) -> dict[str, str]:
    inside: Mapping[str, Any] = {"entrypoint": [INSIDE], "user": "0"}
    found = told(subject.run(["tree"], inside).output)
    seen = told(subject.run(["look"], inside).output)
    if "tree" not in found:
        raise LabkernelError("the measuring program did not end")
    ran = subject.image_digest() if isinstance(subject, Docker) else digest
    return {
        "side": subject.label,
        "image": ran,
        "kernel": seen.get("kernel", "?"),
        "files": found["files"],
        "tree": found["tree"],
    }


def _exported(lab: Laboratory, name: str) -> tuple[str, int]:
    """(the digest of the config in a `docker save` archive of the image, bytes of the archive)."""
    with tempfile.TemporaryFile() as archive:
        lab.images.save([name], archive)
        size = archive.tell()
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            manifest = tar.extractfile("manifest.json")
            assert manifest is not None
            config = tar.extractfile(json.load(manifest)[0]["Config"])
            assert config is not None
            return f"sha256:{hashlib.sha256(config.read()).hexdigest()}", size
