"""What is known of a build beyond its Dockerfile: ignore file, base images that are here, and what they are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ..dockerfile.flags import did_you_mean
from ..dockerfile.ignorefile import BadPattern, IgnoreMatcher, ignore_matcher
from ..dockerfile.instructions import Program, Stage, find_named_stage
from ..dockerfile.lint import Surroundings
from ..dockerfile.parser import excerpt
from ..dockerfile.variables import Lexer
from ..errors import LabkernelError, NoSuchImage, UsageError
from ..imaging.variants import find_for
from ..oci.platforms import fits, normal, parse_platform
from .targets import build_platform, platform_of

if TYPE_CHECKING:
    from ..images import Images
    from ..imaging.image import Image
    from ..oci.manifest import Platform


def surroundings(
    images: Images,
    program: Program,
    build_args: Mapping[str, str],
    scope: Mapping[str, str],
    ignore: IgnoreMatcher | None,
    *,
    platform: Platform | None = None,
    needed: Collection[int] | None = None,
) -> Surroundings:
    """For `lint`. Nothing is fetched: of a base image that is not here nothing is known. `scope`: the global ARGs;
    `platform`: what is built for, this machine's by default; `needed`: the stages whose bases will be used."""
    lexer = Lexer(program.dockerfile.escape)

    def wanted(stage: Stage) -> Platform:
        asked = lexer.process(stage.platform, scope).result if stage.platform else ""
        return normal(parse_platform(asked)) if asked else platform or build_platform()

    def base(stage: Stage) -> tuple[str, Image] | None:
        try:
            name = lexer.process(stage.base, scope).result
            if name == "scratch" or find_named_stage(program.stages[: stage.index], name) is not None:
                return None
            image = find_for(images, name, wanted(stage)) or images.find(name)
        except LabkernelError:
            return None
        return (name, image) if image is not None else None

    def environment(stage: Stage) -> Mapping[str, str] | None:
        found = base(stage)
        words = (found[1].raw_config.get("config") or {}).get("Env") or () if found else None
        # PATH is set for an image that has none.
        return None if words is None else {"PATH": "", **dict(word.partition("=")[::2] for word in words)}

    def base_platform(stage: Stage) -> tuple[str, str, str] | None:
        found = base(stage) if needed is None or stage.index in needed else None
        if found is None or not found[1].architecture or fits(found[1].raw_config, wanted(stage)):
            return None
        return found[0], str(platform_of(found[1].raw_config)), str(wanted(stage))

    return Surroundings(build_args=build_args, ignore=ignore, base_env=environment, base_platform=base_platform)


def read_ignore(text: str) -> IgnoreMatcher | None:
    """The matcher for the text of a .dockerignore; None where it leaves nothing out. Raises UsageError, with its lines:
    those of the Dockerfile have nothing to do with it."""
    if not text.strip():
        return None
    try:
        return ignore_matcher(text)
    except BadPattern as err:
        raise UsageError(
            f"error reading .dockerignore, line {err.line}: {err.brief}",
            details=excerpt(text, err.line or 1),
            resolution=err.resolution,
            exit_code=1,
        ) from None


def suggesting(err: NoSuchImage, name: str, stages: Sequence[Stage], images: Images) -> NoSuchImage:
    """The same error, with the stage or local image of a similar name."""
    from ..imaging.bases import NAMES

    tags = [row[0] for row in images.db.query("SELECT name FROM tags ORDER BY name")]
    short = [tag.removeprefix("docker.io/").removeprefix("library/") for tag in tags]
    known = [stage.name for stage in stages if stage.name]
    known += ["scratch", *(f"lab/{base}" for base in NAMES), *(tag.removesuffix(":latest") for tag in short), *short]
    hint = did_you_mean(name, dict.fromkeys(known))
    if hint:
        err.brief += hint
        err.args = (err.brief,)
    return err
