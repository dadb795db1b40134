"""The Docker SDK's forms of what other services do with images: `build`, `pull`, `push`, `search` on `lab.images`.

Names, arguments and results are those of the Docker SDK for Python, `ImageCollection`; the services behind them
(`lab.builds`, `lab.pulls`, `lab.pushes`) know more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import UsageError
from ..images import Images

if TYPE_CHECKING:
    from ..building.result import BuildStep
    from ..builds import Builds
    from .image import Image
    from .pulls import Pulls
    from .pushes import Pushes


class ImageCollection(Images):
    """`lab.images`. `builds`, `pulls` and `pushes` are made by the engine when they are first used."""

    def __init__(
        self,
        *parts: Any,
        builds: Callable[[], Builds],
        pulls: Callable[[], Pulls],
        pushes: Callable[[], Pushes],
    ) -> None:
        super().__init__(*parts)
        self._services = (builds, pulls, pushes)

    def build(
        self,
        *,
        path: str | Path | None = None,
        fileobj: IO[bytes] | IO[str] | None = None,
        tag: str | None = None,
        dockerfile: str | None = None,
        buildargs: Mapping[str, str] | None = None,
        target: str | None = None,
        nocache: bool = False,
        labels: Mapping[str, str] | None = None,
        pull: bool = False,
        network_mode: str | None = None,
        quiet: bool = False,
        rm: bool = True,
    ) -> tuple[Image, Iterator[dict[str, Any]]]:
        """Build the folder `path`, or the Dockerfile in `fileobj` without a context; (image, log records).

        `dockerfile` is the Dockerfile's path, relative to `path`. `quiet` and `rm` are taken for the SDK's sake: there
        is no intermediate container to keep. Raises what `lab.builds.build` raises.
        """
        if (path is None) == (fileobj is None):
            raise UsageError("Either path or fileobj needs to be specified", resolution="build(path=…, tag=…)")
        context = Path(path) if path is not None else None
        if context is not None:
            given = Path(dockerfile or "Dockerfile")
            try:
                text = (given if given.is_absolute() else context / given).read_text()
            except OSError as err:
                raise UsageError(f"Cannot locate specified Dockerfile: {given}", details=str(err)) from err
        else:
            assert fileobj is not None
            data = fileobj.read()
            text = data.decode() if isinstance(data, bytes) else data
        logs: list[dict[str, Any]] = []
        result = self._services[0]().build(
            text,
            context=context,
            tags=[tag] if tag else [],
            build_args=buildargs,
            target=target,
            no_cache=nocache,
            labels=labels,
            network=network_mode or "default",
            pull=pull,
            on_step=lambda step: logs.extend(_records(step)),
        )
        logs.append({"stream": f"Successfully built {result.image.short_id.removeprefix('sha256:')}\n"})
        return result.image, iter(logs)

    def pull(self, repository: str, tag: str | None = None, *, platform: str | None = None) -> Image:
        """Bring an image from its registry; without `tag`, and where the name has none, it is `latest`."""
        separator = "@" if (tag or "").startswith("sha256:") else ":"
        ref = f"{repository}{separator}{tag}" if tag else repository
        return self._services[1]().pull(ref, platform=platform).image

    def push(self, repository: str, tag: str | None = None) -> str:
        """Bring a tagged image to the registry of its name; JSON lines as the SDK gives them."""
        pushed = self._services[2]().push(f"{repository}:{tag}" if tag else repository)
        name = pushed.name.rpartition(":")[2]
        status = f"{name}: digest: {pushed.digest} size: {pushed.size_bytes}"
        return json.dumps({"status": status}) + "\n"

    def search(self, term: str, *, limit: int = 25) -> list[dict[str, Any]]:
        """Repositories with a word in their name: `WORD` at Docker Hub, `REGISTRY/WORD` at another registry.

        As the Engine API's ImageSearch: name, description, star_count, is_official. Raises RegistryError.
        """
        from .lookups import search

        return search(self._services[1](), term, limit=limit)

    def get_registry_data(self, name: str) -> RegistryData:
        """What a registry has under a name, without pulling it. Raises Refused, RegistryError."""
        from .lookups import distribution

        return RegistryData(self, name, distribution(self._services[1](), name))


class RegistryData:
    """An image as its registry tells of it: `attrs` is the Engine API's DistributionInspect."""

    def __init__(self, images: ImageCollection, name: str, attrs: dict[str, Any]) -> None:
        self.image_name = name
        self.attrs = attrs
        self._images = images

    @property
    def id(self) -> str:
        """The digest that the name stands for there."""
        return str(self.attrs["Descriptor"]["digest"])

    @property
    def short_id(self) -> str:
        return self.id[:19]

    def has_platform(self, platform: str) -> bool:
        """Whether it is there for `os[/architecture[/variant]]`."""
        given = platform.lower().split("/")
        offered = [(each["os"], each["architecture"], each.get("variant", "")) for each in self.attrs["Platforms"]]
        return any(all(a == b for a, b in zip(given, each, strict=False)) for each in offered)

    def pull(self, *, platform: str | None = None) -> Image:
        """The very image that was looked at, also when the tag has moved meanwhile."""
        from ..oci import reference

        return self._images.pull(reference.parse(self.image_name).name, self.id, platform=platform)

    def __repr__(self) -> str:
        return f"<RegistryData {self.image_name} {self.short_id}>"


def _records(step: BuildStep) -> Iterator[dict[str, Any]]:
    """A step as the log lines of `docker build`."""
    if step.status == "started":
        yield {"stream": f"Step {step.number}/{step.total} : {step.text}\n"}
    elif step.status == "output":
        yield {"stream": bytes(step.output).decode(errors="replace")}
    elif step.status == "cached":
        yield {"stream": f"Step {step.number}/{step.total} : {step.text}\n"}
        yield {"stream": " ---> Using cache\n"}
