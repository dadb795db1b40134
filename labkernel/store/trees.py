"""Removing directory trees that containers or hostile archives made: deep, unreadable, of subordinate users."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from typing import Any


def remove_tree(path: str) -> bool:
    """Remove `path` and all below it, giving directories back their permissions on the way; True when it is gone.

    Also a task (`Runtime.task("labkernel.store.trees:remove_tree", path=…)`): files of subordinate users can be removed
    only inside the driver's user namespace. Never follows symbolic links.
    """
    shutil.rmtree(path, onerror=_unlock_and_retry)
    return not os.path.lexists(path)


def _unlock_and_retry(function: Callable[..., Any], path: str, _error: object) -> None:
    # A directory without w or x for its owner stops everyone but root; rootless single-id layers have such.
    for directory in (os.path.dirname(path), path):
        try:
            found = os.lstat(directory)
            if stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) & 0o700 != 0o700:
                os.chmod(directory, 0o700)
        except OSError:
            pass
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            if function is not os.rmdir:
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        pass
