"""Build steps on machines without overlay: over a copy of the image's files, whose changes become the layer.

The same steps as `layers`, with its parts replaced: the root of a RUN is a copy, written down before and compared
after; files are placed over a tree of hard links. Used by the driver proot, and by the others where overlay is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime import prootprogram
from ..runtime.proot import mount_points
from .layers import LayerMaker, Sandbox

if TYPE_CHECKING:
    from ..images import Images
    from ..networks import Networks
    from ..runtime.client import Runtime
    from ..runtime.driver import Driver
    from ..store.blobs import Blobs
    from ..store.layout import Layout


def layer_maker(
    layout: Layout, blobs: Blobs, runtime: Runtime, driver: Driver, images: Images, networks: Networks
) -> LayerMaker:
    """The maker of layers for this machine."""
    kind = CopyLayerMaker if driver.overlay == "copy" else LayerMaker
    return kind(layout, blobs, runtime, driver, images, networks)


class CopyLayerMaker(LayerMaker):
    """Makes layers without any mount."""

    def _task(self, call: str, *, fds: Sequence[int] = (), **args: Any) -> Any:
        if call.endswith(":scan"):
            base = Path(args["base"])
            try:
                tree = self._link(args["lowers"], base / "tree")
                opened = self._open_up(tree)
                return _with_modes(super()._task(call, fds=fds, **{**args, "lowers": [tree]}), opened)
            finally:
                self._clear(base)
        if call == "labkernel.oci.steps:make_layer":
            base, plan = Path(args["base"]), Path(args["plan"])
            self._link(args["lowers"], base / "tree")
            operations = json.loads(plan.read_text())
            plan.write_text(json.dumps([self._flattened(base, *item) for item in enumerate(operations)]))
            call = "labkernel.oci.copied:make_layer"
        return super()._task(call, fds=fds, **args)

    def _link(self, lowers: Sequence[str], target: Path) -> str:
        """The merged files of the layers as hard links at `target`."""
        path = str(target)
        self._runtime.task("labkernel.runtime.copies:flatten", lowers=list(lowers), target=path, link=True)
        return path

    def _flattened(self, base: Path, number: int, operation: dict[str, Any]) -> dict[str, Any]:
        """Another image's files, which a COPY --from names by its layers, as one directory."""
        layers = operation.get("from")
        # One layer needs nothing to be merged; but where a mode binds us, too, its directories have to be opened up.
        if not isinstance(layers, list) or (len(layers) < 2 and self._driver.name != "proot"):
            return operation
        tree = self._link(layers, base / f"source{number}")
        self._open_up(tree)  # the modes are those of the selection
        return {**operation, "from": [tree]}

    def _open_up(self, tree: str) -> dict[str, int]:
        """Make the directories of a tree that is only read readable; the modes of those that were closed to us."""
        opened: dict[str, int] = self._runtime.task("labkernel.oci.copied:open_up", tree=tree)
        return opened

    def _need_overlay(self) -> None:
        pass

    def _new_upper(self, directory: Path, lowers: Sequence[str]) -> Path:
        target = str(directory / "rootfs")
        self._runtime.task("labkernel.runtime.copies:flatten", lowers=list(lowers), target=target)
        return directory / "upper"

    def _rootfs(self, directory: Path, lowers: Sequence[str], upper: Path) -> dict[str, Any]:
        return {"kind": "dir", "path": str(directory / "rootfs")}

    def _spec(self, id: str, directory: Path, sandbox: Sandbox, **more: Any) -> dict[str, Any]:
        spec = super()._spec(id, directory, sandbox, **more)
        if self._driver.name == "proot":
            prootprogram.adapt(spec, self._layout.root, sandbox.architecture)
        self._runtime.task(
            "labkernel.oci.copied:snapshot",
            tree=str(directory / "rootfs"),
            points=mount_points(spec, str(directory)),
            out=str(directory / "before"),
        )
        return spec

    def _carry_out(self, id: str, on_output: Callable[[bytes], None]) -> list[str]:
        warnings = super()._carry_out(id, on_output)
        directory = self._layout.container_dir(id)
        self._runtime.task(
            "labkernel.oci.copied:collect",
            tree=str(directory / "rootfs"),
            before=str(directory / "before"),
            upper=str(directory / "upper"),
        )
        return warnings


def _with_modes(found: dict[str, Any], opened: Mapping[str, int]) -> dict[str, Any]:
    """What a scan found, with the modes that directories had before they were opened up."""
    for source in found.get("sources") or () if opened else ():
        base = source["path"]
        for entry in source["entries"]:
            path = "/".join(part for part in (base, entry[0]) if part)
            if entry[1] == "d" and path in opened:
                entry[2] = opened[path]
        for parent in source.get("parents") or ():
            parent[1] = opened.get(parent[3], parent[1])
    return found
