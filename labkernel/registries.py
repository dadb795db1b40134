"""The private registry as a service: in the foreground, in the background, as a cache of another one; its collection.

A background registry is a process of its own that outlives the notebook; what runs is recorded in the runtime directory
and believed only as long as that very process lives.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConflictError, NotFoundError, RegistryError, UsageError
from .oci import manifest as oci
from .oci import transfer
from .oci.connections import Patience
from .oci.depot import GRACE_S, Depot, Problem
from .oci.endpoints import split_host
from .oci.registry import Persistence, Refused, Registry
from .store import servers
from .store.layout import Layout

if TYPE_CHECKING:
    import ssl

    from .images import Images

START_TIMEOUT_S = 15.0
COLLECT_EVERY_S = 3600.0
SILENCE_S = 30.0
"""For so long a cache serves what it has without asking an upstream that did not answer."""
DEFAULT_LISTEN = "127.0.0.1:5000"

Notify = Callable[[str], None]


class NoSuchRegistry(NotFoundError):
    """No registry of ours runs at that address."""

    kind = "registry"
    listing = "registry ls"


@dataclass(frozen=True)
class Options:
    """How to serve. `listen` is HOST:PORT (port 0: any free one); `cache_of` a domain that missing content is from.

    Content is in `root`, by default a directory of its own below the store; with `store` it is the store's images and
    blobs themselves.
    """

    listen: str = DEFAULT_LISTEN
    root: str | None = None
    store: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None
    htpasswd: str | None = None
    read_only: bool = False
    quota_bytes: int | None = None
    cache_of: str | None = None

    def words(self) -> list[str]:
        """As the command line has them."""
        flags = {
            "--listen": self.listen,
            "--root": self.root,
            "--tls-cert": self.tls_cert,
            "--tls-key": self.tls_key,
            "--htpasswd": self.htpasswd,
            "--quota": None if self.quota_bytes is None else str(self.quota_bytes),
            "--cache-of": self.cache_of,
        }
        found = [f"{name}={value}" for name, value in flags.items() if value is not None]
        return [*found, *(["--read-only"] if self.read_only else []), *(["--store"] if self.store else [])]


class RunningRegistry:
    """A registry in the background. `address` (`127.0.0.1:5000`) is the domain of the names pushed to it."""

    def __init__(self, registries: Registries, record: dict[str, Any]) -> None:
        self._registries = registries
        self.address = str(record["address"])
        self.pid = int(record["pid"])
        self.root = str(record["root"])

    def stop(self) -> None:
        """End it; returns when it has gone. What was pushed stays on disk."""
        self._registries.stop(self.address)

    def __repr__(self) -> str:
        return f"<Registry {self.address}: process {self.pid}, {self.root}>"


class Registries:
    """The private registries of one store."""

    def __init__(self, layout: Layout, images: Callable[[], Images]) -> None:
        self.layout = layout
        self._images = images

    def depot(self, options: Options, address: str = "") -> Depot:
        """The content to serve. Raises StoreError, UsageError."""
        if not options.store:
            return Depot(self.root_of(options), quota_bytes=options.quota_bytes)
        if options.root:
            raise UsageError("--store and --root exclude each other")
        from .imaging.published import StoreDepot

        return StoreDepot(self._images(), address=address, quota_bytes=options.quota_bytes)

    def root_of(self, options: Options) -> Path:
        """The directory a registry keeps its content in: its own, below the store unless the options name one."""
        return (
            Path(os.path.abspath(os.path.expanduser(options.root))) if options.root else self.layout.root / "registry"
        )

    def serve(self, options: Options, *, notify: Notify = lambda line: None) -> None:
        """Serve in this process until SIGTERM or SIGINT. Raises UsageError, ConflictError when the address is taken."""
        sockets = _listen(options.listen)
        address = _address(options.listen, sockets[0])
        depot = self.depot(options, address)
        context = _context(options)
        asyncio.run(self._serve(depot, options, sockets, address, context, notify))

    async def _serve(
        self,
        depot: Depot,
        options: Options,
        sockets: Sequence[socket.socket],
        address: str,
        context: ssl.SSLContext | None,
        notify: Notify,
    ) -> None:
        from .oci import distribution

        service = distribution.Service(
            depot,
            read_only=options.read_only or options.cache_of is not None,
            logins=distribution.Logins(Path(options.htpasswd)) if options.htpasswd else None,
            upstream=PullThrough(options.cache_of) if options.cache_of else None,
        )
        server = distribution.make_server(service, context=context)
        server.add_sockets(sockets)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        record = self._record(address)
        record.parent.mkdir(exist_ok=True)
        facts = {
            "address": address,
            "pid": os.getpid(),
            "start": servers.start_ticks(os.getpid()),
            "root": str(depot.root),
        }
        record.write_text(json.dumps({**facts, "options": asdict(options)}))
        content = f"the images of {self.layout.root}" if options.store else f"content in {depot.root}"
        notify(f"registry on {'https' if context else 'http'}://{address}, {content}")
        try:
            while not ended.is_set():
                try:
                    await asyncio.wait_for(ended.wait(), COLLECT_EVERY_S)
                except TimeoutError:
                    await loop.run_in_executor(None, depot.collect)
        finally:
            record.unlink(missing_ok=True)
            server.stop()
            await server.close_all_connections()

    def start(self, options: Options) -> RunningRegistry:
        """Serve in the background; returns when it answers. Raises RegistryError when it does not start."""
        return servers.start(
            self.layout,
            ["registry", "serve", *options.words()],
            log="registry.log",
            find=lambda pid: next((each for each in self.list() if each.pid == pid), None),
            failure=lambda said: RegistryError(f"the registry did not start on {options.listen}", details=said),
            timeout_s=START_TIMEOUT_S,
        )

    def list(self) -> list[RunningRegistry]:
        """The registries that run."""
        directory = self.layout.runtime_dir / "registries"
        found = []
        for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if servers.start_ticks(int(record["pid"])) == record["start"]:
                found.append(RunningRegistry(self, record))
            else:
                path.unlink(missing_ok=True)
        return found

    def stop(self, address: str | None = None) -> RunningRegistry:
        """End the registry at `address` (or the only one). Raises NoSuchRegistry, ConflictError when there are more."""
        running = [each for each in self.list() if address in (None, each.address, each.address.rpartition(":")[2])]
        if not running:
            raise NoSuchRegistry(address or "none runs")
        if len(running) > 1:
            raise ConflictError(
                f"{len(running)} registries run: {', '.join(each.address for each in running)}",
                resolution="name the one to stop",
            )
        with suppress(ProcessLookupError):
            servers.end(running[0].pid)
        return running[0]

    def collect(self, options: Options, *, grace_s: float = GRACE_S) -> tuple[int, int]:
        """Remove what no manifest names any more, also beside a running server: (blobs, bytes)."""
        return self.depot(options).collect(grace_s=grace_s)

    def _record(self, address: str) -> Path:
        return self.layout.runtime_dir / "registries" / f"{address.replace(':', '-').strip('[]')}.json"


class PullThrough:
    """The upstream of a cache: what is asked for and not here is fetched once, verified and kept."""

    def __init__(self, domain: str) -> None:
        # Without mirrors: the cache itself may be one in this user's settings.
        self._registry = Registry(domain, mirrors=False)
        # Whether a tag has moved is asked with less patience: there is an answer without the upstream, too.
        patience = Patience(connect_s=3.0, stall_s=5.0, answer_s=5.0)
        self._asking = Registry(domain, mirrors=False, patience=patience, persistence=Persistence(retries=0))
        self._silent_until = 0.0

    def manifest(self, depot: Depot, name: str, reference: str) -> None:
        """See to it that the depot has what the upstream has under this tag now.

        When the upstream fails, or wants fewer requests, what is here is good enough, and for a while it is not asked
        again: a class would wait for each other's answers. A clear no is passed on.
        """
        if oci.is_digest(reference):
            try:
                depot.find_manifest(name, reference)
            except Problem:
                self._fetch(depot, name, reference)
            return
        try:
            kept = depot.find_manifest(name, reference)
        except Problem:
            self._fetch(depot, name, reference)
            return
        if time.monotonic() < self._silent_until:
            return
        try:
            digest = self._asking.find_digest(name, reference)
            if digest == kept.digest:
                return
            if digest is not None:
                depot.put_tag(name, reference, digest)
                return
        except Problem:
            pass  # new to us
        except Refused as err:
            if err.status in (401, 403, 404):
                raise
            self._silent_until = time.monotonic() + SILENCE_S
            return
        except RegistryError:
            self._silent_until = time.monotonic() + SILENCE_S
            return
        self._fetch(depot, name, reference)

    def blob(self, depot: Depot, name: str, digest: str) -> None:
        """Fetch a blob whose size a kept manifest tells; others are not asked for."""
        size = depot.size_in_manifests(name, digest)
        if size is None:
            raise Problem(404, "BLOB_UNKNOWN", "blob unknown to registry")
        upload = depot.start_upload(name)
        try:
            transfer.download(self._registry, name, digest, size, lambda piece: upload.write(bytes(piece)))
            upload.finish(digest)
        except BaseException:
            upload.cancel()
            raise

    def _fetch(self, depot: Depot, name: str, reference: str) -> None:
        found = self._registry.manifest(name, reference)
        parsed = oci.parse(found.raw, found.media_type)
        media_type = parsed.media_type or (oci.OCI_INDEX if isinstance(parsed, oci.Index) else oci.OCI_MANIFEST)
        depot.put_manifest(name, reference, found.raw, media_type, partial=True)


def _listen(text: str) -> list[socket.socket]:
    from tornado.netutil import bind_sockets

    host, port = split_host(text)
    if port is None:
        raise UsageError(f"--listen {text}: HOST:PORT is needed", resolution=f"e.g. --listen {DEFAULT_LISTEN}")
    try:
        found: list[socket.socket] = bind_sockets(port, host or "127.0.0.1")
        return found
    except OSError as err:
        raise ConflictError(
            f"cannot listen on {text}: {err.strerror}", resolution="choose another port with --listen HOST:PORT"
        ) from err


def _address(text: str, sock: socket.socket) -> str:
    return f"{text.rpartition(':')[0] or '127.0.0.1'}:{sock.getsockname()[1]}"


def _context(options: Options) -> ssl.SSLContext | None:
    if not options.tls_cert and not options.tls_key:
        return None
    if not (options.tls_cert and options.tls_key):
        raise UsageError("--tls-cert and --tls-key belong together")
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as err:
        raise UsageError(f"cannot use {options.tls_cert} and {options.tls_key}: {err}") from err
    return context
