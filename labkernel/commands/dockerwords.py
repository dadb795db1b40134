"""Completion inside a `%%dockerfile` cell: instructions, their flags and values, stages, images, variables, files.

Pure: text above the cursor in, words out. Images and files are asked for through functions, so that nothing is opened
before a word needs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..dockerfile.flags import FLAGS, SWITCH

INSTRUCTIONS = (
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "MAINTAINER"),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
)
DIRECTIVES = ("syntax=", "escape=", "check=")
_MOUNT_TYPES = ("bind", "cache", "tmpfs", "secret", "ssh")
_MOUNT_KEYS = {
    "bind": ("target=", "source=", "from=", "rw"),
    "cache": ("target=", "id=", "sharing=", "from=", "source=", "mode=", "uid=", "gid=", "ro"),
    "tmpfs": ("target=", "size="),
    "secret": ("id=", "target=", "env=", "required", "mode=", "uid=", "gid="),
    "ssh": ("id=", "target=", "required", "mode=", "uid=", "gid="),
}
_VALUES = {
    "network": ("default", "none", "host"),
    "security": ("sandbox", "insecure"),
    "platform": ("$BUILDPLATFORM", "$TARGETPLATFORM", "linux/amd64", "linux/arm64"),
    "sharing": ("shared", "private", "locked"),
}
_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2")
_STAGE = re.compile(r"^\s*FROM\s+(?:--\S+\s+)*\S+\s+AS\s+(\S+)", re.IGNORECASE)
_NAMES = re.compile(r"^\s*(?:ARG|ENV)\s+(.*)$", re.IGNORECASE)
_NAME = re.compile(r"(?:^|\s)([A-Za-z_]\w*)(?==|\s|$)")
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_]\w*)\1")
_VARIABLE = re.compile(r"\$\{?(\w*)$")

Found = tuple[list[str], str]
"""(completions, the end of the typed text that they replace)"""


@dataclass
class Place:
    """Where the cursor is. `line` is the whole instruction up to it, continuations joined; "" inside a heredoc."""

    line: str
    stages: list[str]
    names: list[str]
    heredoc: bool = False
    first: bool = True


def find_place(lines: Sequence[str], before: str) -> Place:
    """What the `lines` above the cursor's own, of which `before` is the part up to it, make of that place."""
    place = Place(before, [], [])
    logical = ""
    waiting: list[str] = []
    for line in lines:
        if waiting:
            if line.strip() == waiting[0]:
                waiting.pop(0)
            continue
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place.first = False
        logical += line.rstrip()
        if logical.endswith("\\"):
            logical = logical[:-1] + " "
            continue
        _declare(place, logical)
        if logical.split(maxsplit=1)[0].upper() in ("RUN", "COPY", "ADD"):
            waiting = [name for _, name in _HEREDOC.findall(logical)]
        logical = ""
    place.heredoc = bool(waiting)
    place.line = logical + (before if logical else before.lstrip())
    return place


def _declare(place: Place, logical: str) -> None:
    stage = _STAGE.match(logical)
    if stage:
        place.stages.append(stage.group(1))
    names = _NAMES.match(logical)
    if names:
        place.names += [name for name in _NAME.findall(names.group(1)) if name not in place.names]


def complete(
    lines: Sequence[str],
    before: str,
    *,
    images: Callable[[], Iterable[str]],
    directory: str = ".",
) -> Found:
    """Completions for the cursor after `before`, below `lines` of the same Dockerfile. `directory`: the context."""
    place = find_place(lines, before)
    if place.heredoc:
        return [], ""
    line = place.line
    if line.startswith("#"):
        fragment = line[1:].lstrip()
        return ([word for word in DIRECTIVES if word.startswith(fragment)] if place.first else []), fragment
    words = line.split()
    fragment = "" if not line or line[-1].isspace() else words.pop()
    if words and words[0].upper() == "ONBUILD":
        words = words[1:]
    if not words:
        return [name for name in INSTRUCTIONS if fragment and name.startswith(fragment.upper())], fragment
    variable = _VARIABLE.search(fragment)
    if variable:
        typed = variable.group(1)
        return sorted(name for name in place.names if name.startswith(typed)), typed
    instruction = words[0].upper()
    if fragment.startswith("--"):
        return _flag(instruction, fragment, place, images)
    return _argument(instruction, words[1:], fragment, place, images, directory)


def kind_of(word: str, stages: Iterable[str], images: Iterable[str]) -> str:
    """What a completion is, for the list a front end shows: `flag`, `instruction`, `stage`, `image` or `word`."""
    if word.startswith("--"):
        return "flag"
    if word in INSTRUCTIONS:
        return "instruction"
    return "stage" if word in stages else "image" if word in images else "word"


def _flag(instruction: str, fragment: str, place: Place, images: Callable[[], Iterable[str]]) -> Found:
    name, equals, value = fragment[2:].partition("=")
    known = FLAGS.get(instruction, {})
    if not equals:
        return [f"--{flag}{'' if kind == SWITCH else '='}" for flag, kind in known.items() if flag.startswith(name)], (
            fragment
        )
    if name not in known:
        return [], value
    if name == "from":
        return _starting([*place.stages, *images()], value), value
    if name == "mount":
        return _mount(value, place, images)
    return _starting(_VALUES.get(name, ()), value), value


def _mount(value: str, place: Place, images: Callable[[], Iterable[str]]) -> Found:
    *given, part = value.split(",")
    kind = next((word[5:] for word in given if word.startswith("type=")), "bind")
    key, equals, typed = part.partition("=")
    if not equals:
        used = {word.partition("=")[0] for word in given}
        keys = ("type=", *_MOUNT_KEYS["bind"]) if not given else _MOUNT_KEYS.get(kind, ())
        return [word for word in keys if word.startswith(key) and word.rstrip("=") not in used], part
    if key == "type":
        return _starting(_MOUNT_TYPES, typed), typed
    if key == "from":
        return _starting([*place.stages, *images()], typed), typed
    return _starting(_VALUES.get(key, ()), typed), typed


def _argument(
    instruction: str,
    words: Sequence[str],
    fragment: str,
    place: Place,
    images: Callable[[], Iterable[str]],
    directory: str,
) -> Found:
    given = [word for word in words if not word.startswith("--")]
    if instruction == "FROM":
        if not given:
            return _starting([*place.stages, "scratch", *images()], fragment), fragment
        return (["AS"] if len(given) == 1 and "AS".startswith(fragment.upper()) else []), fragment
    if instruction in ("COPY", "ADD") and not any(word.startswith("--from=") for word in words):
        return _files(directory, fragment)
    if instruction == "STOPSIGNAL" and not given:
        return _starting(_SIGNALS, fragment.upper()), fragment
    if instruction == "HEALTHCHECK" and not given:
        return _starting(("CMD", "NONE"), fragment.upper()), fragment
    return [], fragment


def _files(directory: str, fragment: str) -> Found:
    where, slash, typed = fragment.rpartition("/")
    if ".." in where.split("/"):
        return [], fragment
    try:
        with os.scandir(os.path.join(directory, where.lstrip("/"))) as found:
            names = [entry.name + ("/" if entry.is_dir() else "") for entry in found]
    except OSError:
        return [], fragment
    shown = [name for name in names if typed or not name.startswith(".")]
    return [f"{where}{slash}{name}" for name in sorted(shown) if name.startswith(typed)][:200], fragment


def _starting(words: Iterable[str], typed: str) -> list[str]:
    return list(dict.fromkeys(word for word in words if word.startswith(typed)))
