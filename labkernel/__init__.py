"""labkernel: a container lab that lives in Jupyter.

`labkernel.connect()` opens the embedded engine; `%load_ext labkernel` brings the magics. Importing the package loads
nothing heavy: the engine and the Jupyter entry points are imported when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes 8 ms to import
if TYPE_CHECKING:
    from typing import Any

    from .engine import Engine

__version__ = "0.1.0"
__all__ = ["__version__", "connect", "load_ipython_extension"]


def connect(
    root: str | None = None,
    *,
    driver: str | None = None,
    runtime_dir: str | None = None,
    tls: dict[str, str] | None = None,
) -> Engine:
    """Open the embedded engine on the store `root` (default: LABKERNEL_ROOT, then the user's data directory).

    An address (`ssh://user@host`, `tcp://host:port`, `unix:///path`) opens a Docker, Podman or labkernel daemon there,
    with the same names as far as it has them (see `remote.RemoteEngine`). `tls` names the files of a tcp:// address
    that asks for certificates: {"ca": …, "cert": …, "key": …}; so do docker's variables DOCKER_TLS_VERIFY and
    DOCKER_CERT_PATH.
    `driver` is one of `root`, `rootless`, `proot`; by default the first that this machine allows.
    """
    from .engine import Engine

    if root is not None and "://" in root:
        from .remote.engine import connect as connect_remote

        return connect_remote(root, tls=tls)  # type: ignore[return-value]
    return Engine.open(root=root, driver=driver, runtime_dir=runtime_dir)


def load_ipython_extension(ipython: Any) -> None:
    """Called by `%load_ext labkernel`."""
    from .magics import register

    register(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """Called by `%unload_ext labkernel`."""
    from .magics import unregister

    unregister(ipython)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "labkernel"}]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "labkernel"}]


def _load_jupyter_server_extension(server_app: Any) -> None:
    from .api.jupyter import load

    load(server_app)
