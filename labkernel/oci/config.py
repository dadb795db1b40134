"""Making and changing image configs: what a container of an image runs, and the diff IDs of its layers.

Configs are plain dictionaries here, so that properties this version does not know survive a build, and are encoded
with sorted keys: equal content gives an equal id on every machine. Reading foreign ones is in `imageconfig`; this
module is on every command's way and imports little.
Source: OCI image-spec config.md; Docker image spec v1.2 for `Healthcheck`, `OnBuild`, `Shell`, `ArgsEscaped`.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from labkernel.errors import UsageError

_ARCHITECTURES = {
    "x86_64": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "riscv64": "riscv64",
    "loongarch64": "loong64",
}
CHANGES = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")
"""Dockerfile instructions that `import --change` and `commit --change` take."""


def encode(document: dict[str, Any]) -> bytes:
    """The canonical bytes of a config document: sorted keys, no spaces, UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def new_document(diff_ids: Sequence[str] = (), *, created: str | None = None, **config: Any) -> dict[str, Any]:
    """A config document for this machine's architecture; keyword arguments (`Cmd=["sh"]`) fill its `config` object."""
    document: dict[str, Any] = {
        "architecture": host_architecture(),
        "os": "linux",
        "created": created or timestamp(),
        "config": {name: value for name, value in config.items() if value is not None},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [],
    }
    if document["architecture"] == "arm64":
        document["variant"] = "v8"
    return document


def add_history(
    document: dict[str, Any], created_by: str, *, comment: str | None = None, empty_layer: bool = False
) -> None:
    """Append a history entry; its moment is the document's `created`."""
    entry: dict[str, Any] = {"created": document.get("created") or timestamp(), "created_by": created_by}
    if comment:
        entry["comment"] = comment
    if empty_layer:
        entry["empty_layer"] = True
    document["history"] = [*(document.get("history") or []), entry]


def host_architecture() -> str:
    """This machine's architecture in Go's words (`amd64`, `arm64`), which image-spec uses."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def timestamp(moment_s: float | None = None) -> str:
    """Seconds since the epoch (default: now) as RFC 3339 with microseconds, in UTC."""
    moment = datetime.fromtimestamp(time.time() if moment_s is None else moment_s, tz=UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_timestamp(text: str | None) -> float:
    """Seconds since the epoch of an RFC 3339 moment; 0.0 for none or for nonsense (Go writes year 1 for none)."""
    if not text:
        return 0.0
    try:
        # Go writes nanoseconds, Python reads microseconds at most.
        head, dot, tail = text.partition(".")
        if dot:
            digits = tail.rstrip("Zz").split("+")[0].split("-")[0]
            text = f"{head}.{digits[:6].ljust(6, '0')}{tail[len(digits) :]}"
        return max(0.0, datetime.fromisoformat(text.replace("Z", "+00:00").replace("z", "+00:00")).timestamp())
    except (ValueError, OverflowError):
        return 0.0


def apply_changes(document: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A copy of `document` with Dockerfile instructions applied, as `docker import --change` and `commit --change` do.

    Takes those in `CHANGES`; others, and ones without arguments, raise UsageError. No variables are expanded.
    """
    changed = copy.deepcopy(document)
    config = changed["config"] = changed.get("config") or {}
    for change in changes:
        word, _, rest = change.strip().partition(" ")
        name, rest = word.upper(), rest.strip()
        if name not in CHANGES:
            raise UsageError(
                f"{word} is not a valid change command", resolution=f"these can be changed: {', '.join(CHANGES)}"
            )
        if not rest:
            raise UsageError(f"{name} requires at least one argument")
        _apply_change(config, name, rest)
    return changed


def _apply_change(config: dict[str, Any], name: str, rest: str) -> None:
    if name in {"CMD", "ENTRYPOINT"}:
        config["Cmd" if name == "CMD" else "Entrypoint"] = _json_list(rest) or ["/bin/sh", "-c", rest]
    elif name == "ENV":
        env = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
        env.update(_pairs(name, rest))
        config["Env"] = [f"{key}={value}" for key, value in env.items()]
    elif name == "LABEL":
        config["Labels"] = {**(config.get("Labels") or {}), **_pairs(name, rest)}
    elif name == "EXPOSE":
        ports = [port if "/" in port else f"{port}/tcp" for port in rest.split()]
        config["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **{port: {} for port in ports}}
    elif name == "VOLUME":
        config["Volumes"] = {**(config.get("Volumes") or {}), **{v: {} for v in _json_list(rest) or rest.split()}}
    elif name == "WORKDIR":
        before = (config.get("WorkingDir") or "/").rstrip("/")
        config["WorkingDir"] = rest if rest.startswith("/") else f"{before}/{rest}"
    else:
        config["User" if name == "USER" else "StopSignal"] = rest


def _json_list(text: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, list) and all(isinstance(word, str) for word in parsed) else None


def _pairs(name: str, rest: str) -> dict[str, str]:
    import shlex

    try:
        words = shlex.split(rest)
    except ValueError as err:
        raise UsageError(f"{name} {rest}: {err}") from err
    if words and "=" not in words[0]:
        # The old form: the first word is the key, all the rest its value.
        key, _, value = rest.partition(" ")
        if not value:
            raise UsageError(f"{name} must have two arguments")
        return {key: value.strip()}
    pairs = dict(word.partition("=")[::2] for word in words)
    if any(not key for key in pairs) or any("=" not in word for word in words):
        raise UsageError(f"{name} {rest}: expected KEY=VALUE words")
    return pairs
