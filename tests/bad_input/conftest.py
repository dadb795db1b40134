"""A shell, an engine that has all a case needs, and a directory of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input.world import BUSYBOX, USED

from labkernel.engine import Engine


@pytest.fixture
def shell(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    shell.reset(new_session=False)
    shell.extension_manager.load_extension("labkernel")
    yield shell
    shell.extension_manager.unload_extension("labkernel")
    shell.user_ns.pop("lab", None)


@pytest.fixture
def lab(engine: Engine) -> Iterator[Engine]:
    """The engine with all a case needs: the base is unpacked, the supervisor runs, `taken` has its name.

    `taken` is made of an image of its own with one name: of one with two names, `rmi` only removes the name."""
    engine.containers.run(BUSYBOX, "true", remove=True)
    engine.builds.build(f"FROM {BUSYBOX}\nLABEL of=bad-input\n", tags=[USED])
    taken = engine.containers.create(USED, "true", name="taken")
    yield engine
    taken.remove(force=True)
    engine.images.remove(USED, force=True)


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lk-b-", dir="/tmp"))
    yield path
    shutil.rmtree(path)
