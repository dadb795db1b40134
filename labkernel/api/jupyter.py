"""The Jupyter server extension: what the JupyterLab extension asks, below the server's base URL, behind its login.

`GET labkernel/status` → `{"driver", "running", "total", "version", "problem"}`. The engine of the server's own user is
opened at the first request and kept; asking it starts no supervisor.
"""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web

from .. import __version__
from ..engine import Engine
from ..errors import LabkernelError

_ENGINE = "labkernel_engine"


def status_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The status record; blocking, so handlers call it in a thread."""
    try:
        engine = settings.get(_ENGINE)
        if engine is None:
            engine = settings[_ENGINE] = Engine.open()
        containers = engine.containers.list(all=True)
    except LabkernelError as err:
        return {"driver": None, "running": 0, "total": 0, "version": __version__, "problem": "\n".join(err.render())}
    running = sum(container.status in ("running", "paused") for container in containers)
    return {
        "driver": engine.driver.name,
        "running": running,
        "total": len(containers),
        "version": __version__,
        "problem": None,
    }


class StatusHandler(APIHandler):
    """`GET labkernel/status`."""

    @web.authenticated
    async def get(self) -> None:
        self.finish(await asyncio.to_thread(status_of, self.settings))


def load(server_app: Any) -> None:
    """Add the handlers to a running Jupyter server. Opens nothing yet."""
    base_url = server_app.web_app.settings["base_url"]
    server_app.web_app.add_handlers(".*$", [(url_path_join(base_url, "labkernel", "status"), StatusHandler)])
    server_app.log.info("labkernel | the container lab answers below %s", url_path_join(base_url, "labkernel"))
