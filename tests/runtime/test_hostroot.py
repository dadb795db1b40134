"""The machine's own root as the lowest of several layers, through builds and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkernel.engine import Engine

RECIPE = "FROM lab/host\nWORKDIR /lk-hostroot\nRUN echo one > first\nRUN cat first > second; echo two >> second\n"


def test_two_run_steps_on_the_host(engine: Engine) -> None:
    if engine.driver.name != "root":
        pytest.skip("lab/host needs the root driver")
    built = engine.builds.build(RECIPE, no_cache=True)
    out = engine.containers.run(
        built.image.id, ["sh", "-c", "cat second; rm first; ls; ls /usr/bin | wc -l"], remove=True
    )
    words = out.split()
    assert words[:3] == [b"one", b"two", b"second"]
    assert int(words[3]) > 50
    # Read-only below: nothing of it reached the machine.
    assert not Path("/lk-hostroot").exists()
    engine.images.remove(built.image.id, force=True)
    assert engine.check() == []
