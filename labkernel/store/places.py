"""Where the store and its runtime directory are, for who may load next to nothing: names only, nothing is made.

`Layout` makes the directories and refuses what is unsafe; what is decided here is decided nowhere else.
Source: XDG Base Directory Specification.
"""

from __future__ import annotations

import os
import stat


def find_root(named: str | os.PathLike[str] | None = None) -> str:
    """The real path of the store: `named`, else LABKERNEL_ROOT, else `labkernel` in the user's data directory.

    A store reached through a symbolic link must lead to the same supervisor."""
    found = named or os.environ.get("LABKERNEL_ROOT")
    if not found:
        found = f"{os.environ.get('XDG_DATA_HOME', '').strip() or '~/.local/share'}/labkernel"
    return os.path.realpath(os.path.expanduser(found))


def find_runtime_dir(root: str, named: str | os.PathLike[str] | None = None) -> str:
    """The real path of the runtime directory of the store `root`: `named`, else LABKERNEL_RUNTIME_DIR, else one of this
    user that a reboot clears."""
    found = named or os.environ.get("LABKERNEL_RUNTIME_DIR") or default_runtime_dir(root)
    return os.path.realpath(os.path.expanduser(found))


def default_runtime_dir(root: str) -> str:
    """Every process of a user must come to the same answer whatever its environment, or one store would get two
    supervisors: root always uses /run, and /run/user/UID is tried also where XDG_RUNTIME_DIR is not set."""
    import hashlib

    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    uid = os.geteuid()
    if uid == 0:
        return f"/run/labkernel/{name}"
    for base in (f"/run/user/{uid}", os.environ.get("XDG_RUNTIME_DIR")):
        if base and _is_own_directory(base):
            return f"{base}/labkernel/{name}"
    return f"/tmp/labkernel-{uid}/{name}"


def is_private(path: str) -> bool:
    """Whether nobody else can put anything into the directory `path`: /tmp is everybody's. Raises OSError."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _is_own_directory(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and os.access(path, os.W_OK)
