"""From image config and settings to a runtime-spec configuration."""

from __future__ import annotations

from typing import Any

import pytest

from labkernel.errors import UsageError
from labkernel.runtime import spec
from labkernel.runtime.settings import normalize

ID = "0123456789ab" * 5 + "0123"
IMAGE: dict[str, Any] = {
    "Env": ["PATH=/bin", "LANG=C"],
    "Cmd": ["serve"],
    "Entrypoint": ["/entry"],
    "WorkingDir": "/srv",
    "User": "web:www",
    "StopSignal": "SIGQUIT",
}


def make(image: dict[str, Any] | None = None, command: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    return spec.finalize_spec(
        id=ID,
        command=command or [],
        image_config=IMAGE if image is None else image,
        settings=normalize(settings, cpus=4),
        rootfs={"kind": "dir", "path": "/r"},
        directory="/store/containers/x",
    )


def test_the_image_speaks_where_nothing_was_said() -> None:
    config = make()
    process = config["process"]
    assert process["args"] == ["/entry", "serve"]
    assert process["cwd"] == "/srv"
    assert config["labkernel"]["user_unresolved"] == "web:www"
    assert config["labkernel"]["stop_signal"] == 3
    assert config["hostname"] == ID[:12]
    assert process["env"] == ["PATH=/bin", f"HOSTNAME={ID[:12]}", "LANG=C"]


@pytest.mark.parametrize(
    ("settings", "command", "args"),
    [
        ({}, ["run"], ["/entry", "run"]),
        ({"entrypoint": "sh"}, [], ["sh"]),
        ({"entrypoint": "sh -c"}, ["x"], ["sh", "-c", "x"]),
        ({"entrypoint": ""}, ["x"], ["x"]),
        ({"entrypoint": [""]}, ["x"], ["x"]),
    ],
)
def test_entrypoint_and_command(settings: dict[str, Any], command: list[str], args: list[str]) -> None:
    assert make(command=command, **settings)["process"]["args"] == args


def test_no_command() -> None:
    with pytest.raises(UsageError, match="No command specified"):
        make({})


def test_environment_order_and_unsetting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "yes")
    monkeypatch.delenv("LANG", raising=False)
    found = make(tty=True, environment=["A=1", "A=2", "FROM_HERE", "LANG"])["process"]["env"]
    assert found == ["PATH=/bin", f"HOSTNAME={ID[:12]}", "TERM=xterm", "A=2"]


@pytest.mark.parametrize(
    ("settings", "has", "has_not"),
    [
        ({}, {"CAP_CHOWN", "CAP_MKNOD"}, {"CAP_SYS_ADMIN"}),
        ({"cap_drop": ["ALL"]}, set(), {"CAP_CHOWN"}),
        ({"cap_drop": ["ALL"], "cap_add": ["chown"]}, {"CAP_CHOWN"}, {"CAP_KILL"}),
        ({"cap_add": ["ALL"], "cap_drop": ["SYS_ADMIN"]}, {"CAP_BPF"}, {"CAP_SYS_ADMIN"}),
        ({"cap_drop": ["MKNOD"], "cap_add": ["NET_ADMIN"]}, {"CAP_NET_ADMIN", "CAP_KILL"}, {"CAP_MKNOD"}),
    ],
)
def test_capabilities(settings: dict[str, Any], has: set[str], has_not: set[str]) -> None:
    found = make(**settings)["process"]["capabilities"]
    assert set(found) == {"bounding", "effective", "permitted"}
    assert has <= set(found["bounding"])
    assert not has_not & set(found["bounding"])


def test_fourteen_capabilities_by_default() -> None:
    assert len(make()["process"]["capabilities"]["bounding"]) == 14


@pytest.mark.parametrize(
    ("settings", "resources"),
    [
        ({}, {}),
        ({"mem_limit": "64m"}, {"memory": {"limit": 64 << 20, "swap": 128 << 20}}),
        ({"mem_limit": "64m", "memswap_limit": -1}, {"memory": {"limit": 64 << 20, "swap": -1}}),
        ({"nano_cpus": 500_000_000}, {"cpu": {"period": 100_000, "quota": 50_000}}),
        ({"cpu_shares": 512, "cpuset_cpus": "0"}, {"cpu": {"shares": 512, "cpus": "0"}}),
        ({"pids_limit": 20}, {"pids": {"limit": 20}}),
        ({"pids_limit": -1}, {}),
        ({"blkio_weight": 100}, {"blockIO": {"weight": 100}}),
    ],
)
def test_resources(settings: dict[str, Any], resources: dict[str, Any]) -> None:
    assert spec.finalize_resources(normalize(settings, cpus=4), devices=False) == resources


def test_devices_are_restricted() -> None:
    rules = make()["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}


def test_mounts_come_parents_first() -> None:
    config = spec.finalize_spec(
        id=ID,
        command=[],
        image_config=IMAGE,
        settings=normalize({"tmpfs": {"/a/b": "exec,size=1m"}}),
        rootfs={},
        directory="/d",
        mounts=[{"destination": "/a/b/c"}, {"destination": "/a"}],
    )
    places = [mount["destination"] for mount in config["mounts"]]
    assert places[:7] == ["/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/dev/shm"]
    assert places[7:] == ["/a", "/a/b", "/a/b/c"]
    assert config["mounts"][8]["options"] == ["nosuid", "nodev", "exec", "size=1m"]


def test_shared_memory_size() -> None:
    shm = next(m for m in make(shm_size="1m")["mounts"] if m["destination"] == "/dev/shm")
    assert "size=1024k" in shm["options"]


def test_host_network_has_no_network_namespace() -> None:
    types = [space["type"] for space in make(network_mode="host")["linux"]["namespaces"]]
    assert "network" not in types
    assert "network" in [space["type"] for space in make(network_mode="none")["linux"]["namespaces"]]


def test_security_options() -> None:
    config = make(security_opt=["no-new-privileges", "systempaths=unconfined"])
    assert config["process"]["noNewPrivileges"]
    assert config["linux"]["maskedPaths"] == []
    assert spec.security_options({"security_opt": ["seccomp:unconfined", "no-new-privileges:false"]}) == {
        "seccomp": "unconfined"
    }


def test_single_id_leaves_the_terminal_group_out() -> None:
    config = spec.finalize_spec(
        id=ID, command=[], image_config=IMAGE, settings={}, rootfs={}, directory="/d", single_id=True, limits=False
    )
    pts = next(m for m in config["mounts"] if m["destination"] == "/dev/pts")
    assert "gid=5" not in pts["options"]
    assert not [m for m in config["mounts"] if m["type"] == "cgroup"]
    assert config["labkernel"]["cgroup_parent"] == ""


def test_numbers_of_a_user() -> None:
    process = make(user="1000:100", group_add=["7"])["process"]
    assert process["user"] == {"uid": 1000, "gid": 100, "additionalGids": [7]}


def test_healthcheck_of_the_image() -> None:
    image = {**IMAGE, "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5_000_000}}
    assert make(image)["labkernel"]["healthcheck"] == {
        "args": ["true"],
        "interval_s": 0.005,
        "timeout_s": 30.0,
        "start_period_s": 0.0,
        "start_interval_s": 5.0,
        "retries": 3,
    }
    assert make({**IMAGE, "Healthcheck": {"Test": ["NONE"]}})["labkernel"]["healthcheck"] is None
