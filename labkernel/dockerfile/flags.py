"""The `--flags` of instructions, and suggestions for misspelt words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import DockerfileError

TEXT, SWITCH, LIST = "text", "switch", "list"

# What each instruction takes. Source: Dockerfile reference.
FLAGS: dict[str, dict[str, str]] = {
    "ADD": {
        "chown": TEXT,
        "chmod": TEXT,
        "link": SWITCH,
        "keep-git-dir": SWITCH,
        "checksum": TEXT,
        "unpack": SWITCH,
        "exclude": LIST,
    },
    "COPY": {"chown": TEXT, "chmod": TEXT, "from": TEXT, "link": SWITCH, "parents": SWITCH, "exclude": LIST},
    "FROM": {"platform": TEXT},
    "HEALTHCHECK": {
        "interval": TEXT,
        "timeout": TEXT,
        "start-period": TEXT,
        "start-interval": TEXT,
        "retries": TEXT,
    },
    "RUN": {"mount": LIST, "network": TEXT, "security": TEXT, "device": LIST},
}


class Flags:
    """The flags one instruction was given, by name."""

    def __init__(self, values: Mapping[str, Sequence[str]]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str) -> str | None:
        found = self._values.get(name)
        return found[-1] if found else None

    def switch(self, name: str) -> bool | None:
        found = self._values.get(name)
        return None if not found else found[-1].lower() != "false"

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(self._values.get(name, ()))


def read_flags(instruction: str, words: Iterable[str]) -> Flags:
    """Check `words` against what `instruction` takes. Raises DockerfileError (without a line)."""
    known = FLAGS.get(instruction, {})
    values: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in known:
            raise DockerfileError(
                f"unknown flag: --{name}{did_you_mean(name, known, '--')}", resolution=_takes(instruction, known)
            )
        kind = known[name]
        if name in values and kind != LIST:
            raise DockerfileError(f"duplicate flag specified: --{name}")
        if kind == SWITCH:
            if equals and not value:
                raise DockerfileError(f"missing a value on flag: --{name}")
            if equals and value.lower() not in ("true", "false"):
                raise DockerfileError(f"expecting boolean value for flag --{name}, not: {value}")
        elif not equals:
            raise DockerfileError(f"missing a value on flag: --{name}", resolution=f"write --{name}=VALUE")
        values.setdefault(name, []).append(value)
    return Flags(values)


def _takes(instruction: str, known: Mapping[str, str]) -> str:
    if not known:
        return f"{instruction} takes no flags"
    return f"{instruction} takes " + ", ".join(f"--{name}" for name in known)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean X?)` for the nearest known word, or nothing."""
    best = nearest(word, known)
    return f" (did you mean {prefix}{best}?)" if best else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word at most three edits (and fewer than half its length) away; case does not count."""
    if len(word) > 40:
        return None
    lowered = word.lower()
    best, best_distance = None, 4
    for candidate in known:
        distance = _edits(lowered, candidate.lower())
        if distance < min(best_distance, max(2, (len(candidate) + 1) // 2)):
            best, best_distance = candidate, distance
    return best


def _edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
