"""A daemon in a process of its own, and clients of it: docker's own, and one that can misbehave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from waiting import DEADLINE_S, wait_until


class Daemon:
    """A `labkernel daemon` on a unix socket."""

    def __init__(self, environment: dict[str, str], path: str, *words: str, argv: list[str] | None = None) -> None:
        self.path = path
        self.address = f"unix://{path}"
        self.environment = environment
        self.words = words
        self.argv = argv or []
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [*self.argv, sys.executable, "-m", "labkernel.cli", "daemon", "-H", self.address, *self.words]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the process
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        try:
            wait_until(self._answers, "an answer of the daemon")
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.said()
        try:
            return self.request("GET", "/_ping")[0] == 200
        except OSError:
            return False

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(timeout=60)
            self.process = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE_S)
        try:
            wait_until(lambda: self._try(sock), "room for one more connection")
        except BaseException:
            sock.close()
            raise
        return sock

    def _try(self, sock: socket.socket) -> bool:
        try:
            sock.connect(self.path)
        except BlockingIOError:  # more clients at once than a listening socket holds (man 2 connect, EAGAIN)
            return False
        return True

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body) of one request; a body that is no bytes is sent as JSON."""
        import http.client

        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connect()
        try:
            sent = dict(headers or {})
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                sent.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded answer of a request that has to succeed."""
        status, _, data = self.request(method, path, body)
        assert status < 300, data
        return json.loads(data) if data else None

    def hijack(self, path: str, body: Any = None) -> tuple[socket.socket, bytes]:
        """The raw stream behind an upgrade, and what came with its headers."""
        sock = self.connect()
        data = json.dumps(body).encode() if body is not None else b""
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        switched(sock)
        return sock, b""

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def connections(self) -> int:
        """Of clients, as the kernel sees them: the sockets of the daemon's path but for the one that listens."""
        lines = Path("/proc/net/unix").read_text().splitlines()
        return sum(line.split()[-1] == str(self.path) for line in lines) - 1

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))


def switched(sock: socket.socket) -> None:
    """Read the answer that the connection is another protocol's from now on, and no byte more."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = sock.recv(1)
        assert piece, head
        head += piece
    assert head.startswith(b"HTTP/1.1 101"), head


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Docker's frames: (stream, bytes)."""
    found = []
    while data:
        length = int.from_bytes(data[4:8], "big")
        found.append((data[0], data[8 : 8 + length]))
        data = data[8 + length :]
    return found


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


class Cli:
    """The real docker client."""

    def __init__(self, program: str, address: str, home: Path) -> None:
        self.program = program
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")},
            "DOCKER_HOST": address,
            "HOME": str(home),
        }

    def run(self, *words: str, stdin: bytes | str = b"", **more: Any) -> subprocess.CompletedProcess[str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [self.program, *words], env=self.environment, input=data, capture_output=True, timeout=120, **more
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def ok(self, *words: str, **more: Any) -> str:
        """What a command that has to succeed wrote, without blanks around it."""
        done = self.run(*words, **more)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def fails(self, *words: str, code: int = 1, **more: Any) -> str:
        """What a command that has to fail with `code` wrote to stderr."""
        done = self.run(*words, **more)
        assert done.returncode == code, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr

    def popen(self, *words: str, **more: Any) -> subprocess.Popen[bytes]:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([self.program, *words], env=self.environment, **{**streams, **more})
