"""The engine itself: ping, version. Source: Docker Engine API, "System"."""

from __future__ import annotations

import os
import platform
from typing import Any

from .. import __version__
from .call import Call
from .handler import words_of
from .routes import NEWEST, OLDEST, Route

BUILDER_VERSION = "1"
"""What `docker build` takes by default: 1 the classic builder, 2 BuildKit."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


async def ping(call: Call) -> Any:
    return call.answer(
        200,
        "OK",
        Builder_Version=BUILDER_VERSION,
        Swarm="inactive",
        Cache_Control="no-cache, no-store, must-revalidate",
        Pragma="no-cache",
    )


async def version(call: Call) -> Any:
    kernel = os.uname()
    arch = _ARCHITECTURES.get(kernel.machine, kernel.machine)
    details = {
        "ApiVersion": words_of(NEWEST),
        "Arch": arch,
        "BuildTime": "",
        "Experimental": "false",
        "GitCommit": "",
        "GoVersion": "",
        "KernelVersion": kernel.release,
        "MinAPIVersion": words_of(OLDEST),
        "Os": "linux",
        "PythonVersion": platform.python_version(),
    }
    return {
        "Platform": {"Name": "labkernel"},
        "Components": [{"Name": "Engine", "Version": __version__, "Details": details}],
        "Version": __version__,
        "ApiVersion": words_of(NEWEST),
        "MinAPIVersion": words_of(OLDEST),
        "GitCommit": "",
        "GoVersion": "",
        "Os": "linux",
        "Arch": arch,
        "KernelVersion": kernel.release,
        "BuildTime": "",
    }


ROUTES = (
    Route("GET", "/_ping", ping),
    Route("HEAD", "/_ping", ping),
    Route("GET", "/version", version),
)
