"""`update` beyond docker: other mounts over the container's own files; and who holds its limits."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ports import free_port

from labkernel.engine import Engine
from labkernel.errors import UsageError


def test_mounts_are_changed_over_its_own_files(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new\n")
    for part in (tmp_path, *tmp_path.parents[:-2]):
        part.chmod(0o755)
    container = engine.containers.run(
        "busybox",
        ["sleep", "1000"],
        detach=True,
        name="grown",
        stop_timeout=0,
        volumes=["one:/one"],
        tmpfs={"/t": "size=64k"},
    )
    container.exec_run(["sh", "-c", "echo kept > /file; echo in-volume > /one/f"])
    warnings = container.update(volumes=[f"{tmp_path}:/data:ro"], tmpfs={"/u": ""}, remove_mounts=["/t"])["Warnings"]
    assert "stopped and started again" in warnings[0]
    assert container.status == "running"
    script = "cat /file /data/new /one/f; touch /data/x || echo refused; grep -cE ' /(t|u|data|one) ' /proc/mounts"
    output = container.exec_run(["sh", "-c", script], stderr=False).output
    assert output == b"kept\nnew\nin-volume\nrefused\n3\n"
    assert {mount["Destination"] for mount in container.attrs["Mounts"]} == {"/one", "/data"}
    container.update(remove_mounts=["/data"], mem_limit="64m")
    assert container.exec_run(["ls", "-d", "/data"]).exit_code
    assert container.attrs["HostConfig"]["Memory"] == 64 << 20
    with pytest.raises(UsageError, match="has no mount at /nowhere"):
        container.update(remove_mounts=["/nowhere"])
    container.stop(timeout=0)
    assert container.update(volumes=["one:/moved"], remove_mounts=["/one"])["Warnings"] == []
    container.start()
    assert container.exec_run(["cat", "/moved/f", "/file"]).output == b"in-volume\nkept\n"
    container.remove(force=True)
    engine.volumes.remove("one")


def test_limits_that_are_not_updated_stay(engine: Engine) -> None:
    if engine.driver.cgroups.get("memory") != "kernel":
        pytest.skip("no memory cgroup")
    container = engine.containers.create("busybox", ["true"], mem_limit="64m", mem_swappiness=7)
    container.update(mem_limit="96m")
    assert container.config()["linux"]["resources"]["memory"]["swappiness"] == 7


def test_a_limit_that_does_not_hold_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    container = engine.containers.create("busybox", ["true"], cpu_shares=512)
    bare = dataclasses.replace(engine.driver, cgroups={"cpu": "kernel"})
    monkeypatch.setattr(engine.containers, "driver", bare)
    (warning,) = container.update(mem_limit="96m")["Warnings"]
    assert "memory limit is not enforced" in warning
    assert warning in container.warnings
    assert not any("memory" in line for line in container.update(cpu_shares=256)["Warnings"])


def test_who_holds_it(engine: Engine) -> None:
    container = engine.containers.create("busybox", ["true"], mem_limit="64m", nano_cpus=500_000_000, pids_limit=9)
    held = container.attrs["Labkernel"]
    assert set(held["Limits"]) == {"memory", "cpus", "pids-limit"}
    words = {"kernel", "per-process", "best-effort", "none"}
    assert set(held["Limits"].values()) | set(held["Isolation"].values()) <= words
    if engine.driver.name == "root":
        assert held["Isolation"]["files"] == held["Isolation"]["processes"] == "kernel"
        assert held["Isolation"]["users"] == "none"
        assert (
            engine.containers.create("busybox", ["true"], network_mode="host").attrs["Labkernel"]["Isolation"][
                "network"
            ]
            == "none"
        )
    assert "<details><summary>driver" in container._repr_html_()


def test_ports_are_published_later(engine: Engine, needs: Callable[..., None]) -> None:
    if engine.driver.name != "root":
        pytest.skip("about published ports of the driver root")
    needs("nftables")
    port = free_port()
    script = "echo kept > /file; while true; do echo hello | nc -l -p 80; done"
    container = engine.containers.run("busybox", ["sh", "-c", script], detach=True, stop_timeout=0)
    warnings = container.update(ports={"80/tcp": ("127.0.0.1", port)})["Warnings"]
    assert "stopped and started again" in warnings[0]
    assert container.attrs["NetworkSettings"]["Ports"]["80/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": str(port)}]
    seen, deadline = b"", time.monotonic() + 60
    while b"hello" not in seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.settimeout(5)
            seen = connection.recv(100)
    assert seen == b"hello\n"
