"""docker's BuildKit client: its session, files and secrets over it, and the progress it shows."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from buildkit import upgraded
from daemons import Daemon, read_all, wait_until

from labkernel.api import protobuf
from labkernel.api.filesync import TransferError, _Receiver
from labkernel.engine import Engine
from labkernel.linux.waiting import readable

Build = Callable[..., "subprocess.CompletedProcess[bytes]"]


def client() -> str | None:
    """A docker client with BuildKit of its own (before 23); later ones need the plugin buildx."""
    for path in (shutil.which("docker"), "/usr/bin/docker"):
        if path and os.access(path, os.X_OK):
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            found = re.search(r"version (\d+)\.", said)
            if found and int(found[1]) < 23:
                return path
    return None


@pytest.fixture
def build(daemon: Daemon, tmp_path: Path) -> Build:
    program = client()
    if program is None:
        pytest.skip("no docker client with BuildKit is installed (Debian 12: docker.io)")
    environment = {
        **os.environ,
        "DOCKER_HOST": daemon.address,
        "DOCKER_BUILDKIT": "1",
        "DOCKER_CONFIG": str(tmp_path / "config"),
    }

    def run(*words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        argv = [program, "build", *words]
        return subprocess.run(argv, env=environment, input=stdin, capture_output=True, timeout=150)

    return run


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("content\n")
    (folder / "sub" / "file").chmod(0o751)
    os.utime(folder / "sub" / "file", (1_000_000_000, 1_000_000_000))
    os.link(folder / "sub" / "file", folder / "sub" / "same")
    (folder / "empty").write_text("")
    (folder / "big").write_bytes(os.urandom(3 << 20))
    os.symlink("/etc/passwd", folder / "link")
    (folder / "left-out").write_text("x")
    (folder / ".dockerignore").write_text("left-out\n")
    (folder / "Dockerfile").write_text(
        "FROM lab/busybox\nARG A\nCOPY . /all\nRUN echo built $A; stat -c '%a %Y' /all/sub/file; md5sum /all/big\n"
    )
    return folder


@pytest.fixture
def name(engine: Engine) -> Iterator[str]:
    found = f"b{os.urandom(4).hex()}"
    yield found
    for image in engine.images.list(found):
        image.remove(force=True)


def test_a_directory_becomes_an_image(build: Build, context: Path, name: str, engine: Engine, tmp_path: Path) -> None:
    words = ("--progress", "plain", "-t", name, "--build-arg", "A=7", "--label", "l=x", str(context))
    done = build(*words)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert re.search(r"#\d+ \[4/4\] RUN echo built", said)
    assert re.search(r"#\d+ [\d.]+ built 7\n", said)
    assert re.search(r"#\d+ [\d.]+ 751 1000000000\n", said)
    assert f"naming to {name}:latest done" in said
    image = engine.images.get(name)
    assert image.labels["l"] == "x"
    listed = engine.containers.run(image, ["find", "/all"], remove=True).decode().split()
    assert {"/all/link", "/all/empty", "/all/sub/same"} <= set(listed)
    assert "/all/left-out" not in listed
    assert re.search(r"#\d+ \[3/4\] COPY . /all\n(#.*\n)*#\d+ CACHED", build(*words).stderr.decode())
    quiet = build("-q", "--iidfile", str(tmp_path / "id"), *words[2:])
    assert quiet.stdout.decode().strip() == image.id == (tmp_path / "id").read_text()


def test_secrets_are_asked_of_the_client(build: Build, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"very secret {os.urandom(4).hex()}")
    dockerfile = b"FROM lab/busybox\nRUN --mount=type=secret,id=s md5sum /run/secrets/s\n"
    words = ("--progress", "plain", "--no-cache", "-")
    done = build("--secret", f"id=s,src={tmp_path / 'secret'}", *words, stdin=dockerfile)
    assert done.returncode == 0, done.stderr
    assert b"/run/secrets/s\n" in done.stderr
    required = dockerfile.replace(b"id=s", b"id=s,required=true")
    assert build(*words, stdin=required).returncode == 1


@pytest.fixture
def agent(tmp_path: Path, user_name: str) -> Iterator[str]:
    """The socket of an ssh-agent with one key, and that key's line in `tmp_path / "key.pub"`."""
    if shutil.which("ssh-agent") is None:
        pytest.skip("no openssh-client on this machine")
    with tempfile.TemporaryDirectory(prefix="lk-k-") as folder:
        key = tmp_path / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "asked", "-f", str(key)], check=True)
        process = subprocess.Popen(["ssh-agent", "-D", "-a", f"{folder}/s"], stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: os.path.exists(f"{folder}/s"))
            wait_until(lambda: subprocess.run(["ssh-add", "-q", str(key)], env=of(f"{folder}/s")).returncode == 0)
            yield f"{folder}/s"
        finally:
            process.terminate()
            process.wait()


def of(agent: str) -> dict[str, str]:
    return {**os.environ, "SSH_AUTH_SOCK": agent}


@pytest.mark.parametrize("id", ["default", "other"])
def test_a_command_asks_the_ssh_agent_of_the_client(
    build: Build, agent: str, tmp_path: Path, id: str, engine: Engine
) -> None:
    if engine.driver.name != "root":
        pytest.skip("lab/host needs the root driver")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(agent)
        sock.sendall(b"\0\0\0\1\x0b")  # which keys there are
        said = sock.recv(65536)
    public = base64.b64decode((tmp_path / "key.pub").read_text().split()[1])
    assert public in said
    words = ("--progress", "plain", "--no-cache", "--ssh", f"{id}={agent}", "-")
    done = build(*words, stdin=asking(id))
    assert done.returncode == 0, done.stderr
    assert f"{md5(said)}".encode() in done.stderr
    refused = build("--progress", "plain", "--no-cache", "-", stdin=asking(f"{id},required=true"))
    assert refused.returncode == 1
    assert f"unset ssh forward key {id}".encode() in refused.stderr


def asking(id: str) -> bytes:
    """A Dockerfile whose command asks its agent for its keys and prints what the answer sums up to."""
    script = (
        "import socket,os,hashlib;s=socket.socket(socket.AF_UNIX);s.connect(os.environ['SSH_AUTH_SOCK']);"
        "s.sendall(bytes([0,0,0,1,11]));print(hashlib.md5(s.recv(65536)).hexdigest())"
    )
    return f'FROM lab/host\nRUN --mount=type=ssh,id={id} python3 -c "{script}"\n'.encode()


def test_a_tar_of_stdin_is_a_second_request(build: Build, name: str, engine: Engine) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in (("Dockerfile", b"FROM lab/busybox\nCOPY x /x\n"), ("x", b"of the tar")):
            member = tarfile.TarInfo(path)
            member.size, member.mtime = len(data), 1_700_000_000
            tar.addfile(member, io.BytesIO(data))
    done = build("-t", name, "--build-arg", "SOURCE_DATE_EPOCH=context", "-", stdin=buffer.getvalue())
    assert done.returncode == 0, done.stderr
    assert engine.images.get(name).raw_config["created"].startswith("2023-11-14T22:13:20"), "of its newest member"
    assert engine.containers.run(name, ["cat", "/x"], remove=True) == b"of the tar"


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def served(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    return tmp_path / "served"


@pytest.fixture
def served_by_git(served: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = ["git", "daemon", f"--base-path={served}", "--export-all", "--listen=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(line, start_new_session=True) as process:  # it has a child of its own
        try:
            wait_until(lambda: listens(port), "git's server")
            yield f"git://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_contexts_that_are_elsewhere(
    build: Build, name: str, engine: Engine, tmp_path: Path, served: Path, served_by_git: str
) -> None:
    """A Dockerfile, an archive and a repository behind URLs."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (served / "plain").write_bytes(b"FROM lab/busybox\nLABEL where=plain\n")
    (tree / "Dockerfile").write_text("FROM lab/busybox\nCOPY x /x\n")
    (tree / "x").write_text("fetched")
    with tarfile.open(served / "context.tar.gz", "w:gz") as tar:
        tar.add(tree, ".")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(tree)]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(tree), str(served / "r.git")], check=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{httpd.server_port}"
        try:
            for place in (f"{base}/context.tar.gz", f"{base}/plain", f"{served_by_git}/r.git#main"):
                done = build("--progress", "plain", "-t", name, place)
                assert done.returncode == 0, done.stderr
                if place.endswith("plain"):
                    assert engine.images.get(name).labels == {"where": "plain"}
                else:
                    assert engine.containers.run(name, ["cat", "/x"], remove=True) == b"fetched"
            assert b"404" in build(f"{base}/none").stderr
        finally:
            httpd.shutdown()


def test_what_fails_is_said(build: Build, context: Path) -> None:
    done = build("--progress", "plain", "-", stdin=b"FROM lab/busybox\nRUN echo before; exit 9\n")
    assert done.returncode == 1
    assert b"did not complete successfully: exit code: 9" in done.stderr
    done = build("--progress", "plain", "-f", "-", str(context), stdin=b"FROM lab/busybox\nCOPY none /\n")
    assert done.returncode == 1
    assert b"stat none: file does not exist" in done.stderr
    assert b"unknown instruction: NOPE" in build("-", stdin=b"NOPE\n").stderr
    assert b"the output oci is not available" in build("-o", "type=oci", str(context)).stderr
    with io.BytesIO() as packed:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(context, ".")
        assert b"the output oci is not available" in build("-o", "type=oci", "-", stdin=packed.getvalue()).stderr


def test_a_build_is_refused_only_once_its_client_serves(daemon: Daemon) -> None:
    # docker's client waits for ever for a session that was refused before it began to serve it
    id = os.urandom(8).hex()
    session = upgraded(daemon, "/session", {"X-Docker-Expose-Session-Uuid": id})
    asked = daemon.connect()
    outputs = "%5B%7B%22Type%22%3A%22oci%22%7D%5D"
    asked.sendall(
        f"POST /build?version=2&session={id}&outputs={outputs} HTTP/1.1\r\nHost: x\r\n"
        "Connection: close\r\nContent-Length: 0\r\n\r\n".encode()
    )
    with session, asked:
        assert not readable(asked.fileno(), timeout_s=0.3)
        session.sendall(b"\0\0\0\x04\0\0\0\0\0")  # RFC 9113, 6.5: SETTINGS without any
        assert b"the output oci is not available" in read_all(asked)


RESULT = b"""FROM lab/busybox AS work
RUN mkdir -p /d/sub /d/empty && head -c 300000 /dev/urandom > /d/big && echo one > /d/sub/one && touch /d/none &&\\
    chmod 4751 /d/sub/one && ln /d/sub/one /d/zwei && ln -s sub/one /d/link && mknod /d/pipe p &&\\
    chmod 1770 /d/empty && touch -d @1000000000 /d/sub/one && md5sum < /d/big > /d/sum
FROM scratch
COPY --from=work /d /
"""


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_a_result_goes_to_a_directory_of_the_client(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = build("--progress", "plain", "-o", str(out), "-", stdin=RESULT)
    assert done.returncode == 0, done.stderr
    assert re.search(rb"#\d+ exporting to client\n", done.stderr)
    assert b"writing image" not in done.stderr
    assert sorted(os.listdir(out)) == ["big", "empty", "link", "none", "pipe", "sub", "sum", "zwei"]
    assert (out / "sum").read_text().split()[0] == md5((out / "big").read_bytes())
    one = (out / "sub" / "one").stat()
    mode = 0o4751 if os.geteuid() == 0 else 0o751  # docker's client writes last: man 2 write, set-user-ID
    assert (stat.S_IMODE(one.st_mode), one.st_mtime, (out / "zwei").read_text()) == (mode, 1_000_000_000, "one\n")
    assert one.st_ino == (out / "zwei").stat().st_ino, "one file with two names"
    assert os.readlink(out / "link") == "sub/one"
    assert stat.S_IMODE((out / "empty").stat().st_mode) == 0o1770
    assert (out / "none").read_bytes() == b""
    assert stat.S_ISFIFO((out / "pipe").stat().st_mode)


def test_a_result_goes_to_a_tar_of_the_client(build: Build, tmp_path: Path) -> None:
    done = build("-o", "-", "-", stdin=RESULT)
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        big, sums = tar.extractfile("big"), tar.extractfile("sum")
        assert big is not None
        assert sums is not None
        assert sums.read().decode().split()[0] == md5(big.read())
    quiet = build("-q", "-o", f"type=tar,dest={tmp_path / 'tar'}", "-", stdin=RESULT)
    assert (quiet.returncode, quiet.stdout) == (0, b""), quiet.stderr
    assert (tmp_path / "tar").read_bytes() == done.stdout


# -- the wire ----------------------------------------------------------------------------------------------------------


def test_messages_go_there_and_back() -> None:
    written = protobuf.encode([(1, 300), (2, "text"), (3, [(1, 1), (2, [])]), (4, 0), (5, -1), (16, b"\0\xff")])
    read = protobuf.decode(written)
    assert protobuf.number(read, 1) == 300
    assert protobuf.text(read, 2) == "text"
    assert protobuf.decode(protobuf.data(read, 3)) == {1: [1], 2: [b""]}
    assert 4 not in read
    assert protobuf.number(read, 5) == (1 << 64) - 1
    assert protobuf.data(read, 16) == b"\0\xff"


@pytest.mark.parametrize("data", [b"\x08", b"\x0a\x05abc", b"\x08" + b"\xff" * 11, b"\x0b", b"\x0f"])
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(protobuf.BadMessage):
        protobuf.decode(data)


class Scripted:
    """A client that sends what a test wants."""

    def __init__(self, *packets: list[tuple[int, Any]]) -> None:
        self.packets = [protobuf.encode(packet) for packet in packets]
        self.sent: list[bytes] = []

    def receive(self) -> bytes | None:
        return self.packets.pop(0) if self.packets else None

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def close(self) -> None: ...


def entry(path: str, mode: int = 0o644, link: str = "") -> list[tuple[int, Any]]:
    return [(2, [(1, path), (2, mode), (7, link)])]


DIRECTORY, SYMLINK, END, FIN = 1 << 31 | 0o755, 1 << 27 | 0o777, [], [(1, 3)]


@pytest.mark.parametrize(
    "packets",
    [
        [entry("../out")],
        [entry("/abs")],
        [entry("a/./b")],
        [entry("a//b")],
        [entry("no/parent")],
        [entry("d", SYMLINK, "/tmp"), entry("d/x")],
        [entry("d", DIRECTORY), entry("d", SYMLINK, "/tmp")],
        [entry("x\0y")],
        [entry("")],
        [entry("h", 0o644, "../../etc/passwd"), END, FIN],
        [entry("l", SYMLINK, "/etc/passwd"), entry("h", 0o644, "l"), END, FIN],
        [[(1, 2), (3, 7), (4, b"data of nothing")]],
        [[(1, 4), (4, b"gave up")]],
        [entry("a")],
    ],
    ids=range(14),
)
def test_a_client_that_cheats_writes_nothing_outside(packets: list[Any], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(TransferError):
        _Receiver(Scripted(*packets), target).work()  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
