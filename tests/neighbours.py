"""Containers on networks and who reaches them: for the tests in `networks/`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

from waiting import wait_until

from labkernel.engine import Engine
from labkernel.linux import netlink
from labkernel.running.container import Container

WAIT_S = 60.0
SLEEP = ["sleep", "1000"]
HTTPD = ["httpd", "-f", "-p", "80", "-h", "/etc"]


def start(engine: Engine, command: list[str], **settings: Any) -> Container:
    found: Container = engine.containers.run("busybox", command, detach=True, **settings)
    return found


def tell(container: Container, script: str) -> str:
    """What a script prints inside, with its status at the end when that is not 0."""
    code, output = container.exec_run(["sh", "-c", script])
    return f"{output.decode().strip()} [{code}]".strip() if code else str(output.decode().strip())


def hears(container: Container, script: str, words: str) -> None:
    """Wait until a script inside prints these words: a server that was started may not listen yet."""
    wait_until(lambda: tell(container, script) == words, f"{words} from `{script}`")


def fetch(address: str, port: int) -> str:
    """An HTTP answer's body, as soon as somebody answers."""

    def attempt() -> str | None:
        try:
            with socket.create_connection((address, port), timeout=WAIT_S) as sock:
                sock.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
                data = b""
                while chunk := sock.recv(65536):
                    data += chunk
        except ConnectionError:
            return None
        return data.partition(b"\r\n\r\n")[2].decode().strip() or None

    return str(wait_until(attempt, f"an answer of {address}:{port}"))


def refused(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return True
    return False


class World:
    """An outside machine: a network namespace with an interface to this one."""

    here, there = "198.51.100.1", "198.51.100.2"

    def __init__(self) -> None:
        self.process = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{self.process.pid}/ns/net") != own, "a namespace")
        self.name = f"world{os.getpid() % 100000}"
        with netlink.Socket() as sock:
            sock.send(netlink.add_veth(self.name, "eth0", self.process.pid))
            sock.send(netlink.add_address(sock.index(self.name), self.here, 24))
        code = (
            "from labkernel.linux import netlink; netlink.loopback_up(); netlink.configure([{"
            f"'name': 'eth0', 'ip': '{self.there}', 'prefix': 24, 'gateway': '{self.here}'}}])"
        )
        self.run(sys.executable, "-c", code)

    def argv(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.process.pid), "-n", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.argv(*command), capture_output=True, text=True, timeout=WAIT_S, check=False)
        return done.stdout.strip() + (f" [{done.returncode}] {done.stderr.strip()[-200:]}" if done.returncode else "")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        wait_until(lambda: self.name not in os.listdir("/sys/class/net"), "the end of the interface")


CONNECT = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2); "
ASK = CONNECT + "s.sendall(b'GET /hostname HTTP/1.0\\r\\n\\r\\n'); print(s.makefile('rb').read().split()[-1].decode())"
WHO = (
    "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('ready', flush=True)\n"
    "while True:\n c, a = s.accept(); c.sendall(a[0].encode()); c.close()"
)
