"""What the build checks may know of a build beyond its Dockerfile: ignore file and base images that are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..dockerfile.ignorefile import IgnoreMatcher
from ..dockerfile.instructions import Program, Stage, find_named_stage
from ..dockerfile.lint import Surroundings
from ..dockerfile.variables import Lexer
from ..errors import LabkernelError
from ..oci.config import host_architecture

if TYPE_CHECKING:
    from ..images import Images
    from ..imaging.image import Image


def surroundings(
    images: Images,
    program: Program,
    build_args: Mapping[str, str],
    scope: Mapping[str, str],
    ignore: IgnoreMatcher | None,
) -> Surroundings:
    """For `lint`. Nothing is fetched: of a base image that is not here nothing is known. `scope`: the global ARGs."""
    lexer = Lexer(program.dockerfile.escape)

    def base(stage: Stage) -> tuple[str, Image] | None:
        try:
            name = lexer.process(stage.base, scope).result
            if name == "scratch" or find_named_stage(program.stages[: stage.index], name) is not None:
                return None
            image = images.find(name)
        except LabkernelError:
            return None
        return (name, image) if image is not None else None

    def environment(stage: Stage) -> Mapping[str, str] | None:
        found = base(stage)
        words = (found[1].raw_config.get("config") or {}).get("Env") or () if found else None
        # PATH is set for an image that has none.
        return None if words is None else {"PATH": "", **dict(word.partition("=")[::2] for word in words)}

    def platform(stage: Stage) -> tuple[str, str, str] | None:
        found = base(stage)
        if found is None or not found[1].architecture:
            return None
        actual = f"{found[1].raw_config.get('os') or 'linux'}/{found[1].architecture}"
        return found[0], actual, f"linux/{host_architecture()}"

    return Surroundings(build_args=build_args, ignore=ignore, base_env=environment, base_platform=platform)
