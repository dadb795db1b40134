"""Builds as tests make them: through the engine, fresh where the cache must not know them."""

from __future__ import annotations

import os
import secrets
from typing import Any

from waiting import last_of

from labkernel.building.result import BuildResult
from labkernel.engine import Engine

BASE = "FROM lab/busybox\n"


def build(engine: Engine, text: str, **more: Any) -> BuildResult:
    return engine.builds.build(text, **more)


def output(engine: Engine, image: Any, command: str) -> str:
    found: bytes = engine.containers.run(image.id, ["sh", "-c", command], remove=True)
    return found.decode()


def fresh(text: str) -> str:
    """The same Dockerfile as nobody has built before."""
    # So long, and of so many letters, that no other test's can pass for what this line was before.
    return text.replace(BASE, f"{BASE}ENV FRESH={secrets.token_urlsafe(24)}\n", 1)


def store(engine: Engine) -> dict[str, list[str]]:
    root = engine.layout.root
    # A container that removes itself does so after its answer.
    last_of(lambda: not os.listdir(root / "containers"))
    found = {name: sorted(os.listdir(root / name)) for name in ("containers", "tmp")}
    tags = {row[0] for row in engine.db.query("SELECT name FROM tags")}
    found["tags"] = sorted(tags - {"docker.io/lab/busybox:latest"})  # made when it is first named
    return found
