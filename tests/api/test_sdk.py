"""The Docker SDK for Python against the daemon."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator

import pytest
from daemons import Daemon
from waiting import wait_until

from labkernel.engine import Engine

docker = pytest.importorskip("docker")
IMAGE = "lab/busybox"
FOREVER = ["sh", "-c", "trap 'exit 3' TERM; echo ready; while true; do sleep 0.1; done"]


@pytest.fixture
def client(daemon: Daemon) -> Iterator[docker.DockerClient]:
    found = docker.DockerClient(base_url=daemon.address)
    yield found
    found.close()


def test_the_engine(client: docker.DockerClient) -> None:
    assert client.ping() is True
    assert client.version()["ApiVersion"] == "1.50"
    assert client.info()["OSType"] == "linux"
    assert set(client.df()) >= {"Images", "Containers", "Volumes"}


def test_run_returns_output_and_raises_for_a_status(client: docker.DockerClient) -> None:
    assert client.containers.run(IMAGE, ["echo", "hello"], remove=True) == b"hello\n"
    with pytest.raises(docker.errors.ContainerError) as caught:
        client.containers.run(IMAGE, ["sh", "-c", "echo bad >&2; exit 5"], remove=True)
    assert caught.value.exit_status == 5
    assert caught.value.stderr == b"bad\n"


def test_the_life_of_a_container(client: docker.DockerClient) -> None:
    container = client.containers.run(
        IMAGE, FOREVER, detach=True, name="sdk", environment={"A": "b"}, labels={"x": "y"}, mem_limit="64m"
    )
    assert container.status == "created"
    container.reload()
    assert container.status == "running"
    assert container.attrs["HostConfig"]["Memory"] == 64 << 20
    assert client.containers.list(filters={"label": "x=y"}) == [container]
    assert client.containers.get("sdk").id == container.id
    container.pause()
    container.unpause()
    container.rename("renamed")
    assert client.containers.get("renamed").id == container.id
    assert container.top()["Titles"][0] == "UID"
    wait_until(lambda: container.logs() == b"ready\n", "the trap")
    container.stop(timeout=30)
    assert container.wait()["StatusCode"] == 3
    container.restart()
    container.kill()
    container.remove()
    with pytest.raises(docker.errors.NotFound):
        client.containers.get("renamed")


def test_errors_are_the_sdks(client: docker.DockerClient) -> None:
    with pytest.raises(docker.errors.ImageNotFound):
        client.containers.create("no/such/image")
    client.containers.create(IMAGE, name="taken")
    with pytest.raises(docker.errors.APIError, match="already in use") as caught:
        client.containers.create(IMAGE, name="taken")
    assert caught.value.status_code == 409


def test_exec(client: docker.DockerClient) -> None:
    container = client.containers.run(IMAGE, FOREVER, detach=True)
    assert container.exec_run(["sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, b"out\nerr\n")
    assert container.exec_run(["sh", "-c", "echo out; echo err >&2"], demux=True).output == (b"out\n", b"err\n")
    assert b"".join(container.exec_run(["seq", "3"], stream=True).output) == b"1\n2\n3\n"
    made = client.api.exec_create(container.id, ["sleep", "100"])
    client.api.exec_start(made["Id"], detach=True)
    assert client.api.exec_inspect(made["Id"])["Running"] is True
    assert made["Id"] in client.api.inspect_container(container.id)["ExecIDs"]


def test_exec_over_a_socket_takes_input_and_its_end(client: docker.DockerClient) -> None:
    container = client.containers.run(IMAGE, FOREVER, detach=True)
    made = client.api.exec_create(container.id, ["cat"], stdin=True, tty=False)
    sock = client.api.exec_start(made["Id"], socket=True)
    import socket

    sock._sock.sendall(b"through")
    sock._sock.shutdown(socket.SHUT_WR)
    assert sock.read() == b"\x01\0\0\0\0\0\0\x07through"
    sock.close()
    wait_until(lambda: client.api.exec_inspect(made["Id"])["ExitCode"] == 0)


def test_logs(client: docker.DockerClient) -> None:
    container = client.containers.run(IMAGE, ["sh", "-c", "echo one; echo two >&2; sleep 0.2; echo three"], detach=True)
    assert b"".join(container.logs(stream=True, follow=True)).splitlines()[-1] == b"three"
    assert container.logs(stdout=False, stderr=True) == b"two\n"
    assert container.logs(tail=1) == b"three\n"


def test_attach_streams_what_comes(client: docker.DockerClient) -> None:
    container = client.containers.create(IMAGE, ["sh", "-c", "echo one; echo two"])
    seen: list[bytes] = []
    ready = threading.Event()

    def read() -> None:
        stream = container.attach(stream=True)
        ready.set()
        seen.extend(stream)

    reader = threading.Thread(target=read)
    reader.start()
    ready.wait(60)
    container.start()
    reader.join(60)
    assert b"".join(seen) == b"one\ntwo\n"


def test_attach_by_websocket(client: docker.DockerClient, daemon: Daemon) -> None:
    import websocket

    container = client.containers.create(IMAGE, ["cat"], stdin_open=True)
    sock = websocket.WebSocket()
    sock.connect(
        f"ws://localhost/containers/{container.id}/attach/ws?stream=1&stdin=1&stdout=1", socket=daemon.connect()
    )
    container.start()
    sock.send_binary(b"ping" * 20_000)
    seen = b""
    while len(seen) < 80_000:
        seen += sock.recv()
    assert seen == b"ping" * 20_000
    container.stop(timeout=0)
    while sock.connected:
        try:
            if not sock.recv():
                break
        except websocket.WebSocketConnectionClosedException:
            break
    sock.close()


def test_archives(client: docker.DockerClient) -> None:
    container = client.containers.create(IMAGE)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"given"))
    assert container.put_archive("/tmp", packed.getvalue())
    chunks, found = container.get_archive("/tmp/file")
    assert (found["name"], found["size"]) == ("file", 5)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
        member = tar.extractfile("file")
        assert member is not None
        assert member.read() == b"given"
    assert {"Path": "/tmp/file", "Kind": 1} in container.diff()
    assert len(b"".join(container.export())) > 1 << 20
    with pytest.raises(docker.errors.NotFound):
        container.get_archive("/no/such")


def test_stats(client: docker.DockerClient) -> None:
    container = client.containers.run(IMAGE, FOREVER, detach=True)
    reading = container.stats(stream=False)
    assert reading["memory_stats"]["usage"] > 0
    assert "networks" in reading or container.attrs["HostConfig"]["NetworkMode"] == "none"
    stream = container.stats(stream=True, decode=True)
    assert next(stream)["cpu_stats"]["cpu_usage"]["total_usage"] >= 0
    stream.close()


def test_update_prune_and_volumes(client: docker.DockerClient, engine: Engine) -> None:
    container = client.containers.run(IMAGE, FOREVER, detach=True)
    warnings = container.update(mem_limit="32m", memswap_limit="32m")["Warnings"]
    assert bool(warnings) == (engine.driver.cgroups["memory"] != "kernel"), warnings
    volume = client.volumes.create("sdk-volume", labels={"a": "b"})
    assert client.volumes.get("sdk-volume").attrs["Labels"] == {"a": "b"}
    assert volume in client.volumes.list(filters={"label": "a=b"})
    volume.remove()
    container.remove(force=True)
    stopped = client.containers.create(IMAGE)
    assert stopped.id in client.containers.prune()["ContainersDeleted"]


def test_events(client: docker.DockerClient) -> None:
    stream = client.events(decode=True, filters={"type": "container", "event": "create"})
    made = client.containers.create(IMAGE)
    assert next(stream)["id"] == made.id
    stream.close()


def test_networks_there_always_are(client: docker.DockerClient) -> None:
    assert {network.name for network in client.networks.list()} >= {"bridge", "host", "none"}
