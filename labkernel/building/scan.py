"""What COPY --from and bind mounts take from the merged layers of a stage or an image: a task for the worker.

Here and not in oci/steps.py, because --exclude speaks the language of `.dockerignore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dockerfile.ignorefile import IgnoreMatcher
from ..oci.pack import raise_limits
from ..oci.selection import select, stored_digest
from ..oci.steps import mounted


def scan(
    *,
    base: str,
    lowers: Sequence[str],
    patterns: Sequence[str],
    exclude: Sequence[str] = (),
    parents: bool = False,
    userxattr: bool = False,
    single_id: bool = False,
) -> dict[str, Any]:
    """`selection.select` in the merged file system of `lowers` (top first), owners included; mounted below `base`.

    Returns {"sources": […]} or {"missing": the pattern that is not there}. Raises DriverError without overlay, OSError.
    """
    raise_limits()
    left_out = IgnoreMatcher(exclude) if exclude else None
    with mounted(f"{base}/scan", lowers, userxattr=userxattr) as root:
        try:
            return {
                "sources": select(root, patterns, exclude=left_out, owners=True, parents=parents, digest=stored_digest)
            }
        except FileNotFoundError as err:
            return {"missing": err.filename}
