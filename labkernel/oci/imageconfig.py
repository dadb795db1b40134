"""Image configs as typed values that keep the bytes they came from: for configs that were not made here.

Source: OCI image-spec config.md. Making and changing configs is in `config`, which works on plain dictionaries.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from labkernel.errors import ManifestError

from .manifest import decode, digest_of, is_digest, keep_raw

CONFIG_MAX = 8 << 20


class History(msgspec.Struct, omit_defaults=True):
    """How one step came about. `empty_layer` steps changed the config only."""

    created: str | None = None
    created_by: str | None = None
    author: str | None = None
    comment: str | None = None
    empty_layer: bool = False


class RootFS(msgspec.Struct):
    """Diff IDs, bottom first."""

    type: str = "layers"
    diff_ids: list[str] = []


class ImageConfig(msgspec.Struct, omit_defaults=True, dict=True):
    """A parsed config. `document()` gives all of it as a dictionary, also what has no field here."""

    architecture: str = ""
    os: str = ""
    created: str | None = None
    author: str | None = None
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")
    config: dict[str, Any] | None = None
    rootfs: RootFS | None = None
    history: list[History] | None = None

    @property
    def raw(self) -> bytes:
        """The bytes this was parsed from."""
        raw: bytes = vars(self)["_raw"]
        return raw

    @property
    def digest(self) -> str:
        return digest_of(self.raw)

    @property
    def diff_ids(self) -> list[str]:
        return self.rootfs.diff_ids if self.rootfs else []

    def document(self) -> dict[str, Any]:
        """A fresh dictionary of the whole document, to be changed and given to `encode`."""
        document: dict[str, Any] = json.loads(self.raw)
        return document


def parse(raw: bytes) -> ImageConfig:
    """The config in `raw`. Raises ManifestError for what is not one, or for a malformed diff ID."""
    if len(raw) > CONFIG_MAX:
        raise ManifestError(f"image config of {len(raw)} bytes: more than {CONFIG_MAX} are refused")
    config = decode(raw, ImageConfig, "image config")
    for diff_id in config.diff_ids:
        if not is_digest(diff_id):
            raise ManifestError(f"invalid image config: not a diff ID: {diff_id!r}")
    return keep_raw(config, raw)
