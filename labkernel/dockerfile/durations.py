"""Go's durations (`1m30s`), as HEALTHCHECK takes them."""

from __future__ import annotations

import re

from ..errors import DockerfileError

_DURATION = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_UNIT_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
MIN_DURATION_NS = 1_000_000


def parse_duration_ns(text: str) -> int:
    """Go's time.ParseDuration, in nanoseconds. Raises DockerfileError."""
    body = text[1:] if text[:1] in "+-" and text else text
    if body == "0":
        return 0
    total, pos = 0.0, 0
    exact = 0
    while pos < len(body) and (found := _DURATION.match(body, pos)):
        number, unit = found.groups()
        whole, _, fraction = number.partition(".")
        exact += int(whole[:20] or 0) * _UNIT_NS[unit]
        total += float(f"0.{fraction[:20]}") * _UNIT_NS[unit] if fraction else 0
        pos = found.end()
    value = exact + int(total)
    if not body or pos != len(body) or value >= 2**63:
        raise DockerfileError(f'time: invalid duration "{text[:80]}"', resolution="for example 30s, 1m30s or 500ms")
    return -value if text[0] == "-" else value
