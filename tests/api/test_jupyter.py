"""The server extension in a real Jupyter server process: its answer, and who gets none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from labkernel import __version__
from labkernel.engine import Engine

TOKEN = "a-token-of-the-test"


@pytest.fixture
def server(engine: Engine, tmp_path: Path) -> Iterator[str]:
    """Base URL of a Jupyter server on a free port, with labkernel's server extension."""
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "HOME": str(tmp_path),
    }
    port = free_port()
    command = [
        *(sys.executable, "-m", "jupyter_server", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"),
        *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={tmp_path}", "--ServerApp.base_url=/user/ada/"),
        *("--ServerApp.port_retries=0", "--ServerApp.jpserver_extensions={'labkernel': True}"),
    ]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}/user/ada/"
    try:
        deadline = time.monotonic() + 60
        while get(f"{url}api", None)[0] != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def get(url: str, token: str | None) -> tuple[int, dict[str, object]]:
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as err:
        return err.code, {}
    except urllib.error.URLError:
        return 0, {}


def test_status_counts_containers_below_the_base_url(server: str, engine: Engine) -> None:
    container = engine.containers.run("lab/busybox", ["sleep", "300"], detach=True)
    engine.containers.create("lab/busybox", "true")
    status, body = get(f"{server}labkernel/status", TOKEN)
    assert status == 200
    daemon = body.pop("daemon")
    assert daemon is None or str(daemon).startswith("unix://"), "that of another test, where one ran before"
    assert body == {
        "driver": engine.driver.name,
        "running": 1,
        "total": 2,
        "version": __version__,
        "problem": None,
    }
    container.remove(force=True)
    assert get(f"{server}labkernel/status", TOKEN)[1]["running"] == 0


def test_without_the_token_there_is_no_answer(server: str) -> None:
    assert get(f"{server}labkernel/status", None)[0] == 403
    assert get(f"{server}labkernel/status", "guessed")[0] == 403


def test_the_engines_api_answers_below_the_base_url_for_who_may(server: str, engine: Engine) -> None:
    url = f"{server}labkernel/engine/v1.43/"
    assert get(f"{url}containers/json", None)[0] == 403
    container = engine.containers.create("lab/busybox", ["sh", "-c", "echo out; exit 3"], name="below")
    assert post(f"{url}containers/below/start") == (204, b"")
    assert post(f"{url}containers/below/wait")[1].startswith(b'{"StatusCode":3')
    status, body = get(f"{url}containers/json?all=1", TOKEN)
    assert (status, [row["Id"] for row in body]) == (200, [container.id])  # type: ignore[index]
    request = urllib.request.Request(
        f"{url}containers/below/logs?stdout=1", headers={"Authorization": f"token {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.read() == b"\x01\0\0\0\0\0\0\x04out\n"
    assert get(f"{url}nowhere", TOKEN)[0] == 404


def post(url: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=b"", headers={"Authorization": f"token {TOKEN}"}, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, answer.read()
