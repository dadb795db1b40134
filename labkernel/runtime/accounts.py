"""Users and groups as the image's own etc/passwd and etc/group name them; run from inside the container's root.

Source: man 5 passwd, man 5 group; Docker's rules for `--user name|uid[:group|gid]`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

_MAX_BYTES = 4 << 20


class User:
    """Who a process runs as."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


Opener = Callable[[str, int], int]


def lines(path: str, opener: Opener) -> list[list[str]]:
    """The fields of each line of an image's file; none where it is no file."""
    # The file belongs to the image: a FIFO there must not block, a huge one must not fill the memory.
    try:
        fd = opener(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        data = b""
        while len(data) < _MAX_BYTES and (chunk := os.read(fd, 65536)):
            data += chunk
    finally:
        os.close(fd)
    return [line.split(":") for line in data.decode("utf-8", "replace").splitlines() if not line.startswith("#")]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) < 1 << 31 else None


def resolve(wanted: str | None, numbers: dict[str, Any], opener: Opener = os.open) -> User:
    """The user for `wanted` ("name[:group]", parts may be numbers) or, when None, for a runtime-spec `process.user`.

    `opener` opens a path of the image, for callers that are not inside its root.

    Raises SetupError in docker's words for names the image does not have.
    """
    if wanted is None:
        uid, gid = int(numbers.get("uid", 0)), int(numbers.get("gid", 0))
        home = next((f[5] for f in lines("/etc/passwd", opener) if len(f) > 5 and f[2] == str(uid)), "") or _home(uid)
        return User(uid, gid, _supplementary(gid, [int(g) for g in numbers.get("additionalGids") or ()]), home)
    name, _, group = wanted.partition(":")
    entry = _find_user(name or "0", opener)
    known = str(entry[0])
    uid, gid = int(entry[2]), int(entry[3])
    groups = lines("/etc/group", opener)
    added = [_find_group(word, groups) for word in numbers.get("groups_unresolved") or ()]
    added += [int(number) for number in numbers.get("additionalGids") or ()]
    if group:
        gid = _find_group(group, groups)
        extra: list[int] = []
    else:
        extra = [int(g[2]) for g in groups if len(g) > 3 and known and known in g[3].split(",") and g[2].isdigit()]
    return User(uid, gid, _supplementary(gid, [*extra, *added]), entry[5] or _home(uid))


def _supplementary(gid: int, others: list[int]) -> list[int]:
    """The supplementary groups with the primary one among them: a program with the set-group-id bit could otherwise
    drop it, and with it a file's denial to the group (CVE-2022-36109)."""
    return list(dict.fromkeys([gid, *others]))


def _home(uid: int) -> str:
    return "/root" if uid == 0 else "/"


def _find_user(name: str, opener: Opener) -> list[str]:
    number = _number(name)
    for fields in lines("/etc/passwd", opener):
        if len(fields) < 4 or _number(fields[2]) is None or _number(fields[3]) is None:
            continue
        if fields[0] == name or (number is not None and fields[2] == str(number)):
            return [*fields, "", "", ""]
    if number is None:
        _refuse_number(name)
        from .init import SetupError

        raise SetupError(f"unable to find user {name}: no matching entries in passwd file")
    return ["", "", str(number), "0", "", "", ""]


def _find_group(name: str, groups: list[list[str]]) -> int:
    number = _number(name)
    for fields in groups:
        if len(fields) > 2 and _number(fields[2]) is not None and fields[0] == name:
            return int(fields[2])
    if number is None:
        _refuse_number(name)
        from .init import SetupError

        raise SetupError(f"unable to find group {name}: no matching entries in group file")
    return number


def _refuse_number(name: str) -> None:
    if name.isascii() and name.removeprefix("-").isdigit():
        from .init import SetupError

        raise SetupError("uids and gids must be in range 0-2147483647")
