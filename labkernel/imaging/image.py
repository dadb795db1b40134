"""One image and a list of images, as values that show themselves; `images` makes them and does the work."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..display import human_age, human_size, table_html, table_text, without_formulas
from ..errors import UsageError
from ..oci import reference
from ..oci.config import timestamp
from ..store.catalog import HOST_LAYER, ImageRow, LayerInfo

if TYPE_CHECKING:
    from ..images import Images


class Image:
    """One stored image. Its content never changes; `tags` are read anew each time."""

    def __init__(self, images: Images, row: ImageRow) -> None:
        self._images = images
        self._row = row
        self._document: dict[str, Any] | None = None
        self._layers: list[LayerInfo] | None = None

    @property
    def id(self) -> str:
        """`sha256:` + hex: the digest of the config blob."""
        return self._row.id

    @property
    def short_id(self) -> str:
        """As the Docker SDK shortens: `sha256:` + 12 hex digits."""
        return self._row.id[:19]

    @property
    def tags(self) -> list[str]:
        """Familiar names (`busybox:latest`), sorted."""
        return sorted(reference.parse(name).familiar for name in self._images.catalog.tags(self.id))

    @property
    def labels(self) -> dict[str, str]:
        return self.config.get("Labels") or {}

    @property
    def raw_config(self) -> dict[str, Any]:
        """The whole config document (image-spec config.md). Shared: copy before changing it."""
        if self._document is None:
            self._document = json.loads(self._images.blobs.read(self.id))
        return self._document

    @property
    def config(self) -> dict[str, Any]:
        """The `config` object of the config document: Cmd, Env, WorkingDir, … Shared: copy before changing it."""
        return self.raw_config.get("config") or {}

    @property
    def architecture(self) -> str:
        """In Go's words: `amd64`, `arm64`."""
        return str(self.raw_config.get("architecture") or "")

    @property
    def created(self) -> float:
        """Seconds since the epoch; 0.0 where the config does not say."""
        return self._row.created_at

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the image comes from, e.g. `{"builtin": "lab/busybox"}`; empty for built and imported ones."""
        return self._row.provenance

    @property
    def layers(self) -> list[LayerInfo]:
        """(diff_id, digest, media_type, size_bytes of the blob), bottom first."""
        if self._layers is None:
            self._layers = self._images.catalog.layers(self.id)
        return self._layers

    @property
    def uses_host(self) -> bool:
        """Whether the lowest layer is this machine's own root (`lab/host`)."""
        return any(layer.media_type == HOST_LAYER for layer in self.layers)

    @property
    def host_masks(self) -> tuple[list[str], list[dict[str, Any]]]:
        """What hides the host's secrets in a container: (masked paths, runtime-spec mounts). Empty for other images."""
        if not self.uses_host:
            return [], []
        from .bases import host_masks

        return host_masks(self._images.layout)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files in all layers; of the blob for a layer that has not been unpacked."""
        return sum(self._images.catalog.layer_sizes(self.id))

    @property
    def repo_digests(self) -> list[str]:
        """`NAME@DIGEST` of each registry it came from or went to. From the catalog: no blob is read."""
        return [reference.parse(name).familiar for name in self._images.catalog.repo_digests(self.id)]

    @property
    def attrs(self) -> dict[str, Any]:
        """As `docker image inspect` shows it (Docker Engine API, ImageInspect)."""
        document, catalog = self.raw_config, self._images.catalog
        tagged = catalog.last_tagged(self.id)
        last = (document.get("history") or [{}])[-1]
        diff_ids = [layer.diff_id for layer in self.layers]
        directories = [str(self._images.layer_path(layer)) for layer in reversed(self.layers)]
        driver_data = {"LowerDir": ":".join(directories[1:]), "UpperDir": "".join(directories[:1])}
        return {
            "Id": self.id,
            "RepoTags": self.tags,
            "RepoDigests": self.repo_digests,
            "Parent": "",
            "Comment": last.get("comment") or "",
            "Created": document.get("created") or "",
            "DockerVersion": str(document.get("docker_version") or ""),
            "Author": document.get("author") or "",
            "Config": self.config,
            "Architecture": self.architecture,
            **({"Variant": document["variant"]} if document.get("variant") else {}),
            "Os": document.get("os") or "",
            "Size": self.size_bytes,
            "GraphDriver": {"Name": "overlay2", "Data": {k: v for k, v in driver_data.items() if v}},
            "RootFS": {"Type": "layers", "Layers": diff_ids},
            "Metadata": {"LastTagTime": timestamp(tagged) if tagged else "0001-01-01T00:00:00Z"},
            **({"Labkernel": {"Provenance": self.provenance}} if self.provenance else {}),
        }

    def history(self) -> list[dict[str, Any]]:
        """As `Images.history`."""
        return self._images.history(self.id)

    def tag(self, repository: str, tag: str | None = None) -> bool:
        """Give the image another name; `tag` defaults to `latest`. True, as in the Docker SDK."""
        self._images.tag(self.id, f"{repository}:{tag}" if tag else repository)
        return True

    def save(self, chunk_size: int = 2 << 20, *, named: bool | str = False) -> Iterator[bytes]:
        """The image as a `docker save` archive in pieces; with its tags when `named` (or that one of them)."""
        import tempfile

        if named and named is not True and named not in self.tags:
            raise UsageError(f"{named} is no tag of this image", resolution=f"it has {', '.join(self.tags) or 'none'}")
        names = [named] if isinstance(named, str) else self.tags if named else []
        with tempfile.TemporaryFile(dir=self._images.layout.tmp) as file:
            self._images.save(names or [self.id], file)
            file.seek(0)
            while piece := file.read(chunk_size):
                yield piece

    def remove(self, *, force: bool = False) -> list[dict[str, str]]:
        """As `Images.remove`, by id."""
        return self._images.remove(self.id, force=force)

    def reload(self) -> None:
        """Nothing to do: images do not change. For users of the Docker SDK."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        names = ", ".join(self.tags) or "<none>"
        return f"<Image {names} {self.short_id[7:]} {human_size(self.size_bytes)}>"

    @without_formulas
    def _repr_html_(self) -> str:
        steps = self.history()
        rows = [
            (step["CreatedBy"][:100] or step["Comment"], human_size(step["Size"]) if step["Size"] else "0B")
            for step in reversed(steps)
        ]
        words = [*(self.config.get("Entrypoint") or []), *(self.config.get("Cmd") or [])]
        title = f"{', '.join(self.tags) or '<none>'} · {self.short_id[7:]} · {human_size(self.size_bytes)}"
        command = f"<div>command: <code>{html.escape(json.dumps(words))}</code></div>" if words else ""
        origin = self.provenance.get("builtin")
        note = f"<div>built-in base image {html.escape(origin)}</div>" if origin else ""
        return table_html(("step", "size"), rows, caption=title) + command + note


class ImageList(list[Image]):
    """A list of images that shows itself as `docker images` does."""

    HEADER = ("REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE")

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """One row per tag; `<none>` for an image without one."""
        found = []
        for image in self:
            facts = (image.short_id[7:], human_age(image.created), human_size(image.size_bytes))
            names = [name.rpartition(":")[::2] for name in image.tags] or [("<none>", "<none>")]
            found += [(repository, tag, *facts) for repository, tag in names]
        return found

    def __repr__(self) -> str:
        return table_text(self.HEADER, self.rows())

    @without_formulas
    def _repr_html_(self) -> str:
        return table_html(self.HEADER, self.rows())
