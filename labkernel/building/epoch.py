"""SOURCE_DATE_EPOCH: the moment that no file of a build is younger than, and where it comes from.

A build argument, an ARG before the first FROM, or the variable of the person who builds; seconds since 1970, or
`context`: the commit of a git repository, what a server says of a file, the newest member of an archive. A directory of
this machine has no such moment, and the build then goes on without. Source: BuildKit, docs/build-repro.md.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ..errors import UsageError

NAME = "SOURCE_DATE_EPOCH"


def from_environment(build_args: MutableMapping[str, str]) -> None:
    """As buildx does: the variable of that name is the build argument, where none is given."""
    value = os.environ.get(NAME)
    if value and NAME not in build_args:
        build_args[NAME] = value


def resolve(build_args: MutableMapping[str, str], scope: MutableMapping[str, str], context_s: int | None) -> int | None:
    """The moment, None for none. `context` is replaced by what it means in the build arguments and the global `scope`.

    Raises UsageError."""
    # Its words count when they are not empty.
    given = build_args.get(NAME) or scope.get(NAME) or ""
    if not given:
        return None
    if given == "context":
        for names in (build_args, scope):
            names.pop(NAME, None)
            if context_s is not None:
                names[NAME] = str(context_s)
        return context_s
    if not (given.isascii() and given.isdigit()):
        raise UsageError(
            f"invalid {NAME}: {given}",
            resolution="seconds since 1970, as a number, or `context` for those of its commit",
        )
    return int(given)
