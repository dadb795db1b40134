"""An empty qcow2 overlay: where a machine's own writes go, over the disk that all machines of an image share.

Written by hand because qemu-img is a package of its own (qemu-utils), and four clusters are all there is to it.
Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS


def make_overlay(path: Path, base: Path, size_bytes: int) -> None:
    """Write the overlay `path` of `size_bytes` over the raw disk `base`, which is named by its absolute path.

    Layout: header, refcount table, one refcount block, L1 table (a cluster each). Raises OSError.
    """
    name = os.fsencode(base)
    entries = -(-size_bytes // (_CLUSTER * (_CLUSTER // 8)))
    # The one header extension says that the base is raw; without it QEMU would have to guess, and refuses to.
    extension = struct.pack(">II8s", 0xE2792ACA, 3, b"raw") + bytes(8)
    place = 104 + len(extension)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, place, len(name), _CLUSTER_BITS, size_bytes, 0),
        *(entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    counts = struct.pack(">4H", 1, 1, 1, 1)
    with open(path, "wb") as file:
        file.write(header + extension + name)
        file.seek(_CLUSTER)
        file.write(struct.pack(">Q", 2 * _CLUSTER))
        file.seek(2 * _CLUSTER)
        file.write(counts)
        file.truncate(4 * _CLUSTER)
