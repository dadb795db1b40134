"""Swarm's groups: this node is in none, said as docker says it. Source: Docker Engine API, "Swarm"."""

from __future__ import annotations

from typing import Any

from .call import Call
from .errors import ApiError
from .routes import Route

_NOT_A_MANAGER = (
    'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm '
    "and try again."
)


async def refuse(call: Call) -> Any:
    raise ApiError(503, _NOT_A_MANAGER)


async def leave(call: Call) -> Any:
    raise ApiError(503, "This node is not part of a swarm")


async def init(call: Call) -> Any:
    raise ApiError(501, "swarm mode is not available: this engine has one node")


ROUTES = (
    Route("POST", "/swarm/leave", leave),
    Route("POST", "/swarm/init", init),
    Route("POST", "/swarm/join", init),
    *(
        Route(method, pattern, refuse)
        for group in ("swarm", "nodes", "services", "tasks", "secrets", "configs")
        for method in ("GET", "POST", "DELETE")
        for pattern in (f"/{group}", f"/{group}/{{rest:path}}")
    ),
)
