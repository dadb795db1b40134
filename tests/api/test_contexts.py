"""Contexts, and the same commands and objects against a daemon elsewhere: our own, and a real dockerd."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
from certificates import certificates
from daemons import Cli, Daemon
from dockerd import own_docker
from ports import free_port
from sshd import Sshd, own_sshd
from waiting import wait_until

import labkernel
from labkernel import terminal
from labkernel.api import background
from labkernel.contexts import Contexts, NoSuchContext, open_engine
from labkernel.engine import Engine
from labkernel.errors import ConflictError, ContainerExit, DriverError, LabkernelError, NoSuchContainer, UsageError

pytest.importorskip("docker")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, with a configuration of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("LABKERNEL_CONTEXT", raising=False)

    def call(*words: str, code: int | None = 0) -> Done:
        capfd.readouterr()
        found = Done(terminal.run(list(words), terminal.TerminalHost()), *capfd.readouterr())
        assert code is None or found.code == code, found
        return found

    return call


class Peer(NamedTuple):
    """A real dockerd: on a unix socket, and on TCP with TLS, whose certificates lie in `keys`."""

    address: str
    tcp: str
    keys: Path

    @property
    def tls(self) -> dict[str, str]:
        return {kind: str(self.keys / name) for kind, name in CLIENT.items()}


CLIENT = {"ca": "ca.pem", "cert": "client.pem", "key": "client-key.pem"}


def server_words(keys: Path) -> list[str]:
    return [
        "--tlsverify",
        f"--tlscacert={keys}/ca.pem",
        f"--tlscert={keys}/server.pem",
        f"--tlskey={keys}/server-key.pem",
    ]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    certificates(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_engine: Engine, keys: Path) -> Iterator[Peer]:
    """A real dockerd with our busybox in it."""
    tcp = f"tcp://127.0.0.1:{free_port()}"
    with own_docker("-H", tcp, *server_words(keys)) as docker:
        image = tmp_path_factory.mktemp("peer") / "busybox.tar"
        busybox = shared_engine.images.resolve("lab/busybox", notify=lambda line: None)
        with image.open("wb") as out:
            shared_engine.images.save([busybox.id], out)
        loaded = docker.call("load", data=image.read_bytes())
        docker.call("tag", loaded.rpartition(" ")[2], "lab/busybox")
        yield Peer(f"unix://{docker.base}/d.sock", tcp, keys)


@pytest.fixture
def peer(server: Peer) -> str:
    return server.address


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_contexts_are_kept_used_and_removed(run: Run, daemon: Daemon) -> None:
    assert run("context", "show").out == "embedded\n"
    run("context", "create", "far", "--docker", f"host={daemon.address}", "--description", "ours")
    assert run("context", "ls", "-q").out.split() == ["embedded", "far"]
    assert run("context", "use", "far").out == "far\n"
    shown = [json.loads(line) for line in run("context", "ls", "--format", "json").out.splitlines()]
    assert [(each["Name"], each["Current"]) for each in shown] == [("embedded", False), ("far", True)]
    assert json.loads(run("context", "inspect").out)[0]["Endpoints"]["docker"]["Host"] == daemon.address
    assert "is in use" in run("context", "rm", "far", code=1).err
    run("context", "use", "embedded")
    run("context", "rm", "far")
    assert "No such context: far" in run("context", "use", "far", code=None).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bad/name", "--docker", "host=unix:///x"), "is invalid"),
        (("x", "--docker", "host=ftp://x"), "invalid address: ftp://x"),
        (("x",), "invalid address"),
        (("x", "--docker", "host=tcp://x:1,ca=/none"), "no such file: /none"),
        (("x", "--docker", "what=1"), "unrecognized config key: what"),
        (("embedded", "--docker", "host=unix:///x"), "already exists"),
    ],
)
def test_wrong_contexts_are_refused(run: Run, words: tuple[str, ...], said: str) -> None:
    assert said in run("context", "create", *words, code=1).err


def test_dockers_own_contexts_are_read_and_never_written(run: Run, tmp_path: Path) -> None:
    key = sha256(b"theirs").hexdigest()
    meta = tmp_path / "docker" / "contexts" / "meta" / key
    tls = tmp_path / "docker" / "contexts" / "tls" / key / "docker"
    meta.mkdir(parents=True)
    tls.mkdir(parents=True)
    (tls / "ca.pem").write_text("x")
    document = {
        "Name": "theirs",
        "Metadata": {"Description": "of docker"},
        "Endpoints": {"docker": {"Host": "tcp://h:1"}},
    }
    (meta / "meta.json").write_text(json.dumps(document))
    (meta.parent / "broken").mkdir()
    (meta.parent / "broken" / "meta.json").write_text("{")
    found = Contexts().get("theirs")
    assert (found.host, found.description, found.source) == ("tcp://h:1", "of docker", "docker")
    assert found.tls == {"ca": str(tls / "ca.pem")}
    assert "is not labkernel's" in run("context", "rm", "theirs", code=1).err
    with pytest.raises(NoSuchContext):
        Contexts().get("none")


def test_nobody_there_changes_nothing(run: Run, tmp_path: Path) -> None:
    said = run("context", "use", f"unix://{tmp_path}/none.sock", code=1).err
    assert "Cannot connect" in said or "Error while fetching server API version" in said
    assert run("context", "show").out == "embedded\n"
    with pytest.raises(LabkernelError):
        labkernel.connect(f"unix://{tmp_path}/none.sock")


# -- commands against another engine ---------------------------------------------------------------------------------


def everyday(run: Run, name: str) -> None:
    """What a student types, on whatever engine the context is."""
    done = run("run", "--rm", "lab/busybox", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (done.out, done.err) == ("out\n", "err\n")
    id = run("run", "-d", "--name", name, "-e", "A=b", "--label", "l=x", "-m", "64m", "lab/busybox", "sleep", "99")
    assert len(id.out.strip()) == 64
    listed = run("ps", "--filter", "label=l=x", "--format", "{{.Names}} {{.Image}} {{.State}}").out
    assert listed == f"{name} lab/busybox running\n"
    assert run("exec", name, "sh", "-c", "echo $A; exit 3", code=3).out == "b\n"
    assert json.loads(run("inspect", name).out)[0]["HostConfig"]["Memory"] == 64 << 20
    run("stop", "-t", "0", name)
    assert run("ps", "-q").out == ""
    run("start", name)
    run("kill", name)
    run("rm", "-f", name)
    assert "No such container: " + name in run("logs", name, code=1).err
    run("run", "--name", name, "lab/busybox", "echo", "kept")
    assert run("logs", name).out == "kept\n"
    run("rm", name)
    assert "lab/busybox" in run("images", "--format", "{{.Repository}}").out.split()
    run("tag", "lab/busybox", f"{name}:1")
    assert f"Untagged: {name}:1" in run("rmi", f"{name}:1").out
    assert "No such image" in run("rmi", "nothing-of-this-name", code=1).err
    folder = Path.cwd()
    (folder / "Dockerfile").write_text("FROM lab/busybox\nCOPY file left-ou* /x/\nRUN cat /x/file; ls /x\n")
    (folder / "file").write_text(f"of the context of {name}\n")  # which no cache knows
    (folder / "left-out").write_text("x")
    (folder / ".dockerignore").write_text("left-out\n")
    built = run("build", "--progress", "plain", "-t", f"{name}:built", "-t", f"{name}:too", ".")
    assert f"of the context of {name}" in built.err + built.out
    assert "left-out" not in built.err
    assert run("run", "--rm", f"{name}:too", "cat", "/x/file").out == f"of the context of {name}\n"
    (folder / "Dockerfile").write_text("FROM lab/busybox\nRUN exit 9\n")
    assert "9" in run("build", "-q", ".", code=None).err
    run("rmi", f"{name}:too")
    run("save", "-o", f"{name}.tar", f"{name}:built")
    run("rmi", f"{name}:built")
    assert f"Loaded image: {name}:built" in run("load", "-i", f"{name}.tar").out
    run("rmi", f"{name}:built")
    run("volume", "create", name)
    assert name in run("volume", "ls", "-q").out.split()
    run("volume", "rm", name)
    assert "host" in run("network", "ls", "--format", "{{.Name}}").out.split()
    assert "only the embedded engine has this" in run("compose", "ls", code=None).err


def test_the_same_commands_against_a_real_dockerd(run: Run, peer: str) -> None:
    run("context", "create", "peer", "--docker", f"host={peer}")
    run("context", "use", "peer")
    everyday(run, f"r{os.urandom(4).hex()}")


def test_the_same_commands_against_our_own_daemon(run: Run, daemon: Daemon) -> None:
    run("context", "use", daemon.address)
    everyday(run, f"r{os.urandom(4).hex()}")


# -- TLS and SSH -------------------------------------------------------------------------------------------------------


def streams(far: Engine) -> None:
    """What the way has to carry: much in both directions at once, and the end of one before the end of the other."""
    data = os.urandom(3 << 20)
    container = far.containers.run("lab/busybox", ["sleep", "1000"], detach=True)
    try:
        with container.open_exec(["sh", "-c", "cat; echo end >&2"], stdin=True) as attachment:
            sender = threading.Thread(target=lambda: (attachment.send(data), attachment.close_stdin()))
            sender.start()
            found = list(attachment)
            sender.join()
        assert b"".join(piece for name, piece in found if name == "stdout") == data
        assert b"".join(piece for name, piece in found if name == "stderr") == b"end\n"
        assert attachment.exit_code == 0
    finally:
        container.remove(force=True)


def test_a_real_dockerd_behind_tls(run: Run, server: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LabkernelError, match=r"(?i)certificate"):
        labkernel.connect(server.tcp, tls={"ca": server.tls["ca"]}).ping()
    with labkernel.connect(server.tcp, tls=server.tls) as far:
        streams(far)
    for kind, path in server.tls.items():
        (tmp_path / f"{kind}.pem").write_bytes(Path(path).read_bytes())
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    with labkernel.connect(server.tcp) as far:
        assert far.ping()
    monkeypatch.delenv("DOCKER_TLS_VERIFY")
    words = ",".join(f"{kind}={path}" for kind, path in server.tls.items())
    run("context", "create", "tls", "--docker", f"host={server.tcp},{words}")
    run("context", "use", "tls")
    everyday(run, f"r{os.urandom(4).hex()}")


def test_our_own_daemon_behind_tls(run: Run, engine: Engine, keys: Path, tmp_path: Path) -> None:
    variables = {"LABKERNEL_ROOT": str(engine.layout.root), "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir)}
    words = ("-H", "tcp://127.0.0.1:0", *server_words(keys))
    daemon = Daemon({**os.environ, **variables, "LABKERNEL_DRIVER": engine.driver.name}, f"{tmp_path}/s", *words)
    try:
        tcp = wait_until(lambda: [word for word in daemon.said().split() if word.startswith("tcp://")])[0]
        with pytest.raises(LabkernelError):
            labkernel.connect(tcp, tls={"ca": f"{keys}/ca.pem"}).ping()
        with labkernel.connect(tcp, tls={kind: f"{keys}/{name}" for kind, name in CLIENT.items()}) as far:
            streams(far)
    finally:
        daemon.stop()


@pytest.fixture
def sshd(engine: Engine, monkeypatch: pytest.MonkeyPatch, user_name: str) -> Iterator[Sshd]:
    """A machine behind SSH on which there is this labkernel, and nobody's docker."""
    variables = {
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "LABKERNEL_DRIVER": engine.driver.name,
        "DOCKER_HOST": "unix:///nonexistent/docker.sock",
    }
    with own_sshd(variables) as found:
        program = found.far / "labkernel"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m labkernel.cli "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", found.path)
        yield found
    with contextlib.suppress(LabkernelError):
        background.stop(engine.layout)  # dial-stdio has started one


def test_an_engine_behind_ssh(run: Run, sshd: Sshd, tmp_path: Path) -> None:
    with labkernel.connect(sshd.address) as far:
        folder = Path(far._tunnel.folder)  # type: ignore[attr-defined]
        streams(far)
    assert not folder.exists()
    # Each command is an SSH connection of its own, so not all of `everyday`.
    run("context", "create", "far", "--docker", f"host={sshd.address}")
    run("context", "use", "far")
    done = run("run", "--rm", "lab/busybox", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (done.out, done.err) == ("out\n", "err\n")
    (tmp_path / "Dockerfile").write_text("FROM lab/busybox\nCOPY file /\nRUN cat /file\n")
    (tmp_path / "file").write_text(f"of {tmp_path}\n")
    assert f"of {tmp_path}" in run("build", "--progress", "plain", str(tmp_path)).err


def test_a_real_dockerd_behind_ssh(run: Run, sshd: Sshd, server: Peer) -> None:
    program = shutil.which("docker")
    (sshd.far / "docker").write_text(f'#!/bin/sh\nDOCKER_HOST={server.address} exec {program} "$@"\n')
    (sshd.far / "docker").chmod(0o755)
    with labkernel.connect(sshd.address) as far:
        assert "labkernel" not in str(far.version()).lower()
        streams(far)


def test_dockers_client_reaches_labkernel_behind_ssh(sshd: Sshd, tmp_path: Path) -> None:
    program = shutil.which("docker")
    if program is None:
        pytest.skip("no docker client is installed (Debian: docker.io)")
    # Who has no docker over there calls labkernel by that name.
    (sshd.far / "docker").symlink_to("labkernel")
    cli = Cli(program, sshd.address, tmp_path)
    cli.environment["PATH"] = sshd.path
    data = "x" * 200_000
    assert cli.ok("run", "--rm", "-i", "lab/busybox", "cat", stdin=data) == data


def test_who_is_not_let_in_is_told_why(run: Run, sshd: Sshd) -> None:
    (sshd.base / "authorized").write_text("")
    with pytest.raises(LabkernelError, match="Permission denied"):
        labkernel.connect(sshd.address)
    for wrong in ("ssh://", "ssh://a:b@c", "ssh://-oProxyCommand=x/y", "ssh://host:port"):
        with pytest.raises(UsageError):
            labkernel.connect(wrong)


def test_python_objects_of_a_remote_engine(peer: str) -> None:
    with labkernel.connect(peer) as far:
        assert far.ping()
        assert far.containers.run("lab/busybox", ["echo", "hi"], remove=True) == b"hi\n"
        with pytest.raises(ContainerExit) as caught:
            far.containers.run("lab/busybox", ["sh", "-c", "echo why >&2; exit 4"], remove=True)
        assert (caught.value.exit_status, caught.value.stderr) == (4, "why\n")
        container = far.containers.run("lab/busybox", ["sleep", "99"], detach=True, name="object")
        try:
            assert container.status == "running"
            listed = far.containers.list()
            assert [each.name for each in listed] == ["object"]
            assert "object" in listed._repr_html_()
            assert "lab/busybox" in repr(far.images.list())
            with pytest.raises(ConflictError):
                container.remove()
        finally:
            container.remove(force=True)
        with pytest.raises(NoSuchContainer):
            far.containers.get("object")
        with pytest.raises(DriverError, match="only the embedded engine has this"):
            _ = far.vms
        with pytest.raises(UsageError):
            labkernel.connect("ftp://nowhere")


def test_a_notebook_switches_and_comes_back(run: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.testing.globalipapp import start_ipython

    shell = start_ipython() or __import__("IPython").get_ipython()
    shell.run_line_magic("load_ext", "labkernel")
    try:
        shell.run_line_magic("context", f"use {daemon.address}")
        assert os.environ["LABKERNEL_CONTEXT"] == daemon.address
        result = shell.run_line_magic("container", "run --rm lab/busybox true")
        assert result.exit_code == 0
        assert "remote" in repr(shell.user_ns["lab"]._open())
        shell.run_line_magic("context", "use embedded")
        assert "LABKERNEL_CONTEXT" not in os.environ
    finally:
        monkeypatch.delenv("LABKERNEL_CONTEXT", raising=False)
        shell.run_line_magic("unload_ext", "labkernel")


def test_an_unknown_context_in_the_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_CONTEXT", "nowhere")
    with pytest.raises(NoSuchContext):
        open_engine()
