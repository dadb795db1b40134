"""Where the last build failed: the file system and the settings just before the failing step, to look around in.

A build that fails leaves a small record in the store's settings: no content of its own, since the layers of finished
steps are in the build cache. The next build takes it back. ARG values are in it, secrets never are.
"""

from __future__ import annotations

import copy
import secrets
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from ..errors import LabkernelError, StoreError
from ..store.catalog import LayerInfo

if TYPE_CHECKING:
    from ..images import Images
    from ..imaging.image import Image
    from ..store.database import Database
    from .result import BuildStep
    from .steps import State

_SETTING = "build-failure"
_GONE = "build again: a finished step is built anew, the failing one fails again"


class NoFailedBuild(LabkernelError):
    """No build has failed, or a later one was started since."""


class FailedStep(Struct, frozen=True):
    """The step a build ended at. `environment` holds the ARG values of its RUN beside what the config has;
    `lines_above` is how many lines its author sees above the Dockerfile's first (a cell's magic)."""

    text: str
    line: int
    stage: str
    document: dict[str, Any]
    layers: list[LayerInfo]
    environment: dict[str, str] = field(default_factory=dict)
    lines_above: int = 0

    @property
    def shell(self) -> str:
        """The program that would have run the step."""
        words = (self.document.get("config") or {}).get("Shell") or ["/bin/sh"]
        return str(words[0])

    def image(self, images: Images) -> Image:
        """An image without a name of the file system before the step; its owner removes it.

        Raises StoreError when a layer is no longer there (the build cache was pruned).
        """
        document = copy.deepcopy(self.document)
        config = document["config"]
        for name in ("Entrypoint", "Cmd", "Healthcheck"):
            config.pop(name, None)
        # Its own identity, so that removing it is never removing somebody's image.
        config["Labels"] = {**(config.get("Labels") or {}), "labkernel.debug": secrets.token_hex(8)}
        with images.adding():
            try:
                return images.commit_layers(document, self.layers)
            except StoreError as err:
                raise StoreError(f"the steps before it are no longer kept: {err.brief}", resolution=_GONE) from err

    def __repr__(self) -> str:
        config = self.document.get("config") or {}
        place = f"user {config.get('User') or 'root'}, in {config.get('WorkingDir') or '/'}"
        text = self.text.split("\n")[0]
        return (
            f"failed at line {self.line + self.lines_above} of stage {self.stage}: {text}\n"
            f"{place}, {len(self.layers)} layers before it\n"
            "`debug COMMAND…` runs a command there; nothing it changes is kept"
        )


def remember_failure(db: Database, state: State, step: BuildStep) -> None:
    """Record where a build failed; `state` is the stage's, as it was before the step."""
    record = {
        "text": step.text,
        "line": step.line,
        "stage": step.stage,
        "document": state.document,
        "layers": [list(layer) for layer in state.layers],
        "environment": state.arguments,
    }
    db.remember(_SETTING, record)


def forget_failure(db: Database) -> None:
    """A new build begins."""
    if db.setting(_SETTING) is not None:
        db.remember(_SETTING, None)


def show_in_cell(db: Database, line: int) -> None:
    """Where the last build failed at `line`: its author sees the Dockerfile below the first line of a cell."""
    record = db.setting(_SETTING)
    if record is not None and record["line"] == line:
        db.remember(_SETTING, {**record, "lines_above": 1})


def find_failure(db: Database) -> FailedStep:
    """The step the last build failed at. Raises NoFailedBuild."""
    record = db.setting(_SETTING)
    if record is None:
        raise NoFailedBuild(
            "the last build did not fail", resolution="after a build that fails, `debug` looks at the step before"
        )
    return FailedStep(**{**record, "layers": [LayerInfo(*layer) for layer in record["layers"]]})
