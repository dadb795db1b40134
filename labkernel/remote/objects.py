"""Objects of a remote daemon: the Docker SDK's, with its errors as ours; images and pulls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..display import human_age, human_size, table_html, without_formulas
from ..errors import (
    ConflictError,
    DriverError,
    LabkernelError,
    NoSuchContainer,
    NoSuchImage,
    NoSuchNetwork,
    NoSuchVolume,
    NotFoundError,
    StartError,
    UsageError,
)
from ..imaging.image import ImageList

if TYPE_CHECKING:
    from .engine import RemoteEngine

_MISSING = {"container": NoSuchContainer, "image": NoSuchImage, "network": NoSuchNetwork, "volume": NoSuchVolume}
Notify = Callable[[str], None]


class RemoteError(LabkernelError):
    """The daemon refused, or does not answer."""

    exit_code = 1


@contextlib.contextmanager
def translated(kind: str = "object", name: str = "") -> Iterator[None]:
    """The SDK's errors as ours, with the daemon's words."""
    import docker.errors
    import requests.exceptions

    try:
        yield
    except docker.errors.APIError as err:
        said = str(err.explanation or err)
        status = err.response.status_code if err.response is not None else 500
        if status == 404 and name:
            cls: type[NotFoundError] = _MISSING.get(kind, NotFoundError)
            raise cls(name) from None
        classes: dict[int, type[LabkernelError]] = {400: UsageError, 404: RemoteError, 409: ConflictError}
        if status in (400, 500) and ("exec" in said or "start" in said) and "not found" in said:
            raise StartError(said, exit_code=127) from None
        raise classes.get(status, RemoteError)(said) from None
    except docker.errors.DockerException as err:
        raise RemoteError(str(err)) from None
    except (requests.exceptions.RequestException, OSError) as err:
        raise RemoteError(f"Cannot connect to the daemon: {err}", resolution="`context ls` shows its address") from None


def only_at_home(name: str, engine: RemoteEngine) -> Exception:
    """The error for what a remote engine has not; for special names the one Python expects."""
    if name.rpartition(".")[2].startswith("_"):
        return AttributeError(name)
    return DriverError(
        f"{name}: only the embedded engine has this, and the context is {engine.context.name}",
        resolution="`context use embedded` comes back",
    )


class RemoteObject:
    """An object of the Docker SDK with its errors as ours; attributes it does not have are the SDK's."""

    def __init__(self, engine: RemoteEngine, inner: Any, kind: str) -> None:
        self._engine = engine
        self._inner = inner
        self._kind = kind

    @property
    def id(self) -> str:
        return str(self._inner.id)

    @property
    def name(self) -> str:
        return str(getattr(self._inner, "name", None) or self._inner.id)

    @property
    def attrs(self) -> dict[str, Any]:
        found: dict[str, Any] = self._inner.attrs
        return found

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.attrs.get("Labels") or (self.attrs.get("Config") or {}).get("Labels") or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with translated(self._kind, self.name):
                return found(*args, **kwargs)

        return call

    def __repr__(self) -> str:
        return f"<{self._kind.capitalize()} {self.name} on {self._engine.context.name}>"

    @without_formulas
    def _repr_html_(self) -> str:
        rows = [(key, str(value)) for key, value in self.attrs.items() if isinstance(value, (str, int)) and value != ""]
        return table_html((self._kind, self.name), rows[:12], caption=self._engine.context.name)


class RemoteNetwork(RemoteObject):
    """A network elsewhere."""

    @property
    def short_id(self) -> str:
        return self.id[:12]

    @property
    def driver(self) -> str:
        return str(self.attrs.get("Driver") or "")

    @property
    def internal(self) -> bool:
        return bool(self.attrs.get("Internal"))

    @property
    def created_at(self) -> float:
        return seconds(self.attrs.get("Created"))


def seconds(text: Any) -> float:
    """Seconds since the epoch of a daemon's timestamp; 0.0 for none (its year 1, too)."""
    from ..runtime.logreader import parse_moment

    return parse_moment(text) if isinstance(text, str) and text and not text.startswith("0001") else 0.0


class RemoteImage(RemoteObject):
    """An image elsewhere."""

    provenance: dict[str, Any] = {}

    @property
    def tags(self) -> list[str]:
        return list(self._inner.tags)

    @property
    def repo_digests(self) -> list[str]:
        return list(self.attrs.get("RepoDigests") or ())

    @property
    def created(self) -> float:
        return seconds(self.attrs.get("Created"))

    @property
    def short_id(self) -> str:
        return self.id[:19]

    @property
    def size_bytes(self) -> int:
        return int(self.attrs.get("Size") or 0)

    @property
    def layers(self) -> list[str]:
        """The diff IDs, bottom first."""
        return list((self.attrs.get("RootFS") or {}).get("Layers") or ())

    @property
    def architecture(self) -> str:
        return str(self.attrs.get("Architecture") or "")

    @property
    def config(self) -> dict[str, Any]:
        return self.attrs.get("Config") or {}

    def __repr__(self) -> str:
        names = ", ".join(self.tags) or "<none>"
        age, size = human_age(self.created), human_size(self.size_bytes)
        return f"<Image {names} {self.short_id[7:]} {size} {age} on {self._engine.context.name}>"


class RemoteImages:
    """Images elsewhere."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._inner = engine.client.images

    def _image(self, inner: Any) -> RemoteImage:
        return RemoteImage(self._engine, inner, "image")

    def get(self, ref: str) -> RemoteImage:
        with translated("image", ref):
            return self._image(self._inner.get(ref))

    def find(self, ref: str) -> RemoteImage | None:
        try:
            return self.get(ref)
        except NoSuchImage:
            return None

    def list(self, name: str | None = None, *, all: bool = False, filters: Any = None) -> Any:
        with translated():
            return ImageList(self._image(each) for each in self._inner.list(name=name, all=all, filters=filters))  # type: ignore[misc]

    def is_builtin(self, wanted: Any) -> bool:
        return False

    def registry_answers(self, domain: str, *, fresh: bool = False) -> bool:
        """Whether the daemon reaches a registry is its own affair."""
        return True

    def names(self, repository: str) -> Sequence[str]:
        return [tag for image in self.list(repository) for tag in image.tags]

    def tag(self, ref: str, name: str) -> None:
        image = self.get(ref)
        repository, colon, tag = name.rpartition(":")
        with translated("image", ref):
            image._inner.tag(
                repository if colon and "/" not in tag else name, tag if colon and "/" not in tag else None
            )

    def remove(self, ref: str, *, force: bool = False) -> Any:
        with translated("image", ref):
            return self._engine.client.api.remove_image(ref, force=force)

    def history(self, ref: str) -> Any:
        image = self.get(ref)
        with translated("image", ref):
            return image._inner.history()

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with translated():
            found: dict[str, Any] = self._inner.prune(filters=dict(filters or {}))
        return {**found, "ImagesDeleted": found.get("ImagesDeleted") or []}

    def pull(self, repository: str, tag: str | None = None, *, platform: str | None = None) -> RemoteImage:
        ref = f"{repository}:{tag}" if tag else repository
        return self._engine.pulls.pull(ref, platform=platform).image

    def build(self, **options: Any) -> tuple[RemoteImage, Any]:
        """The Docker SDK's `images.build`."""
        with translated():
            image, log = self._inner.build(**options)
        return self._image(image), log

    def save(self, refs: Sequence[str], out: Any, *, platform: str | None = None) -> None:
        """One archive of several images. Raises NoSuchImage, UsageError for a platform."""
        if platform is not None:
            raise UsageError("--platform is not passed on to another engine in this release")
        api = self._engine.client.api
        for ref in refs:
            self.get(ref)
        with translated("image", refs[0]):
            response = api._get(api._url("/images/get"), params={"names": list(refs)}, stream=True)
            api._raise_for_status(response)
            for chunk in response.iter_content(1 << 20):
                out.write(chunk)

    def load(self, source: Any, *, notify: Notify = lambda line: None) -> Sequence[RemoteImage]:
        """The images of an archive: a path or a stream."""
        with contextlib.ExitStack() as stack, translated():
            stream = stack.enter_context(open(source, "rb")) if isinstance(source, (str, os.PathLike)) else source
            found = [self._image(each) for each in self._inner.load(stream)]
        for image in found:
            for line in [f"Loaded image: {tag}" for tag in image.tags] or [f"Loaded image ID: {image.id}"]:
                notify(line)
        return found

    def __getattr__(self, name: str) -> Any:
        raise only_at_home(f"images.{name}", self._engine)


class RemotePulled(NamedTuple):
    image: RemoteImage
    digest: str
    new: bool


class RemotePulls:
    """Pulls by the daemon, with its progress as lines."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    def pull(
        self,
        ref: str,
        *,
        platform: str | None = None,
        unpack: bool = True,
        notify: Notify = lambda line: None,
        watch: Any = None,
    ) -> RemotePulled:
        from ..imaging.pulls import parse_name

        wanted, digest, new = parse_name(ref), "", False
        with translated("image", ref):
            for record in self._engine.client.api.pull(
                wanted.name, tag=wanted.digest or wanted.tag, stream=True, decode=True, platform=platform
            ):
                status = str(record.get("status") or "")
                if "error" in record:
                    raise RemoteError(str(record["error"]))
                if status.startswith("Digest: "):
                    digest = status.removeprefix("Digest: ")
                new = new or status.startswith("Status: Downloaded")
        return RemotePulled(self._engine.images.get(ref), digest, new)


class RemotePushed(NamedTuple):
    name: str
    digest: str
    size_bytes: int


class RemotePushes:
    """Pushes by the daemon, with the log-ins of Docker's own configuration on this machine."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    def push(
        self, ref: str, *, chunk_bytes: int | None = None, notify: Notify = lambda line: None, watch: Any = None
    ) -> RemotePushed:
        from ..imaging.pulls import parse_name

        wanted, digest, size = parse_name(ref), "", 0
        with translated("image", ref):
            for record in self._engine.client.api.push(wanted.name, tag=wanted.tag, stream=True, decode=True):
                if "error" in record:
                    raise RemoteError(str(record["error"]))
                if isinstance(record.get("aux"), dict):
                    digest, size = str(record["aux"].get("Digest") or ""), int(record["aux"].get("Size") or 0)
        return RemotePushed(wanted.familiar, digest, size)
