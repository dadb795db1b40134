"""The Jupyter server extension: what the JupyterLab extension asks, below the server's base URL, behind its login.

    labkernel/status         {"driver", "running", "total", "version", "problem", "daemon"}; starts no supervisor
    labkernel/engine/…       the Docker Engine API, the table of `routes`: `labkernel/engine/v1.43/containers/json`

The engine of the server's own user is opened at the first request and kept. While a daemon of this store runs, the
server's terminals have its DOCKER_HOST, unless the user has set one.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from jupyter_core.utils import ensure_async
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from jupyter_server.utils import url_path_join
from tornado import web

from .. import __version__
from ..engine import Engine
from ..errors import LabkernelError
from . import background
from .call import Host
from .handler import Dispatch

_ENGINE = "labkernel_engine"
_HOST = "labkernel_api_host"
_SET = "labkernel_docker_host"


def engine_of(settings: dict[str, Any]) -> Engine:
    """The server's engine, opened when it is first asked for."""
    engine: Engine | None = settings.get(_ENGINE)
    if engine is None:
        engine = settings[_ENGINE] = Engine.open()
    return engine


def status_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The status record; blocking, so handlers call it in a thread."""
    try:
        engine = engine_of(settings)
        containers = engine.containers.list(all=True)
    except LabkernelError as err:
        problem = "\n".join(err.render())
        nothing = {"driver": None, "running": 0, "total": 0, "daemon": None}
        return {**nothing, "version": __version__, "problem": problem}
    running = sum(container.status in ("running", "paused") for container in containers)
    return {
        "driver": engine.driver.name,
        "running": running,
        "total": len(containers),
        "version": __version__,
        "problem": None,
        "daemon": _tell_terminals(settings, background.find(engine.layout)),
    }


def _tell_terminals(settings: dict[str, Any], daemon: background.RunningDaemon | None) -> str | None:
    """New terminals inherit the server's environment: DOCKER_HOST is there as long as the daemon is."""
    ours = settings.get(_SET)
    current = os.environ.get("DOCKER_HOST")
    address = daemon.address if daemon is not None else None
    if current is None or current == ours:
        settings[_SET] = address
        if address is not None:
            os.environ["DOCKER_HOST"] = address
        elif current is not None:
            del os.environ["DOCKER_HOST"]
    return address


class StatusHandler(APIHandler):
    """`GET labkernel/status`."""

    @web.authenticated
    async def get(self) -> None:
        self.finish(await asyncio.to_thread(status_of, self.settings))


@web.stream_request_body
class EngineHandler(Dispatch, JupyterHandler):
    """Everything below `labkernel/engine/`, for whom the Jupyter server lets in."""

    def initialize(self, prefix: str) -> None:
        self._prefix = prefix
        self._call = None
        self._wire = None

    @property
    def api_host(self) -> Host:
        settings = self.settings
        if _HOST not in settings:
            settings[_HOST] = Host(lambda: engine_of(settings))
        found: Host = settings[_HOST]
        return found

    def api_path(self) -> str:
        return self.request.path[len(self._prefix) :]

    async def prepare(self) -> None:  # type: ignore[override]
        await super().prepare()
        if self._finished:
            return
        user = self.current_user
        if not user or not await ensure_async(self.authorizer.is_authorized(self, user, "execute", "labkernel")):
            raise web.HTTPError(403)
        # A page elsewhere may open a WebSocket with this browser's cookie: only the server's own pages may.
        if "Origin" in self.request.headers and not self.check_origin():
            raise web.HTTPError(403)
        self.begin_call()


def load(server_app: Any) -> None:
    """Add the handlers to a running Jupyter server. Opens nothing yet."""
    base_url = server_app.web_app.settings["base_url"]
    prefix = url_path_join(base_url, "labkernel", "engine")
    handlers = [
        (url_path_join(base_url, "labkernel", "status"), StatusHandler),
        (rf"{prefix}/.*", EngineHandler, {"prefix": prefix}),
    ]
    server_app.web_app.add_handlers(".*$", handlers)
    server_app.log.info("labkernel | the container lab answers below %s", url_path_join(base_url, "labkernel"))
