"""`RUN --mount=…`: one flag value to a typed mount.

Values may hold variables, so BuildKit checks most of them only when the stage is built; so do we. Source: Dockerfile
reference, RUN --mount.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from ..errors import DockerfileError
from .flags import did_you_mean

MOUNT_TYPES = ("bind", "cache", "tmpfs", "secret", "ssh")
SHARING = ("shared", "private", "locked")
_KEYS = (
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
)
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?([kmgtp]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


class Mount(Struct, frozen=True):
    """A mount of one RUN. `readonly` has the type's default already; `id` is as written (None: not given)."""

    type: str = "bind"
    target: str | None = None
    source: str | None = None
    from_: str | None = None
    readonly: bool = True
    id: str | None = None
    sharing: str | None = None
    required: bool = False
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    env: str | None = None


def parse_mount(flag: str, expand: Callable[[str], str] | None = None) -> Mount:
    """The mount of `--mount=<flag>`; `expand` replaces variables in the values.

    Raises DockerfileError (without a line) for a wrong key, type or value.
    """
    return _Parsing(expand).parse(flag)


def check_mount(flag: str) -> None:
    """Refuse what is wrong whatever the variables will be. Raises DockerfileError."""
    for field in _fields(flag):
        key, _, value = field.partition("=")
        if key.lower() == "from" and re.search(r"\$.", value):
            raise DockerfileError(f"'{key.lower()}' doesn't support variable expansion, define alias stage instead")
    if "$" not in flag:
        parse_mount(flag)


def _fields(flag: str) -> list[str]:
    if not flag:
        raise DockerfileError("failed to parse csv mounts: EOF", resolution="write --mount=type=cache,target=/DIR")
    try:
        rows = list(csv.reader([flag], strict=True))
    except csv.Error as err:
        raise DockerfileError(f"failed to parse csv mounts: {err}") from None
    fields = rows[0] if rows else []
    # Go's reader refuses a quote in the middle of an unquoted field, which Python's lets through.
    if any('"' in field for field in fields) and '"' in re.sub(r'(?:^|,)"(?:[^"]|"")*"(?=,|$)', "", flag):
        raise DockerfileError('failed to parse csv mounts: bare " in non-quoted field')
    return fields


class _Parsing:
    def __init__(self, expand: Callable[[str], str] | None) -> None:
        self.expand = expand or (lambda value: value)
        self.got: dict[str, Any] = {"type": "bind"}
        self.readonly: bool | None = None

    def parse(self, flag: str) -> Mount:
        for field in _fields(flag):
            key, equals, value = field.partition("=")
            key = key.lower()
            if equals:
                self.pair(key, self.expand(value), field)
            else:
                self.bare(key, field)
        kind = self.got["type"]
        readonly = self.readonly
        if readonly is None:
            readonly = kind not in ("cache", "tmpfs")
        mount = Mount(readonly=readonly, **self.got)
        _validate(mount)
        return mount

    def bare(self, key: str, field: str) -> None:
        if key in ("readonly", "ro"):
            self.readonly = True
        elif key in ("readwrite", "rw"):
            self.readonly = False
        elif key == "required":
            self.only_for(key, "secret", "ssh")
            self.got["required"] = True
        else:
            raise DockerfileError(f"invalid field '{field}' must be a key=value pair")

    def pair(self, key: str, value: str, field: str) -> None:
        if key == "type":
            self.got["type"] = _choice(value, MOUNT_TYPES, "mount type")
        elif key == "from":
            self.got["from_"] = value
        elif key in ("source", "src"):
            self.got["source"] = value
        elif key in ("target", "dst", "destination"):
            self.got["target"] = value
        elif key in ("readonly", "ro"):
            self.readonly = _boolean(key, value)
        elif key in ("readwrite", "rw"):
            self.readonly = not _boolean(key, value)
        elif key == "required":
            self.only_for(key, "secret", "ssh")
            self.got["required"] = _boolean(key, value)
        elif key == "size":
            self.only_for(key, "tmpfs")
            self.got["size_bytes"] = _size(value)
        elif key in ("id", "env"):
            self.got[key] = value
        elif key == "sharing":
            self.got["sharing"] = _choice(value, SHARING, "sharing value")
        elif key == "mode":
            self.got["mode"] = _number(key, value, 8)
        elif key in ("uid", "gid"):
            self.got[key] = _number(key, value, 10)
        else:
            raise DockerfileError(f"unexpected key '{key}' in '{field}'{did_you_mean(key, _KEYS)}")

    def only_for(self, key: str, *kinds: str) -> None:
        if self.got["type"] not in kinds:
            raise DockerfileError(
                f"unexpected key '{key}' for mount type '{self.got['type']}'",
                resolution=f"`{key}` belongs to type={' or type='.join(kinds)}, and comes after it",
            )


def _validate(mount: Mount) -> None:
    if mount.type not in ("secret", "ssh", "cache"):
        for name in ("mode", "uid", "gid"):
            if getattr(mount, name) is not None:
                raise DockerfileError(f'{name} not allowed for "{mount.type}" type mounts')
    if mount.type == "secret":
        if mount.from_:
            raise DockerfileError("secret mount should not have a from")
        if mount.sharing:
            raise DockerfileError("secret mount should not define sharing")
        if not mount.source and not mount.target and not mount.id:
            raise DockerfileError("invalid secret mount. one of source, target required")
        if mount.source and mount.id:
            raise DockerfileError("both source and id can't be set")
    if mount.env is not None and mount.type != "secret":
        raise DockerfileError(f'env not allowed for "{mount.type}" type mounts')
    if mount.sharing and mount.type != "cache":
        raise DockerfileError(f"invalid cache sharing set for {mount.type} mount")


def _choice(value: str, allowed: tuple[str, ...], what: str) -> str:
    chosen = value.lower()
    if chosen not in allowed:
        raise DockerfileError(
            f'unsupported {what} "{value}"{did_you_mean(chosen, allowed)}', resolution="one of " + ", ".join(allowed)
        )
    return chosen


def _boolean(key: str, value: str) -> bool:
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise DockerfileError(f"invalid value for {key}: {value}", resolution="true or false")


def _number(key: str, value: str, base: int) -> int:
    digits = "01234567" if base == 8 else "0123456789"
    number = int(value, base) if value and len(value) <= 16 and all(ch in digits for ch in value) else -1
    if not 0 <= number < 2**32:
        raise DockerfileError(f"invalid value {value} for {key}")
    return number


def _size(value: str) -> int:
    found = _SIZE.fullmatch(value) if len(value) < 40 else None
    if not found:
        raise DockerfileError(f"invalid value for size: {value}", resolution="a number with b, k, m or g: size=64m")
    return int(float(found.group(1)) * 1024 ** _POWERS[found.group(2).lower()])
