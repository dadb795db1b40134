"""Waiting for what has to come about: nothing sleeps for luck, and nothing waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 120.0
_PAUSE_S = 0.02


def wait_until(check: Callable[[], Any], what: str = "") -> Any:
    """The first true value of `check`; `what` it stands for is told when it does not come."""
    found = last_of(check)
    assert found, f"not within {DEADLINE_S:g} s: {what or check}"
    return found


def last_of(check: Callable[[], Any]) -> Any:
    """The first true value of `check`, or its last one when none comes: for who tells what is wrong himself."""
    end = time.monotonic() + DEADLINE_S
    while not (found := check()) and time.monotonic() < end:
        time.sleep(_PAUSE_S)
    return found
