"""The daemon: the table on unix sockets and TCP, in the foreground until SIGTERM, or on sockets that systemd passes.

A unix socket has mode 0600: who may open it is the user whose engine it is. TCP is TLS with client certificates; plain
TCP only on the loopback interface, and only when a `-H tcp://127.0.0.1:PORT` asks for it, since every user and program
of this machine may open it. Containers belong to the supervisor: they outlive the daemon, however it ends.
Source: docker documentation, "dockerd", "Protect the Docker daemon socket"; man 3 sd_listen_fds.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import socket
import ssl
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tornado import httpserver, web

from ..errors import ConflictError, UsageError
from . import routes
from .background import recorded
from .call import Host
from .handler import MAX_BODY_BYTES, DaemonHandler

if TYPE_CHECKING:
    from ..engine import Engine

LISTEN_FDS_START = 3
HEADER_MAX_BYTES = 1 << 20
IDLE_S = 600.0
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Tls:
    """dockerd's --tlsverify, --tlscacert, --tlscert, --tlskey: PEM files. `verify`: clients show a certificate of the
    authority `ca`."""

    cert: str
    key: str
    ca: str | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Raises UsageError when a file cannot be used."""
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            found.load_cert_chain(self.cert, self.key)
            if self.ca:
                found.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as err:
            raise UsageError(f"cannot use the certificates {self.cert}, {self.key}, {self.ca or ''}: {err}") from err
        if self.verify:
            found.verify_mode = ssl.CERT_REQUIRED
        return found


@dataclass
class Listener:
    """One bound socket and how clients name it (`unix:///…`, `tcp://host:port`)."""

    sock: socket.socket
    address: str
    path: str | None = None
    inode: int = 0
    tls: bool = False


def listen(address: str, tls: Tls | None) -> Listener:
    """Bind one `-H`. Raises UsageError for an address that cannot be meant, ConflictError when it is taken."""
    if address.startswith("unix://"):
        return _listen_unix(address.removeprefix("unix://"))
    if address.startswith("tcp://"):
        return _listen_tcp(address, tls)
    raise UsageError(f"invalid address: {address}", resolution="unix:///PATH, tcp://HOST:PORT or fd://")


def _listen_unix(path: str) -> Listener:
    if not path.startswith("/"):
        raise UsageError(f"invalid address: unix://{path}", resolution="an absolute path: unix:///PATH")
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"the path of a unix socket ends at 107 bytes: {path}", resolution="choose a shorter one")
    _clear_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    except OSError as err:
        sock.close()
        raise UsageError(f"cannot listen on {path}: {err.strerror}") from err
    finally:
        os.umask(before)
    sock.listen(1024)
    sock.settimeout(0)
    return Listener(sock, f"unix://{path}", path, os.stat(path).st_ino)


def _clear_stale(path: str) -> None:
    """A socket nobody listens on is what a killed daemon left."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConflictError(f"{path} is there, and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as err:
            raise ConflictError(f"cannot listen on {path}: {err.strerror}") from err
    raise ConflictError(f"another daemon listens on {path}", resolution="stop it, or choose another -H")


def _listen_tcp(address: str, tls: Tls | None) -> Listener:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "127.0.0.1", parts.port
    except ValueError:
        raise UsageError(f"invalid address: {address}", resolution="tcp://HOST:PORT") from None
    if port is None:
        port = 2376 if tls else 2375
    if tls is None and not _is_loopback(host):
        raise UsageError(
            f"{address}: everybody who reaches this address would rule the engine",
            resolution="without --tlsverify --tlscacert --tlscert --tlskey only a loopback address is served",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as err:
        sock.close()
        raise ConflictError(f"cannot listen on {address}: {err.strerror or err}") from err
    sock.listen(1024)
    sock.settimeout(0)
    name = f"[{host}]" if ":" in host else host
    return Listener(sock, f"tcp://{name}:{sock.getsockname()[1]}", tls=tls is not None)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def inherited() -> list[Listener]:
    """Sockets passed by systemd (or who speaks its protocol); empty when none are. See man 3 sd_listen_fds."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    found = []
    for fd in range(LISTEN_FDS_START, LISTEN_FDS_START + count):
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX:
            raise UsageError("only unix sockets are taken over by socket activation")
        sock.settimeout(0)
        found.append(Listener(sock, f"unix://{os.fsdecode(sock.getsockname())}"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return found


def serve(
    engine: Engine, addresses: Sequence[str], *, tls: Tls | None = None, notify: Notify = lambda line: None
) -> None:
    """Serve in this process until SIGTERM or SIGINT; `notify` gets a line for each address once it answers.

    Raises UsageError, ConflictError. Sockets made here are removed at the end; containers go on.
    """
    routes.table()  # all handlers are there before the first client is
    listeners = inherited()
    try:
        for address in addresses:
            if address != "fd://":
                listeners.append(listen(address, tls))
        if not listeners:
            raise UsageError("no socket was passed to this process", resolution="-H unix:///PATH makes one")
        _raise_descriptor_limit()
        asyncio.run(_serve(engine, listeners, tls, notify))
    finally:
        for listener in listeners:
            _remove(listener)


def _remove(listener: Listener) -> None:
    # Only our own socket: another daemon may have taken the place of one that was deleted.
    if listener.path is not None:
        with suppress(OSError):
            if os.stat(listener.path).st_ino == listener.inode:
                os.unlink(listener.path)
    listener.sock.close()


def _raise_descriptor_limit() -> None:
    """Each stream takes three descriptors; the usual soft limit of 1024 is for programs that use select."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_server(host: Host, *, context: ssl.SSLContext | None = None, guarded: bool = False) -> httpserver.HTTPServer:
    """An HTTP server of the table; add sockets to it. `guarded`: names other than addresses are refused."""
    application = web.Application(
        [(r".*", DaemonHandler, {"host": host, "guarded": guarded})], log_function=lambda handler: None
    )
    return httpserver.HTTPServer(
        application,
        ssl_options=context,
        chunk_size=1 << 18,
        max_body_size=MAX_BODY_BYTES,
        max_buffer_size=8 << 20,
        max_header_size=HEADER_MAX_BYTES,
        idle_connection_timeout=IDLE_S,
        body_timeout=None,
    )


async def _serve(engine: Engine, listeners: Sequence[Listener], tls: Tls | None, notify: Notify) -> None:
    host = Host(lambda: engine)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    servers = []
    contexts = [tls.context() if tls is not None and each.tls else None for each in listeners]
    for listener, context in zip(listeners, contexts, strict=True):
        server = make_server(host, context=context, guarded=listener.sock.family != socket.AF_UNIX and context is None)
        server.add_sockets([listener.sock])
        servers.append(server)
        notify(f"listening on {listener.address}")
    with recorded(engine.layout, [listener.address for listener in listeners]):
        await ended.wait()
    for server in servers:
        server.stop()
    await host.close()
    for server in servers:
        await server.close_all_connections()
