"""Several layers unpacked at once, in processes of their own, and put in their places in order.

A layer can be unpacked without those below it, but for one thing: directories its tar needs and does not describe have
the attributes they have below. `settle` gives them those from the bottom up. Left out: unpacking one layer
(`Images.unpack`), and the layers of a pull, which unpack while they arrive (pulls.py) and settle here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LayerError, StoreError
from ..oci.connections import Cancelled
from ..store.blobs import temporary_directory
from ..store.catalog import LayerInfo

if TYPE_CHECKING:
    from ..images import Images

MAX_AT_ONCE = 4
"""More do not help: what they share is the disk."""

Unpacked = tuple[Path, dict[str, Any]]
"""A directory that waits for its place, and what its task returned."""


def unpack_into(
    images: Images,
    layer: LayerInfo,
    work: Path,
    lowers: Sequence[Path] = (),
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Unpacked:
    """Unpack one layer below the private directory `work`. `report` hears of its progress, and may end it by raising.

    Raises LayerError, CorruptBlob, StoreError.
    """
    if not images.blobs.has(layer.digest):
        raise StoreError(
            f"the blob of layer {layer.digest} is missing",
            resolution="`labkernel system check` lists what is damaged; get or build the image again",
        )
    # Inside, since the task sets the mode of the layer's root directory, and `work` has to stay private.
    directory = work / "root"
    directory.mkdir(mode=0o755)
    try:
        done = images.runtime.task(
            "labkernel.oci.layer:apply_layer",
            report=report,
            blob=str(images.blobs.path(layer.digest)),
            target=str(directory),
            media_type=layer.media_type,
            diff_id=layer.diff_id,
            lowers=[str(path) for path in lowers],
            **images.unpack_options,
        )
    except LayerError:
        # A damaged disk and a damaged image call for different remedies.
        images.blobs.verify(layer.digest)
        raise
    return directory, done


def unpack_missing(images: Images, layers: Sequence[LayerInfo]) -> None:
    """Unpack those of `layers` (bottom first) that are not. Raises what `Images.unpack` raises."""
    missing = {layer.diff_id: layer for layer in layers if not images.layer_path(layer).is_dir()}
    # The largest first: what is left at the end is then small.
    queue = sorted(missing.values(), key=lambda layer: -layer.size_bytes)
    at_once = min(len(queue), len(os.sched_getaffinity(0)), MAX_AT_ONCE)
    with ExitStack() as stack:
        waiting: dict[str, Unpacked] = {}
        if at_once > 1:
            stop = threading.Event()
            executor = ThreadPoolExecutor(at_once, thread_name_prefix="labkernel-unpack")
            try:
                works = [stack.enter_context(temporary_directory(images.layout, "layer")) for _ in queue]
                done = executor.map(partial(_unpack, images, stop), queue, works)
                waiting = {layer.diff_id: each for layer, each in zip(queue, done, strict=True) if each is not None}
            except BaseException:
                stop.set()
                raise
            finally:
                executor.shutdown(wait=True, cancel_futures=True)
        settle(images, layers, waiting)


def _unpack(images: Images, stop: threading.Event, layer: LayerInfo, work: Path) -> Unpacked | None:
    """Body of a thread. None when the layer is in its place, or another process is at it."""

    def look(_event: dict[str, Any]) -> None:
        if stop.is_set():
            raise Cancelled  # leaving the call ends the task

    with images.locks.try_exclusive(f"layer-{images.layer_path(layer).name}") as held:
        if not held or images.layer_path(layer).is_dir():
            return None
        unpacked = unpack_into(images, layer, work, report=look)
        if unpacked[1]["undescribed"]:
            # The lock is given back: who waits for another's layer while holding one may wait for ever.
            return unpacked
        images.place_layer(layer, *unpacked)
        return None


def settle(
    images: Images,
    layers: Sequence[LayerInfo],
    waiting: Mapping[str, Unpacked],
    placed: Callable[[str], None] = lambda diff_id: None,
) -> None:
    """Bring what is not in its place there, from the bottom of `layers`: `waiting` (by diff ID) needs the attributes of
    lower ones, the rest is other processes' work and is waited for. `placed` is told the diff IDs that are new."""
    lowers: list[Path] = []
    for layer in layers:
        target = images.layer_path(layer)
        if layer.diff_id in waiting and not target.is_dir():
            directory, done = waiting[layer.diff_id]
            images.runtime.task(
                "labkernel.oci.layer:adopt_attributes",
                target=str(directory),
                paths=done["undescribed"],
                lowers=[str(path) for path in lowers],
            )
            with images.locks.exclusive(f"layer-{target.name}"):
                if not target.is_dir():
                    images.place_layer(layer, directory, done)
                    placed(layer.diff_id)
        elif not target.is_dir():
            images.unpack(layer, lowers)
            placed(layer.diff_id)
        lowers.insert(0, target)
