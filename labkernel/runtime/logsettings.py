"""`--log-driver` and `--log-opt`: checked, and what the supervisor needs of them. Pure.

The log is docker's json-file format in the container's directory; `local` is the same with docker's limits for that
driver, `none` keeps nothing. Source: Docker documentation, "JSON File logging driver", "Local file logging driver".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError

_OPTIONS: dict[str, tuple[str, ...]] = {
    "json-file": ("max-size", "max-file", "compress", "labels", "labels-regex", "env", "env-regex", "tag"),
    "local": ("max-size", "max-file", "compress"),
    "none": (),
}
_LOCAL = {"max-size": "20m", "max-file": "5"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgtp]?)b?", re.IGNORECASE)


def check(value: Any) -> dict[str, Any]:
    """The SDK's `log_config` (LogConfig or {"Type", "Config"}). Raises UsageError in dockerd's words."""
    fields = {str(key).lower(): item for key, item in value.items()}
    driver = str(fields.get("type") or "json-file")
    options = {str(key): str(item) for key, item in (fields.get("config") or {}).items()}
    if driver not in _OPTIONS:
        raise UsageError(
            f"logger: no log driver named '{driver}' is registered", resolution=f"one of {', '.join(_OPTIONS)}"
        )
    for name, text in options.items():
        if name not in (*_OPTIONS[driver], "mode", "max-buffer-size"):
            raise UsageError(
                f"unknown log opt '{name}' for {driver} log driver",
                resolution=f"it knows {', '.join(_OPTIONS[driver])}" if _OPTIONS[driver] else "it knows none",
            )
        if name == "mode" and text not in ("blocking", "non-blocking"):
            raise UsageError(f"logger: logging mode not supported: {text}")
    if options.get("compress", "false") not in ("false", "0"):
        raise UsageError("compressed log files are not available in this release", resolution="compress=false")
    size, files = max_bytes(options.get("max-size")), _max_files(options.get("max-file"))
    if files > 1 and size is None and driver == "json-file":
        raise UsageError("max-file cannot be set without max-size", resolution="--log-opt max-size=10m")
    return {"type": driver, "config": options}


def max_bytes(text: str | None) -> int | None:
    """`10m` as docker counts here: powers of 1000. None for no limit."""
    if text is None or text == "-1":
        return None
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 1000.0 ** ("kmgtp".find(found[2].lower() or "-") + 1)) if found else 0
    if size <= 0:
        raise UsageError(f"invalid value for max-size: {text}: max-size must be a positive number")
    return size


def _max_files(text: str | None) -> int:
    if text is None:
        return 1
    if not text.lstrip("-").isdigit():
        raise UsageError(f"invalid value for max-file: {text}")
    if int(text) < 1:
        raise UsageError("max-file cannot be less than 1")
    return int(text)


def plan(
    settings: Mapping[str, Any], *, path: str, id: str, labels: Mapping[str, str], environment: Sequence[str]
) -> dict[str, Any]:
    """The property "log" of config.json: {"driver", "path", "max_bytes", "max_files", "attributes"}."""
    given = settings.get("log_config") or {"type": "json-file", "config": {}}
    options = {**(_LOCAL if given["type"] == "local" else {}), **given["config"]}
    return {
        "driver": given["type"],
        "path": path,
        "max_bytes": max_bytes(options.get("max-size")),
        "max_files": _max_files(options.get("max-file")),
        "attributes": _attributes(options, id, labels, environment) or None,
    }


def _attributes(
    options: Mapping[str, str], id: str, labels: Mapping[str, str], environment: Sequence[str]
) -> dict[str, str]:
    """What each record carries beside its text, for `logs --details`."""
    found: dict[str, str] = {}
    values = {name: text for name, equals, text in (word.partition("=") for word in environment) if equals}
    for source, name in ((labels, "labels"), (values, "env")):
        for key in filter(None, options.get(name, "").split(",")):
            if key in source:
                found[key] = source[key]
        if options.get(f"{name}-regex"):
            pattern = re.compile(options[f"{name}-regex"])
            found.update({key: text for key, text in source.items() if pattern.search(key)})
    if options.get("tag"):
        text = re.sub(r"{{ *\.FullID *}}", id, re.sub(r"{{ *\.ID *}}", id[:12], options["tag"]))
        if "{{" in text:
            raise UsageError(f"log tag: only {{{{.ID}}}} and {{{{.FullID}}}} are filled in: {options['tag']}")
        found["tag"] = text
    return found
