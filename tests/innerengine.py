"""An image that holds Python and this code, for tests of the engine inside a virtual machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from labkernel.engine import Engine
from labkernel.errors import LabkernelError
from labkernel.linux import seccomp

REPO = Path(__file__).resolve().parent.parent
SEARCH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
# What the engine imports beside the standard library.
PACKAGES = ("msgspec", "typing_extensions", "pyseccomp", "isal")
DOCKERFILE = """
FROM lab/debian
COPY --from=lab/busybox /bin/busybox /bin/busybox
COPY root/ /
ENV PYTHONPATH=/lab/packages LABKERNEL_DRIVER=root
"""


class Context:
    """A build context: what lies in `root` is in the image. Skips where there is nothing to make one of."""

    def __init__(self, engine: Engine, folder: Path, program: Path) -> None:
        for capability in engine.vms.probe():
            if not capability.ok and capability.name != "vm kvm":
                pytest.skip(f"{capability.name}: {capability.cause}")
        library = seccomp.library_path()
        if library is None:
            pytest.skip("libseccomp is not installed")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        try:
            had = engine.containers.run("lab/debian", ["ls", "/usr/bin"], remove=True).decode().split()
        except LabkernelError as err:
            pytest.skip(" ".join(err.render()))
        if version not in had:
            pytest.skip(f"lab/debian has no {version}, for which the packages here are compiled")
        self.engine, self.folder, self.root = engine, folder, folder / "root"
        (self.root / "usr/lib").mkdir(parents=True)
        shutil.copy(os.path.realpath(library), self.root / "usr/lib/libseccomp.so.2")
        self._copy_packages()
        shutil.copy(program, self.root / "lab")

    def _copy_packages(self) -> None:
        packages = self.root / "lab/packages"
        shutil.copytree(REPO / "labkernel", packages / "labkernel", ignore=shutil.ignore_patterns("labextension"))
        for name in PACKAGES:
            found = importlib.util.find_spec(name)
            assert found is not None, name
            assert found.origin is not None, name
            origin = Path(found.origin)
            if origin.name == "__init__.py":
                shutil.copytree(origin.parent, packages / name)
            else:
                shutil.copy(origin, packages)

    def add_programs(self, names: Sequence[str]) -> None:
        """Programs of this machine with their libraries. Skips where one is missing."""
        folder = self.root / "usr/bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = shutil.which(name, path=SEARCH)
            if path is None:
                pytest.skip(f"no {name}")
            shutil.copy(os.path.realpath(path), folder / name)
            listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
            for library in re.findall(r"=> (/\S+)", listed):
                target = self.root / "usr/lib" / os.path.basename(library)
                if not target.exists():
                    shutil.copy(os.path.realpath(library), target)

    def build(self, tag: str) -> str:
        (self.folder / "Dockerfile").write_text(DOCKERFILE)
        self.engine.images.resolve("lab/busybox")
        self.engine.images.build(path=str(self.folder), tag=tag)
        return tag
