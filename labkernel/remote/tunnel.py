"""The way to a daemon behind SSH or TLS: a unix socket of this process's own, whose connections are ones over there.

The Docker SDK for Python speaks both itself, but not all of the API's streams survive it: over SSH it waits for whole
buffers, and over TLS the end of input ends the output, too. Behind a unix socket they are what they are at home.
A half-close passes in both directions. Source: docker documentation, "Use SSH to protect the Docker daemon socket";
man 1 ssh (ControlMaster); RFC 8446, 6.1, "close_notify".
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from ..errors import DriverError, UsageError

CONNECT_S = 30
CHUNK = 1 << 18
PERSIST_S = 60
# Docker's client where it has a daemon, ours otherwise; the first one fails before it reads anything.
FAR_COMMAND = "docker system dial-stdio || exec labkernel system dial-stdio"


class Tunnel(ABC):
    """A unix socket in a folder that only this user opens; `address` is what the SDK connects to."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="lk-far-")
        self.address = f"unix://{self.folder}/s"
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(f"{self.folder}/s")
        self._sock.listen(128)
        self._end = weakref.finalize(self, _finish, self._sock, self.folder, self._farewell())
        threading.Thread(target=_accept, args=(self._sock, self._carrier()), name="labkernel-far", daemon=True).start()

    @abstractmethod
    def _carrier(self) -> Any:
        """What carries an accepted connection; holds no reference to this object."""

    def _farewell(self) -> Any:
        """What else is to be done at the end."""
        return None

    def failure(self) -> str:
        """What the way itself had to say about its last failure."""
        return ""

    def close(self) -> None:
        self._end()


def _finish(sock: socket.socket, folder: str, farewell: Any) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # wakes who accepts
    sock.close()
    if farewell is not None:
        farewell()
    shutil.rmtree(folder, ignore_errors=True)


def _accept(sock: socket.socket, carry: Any) -> None:
    while True:
        try:
            near, _ = sock.accept()
        except OSError:
            return
        threading.Thread(target=_carry, args=(carry, near), name="labkernel-far", daemon=True).start()


def _carry(carry: Any, near: socket.socket) -> None:
    with near, suppress(OSError):
        carry(near)


# -- SSH ---------------------------------------------------------------------------------------------------------------


class SshTunnel(Tunnel):
    """`ssh://[user@]host[:port]`: each connection is a `docker system dial-stdio` (or ours) over there. They share one
    SSH connection, which this user's own ssh makes: its configuration, agent and known hosts count."""

    def __init__(self, address: str) -> None:
        if shutil.which("ssh") is None:
            raise DriverError("an ssh:// address needs the program ssh", resolution="install openssh-client")
        self._words = ssh_words(address)
        super().__init__()

    def _line(self, *words: str) -> list[str]:
        return ["ssh", "-o", f"ControlPath={self.folder}/c", *words, *self._words]

    def _carrier(self) -> Any:
        options = ["-T", "-o", "ControlMaster=auto", "-o", f"ControlPersist={PERSIST_S}"]
        line = [*self._line(*options, "-o", f"ConnectTimeout={CONNECT_S}"), FAR_COMMAND]
        said = f"{self.folder}/said"

        def carry(near: socket.socket) -> None:
            # It has the socket itself: nothing passes through this process.
            with open(said, "ab") as errors:
                subprocess.run(
                    line, stdin=near.fileno(), stdout=near.fileno(), stderr=errors, check=False, start_new_session=True
                )

        return carry

    def _farewell(self) -> Any:
        line = self._line("-O", "exit")
        return lambda: subprocess.run(line, capture_output=True, check=False)

    def failure(self) -> str:
        try:
            with open(f"{self.folder}/said", errors="replace") as file:
                return " ".join(file.read()[-1000:].split())
        except OSError:
            return ""


def ssh_words(address: str) -> list[str]:
    """The words of ssh for an address. Raises UsageError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = parts = None
    if parts is None or not host or parts.password is not None or parts.path.strip("/") or parts.query:
        raise UsageError(f"invalid address: {address}", resolution="ssh://USER@HOST:PORT")
    words = ["-l", parts.username] if parts.username else []
    words += ["-p", str(port)] if port else []
    # urlsplit lowers the case of a name, which may be one of the user's configuration
    start = parts.netloc.rpartition("@")[2].lower().find(host)
    return [*words, "--", parts.netloc.rpartition("@")[2][start : start + len(host)]]


# -- TLS ---------------------------------------------------------------------------------------------------------------


class TlsTunnel(Tunnel):
    """`tcp://host:port` with certificates: `ca` (whom to believe), `cert` and `key` (who we are)."""

    def __init__(self, address: str, tls: Mapping[str, str]) -> None:
        try:
            parts = urlsplit(address)
            self._host, self._port = parts.hostname or "", parts.port or 2376
        except ValueError:
            raise UsageError(f"invalid address: {address}", resolution="tcp://HOST:PORT") from None
        self._context = ssl.create_default_context(cafile=tls.get("ca"))
        try:
            if tls.get("cert") and tls.get("key"):
                self._context.load_cert_chain(tls["cert"], tls["key"])
        except (OSError, ssl.SSLError) as err:
            raise UsageError(f"cannot use the certificate {tls['cert']}: {err}") from err
        self._failures: list[str] = []
        super().__init__()

    def _carrier(self) -> Any:
        host, port, context, failures = self._host, self._port, self._context, self._failures

        def carry(near: socket.socket) -> None:
            try:
                with socket.create_connection((host, port), timeout=CONNECT_S) as far:
                    _Tls(near, far, context, host).run()
            except OSError as err:
                failures[:] = [str(err)]

        return carry

    def failure(self) -> str:
        return self._failures[-1] if self._failures else ""


class _Tls:
    """One connection: plain bytes on `near`, TLS on `far`. The standard library's sockets know no half-close; its
    objects on memory do."""

    def __init__(self, near: socket.socket, far: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._near, self._far = near, far
        self._coming, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._coming, self._going, server_hostname=host)
        self._near_open = self._far_open = True

    def run(self) -> None:
        """Until both sides have ended. Raises OSError."""
        self._shake_hands()
        self._far.settimeout(None)
        while self._near_open or self._far_open:
            watch = select.poll()
            if self._near_open:
                watch.register(self._near, select.POLLIN)
            if self._far_open:
                watch.register(self._far, select.POLLIN)
            for fd, events in watch.poll():
                if fd == self._near.fileno():
                    self._out(hung_up=not events & select.POLLIN)
                else:
                    self._in()
            if not self._far_open:
                return  # nothing is answered any more

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._take()
        self._flush()

    def _flush(self) -> None:
        if self._going.pending:
            self._far.sendall(self._going.read())

    def _take(self) -> None:
        data = self._far.recv(CHUNK)
        if data:
            self._coming.write(data)
        else:
            self._coming.write_eof()

    def _out(self, *, hung_up: bool) -> None:
        data = b"" if hung_up else self._near.recv(CHUNK)
        if data:
            self._tls.write(data)
        else:
            self._near_open = False
            with suppress(ssl.SSLError):
                self._tls.unwrap()  # close_notify: no more from us; reading goes on
        self._flush()

    def _in(self) -> None:
        self._take()
        while self._far_open:
            try:
                data = self._tls.read(CHUNK)
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                data = b""
            if data:
                self._near.sendall(data)
            else:
                self._far_open = False
                with suppress(OSError):
                    self._near.shutdown(socket.SHUT_WR)
        self._flush()


def tls_of_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The certificates of docker's variables, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH; none when they do not ask."""
    if not environ.get("DOCKER_TLS_VERIFY"):
        return {}
    folder = environ.get("DOCKER_CERT_PATH") or os.path.expanduser("~/.docker")
    return {kind: os.path.join(folder, f"{kind}.pem") for kind in ("ca", "cert", "key")}
