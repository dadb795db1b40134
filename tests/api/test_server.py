"""The daemon's sockets: who may open them, TLS, socket activation, the background, a plain user's engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import certificates
from conftest import PlainUser
from daemons import Cli, Daemon
from IPython.core.interactiveshell import InteractiveShell
from waiting import wait_until

from labkernel.api import background, server
from labkernel.api.detach import DetachKeys
from labkernel.engine import Engine
from labkernel.errors import ConflictError, UsageError
from labkernel.store.layout import Layout


@pytest.fixture
def place() -> Iterator[Path]:
    """A short directory: the paths of unix sockets end at 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="lk-p-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environment_of(engine: Engine) -> dict[str, str]:
    return {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "LABKERNEL_DRIVER": engine.driver.name,
    }


def test_the_socket_is_its_users_alone(daemon: Daemon) -> None:
    assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600


def test_an_address_in_use_is_left_alone_and_a_stale_one_taken(daemon: Daemon, place: Path) -> None:
    with pytest.raises(ConflictError, match="another daemon listens"):
        server.listen(daemon.address, None)
    (place / "file").write_text("mine")
    with pytest.raises(ConflictError, match="is no socket"):
        server.listen(f"unix://{place}/file", None)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{place}/stale")
    server.listen(f"unix://{place}/stale", None).sock.close()


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:0", "tcp://192.0.2.1:1", "http://x", "unix://relative", f"unix:///{'x' * 200}"]
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(UsageError):
        server.listen(address, None)


def test_plain_tcp_is_for_this_machine_and_for_no_web_page(engine: Engine, place: Path) -> None:
    daemon = Daemon(environment_of(engine), f"{place}/s", "-H", "tcp://127.0.0.1:0")
    try:
        words = wait_until(lambda: [line for line in daemon.said().split() if line.startswith("tcp://")])
        port = int(words[0].rpartition(":")[2])

        def ask(*headers: str) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
                sock.sendall("\r\n".join(["GET /_ping HTTP/1.1", *headers, "Connection: close", "", ""]).encode())
                return sock.recv(65536)

        assert ask(f"Host: 127.0.0.1:{port}").startswith(b"HTTP/1.1 200")
        assert ask(f"Host: localhost:{port}").startswith(b"HTTP/1.1 200")
        assert ask(f"Host: rebound.example:{port}").startswith(b"HTTP/1.1 403")
        assert ask(f"Host: localhost:{port}", "Origin: http://localhost:8888").startswith(b"HTTP/1.1 403")
    finally:
        daemon.stop()


def ask_as_a_stranger(port: int, context: ssl.SSLContext) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as stranger,
    ):
        stranger.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
        if not stranger.recv(100):
            raise ConnectionError


def test_tls_asks_for_the_clients_certificate(engine: Engine, place: Path, tmp_path: Path) -> None:
    certificates(place)
    words = ("--tlsverify", f"--tlscacert={place}/ca.pem", f"--tlscert={place}/server.pem")
    daemon = Daemon(
        environment_of(engine), f"{place}/s", "-H", "tcp://127.0.0.1:0", *words, f"--tlskey={place}/server-key.pem"
    )
    try:
        found = wait_until(lambda: [line for line in daemon.said().split() if line.startswith("tcp://")])
        port = int(found[0].rpartition(":")[2])
        context = ssl.create_default_context(cafile=place / "ca.pem")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask_as_a_stranger(port, context)
        program = shutil.which("docker")
        if program is None:
            return
        cli = Cli(program, found[0], tmp_path)
        flags = ("--tlsverify", f"--tlscacert={place}/ca.pem", f"--tlscert={place}/client.pem")
        flags = (*flags, f"--tlskey={place}/client-key.pem")
        data = "x" * 200_000
        assert cli.ok(*flags, "run", "--rm", "-i", "lab/busybox", "cat", stdin=data) == data
    finally:
        daemon.stop()


ACTIVATE = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, "-m", "labkernel.cli", "daemon", "-H", "fd://"])
"""


def test_socket_activation(engine: Engine, place: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ACTIVATE, f"{place}/s"], env=environment_of(engine))
    try:
        wait_until((place / "s").exists)
        daemon = Daemon.__new__(Daemon)
        daemon.path, daemon.process = f"{place}/s", process
        assert daemon.request("GET", "/_ping")[2] == b"OK"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert (place / "s").exists(), "the socket is systemd's"


def test_socket_activation_by_systemds_own_program(engine: Engine, place: Path) -> None:
    program = shutil.which("systemd-socket-activate")
    if program is None:
        pytest.skip("no systemd-socket-activate on this machine")
    environment = environment_of(engine)
    passed = [
        word
        for name in ("LABKERNEL_ROOT", "LABKERNEL_RUNTIME_DIR", "LABKERNEL_DRIVER", "PATH")
        for word in ("-E", name)
    ]
    line = [program, "-l", f"{place}/s", *passed, sys.executable, "-m", "labkernel.cli", "daemon", "-H", "fd://"]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until((place / "s").exists)
        daemon = Daemon.__new__(Daemon)
        daemon.path, daemon.process = f"{place}/s", process
        assert daemon.request("GET", "/_ping")[2] == b"OK"  # the first client starts it, in the same process
        assert daemon.json("GET", "/info")["Driver"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_units_are_what_systemd_takes(engine: Engine, place: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd on this machine")
    awkward = Layout(tmp_path / 'a b "c" 50% $x', tmp_path / "run")
    for number, layout in enumerate((engine.layout, awkward)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for kind in ("service", "socket"):
            (folder / f"labkernel.{kind}").write_text(background.unit(kind, layout))
        done = subprocess.run(
            [program, "verify", str(folder / "labkernel.socket"), str(folder / "labkernel.service")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        ours = [line for line in done.stderr.splitlines() if "labkernel" in line]
        assert (done.returncode, ours) == (0, []), done.stderr
    assert "LABKERNEL_ROOT=" in background.unit("service", awkward)
    assert '50%% $x"' in background.unit("service", awkward)


def test_units_name_this_python_and_this_store(engine: Engine) -> None:
    unit = background.unit("service", engine.layout)
    assert f"ExecStart={sys.executable} -m labkernel.cli daemon -H fd://" in unit
    assert f"LABKERNEL_ROOT={engine.layout.root}" in unit
    path = background.default_address(engine.layout).removeprefix("unix://")
    assert f"ListenStream={path}" in background.unit("socket", engine.layout)


def test_magic_starts_and_stops_a_daemon_and_sets_docker_host(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(engine).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    shell = InteractiveShell.instance()
    shell.extension_manager.load_extension("labkernel")
    try:
        running = shell.run_line_magic("daemon", "start")
        assert os.environ["DOCKER_HOST"] == running.address == background.default_address(engine.layout)
        assert shell.run_line_magic("daemon", "start").pid == running.pid, "one is enough"
        assert shell.run_line_magic("daemon", "status") == running
        docker = pytest.importorskip("docker")
        client = docker.from_env()
        assert client.containers.run("lab/busybox", ["echo", "from the SDK"], remove=True) == b"from the SDK\n"
        client.close()
        shell.run_line_magic("daemon", "stop")
        assert "DOCKER_HOST" not in os.environ
        assert background.find(engine.layout) is None
    finally:
        if background.find(engine.layout) is not None:
            background.stop(engine.layout)
        shell.extension_manager.unload_extension("labkernel")


def build_as(user: PlainUser, daemon: Daemon, folder: Path) -> None:
    """An image `built`, by BuildKit's client where there is one."""
    compose = Path(sys.prefix) / "peers" / "docker-compose"
    text = "FROM lab/busybox\nRUN echo over the control protocol > /made\n"
    if not os.access(compose, os.X_OK):
        Cli(shutil.which("docker") or "", daemon.address, folder).run("build", "-t", "built", "-", stdin=text)
        return
    service = {"image": "built", "build": {"context": ".", "dockerfile_inline": text}}
    (folder / "compose.yaml").write_text(json.dumps({"name": "plain", "services": {"web": service}}))
    environment = {**os.environ, "DOCKER_HOST": daemon.address, "DOCKER_CONFIG": str(folder / "config")}
    done = subprocess.run([compose, "build"], cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("driver", ["rootless", "proot"])
def test_a_plain_users_engine(plain_user: PlainUser, tmp_path: Path, driver: str) -> None:
    """A smaller set with the drivers that users without root get, in a pod the second."""
    plain_user.env["LABKERNEL_DRIVER"] = driver
    program = shutil.which("docker")
    if program is None:
        pytest.skip("no docker client is installed (Debian: docker.io)")
    prepared = plain_user.labkernel("run", "--rm", "lab/busybox", "true")
    if prepared.returncode != 0:
        pytest.skip(f"no driver {driver} for a plain user here: {prepared.stderr.strip()[-200:]}")
    daemon = Daemon(plain_user.env, f"{plain_user.home}/d.sock", argv=plain_user.argv())
    try:
        cli = Cli(program, daemon.address, tmp_path)
        assert "rootless" in cli.ok("info", "--format", "{{json .SecurityOptions}}")
        done = cli.run("run", "--rm", "-i", "lab/busybox", "sh", "-c", "cat; exit 3", stdin="through")
        assert (done.returncode, done.stdout) == (3, "through")
        cli.ok("run", "-d", "--name", "plain", "lab/busybox", "sleep", "300")
        assert cli.ok("exec", "plain", "echo", "inside") == "inside"
        if driver == "rootless":  # under PRoot nothing can be mounted, and copies need that
            (tmp_path / "file").write_text("copied")
            cli.ok("cp", str(tmp_path / "file"), "plain:/tmp/file")
            assert cli.ok("exec", "plain", "cat", "/tmp/file") == "copied"
            build_as(plain_user, daemon, tmp_path)
            assert cli.ok("run", "--rm", "built", "cat", "/made") == "over the control protocol"
            assert cli.ok("rmi", "built").startswith("Untagged: built:latest")
        assert cli.ok("ps", "--format", "{{.Names}}") == "plain"
        assert cli.ok("stop", "-t", "0", "plain") == "plain"
        assert cli.ok("rm", "plain") == "plain"
    finally:
        daemon.stop()


def test_detach_keys() -> None:
    keys = DetachKeys("")
    assert keys.feed(b"abc\x10") == (b"abc", False)
    assert keys.feed(b"d") == (b"\x10d", False)
    assert keys.feed(b"e\x10\x11rest") == (b"e", True)
    assert DetachKeys("a,ctrl-c").feed(b"xa\x03") == (b"x", True)
    for wrong in ("ctrl-", "long", "ctrl-é", ","):
        with pytest.raises(UsageError):
            DetachKeys(wrong)
