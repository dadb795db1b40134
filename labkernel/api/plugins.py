"""Plugins: this engine has none and takes none, said as docker says it. Source: Docker Engine API, "Plugins"."""

from __future__ import annotations

from typing import Any

from .call import Call
from .errors import ApiError
from .routes import Route


def listing(call: Call) -> Any:
    call.filters()
    return []


def missing(call: Call) -> Any:
    raise ApiError(404, f'plugin "{call.params["name"]}" not found')


def refuse(call: Call) -> Any:
    raise ApiError(501, "plugins are not available: this engine's drivers are its own")


ROUTES = (
    Route("GET", "/plugins", listing),
    Route("GET", "/plugins/privileges", refuse),
    Route("POST", "/plugins/pull", refuse),
    Route("POST", "/plugins/create", refuse),
    Route("GET", "/plugins/{name:path}/json", missing),
    Route("DELETE", "/plugins/{name:path}", missing),
    *(
        Route("POST", f"/plugins/{{name:path}}/{verb}", missing)
        for verb in ("enable", "disable", "upgrade", "push", "set")
    ),
)
