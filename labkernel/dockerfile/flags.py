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
    """The known word a few typing errors away (one to three, by its length); case does not count."""
    known = list(known)
    if len(word) > 40 or len(known) > 500:  # a suggestion is not worth a quadratic search
        return None
    lowered = word.lower()
    best, best_distance = None, 4
    for candidate in known:
        if abs(len(candidate) - len(word)) > 3:
            continue
        allowed = 1 if len(candidate) <= 3 else 2 if len(candidate) <= 7 else 3
        distance = _edits(lowered, candidate.lower())
        if distance <= allowed and distance < best_distance:
            best, best_distance = candidate, distance
    return best


def _edits(a: str, b: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before = before, row
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def parse_device(text: str) -> tuple[str, bool]:
    """`[name=]VENDOR/CLASS=DEVICE[,required[=BOOL]]` of RUN --device: (name, whether it has to be there).

    Raises DockerfileError. Source: Dockerfile reference, RUN --device."""
    name, required = "", False
    for position, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if key == "required":
            if equals and value.lower() not in ("1", "t", "true", "0", "f", "false"):
                raise DockerfileError(f"invalid value for required: {value}")
            required = not equals or value.lower() in ("1", "t", "true")
        elif key == "name" and equals:
            name = value
        elif position == 0:
            name = part
        else:
            raise DockerfileError(f'unexpected key "{key}" in "{part}" of --device')
    if not name:
        raise DockerfileError("RUN --device needs the name of a device")
    return name, required
