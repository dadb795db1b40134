"""The daemon against the published description of the Engine API: every operation of it is answered, with what it
promises, and whatever is sent to it is no bug."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from daemons import Daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import ValidationError
from openapi import FILE, ODD, Operation, body, operations, parameter

from labkernel.api import routes
from labkernel.engine import Engine

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no {FILE} (Debian: docker-doc)")
EACH = pytest.mark.parametrize("operation", operations(), ids=lambda each: each.name)

# What would wait for something, or for somebody outside, gets words with which it does not.
FIXED: dict[str, dict[str, str]] = {
    "GET /containers/{id}/logs": {"follow": "0", "stdout": "1"},
    "GET /containers/{id}/stats": {"stream": "0"},
    "POST /containers/{id}/wait": {"condition": "not-running"},
    "POST /containers/{id}/attach": {"stream": "0", "logs": "1"},
    "GET /containers/{id}/attach/ws": {"stream": "0"},
    "GET /events": {"since": "1", "until": "2"},
    "POST /build": {"remote": ""},
    "POST /images/create": {"fromImage": "127.0.0.1:1/none", "fromSrc": "-"},
    "GET /images/search": {"term": "127.0.0.1:1/none"},
    "POST /images/{name}/push": {"tag": "t"},
    "POST /containers/{id}/stop": {"t": "0"},
    "DELETE /containers/{id}": {"force": "1"},
    "POST /containers/{id}/restart": {"t": "0"},
}
# Only these names: of registries this machine's, where none listens; a running container would be waited for.
NAMES = {
    "POST /containers/{id}/wait": ["it"],
    "POST /images/{name}/push": ["127.0.0.1:1/none"],
    "GET /distribution/{name}/json": ["127.0.0.1:1/none"],
}
BODIES = {
    "POST /auth": {"username": "u", "password": "p", "serveraddress": "127.0.0.1:1"},
    "POST /exec/{id}/start": {"Detach": True},
}
LINES = ("/events", "/build", "/images/create", "/images/load", "/images/{name}/push")
NO_JSON = ("/archive", "/images/load", "/build", "/images/create", "/session")


@pytest.fixture(scope="module")
def own(module_engine: Engine) -> Iterator[tuple[Daemon, Engine]]:
    """A daemon and an engine of this module's own: the operations remove whatever they can."""
    layout = module_engine.layout
    environment = {
        **os.environ,
        "LABKERNEL_ROOT": str(layout.root),
        "LABKERNEL_RUNTIME_DIR": str(layout.runtime_dir),
        "LABKERNEL_DRIVER": module_engine.driver.name,
    }
    daemon = Daemon(environment, f"{layout.root.parent}/docker.sock")
    yield daemon, module_engine
    daemon.stop()


class State:
    """One of each object there is."""

    def __init__(self, daemon: Daemon, engine: Engine) -> None:
        self.daemon = daemon
        for container in engine.containers.list(all=True):
            container.remove(force=True, v=True)
        engine.images.resolve("lab/busybox", notify=lambda line: None)
        engine.images.tag("lab/busybox", "it")
        body = {
            "Image": "lab/busybox",
            "Cmd": ["sleep", "1000"],
            "Labels": {"a": "b"},
            "Healthcheck": {"Test": ["NONE"]},
        }
        for name in ("it", "that"):
            daemon.json("POST", f"/containers/create?name={name}", {**body, "HostConfig": {"Init": True}})
        daemon.json("POST", "/containers/that/start")
        daemon.json("POST", "/volumes/create", {"Name": "it", "Labels": {"a": "b"}})
        if daemon.request("GET", "/networks/it")[0] == 404:
            daemon.json("POST", "/networks/create", {"Name": "it"})
        self.exec = daemon.json("POST", "/containers/that/exec", {"Cmd": ["true"], "AttachStdout": True})["Id"]

    def names(self, operation: Operation) -> list[str]:
        if operation.name in NAMES:
            return NAMES[operation.name]
        return [self.exec] if operation.path.startswith("/exec/") else ["it", "that", "lab/busybox"]


@pytest.fixture
def state(own: tuple[Daemon, Engine]) -> State:
    return State(*own)


def ask(state: State, operation: Operation, name: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
    """The status and the decoded answer of one request: never a bug, in docker's shape, as the description promises."""
    path = operation.path
    for word in ("{id}", "{name}"):
        path = path.replace(word, quote(name, safe="/" if "images" in path else "") or "%20")
    text = f"/v1.41{path}?{urlencode(query, errors='surrogatepass')}"
    data = None if sent is None else sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    status, headers, answer = state.daemon.request(
        operation.method, text, data, {"Content-Type": "application/json", "X-Registry-Config": "{}"}
    )
    case = (operation.method, text, data, status, answer[:2000])
    assert status < 600, case
    if operation.method == "HEAD" or status in (101, 204, 304):
        return status, None
    if status >= 400:
        found = json.loads(answer)
        assert isinstance(found["message"], str), case
        # An error of ours with no name of its own is a bug: it tells its class.
        assert status != 500 or not found["message"].split(":")[0].endswith(("Error", "Exception")), case
        return status, found
    assert str(status) in operation.responses or status in (200, 201), case
    if headers.get("content-type") != "application/json":
        return status, answer
    if operation.schema(status) is None or operation.path in LINES:
        return status, answer
    found = json.loads(answer)
    try:
        operation.validate(status, found)
    except ValidationError as err:
        raise AssertionError(f"{case}\n{err}") from None
    return status, found


def test_the_description_is_there_and_is_docker_s() -> None:
    assert len(operations()) > 100


@EACH
def test_every_operation_has_a_route(operation: Operation) -> None:
    path = operation.path.replace("{id}", "x").replace("{name}", "x")
    assert routes.find(operation.method, f"/v1.41{path}") is not None


@EACH
def test_answers_are_what_the_description_promises(operation: Operation, state: State) -> None:
    if operation.path.startswith(("/session",)):
        pytest.skip("becomes another protocol")
    stopped = operation.name in ("POST /containers/{id}/wait", "DELETE /containers/{id}", "POST /containers/{id}/start")
    name = "that" if operation.path.startswith("/containers") and not stopped else state.names(operation)[0]
    sent: Any = BODIES.get(operation.name)
    if operation.name == "POST /containers/create":
        sent = {"Image": "lab/busybox"}
    elif operation.name == "POST /containers/{id}/exec":
        sent = {"Cmd": ["true"]}
    elif operation.path in ("/networks/{id}/connect", "/networks/{id}/disconnect"):
        sent = {"Container": "that"}
    elif operation.path == "/networks/create":
        sent = {"Name": f"n{os.urandom(4).hex()}"}
    elif operation.method == "POST":
        sent = sent or {}
    query = {
        "/containers/{id}/archive": {"path": "/etc"},
        "/containers/{id}/rename": {"name": "other"},
        "/containers/{id}/resize": {"h": "24", "w": "80"},
        "/exec/{id}/resize": {"h": "24", "w": "80"},
        "/images/{name}/tag": {"repo": "other", "tag": "t"},
        "/commit": {"container": "that", "repo": "made"},
        "/images/get": {"names": "it"},
    }.get(operation.path, {})
    if operation.path.endswith(("/unpause",)):
        state.daemon.json("POST", "/containers/that/pause")
    if operation.path.endswith("/disconnect"):
        state.daemon.json("POST", "/networks/it/connect", sent)
    status, _ = ask(state, operation, name, {**query, **FIXED.get(operation.name, {})}, sent)
    away = ("/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs", "/plugins", "/distribution", "/auth")
    if not operation.path.startswith(away):
        elsewhere = (
            "push",
            "search",
            "/images/create",
            "/build",
            "archive",
            "resize",
            "/images/load",
            "attach/ws",
            "prune",
        )
        assert status < 400 or operation.path.endswith(elsewhere), status
    else:
        assert str(status) in operation.responses or status == 501, status


@EACH
@settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_is_sent_is_no_bug(operation: Operation, state: State, data: st.DataObject) -> None:
    if operation.path == "/session":
        pytest.skip("becomes another protocol")
    fixed = FIXED.get(operation.name, {})
    named = st.sampled_from(state.names(operation))
    name = data.draw(named if operation.name in NAMES else st.one_of(named, named, ODD))
    query = {
        each["name"]: data.draw(parameter(each), label=each["name"])
        for each in operation.parameters
        if each["in"] == "query" and each["name"] not in fixed and data.draw(st.booleans())
    }
    sent = data.draw(body(operation)) if not operation.path.endswith(NO_JSON) else data.draw(st.binary(max_size=600))
    sent = BODIES.get(operation.name, sent)
    ask(state, operation, name, {**query, **fixed}, sent)
