"""Build hook: compiles the guest's init program into the package, for wheels and for editable installs.

Where a C compiler can link statically, it is used; otherwise the PyPI package `ziglang` is asked for, which brings one.
The result is `labkernel/qemu/guest-init-<machine>`, not committed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _load_compiling(root: str) -> ModuleType:
    # By its path: the package itself can't be imported here, its dependencies are not installed in a build.
    spec = importlib.util.spec_from_file_location("_compiling", Path(root) / "labkernel/qemu/compiling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GuestInitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles `labkernel/qemu/guest/init.c`."""

    PLUGIN_NAME = "custom"

    @property
    def _source(self) -> Path:
        return Path(self.root) / "labkernel/qemu/guest/init.c"

    @property
    def _target(self) -> Path:
        return Path(self.root) / f"labkernel/qemu/guest-init-{platform.machine()}"

    def dependencies(self) -> list[str]:
        if self.target_name != "wheel" or sys.platform != "linux":
            return []
        compiling = _load_compiling(self.root)
        if compiling.is_current(self._target, self._source):
            return []
        with tempfile.TemporaryDirectory() as scratch:
            # A compiler without a static libc can't do it, so the question is answered by doing it.
            problem = compiling.compile_init(self._source, Path(scratch) / "init", platform.machine())
        return ["ziglang>=0.13"] if problem else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or sys.platform != "linux":
            return
        compiling = _load_compiling(self.root)
        if not compiling.is_current(self._target, self._source):
            problem = compiling.compile_init(self._source, self._target, platform.machine())
            if problem:
                # Containers work without it, and `vm run` compiles it when a compiler appears.
                self.app.display_warning(f"virtual machines will need a C compiler: {problem}")
        if self._target.exists():
            # A program for one processor is inside, so the wheel is for that one.
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"
            os.chmod(self._target, 0o755)
