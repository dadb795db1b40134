"""A real JupyterHub with its real proxy on 127.0.0.1, and system users of its own, as a class has them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_ports

PROXY = Path(sys.prefix) / "peers/node_modules/.bin/configurable-http-proxy"
START_S = 120.0
CONFIG = """
c = get_config()
c.JupyterHub.bind_url = {url!r}
c.JupyterHub.hub_port = {hub_port}
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.pid_file = "{folder}/proxy.pid"
c.ConfigurableHTTPProxy.auth_token = {token!r}
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "jupyterhub.spawner.LocalProcessSpawner"
c.Spawner.cmd = [{singleuser!r}]
c.Spawner.env_keep = ["PATH", "LANG", "VIRTUAL_ENV"]
c.Spawner.start_timeout = c.Spawner.http_timeout = 120
c.JupyterHub.services = [{{"name": "test", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [
    {{"name": "test", "scopes": ["admin:users", "admin:servers", "access:servers"], "services": ["test"]}}
]
"""


class Hub:
    """Speaks to the hub and to the students' servers with the token of a service."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        port, self.hub_port, self.proxy_port = free_ports(3)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "hub.log"

    def __enter__(self) -> Hub:
        config = self.folder / "jupyterhub_config.py"
        singleuser = str(Path(sys.prefix) / "bin/jupyterhub-singleuser")
        config.write_text(
            CONFIG.format(
                url=self.url,
                hub_port=self.hub_port,
                proxy_port=self.proxy_port,
                folder=self.folder,
                proxy=str(PROXY),
                token=self.token,
                singleuser=singleuser,
            )
        )
        # The proxy is a program of Node, which may lie beside our Python.
        env = {**os.environ, "PATH": f"{os.environ['PATH']}:{Path(sys.prefix) / 'bin'}"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub", "-f", str(config)],
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=log,
            )
        self.until(lambda: self.ask("GET", "/hub/api/")["version"], "the hub answers")
        return self

    def __exit__(self, *_: object) -> None:
        # The hub ends its proxy and its students' servers.
        self.process.terminate()
        self.process.wait(60)

    def until(self, what: Any, why: str) -> Any:
        """The first true answer; connections refused and errors on the way are waited out."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                answer = what()
                if answer:
                    return answer
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{why}: not in {START_S:.0f} s\n{self.log.read_text()[-4000:]}"
            time.sleep(0.2)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.url + path, method=method, data=None if body is None else json.dumps(body).encode()
        )
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def start_server(self, user: str) -> None:
        self.ask("POST", f"/hub/api/users/{user}/server", {})
        self.until(lambda: self.ask("GET", f"/hub/api/users/{user}")["servers"].get("", {}).get("ready"), user)

    def stop_server(self, user: str) -> None:
        self.ask("DELETE", f"/hub/api/users/{user}/server")
        self.until(lambda: not self.ask("GET", f"/hub/api/users/{user}")["servers"], f"{user} has left")


@pytest.fixture(scope="module")
def students() -> Iterator[list[str]]:
    """Two system users with homes of their own, removed at the end."""
    if os.geteuid() != 0:
        pytest.skip("a hub that starts servers as other users needs root")
    pytest.importorskip("jupyterhub")
    if not PROXY.exists():
        pytest.skip("no configurable-http-proxy: `make test` installs it where npm is")
    names = [f"lk-hub-{secrets.token_hex(3)}" for _ in range(2)]
    homes = [Path(tempfile.mkdtemp(prefix="lk-h-", dir="/tmp")) for _ in names]
    try:
        for name, home in zip(names, homes, strict=True):
            words = ["--system", "--user-group", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh"]
            subprocess.run(["useradd", *words, name], check=True, capture_output=True)
            shutil.chown(home, name, name)
        probe = ["setpriv", f"--reuid={names[0]}", "--clear-groups", sys.executable, "-c", "import labkernel"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("a plain user cannot read this checkout or its interpreter")
        yield names
    finally:
        shutdown = "import labkernel; labkernel.connect().runtime.shutdown(force=True)"
        for name, home in zip(names, homes, strict=True):
            # Also after a test that failed half way; as the user, since what it made is the user's.
            words = ["setpriv", f"--reuid={name}", f"--regid={name}", "--clear-groups", sys.executable, "-c", shutdown]
            env = {"PATH": os.environ["PATH"], "HOME": str(home)}
            subprocess.run(words, check=False, capture_output=True, env=env, cwd=home)
        for name, home in zip(names, homes, strict=True):
            subprocess.run(["userdel", name], check=False, capture_output=True)
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def hub(students: list[str]) -> Iterator[Hub]:
    folder = Path(tempfile.mkdtemp(prefix="lk-hub-", dir="/tmp"))
    try:
        with Hub(folder) as hub:
            for name in students:
                hub.ask("POST", f"/hub/api/users/{name}")
            yield hub
    finally:
        shutil.rmtree(folder)
