"""A container's health check as settings: docker's form, merged with the image's, and the plan the supervisor follows.

Pure. Probing is in `health`. Sources: Docker Engine API, HealthConfig; Docker image spec v1.2, `Healthcheck`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

_NAMES = {
    "test": "Test",
    "interval": "Interval",
    "timeout": "Timeout",
    "startperiod": "StartPeriod",
    "startinterval": "StartInterval",
    "retries": "Retries",
}
_DURATIONS = ("Interval", "Timeout", "StartPeriod", "StartInterval")
_DEFAULTS_S = {"interval_s": 30.0, "timeout_s": 30.0, "start_period_s": 0.0, "start_interval_s": 5.0}


def check(value: Any) -> dict[str, Any]:
    """The Docker SDK's `healthcheck` or the API's `Healthcheck` in the API's form; durations are nanoseconds.

    A `test` that is text runs in a shell. Raises UsageError in dockerd's words."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = _NAMES.get(str(key).replace("_", "").lower())
        if name is None:
            raise UsageError(f"unknown setting of a health check: {key}", resolution=f"one of {', '.join(_NAMES)}")
        if item is not None:
            found[name] = item
    test = found.get("Test")
    if isinstance(test, str):
        found["Test"] = ["CMD-SHELL", test]
    elif test is not None:
        found["Test"] = [str(word) for word in test]
    if found.get("Test") and found["Test"][0] not in ("NONE", "CMD", "CMD-SHELL"):
        raise UsageError(
            f"Unknown healthcheck type '{found['Test'][0]}' (expected 'CMD')", resolution="or CMD-SHELL, or NONE"
        )
    for name in _DURATIONS:
        if name in found:
            found[name] = int(found[name])
            if found[name] and found[name] < 1_000_000:
                raise UsageError(f"{name} in Healthcheck cannot be less than 1ms")
    if int(found.get("Retries") or 0) < 0:
        raise UsageError("Retries in Healthcheck cannot be negative")
    return found


def merge(image_config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What holds: the container's own check, completed by the image's where it says nothing. None without any."""
    own, image = settings.get("healthcheck"), image_config.get("Healthcheck")
    if not own:
        return dict(image) if image else None
    return {**(image or {}), **{name: value for name, value in own.items() if value}}


def plan(image_config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the supervisor does: {"args", "interval_s", "timeout_s", "start_period_s", "start_interval_s", "retries"};
    None when there is nothing to check."""
    merged = merge(image_config, settings) or {}
    test = list(merged.get("Test") or ())
    if len(test) < 2 or test[0] == "NONE":
        return None
    shell = image_config.get("Shell") or ["/bin/sh", "-c"]
    given = {
        "interval_s": merged.get("Interval"),
        "timeout_s": merged.get("Timeout"),
        "start_period_s": merged.get("StartPeriod"),
        "start_interval_s": merged.get("StartInterval"),
    }
    return {
        "args": [*shell, test[1]] if test[0] == "CMD-SHELL" else test[1:],
        **_DEFAULTS_S,
        **{name: max(int(value) / 1e9, 0.001) for name, value in given.items() if value},
        "retries": int(merged.get("Retries") or 0) or 3,
    }
