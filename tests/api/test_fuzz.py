"""Whatever a request holds, the daemon answers it in docker's shape and never with 500: that would be a bug of ours."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from daemons import Daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkernel.api.configs import Config
from labkernel.api.routes import Route, table
from labkernel.engine import Engine

# What would end, block for ever, or need the network is left to tests of its own.
STREAMS = re.compile(
    r"/(attach|ws|stats|wait|events|session|grpc|build|load|push|search|start|restart)$|/images/create|/distribution/|/auth"
)
REACHABLE = [route for route in table() if not STREAMS.search(route.pattern)]
EXAMPLES = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
    derandomize=True,
)

odd = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "true", "99999999999999999999", "\0", "../..", "a" * 5000, "é\u202e", "{}", "null"]
    ),
    st.text(max_size=20),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False), odd),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd, inner, max_size=3)),
    max_leaves=6,
)
NAMES = [
    *("filters", "all", "limit", "size", "name", "signal", "t", "path", "h", "w", "tail", "since", "until", "stdout"),
    *("stderr", "condition", "force", "v", "ps_args", "type", "detachKeys", "repo", "tag", "follow", "noprune", "term"),
]


def ask(daemon: Daemon, route: Route, words: list[str], query: list[tuple[str, str]], body: bytes | None) -> None:
    """One request; "it" stands for the container there is."""
    path = route.pattern
    for word in words:
        path = re.sub(r"\{\w+(:path)?\}", lambda _, word=word: quote(word, safe="") or "%20", path, count=1)
    text = f"{path}?{urlencode(query, errors='surrogatepass')}"
    status, _, answer = daemon.request(route.method, text, body, {"Content-Type": "application/json"})
    assert status != 500, (route.method, text, body, answer)
    if status >= 400 and route.method != "HEAD":
        assert isinstance(json.loads(answer)["message"], str)


@pytest.fixture
def target(daemon: Daemon, engine: Engine) -> str:
    return str(daemon.json("POST", "/containers/create?name=it", {"Image": "lab/busybox", "Cmd": ["true"]})["Id"])


@EXAMPLES
@given(
    route=st.sampled_from(REACHABLE),
    word=st.one_of(st.just("it"), odd),
    query=st.lists(st.tuples(st.sampled_from(NAMES), st.one_of(odd, values.map(json.dumps))), max_size=4),
    body=st.one_of(st.none(), st.binary(max_size=50), values.map(lambda value: json.dumps(value).encode())),
)
def test_no_request_is_a_bug(
    daemon: Daemon, target: str, route: Route, word: str, query: list[tuple[str, str]], body: bytes | None
) -> None:
    query = [(name, word) for name, word in query if (name, word) != ("follow", "true")]
    ask(daemon, route, [word], query, body)


HOST_NAMES = [
    *("Binds", "Memory", "NanoCpus", "CpusetCpus", "PortBindings", "RestartPolicy", "CapAdd", "Ulimits", "Mounts"),
    *("Tmpfs", "NetworkMode", "PidMode", "IpcMode", "ShmSize", "Sysctls", "Devices", "SecurityOpt", "LogConfig"),
    *("ExtraHosts", "GroupAdd", "OomScoreAdj", "VolumesFrom", "Dns", "Privileged", "Init", "MemorySwappiness"),
]


@EXAMPLES
@given(
    config=st.dictionaries(st.sampled_from([*Config.__struct_encode_fields__]), values, max_size=4),
    host=st.dictionaries(
        st.sampled_from(HOST_NAMES),
        st.one_of(odd, st.integers(-5, 1 << 40), st.lists(odd, max_size=2), st.dictionaries(odd, odd, max_size=2)),
        max_size=3,
    ),
)
def test_no_container_is_a_bug(daemon: Daemon, engine: Engine, config: dict[str, Any], host: dict[str, Any]) -> None:
    body = {**config, "Image": "lab/busybox", "HostConfig": host}
    status, _, answer = daemon.request("POST", "/containers/create", body)
    assert status in (201, 400, 404, 409, 501), (body, answer)
    if status == 201:
        id = json.loads(answer)["Id"]
        assert daemon.json("GET", f"/containers/{id}/json")["Id"] == id
        assert daemon.request("DELETE", f"/containers/{id}?v=1&force=1")[0] == 204
