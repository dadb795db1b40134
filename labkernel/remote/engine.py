"""A Docker, Podman or labkernel daemon elsewhere, with the embedded engine's face: the same commands and displays.

The Docker SDK for Python talks to it (`pip install labkernel[remote]`); here its objects get what our commands need
beyond it. What only an embedded engine has (virtual machines, layers, compose, figures of the kernel) is refused by
name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..contexts import Context, is_address
from ..display import command_words, human_age, status_words
from ..errors import ContainerExit, DriverError, LabkernelError, UsageError
from ..running.container import ContainerList
from ..runtime.netsettings import ports as parse_ports
from .builds import RemoteBuilds
from .objects import (
    RemoteError,
    RemoteImages,
    RemoteNetwork,
    RemoteObject,
    RemotePulls,
    RemotePushes,
    only_at_home,
    seconds,
    translated,
)
from .tunnel import SshTunnel, TlsTunnel, Tunnel, tls_of_environment

Notify = Callable[[str], None]
HEADERS_S = 10.0


def connect(target: str | Context, *, tls: Mapping[str, str] | None = None) -> RemoteEngine:
    """A remote engine by address (`unix://…`, `tcp://…`, `ssh://…`) or context. `tls` are files: `ca`, `cert`, `key`;
    for a tcp:// address docker's variables name them, too. Raises RemoteError, DriverError, UsageError."""
    context = target if isinstance(target, Context) else Context(target, target, source="address")
    if not is_address(context.host):
        raise UsageError(f"invalid address: {context.host}")
    try:
        import docker
    except ImportError:
        raise DriverError(
            "a remote engine needs the Docker SDK for Python", resolution="pip install 'labkernel[remote]'"
        ) from None
    tunnel = _tunnel(context, dict(tls or context.tls))
    try:
        with translated():
            client = docker.DockerClient(base_url=tunnel.address if tunnel is not None else context.host)
            client.ping()
    except LabkernelError as err:
        if tunnel is not None:
            said = tunnel.failure()
            tunnel.close()
            if said:
                raise RemoteError(f"Cannot connect to {context.host}: {said}", resolution=err.resolution) from None
        raise
    return RemoteEngine(client, context, tunnel)


def _tunnel(context: Context, tls: dict[str, str]) -> Tunnel | None:
    """What leads to a daemon that is not reached by a plain socket."""
    if context.host.startswith("ssh://"):
        return SshTunnel(context.host)
    if context.host.startswith(("tcp://", "https://")):
        found = tls or (tls_of_environment() if context.source == "address" else {})
        if found or context.host.startswith("https://"):
            return TlsTunnel(context.host, found)
    return None


class RemoteEngine:
    """What `labkernel.connect("tcp://…")` gives. `client` is the Docker SDK's own client."""

    id_title = "CONTAINER ID"

    def __init__(self, client: Any, context: Context, tunnel: Tunnel | None = None) -> None:
        self.client = client
        self._tunnel = tunnel
        self.context = context
        self.containers = RemoteContainers(self)
        self.images = RemoteImages(self)
        self.volumes = RemoteCollection(self, client.volumes, "volume")
        self.networks = RemoteCollection(self, client.networks, "network")
        self.pulls = RemotePulls(self)
        self.pushes = RemotePushes(self)
        self.runtime = RemoteRuntime(self)
        self.builds = RemoteBuilds(self)

    def ping(self) -> bool:
        with translated():
            return bool(self.client.ping())

    def version(self) -> dict[str, Any]:
        with translated():
            found: dict[str, Any] = self.client.version()
        return found

    def info(self) -> dict[str, Any]:
        with translated():
            found: dict[str, Any] = self.client.info()
        return found

    def events(self, **options: Any) -> Any:
        return self.client.events(**{"decode": True, **options})

    def close(self) -> None:
        self.client.close()
        if self._tunnel is not None:
            self._tunnel.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        raise only_at_home(name, self)

    def __repr__(self) -> str:
        return f"<labkernel remote Engine: {self.context.host}>"


class RemoteAttachment:
    """The live connection to a container or an exec: iterable of (stream, bytes), takes input."""

    def __init__(self, socket: Any, *, tty: bool, ended: Callable[[], int], resize: Callable[[int, int], None]) -> None:
        self._socket = socket
        self._tty = tty
        self._ended = ended
        self._resize = resize
        self.exit_code: int | None = None
        self.pid = None
        self.oom_killed = False
        self.warnings: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        from docker.utils.socket import frames_iter

        for number, data in frames_iter(self._socket, self._tty):
            yield ("stderr" if number == 2 else "stdout"), data
        self.exit_code = self._ended()

    def _raw(self) -> Any:
        return getattr(self._socket, "_sock", self._socket)

    def send(self, data: bytes) -> None:
        self._raw().sendall(data)

    def close_stdin(self) -> None:
        import socket

        with contextlib.suppress(OSError):
            self._raw().shutdown(socket.SHUT_WR)

    def resize(self, rows: int, cols: int) -> None:
        with contextlib.suppress(LabkernelError):
            self._resize(rows, cols)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def __enter__(self) -> RemoteAttachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RemoteContainer(RemoteObject):
    """A container elsewhere."""

    warnings: list[str] = []

    @property
    def short_id(self) -> str:
        return self.id[:12]

    @property
    def image_ref(self) -> str:
        return str((self.attrs.get("Config") or {}).get("Image") or "")

    @property
    def created_at(self) -> str:
        return str(self.attrs.get("Created") or "")

    @property
    def summary(self) -> dict[str, Any]:
        return self.attrs

    @property
    def status(self) -> str:
        with translated(self._kind, self.name):
            self._inner.reload()
        return str(self._inner.status)

    @property
    def settings(self) -> dict[str, Any]:
        config, host = self.attrs.get("Config") or {}, self.attrs.get("HostConfig") or {}
        return {"tty": config.get("Tty"), "stdin_open": config.get("OpenStdin"), "auto_remove": host.get("AutoRemove")}

    def runtime_state(self) -> dict[str, Any]:
        """Its state in the words of ours (contract: state.json)."""
        state = self.attrs.get("State") or {}
        found = {"status": state.get("Status", "created"), "exit_code": state.get("ExitCode", 0)}
        found |= {"started_at": seconds(state.get("StartedAt")), "finished_at": seconds(state.get("FinishedAt"))}
        return {**found, **({"health": state["Health"]} if state.get("Health") else {})}

    def row(self) -> tuple[str, str, str, str, str, str]:
        words = [str(self.attrs.get("Path") or ""), *(self.attrs.get("Args") or ())]
        age = human_age(seconds(self.attrs.get("Created")))
        return (self.short_id, self.image_ref, command_words(words), age, status_words(self.runtime_state()), self.name)

    def kill(self, signal: str | int | None = None) -> None:
        with translated(self._kind, self.name):
            self._inner.kill(signal=signal if signal is not None else "KILL")

    def stop(self, *, timeout: float | None = None, signal: str | None = None) -> None:
        params = {key: value for key, value in (("t", timeout), ("signal", signal)) if value is not None}
        api = self._engine.client.api
        with translated(self._kind, self.name):
            url = api._url("/containers/{0}/stop", self.id)
            api._raise_for_status(api._post(url, params=params, timeout=(api.timeout or 60) + (timeout or 10)))

    def log_records(self, *, follow: bool = False, **options: Any) -> Iterator[tuple[str, bytes]]:
        """(stream, bytes), as the daemon keeps the streams apart."""
        api = self._engine.client.api
        wanted = {"stdout": options.pop("stdout", True), "stderr": options.pop("stderr", True)}
        params = {key: value for key, value in options.items() if value is not None}
        with translated(self._kind, self.name):
            response = api._get(
                api._url("/containers/{0}/logs", self.id),
                params={**{k: int(v) for k, v in wanted.items()}, "follow": int(follow), **_log_params(params)},
                timeout=None,
                stream=True,
            )
            api._raise_for_status(response)
            yield from _demultiplexed(response, tty=bool(self.settings["tty"]))

    def open_attachment(
        self, *, stdin: bool = False, stdout: bool = True, stderr: bool = True, logs: bool = False
    ) -> RemoteAttachment:
        api = self._engine.client.api
        params = {"stdin": int(stdin), "stdout": int(stdout), "stderr": int(stderr), "stream": 1, "logs": int(logs)}
        with translated(self._kind, self.name):
            socket = api.attach_socket(self.id, params)
        return RemoteAttachment(socket, tty=bool(self.settings["tty"]), ended=self._exit_code, resize=self.resize)

    def _exit_code(self) -> int:
        with translated(self._kind, self.name):
            return int(self._inner.wait()["StatusCode"])

    def resize(self, height: int, width: int) -> None:
        with translated(self._kind, self.name):
            self._inner.resize(height, width)

    def open_exec(
        self,
        cmd: Sequence[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        privileged: bool = False,
        user: str = "",
        detach: bool = False,
        environment: Any = None,
        workdir: str | None = None,
        console_size: Sequence[int] | None = None,
        tied: bool = False,
    ) -> RemoteAttachment:
        api = self._engine.client.api
        with translated(self._kind, self.name):
            made = api.exec_create(
                self.id, list(cmd), stdin=stdin, tty=tty, privileged=privileged, user=user, environment=environment,
                workdir=workdir,
            )  # fmt: skip
            started = api.exec_start(made["Id"], detach=detach, tty=tty, socket=not detach)
            if console_size and tty and not detach:
                api.exec_resize(made["Id"], console_size[0], console_size[1])
        import io

        return RemoteAttachment(
            io.BytesIO() if detach else started,
            tty=tty,
            ended=lambda: int(api.exec_inspect(made["Id"])["ExitCode"] or 0),
            resize=lambda rows, cols: api.exec_resize(made["Id"], rows, cols),
        )


def _log_params(given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    if "timestamps" in found:
        found["timestamps"] = int(bool(found["timestamps"]))
    return found


def _demultiplexed(response: Any, *, tty: bool) -> Iterator[tuple[str, bytes]]:
    """Docker's frames: 8 bytes of header, byte 0 the stream, a big-endian length at 4."""
    if tty:
        for chunk in response.iter_content(None):
            yield "stdout", chunk
        return
    buffer = bytearray()
    for chunk in response.iter_content(None):
        buffer += chunk
        while len(buffer) >= 8 and len(buffer) >= 8 + (length := int.from_bytes(buffer[4:8], "big")):
            yield ("stderr" if buffer[0] == 2 else "stdout"), bytes(buffer[8 : 8 + length])
            del buffer[: 8 + length]


class RemoteCollection:
    """Volumes and networks elsewhere."""

    def __init__(self, engine: RemoteEngine, inner: Any, kind: str) -> None:
        self._engine = engine
        self._inner = inner
        self._kind = kind
        self._class = RemoteNetwork if kind == "network" else RemoteObject

    def get(self, name: str) -> RemoteObject:
        with translated(self._kind, name):
            return self._class(self._engine, self._inner.get(name), self._kind)

    def list(self, **options: Any) -> Sequence[RemoteObject]:
        with translated():
            return [self._class(self._engine, each, self._kind) for each in self._inner.list(**options)]

    def create(self, name: str | None = None, **options: Any) -> RemoteObject:
        with translated():
            return self._class(self._engine, self._inner.create(name, **options), self._kind)

    def remove(self, name: str, *, force: bool = False) -> None:
        found = self.get(name)
        with translated(self._kind, name):
            found._inner.remove(**({"force": True} if force and self._kind == "volume" else {}))

    def prune(self, filters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with translated():
            found: dict[str, Any] = self._inner.prune(filters=filters)
        return found


class RemoteContainers:
    """Containers elsewhere; names and arguments are the Docker SDK's, as at home."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._inner = engine.client.containers

    def _container(self, inner: Any) -> RemoteContainer:
        return RemoteContainer(self._engine, inner, "container")

    def get(self, name: str) -> RemoteContainer:
        with translated("container", name):
            return self._container(self._inner.get(name))

    def list(self, *, all: bool = False, filters: Any = None, limit: int | None = None, **more: Any) -> Any:
        with translated():
            found = self._inner.list(all=all, filters=filters, limit=limit or -1, ignore_removed=True, **more)
        return ContainerList(self._container(each) for each in found)  # type: ignore[misc]

    def create(
        self, image: Any, command: Any = None, *, notify: Notify | None = None, **settings: Any
    ) -> RemoteContainer:
        """As at home; an image that is not there is pulled by the daemon."""
        import docker.errors

        ref = getattr(image, "id", image)
        given = _sdk_settings(settings)
        with translated("image", str(ref)):
            try:
                return self._container(self._inner.create(ref, command or None, **given))
            except docker.errors.ImageNotFound:
                if notify is not None:
                    notify(f"Unable to find image '{ref}' locally; {self._engine.context.name} pulls it")
                self._engine.client.images.pull(ref)
                return self._container(self._inner.create(ref, command or None, **given))

    def run_attached(
        self,
        image: Any,
        command: Any = None,
        *,
        notify: Notify | None = None,
        tied: bool = False,
        kept: bool = True,
        **settings: Any,
    ) -> tuple[RemoteContainer, RemoteAttachment]:
        """Create, attach, start. A container that removes itself is waited for before it is gone."""
        container = self.create(image, command, notify=notify, **settings)
        return container, self.start_attached(container)

    def start_attached(self, container: RemoteContainer, *, tied: bool = False, kept: bool = True) -> RemoteAttachment:
        """Attach to a new container and start it; one that removes itself is taken back when that fails."""
        attrs = container.attrs
        attachment = container.open_attachment(stdin=bool(attrs["Config"].get("OpenStdin")))
        waiting = _Waiting(container)
        attachment._ended = waiting.result
        with translated("container", container.name):
            try:
                container._inner.start()
            except BaseException:
                if attrs["HostConfig"].get("AutoRemove"):
                    with contextlib.suppress(Exception):
                        container._inner.remove(force=True)
                raise
        return attachment

    def run(
        self, image: Any, command: Any = None, *, detach: bool = False, remove: bool = False, **settings: Any
    ) -> Any:
        """As at home: the container with `detach`, else its output; ContainerExit for a status other than 0."""
        stdout, stderr = settings.pop("stdout", True), settings.pop("stderr", False)
        settings["auto_remove"] = remove or settings.get("auto_remove")
        if detach:
            container = self.create(image, command, **settings)
            container.start()
            return container
        container, attachment = self.run_attached(image, command, **settings)
        output, errors = [], []
        for name, data in attachment:
            if name == "stderr":
                errors.append(data)
            if stderr if name == "stderr" else stdout:
                output.append(data)
        if attachment.exit_code:
            raise ContainerExit(
                f"Command '{command}' in image '{image}' returned non-zero exit status {attachment.exit_code}",
                status=attachment.exit_code,
                container=container.id,
                stderr=b"".join(errors).decode(errors="replace"),
            )
        return b"".join(output)

    def prune(self, filters: Any = None) -> dict[str, Any]:
        with translated():
            found: dict[str, Any] = self._inner.prune(filters=filters)
        return found

    def __getattr__(self, name: str) -> Any:
        raise only_at_home(f"containers.{name}", self._engine)


class _Waiting:
    """Waits for a container's end from before its start: one that removes itself is gone right after.

    That the daemon waits is known by its headers, which docker sends at once; one that does not is not waited for long.
    """

    def __init__(self, container: RemoteContainer) -> None:
        import threading

        self._codes: list[int] = []
        asked = threading.Event()
        api = container._engine.client.api

        def wait() -> None:
            try:
                url = api._url("/containers/{0}/wait", container.id)
                answer = api._post(url, params={"condition": "next-exit"}, stream=True, timeout=None)
                asked.set()
                self._codes.append(int(answer.json()["StatusCode"]))
            except Exception:  # whatever it is: the exit code is not known then
                return
            finally:
                asked.set()

        self._thread = threading.Thread(target=wait, name="labkernel-remote-wait", daemon=True)
        self._thread.start()
        asked.wait(HEADERS_S)

    def result(self) -> int:
        self._thread.join()
        return self._codes[0] if self._codes else 125


def _sdk_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our commands' settings in the forms that the Docker SDK insists on."""
    import docker.types

    found = {key: value for key, value in settings.items() if value is not None and value is not False and value != []}
    if "ports" in found:
        ports: dict[str, list[Any]] = {}
        for each in parse_ports(found["ports"]):
            host = None if each["host"] is None else "-".join(map(str, sorted(set(each["host"]))))
            ports.setdefault(f"{each['port']}/{each['proto']}", []).append((each["ip"], host) if each["ip"] else host)
        found["ports"] = ports
    if "ulimits" in found:
        words = [str(each).partition("=")[::2] for each in found["ulimits"]]
        numbers = [(name, text.partition(":")[::2]) for name, text in words]
        found["ulimits"] = [
            docker.types.Ulimit(name=name, soft=int(soft), hard=int(hard or soft)) for name, (soft, hard) in numbers
        ]
    if isinstance(found.get("restart_policy"), str):
        word, _, times = found["restart_policy"].partition(":")
        found["restart_policy"] = {"Name": word, "MaximumRetryCount": int(times or 0)}
    named = [word for word in found.get("devices", ()) if isinstance(word, str) and not word.startswith("/")]
    if named:  # CDI devices, which the API wants as a request
        found["devices"] = [word for word in found["devices"] if word not in named]
        request = docker.types.DeviceRequest(driver="cdi", device_ids=named)
        found["device_requests"] = [*found.get("device_requests", ()), request]
    found.pop("console_size", None)
    return found


class RemoteRuntime:
    """The one thing commands ask of the runtime themselves."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    def wait(self, id: str, condition: str = "not-running") -> None:
        with contextlib.suppress(Exception):
            self._engine.client.api.wait(id, condition=condition)
